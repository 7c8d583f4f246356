"""How far the next-token distributions of two models lie apart, token by token, from their final hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moesparse.errors import MoESparseError, UsageError

__all__ = ["TOP", "Changed", "Figures", "States", "format_perplexity", "most_changed", "token_figures"]

TOP = 5
"""Tokens of each distribution that are compared by themselves."""

# float32 logits of one model held at a time: 128 MiB
_CHUNK_LOGITS = 1 << 25

# what is known of every scored token
_OF_TOKENS = {
    "kl": torch.float32,
    "dense_nll": torch.float32,
    "pruned_nll": torch.float32,
    "top1": torch.uint8,
    "top5": torch.uint8,
}


class States(Protocol):
    """Final hidden states, batch by batch, and what makes logits of them."""

    def __getitem__(self, number: int) -> Tensor: ...

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Figures:
    """What two models make of the same tokens.

    Attributes:
        tokens: that were scored.
        kl_mean, kl_p99: mean and 99th percentile over tokens of KL(dense || pruned) between the distributions of the
            next token, in nats.
        top1: share of tokens whose likeliest next token is the same.
        top5: mean share of the five likeliest next tokens that both have in common.
        dense_nll, pruned_nll: mean negative log-likelihood of the text, in nats.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    top1: float
    top5: float
    dense_nll: float
    pruned_nll: float

    @classmethod
    def of(cls, tokens: Mapping[str, Tensor], where: Tensor | None = None) -> Figures:
        """Of what `token_figures` gives, or of some of it.

        Args:
            tokens: of every scored token.
            where: [scored tokens] bool; None takes all.
        """
        held = {name: (each if where is None else each[where]).double().numpy() for name, each in tokens.items()}
        count = len(held["kl"])
        if not count:
            raise UsageError("windows must leave a token to score, got none")
        means = {name: float(values.mean()) for name, values in held.items()}
        p99 = float(np.quantile(held["kl"], 0.99))
        return cls(count, means["kl"], p99, means["top1"], means["top5"] / TOP, means["dense_nll"], means["pruned_nll"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON; perplexities are exp of the mean nll, and `ratio` the pruned one's over the dense one's."""
        dense, pruned = _exp(self.dense_nll), _exp(self.pruned_nll)
        return {
            "kl": {"mean": self.kl_mean, "p99": self.kl_p99},
            "agreement": {"top1": self.top1, "top5": self.top5},
            "perplexity": {"dense": dense, "pruned": pruned, "ratio": _exp(self.pruned_nll - self.dense_nll)},
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Changed:
    """A token at which the two models differ much.

    Attributes:
        window, position: of the token that is predicted.
        kl: KL(dense || pruned) in nats.
        dense, pruned: [id, probability] of the likeliest next tokens of each, likeliest first.
    """

    window: int
    position: int
    kl: float
    dense: list[tuple[int, float]]
    pruned: list[tuple[int, float]]


def format_perplexity(value: float) -> str:
    """In words: decimals where they say something."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def token_figures(
    dense: States, pruned: States, ids: Tensor, scored: Tensor, batch_size: int, told: Callable[[int], None]
) -> dict[str, Tensor]:
    """Compare two models on every scored token.

    Distributions are float32 log-softmax of the models' own logits; each divergence is summed in float64.

    Args:
        dense, pruned: final hidden states of the same windows.
        ids: [n, t] int64.
        scored: [n, t - 1] bool, True where token i + 1 is real and has a real one before it.
        batch_size: windows in a batch of states.
        told: called with the number of windows done.

    Returns:
        In the order of scored tokens, each [scored tokens]: "kl" float32 in nats, "dense_nll" and "pruned_nll" float32,
        "top1" uint8, 1 where the likeliest token is the same, and "top5" uint8, how many of the five likeliest are.

    Raises:
        UsageError: vocabularies of other sizes. MoESparseError: a divergence that is not finite; names the window.
    """
    count, done = int(scored.sum()), 0
    # made at once: small results between large ones would keep the room of these from being used again
    tokens = {name: torch.empty(count, dtype=dtype) for name, dtype in _OF_TOKENS.items()}
    step = max(1, _CHUNK_LOGITS // _vocabulary(dense, pruned, ids))
    for number, start in enumerate(range(0, len(ids), batch_size)):
        told(start)
        states = dense[number], pruned[number]
        for row in range(len(states[0])):
            window = ids[start + row]
            for at in range(0, len(window) - 1, step):
                stop = min(at + step, len(window) - 1)
                logits = [
                    each.logits(window[None, at:stop], hidden[row : row + 1, at:stop])[0]
                    for each, hidden in zip((dense, pruned), states, strict=True)
                ]
                found = _compared(logits[0], logits[1], window[at + 1 : stop + 1])
                keep = scored[start + row, at:stop]
                if not (finite := found["kl"].isfinite() | ~keep).all():
                    place = at + 1 + int((~finite).nonzero()[0])
                    raise MoESparseError(
                        f"both models must give finite logits, got others at token {place} of window {start + row}"
                    )
                here = slice(done, done + int(keep.sum()))
                for name, values in found.items():
                    tokens[name][here] = values[keep]
                done = here.stop
    told(len(ids))
    return tokens


def most_changed(
    dense: States,
    pruned: States,
    ids: Tensor,
    scored: Tensor,
    kl: Tensor,
    batch_size: int,
    count: int,
    apart: int,
) -> list[Changed]:
    """The tokens with the largest divergence, and what both models expected there.

    Args:
        dense, pruned, ids, scored, batch_size: as of `token_figures`.
        kl: that it gave.
        count: tokens wanted at most.
        apart: tokens within this distance in one window count as one place.
    """
    windows, positions = scored.nonzero(as_tuple=True)
    places: list[tuple[int, int, float]] = []
    for index in kl.argsort(descending=True, stable=True).tolist():
        window, position, value = int(windows[index]), int(positions[index]) + 1, float(kl[index])
        if value <= 0 or len(places) == count:
            break
        if not any(window == w and abs(position - p) < apart for w, p, _ in places):
            places.append((window, position, value))
    found = []
    for window, position, value in places:
        number, row = divmod(window, batch_size)
        tops = []
        for states in (dense, pruned):
            hidden = states[number][row : row + 1, position - 1 : position]
            p = states.logits(ids[window : window + 1, position - 1 : position], hidden)[0, 0].softmax(-1)
            values, tokens = p.topk(min(TOP, len(p)))
            tops.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))
        found.append(Changed(window, position, value, *tops))
    return found


def _vocabulary(dense: States, pruned: States, ids: Tensor) -> int:
    """Logits of a token, as many in both models."""
    sizes = [each.logits(ids[:1, :1], each[0][:1, :1]).shape[-1] for each in (dense, pruned)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"pruned must have the vocabulary of dense, {sizes[0]} tokens, got {sizes[1]}")
    return sizes[0]


def _compared(dense: Tensor, pruned: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """The figures of rows of logits [r, V], on the CPU."""
    p, q = dense.log_softmax(-1), pruned.to(dense.device).log_softmax(-1)
    wanted = wanted.to(p.device)[:, None]
    # a token that a model rules out has no part in the sum
    parts = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    kl = parts.sum(-1, dtype=torch.float64).clamp_min(0)
    count = min(TOP, p.shape[-1])
    best, others = p.topk(count).indices, q.topk(count).indices
    common = (best[:, :, None] == others[:, None]).sum((1, 2))
    found = {
        "kl": kl,
        "dense_nll": -p.gather(1, wanted)[:, 0],
        "pruned_nll": -q.gather(1, wanted)[:, 0],
        "top1": best[:, 0] == others[:, 0],
        "top5": common,
    }
    return {name: values.cpu() for name, values in found.items()}


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 709 else math.inf
