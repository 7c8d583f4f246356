"""What a run is calibrated on: text that is sent through the model, sums that were saved before, or nothing.

Made once, at the door, from what the caller gave; drivers ask it for what they need.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.windows import (
    ImageWindows,
    Windows,
    add_hashes,
    check_windows,
    ordered_hash,
    windows_hash,
)
from moesparse.errors import UsageError
from moesparse.models.layers import Layers, RunOptions
from moesparse.models.look import Look
from moesparse.models.meta import vocabulary_size
from moesparse.models.opener import towers
from moesparse.models.stream import LayerStream

__all__ = ["ONE_DOMAIN", "Calibration", "FromText", "Given", "Nothing", "Saved", "calibration_of", "text_of"]

ONE_DOMAIN = "all"
"""Name of the text in a report when its domains were not named."""

Given = Windows | ModelStatistics | Mapping[str, ModelStatistics] | None
"""What a caller may give: windows (see `Windows`), statistics, statistics by domain, or None."""


@dataclass(frozen=True, eq=False)
class FromText:
    """Windows that are sent through the layers.

    Attributes:
        ids: [n, t] int64.
        mask: [n, t] bool, True where a token is real, or None.
        domains: of each window, for the choice of experts; None is one domain.
        seen: the windows with their images, where there are any.
    """

    ids: Tensor
    mask: Tensor | None
    domains: Sequence[str] | None = None
    seen: ImageWindows | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Windows and tokens of each."""
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def identity(self) -> str:
        """What a run that goes on must find again."""
        return ordered_hash(self.ids, self.mask, None if self.seen is None else self.seen.marks)

    @property
    def inputs(self) -> Sequence[Mapping[str, Tensor]] | None:
        """What the model is called with besides, for each window."""
        return None if self.seen is None else self.seen.inputs

    @property
    def text_hash(self) -> str:
        """`windows_hash` of the windows, which statistics of them hold too."""
        return windows_hash(self.ids, self.mask, None if self.seen is None else self.seen.marks)

    def describe(self) -> dict[str, Any]:
        """For the report."""
        windows, length = self.size
        tokens = windows * length if self.mask is None else int(self.mask.sum())
        found = {"windows": windows, "length": length, "tokens": tokens}
        return found if self.seen is None else found | {"images": self.seen.images}

    def stream(self, layers: Layers, options: RunOptions, look: Look, spill: Path | None) -> LayerStream:
        """The windows at the input of the first layer; every layer was looked at by then."""
        return layers.stream(self.ids, self.mask, options, look, spill, self.inputs)


@dataclass(frozen=True, eq=False)
class Saved:
    """Statistics of one text, or of several domains by name.

    Attributes:
        parts: by domain.
        alone: they are of one text, which was given without a name.
    """

    parts: Mapping[str, ModelStatistics]
    alone: bool

    size = (0, 1)

    @property
    def only(self) -> ModelStatistics:
        """Those of the one text."""
        (statistics,) = self.parts.values()
        return statistics

    @property
    def identity(self) -> dict[str, list[Any]]:
        """What a run that goes on must find again."""
        return {name: [part.text_hash, part.seed, part.fingerprint] for name, part in self.parts.items()}

    @property
    def text_hash(self) -> str:
        """`windows_hash` of all windows they were taken from."""
        return add_hashes([part.text_hash for part in self.parts.values()])

    def describe(self) -> dict[str, Any]:
        """For the report."""
        hashes = {name: part.text_hash for name, part in self.parts.items()}
        tokens = sum(part.tokens for part in self.parts.values())
        return {"statistics": next(iter(hashes.values())) if self.alone else hashes, "tokens": tokens}

    def stream(self, layers: Layers, options: RunOptions, look: Look, spill: Path | None) -> None:
        """No text; every layer was looked at by then."""
        look.at_all()


@dataclass(frozen=True)
class Nothing:
    """For rules that look at the weights alone."""

    size = (0, 1)
    identity = None
    text_hash = None

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"windows": 0, "length": 0, "tokens": 0}

    def stream(self, layers: Layers, options: RunOptions, look: Look, spill: Path | None) -> None:
        """No text; every layer was looked at by then."""
        look.at_all()


Calibration = FromText | Saved | Nothing


def calibration_of(given: Given, model: Any, domains: Sequence[str] | None = None) -> Calibration:
    """What was given, checked against a model.

    Args:
        given: see `Given`.
        model: its vocabulary bounds the token ids.
        domains: of each window.

    Raises:
        UsageError: windows that do not fit, see `check_windows`; domains beside statistics.
    """
    if given is None:
        return Nothing()
    if isinstance(given, ModelStatistics | Mapping):
        if domains is not None:
            raise UsageError("domains must be left out with statistics, which name their own")
        alone = isinstance(given, ModelStatistics)
        return Saved({ONE_DOMAIN: given} if alone else given, alone)  # type: ignore[arg-type, dict-item]
    return text_of(given, model, domains)


def text_of(windows: Windows, model: Any, domains: Sequence[str] | None = None) -> FromText:
    """Windows, checked against a model; a warning where it has a tower and is given text alone.

    Raises:
        UsageError: see `check_windows`; images for a model that takes none.
    """
    ids, mask = check_windows(windows, vocabulary_size(model))
    seen = windows if isinstance(windows, ImageWindows) else None
    blind = towers(model)
    if seen is not None and "vision" not in blind:
        raise UsageError(f"calibration must be text alone for {type(model).__name__}, which takes no images, got some")
    if seen is None and blind:
        warnings.warn(
            f"the model is calibrated on text alone and has a {' and a '.join(blind)} tower: experts that only see "
            "what comes from there look idle. Give records with images too (.jsonl or .parquet)",
            stacklevel=3,
        )
    return FromText(ids, mask, domains, seen)
