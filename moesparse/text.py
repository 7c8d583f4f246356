"""Text in, token windows out: calibration samples and evaluation windows from files or a `datasets` name.

A source is one of
    novel.txt                              one document (any other suffix is read as plain text too)
    pages.jsonl, .ndjson, .json            one JSON object a line, its "text" is a document
    pages.parquet                          a "text" column, one document a row
    wikitext:wikitext-2-raw-v1:train       a `datasets` name as NAME:SPLIT or NAME:CONFIG:SPLIT

A file may be packed by gzip (pages.jsonl.gz). It is UTF-8, or what its byte-order mark says: UTF-16, UTF-32.

With `chat` a record may be a chat instead ("messages", "conversations" and others, see moesparse/chats.py): the
tokenizer's own chat template makes a document of it.

Packing convention: a document is encoded as the tokenizer encodes a text for its model, so BOS goes in front where the
tokenizer puts one itself; EOS, where there is one, follows every document; then documents are laid end to end and cut
into windows. A window has no BOS of its own: it is a stretch of the stream that models are pre-trained on. A chat
record has the special tokens that its template writes and no others.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesparse.chats import ChatTemplate
from moesparse.documents import (
    Chunk,
    GivenText,
    PathLike,
    SourceRead,
    check_chats,
    is_dataset,
    name_of,
    read,
    whole_documents,
)
from moesparse.errors import CalibrationError, MoESparseError, UsageError

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048

# Characters looked at for every token wanted from a file: text runs at 1 to 6 characters a token, so a source that is
# larger than this is sampled before it is tokenized.
_CHARS_PER_TOKEN = 16
_MIN_PIECE_CHARS = 1 << 16
# A dataset may be a web crawl: stop reading after this many times what is looked at.
_DATASET_POOLS = 16
# How many times shorter the windows are that a refusal still names as a way out.
_SHORTENED = 4


@dataclass(frozen=True)
class TextSource:
    """A source of text and the domain its figures are filed under.

    Attributes:
        path: a file, or a `datasets` name.
        domain: a short name such as "novel".
    """

    path: str
    domain: str


def parse_source(argument: str) -> TextSource:
    """Read a command-line source, `FILE` or `FILE=DOMAIN`; without a domain it is the file's name without its ending.

    A file whose own name holds "=" is taken whole when it exists.

    Raises:
        UsageError: the file or the domain is empty.
    """
    path, mark, domain = argument.rpartition("=")
    if not mark or Path(argument).is_file():
        path = argument
        domain = Path(argument.split(":")[0]).stem if is_dataset(argument) else name_of(argument)
    if not path or not domain:
        raise UsageError(f"a text source must be FILE or FILE=DOMAIN, got {argument!r}")
    return TextSource(path, domain)


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
    ids, _ = _sample_windows(sources, tokenizer, samples, length, seed, max_length, chat, found)
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

    Args:
        sources: files with their domains; several files may share one. The rest is as for `windows`.

    Returns:
        ([samples, min(length, context)] int64, domain of each window).

    Raises:
        UsageError: fewer samples than domains. CalibrationError: a domain whose text fills no window. And all errors
            of `windows`.
    """
    names = dict.fromkeys(one.domain for one in sources)
    if samples < len(names):
        raise UsageError(
            f"samples must be at least {len(names)}, a window for each domain ({', '.join(names)}), got {samples}"
        )
    paths = [one.path for one in sources]
    ids, origin = _sample_windows(paths, tokenizer, samples, length, seed, max_length, chat, found)
    domains = [sources[number].domain for number in origin]
    for one in sources:
        if one.domain not in domains:
            raise CalibrationError(
                f"domain {one.domain!r} must give at least one window of {ids.shape[1]} tokens, got none from "
                f"{one.path}: give it more text, shorter windows, or more samples than {samples}"
            )
    return ids, domains


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
    length = _checked_length(samples, length, tokenizer, max_length)
    rng = random.Random(seed)
    (stream,) = streams = _read_streams([GivenText(documents, name)], tokenizer, samples, length, chat, found, rng)
    length = min(length, max(map(len, stream)))
    held = sum(len(ids) // length for ids in stream)
    return torch.stack([window for window, _ in _drawn(streams, min(samples, held), length, rng)])


def _checked_length(samples: int, length: int, tokenizer: Any, max_length: int | None) -> int:
    """The length of a window within the model's context; refused where a number cannot be."""
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}")
    return _bounded_length(length, tokenizer, max_length)


def _sample_windows(
    sources: Sequence[PathLike],
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
    length = _checked_length(samples, length, tokenizer, max_length)
    rng = random.Random(seed)
    streams = _read_streams(sources, tokenizer, samples, length, chat, found, rng)
    if sum(len(ids) // length for stream in streams for ids in stream) < samples:
        raise CalibrationError(_too_little(sources, streams, samples, length))
    chosen = _drawn(streams, samples, length, rng)
    return torch.stack([window for window, _ in chosen]), [number for _, number in chosen]


def _read_streams(
    sources: Sequence[PathLike],
    tokenizer: Any,
    samples: int,
    length: int,
    chat: bool,
    found: list[SourceRead] | None,
    rng: random.Random,
) -> list[list[torch.Tensor]]:
    """The tokens of each source, in stretches that no window crosses: enough for so many windows where it has them."""
    piece_chars = max(_MIN_PIECE_CHARS, _CHARS_PER_TOKEN * length)
    pieces = -(-_CHARS_PER_TOKEN * samples * length // piece_chars)
    streams: list[list[torch.Tensor]] = []
    template = ChatTemplate(tokenizer) if chat else None
    notes = [SourceRead(os.fspath(one)) for one in sources]
    for one, note in zip(sources, notes, strict=True):
        limit = _DATASET_POOLS * pieces * piece_chars
        stretches = _sample_stretches(read(one, piece_chars, limit, template, note), piece_chars, pieces, rng)
        streams.append([_encode_stretch(stretch, tokenizer) for stretch in stretches])
    if chat:
        check_chats(notes)
    if found is not None:
        found += notes
    return streams


def _drawn(
    streams: Sequence[Sequence[torch.Tensor]], samples: int, length: int, rng: random.Random
) -> list[tuple[torch.Tensor, int]]:
    """Windows spread over each source, with its number, in random order."""
    pools = [[window for ids in stream for window in _cut(ids, length)] for stream in streams]
    chosen: list[tuple[torch.Tensor, int]] = []
    shares = _shares([len(pool) for pool in pools], samples)
    for number, (pool, share) in enumerate(zip(pools, shares, strict=True)):
        bounds = [i * len(pool) // share for i in range(share + 1)] if share else []
        chosen += [(pool[rng.randrange(low, high)], number) for low, high in pairwise(bounds)]
    rng.shuffle(chosen)
    return chosen


def evaluation_windows(
    source: PathLike,
    tokenizer: Any,
    length: int = DEFAULT_LENGTH,
    stride: int | None = None,
    *,
    join: str | None = None,
    max_length: int | None = None,
    chat: bool = False,
    found: list[SourceRead] | None = None,
) -> tuple[torch.Tensor, int | None]:
    """Cut a whole source into consecutive windows for perplexity, and count the bytes that are scored.

    Documents are encoded whole, with BOS in front where the tokenizer puts one and EOS between two of them; the last
    partial window is dropped, as published WikiText figures drop it. The first token of a window has no context and is
    never scored; with a stride below the length, neither are the `length - stride` tokens that the window before has
    scored already.

    A token stands for the characters from the end of the token before it to its own end, as UTF-8 bytes: the counts
    of all tokens add up to the text exactly. A character that is split over tokens counts with the first of them; BOS
    and EOS are scored like any token and stand for no bytes.

    Args:
        source: a file or a `datasets` name; see the module's docstring.
        tokenizer: a transformers tokenizer.
        length: tokens a window; lowered to the model's context where that is shorter.
        stride: tokens from the start of a window to the start of the next; `length` when None.
        join: lay all documents into one with this string between them; "\\n\\n" is the WikiText-2 protocol.
        max_length: the model's context in tokens; `tokenizer.model_max_length` when None.
        chat: make documents of chat records, by the tokenizer's chat template; what it writes counts as their bytes.
        found: is given what was read.

    Returns:
        windows: [n, min(length, context)] int64.
        byte_count: UTF-8 bytes that the scored tokens stand for; None when the tokenizer does not tell where in the
            text its tokens lie.

    Raises:
        UsageError: length is below 2, or stride is not in 1..length, or chat records are to be joined.
        MoESparseError: the source cannot be read as text, or is shorter than one window.
    """
    length = _bounded_length(length, tokenizer, max_length, at_least=2)
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UsageError(f"stride must lie in 1..{length} (the window), got {stride}")
    if chat and join is not None:
        raise UsageError(f"join must be left out with chat records, whose template ends them, got {join!r}")
    note = SourceRead(os.fspath(source))
    template = ChatTemplate(tokenizer) if chat else None
    documents = list(whole_documents(read(source, _MIN_PIECE_CHARS, None, template, note)))
    if found is not None:
        found.append(note)
    if join is not None:
        documents = [Chunk(join.join(document.text for document in documents), True, True)]

    bos, eos = _special_ids(tokenizer)
    ids: list[int] = []
    ends: list[np.ndarray] | None = [] if getattr(tokenizer, "is_fast", False) else None
    total_bytes = 0
    ended = True
    for text, _, _, complete in documents:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=ends is not None, verbose=False)
        separators = ([] if ended else eos) + ([] if complete else bos)
        ended = complete
        ids += separators + encoding["input_ids"]
        if ends is not None:
            ends.append(np.full(len(separators), total_bytes))
            ends.append(total_bytes + _token_ends(text, encoding["offset_mapping"]))
        total_bytes += len(text.encode())
    count = (len(ids) - length) // stride + 1
    if count < 1:
        raise MoESparseError(
            f"{os.fspath(source)} must hold a window of {length} tokens, got {len(ids)}; give a longer text"
            + (f" or length={len(ids)}" if len(ids) * _SHORTENED >= length else "")
        )
    cut = torch.tensor(ids).unfold(0, length, stride).clone()
    if ends is None:
        return cut, None
    edges = np.concatenate(ends)
    starts = np.arange(count) * stride
    skipped = np.where(starts > 0, max(1, length - stride), 1)
    return cut, int((edges[starts + length - 1] - edges[starts + skipped - 1]).sum())


def text_hash(token_windows: torch.Tensor) -> str:
    """Name a set of windows: sha256 over their shape and ids, the same on every platform and integer dtype."""
    shape = "x".join(map(str, token_windows.shape))
    data = token_windows.detach().cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"{shape}:".encode() + data).hexdigest()


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS in front of a text."""
    return bool(_special_ids(tokenizer)[0])


def encode_document(tokenizer: Any, text: str, *, starts: bool = True, ends: bool = True) -> list[int]:
    """Encode one document by the packing convention: [BOS] text [EOS].

    Args:
        tokenizer: a transformers tokenizer.
        text: a document or a part of one.
        starts: the text begins its document, so BOS belongs in front.
        ends: the text ends its document, so EOS follows.
    """
    bos, eos = _special_ids(tokenizer)
    body = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*(bos if starts else []), *body, *(eos if ends else [])]


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """([BOS] if the tokenizer adds it by itself, [EOS] if there is one)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    leads = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return [bos] if leads else [], [] if eos is None else [eos]


def _bounded_length(length: int, tokenizer: Any, max_length: int | None, at_least: int = 1) -> int:
    if length < at_least:
        raise UsageError(f"length must be at least {at_least}, got {length}")
    context = tokenizer.model_max_length if max_length is None else max_length
    if context < at_least:
        raise UsageError(f"max_length must be at least {at_least}, got {context}")
    return min(length, int(context))


def _token_ends(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """UTF-8 byte position in `text` where each token ends, never decreasing."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    positions = np.concatenate(([0], np.cumsum(widths)))
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    return positions[np.maximum.accumulate(ends)] if len(ends) else ends


# Sampling


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


def _sample_stretches(chunks: Iterable[Chunk], piece_chars: int, limit: int, rng: random.Random) -> list[list[Chunk]]:
    """Keep `limit` pieces of a stream, each as likely as the next (reservoir sampling); neighbours stay one stretch."""
    kept: list[tuple[int, list[Chunk]]] = []
    for index, piece in enumerate(_pieces(chunks, piece_chars)):
        if len(kept) < limit:
            kept.append((index, piece))
        elif (slot := rng.randrange(index + 1)) < limit:
            kept[slot] = (index, piece)
    kept.sort(key=lambda item: item[0])
    stretches: list[list[Chunk]] = []
    expected = -1
    for index, piece in kept:
        if index != expected:
            stretches.append([])
        stretches[-1] += piece
        expected = index + 1
    return stretches


def _encode_stretch(stretch: list[Chunk], tokenizer: Any) -> torch.Tensor:
    ids: list[int] = []
    for document in whole_documents(stretch):
        starts, ends = (each and not document.complete for each in document[1:3])
        ids += encode_document(tokenizer, document.text, starts=starts, ends=ends)
    return torch.tensor(ids, dtype=torch.int64)


def _cut(ids: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    """Consecutive windows of `ids`; what is left at the end is dropped."""
    count = len(ids) // length
    return ids[: count * length].view(count, length).unbind()


def _shares(available: list[int], samples: int) -> list[int]:
    """Split `samples` evenly over sources that hold `available` windows; the smallest first, so others make it up."""
    shares = [0] * len(available)
    left = samples
    order = sorted(range(len(available)), key=lambda i: available[i])
    for rank, i in enumerate(order):
        shares[i] = min(available[i], left // (len(order) - rank))
        left -= shares[i]
    return shares


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
    if shorter * _SHORTENED >= length:
        cures.append(f"length={shorter}")
    return (
        f"{names} must hold {samples} windows of {length} tokens ({samples * length} tokens), got {held} ({total} "
        f"tokens); {' or '.join(cures)}"
    )
