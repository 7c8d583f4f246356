"""How long-running work tells a caller where it stands; the command line draws its bars from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
    """

    stage: str
    done: int
    total: int
    unit: str = "step"
    tokens: int = 0
    seconds: float = 0.0
    name: str = ""
    memory: int = 0


Progress = Callable[[ProgressEvent], None]
"""Called with every event; it must not raise."""


def silent(_event: ProgressEvent) -> None:
    """The default: say nothing."""
