"""A choice of experts as a file: made once on any copy of a model, carried out on every other one without text.

{"format": "moesparse-plan", "format_version": 1, "criterion": "reap", "statistics": "5f0c...",
 "model": {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "experts": 8},
 "moesparse": "0.1.0", "layers": [
{"layer": 0, "kept": [0, 2, 3, 4, 6, 7], "router": [0.1203, -1.0458, ...]},
...]}

Where experts were merged the version is 2, "method" says how, and a layer's "merged" lists the groups: "experts",
first the one that stays, their "weights", and for each but the first in "orders" which of its neurons is neuron i of
the result.
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
from moesparse.experts.merging import MERGED_BY, Merged
from moesparse.experts.origin import Origin, read_layers, write_layers
from moesparse.experts.selection import check_divisor

__all__ = ["PLAN_FILE", "ExpertPlan"]

PLAN_FILE = "moesparse_plan.json"
"""In a checkpoint that lost experts: the plan by which its source lost them."""

_FORMAT = "moesparse-plan"
# of a plan by which experts are removed, and of one by which some are merged
_VERSION, _VERSION_MERGED = 1, 2


@dataclass(frozen=True)
class ExpertPlan:
    """Which experts of which model stay.

    Attributes:
        origin: the model.
        kept: for each of its blocks the ids that stay, ascending; position = new id.
        criterion: by which they were chosen.
        statistics: hash of the calibration text, `moesparse.calibration.windows.windows_hash`; None where there was
            none.
        method: what becomes of the others, one of moesparse.experts.merging.METHODS.
        merged: for each block those that stay in the place of several; empty where they are removed.
    """

    origin: Origin
    kept: tuple[tuple[int, ...], ...]
    criterion: str
    statistics: str | None = None
    method: str = "remove"
    merged: tuple[tuple[Merged, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.merged:
            self._check_merged()
        if len(self.kept) != len(self.origin.layers):
            raise CalibrationError(f"plan must keep experts of {len(self.origin.layers)} layers, got {len(self.kept)}")
        for layer, ids in zip(self.origin.layers, self.kept, strict=True):
            numbers = all(type(each) is int and 0 <= each < self.origin.experts for each in ids)
            if not ids or not numbers or list(ids) != sorted(set(ids)):
                raise CalibrationError(
                    f"plan must keep ascending ids below {self.origin.experts} in layer {layer}, got {list(ids)}"
                )

    def _check_merged(self) -> None:
        if len(self.merged) != len(self.origin.layers) or self.method not in MERGED_BY:
            raise CalibrationError(
                f"plan must merge experts of {len(self.origin.layers)} layers by one of {', '.join(MERGED_BY)}, got "
                f"{len(self.merged)} by {self.method!r}"
            )
        for layer, ids, groups in zip(self.origin.layers, self.kept, self.merged, strict=True):
            stay = [group.experts[0] for group in groups]
            go = [expert for group in groups for expert in group.experts[1:]]
            wrong = set(stay) - set(ids) or set(go) & set(ids) or len(set(stay + go)) != len(stay + go)
            neurons = self.origin.intermediate_size
            long = neurons is not None and any(len(order) != neurons for group in groups for order in group.orders)
            if wrong or long or not all(0 <= expert < self.origin.experts for expert in go):
                raise CalibrationError(
                    f"plan must merge experts that go into ones that stay, each once and neuron by neuron, in layer "
                    f"{layer}, got {[list(group.experts) for group in groups]}"
                )

    @classmethod
    def of(
        cls,
        origin: Origin,
        kept: Sequence[Tensor],
        criterion: Any,
        statistics: str | None = None,
        method: str = "remove",
        merged: Sequence[tuple[Merged, ...]] = (),
    ) -> ExpertPlan:
        """From the ids of a choice, a tensor for each block, and the groups of each where some were merged."""
        ids = tuple(tuple(sorted(each.tolist())) for each in kept)
        name = criterion if isinstance(criterion, str) else str(tuple(criterion))
        return cls(origin, ids, name, statistics, method, tuple(merged))

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
        chosen: list[Any] = [self.origin.experts, list(zip(self.origin.layers, self.kept, strict=True))]
        how = {} if not self.merged else {"method": self.method}
        if self.merged:
            chosen.append([[group.to_dict() for group in groups] for groups in self.merged])
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:32]
        return {"kept": digest, "criterion": self.criterion, "statistics": self.statistics, **how}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        parts = zip(self.origin.layers, self.kept, self.origin.routers, strict=True)
        layers: list[dict[str, Any]] = [{"layer": layer, "kept": ids, "router": router} for layer, ids, router in parts]
        for layer, groups in zip(layers, self.merged, strict=False):
            layer["merged"] = [group.to_dict() for group in groups]
        write_layers(
            path,
            {
                "format": _FORMAT,
                "format_version": _VERSION_MERGED if self.merged else _VERSION,
                "criterion": self.criterion,
                "statistics": self.statistics,
                **({"method": self.method} if self.merged else {}),
                "model": self.origin.head(),
            },
            layers,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertPlan:
        """Read what `save` wrote.

        Raises:
            CalibrationError: no such file, another kind of file, another version, or ids that cannot be; names it.
        """
        held, layers = read_layers(path, _FORMAT, _VERSION, _VERSION_MERGED)
        origin = Origin.read(held.get("model"), layers, str(path))
        kept = [layer.get("kept") for layer in layers]
        if not all(isinstance(ids, list) for ids in kept):
            raise CalibrationError(f'{path} must hold "kept", a list of ids, for each layer')
        try:
            statistics = None if held.get("statistics") is None else str(held["statistics"])
            merged = [tuple(map(Merged.from_dict, layer.get("merged", ()))) for layer in layers]
            how = (str(held.get("method")), tuple(merged)) if held["format_version"] == _VERSION_MERGED else ()
            return cls(origin, tuple(map(tuple, kept)), str(held.get("criterion")), statistics, *how)  # type: ignore[arg-type]
        except (CalibrationError, ValueError) as error:
            raise CalibrationError(f"{path}: {error}") from error
