"""From a folder or a hub id to a folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from moesparse.errors import CheckpointError, MissingFileError, MoESparseError, reason_of
from moesparse.models.meta import source_of
from moesparse.system.folders import other_formats
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, WEIGHT_SUFFIXES, read_weight_map

__all__ = ["check_named", "local_folder", "unread_weights"]

# what lies beside the weights is copied into a result, so all of it is wanted; nothing of it is run
_WEIGHTS = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]

# NAME or OWNER/NAME; whatever has another form can only be a folder
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

# folder of a hub id -> weights of the id that this process did not download
_left: dict[Path, list[str]] = {}


def check_named(argument: str, source: str | os.PathLike[str]) -> None:
    """Refuse a model that is no folder and cannot be a hub id, before any work and without asking the hub.

    Args:
        argument: that names it.

    Raises:
        MissingFileError: there is no such folder.
    """
    name = os.fspath(source_of(source))
    if not Path(name).exists() and not _HUB_ID.fullmatch(name):
        raise MissingFileError(
            f"{argument} must be a local folder or a hub id with a language model, got {name!r}: there is no such "
            "folder"
        )


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; that of a hub id is downloaded first.

    All files are, in subfolders too, but for weights that are not read: those of other formats, and safetensors that
    the index does not name. Code comes with the rest and is never run.

    Raises:
        CheckpointError: there is no such folder or id.
    """
    check_named("MODEL", source)
    source = source_of(source)
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
        _left[folder] = _other_weights(name, folder.name, weights)
        return Path(snapshot_download(name, allow_patterns=weights))
    except MoESparseError:
        raise
    except Exception as error:  # huggingface_hub's many kinds, often over many lines
        raise CheckpointError(
            f"MODEL must be a local folder or a hub id with a language model, got {name!r}: {reason_of(error)}"
        ) from error


def unread_weights(folder: Path) -> list[str]:
    """Weights of a checkpoint besides the shards that are read: they are not copied.

    Args:
        folder: of the checkpoint. Of a hub id, as `local_folder` gave it: also what is there and was not downloaded.

    Returns:
        Paths within the folder, sorted.
    """
    return sorted({*other_formats(folder), *_left.get(folder, ())})


def _other_weights(name: str, commit: str, read: Collection[str]) -> list[str]:
    """Weights that the hub lists for an id besides those that are read; none where it cannot be asked."""
    from huggingface_hub import HfApi

    # without a network a folder that was downloaded before is used all the same
    with contextlib.suppress(Exception):
        files = [each.rfilename for each in HfApi().model_info(name, revision=commit).siblings or ()]
        return [file for file in files if file.endswith(WEIGHT_SUFFIXES) and file not in read]
    return []
