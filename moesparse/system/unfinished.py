"""What a run that has not finished left in its folder: how far it came, and whether it is the one that is to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesparse.errors import CheckpointError
from moesparse.system.folders import JOURNAL_FILE, LOCK_FILE
from moesparse.system.pieces import count_pieces
from moesparse.system.shards import read_json

__all__ = ["Unfinished", "check_inputs", "unfinished_run", "what_is_kept"]


@dataclass(frozen=True)
class Unfinished:
    """A run that has not finished its folder.

    Attributes:
        folder: it works in.
        layers: decoder layers it goes over; None where another release began it and did not say.
        done: of them, finished in the output.
        solved: matrices of experts in the pieces of a layer that is not finished.
        measured: of them, gone through by the text, and their sums kept for going on.
        recipe: what it does; None for one that prunes nothing.
        process: id of the process at work there; None where none is.
    """

    folder: Path
    layers: int | None
    done: int
    solved: int
    measured: int
    recipe: dict[str, Any] | None
    process: str | None


def unfinished_run(folder: Path) -> Unfinished | None:
    """The run that a folder was left by, or is at work in; None where its journal is not there.

    Raises:
        CheckpointError: the journal cannot be read.
    """
    file = folder / JOURNAL_FILE
    if not file.exists():
        return None
    held = read_json(file, "a journal")
    try:
        names = [(part["name"], part["aside"]) for part in held["parts"]]
        recipe = held["inputs"].get("recipe")
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} must be a journal of this program, got {error!r}; remove the folder") from error
    done = sum(not aside and name.startswith("layer-") for name, aside in names)
    measured = sum(bool(aside) for _, aside in names)
    return Unfinished(
        folder, held.get("layers"), done, count_pieces(folder), measured, recipe, _process_at_work(folder)
    )


def what_is_kept(folder: Path) -> str:
    """A sentence about the finished parts that the journal of a folder lists, and pieces; "" when there are none."""
    file = folder / JOURNAL_FILE
    if not file.exists():
        return ""
    done, solved = len(read_json(file, "a journal")["parts"]), count_pieces(folder)
    found = [f"{done} finished parts"] * bool(done) + [f"{solved} matrices of experts of the layer at work"] * bool(
        solved
    )
    return f"{' and '.join(found)} are kept in {folder}" if found else ""


def check_inputs(done: str, held: Mapping[str, Any], inputs: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse to go on with a run without being told to, or with another one's.

    Args:
        done: says what was found.
        held: the inputs of the run that was stopped, as they were read from its JSON.
        inputs: those of this one.
        resume: go on where they are the same.

    Raises:
        CheckpointError: names every input that differs, and of a recipe or settings the fields, old and new.
    """
    if not resume:
        raise CheckpointError(f"{done}. Go on with resume=True, or remove the folder to start again")
    # through JSON, as the old ones went
    inputs = json.loads(json.dumps(inputs))
    names = [name for name in sorted(inputs.keys() | held.keys()) if inputs.get(name) != held.get(name)]
    if names:
        differ = "; with another ".join(_difference(name, held.get(name), inputs.get(name)) for name in names)
        raise CheckpointError(f"{done}, with another {differ}. Give the same again, or remove the folder")


def _difference(name: str, held: Any, now: Any) -> str:
    if not (isinstance(held, dict) and isinstance(now, dict)):
        return f"{name}: {held!r}, now {now!r}"
    fields = [field for field in sorted(held.keys() | now.keys()) if held.get(field) != now.get(field)]
    return f"{name}: " + ", ".join(f"{field} was {held.get(field)!r}, now {now.get(field)!r}" for field in fields)


def _process_at_work(folder: Path) -> str | None:
    """Id of the process that holds the lock of a folder."""
    import fcntl

    try:
        file = (folder / LOCK_FILE).open()
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "unknown"
    return None
