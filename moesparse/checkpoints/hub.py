"""From a folder or a hub id to a folder."""

from __future__ import annotations

import os
from pathlib import Path

from moesparse.errors import CheckpointError, MoESparseError
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, read_weight_map

__all__ = ["local_folder"]

_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md")


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; that of a hub id is downloaded first: config, tokenizer and safetensors, no code.

    Raises:
        CheckpointError: there is no such folder or id.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"MODEL must be a folder or a hub id, got the file {path}")
    from huggingface_hub import snapshot_download

    name = os.fspath(source)
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_SMALL_FILES), ignore_patterns=["*/*"]))
        weights = [SINGLE_FILE]
        if (folder / INDEX_FILE).exists():
            weights += set(read_weight_map(folder / INDEX_FILE).values())
        return Path(snapshot_download(name, allow_patterns=weights))
    except MoESparseError:
        raise
    except Exception as error:  # huggingface_hub's many kinds, often over many lines
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"MODEL must be a local folder or a hub id with a causal language model, got {name!r}: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
