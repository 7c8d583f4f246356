"""What became of a quantised weight, tensor by tensor and code by code."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch

from moesparse.models.formats.base import CODES, SCALE, Coded
from moesparse.models.formats.integers import ZERO
from moesparse.models.formats.stored import StoredWeights
from moesparse.system.shards import Shards

__all__ = ["became", "same_bytes"]


def became(
    result: StoredWeights, key: str, source: StoredWeights, name: str, ids: Sequence[int] | None = None
) -> str | None:
    """Compare a quantised weight with that of a source; the codes of one expert of each are in memory.

    Args:
        result: that holds `key`.
        source: that holds `name`.
        ids: of the experts that were kept of a stack; None for all, and for the weight of one.

    Returns:
        "equal": every byte; "pruned": other codes, and those stand for zero; "requantised": other codes under other
        scales and zero points. None where it is stored in another way.
    """
    ours, theirs = result.stored.get(key), source.stored.get(name)
    if ours is None or theirs is None or ours.format.name != theirs.format.name:
        return None
    if ours.names.keys() != theirs.names.keys() or len(ours.beside) != len(theirs.beside):
        return None
    pairs = [*((what, ours.names[what], old) for what, old in theirs.names.items())]
    pairs += [("beside", part, old) for part, old in zip(ours.beside, theirs.beside, strict=True)]
    differing = set()
    for what, part, old in pairs:
        if not _alike(result.raw, part, source.raw, old, ids):
            return None
        if not _same_part(result.raw, part, source.raw, old, ids):
            differing.add(what)
    if not differing:
        return "equal"
    if differing == {CODES} and _differ_in_zeros(result, key, source, name, ids):
        return "pruned"
    return "requantised" if differing <= {CODES, SCALE, ZERO} else None


def same_bytes(one: Shards, key: str, other: Shards, name: str) -> bool:
    """Whether two tensors hold the same, as it lies on the disk."""
    return all(a == b for a, b in zip_longest(one.chunks(key), other.chunks(name)))


def _alike(result: Shards, part: str, source: Shards, old: str, ids: Sequence[int] | None) -> bool:
    """Whether a tensor has the dtype and the shape of the source's, of all entries or of those named."""
    new, before = result.tensors[part], source.tensors[old]
    shape = before.shape if ids is None else (len(ids), *before.shape[1:])
    return new.dtype == before.dtype and new.shape == shape


def _same_part(result: Shards, part: str, source: Shards, old: str, ids: Sequence[int] | None) -> bool:
    """Whether it has the bytes, too."""
    if ids is None:
        return same_bytes(result, part, source, old)
    entries = ((result.read(part, at, codes=True), source.read(old, id, codes=True)) for at, id in enumerate(ids))
    return all(one.view(torch.uint8).equal(other.view(torch.uint8)) for one, other in entries)


def _differ_in_zeros(
    result: StoredWeights, key: str, source: StoredWeights, name: str, ids: Sequence[int] | None
) -> bool:
    """Whether every code that differs stands for zero in the result."""
    format = result.stored[key].format
    if not isinstance(format, Coded):
        return False
    entries: Sequence[tuple[int | None, int | None]] = [(None, None)]
    if result.is_stacked(key):
        entries = list(enumerate(ids or range(result.tensors[key].shape[0])))
    for at, id in entries:
        parts = result.parts_of(key, at)
        codes, before = format.codes(parts), format.codes(source.parts_of(name, id))
        if format.values(codes, parts)[codes != before].any():
            return False
    return True
