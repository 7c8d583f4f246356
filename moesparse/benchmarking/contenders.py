"""Who runs an expert layer: our backends, transformers' experts functions, and vLLM's fused experts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from moesparse.benchmarking.layer import Contender, RoutedCall, Unavailable
from moesparse_kernels import moe_dense, moe_nm

__all__ = ["CONTENDERS", "contenders_for"]

# weights transformers' batched_mm may copy for one call
_MAX_GATHERED_BYTES = 8 * 2**30


def _installed(package: str) -> None:
    """Only a package that is not there is no contender: one that is there and does not import is an error."""
    if find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def _ours(function: str, backend: str) -> Callable[[RoutedCall], Callable[[], torch.Tensor]]:
    def prepare(call: RoutedCall) -> Callable[[], torch.Tensor]:
        layer = call.layer
        if function == "moe_dense":
            return lambda: moe_dense(*call.routed, layer.gate_up, layer.down, **layer.options, backend=backend)
        return lambda: moe_nm(*call.routed, layer.packed_gate_up, layer.packed_down, **layer.options, backend=backend)

    return prepare


def _transformers(name: str) -> Callable[[RoutedCall], Callable[[], torch.Tensor]]:
    def prepare(call: RoutedCall) -> Callable[[], torch.Tensor]:
        _installed("transformers")
        try:
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

            function = ALL_EXPERTS_FUNCTIONS[name]
        except KeyError as error:
            raise Unavailable(f"this transformers has no experts function {name!r}") from error
        except ModuleNotFoundError as error:
            if error.name != "transformers.integrations.moe":
                raise
            raise Unavailable("this transformers has no experts functions") from error
        if name == "batched_mm":
            layer = call.layer
            gathered = call.top_k_index.numel() * layer.gate_up[0].nbytes
            if gathered > _MAX_GATHERED_BYTES:
                raise Unavailable(f"it copies the experts of every token, {gathered / 2**30:.0f} GiB here")
        return lambda: function(call.layer.transformers_module, *call.routed)

    return prepare


def _vllm(call: RoutedCall) -> Callable[[], torch.Tensor]:
    """vLLM's layer with the launch sizes that it ships for the device, ids and gates as its routers give them."""
    _installed("vllm")
    from vllm.model_executor.layers.fused_moe import fused_experts

    layer, shape = call.layer, call.layer.shape
    if shape.activation != "silu" or shape.bias:
        raise Unavailable("vLLM's fused experts are called for silu without a bias only")
    ids, gates = call.top_k_index.int(), call.top_k_weights.float()
    return lambda: fused_experts(call.x, layer.gate_up, layer.down, gates, ids)


CONTENDERS: tuple[Contender, ...] = (
    Contender("moe_nm", ("cuda", "cpu"), True, _ours("moe_nm", "auto"), slack=2.0),
    Contender("moe_nm native", ("cpu",), True, _ours("moe_nm", "native")),
    Contender("moe_nm triton", ("cuda",), True, _ours("moe_nm", "triton")),
    Contender("moe_nm unpack", ("cuda",), True, _ours("moe_nm", "unpack"), slack=2.0),
    Contender("moe_nm semi_structured", ("cuda",), True, _ours("moe_nm", "semi_structured"), slack=2.0, graph=False),
    Contender("moe_nm reference", ("cpu",), True, _ours("moe_nm", "reference"), slack=2.0),
    Contender("moe_dense native", ("cpu",), False, _ours("moe_dense", "native")),
    Contender("moe_dense triton", ("cuda",), False, _ours("moe_dense", "triton")),
    Contender("moe_dense grouped_mm", ("cuda",), False, _ours("moe_dense", "grouped_mm"), slack=2.0),
    Contender("moe_dense reference", ("cpu",), False, _ours("moe_dense", "reference"), slack=2.0),
    Contender("transformers grouped_mm", ("cuda", "cpu"), False, _transformers("grouped_mm"), slack=2.0),
    Contender("transformers batched_mm", ("cuda", "cpu"), False, _transformers("batched_mm"), slack=2.0),
    Contender("vllm fused_moe", ("cuda",), False, _vllm, slack=2.0),
)
"""Every way to run the layer that is timed; the first that a device has is what a user of packed weights gets."""


def contenders_for(device: torch.device) -> list[Contender]:
    """Those that run on a device."""
    return [contender for contender in CONTENDERS if device.type in contender.devices]
