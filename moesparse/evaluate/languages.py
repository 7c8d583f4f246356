"""The Universal Declaration of Human Rights, its beginning, in twenty languages: to see which of them a model has lost.

A small sample of a text that most models have read often, so that it shows a collapse and no fine differences. NOTICE
beside it has its origin and licence.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.text import encode_document

__all__ = ["language_texts", "language_windows"]


@cache
def language_texts() -> dict[str, str]:
    """Name of a language -> about 2,850 bytes of text in UTF-8."""
    lines = (Path(__file__).parent / "languages.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["language"]: record["text"] for record in map(json.loads, lines)}


def language_windows(tokenizer: Any, length: int) -> tuple[Tensor, Tensor, list[str]]:
    """The texts as windows, with padding behind the last one of each.

    Args:
        tokenizer: of transformers.
        length: tokens of a window, at least 2.

    Returns:
        ids [n, length] int64, mask [n, length] bool, True where a token is real, and the language of each window.
    """
    rows: list[Tensor] = []
    names = []
    for name, text in language_texts().items():
        # a token alone has no context and no successor
        parts = [
            part for part in torch.tensor(encode_document(tokenizer, text, ends=False)).split(length) if len(part) > 1
        ]
        rows += parts
        names += [name] * len(parts)
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    ids[mask] = torch.cat(rows)
    return ids, mask, names
