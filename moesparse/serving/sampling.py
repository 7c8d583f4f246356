"""The next token from logits, as OpenAI's API describes its parameters."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Sampler", "Sampling", "log_probabilities"]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, the first of equal ones.
        top_p: only the fewest tokens whose probabilities together reach it; 1 takes all.
        top_k: only so many of the likeliest; 0 takes all.
        presence_penalty: taken from the logit of every token that was generated before.
        frequency_penalty: the same, for every time it was.
        logit_bias: added to the logits of these tokens.
        seed: equal seeds give equal draws; None draws one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


class Sampler:
    """Draws the tokens of one text.

    Args:
        sampling: how.
        index: which of the request's texts it is; each has draws of its own.
    """

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        self._counts = Counter[int]()
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        # on the CPU wherever the model is: the same draws everywhere
        self._generator = torch.Generator().manual_seed((seed + index) % (1 << 63))

    @property
    def plain(self) -> bool:
        """Whether the next token is the largest logit's, so that rows of a batch can be asked for it together."""
        changed = self._sampling
        penalties = (changed.presence_penalty, changed.frequency_penalty)
        return changed.temperature == 0 and not any(penalties) and not changed.logit_bias

    def count(self, token: int) -> None:
        """A token was generated."""
        self._counts[token] += 1

    def choose(self, logits: Tensor) -> int:
        """The next token.

        Args:
            logits: [vocabulary], any float dtype and device; computed with in float32 on the CPU.
        """
        changed = self._sampling
        scores = logits.float().cpu()
        if self._counts and (changed.presence_penalty or changed.frequency_penalty):
            tokens = torch.tensor(list(self._counts))
            times = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            penalty = changed.presence_penalty + changed.frequency_penalty * times
            scores = scores.index_add(0, tokens, penalty, alpha=-1)
        if changed.logit_bias:
            bias = torch.tensor(list(changed.logit_bias.values()), dtype=torch.float32)
            scores = scores.index_add(0, torch.tensor(list(changed.logit_bias)), bias)
        if changed.temperature == 0:
            return int(scores.argmax())
        # the largest at 0: a tiny temperature then gives 0 and -inf, no NaN
        scaled = (scores - scores.max()) / max(changed.temperature, _TINY)
        weights, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        if changed.top_k:
            weights = weights[: changed.top_k] / weights[: changed.top_k].sum()
        if changed.top_p < 1:
            # a token stays while those before it have not reached top_p
            weights = weights[weights.cumsum(-1) - weights < max(changed.top_p, _TINY)]
        return int(tokens[torch.multinomial(weights, 1, generator=self._generator)])


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """What the model itself gives a token and its likeliest alternatives, before temperature and everything else.

    Args:
        logits: [vocabulary], any float dtype; computed with in float32.
        token: the one that was chosen.
        count: how many of the likeliest.

    Returns:
        Its log-probability, and (token, log-probability) of the likeliest, the largest first.
    """
    values = logits.float().log_softmax(-1)
    top = values.topk(min(count, len(values)))
    return float(values[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
