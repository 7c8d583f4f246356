"""Calibration text that a caller holds, as strings or as a `datasets` object: windows of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.windows import ImageWindows
from moesparse.errors import UsageError
from moesparse.models.meta import context_length, folder_of
from moesparse.models.tokenizer import find_tokenizer
from moesparse.text import document_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Text", "tokenised"]

Text = Iterable[str] | Iterable[Mapping[str, Any]]
"""Strings, each a document, or rows with a "text", as of a `datasets` object."""


def tokenised(
    given: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str = "calibration",
    folder: Path | None = None,
) -> Any:
    """Windows in the place of text, see `moesparse.text.document_windows`; anything else as it was given.

    Args:
        given: calibration data of any kind.
        model: for which it is; bounds the windows.
        tokenizer: None takes that of the folder.
        name: of the argument.
        folder: of the model; None is the one that it was loaded from.

    Raises:
        UsageError: text without a tokenizer, one string alone, or a mapping that is no statistics by domain.
        MoESparseError: a record that is no text.
    """
    if isinstance(given, str | os.PathLike):
        raise UsageError(
            f"{name} must be token windows or a list of texts, got the string {_shown(os.fspath(given))}: for a file "
            "give moesparse.text.windows(FILE, tokenizer), for one text [TEXT]"
        )
    if isinstance(given, Mapping) and not all(isinstance(each, ModelStatistics) for each in given.values()):
        raise UsageError(
            f"{name} must be token windows, text, or statistics by domain, got a {type(given).__name__} of "
            f"{', '.join(map(str, given))}: of a dataset give one split, of a tokenizer's result its input_ids"
        )
    if not _is_text(given):
        return given
    folder = folder or folder_of(model)
    if tokenizer is None and folder is not None:
        tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise UsageError(
            f"tokenizer must come with {name} as text, got none, and {type(model).__name__} was not loaded from a "
            "folder that has one: give tokenizer=TOKENIZER, or windows of token ids"
        )
    return document_windows(given, tokenizer, max_length=context_length(model), name=name)


def _is_text(given: Any) -> bool:
    """Whether it is neither windows nor statistics: a sequence of strings or rows, or what gives rows one by one."""
    if given is None or isinstance(given, Tensor | ImageWindows | ModelStatistics | Mapping):
        return False
    if isinstance(given, list | tuple):
        return bool(given) and isinstance(given[0], str | Mapping)
    # an array has numbers for rows, and a table of pandas gives its columns
    return isinstance(given, Iterable) and not (hasattr(given, "dtype") or hasattr(given, "dtypes"))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
