"""A command as one of several processes that torchrun started: who joins, who speaks, and how they end.

The first process speaks for all: what the others print goes nowhere. Only the end of a job may be told by another one:
whoever is left with an error or a signal claims the word, the first to do so has it, and the rest end quietly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from moesparse.cli.console import errors
from moesparse.errors import ProcessError, UsageError

__all__ = ["count", "job", "joined", "one_voice", "refuse_several", "saying_what_is_left"]

# seconds in which the first process may tell what others have met as well: in the job, and where they have not joined
_FIRST_REFUSAL = 0.5
_WITHOUT_STORE = 20.0


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
        store: that they share; None before they have joined, and where this one is alone.
        peers: machine and process id of each.
    """

    store: Any = None
    peers: list[tuple[str, int]] = field(default_factory=list)
    _claimed: bool | None = None

    @property
    def rank(self) -> int:
        """Of this process."""
        return int(os.environ.get("RANK", "0")) if count() > 1 else 0

    def join(self, device: Any) -> None:
        """Start the process group, where there are several."""
        from moesparse.system import processes

        self.store = processes.join(device)
        if self.store is not None:
            self.peers = processes.Processes.current().gather((socket.gethostname(), os.getpid()))

    def claim(self) -> bool:
        """Leave the job; True for the one process that may say why, on standard error."""
        if self._claimed is None:
            self._claimed = self._claim()
            if count() > 1:
                sys.stderr = sys.__stderr__ if self._claimed else Path(os.devnull).open("w")  # noqa: SIM115
        return self._claimed

    def _claim(self) -> bool:
        if self.store is None:
            # torchrun ends this one as soon as the first has told the same
            time.sleep(_WITHOUT_STORE if self.rank else 0)
            return True
        time.sleep(_FIRST_REFUSAL if self.rank else 0)
        try:
            self.store.add(f"left/{self.rank}", 1)
            return self.store.add("claimed", 1) == 1
        except RuntimeError:
            # the store went with the first process
            return self.rank == 1

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
        return f"process of rank {self.rank} of {count()}: " if self.rank else ""


job = Job()
"""Of this command."""


@contextlib.contextmanager
def joined(device: Any) -> Iterator[None]:
    """Under torchrun be one of the processes of the job for the body.

    Args:
        device: torch device to work on, or None.
    """
    job.join(device)
    yield
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
        except SystemExit as stop:
            if stop.code:
                job.claim()
            raise
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


@contextlib.contextmanager
def saying_what_is_left(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run with exit code 1 and one line, and so does the end of a process that shares it.

    Args:
        kept: says what is finished and where; "" when nothing is.
    """

    def stop(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, ProcessError) as error:
        # torchrun stops all processes when one has ended, and that may come while it is being told
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if job.claim():
            found = kept()
            errors.print(
                f"[bold red]stopped:[/] {_why(error)}"
                + (f"{found}; the same command with --resume goes on" if found else "nothing was finished or written"),
                highlight=False,
                soft_wrap=True,
            )
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _why(error: BaseException) -> str:
    """Which process has ended, where one has: the beginning of a sentence."""
    unreached = isinstance(error, ProcessError)
    gone = job.lost(seconds=2.0 if unreached else 0.0)
    if gone:
        return f"the process of rank {', '.join(map(str, gone))} of {len(job.peers)} has ended; "
    return "another process has ended or cannot be reached; " if unreached else ""
