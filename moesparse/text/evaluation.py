"""Whole sources cut into consecutive windows, for perplexity."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moesparse.chats import ChatTemplate
from moesparse.documents import Chunk, PathLike, SourceRead, read, whole_documents
from moesparse.errors import MoESparseError, UsageError
from moesparse.text.encoding import DEFAULT_LENGTH, MIN_PIECE_CHARS, SHORTENED, bounded_length, special_ids

__all__ = ["evaluation_windows"]


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
    length = bounded_length(length, tokenizer, max_length, at_least=2)
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UsageError(f"stride must lie in 1..{length} (the window), got {stride}")
    if chat and join is not None:
        raise UsageError(f"join must be left out with chat records, whose template ends them, got {join!r}")
    note = SourceRead(os.fspath(source))
    template = ChatTemplate(tokenizer) if chat else None
    documents = list(whole_documents(read(source, MIN_PIECE_CHARS, None, template, note)))
    if found is not None:
        found.append(note)
    if join is not None:
        documents = [Chunk(join.join(document.text for document in documents), True, True)]

    bos, eos = special_ids(tokenizer)
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
            + (f" or length={len(ids)}" if len(ids) * SHORTENED >= length else "")
        )
    cut = torch.tensor(ids).unfold(0, length, stride).clone()
    if ends is None:
        return cut, None
    edges = np.concatenate(ends)
    starts = np.arange(count) * stride
    skipped = np.where(starts > 0, max(1, length - stride), 1)
    return cut, int((edges[starts + length - 1] - edges[starts + skipped - 1]).sum())


def _token_ends(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """UTF-8 byte position in `text` where each token ends, never decreasing."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    positions = np.concatenate(([0], np.cumsum(widths)))
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    return positions[np.maximum.accumulate(ends)] if len(ends) else ends
