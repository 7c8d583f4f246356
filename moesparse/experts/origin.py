"""Which model a plan or scores are of, so that they are used on its copies in any dtype and on no other model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moesparse._version import __version__
from moesparse.errors import CalibrationError
from moesparse.models.blocks import MoEBlock
from moesparse.models.fingerprint import router_weight
from moesparse.system.folders import check_writable

__all__ = ["QUANTIZED_TOLERANCE", "ROUTER_TOLERANCE", "Origin", "read_layers", "write_layers"]

ROUTER_TOLERANCE = 0.03
"""How far the sketches of one router in two dtypes may lie apart. bfloat16 rounds by at most 2^-8: by the bound of
`router_sketch` one expert in 10^12 would differ by more."""

QUANTIZED_TOLERANCE = 0.5
"""The same where a router is quantised, as it may be in a GGUF file: measured on normal values 0.02 for Q8_0, 0.3 for
4 bits. A router of another model, which differs by 1.4 in a typical expert, stays within that for all of 8 experts once
in 10^4, of 32 once in 10^17."""


@dataclass(frozen=True)
class Origin:
    """A model as plans and scores know it: sizes, and what its routers look like in any dtype.

    Attributes:
        layers: number of the decoder layer of each block, ascending.
        experts: E of every block.
        hidden_size: H of the routers' input, None where that is not known.
        intermediate_size: I of the first block's experts, or None.
        routers: for each block the `router_sketch` of its router, or None where it has no one matrix.
        model_type: what transformers or llama.cpp call the family; for the reader, never compared.
        tolerance: of the sketches.
    """

    layers: tuple[int, ...]
    experts: int
    hidden_size: int | None
    intermediate_size: int | None
    routers: tuple[tuple[float, ...] | None, ...]
    model_type: str | None = None
    tolerance: float = ROUTER_TOLERANCE

    @classmethod
    def of(cls, model: Any, blocks: Sequence[MoEBlock], sketches: Mapping[str, Tensor]) -> Origin:
        """Of a transformers model.

        Args:
            model: for its type.
            blocks: of it, also on the meta device.
            sketches: block name -> `router_sketch`; what is missing is not compared.
        """
        counts = {block.num_experts for block in blocks}
        if len(counts) != 1:
            raise CalibrationError(f"every block must have the same number of experts, got {sorted(counts)}")
        first = router_weight(blocks[0])
        named = [sketches.get(block.name) for block in blocks]
        return cls(
            layers=tuple(int(block.layer.rpartition(".")[2]) for block in blocks),
            experts=blocks[0].num_experts,
            hidden_size=None if first is None else first.shape[1],
            intermediate_size=blocks[0].intermediate_size,
            routers=tuple(None if each is None else tuple(round(v, 4) for v in each.tolist()) for each in named),
            model_type=getattr(getattr(model, "config", None), "model_type", None),
        )

    def check(self, found: Origin, what: str) -> None:
        """Refuse a model that something was not made for.

        Args:
            found: of the model at hand.
            what: was made, "plan" or "scores".

        Raises:
            CalibrationError: names every size that differs, or the layers whose routers do.
        """
        differ = [
            f"{name} is {_say(wanted)} there and {_say(got)} here"
            for name, wanted, got in (
                ("the number of experts", self.experts, found.experts),
                ("layers with experts", self.layers, found.layers),
                ("the hidden size", self.hidden_size, found.hidden_size),
                ("the width of an expert", self.intermediate_size, found.intermediate_size),
            )
            if wanted != got and None not in (wanted, got)
        ]
        if not differ and (other := self._other_routers(found)):
            far = max(other.values())
            differ = [
                f"the routers of layers {_say(tuple(other))} differ, by up to {far:.2g} where copies of one model in "
                f"other dtypes differ by less than {found.tolerance:g}"
            ]
        if differ:
            kind = f" ({self.model_type})" if self.model_type else ""
            raise CalibrationError(f"{what} must be of this model, got one of another{kind}: {'; '.join(differ)}")

    def _other_routers(self, found: Origin) -> dict[int, float]:
        """Layer -> how far its router is from the one here, where that is too far."""
        far = {}
        for layer, wanted, got in zip(self.layers, self.routers, found.routers, strict=True):
            if wanted is not None and got is not None:
                apart = max(abs(a - b) for a, b in zip(wanted, got, strict=True))
                if apart > found.tolerance:
                    far[layer] = apart
        return far

    def head(self) -> dict[str, Any]:
        """The sizes, for JSON."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "experts": self.experts,
        }

    @classmethod
    def read(cls, head: Any, layers: Sequence[Mapping[str, Any]], where: str) -> Origin:
        """What `head` and the layers' "layer" and "router" of a file say.

        Raises:
            CalibrationError: they are no such values.
        """
        held: dict[str, Any] = head if isinstance(head, dict) else {}
        experts, kind = held.get("experts"), held.get("model_type")
        sizes = {name: held.get(name) for name in ("hidden_size", "intermediate_size")}
        known = [experts, *(size for size in sizes.values() if size is not None)]
        if not all(type(size) is int and size > 0 for size in known):
            raise CalibrationError(f'{where} must hold "model" with experts and sizes, got {head}')
        numbers: list[Any] = [layer.get("layer") for layer in layers]
        if not numbers or not all(type(each) is int for each in numbers) or numbers != sorted(set(numbers)):
            raise CalibrationError(f"{where} must hold layers by ascending number, got {numbers}")
        routers = tuple(_numbers(layer.get("router"), experts, where) for layer in layers)
        found: dict[str, Any] = {"routers": routers, "model_type": str(kind) if kind else None, **sizes}
        return cls(layers=tuple(numbers), experts=held["experts"], **found)


def write_layers(path: str | os.PathLike[str], head: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of a head and one line of JSON for each layer, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = Path(path)
    check_writable("the file", path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    lines = ",\n".join(json.dumps(layer) for layer in layers)
    try:
        partial.write_text(f'{json.dumps({**head, "moesparse": __version__})[:-1]}, "layers": [\n{lines}\n]}}\n')
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_layers(path: str | os.PathLike[str], kind: str, *versions: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Head and layers of such a file.

    Args:
        path: of the file.
        kind: that "format" must say.
        versions: of which "format_version" must say one.

    Raises:
        CalibrationError: it cannot be read, is of another kind or of another version.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    found = held.get("format") if isinstance(held, dict) else None
    if found != kind:
        raise CalibrationError(f'{path} must be a file with "format": "{kind}", got {found!r}')
    if held.get("format_version") not in versions:
        raise CalibrationError(
            f"{path} must have format_version {' or '.join(map(str, versions))}, got {held.get('format_version')!r}: "
            "make it again with this version of moesparse"
        )
    layers = held.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise CalibrationError(f'{path} must hold "layers", a list of objects')
    return held, layers


def _numbers(value: Any, count: Any, where: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(type(each) in (int, float) and math.isfinite(each) for each in value)
    if not numbers or len(value) != count:
        raise CalibrationError(f'{where} must hold in each "router" one number for each of {count} experts')
    return tuple(map(float, value))


def _say(value: Any) -> str:
    """A size, or layer numbers with runs as first-last."""
    if not isinstance(value, tuple):
        return str(value)
    runs: list[list[int]] = []
    for number in value:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
