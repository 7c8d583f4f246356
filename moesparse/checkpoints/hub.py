"""From a folder or a hub id to a folder."""

from __future__ import annotations

import os
from pathlib import Path

from moesparse.errors import CheckpointError, MoESparseError, reason_of
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, WEIGHT_SUFFIXES, read_weight_map

__all__ = ["local_folder"]

# what lies beside the weights is copied into a result, so all of it is wanted; nothing of it is run
_WEIGHTS = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; that of a hub id is downloaded first.

    All files are, in subfolders too, but for weights that are not read: those of other formats, and safetensors that
    the index does not name. Code comes with the rest and is never run.

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
        folder = Path(snapshot_download(name, ignore_patterns=_WEIGHTS))
        weights = [SINGLE_FILE]
        if (folder / INDEX_FILE).exists():
            weights += set(read_weight_map(folder / INDEX_FILE).values())
        return Path(snapshot_download(name, allow_patterns=weights))
    except MoESparseError:
        raise
    except Exception as error:  # huggingface_hub's many kinds, often over many lines
        raise CheckpointError(
            f"MODEL must be a local folder or a hub id with a language model, got {name!r}: {reason_of(error)}"
        ) from error
