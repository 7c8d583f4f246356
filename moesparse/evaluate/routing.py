"""How far the router of a pruned model agrees with the dense model's, and who takes over from experts that are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["agreement", "original_ids"]

# takers named of each expert that is gone
_TAKERS = 3
# tokens looked at together: [T, E] twice
_ROWS = 1 << 14


def original_ids(
    experts: int, kept: Sequence[int] | None, others: int, kept_of_others: Sequence[int] | None
) -> tuple[Tensor, Tensor] | None:
    """Ids of the experts of two blocks in one numbering: that of the model which both were cut from.

    Args:
        experts: of the dense block; `others` of the pruned one.
        kept: what config.json of the dense one says its experts were in the model before, position = id now; None where
            it was not cut. `kept_of_others` of the pruned one.

    Returns:
        [experts] and [others] int64; None where the counts differ and nothing says which experts are left.
    """
    if kept is None and kept_of_others is None and experts != others:
        return None
    mine = torch.arange(experts) if kept is None else torch.tensor(kept)
    theirs = torch.arange(others) if kept_of_others is None else torch.tensor(kept_of_others)
    return (mine, theirs) if (len(mine), len(theirs)) == (experts, others) else None


def agreement(dense: Tensor, pruned: Tensor, ids: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Compare the choices of two routers for the same tokens.

    Args:
        dense, pruned: [T, K] integers, the experts chosen for each token, K of each its own; ids beyond those known
            mark empty slots.
        ids: of the experts of both in one numbering, see `original_ids`.

    Returns:
        "chosen": the share of the experts that the dense router chose which the pruned one chose as well, mean over
        tokens. "kept": the same of those chosen experts alone that the pruned model still has; None where it was given
        none. "gone": the share of the dense choices whose expert is not there any more. "taken_over": of every such
        expert, by its id in the dense block, the tokens it had and by whom they were taken: [id, share] of the experts
        that the pruned router chose and the dense one did not, several for one token each with an equal part.
    """
    mine, theirs = ids
    size = int(max(mine.max(), theirs.max())) + 1
    still = torch.zeros(size, dtype=torch.bool)
    still[theirs] = True
    tokens = slots = common = staying = 0
    chosen = kept_sum = 0.0
    kept_tokens = 0
    moved = torch.zeros(size, size, dtype=torch.float64)
    had = torch.zeros(size, dtype=torch.int64)
    for rows in (slice(at, at + _ROWS) for at in range(0, len(dense), _ROWS)):
        a, b = _sets(dense[rows], mine, size), _sets(pruned[rows], theirs, size)
        both = (a & b).sum(1)
        count, stay = a.sum(1), (a & still).sum(1)
        tokens += len(a)
        slots += int(count.sum())
        common += int(both.sum())
        staying += int(stay.sum())
        chosen += float((both / count.clamp_min(1)).double().sum())
        kept_sum += float((both[stay > 0] / stay[stay > 0]).double().sum())
        kept_tokens += int((stay > 0).sum())
        new = (b & ~a).double()
        moved += (a & ~still).double().T @ (new / new.sum(1, keepdim=True).clamp_min(1))
        had += a.sum(0)
    back = {int(original): new for new, original in enumerate(mine.tolist())}
    gone = [each for each in mine.tolist() if not still[each]]
    return {
        "chosen": chosen / tokens,
        "kept": kept_sum / kept_tokens if kept_tokens else None,
        "gone": 1 - staying / slots if slots else 0.0,
        "taken_over": [_takers(back, expert, int(had[expert]), moved[expert]) for expert in gone],
    }


def _takers(back: Mapping[int, int], expert: int, had: int, moved: Tensor) -> dict[str, Any]:
    share = moved / max(had, 1)
    best = share.argsort(descending=True, stable=True)[:_TAKERS].tolist()
    by = [[back[each], round(float(share[each]), 4)] for each in best if share[each] > 0 and each in back]
    return {"expert": back[expert], "tokens": had, "by": by}


def _sets(chosen: Tensor, ids: Tensor, size: int) -> Tensor:
    """[T, size] bool: which experts each token goes to, by the common numbering."""
    found = torch.zeros(len(chosen), size + 1, dtype=torch.bool)
    numbers = torch.cat((ids, torch.tensor([size])))
    found.scatter_(1, numbers[chosen.long().clamp(0, len(ids))], True)
    return found[:, :size]
