"""What a killed training goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from moesparse.errors import CheckpointError, MoESparseError, UsageError
from moesparse.system.folders import flush
from moesparse.system.run_folder import locked

__all__ = ["StateFile"]

_STATE = "state.pt"


class StateFile:
    """What a killed run goes on from: one file that is replaced as a whole.

    `close` gives the folder free, and removes it where it is new and no state was saved.

    Args:
        folder: holds the file.
        key: what the run is: fingerprints, settings, mode. A state of another run is refused.
        resume: go on when there is a state; False refuses a folder that has one.
        writes: this process will save states, and keeps others from doing so; False in all processes but one.

    Raises:
        UsageError: there is a state and resume is False.
        MoESparseError: the state is that of another run; names the first difference.
        CheckpointError: it cannot be read, or another process is at work in the folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], key: Mapping[str, Any], resume: bool, writes: bool = True
    ) -> None:
        self._path = Path(folder) / _STATE
        self._key = dict(key)
        self._lock = ExitStack()
        self.state: dict[str, Any] | None = None
        self._made = writes and not self._path.parent.exists()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if writes:
                self._lock.enter_context(locked(self._path.parent))
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path.parent}: {error.strerror or error}") from error
        if not self._path.is_file():
            return
        if not resume:
            raise UsageError(
                f"{self._path.parent} holds the state of a run that was stopped; go on with resume=True, or remove "
                "the folder"
            )
        try:
            held = torch.load(self._path, map_location="cpu", weights_only=True)
            differing = {name: held["key"].get(name) for name in self._key if held["key"].get(name) != self._key[name]}
        except Exception as error:  # pickle's, zip's and torch's own kinds
            raise CheckpointError(f"{self._path} must be the state of a run, got a damaged file; remove it") from error
        for name, value in differing.items():
            old, new = _only_what_differs(value, self._key[name])
            raise MoESparseError(
                f"the run to resume must have the {name} of the one in {self._path.parent}, {old}, got {new}"
            )
        self.state = held

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state on the disk.

        Raises:
            CheckpointError: it cannot be written; the one before is kept.
        """
        partial = self._path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save({"key": self._key, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path)
            flush(self._path.parent)
        except (OSError, RuntimeError) as error:  # torch gives a full disk another name
            partial.unlink(missing_ok=True)
            kept = "The state before it is kept" if self._path.exists() else "No state was saved before"
            raise CheckpointError(
                f"cannot write {self._path}: {error}. {kept}: make room there and run the same again with resume=True"
            ) from error

    def close(self) -> None:
        self._lock.close()
        if self._made:
            # it holds a state
            with suppress(OSError):
                self._path.parent.rmdir()


def _only_what_differs(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two values for a message: of two mappings the entries that are not the same."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return old, new
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: old.get(name) for name in names}, {name: new.get(name) for name in names}
