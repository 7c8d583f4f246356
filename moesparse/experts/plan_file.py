"""A choice of experts as a file: made once on any copy of a model, carried out on every other one without text.

{"format": "moesparse-plan", "format_version": 1, "criterion": "reap", "statistics": "5f0c...",
 "model": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "experts": 8},
 "moesparse": "0.1.0", "layers": [
{"layer": 0, "kept": [0, 2, 3, 4, 6, 7], "router": [0.1203, -1.0458, ...]},
...]}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.origin import Origin, read_layers, write_layers
from moesparse.experts.selection import check_divisor

__all__ = ["PLAN_FILE", "ExpertPlan"]

PLAN_FILE = "moesparse_plan.json"
"""In a checkpoint that lost experts: the plan by which its source lost them."""

_FORMAT, _VERSION = "moesparse-plan", 1


@dataclass(frozen=True)
class ExpertPlan:
    """Which experts of which model stay.

    Attributes:
        origin: the model.
        kept: for each of its blocks the ids that stay, ascending; position = new id.
        criterion: by which they were chosen.
        statistics: hash of the calibration text, `moesparse.calibration.windows.windows_hash`; None where there was
            none.
    """

    origin: Origin
    kept: tuple[tuple[int, ...], ...]
    criterion: str
    statistics: str | None = None

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.origin.layers):
            raise CalibrationError(f"plan must keep experts of {len(self.origin.layers)} layers, got {len(self.kept)}")
        for layer, ids in zip(self.origin.layers, self.kept, strict=True):
            numbers = all(type(each) is int and 0 <= each < self.origin.experts for each in ids)
            if not ids or not numbers or list(ids) != sorted(set(ids)):
                raise CalibrationError(
                    f"plan must keep ascending ids below {self.origin.experts} in layer {layer}, got {list(ids)}"
                )

    @classmethod
    def of(cls, origin: Origin, kept: Sequence[Tensor], criterion: Any, statistics: str | None = None) -> ExpertPlan:
        """From the ids of a choice, a tensor for each block."""
        ids = tuple(tuple(sorted(each.tolist())) for each in kept)
        return cls(origin, ids, criterion if isinstance(criterion, str) else str(tuple(criterion)), statistics)

    def check(self, found: Origin) -> None:
        """Refuse the plan of another model.

        Raises:
            CalibrationError: names what does not match.
        """
        self.origin.check(found, "plan")

    def check_divisible(self, divisible_by: int | None) -> None:
        """Refuse a plan of which some layer keeps another count than a multiple of a number; None takes any.

        Raises:
            UsageError: names the layer and its count.
        """
        check_divisor(divisible_by)
        for layer, ids in zip(self.origin.layers, self.kept, strict=True):
            if divisible_by is not None and len(ids) % divisible_by:
                raise UsageError(
                    f"plan must keep a multiple of divisible_by={divisible_by} experts in every layer, got {len(ids)} "
                    f"in layer {layer}"
                )

    def tensors(self) -> list[Tensor]:
        """The ids as `plan_removal` takes them."""
        return [torch.tensor(ids) for ids in self.kept]

    def identity(self) -> dict[str, Any]:
        """What a recipe says of it; the hash is that of which experts of which layers stay."""
        named = json.dumps([self.origin.experts, list(zip(self.origin.layers, self.kept, strict=True))])
        digest = hashlib.sha256(named.encode()).hexdigest()[:32]
        return {"kept": digest, "criterion": self.criterion, "statistics": self.statistics}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        parts = zip(self.origin.layers, self.kept, self.origin.routers, strict=True)
        write_layers(
            path,
            {
                "format": _FORMAT,
                "format_version": _VERSION,
                "criterion": self.criterion,
                "statistics": self.statistics,
                "model": self.origin.head(),
            },
            [{"layer": layer, "kept": ids, "router": router} for layer, ids, router in parts],
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertPlan:
        """Read what `save` wrote.

        Raises:
            CalibrationError: no such file, another kind of file, another version, or ids that cannot be; names it.
        """
        held, layers = read_layers(path, _FORMAT, _VERSION)
        origin = Origin.read(held.get("model"), layers, str(path))
        kept = [layer.get("kept") for layer in layers]
        if not all(isinstance(ids, list) for ids in kept):
            raise CalibrationError(f'{path} must hold "kept", a list of ids, for each layer')
        try:
            statistics = None if held.get("statistics") is None else str(held["statistics"])
            return cls(origin, tuple(map(tuple, kept)), str(held.get("criterion")), statistics)  # type: ignore[arg-type]
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from error
