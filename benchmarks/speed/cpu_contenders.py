"""The ways to run an expert layer on a CPU that are compared: ours, transformers', torch's.

Weights of 8 and 4 bits are the layer's own, rounded to nearest: a scale for each row, or for every 128 columns. Tokens
meet them in 8 bits. Their results are compared with the exact ones of the unrounded layer, by relative error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from moesparse.benchmarking.layer import ExpertLayer, RoutedCall
from moesparse_kernels import QuantisedWeight, moe_dense, moe_nm, moe_quantised
from moesparse_kernels.native_library import turned_off

__all__ = ["CONTENDERS", "Contender"]

Run = Callable[[RoutedCall], torch.Tensor]

QUANTISED: dict[str, dict[str, Any]] = {
    "packed int8": {"packed": True, "bits": 8, "group": 0},
    "packed int4": {"packed": True, "bits": 4, "group": 128},
    "dense int8": {"packed": False, "bits": 8, "group": 0},
}
# Rounding to 8 bits is 1 to 4% of a result, more where rows are long: the largest of a row sets the scale, and what
# comes out of an activation has a long tail. Rounding of weights to 4 bits is 9%.
_TOLERANCE = {8: 0.06, 4: 0.2}
_made: WeakKeyDictionary[ExpertLayer, dict[str, tuple[QuantisedWeight, QuantisedWeight]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Contender:
    """One way.

    Attributes:
        run: computes a call.
        baseline: whether it is a dense layer that anybody has without this package.
        weights: those it reads: "dense", "packed", or a name of QUANTISED.
    """

    run: Run
    baseline: bool = False
    weights: str = "packed"

    def check(self, call: RoutedCall) -> dict[str, Any]:
        """Run it and compare with fp64: `ok`, `relative_error` and more."""
        found = call.verify(self.run(call), slack=2.0)
        if self.weights in QUANTISED:
            found["ok"] = found["relative_error"] <= _TOLERANCE[QUANTISED[self.weights]["bits"]]
        return found

    def moved(self, call: RoutedCall) -> int:
        """The least bytes of a call."""
        if self.weights not in QUANTISED:
            return call.moved(self.weights == "packed")
        other = call.layer.gate_up.nbytes + call.layer.down.nbytes
        own = sum(weight.nbytes for weight in _quantised(call.layer, self.weights))
        return call.moved(False) - (other - own) // call.layer.shape.num_experts * call.touched


def _quantised(layer: ExpertLayer, name: str) -> tuple[QuantisedWeight, QuantisedWeight]:
    forms = _made.setdefault(layer, {})
    if name not in forms:
        how = dict(QUANTISED[name])
        packed = how.pop("packed")
        weights = (layer.packed_gate_up, layer.packed_down) if packed else (layer.gate_up, layer.down)
        gate_up, down = (QuantisedWeight.quantise(weight, **how) for weight in weights)
        forms[name] = gate_up, down
    return forms[name]


def _torch_eager(call: RoutedCall) -> torch.Tensor:
    """What transformers' experts do when they are run as they are: a loop over those with tokens, torch's linear."""
    layer = call.layer
    x, ids, gates = call.routed
    module: Any = layer.transformers_module
    out = torch.zeros_like(x)
    chosen = F.one_hot(ids, layer.shape.num_experts).permute(2, 1, 0)
    for e in chosen.sum(dim=(-1, -2)).nonzero().flatten().tolist():
        choice, token = torch.where(chosen[e])
        bias = (None, None) if layer.gate_up_bias is None else (layer.gate_up_bias[e], layer.down_bias[e])  # type: ignore[index]
        hidden = module._apply_gate(F.linear(x[token], layer.gate_up[e], bias[0]))
        rows = F.linear(hidden, layer.down[e], bias[1]) * gates[token, choice, None]
        out.index_add_(0, token, rows.to(out.dtype))
    return out


def _without_onednn(call: RoutedCall) -> torch.Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        return _torch_eager(call)


def _grouped_mm(call: RoutedCall) -> torch.Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](call.layer.transformers_module, *call.routed)


def _packed(backend: str) -> Run:
    def run(call: RoutedCall) -> torch.Tensor:
        layer = call.layer
        return moe_nm(*call.routed, layer.packed_gate_up, layer.packed_down, **layer.options, backend=backend)

    return run


def _dense_native(call: RoutedCall) -> torch.Tensor:
    layer = call.layer
    return moe_dense(*call.routed, layer.gate_up, layer.down, **layer.options, backend="native")


def _packed_before(call: RoutedCall) -> torch.Tensor:
    with turned_off():
        return _packed("reference")(call)


def _eight_or_four_bits(name: str) -> Run:
    def run(call: RoutedCall) -> torch.Tensor:
        return moe_quantised(*call.routed, *_quantised(call.layer, name), **call.layer.options)

    return run


CONTENDERS: dict[str, Contender] = {
    "packed": Contender(_packed("auto")),
    "packed native": Contender(_packed("native")),
    "packed before": Contender(_packed_before),
    **{name: Contender(_eight_or_four_bits(name), weights=name) for name in QUANTISED},
    "dense native": Contender(_dense_native, weights="dense"),
    "transformers eager": Contender(_torch_eager, baseline=True, weights="dense"),
    "transformers grouped_mm": Contender(_grouped_mm, baseline=True, weights="dense"),
    "eager, oneDNN off": Contender(_without_onednn, baseline=True, weights="dense"),
}
"""By name; "packed" is what a user of packed weights gets."""
