"""The tokenizer of a checkpoint: as its files say it, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moesparse.errors import CheckpointError, reason_of
from moesparse.system.shards import check_not_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["find_tokenizer", "load_tokenizer", "tokenizer_files"]

# a config of a tokenizer alone is none: these hold vocabularies
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that hold a vocabulary, and the config of its tokenizer."""
    return sorted(file for pattern in (*_VOCABULARIES, "tokenizer_config.json") for file in folder.glob(pattern))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder. No code that lies there is run, and nobody is asked to.

    Raises:
        CheckpointError: the folder has none, or one that cannot be loaded; says why.
    """
    tokenizer = find_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} must hold a tokenizer to read or write text with, got none of {', '.join(_VOCABULARIES)}: copy "
            "the tokenizer's files of the original model there"
        )
    return tokenizer


def find_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """As `load_tokenizer`, and None where the folder has none."""
    from transformers import AutoTokenizer

    files = tokenizer_files(folder)
    for file in files:
        check_not_pointer(file)
    if not files:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' and the tokenizers library's many kinds
        raise CheckpointError(
            f"the tokenizer in {folder} must be one that transformers can load without running code of it, got "
            f"{', '.join(file.name for file in files)} and: {reason_of(error)}"
        ) from error
    # some classes of transformers make one of their special tokens alone where the vocabulary is missing
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise CheckpointError(
            f"the tokenizer in {folder} must have its vocabulary beside it ({', '.join(_VOCABULARIES)}), got "
            f"{', '.join(file.name for file in files)} alone: copy the tokenizer's files of the original model there"
        )
    return tokenizer
