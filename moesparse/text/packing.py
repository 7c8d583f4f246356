"""Windows of the stream that documents make end to end, drawn for calibration."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moesparse.chats import ChatTemplate
from moesparse.documents import (
    Chunk,
    GivenText,
    PathLike,
    SourceRead,
    SourceSampled,
    check_chats,
    read,
    whole_documents,
)
from moesparse.errors import CalibrationError, UsageError
from moesparse.text.encoding import (
    CHARS_PER_TOKEN,
    DATASET_POOLS,
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    MIN_PIECE_CHARS,
    SHORTENED,
    checked_length,
    encode_chunk,
)
from moesparse.text.sampling import check_shares, cut, drawn, even_counts, sample_stretches, share_counts
from moesparse.text.sources import TextSource, check_domains, domains_of

__all__ = ["document_windows", "domain_windows", "new_notes", "note_drawn", "windows"]


def windows(
    source: PathLike | Sequence[PathLike],
    tokenizer: Any,
    *,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    max_length: int | None = None,
    chat: bool = False,
    found: list[SourceRead] | None = None,
) -> torch.Tensor:
    """Sample token windows for calibration.

    Every source gives the same number of windows; what a short one lacks, the others give. Within a source the windows
    are spread: it is divided into as many equal stretches as it gives windows, and one is drawn from each. A source is
    read once, in pieces; of a large one a seeded sample of pieces is kept and tokenized, never the whole. No window is
    drawn twice and none crosses from one source, or one piece, into the next.

    Args:
        source: a file, a `datasets` name, or a list of them; see the module's docstring.
        tokenizer: a transformers tokenizer.
        samples: windows wanted.
        length: tokens a window; lowered to the model's context where that is shorter.
        seed: another seed draws other windows; the same seed the same ones, on any platform.
        max_length: the model's context in tokens; `tokenizer.model_max_length` when None.
        chat: make documents of chat records, by the tokenizer's chat template.
        found: is given what was read of each source.

    Returns:
        [samples, min(length, context)] int64, in seeded random order, so that any prefix is a sample too.

    Raises:
        UsageError: samples or length is below 1, or there is no source, or one is a table (.csv).
        CalibrationError: the text holds fewer windows than asked; says how much there is and what would fit.
        MoESparseError: a source cannot be read as text; names the file, and the line in a .jsonl. Or `chat`, and the
            tokenizer has no chat template or no source a chat record.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    named = [TextSource(path, "") for path in sources]  # type: ignore[arg-type]
    ids, _ = _sample_windows(named, tokenizer, samples, length, seed, max_length, chat, found)
    return ids


def domain_windows(
    sources: Sequence[TextSource],
    tokenizer: Any,
    *,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    max_length: int | None = None,
    chat: bool = False,
    found: list[SourceRead] | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """The windows that `windows` samples from the same files, and the domain of each.

    With shares each source gives its share of the windows, to within one of them, and a source that cannot is refused.

    Args:
        sources: files with their domains; several files may have the same. The rest is as for `windows`.

    Returns:
        ([samples, min(length, context)] int64, domain of each window).

    Raises:
        UsageError: fewer samples than domains, shares that do not add up to 1 or of which one gets no window.
        CalibrationError: a domain whose text fills no window, or a source too short for its share. And all errors of
            `windows`.
    """
    check_domains(sources, samples)
    ids, origin = _sample_windows(sources, tokenizer, samples, length, seed, max_length, chat, found)
    return ids, domains_of(sources, origin, samples, f"window of {ids.shape[1]} tokens", "shorter windows")


def document_windows(
    documents: Iterable[Any],
    tokenizer: Any,
    *,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    max_length: int | None = None,
    chat: bool = False,
    name: str = "documents",
    found: list[SourceRead] | None = None,
) -> torch.Tensor:
    """Windows of text that the caller holds, packed as that of a file: as many as it fills, at most `samples`.

    Args:
        documents: strings, each a document, or rows with a "text" as of a `datasets` object, streamed or not. Read
            once, and no further than a dataset of `windows` is.
        name: what errors call it. The rest is as for `windows`.

    Returns:
        [n, t] int64, n at most `samples`, in seeded random order; t is min(length, context), or the tokens there are
        where they are fewer.

    Raises:
        UsageError: samples or length is below 1. MoESparseError: a record that is no text, or no text at all.
    """
    length = checked_length(samples, length, tokenizer, max_length)
    rng = random.Random(seed)
    notes = [SourceSampled(name)]
    (stream,) = _read_streams([GivenText(documents, name)], tokenizer, samples, length, chat, notes, rng)
    length = min(length, max(map(len, stream)))
    pool = [window for ids in stream for window in cut(ids, length)]
    chosen = drawn([pool], [min(samples, len(pool))], rng)
    note_drawn(notes, [0] * len(chosen), [length] * len(chosen), found)
    return torch.stack([window for window, _ in chosen])


def _sample_windows(
    sources: Sequence[TextSource],
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    max_length: int | None,
    chat: bool,
    found: list[SourceRead] | None,
) -> tuple[torch.Tensor, list[int]]:
    """The windows of `windows`, and the number of the source each comes from."""
    if not sources:
        raise UsageError("source must be a file or a list of files, got an empty list")
    length = checked_length(samples, length, tokenizer, max_length)
    shares = check_shares([one.share for one in sources])
    wanted = None if shares is None else share_counts(shares, samples)
    rng, notes = random.Random(seed), new_notes(sources)
    paths = [one.path for one in sources]
    streams = _read_streams(paths, tokenizer, samples, length, chat, notes, rng)
    pools = [[window for ids in stream for window in cut(ids, length)] for stream in streams]
    if sum(map(len, pools)) < samples:
        raise CalibrationError(_too_little(paths, streams, samples, length))
    for one, pool, count in zip(sources, pools, wanted or [0] * len(pools), strict=True):
        if len(pool) < count:
            raise CalibrationError(
                f"{one.path} must hold {count} windows of {length} tokens for its share of {one.share:g} in {samples}, "
                f"got {len(pool)}; give it more text or a smaller share, or take fewer samples"
            )
    chosen = drawn(pools, wanted or even_counts([len(pool) for pool in pools], samples), rng)
    origin = [number for _, number in chosen]
    note_drawn(notes, origin, [length] * samples, found)
    return torch.stack([window for window, _ in chosen]), origin


def new_notes(sources: Sequence[TextSource]) -> list[SourceSampled]:
    """What is to be said of each source, of which nothing is read yet."""
    return [SourceSampled(os.fspath(one.path), share=one.share) for one in sources]


def note_drawn(
    notes: Sequence[SourceSampled], origin: Sequence[int], tokens: Sequence[int], found: list[SourceRead] | None
) -> None:
    """Note what was drawn of each source, and hand it on."""
    for number, held in zip(origin, tokens, strict=True):
        notes[number].windows += 1
        notes[number].tokens += held
    if found is not None:
        found += notes


def _read_streams(
    sources: Sequence[PathLike],
    tokenizer: Any,
    samples: int,
    length: int,
    chat: bool,
    notes: Sequence[SourceSampled],
    rng: random.Random,
) -> list[list[torch.Tensor]]:
    """The tokens of each source, in stretches that no window crosses: enough for so many windows where it has them."""
    piece_chars = max(MIN_PIECE_CHARS, CHARS_PER_TOKEN * length)
    pieces = -(-CHARS_PER_TOKEN * samples * length // piece_chars)
    streams: list[list[torch.Tensor]] = []
    template = ChatTemplate(tokenizer) if chat else None
    for one, note in zip(sources, notes, strict=True):
        limit = DATASET_POOLS * pieces * piece_chars
        stretches = sample_stretches(read(one, piece_chars, limit, template, note), piece_chars, pieces, rng)
        streams.append([_encode_stretch(stretch, tokenizer) for stretch in stretches])
    if chat:
        check_chats(notes)
    return streams


def _encode_stretch(stretch: list[Chunk], tokenizer: Any) -> torch.Tensor:
    ids = [each for document in whole_documents(stretch) for each in encode_chunk(document, tokenizer)]
    return torch.tensor(ids, dtype=torch.int64)


def _too_little(sources: Sequence[PathLike], streams: list[list[torch.Tensor]], samples: int, length: int) -> str:
    sizes = [len(ids) for stream in streams for ids in stream]
    names = ", ".join(os.fspath(source) for source in sources)
    held, total = sum(size // length for size in sizes), sum(sizes)
    # what is cut off at the ends of the sources may be all that lacks
    times = max(2, math.ceil(samples * length / max(total, 1)))
    cures = [f"give more text ({times} times as much)"] + ([f"samples={held}"] if held else [])
    shorter = length
    while shorter and sum(size // shorter for size in sizes) < samples:
        shorter -= 1
    # far shorter windows than were asked for are another calibration
    if shorter * SHORTENED >= length:
        cures.append(f"length={shorter}")
    return (
        f"{names} must hold {samples} windows of {length} tokens ({samples * length} tokens), got {held} ({total} "
        f"tokens); {' or '.join(cures)}"
    )
