"""How long-running work tells where it stands, and what is said of it: a bar, or a line for every layer.

`reporting` is the one way from what `progress=` may be to the function that the work calls with every event; the
command line goes through it too.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, strftime
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from moesparse.errors import UsageError, reason_of
from moesparse.system.memory import peak_memory
from moesparse.system.sizes import format_bytes, format_seconds

__all__ = ["VARIABLE", "Progress", "ProgressEvent", "ProgressLike", "reporting", "silent", "stamped"]

VARIABLE = "MOESPARSE_LOG"
"""Of the environment: none, bar or log in the place of "auto"; anything else is a file that lines are added to."""

# seconds: what is over sooner says nothing unless it was asked to; and a minute without a line gets one
_PATIENCE = 5.0
_HEARTBEAT = 60.0

_KINDS = ("auto", "bar", "log", "none")


@dataclass(frozen=True)
class ProgressEvent:
    """One step done. The first event of a stage has `done=0` and comes before any work.

    Attributes:
        stage: what is going on, in a few words: "calibrate", "prune", "propagate".
        done: units finished.
        total: units there are.
        unit: what is counted: "window", "block", "step".
        tokens: tokens processed since the stage began.
        seconds: seconds since the stage began.
        name: the block or file at work, when there is one.
        memory: bytes the second moments take, when the stage collects any.
        work: what the stage is a part of, where several make one pass over the layers: "prune".
        layer: layers of that pass that are finished.
        layers: there are in it; 0 where it does not go layer by layer.
    """

    stage: str
    done: int
    total: int
    unit: str = "step"
    tokens: int = 0
    seconds: float = 0.0
    name: str = ""
    memory: int = 0
    work: str = ""
    layer: int = 0
    layers: int = 0


Progress = Callable[[ProgressEvent], None]
"""Called with every event; it must not raise."""

ProgressLike = Progress | str | None
"""What `progress=` may be: a `Progress`; "bar"; "log", a line for every layer on standard error; "none" or None,
nothing; "auto", the default: once a call has taken some seconds, a bar on a terminal or in a notebook, else lines."""


def silent(_event: ProgressEvent) -> None:
    """Say nothing."""


def stamped(text: str) -> str:
    """A line of a log: the time and the text."""
    return f"{strftime('%Y-%m-%d %H:%M:%S')} {text}"


@contextlib.contextmanager
def reporting(
    progress: ProgressLike,
    *,
    console: Console | None = None,
    patience: float = _PATIENCE,
    log_file: Path | None = None,
    planned: float | None = None,
) -> Iterator[Progress]:
    """What is to be called with every event of the body.

    The outermost call speaks: in its body, what `progress=` was not given to is silent. Of several processes of
    torchrun the first one speaks.

    Args:
        progress: see `ProgressLike`.
        console: to say it on; None is standard error.
        patience: seconds before "auto" says something.
        log_file: a line for every layer is added to this file too; None takes that of MOESPARSE_LOG, where it is one.
        planned: seconds that all of it was planned to take, to be said beside the first layer's.

    Raises:
        UsageError: `progress` is none of these, or a file that cannot be written.
    """
    if not callable(progress) and progress not in (*_KINDS, None):
        raise UsageError(
            f"progress must be one of {', '.join(_KINDS)}, None or a function of a ProgressEvent, got {progress!r}"
        )
    if _reported.get():
        yield progress if callable(progress) else silent
        return
    with contextlib.ExitStack() as stack:
        sinks: list[_Sink] = []
        file = log_file or _file_of_environment()
        if file is not None and _speaks():
            stream = stack.enter_context(_appended(file, of_environment=log_file is None))
            sinks.append(_Lines(lambda line: print(line, file=stream, flush=True), 0.0, planned))
        if _speaks():
            sinks += _sinks(progress, console, patience, planned)
        heard: list[Progress] = [*sinks, progress] if callable(progress) else [*sinks]

        def tell(event: ProgressEvent) -> None:
            for hears in heard:
                hears(event)

        token, ended = _reported.set(True), False
        try:
            yield heard[0] if len(heard) == 1 else tell
            ended = True
        finally:
            _reported.reset(token)
            for sink in sinks:
                sink.close(ended)


_reported: ContextVar[bool] = ContextVar("moesparse_reported", default=False)


def _speaks() -> bool:
    return int(os.environ.get("WORLD_SIZE") or 1) < 2 or os.environ.get("RANK") == "0"


def _sinks(progress: ProgressLike, console: Console | None, patience: float, planned: float | None) -> list[_Sink]:
    """What says it on the console."""
    if callable(progress) or progress in ("none", None):
        return []
    out = console or Console(stderr=True)
    kind: str | None = progress
    if kind == "auto":
        said = os.environ.get(VARIABLE)
        kind = said if said in _KINDS[1:] else "bar" if out.is_terminal or out.is_jupyter else "log"
    else:
        patience = 0.0
    if kind == "none":
        return []
    return [_Bar(out, patience)] if kind == "bar" else [_Lines(_printer(out), patience, planned)]


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def _file_of_environment() -> Path | None:
    said = os.environ.get(VARIABLE)
    return None if not said or said in _KINDS else Path(said)


def _appended(path: Path, *, of_environment: bool) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        what = (
            f"{VARIABLE} must be one of {', '.join(_KINDS)} or a file" if of_environment else "log_file must be a file"
        )
        raise UsageError(f"{what} that can be written, got {str(path)!r}: {reason_of(error)}") from error


class _Sink(Protocol):
    """Where events go."""

    def __call__(self, event: ProgressEvent) -> None: ...

    def close(self, ended: bool) -> None:
        """No more come; `ended` where the work is done, not broken off."""


class _Pass:
    """Time, speed and time left of a pass, from its events; what is left is taken from the layers that were seen."""

    def __init__(self, event: ProgressEvent) -> None:
        self.name = event.work or event.stage
        self.layered = event.layers > 0
        self.last = event
        self.count = self._first = self._count_of(event)
        self.began = self._counted = monotonic()

    def takes(self, event: ProgressEvent) -> bool:
        """Whether an event is one of this pass: another name, or a count that falls, is another one."""
        return (event.work or event.stage) == self.name and self._count_of(event) >= self.count

    def see(self, event: ProgressEvent) -> bool:
        """Take an event; whether more is finished than before."""
        self.last, count = event, self._count_of(event)
        more = count > self.count
        if more:
            self.count, self._counted = count, monotonic()
        return more

    def _count_of(self, event: ProgressEvent) -> int:
        return event.layer if self.layered else event.done

    @property
    def total(self) -> int:
        return self.last.layers if self.layered else self.last.total

    @property
    def where(self) -> str:
        """The part that is finished."""
        return f"{'layer' if self.layered else self.last.unit} {self.count} of {self.total}"

    @property
    def first_seen(self) -> bool:
        return self.count == self._first + 1

    @property
    def speed(self) -> str:
        """Tokens a second since it began; "" where it counts none."""
        rate = self.last.tokens / max(monotonic() - self.began, 1e-9)
        return f"{rate:,.0f} tokens/s" if self.last.tokens else ""

    @property
    def left(self) -> str:
        """How long the rest takes; "" as long as nothing is finished, and once all is."""
        seen, more = self.count - self._first, self.total - self.count
        if seen <= 0 or more <= 0:
            return ""
        seconds = (self._counted - self.began) / seen * more - (monotonic() - self._counted)
        return f"{format_seconds(max(seconds, 0.0))} left"


class _Moments:
    """What second moments take, to be told once."""

    def __init__(self) -> None:
        self._memory, self._told = 0, False

    def see(self, event: ProgressEvent) -> None:
        self._memory = max(self._memory, event.memory)

    def tell(self, say: Callable[[str], None]) -> None:
        if self._memory and not self._told:
            self._told = True
            say(f"second moments of the experts take {format_bytes(self._memory)} at a time")


class _Lines:
    """A line for every layer, for the end of a pass that took long, and for a minute in which there was none."""

    def __init__(self, write: Callable[[str], None], patience: float, planned: float | None) -> None:
        self._write, self._patience, self._planned = write, patience, planned
        self._began = monotonic()
        self._pass: _Pass | None = None
        self._moments = _Moments()
        self._spoke = False
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._beats = threading.Thread(target=self._beat, name="moesparse-progress", daemon=True)
        self._beats.start()

    def __call__(self, event: ProgressEvent) -> None:
        with self._lock:
            if self._pass is None or not self._pass.takes(event):
                self._end_pass()
                self._pass = _Pass(event)
            elif self._pass.see(event) and self._pass.layered:
                self._say()
            self._moments.see(event)
            self._tell_moments()

    def close(self, ended: bool) -> None:
        self._closed.set()
        self._beats.join()
        if ended:
            self._end_pass()

    def _end_pass(self) -> None:
        """A pass is over when the next begins: its last layer is finished then, though no event has said so."""
        found = self._pass
        if found is None or (not found.layered and monotonic() - found.began < _PATIENCE):
            return
        if found.count < found.total or not found.layered:
            found.count = found.total
            self._say()

    def _beat(self) -> None:
        while not self._closed.wait(_HEARTBEAT):
            with self._lock:
                if not self._spoke and self._pass is not None:
                    self._say(at_work=True)
                self._spoke = False

    @property
    def _speaks(self) -> bool:
        return monotonic() - self._began >= self._patience

    def _tell_moments(self) -> None:
        if self._speaks:
            self._moments.tell(lambda text: self._write(stamped(text)))

    def _say(self, *, at_work: bool = False) -> None:
        if not self._speaks or self._pass is None:
            return
        self._tell_moments()
        here, self._spoke = self._pass, True
        text = f"{here.name}: {here.where}"
        if at_work and here.last.stage != here.name:
            text += f" done, now {here.last.stage}"
        peak = peak_memory()
        parts = [text, format_seconds(monotonic() - here.began), here.speed, here.left and f"about {here.left}"]
        parts += [f"planned {format_seconds(self._planned)} in all"] if self._planned and here.first_seen else []
        parts += [f"peak {format_bytes(peak)}"] if peak else []
        self._write(stamped(", ".join(filter(None, parts))))


class _Bar:
    """A bar with the stage, what is finished of it, tokens a second, and the time left."""

    def __init__(self, console: Console, patience: float) -> None:
        self._console, self._patience = console, patience
        self._began = monotonic()
        self._bars: Bars | None = None
        self._pass: _Pass | None = None
        self._moments = _Moments()
        if not patience:
            self._start()

    def __call__(self, event: ProgressEvent) -> None:
        if self._pass is None or not self._pass.takes(event):
            self._pass = _Pass(event)
        else:
            self._pass.see(event)
        self._moments.see(event)
        if self._bars is None and monotonic() - self._began >= self._patience:
            self._start()
        if self._bars is None:
            return
        self._moments.tell(self._console.print)
        self._bars.update(
            self._bars.task_ids[0],
            description=event.stage,
            completed=event.done,
            total=event.total,
            speed=self._pass.speed,
            left=self._pass.left,
        )

    def close(self, ended: bool) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _start(self) -> None:
        columns = (
            TextColumn("{task.description}", style="bold"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bars = Bars(*columns, console=self._console, transient=True)
        self._bars.add_task("starting", total=None, speed="", left="")
        self._bars.start()
