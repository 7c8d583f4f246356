"""A document as tokens, by the packing convention, and how much text is looked at for how many."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from moesparse.documents import Chunk
from moesparse.errors import UsageError

__all__ = [
    "CHARS_PER_TOKEN",
    "DATASET_POOLS",
    "DEFAULT_LENGTH",
    "DEFAULT_SAMPLES",
    "MIN_PIECE_CHARS",
    "SHORTENED",
    "adds_bos",
    "bounded_length",
    "checked_length",
    "encode_chunk",
    "encode_document",
    "special_ids",
    "text_hash",
]

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048

CHARS_PER_TOKEN = 16
"""Characters looked at for every token wanted from a file: text runs at 1 to 6 characters a token, so a source that is
larger than this is sampled before it is tokenized."""
MIN_PIECE_CHARS = 1 << 16
DATASET_POOLS = 16
"""A dataset may be a web crawl: it is read no further than this many times what is looked at."""
SHORTENED = 4
"""How many times shorter the windows are that a refusal still names as a way out."""


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS in front of a text."""
    return bool(special_ids(tokenizer)[0])


def encode_document(tokenizer: Any, text: str, *, starts: bool = True, ends: bool = True) -> list[int]:
    """Encode one document by the packing convention: [BOS] text [EOS].

    Args:
        tokenizer: a transformers tokenizer.
        text: a document or a part of one.
        starts: the text begins its document, so BOS belongs in front.
        ends: the text ends its document, so EOS follows.
    """
    bos, eos = special_ids(tokenizer)
    body = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*(bos if starts else []), *body, *(eos if ends else [])]


def encode_chunk(document: Chunk, tokenizer: Any) -> list[int]:
    """A document or a part of one, with the special tokens that it has not."""
    starts, ends = (each and not document.complete for each in document[1:3])
    return encode_document(tokenizer, document.text, starts=starts, ends=ends)


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """([BOS] if the tokenizer adds it by itself, [EOS] if there is one)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    leads = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return [bos] if leads else [], [] if eos is None else [eos]


def checked_length(samples: int, length: int, tokenizer: Any, max_length: int | None) -> int:
    """The length of a window within the model's context; refused where a number cannot be."""
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}")
    return bounded_length(length, tokenizer, max_length)


def bounded_length(length: int, tokenizer: Any, max_length: int | None, at_least: int = 1) -> int:
    if length < at_least:
        raise UsageError(f"length must be at least {at_least}, got {length}")
    context = tokenizer.model_max_length if max_length is None else max_length
    if context < at_least:
        raise UsageError(f"max_length must be at least {at_least}, got {context}")
    return min(length, int(context))


def text_hash(token_windows: torch.Tensor) -> str:
    """Name a set of windows: sha256 over their shape and ids, the same on every platform and integer dtype."""
    shape = "x".join(map(str, token_windows.shape))
    data = token_windows.detach().cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"{shape}:".encode() + data).hexdigest()
