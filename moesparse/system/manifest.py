"""The manifest of a checkpoint: the sha256 of every shard, so that a flipped bit on a disk or on the way is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesparse._version import __version__
from moesparse.errors import CheckpointError
from moesparse.system.shards import read_json

__all__ = ["MANIFEST_FILE", "check_manifest", "file_hash", "write_manifest", "write_manifest_entries"]

MANIFEST_FILE = "moesparse_manifest.json"
"""In a checkpoint: {"manifest_version": 1, "moesparse": ..., "shards": {file: {"sha256": ..., "bytes": ...}}}."""

_VERSION = 1


def file_hash(file: Path) -> str:
    """sha256 of a file, hexadecimal; memory: a buffer."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def write_manifest(folder: Path, shards: Sequence[Path]) -> None:
    """Write the hashes of the shards into the folder. Reads each once; memory: a buffer."""
    write_manifest_entries(
        folder, {file.name: {"sha256": file_hash(file), "bytes": file.stat().st_size} for file in sorted(shards)}
    )


def write_manifest_entries(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a manifest from hashes that are known: shard name -> {"sha256", "bytes"}."""
    manifest = {"manifest_version": _VERSION, "moesparse": __version__, "shards": entries}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def check_manifest(folder: Path, shards: Sequence[Path], *, hashes: bool = True) -> list[str] | None:
    """What differs between a checkpoint's shards and its manifest, one sentence each; None when it has no manifest.

    Args:
        folder: of the checkpoint.
        shards: its files.
        hashes: read them; else their sizes are compared.

    Raises:
        CheckpointError: the manifest is no such table.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    manifest = read_json(path)
    entries = manifest.get("shards")
    if manifest.get("manifest_version") != _VERSION or not isinstance(entries, dict):
        raise CheckpointError(f"{path} must have manifest_version {_VERSION} and hold shards")
    problems = [
        f"{MANIFEST_FILE} lists {name!r}, which is no shard" for name in entries.keys() - {f.name for f in shards}
    ]
    for file in shards:
        entry = entries.get(file.name)
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            problems.append(f"{file.name} is not in {MANIFEST_FILE}")
        elif file.stat().st_size != entry.get("bytes"):
            problems.append(
                f"{file.name} has {file.stat().st_size:,} bytes, and {entry.get('bytes')} in {MANIFEST_FILE}"
            )
        elif hashes and file_hash(file) != entry["sha256"]:
            problems.append(f"{file.name} was changed after it was written: its sha256 is not that of {MANIFEST_FILE}")
    return problems
