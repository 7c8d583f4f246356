"""What a run says: losses, early warnings, progress, TensorBoard; and the state it can go on from."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

from moesparse.errors import UsageError
from moesparse.progress import Progress, ProgressEvent

__all__ = ["DistillWarning", "TrainingLog"]

_MEAN_OVER = 5
_PLATEAU = 0.99
_SPIKE = 1.5
# standard errors between the lowest and the last of thousands of means that only batches make differ
_SPREAD = 4


class DistillWarning(UserWarning):
    """A run that shows an early sign of failure."""


class TrainingLog:
    """The rows of one run. Told of every step; warns early of what MoE-Pruner names as signs of failure.

    Args:
        progress: told of every step.
        steps: in all.
        folder: for TensorBoard's event files, or None.
        rows: of the steps done before, when a run goes on.
        speaks: False in all processes but one.
        blocks: that are trained one after the other; 0 where all are at once.

    Raises:
        UsageError: a folder is given and tensorboard is not installed.
    """

    def __init__(
        self,
        progress: Progress,
        steps: int,
        folder: str | os.PathLike[str] | None,
        rows: list[dict[str, Any]],
        speaks: bool = True,
        blocks: int = 0,
    ) -> None:
        self.rows = rows
        self.warnings: list[str] = []
        # by the row that a part began with: no movement was found; the lowest of the means of cross-entropy
        self._flat: set[int] = set()
        self._lowest: dict[int, float] = {}
        self._progress, self._steps, self._speaks = progress, steps, speaks
        self._blocks, self._seen = blocks, {row["block"] for row in rows if "block" in row}
        self._began, self._tokens = time.perf_counter(), 0
        self._writer: Any = None
        if folder is not None and speaks:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError(
                    "logs must be None without tensorboard, got a folder: pip install 'moesparse[tensorboard]'"
                ) from error
            self._writer = SummaryWriter(os.fspath(folder), purge_step=len(rows))
        self._say("distill")

    def add(self, row: Mapping[str, Any], tokens: int) -> None:
        """One step: its "step" and any of "ce", "experts", "kl", "loss", "learning_rate", "grad_norm", "block"."""
        self.rows.append(dict(row))
        self._tokens += tokens
        if "block" in row:
            self._seen.add(row["block"])
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, len(self.rows) - 1)
        parts = [f"CE {row['ce']:.3f}"] if "ce" in row else [row["block"]] if "block" in row else []
        parts += [f"KL {row['kl']:.3g}"] if "kl" in row else []
        # zero where the expert loss has no weight
        parts += [f"experts {row['experts']:.3g}"] if row["experts"] else []
        self._say("distill: " + ", ".join(parts))

    def check(self, first: int, steps: int) -> None:
        """Warn, once for each sign, as early as the rows of a part of the run show it. To be called after every step.

        Args:
            first: row with which the part began: the whole run, or one block's.
            steps: of the part.
        """
        count = len(self.rows) - first
        if count < 2 * _MEAN_OVER:
            return
        # by a tenth of the part the expert loss has moved, or the rate is too low for this model; looked at once in a
        # hundredth of the part, because it takes all rows
        soon = steps // 10 <= count <= steps // 2 + 2 * _MEAN_OVER and count % max(steps // 100, 1) == 0
        if first not in self._flat and soon:
            rows = self.rows[first:]
            # without an expert loss it is the teacher's logits that the student must come closer to
            name, what = ("kl", "KL") if "kl" in rows[0] and not rows[0]["experts"] else ("experts", "the expert loss")
            before, after, noise = _halves(rows, name)
            if after > _PLATEAU * before + noise:
                self._flat.add(first)
                self._warn(
                    f"{what} went from {before:.3g} to {after:.3g} within {count} steps: the learning "
                    "rate does not suit this model, or lambda is too small"
                )
        if "ce" not in self.rows[first]:
            return
        last = statistics.fmean(row["ce"] for row in self.rows[-_MEAN_OVER:])
        if first in self._lowest:
            self._lowest[first] = min(self._lowest[first], last)
        else:
            # the first row too: a run that is wrecked at once has no good mean
            self._lowest[first] = min(self.rows[first]["ce"], *_means(self.rows[first:], "ce"))
        rise = last - self._lowest[first]
        if rise <= math.log(_SPIKE) or any("perplexity" in text for text in self.warnings):
            return
        if rise > math.log(_SPIKE) + _SPREAD * _noise(self.rows[first:], "ce"):
            self._warn(
                f"perplexity of the training windows rose from {math.exp(self._lowest[first]):.4g} to {_exp(last):.4g} "
                f"by step {self.rows[-1]['step']}: the learning rate is too high for this model"
            )

    def tell(self, event: ProgressEvent) -> None:
        """Pass on an event of something that comes before the first step."""
        if self._speaks:
            self._progress(event)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _say(self, stage: str) -> None:
        seconds = time.perf_counter() - self._began
        if self._speaks:
            at = max(len(self._seen) - 1, 0)
            event = ProgressEvent(stage, len(self.rows), self._steps, "step", self._tokens, seconds, work="distill")
            self._progress(replace(event, layer=at, layers=self._blocks))

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        if self._speaks:
            warnings.warn(text, DistillWarning, stacklevel=2)


def _halves(rows: list[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Means of the first and of the second half of the rows, and twice the standard error of their difference."""
    values = [row[name] for row in rows]
    halves = values[: len(values) // 2], values[len(values) // 2 :]
    error = math.sqrt(sum(statistics.variance(half) / len(half) for half in halves))
    return statistics.fmean(halves[0]), statistics.fmean(halves[1]), 2 * error


def _noise(rows: list[dict[str, Any]], name: str) -> float:
    """Standard error of the difference of two of `_means`, from neighbouring rows, of which few may be wild."""
    steps = [abs(after[name] - before[name]) for before, after in pairwise(rows)]
    return statistics.median(steps) / NormalDist().inv_cdf(0.75) / math.sqrt(_MEAN_OVER)


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _means(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Means over _MEAN_OVER neighbouring rows: single batches differ."""
    values = [row[name] for row in rows]
    return [sum(values[i : i + _MEAN_OVER]) / _MEAN_OVER for i in range(len(values) - _MEAN_OVER + 1)]
