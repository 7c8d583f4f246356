"""From a folder or a hub id to a folder, and from a folder to the hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from moesparse.checkpoints.card import base_of_card
from moesparse.errors import CheckpointError, MissingFileError, MoESparseError, reason_of
from moesparse.models.meta import source_of
from moesparse.system.folders import other_formats
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, WEIGHT_SUFFIXES, read_weight_map

__all__ = ["check_named", "hub_id", "local_folder", "push_folder", "unread_weights"]

# what lies beside the weights is copied into a result, so all of it is wanted; nothing of it is run
_WEIGHTS = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
_ID = re.compile(r"[\w.-]+/[\w.-]+")

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


def hub_id(source: str | os.PathLike[str]) -> str | None:
    """The name "owner/name" that the hub has for a model, for a card to name it.

    Args:
        source: as the user named it: a hub id; a folder of the hub's cache, which says where it is from; or a folder
            with a card of ours, which names the model that it was made of.

    Returns:
        None where nothing says so: a folder's own name is no id.
    """
    path = Path(source)
    if not path.is_dir():
        return os.fspath(source) if _ID.fullmatch(os.fspath(source)) else None
    commit = path.resolve()
    kind, _, name = commit.parent.parent.name.partition("--")
    if commit.parent.name == "snapshots" and kind == "models":
        return name.replace("--", "/", 1)
    card = path / "README.md"
    return base_of_card(card.read_text(errors="replace")) if card.is_file() else None


def push_folder(folder: str | os.PathLike[str], repository: str) -> str:
    """Upload all files of a checkpoint; a repository that is not there yet is made, private.

    Returns:
        Its address.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached; the folder is whole all the same.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        found = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=found.repo_id, folder_path=Path(folder), commit_message="Upload by moesparse")
    except Exception as error:  # huggingface_hub's many kinds, often over many lines
        raise CheckpointError(
            f"{folder} is whole and was not pushed to {repository}: {reason_of(error)}. `hf upload {repository} "
            f"{folder}` does it later"
        ) from error
    return str(found)
