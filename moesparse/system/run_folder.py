"""A folder in which a checkpoint comes into being over hours, and that survives whatever stops the work.

A run finishes its output part by part (a part is the tensors of one decoder layer). A finished part is flushed to the
disk, hashed, and noted in a journal with what the run said of it. Only `assemble` makes the folder a checkpoint: until
then it has no config.json and no index, and no program takes it for one. A lock of the operating system keeps a second
run out; it is gone with the process that held it.

Of several processes that share a run the first one locks and writes; the others call the same functions and are told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from moesparse.errors import CheckpointError, MoESparseError, ResultError, UsageError
from moesparse.system.folders import JOURNAL_FILE, LOCK_FILE, check_output_folder, flush, write_whole
from moesparse.system.manifest import file_hash, write_manifest_entries
from moesparse.system.pieces import Pieces, count_pieces, pieces_folder, pieces_folders
from moesparse.system.processes import Processes
from moesparse.system.shard_writer import write_shards
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, Shards, read_json
from moesparse.system.unfinished import check_inputs, what_is_kept

__all__ = ["Part", "RunFolder", "check_run_folder", "claimed", "locked"]

_FORMAT = 1


@dataclass(frozen=True)
class Part:
    """A finished part of the output.

    Attributes:
        name: of its folder within the run's.
        files: file name -> {"bytes", "sha256"}.
        note: what the run said of it, JSON.
        aside: it is there for the run to go on, and is no part of the checkpoint.
    """

    name: str
    files: dict[str, dict[str, Any]]
    note: Any
    aside: bool = False


@dataclass
class _Journal:
    inputs: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    final: dict[str, str] | None = None
    layers: int | None = None


class RunFolder:
    """The output folder of a run while the run is at work. Use `open`.

    Attributes:
        path: of the folder.
        redone: parts that an earlier run noted and that are missing or damaged: they and those behind are done again.
    """

    def __init__(self, path: Path, journal: _Journal, redone: list[str], processes: Processes) -> None:
        self.path = path
        self.redone = redone
        self._journal = journal
        self._processes = processes

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        folder: str | os.PathLike[str],
        inputs: Mapping[str, Any],
        *,
        resume: bool,
        layers: int | None = None,
        processes: Processes | None = None,
    ) -> Iterator[RunFolder]:
        """Start a run, or go on with one.

        Args:
            folder: new, empty, or holding an unfinished run.
            inputs: JSON of everything the result depends on; a run goes on only with the same.
            resume: go on where the journal ends; without a journal, or with no part finished, start.
            layers: how many the run goes over, for who looks at the folder meanwhile.
            processes: that share the run.

        Raises:
            UsageError: the inputs of the processes differ.
            CheckpointError: another process is at work there, the folder holds something else, an unfinished run and
                not `resume`, or one with other inputs; whatever writing raises, with what to do. The finished parts
                stay in every case, and every MoESparseError of the body says so.
        """
        path, processes = Path(folder), processes or Processes()
        _check_alike(processes, inputs)
        with contextlib.ExitStack() as stack:
            try:
                journal, redone = processes.from_first(lambda: cls._start(path, dict(inputs), resume, layers, stack))
                with _saying_what_is_kept(path):
                    yield cls(path, journal, redone, processes)
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or error
                kept = what_is_kept(path) or "No part was finished"
                raise CheckpointError(
                    f"cannot write {path}: {reason}. {kept}: make room there or mend it, and run the same again with "
                    "resume=True"
                ) from error

    @classmethod
    def _start(
        cls, path: Path, inputs: dict[str, Any], resume: bool, layers: int | None, stack: contextlib.ExitStack
    ) -> tuple[_Journal, list[str]]:
        """The journal to go on with, locked until the stack is left, and the parts to do again."""
        check_run_folder(path)
        found = path / JOURNAL_FILE
        stack.callback(_remove_if_empty, path, made=not path.exists())
        path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(path))
        journal = _read_journal(found, inputs, resume) if found.exists() else _Journal(inputs)
        journal.layers = layers
        run = cls(path, journal, [], Processes())
        stack.callback(run._leave_nothing_unfinished)
        run._drop_damaged()
        run._save()
        return journal, run.redone

    @property
    def parts(self) -> list[Part]:
        """Finished parts of the checkpoint, in the order they were written."""
        return [part for part in self._journal.parts if not part.aside]

    @property
    def aside(self) -> list[Part]:
        """Finished parts that lie aside, in the order they were written."""
        return [part for part in self._journal.parts if part.aside]

    def read(self, part: Part) -> Shards:
        """The tensors of a finished part."""
        return Shards([self._place(part, file) for file in part.files])

    def write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        note: Any,
        *,
        max_shard_bytes: int,
        aside: bool = False,
        copies: tuple[Mapping[str, str], Shards] | None = None,
    ) -> Part:
        """Finish a part: when this returns it will survive the machine.

        Args:
            name: of the part, new in this run.
            tensors: key in the checkpoint -> tensor on any device, strided in any way; copied out one at a time.
            note: JSON to find again in `parts`.
            max_shard_bytes: of one file.
            aside: it is no part of the checkpoint; it goes when that is made.
            copies: key in the checkpoint -> name in other shards, of tensors to be copied as bytes; and those shards.
        """
        part = self._processes.from_first(lambda: self._write(name, tensors, note, max_shard_bytes, aside, copies))
        self._journal.parts.append(part)
        return part

    def _write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        note: Any,
        max_shard_bytes: int,
        aside: bool,
        copies: tuple[Mapping[str, str], Shards] | None,
    ) -> Part:
        work, home = self.path / f"{name}.partial", self.path / name
        # by a run that was stopped before it noted the part
        for left in (work, home):
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir()
        writer = write_shards(work, tensors, max_shard_bytes, copies)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": writer.hash_of(file)} for file in writer.files}
        flush(work)
        os.replace(work, home)
        part = Part(name, files, note, aside)
        self._save(part)
        shutil.rmtree(pieces_folder(self.path, name), ignore_errors=True)
        return part

    def drop(self, part: Part) -> None:
        """Remove a finished part that later ones stand in for."""
        self._journal.parts.remove(part)
        self._processes.from_first(self._save)
        self._processes.from_first(lambda: shutil.rmtree(self.path / part.name))

    def pieces(self, name: str) -> Pieces:
        """Of a part that is to be finished; they go when it is."""
        folder = pieces_folder(self.path, name)
        self._processes.from_first(lambda: folder.mkdir(exist_ok=True))
        return Pieces(folder, self._processes.rank)

    def assemble(self, write_others: Callable[[Path], None], check: Callable[[Path], None]) -> None:
        """Make the folder a checkpoint of all parts: shards and index, then the other files, config.json last.

        Args:
            write_others: writes config.json and all that is not weights into the folder it is given.
            check: looks at the folder once all files are there; what it raises leaves it unfinished.
        """
        self._all_have_read()
        self._processes.from_first(lambda: self._assemble(write_others, check))

    def _assemble(self, write_others: Callable[[Path], None], check: Callable[[Path], None]) -> None:
        files = [(part, file) for part in self.parts for file in part.files]
        if self._journal.final is None:
            names = [SINGLE_FILE] if len(files) == 1 else _shard_names(len(files))
            self._journal.final = {f"{part.name}/{file}": name for (part, file), name in zip(files, names, strict=True)}
            self._save()
        for old, new in self._journal.final.items():
            if (self.path / old).exists():
                os.replace(self.path / old, self.path / new)
        if len(files) > 1:
            shards = Shards([self.path / name for name in self._journal.final.values()])
            index = {
                "metadata": {"total_size": shards.nbytes},
                "weight_map": {key: info.file.name for key, info in sorted(shards.tensors.items())},
            }
            write_whole(self.path / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        hashes = {self._journal.final[f"{part.name}/{file}"]: part.files[file] for part, file in files}
        others = self.path / "others.partial"
        shutil.rmtree(others, ignore_errors=True)
        others.mkdir()
        write_others(others)
        write_manifest_entries(others, hashes)
        whole = sorted(file.relative_to(others) for file in others.rglob("*") if file.is_file())
        for file in sorted(whole, key=lambda file: file.name == "config.json"):
            flush(others / file)
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(others / file, self.path / file)
        shutil.rmtree(others)
        check(self.path)
        for part in self._journal.parts:
            shutil.rmtree(self.path / part.name, ignore_errors=True)
        flush(self.path)
        (self.path / JOURNAL_FILE).unlink()
        flush(self.path)

    def hand_over(self, make: Callable[[], Path], target: Path) -> None:
        """End a run whose result is one file: give it its name elsewhere on the disk, then remove what the run left.

        Args:
            make: writes the file into the folder, whole.
            target: its new path; a file that is there is replaced.
        """
        self._all_have_read()
        self._processes.from_first(lambda: self._hand_over(make(), target))

    def _hand_over(self, file: Path, target: Path) -> None:
        flush(file)
        os.replace(file, target)
        flush(target.absolute().parent)
        self.clear()

    def clear(self) -> None:
        """End a run whose result is elsewhere: remove what it left."""
        (self.path / JOURNAL_FILE).unlink()
        for left in [each for each in self.path.iterdir() if each.is_dir()]:
            shutil.rmtree(left)

    def _all_have_read(self) -> None:
        """Wait for the other processes: what one of them still reads must not be moved or removed."""
        self._processes.gather(None)

    def _place(self, part: Part, file: str) -> Path:
        moved = (self._journal.final or {}).get(f"{part.name}/{file}")
        home = self.path / part.name / file
        return self.path / moved if moved and not home.exists() else home

    def _drop_damaged(self) -> None:
        """Forget parts from the first damaged one on, and remove what a stopped run left half written."""
        parts = self._journal.parts
        for number, part in enumerate(parts):
            if any(not _is_intact(self._place(part, file), facts) for file, facts in part.files.items()):
                self.redone = [each.name for each in parts[number:]]
                self._take_back()
                del parts[number:]
                break
        stale = [folder for name, folder in pieces_folders(self.path).items() if name in {part.name for part in parts}]
        for left in [*self.path.glob("*.partial"), *stale]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _leave_nothing_unfinished(self) -> None:
        """A run that ends without a finished part, or pieces of one, leaves no trace."""
        empty = [] if count_pieces(self.path) else pieces_folders(self.path).values()
        scratch = [*self.path.glob("*.partial"), *empty, self.path / JOURNAL_FILE]
        if not self._journal.parts and set(self.path.iterdir()) <= {*scratch, self.path / LOCK_FILE}:
            for left in scratch:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def _take_back(self) -> None:
        """Undo the renaming of shards that `assemble` began."""
        for old, new in (self._journal.final or {}).items():
            if (self.path / new).exists():
                (self.path / old).parent.mkdir(exist_ok=True)
                os.replace(self.path / new, self.path / old)
        self._journal.final = None

    def _save(self, *new: Part) -> None:
        journal = dataclasses.replace(self._journal, parts=[*self._journal.parts, *new])
        write_whole(self.path / JOURNAL_FILE, json.dumps({"format": _FORMAT, **asdict(journal)}))


def check_run_folder(path: Path) -> None:
    """Refuse a folder in which no run can start or go on: it is a file, or holds what no run has left there.

    Raises:
        CheckpointError: names what it is.
    """
    if (path / JOURNAL_FILE).exists():
        return
    if not (path.is_dir() and {file.name for file in path.iterdir()} <= {LOCK_FILE}):
        check_output_folder(path)


def _check_alike(processes: Processes, inputs: Mapping[str, Any]) -> None:
    """All processes must do the same work."""
    for rank, held in enumerate(processes.gather(dict(inputs))):
        for name in inputs:
            if held.get(name) != inputs[name]:
                raise UsageError(
                    f"all {processes.count} processes must be given the same {name}, got {inputs[name]!r} and, in the "
                    f"process of rank {rank}, {held.get(name)!r}"
                )


@contextlib.contextmanager
def _saying_what_is_kept(folder: Path) -> Iterator[None]:
    try:
        yield
    except ResultError:
        # the same again would end the same
        raise
    except MoESparseError as error:
        kept = what_is_kept(folder)
        if not kept:
            raise
        text = str(error).removesuffix(".")
        raise type(error)(f"{text}. {kept}; the same again with resume=True goes on from there") from error


def _remove_if_empty(folder: Path, *, made: bool) -> None:
    # not empty, or never made
    with contextlib.suppress(OSError):
        if made:
            folder.rmdir()


def _read_journal(file: Path, inputs: dict[str, Any], resume: bool) -> _Journal:
    held = read_json(file, "a journal")
    try:
        if held["format"] != _FORMAT:
            raise CheckpointError(f"{file} was written by another release; remove the folder to start again")
        journal = _Journal(held["inputs"], [Part(**part) for part in held["parts"]], held["final"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} must be a journal of this program, got {error!r}; remove the folder") from error
    if not journal.parts and not count_pieces(file.parent):
        return _Journal(inputs)
    done = f"OUT holds an unfinished run, {len(journal.parts)} parts done: {file.parent}"
    check_inputs(done, journal.inputs, inputs, resume=resume)
    return journal


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other run out of a folder for the body, by a lock that no dead process holds.

    Raises:
        CheckpointError: another process has it; names its id.
    """
    file = _lock(folder / LOCK_FILE, folder)
    try:
        yield
    finally:
        if not (folder / JOURNAL_FILE).exists():
            (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """`locked` for an output that appears as a whole in the end: the lock lies beside it.

    Raises:
        CheckpointError: another process is at work on it, or there is no writing there.
    """
    path = out.absolute().with_name(f".{out.name}{LOCK_FILE}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {path.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _lock(path: Path, out: Path) -> TextIOWrapper:
    """A lock file that is held, with the id of this process in it."""
    import fcntl

    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise CheckpointError(
                f"OUT must be free, got {out}, where process {owner} is at work: wait for it, or name another"
            ) from error
        # its last owner may have removed it meanwhile, and then it keeps nobody out
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
        file.close()


def _is_intact(path: Path, facts: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == facts["bytes"] and file_hash(path) == facts["sha256"]


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
