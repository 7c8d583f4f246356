"""Output folders: refused before the work, written whole or not at all, with what lies beside the weights."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from moesparse.errors import CheckpointError, ResultError
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, WEIGHT_SUFFIXES, read_weight_map

__all__ = [
    "JOURNAL_FILE",
    "LOCK_FILE",
    "atomic_folder",
    "check_output_folder",
    "check_writable",
    "companions",
    "copy_companions",
    "flush",
    "kept_aside",
    "other_formats",
    "scratch_folder",
    "write_whole",
]

JOURNAL_FILE = "moesparse_journal.json"
"""In a folder that a run has not finished, see moesparse.system.run_folder."""

LOCK_FILE = ".moesparse.lock"
"""Beside it, held by the process at work there."""

_PARTIAL = ".partial"

_INDEX_SUFFIX = ".index.json"

_NOT_OF_THE_CHECKPOINT = (".cache", ".git", ".ipynb_checkpoints", "__pycache__")


def check_output_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder to write to: it must not exist yet, or be empty.

    Raises:
        CheckpointError: it is a file, holds files, or its parent cannot be written.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "a file" if path.is_file() else "a folder that holds files"
        raise CheckpointError(f"OUT must be a new or empty folder, got {what}: {path}. Remove it or name another")
    check_writable("OUT", path)
    return path


def check_writable(name: str, path: Path) -> None:
    """Refuse a path at which nothing can be written; folders on the way to it may be missing.

    Args:
        name: of the argument.

    Raises:
        CheckpointError: it, or the folder it lies in, is read-only, or that is no folder.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise CheckpointError(f"{name} must lie in a folder that can be written, got {path}: {parent} is a file")
    for each in (parent, path):
        if each.exists() and not os.access(each, os.W_OK):
            raise CheckpointError(f"{name} must lie in a folder that can be written, got {path}: {each} is read-only")


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well and vanishes when it does not.

    Whatever stops the block (an error, a full disk, Ctrl-C), `folder` is left as it was. Files are flushed to the disk
    before the rename. What a killed process left behind is removed by the next one that writes the same folder.

    Raises:
        CheckpointError: the folder holds files already, or writing failed; the reason is named.
    """
    from safetensors import SafetensorError

    path = check_output_folder(folder)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    work, lock = _work_folder(path.absolute())
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                # safetensors and mkdtemp make theirs private
                file.chmod(0o644)
                flush(file)
        flush(work)
        work.chmod(0o755)
        os.replace(work, path)
        flush(path.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}. Nothing was left there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def kept_aside(work: Path, folder: Path) -> Iterator[None]:
    """Where the last look at a result fails, keep what was written under a name of its own.

    Args:
        work: the temporary folder of `atomic_folder`.
        folder: that it is for.
    """
    try:
        yield
    except ResultError as error:
        names = (f"{folder.name}.unfinished{number or ''}" for number in itertools.count())
        aside = next(path for name in names if not (path := folder.absolute().with_name(name)).exists())
        work.chmod(0o755)
        os.replace(work, aside)
        raise ResultError(f"{error}. What was written is kept in {aside}") from error


@contextlib.contextmanager
def scratch_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` for what is needed on the way to it; it vanishes when the block ends."""
    path = Path(folder).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    work, lock = _work_folder(path)
    # who writes a folder locks the one that it lies in, and `work` is locked
    inside = work / "scratch"
    try:
        inside.mkdir()
        yield inside
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _work_folder(path: Path) -> tuple[Path, int]:
    """A new temporary folder for `path`, and the descriptor that holds its lock.

    Those that were left by a process that was killed are removed: nobody holds their locks.
    """
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        # a folder that another process has made and not yet locked is no leftover
        fcntl.flock(parent, fcntl.LOCK_EX)
        for old in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
            descriptor = os.open(old, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            os.close(descriptor)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
        lock = os.open(work, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return work, lock
    finally:
        os.close(parent)


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def companions(source: Path) -> list[Path]:
    """What lies beside the weights of a checkpoint: tokenizer, chat templates, processors, code, licence, settings.

    Left out are weights of any format, what git and the hub keep for themselves, and folders that are checkpoints of
    their own, finished or not: a result may lie in the folder that it is made of.

    Returns:
        Paths within the folder, sorted.

    Raises:
        CheckpointError: one is a link to a file elsewhere, which would be published with the copy.
    """
    inside = [source.resolve()]
    if inside[0].parent.name == "snapshots":
        # the hub's cache
        inside.append(inside[0].parent.parent / "blobs")
    found = []
    for file in _files(source):
        if file.name.endswith((*WEIGHT_SUFFIXES, _INDEX_SUFFIX)):
            continue
        if not any(file.resolve().is_relative_to(place) for place in inside):
            raise CheckpointError(f"{file} must not lead out of its folder, got a link to {file.resolve()}; remove it")
        found.append(file.relative_to(source))
    return sorted(found)


def other_formats(source: Path) -> list[str]:
    """Weights in the folder of a checkpoint besides the shards that are read: they are not copied.

    Returns:
        Paths within the folder, sorted.
    """
    read = {source / SINGLE_FILE}
    if not (source / SINGLE_FILE).exists() and (source / INDEX_FILE).exists():
        read = {source / name for name in read_weight_map(source / INDEX_FILE).values()}
    found = [file for file in _files(source) if file.name.endswith(WEIGHT_SUFFIXES) and file not in read]
    return sorted(str(file.relative_to(source)) for file in found)


def _files(source: Path) -> Iterator[Path]:
    """All files of a checkpoint, in subfolders too."""
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not _is_apart(Path(folder, name))]
        for file in (Path(folder, name) for name in files):
            if file.is_file():
                yield file


def _is_apart(folder: Path) -> bool:
    """A folder within a checkpoint that is no part of it."""
    made_here = any((folder / name).exists() for name in ("config.json", JOURNAL_FILE))
    return made_here or folder.name in _NOT_OF_THE_CHECKPOINT or folder.name.endswith(_PARTIAL)


def copy_companions(source: Path, folder: Path, leave: Collection[str]) -> None:
    """Copy them, byte for byte and over what is there, but for the names to leave.

    Raises:
        CheckpointError: as `companions`.
    """
    for file in companions(source):
        if str(file) not in leave:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / file, folder / file)


def write_whole(path: Path, text: str) -> None:
    """Replace a file by another whole one, on the disk when this returns."""
    work = path.with_name(f"{path.name}.partial")
    work.write_text(text)
    flush(work)
    os.replace(work, path)
    flush(path.parent)
