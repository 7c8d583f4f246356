"""What a long call tells its caller while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a long run.

    Attributes:
        stage: what is being done, e.g. "calibrate" or "prune model.layers.3.mlp.experts".
        done: steps finished in the whole run.
        total: steps in the whole run.
        tokens: tokens run through the model so far.
    """

    stage: str
    done: int
    total: int
    tokens: int = 0


Progress = Callable[[ProgressEvent], None]
"""Called with every event; it must not raise."""


def silent(_event: ProgressEvent) -> None:
    """The default: say nothing."""
