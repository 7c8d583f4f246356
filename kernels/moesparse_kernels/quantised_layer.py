"""The expert layer on weights of 8 and 4 bits, under an n:m mask or dense (quantised.py); a CPU only.

    backend     x meets the weights
    native      as 8 or 13 bits, in whole numbers: the compiled kernels
    reference   as it is: the weights are made dense in the dtype of x, expert by expert, in plain torch

native: each token has a scale, its largest magnitude over 127 or 4095. A token with a NaN or an infinity gets NaN for
all of its results; one whose values are all below 2^-100 counts as zeros. h stays fp32 until it is brought to the same
bits. Products and their sums over 2048 columns or a group are exact; scales, bias, activation, gates and further sums
are fp32; y is rounded once. The number of threads changes no bit; the number of tokens of an expert and the instruction
path may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .define_op import define_op
from .moe_checks import check_choice, check_layer
from .moe_native import gemm_native, layer_native
from .moe_reference import activate_torch, down_reference, up_reference
from .native_library import library, reason_without
from .ops import route_inside
from .quantised import QuantisedWeight
from .schedule import Routings

__all__ = ["QUANTISED_BACKENDS", "X_BITS", "gemm_quantised", "moe_quantised"]

QUANTISED_BACKENDS = ("auto", "native", "reference")
X_BITS = (8, 13)


def _check_kind(backend: str, x_bits: int, device: torch.device) -> None:
    check_choice("backend", backend, QUANTISED_BACKENDS)
    if x_bits not in X_BITS:
        raise ValueError(f"x_bits must be one of {X_BITS}, got {x_bits}")
    if backend == "native" and device.type != "cpu":
        raise ValueError(f'backend "native" must have tensors on a CPU, got {device.type}')


def _choose(backend: str, device: torch.device) -> str:
    """The backend that will run. Asked inside of the op: a graph is not for one machine."""
    if backend == "native" and library() is None:
        raise ValueError(f'backend "native" must fit the machine: {reason_without()}')
    if backend == "auto":
        return "native" if device.type == "cpu" and library() is not None else "reference"
    return backend


def moe_quantised(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: QuantisedWeight,
    down: QuantisedWeight,
    *,
    activation: str = "silu",
    gated: bool = True,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    x_bits: int = 8,
    backend: str = "auto",
) -> torch.Tensor:
    """Run the experts of one layer on quantised weights: `moe_nm` with these in place of packed ones.

    Args:
        x: (T, H) tokens; bf16, fp16 or fp32.
        gate_up: (E, 2 * I, H), gate rows then up rows; (E, I, H) when not gated.
        down: (E, H, I); it may have other bits, groups and another pattern.
        activation: a name that `moe_nm` takes.
        x_bits: 8 or 13, to which "native" brings x and h.
        backend: one of QUANTISED_BACKENDS; "auto" is "native" where it can run.

    The other arguments and the result are those of `moe_nm`.

    Raises:
        ValueError: as `moe_nm`; x_bits is another number.
    """
    _check_kind(backend, x_bits, x.device)
    if not isinstance(activation, str):
        raise ValueError(f"activation must be a name where weights are quantised, got {activation!r}")
    x, top_k_index, top_k_weights = check_layer(
        x, top_k_index, top_k_weights, gate_up, down, activation, gated, gate_up_bias, down_bias
    )
    return torch.ops.moesparse.moe_quantised(
        x,
        top_k_index,
        top_k_weights,
        *_parts(gate_up),
        *_parts(down),
        gate_up_bias,
        down_bias,
        activation,
        gated,
        x_bits,
        backend,
    )


def gemm_quantised(
    x: torch.Tensor, weight: QuantisedWeight, expert: int, bias: torch.Tensor | None = None, *, x_bits: int = 8
) -> torch.Tensor:
    """x times one expert of a weight, by the compiled kernels: `moe_quantised` has what NaN and small values do.

    Args:
        x: (T, K) on a CPU; bf16, fp16 or fp32.
        weight: (E, N, K).
        expert: 0 <= expert < E.
        bias: (N,), dtype of x, or None.
        x_bits: 8 or 13.

    Returns:
        (T, N), dtype of x, rounded once.

    Raises:
        ValueError: an argument does not fit, or there are no compiled kernels here.
    """
    _check_kind("native", x_bits, x.device)
    _choose("native", x.device)
    E, N, K = weight.shape
    if not 0 <= expert < E:
        raise ValueError(f"expert must lie in 0..{E - 1}, got {expert}")
    if x.dim() != 2 or x.shape[1] != K or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be (tokens, {K}) of bf16, fp16 or fp32, got {x.dtype} of shape {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")
    if bias is not None and (tuple(bias.shape) != (N,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} of shape {(N,)}, got {bias.dtype} of shape {tuple(bias.shape)}")
    return gemm_native(x.contiguous(), weight, expert, None if bias is None else bias.contiguous(), x_bits)


# an op takes tensors, numbers and strings: a weight travels as its tensors and (E, N, K, n, m, bits, group)


def _parts(weight: QuantisedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int]]:
    layout = [*weight.shape, weight.n, weight.m, weight.bits, weight.group]
    return weight.values, weight.scales, weight.index, layout


def _rebuild(
    values: torch.Tensor, scales: torch.Tensor, index: torch.Tensor | None, layout: Sequence[int]
) -> QuantisedWeight:
    E, N, K, n, m, bits, group = layout
    return QuantisedWeight(values, scales, index, (E, N, K), n, m, bits, group)


@define_op("moe_quantised")
def _moe_quantised(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_values: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_index: torch.Tensor | None,
    gate_up_layout: Sequence[int],
    down_values: torch.Tensor,
    down_scales: torch.Tensor,
    down_index: torch.Tensor | None,
    down_layout: Sequence[int],
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    x_bits: int,
    backend: str,
) -> torch.Tensor:
    gate_up = _rebuild(gate_up_values, gate_up_scales, gate_up_index, gate_up_layout)
    down = _rebuild(down_values, down_scales, down_index, down_layout)
    if _choose(backend, x.device) == "native":
        return layer_native(
            x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias, activation, gated, x_bits
        )
    routing = Routings(top_k_index, gate_up.shape[0], route_inside).rows()
    if activation == "swigluoai":
        rows = up_reference(x, routing, gate_up, gate_up_bias, "none", False)
        hidden = activate_torch(rows, activation, gated)
    else:
        hidden = up_reference(x, routing, gate_up, gate_up_bias, activation, gated)
    return down_reference(hidden, routing, top_k_weights, down, down_bias)


@torch.library.register_fake("moesparse::moe_quantised")
def _moe_quantised_fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)
