"""What is drawn from the documents of several sources: windows of their stream or whole records, and how many."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TypeVar

import torch

from moesparse.documents import Chunk
from moesparse.errors import UsageError

__all__ = [
    "by_tokens",
    "check_shares",
    "cut",
    "drawn",
    "even_counts",
    "sample_records",
    "sample_stretches",
    "share_counts",
]

T = TypeVar("T")
# shares are written with two digits: a third is 0.33
_ROUNDING = 0.011


def _pieces(chunks: Iterable[Chunk], piece_chars: int) -> Iterator[list[Chunk]]:
    """Group neighbouring chunks until they hold `piece_chars` characters."""
    piece: list[Chunk] = []
    held = 0
    for chunk in chunks:
        piece.append(chunk)
        held += len(chunk.text)
        if held >= piece_chars:
            yield piece
            piece, held = [], 0
    if piece:
        yield piece


def _reservoir(items: Iterable[T], limit: int, rng: random.Random) -> list[tuple[int, T]]:
    """`limit` items of a stream with their numbers, each as likely as the next (reservoir sampling)."""
    kept: list[tuple[int, T]] = []
    for index, item in enumerate(items):
        if len(kept) < limit:
            kept.append((index, item))
        elif (slot := rng.randrange(index + 1)) < limit:
            kept[slot] = (index, item)
    return kept


def sample_stretches(chunks: Iterable[Chunk], piece_chars: int, limit: int, rng: random.Random) -> list[list[Chunk]]:
    """Keep `limit` pieces of a stream of so many characters; neighbours stay one stretch."""
    stretches: list[list[Chunk]] = []
    expected = -1
    for index, piece in sorted(_reservoir(_pieces(chunks, piece_chars), limit, rng), key=lambda item: item[0]):
        if index != expected:
            stretches.append([])
        stretches[-1] += piece
        expected = index + 1
    return stretches


def sample_records(
    chunks: Iterable[Chunk], limit: int, most_chars: int, most: int | None, rng: random.Random
) -> list[Chunk]:
    """Keep `limit` whole documents of a stream, in random order.

    Args:
        chunks: of the documents.
        limit: how many to keep.
        most_chars: of a document; what is longer is cut there, and does not end then.
        most: documents that are looked at; None for all.
        rng: draws.
    """
    kept = [record for _, record in _reservoir(islice(_records(chunks, most_chars), most), limit, rng)]
    rng.shuffle(kept)
    return kept


def _records(chunks: Iterable[Chunk], most_chars: int) -> Iterator[Chunk]:
    """Documents whose parts are put together, without what lies behind the first `most_chars` characters."""
    parts: list[str] = []
    held = 0
    for chunk in chunks:
        # of a long document no more is held than is kept
        parts.append(chunk.text[: max(most_chars - held, 0)])
        held += len(chunk.text)
        if chunk.ends:
            yield Chunk("".join(parts), True, held <= most_chars, chunk.complete)
            parts, held = [], 0


def cut(ids: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    """Consecutive windows of `ids`; what is left at the end is dropped."""
    count = len(ids) // length
    return ids[: count * length].view(count, length).unbind()


def drawn(
    pools: Sequence[Sequence[torch.Tensor]], counts: Sequence[int], rng: random.Random
) -> list[tuple[torch.Tensor, int]]:
    """So many windows of each source, spread over its windows, with its number, in random order."""
    chosen: list[tuple[torch.Tensor, int]] = []
    for number, (pool, count) in enumerate(zip(pools, counts, strict=True)):
        bounds = [i * len(pool) // count for i in range(count + 1)] if count else []
        chosen += [(pool[rng.randrange(low, high)], number) for low, high in pairwise(bounds)]
    rng.shuffle(chosen)
    return chosen


def even_counts(available: Sequence[int], samples: int) -> list[int]:
    """Split `samples` evenly over sources that hold `available` windows; the smallest first, so others make it up."""
    counts = [0] * len(available)
    left = samples
    order = sorted(range(len(available)), key=lambda i: available[i])
    for rank, i in enumerate(order):
        counts[i] = min(available[i], left // (len(order) - rank))
        left -= counts[i]
    return counts


def check_shares(given: Sequence[float | None]) -> list[float] | None:
    """The shares of all sources, which add up to 1 then; None where no source has one.

    Raises:
        UsageError: some sources have a share and others none, one is not above 0, or they do not add up to 1, but for
            the rounding of two digits.
    """
    shares = [share for share in given if share is not None]
    if not shares:
        return None
    if len(shares) < len(given):
        raise UsageError(f"all sources must have a share, or none, got {len(shares)} of {len(given)} with one")
    total = sum(shares)
    if not all(share > 0 for share in shares) or not abs(total - 1) < _ROUNDING:
        said = " + ".join(f"{share:g}" for share in shares)
        raise UsageError(f"the shares of the sources must be above 0 and add up to 1, got {said} = {total:g}")
    return [share / total for share in shares]


def share_counts(shares: Sequence[float], samples: int) -> list[int]:
    """Whole numbers that add up to `samples`, each within one of its share (largest remainders first).

    Raises:
        UsageError: a share gets none.
    """
    exact = [share * samples for share in shares]
    counts = [int(each + 1e-9) for each in exact]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in order[: samples - sum(counts)]:
        counts[i] += 1
    if not all(counts):
        least = min(shares)
        raise UsageError(
            f"samples must be at least {int(1 / least + 0.999)} for a share of {least:.3g}, got {samples}, of which "
            "it gets no window"
        )
    return counts


def by_tokens(lengths: Sequence[Sequence[int]], shares: Sequence[float], samples: int) -> list[int]:
    """How many records of each source make up its share of all tokens: none has more than one record above it.

    One by one a record is taken from the source that lacks most.

    Args:
        lengths: tokens of the records of each source, in the order in which they are taken.
        shares: of each source.
        samples: records in all.

    Returns:
        Records to take from the front of each source; of one that has no more, one more than it has, and less than
        `samples` in all.
    """
    counts, tokens = [0] * len(shares), [0] * len(shares)
    for _ in range(samples):
        total = sum(tokens)
        source = max(range(len(shares)), key=lambda i: shares[i] * total - tokens[i] if total else shares[i])
        counts[source] += 1
        if counts[source] > len(lengths[source]):
            break
        tokens[source] += lengths[source][counts[source] - 1]
    return counts
