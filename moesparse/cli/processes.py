"""A command as one of several processes that torchrun started: who joins, who speaks, and how they end.

The first process speaks for all: what the others print goes nowhere. Only the end of a job may be told by another one:
whoever is left with an error or a signal claims the word, the first to do so has it, and the rest end quietly.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from moesparse.errors import MoESparseError, UsageError

__all__ = ["count", "job", "joined", "one_voice", "refuse_several"]

# an error that all processes have alike is told by the first one
_FIRST_REFUSAL = 0.5


def count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(what: str) -> None:
    """Refuse what several processes cannot share.

    Raises:
        UsageError: there are several; names it.
    """
    if count() > 1:
        raise UsageError(f"{what} must be left out with several processes, got {count()}: run it in one")


@dataclass
class Job:
    """The processes of this command, this one among them.

    Attributes:
        rank: of this one.
        store: that they share; None before they have joined, and where this one is alone.
        peers: machine and process id of each.
    """

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")) if count() > 1 else 0)
    store: Any = None
    peers: list[tuple[str, int]] = field(default_factory=list)

    def join(self, device: Any) -> None:
        """Start the process group, where there are several."""
        from moesparse import processes

        self.store = processes.join(device)
        if self.store is not None:
            self.peers = processes.Processes.current().gather((socket.gethostname(), os.getpid()))

    def claim(self) -> bool:
        """Leave the job; True for the one process that may say why, on standard error."""
        if self.store is None:
            return self.rank == 0
        if self.rank:
            time.sleep(_FIRST_REFUSAL)
        try:
            self.store.add(f"left/{self.rank}", 1)
            claimed = self.store.add("claimed", 1) == 1
        except RuntimeError:
            # the store went with the first process
            claimed = self.rank == 1
        if claimed and sys.__stderr__ is not None:
            sys.stderr = sys.__stderr__
        return claimed

    def lost(self, seconds: float = 0.0) -> list[int]:
        """Ranks of the processes on this machine that have ended without leaving the job.

        Args:
            seconds: to wait for one: the others hear of an end before the system has done with it.
        """
        until = time.monotonic() + seconds
        while True:
            gone = [rank for rank, (host, pid) in enumerate(self.peers) if host == socket.gethostname() and _ended(pid)]
            with contextlib.suppress(RuntimeError):
                gone = [rank for rank in gone if not self.store.check([f"left/{rank}"])]
            if gone or time.monotonic() > until:
                return gone
            time.sleep(0.02)

    @property
    def name(self) -> str:
        """What an error of this process begins with: "" for the first, which speaks for all."""
        return f"process of rank {self.rank} of {len(self.peers)}: " if self.rank and self.peers else ""


job = Job()
"""Of this command."""


@contextlib.contextmanager
def joined(device: Any) -> Iterator[Job]:
    """Under torchrun be one of the processes of the job for the body.

    Args:
        device: torch device to work on, or None.
    """
    job.join(device)
    try:
        yield job
    except typer.Exit:
        raise
    except MoESparseError as error:
        job.claim()
        raise type(error)(f"{job.name}{error}") from error
    except Exception:
        job.claim()
        raise
    if job.store is not None:
        import torch.distributed

        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """All but the first process are silent for the body."""
    if job.rank == 0:
        yield
        return
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # a process that nobody has asked about yet is there still, as a zombie
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False
