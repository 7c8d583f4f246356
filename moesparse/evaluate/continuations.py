"""What two models write after the same prompts: loops, repetition, length, and where they part.

A continuation loops where it ends in the same stretch of tokens at least four times in a row, those repeats at least 64
tokens long together, and no end of text came: one token 64 times, sixteen tokens 4 times, forty tokens 4 times. Shorter
repeats are found in texts of people too (tables, refrains); a loop that the model has left again is no loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesparse.calibration.demonstrations import continue_prompts
from moesparse.errors import UsageError
from moesparse.progress import Progress

__all__ = ["LOOP_TOKENS", "Prompts", "chance", "compare_written", "ends_in_loop", "make_prompts", "write"]

LOOP_TOKENS, _LOOP_REPEATS = 64, 4
# of the share of n-grams that differ
_GRAM = 4
_SEED = 0


@dataclass(frozen=True, eq=False)
class Prompts:
    """What both models go on from, and how.

    Attributes:
        ids: [m, s] int64.
        domains: of each.
        new_tokens: that are written after each at most.
        temperature: of the drawn continuations; a greedy one is made of each prompt too.
        batch_size: continued together.
    """

    ids: Tensor
    domains: Sequence[str]
    new_tokens: int
    temperature: float
    batch_size: int = 8

    def describe(self) -> dict[str, Any]:
        """For JSON, and for a run that goes on."""
        return {
            "prompts": len(self.ids),
            "prompt_tokens": self.ids.shape[1],
            "new_tokens": self.new_tokens,
            "temperature": self.temperature,
        }


def make_prompts(
    windows: Tensor,
    domains: Sequence[str],
    *,
    count: int,
    length: int,
    new_tokens: int,
    temperature: float,
    context: int,
    batch_size: int = 8,
) -> Prompts:
    """The first tokens of windows that are spread over every domain.

    Args:
        windows: [n, t] int64 without padding.
        domains: of each window.
        count: prompts in all; domains share them as evenly as their windows allow.
        length: tokens of a prompt; bounded by half a window.
        new_tokens: bounded by what the model's `context` leaves behind a prompt.
        temperature, batch_size: see `Prompts`.

    Raises:
        UsageError: a number out of range, or a context that leaves no room for a loop.
    """
    if count < 1 or not 0 < temperature < math.inf:
        raise UsageError(f"prompts must be at least 1 and the temperature above 0, got {count} and {temperature}")
    length = min(length, max(1, windows.shape[1] // 2))
    new_tokens = min(new_tokens, context - length)
    if new_tokens < LOOP_TOKENS:
        raise UsageError(
            f"new_tokens must be at least {LOOP_TOKENS}, the length of a loop, got {new_tokens} behind {length} tokens "
            f"of a prompt in a context of {context}"
        )
    names = list(dict.fromkeys(domains))
    rows = {name: [row for row, domain in enumerate(domains) if domain == name] for name in names}
    shares = {name: count // len(names) + (at < count % len(names)) for at, name in enumerate(names)}
    chosen = [
        (rows[name][at * len(rows[name]) // taken], name)
        for name in names
        for taken in [min(shares[name], len(rows[name]))]
        for at in range(taken)
    ]
    ids = torch.stack([windows[row, :length] for row, _ in chosen])
    return Prompts(ids, [name for _, name in chosen], new_tokens, temperature, batch_size)


def write(model: Any, prompts: Prompts, device: torch.device | None, progress: Progress) -> dict[str, Tensor]:
    """Continue every prompt, greedily and drawn by a fixed seed; the model is in memory whole.

    Returns:
        "greedy" and "sampled" [m, new_tokens] int64, -1 behind an end token, which stays.
    """
    found = {}
    for kind, temperature in (("greedy", 0.0), ("sampled", prompts.temperature)):
        ids, mask = continue_prompts(
            model,
            prompts.ids,
            prompts.new_tokens,
            temperature=temperature,
            seed=_SEED,
            batch_size=prompts.batch_size,
            device=device,
            progress=progress,
        )
        written = ids if mask is None else ids.masked_fill(~mask, -1)
        found[kind] = written[:, prompts.ids.shape[1] :].contiguous()
    return found


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether a continuation, with its end token where it has one, loops; see the module's docstring."""
    ids = torch.tensor(list(tokens))
    for period in range(1, len(ids) // _LOOP_REPEATS + 1):
        span = max(LOOP_TOKENS, _LOOP_REPEATS * period)
        tail = ids[-span:]
        if span <= len(ids) and torch.equal(tail[period:], tail[:-period]):
            return True
    return False


def compare_written(
    dense: dict[str, Tensor], pruned: dict[str, Tensor], ends: Sequence[int]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What was written by two models, kind by kind.

    Args:
        dense, pruned: as `write` gives them.
        ends: ids of end tokens.

    Returns:
        For each kind the two sides: "loops", the share of continuations that loop; "looping", how many; "distinct", the
        mean share of the 4-grams of a continuation that differ from each other; "length", mean tokens; "stopped", the
        share with an end token. Of the greedy kind also "first_divergence", the median over prompts of the tokens that
        both wrote alike before the first that differs. And the rows they were counted from, for each kind.
    """
    figures: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind in ("greedy", "sampled"):
        sides = {"dense": _read(dense[kind], ends), "pruned": _read(pruned[kind], ends)}
        figures[kind] = {side: _figures(held) for side, held in sides.items()}
        rows[kind] = [
            {"dense": one, "pruned": other, "first_divergence": _alike(one["tokens"], other["tokens"])}
            for one, other in zip(*sides.values(), strict=True)
        ]
        if kind == "greedy":
            alike = sorted(row["first_divergence"] for row in rows[kind])
            figures[kind]["first_divergence"] = alike[len(alike) // 2]
    return figures, rows


def chance(few: int, many: int, count: int) -> float:
    """How likely the second of two groups of `count` has at least `many` of all `few + many` by chance alone.

    Fisher's exact test, one side (Fisher 1935).
    """
    total = few + many
    ways = sum(math.comb(count, k) * math.comb(count, total - k) for k in range(many, min(total, count) + 1))
    return ways / math.comb(2 * count, total)


def _read(written: Tensor, ends: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for row in written.tolist():
        tokens = [each for each in row if each >= 0]
        stopped = bool(tokens) and tokens[-1] in ends
        # an end token comes once, so that what stopped never ends in a loop
        found.append({"tokens": tokens, "stopped": stopped, "loops": ends_in_loop(tokens)})
    return found


def _figures(held: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "loops": sum(each["loops"] for each in held) / len(held),
        "looping": sum(each["loops"] for each in held),
        "distinct": sum(_distinct(each["tokens"]) for each in held) / len(held),
        "length": sum(len(each["tokens"]) for each in held) / len(held),
        "stopped": sum(each["stopped"] for each in held) / len(held),
    }


def _distinct(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that differ from each other; 1 where there is none."""
    grams = [tuple(tokens[at : at + _GRAM]) for at in range(len(tokens) - _GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
