"""One record a window: whole documents, padded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from moesparse.chats import ChatTemplate
from moesparse.documents import SourceRead, check_chats, is_dataset, read
from moesparse.errors import CalibrationError
from moesparse.text.encoding import (
    CHARS_PER_TOKEN,
    DATASET_POOLS,
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    MIN_PIECE_CHARS,
    checked_length,
    encode_chunk,
)
from moesparse.text.packing import new_notes, note_drawn
from moesparse.text.sampling import by_tokens, check_shares, even_counts, sample_records
from moesparse.text.sources import TextSource, check_domains, domains_of

__all__ = ["record_windows"]


def record_windows(
    sources: Sequence[TextSource],
    tokenizer: Any,
    *,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    max_length: int | None = None,
    chat: bool = False,
    found: list[SourceRead] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """One record a window: whole documents, of which none begins in the middle and none sees another.

    Every source gives the same number of records; what a short one lacks, the others give. With shares each gives its
    share of all tokens, padding not counted, to within one record. Records are drawn at random without putting one
    back; of a dataset the first 16 * samples are looked at. What is longer than a window is cut behind it.

    Args:
        sources: files with their domains. A .txt is one record.
        samples: records wanted.
        length: tokens of a record at most. The rest is as for `domain_windows`.

    Returns:
        ids [samples, t] int64, padded on the right by the tokenizer's padding token or 0; mask [samples, t] bool, True
        where a token is real; the domain of each. t is the length of the longest record, at most min(length, context).

    Raises:
        CalibrationError: there are fewer records than asked for, or than a share needs. And the errors of
            `domain_windows`.
    """
    check_domains(sources, samples)
    shares = check_shares([one.share for one in sources])
    length = checked_length(samples, length, tokenizer, max_length)
    rng, most_chars = random.Random(seed), max(MIN_PIECE_CHARS, CHARS_PER_TOKEN * length)
    notes, template = new_notes(sources), ChatTemplate(tokenizer) if chat else None
    pools: list[list[list[int]]] = []
    for one, note in zip(sources, notes, strict=True):
        # of what need not end only so much is looked at
        most = DATASET_POOLS * samples if is_dataset(one.path) else None
        chunks = read(one.path, MIN_PIECE_CHARS, None, template, note)
        records = sample_records(chunks, samples, most_chars, most, rng)
        encoded = [(encode_chunk(record, tokenizer), record.ends) for record in records]
        # one token more than fits says that it is cut
        pools.append([ids[: length + 1] if ends else [*ids[:length], 0] for ids, ends in encoded if ids])
    if chat:
        check_chats(notes)
    held = [[min(len(ids), length) for ids in pool] for pool in pools]
    if shares is None:
        counts = even_counts([len(pool) for pool in pools], samples)
    else:
        counts = by_tokens(held, shares, samples)
    _check_records(sources, held, counts, samples)
    chosen = [(ids, number) for number, pool in enumerate(pools) for ids in pool[: counts[number]]]
    rng.shuffle(chosen)
    longest = min(length, max(len(ids) for ids, _ in chosen))
    pad = getattr(tokenizer, "pad_token_id", None)
    rows = torch.full((samples, longest), 0 if pad is None else pad)
    mask = torch.zeros(samples, longest, dtype=torch.bool)
    for row, (ids, number) in enumerate(chosen):
        real = ids[:length]
        rows[row, : len(real)] = torch.tensor(real)
        mask[row, : len(real)] = True
        notes[number].cut += len(ids) > length
    origin = [number for _, number in chosen]
    note_drawn(notes, origin, mask.sum(1).tolist(), found)
    return rows, mask, domains_of(sources, origin, samples, "record", "fewer domains")


def _check_records(
    sources: Sequence[TextSource], held: Sequence[Sequence[int]], counts: Sequence[int], samples: int
) -> None:
    """Refuse sources that hold too few records.

    Args:
        held: tokens of the records of each source.
        counts: records to be taken of each.
    """
    for one, pool, count in zip(sources, held, counts, strict=True):
        if count > len(pool):
            raise CalibrationError(
                f"{one.path} must hold more than {len(pool)} records for its share of {one.share:g} in {samples}; give "
                "it more records or a smaller share, or take fewer samples"
            )
    if sum(counts) < samples:
        cures = [f"samples={sum(counts)}"] if sum(counts) else []
        raise CalibrationError(
            f"{', '.join(one.path for one in sources)} must hold {samples} records, a window each, got {sum(counts)}; "
            + " or ".join(["give more records", *cures])
        )
