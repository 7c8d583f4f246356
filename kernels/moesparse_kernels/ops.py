"""Pruning ops and routing: argument checks, registration with torch, and the choice between Triton and plain torch.

Triton serves tensors on a CUDA or ROCm device, and every tensor under TRITON_INTERPRET=1; plain torch serves the rest.
The ops are registered as `torch.ops.moesparse.*` with fakes, so torch.compile(fullgraph=True), export, fake tensors and
CUDA graph capture work. Gradients do not flow through them. Triton launches on the current device, so every op makes
that of its tensors the current one.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Literal, overload

import torch

from . import reference
from .layout import GROUP_SIZES, NMWeight
from .schedule import Routing, route_torch, routing_sizes

__all__ = [
    "column_energies",
    "column_energy",
    "column_energy_sorted",
    "nm_prune",
    "route",
    "route_inside",
    "row_topk",
    "use_triton",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernels serve this tensor: it lives on a GPU that Triton has, or the interpreter is on."""
    return _has_triton() and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _check_dtype(name: str, tensor: torch.Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in wanted:
        raise ValueError(f"{name} must be one of {wanted}, got {tensor.dtype}")


def _check_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def _expert_order(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of (T, top_k) in expert order, those of no expert last, and each expert's first (E + 1,); no host sync."""
    expert = top_k_index.reshape(-1)
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    expert, order = torch.sort(expert, stable=True)
    bounds = torch.arange(num_experts + 1, dtype=expert.dtype, device=expert.device)
    return order, torch.searchsorted(expert, bounds)


def _energy(
    x: torch.Tensor,
    offsets: torch.Tensor,
    gates: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    both: bool = False,
) -> torch.Tensor:
    """(S, E, K), S = 2 with `both`."""
    if not use_triton(x):
        return reference.column_energy(x, offsets, gates, order, top_k, both)
    from . import energy

    if x.stride(-1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):
        return energy.column_energy(x, offsets, gates, order, top_k, both)


@torch.library.custom_op("moesparse::column_energy", mutates_args=())
def _column_energy_op(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None, num_experts: int
) -> torch.Tensor:
    order, offsets = _expert_order(top_k_index, num_experts)
    gates = None if top_k_weights is None else top_k_weights.reshape(-1).contiguous()
    return _energy(x, offsets, gates, order, top_k_index.shape[1])[0]


@_column_energy_op.register_fake
def _(x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    return x.new_empty(num_experts, x.shape[1], dtype=torch.float64)


@torch.library.custom_op("moesparse::column_energy_sorted", mutates_args=())
def _column_energy_sorted_op(x: torch.Tensor, offsets: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    # a bad offset must not read outside x, and looking at it here would wait for the device
    offsets = offsets.clamp(0, x.shape[0])
    return _energy(x, offsets, None if gates is None else gates.contiguous(), None, 1)[0]


@_column_energy_sorted_op.register_fake
def _(x: torch.Tensor, offsets: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], dtype=torch.float64)


@torch.library.custom_op("moesparse::column_energies", mutates_args=())
def _column_energies_op(
    x: torch.Tensor, offsets: torch.Tensor, gates: torch.Tensor, order: torch.Tensor | None
) -> torch.Tensor:
    # as in column_energy_sorted; a bad row must not read outside x either
    rows = x.shape[0] if order is None else order.shape[0]
    order = None if order is None else order.clamp(0, x.shape[0] - 1)
    return _energy(x, offsets.clamp(0, rows), gates.contiguous(), order, 1, both=True)


@_column_energies_op.register_fake
def _(x: torch.Tensor, offsets: torch.Tensor, gates: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(2, offsets.shape[0] - 1, x.shape[1], dtype=torch.float64)


def column_energy(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None, num_experts: int
) -> torch.Tensor:
    """Per expert and column, the sum of (g * x)^2 over the tokens routed to the expert.

    The square root is the column scale of MoE-Pruner (Xie et al. 2024, arXiv 2410.12013, eq. 9), or without gates that
    of Wanda (Sun et al. 2023, arXiv 2306.11695) on routed tokens. One pass, deterministic. The product g * x and its
    square are fp32; sums are compensated fp32 over chunks of an expert's rows and fp64 across them.

    Args:
        x: (T, K) bf16, fp16 or fp32: the input of the experts, any strides.
        top_k_index: (T, top_k) int32 or int64 expert of each slot; an id outside 0..num_experts-1 drops the slot.
        top_k_weights: (T, top_k) gate of each slot, bf16, fp16 or fp32; None for g = 1.
        num_experts: E.

    Returns:
        (E, K) fp64, zero for an expert without tokens.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_dtype("x", x, _DTYPES)
    _check_dtype("top_k_index", top_k_index, (torch.int32, torch.int64))
    if x.dim() != 2:
        raise ValueError(f"x must be (T, K), got shape {tuple(x.shape)}")
    if top_k_index.dim() != 2 or top_k_index.shape[0] != x.shape[0]:
        raise ValueError(f"top_k_index must be (T={x.shape[0]}, top_k), got shape {tuple(top_k_index.shape)}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be positive, got {num_experts}")
    _check_device("top_k_index", top_k_index, "x", x)
    if top_k_weights is not None:
        _check_dtype("top_k_weights", top_k_weights, _DTYPES)
        if top_k_weights.shape != top_k_index.shape:
            raise ValueError(
                f"top_k_weights must have the shape of top_k_index, {tuple(top_k_index.shape)}, "
                f"got {tuple(top_k_weights.shape)}"
            )
        _check_device("top_k_weights", top_k_weights, "x", x)
    return _column_energy_op(x, top_k_index, top_k_weights, num_experts)


def column_energy_sorted(x: torch.Tensor, offsets: torch.Tensor, gates: torch.Tensor | None = None) -> torch.Tensor:
    """`column_energy` of rows that are in expert order already, such as the inputs of down_proj.

    Args:
        x: (R, K) bf16, fp16 or fp32, any strides.
        offsets: (E + 1,) int32 or int64, ascending: expert e has the rows offsets[e]..offsets[e + 1]. Rows outside
            offsets[0]..offsets[E] count for no expert.
        gates: (R,) gate of each row, bf16, fp16 or fp32; None for g = 1.

    Returns:
        (E, K) fp64, zero for an expert without rows.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_dtype("x", x, _DTYPES)
    _check_dtype("offsets", offsets, (torch.int32, torch.int64))
    if x.dim() != 2:
        raise ValueError(f"x must be (R, K), got shape {tuple(x.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be (E + 1,) with E >= 1, got shape {tuple(offsets.shape)}")
    _check_device("offsets", offsets, "x", x)
    if gates is not None:
        _check_dtype("gates", gates, _DTYPES)
        if tuple(gates.shape) != (x.shape[0],):
            raise ValueError(f"gates must be (R={x.shape[0]},), got shape {tuple(gates.shape)}")
        _check_device("gates", gates, "x", x)
    return _column_energy_sorted_op(x, offsets, gates)


def column_energies(
    x: torch.Tensor, offsets: torch.Tensor, gates: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """`column_energy_sorted` without gates and with them, for one read of x.

    Args:
        x: (R, K) bf16, fp16 or fp32, any strides; with `order` (T, K), whose rows are not moved.
        offsets: (E + 1,) int32 or int64, ascending: expert e has the rows offsets[e]..offsets[e + 1].
        gates: (R,) gate of each row, bf16, fp16 or fp32.
        order: (R,) int32 or int64, the row of x that each row is; None where they are in expert order.

    Returns:
        (2, E, K) fp64: the sums of x^2 and of (g * x)^2, zero for an expert without rows.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_dtype("x", x, _DTYPES)
    _check_dtype("offsets", offsets, (torch.int32, torch.int64))
    _check_dtype("gates", gates, _DTYPES)
    if x.dim() != 2:
        raise ValueError(f"x must be (R, K), got shape {tuple(x.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must be (E + 1,) with E >= 1, got shape {tuple(offsets.shape)}")
    rows = x.shape[0]
    if order is not None:
        _check_dtype("order", order, (torch.int32, torch.int64))
        if order.dim() != 1:
            raise ValueError(f"order must be (R,), got shape {tuple(order.shape)}")
        _check_device("order", order, "x", x)
        rows = order.shape[0]
    if tuple(gates.shape) != (rows,):
        raise ValueError(f"gates must be (R={rows},), got shape {tuple(gates.shape)}")
    _check_device("offsets", offsets, "x", x)
    _check_device("gates", gates, "x", x)
    return _column_energies_op(x, offsets, gates, order)


def _weight_and_scale(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked views: weight (E, N, K) and scale (E, K), contiguous."""
    _check_dtype("weight", weight, _DTYPES)
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight must be (E, N, K) or (N, K), got shape {tuple(weight.shape)}")
    _check_dtype("scale", scale, (torch.float32,))
    E, K = (weight.shape[0] if weight.dim() == 3 else 1), weight.shape[-1]
    if tuple(scale.shape) != (K,) and (weight.dim() == 2 or tuple(scale.shape) != (E, K)):
        wanted = f"(E={E}, K={K}) or (K={K},)" if weight.dim() == 3 else f"(K={K},)"
        raise ValueError(f"scale must be {wanted}, got shape {tuple(scale.shape)}")
    _check_device("scale", scale, "weight", weight)
    weight = weight if weight.dim() == 3 else weight.unsqueeze(0)
    return weight.contiguous(), scale.expand(E, K).contiguous()


@torch.library.custom_op("moesparse::nm_prune", mutates_args=())
def _nm_prune_op(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> torch.Tensor:
    if not use_triton(weight):
        return reference.nm_prune(weight, scale, n, m)
    from . import select

    with torch.cuda.device_of(weight):
        return select.nm_prune(weight, scale, n, m)


@_nm_prune_op.register_fake
def _(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> torch.Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("moesparse::nm_prune_packed", mutates_args=())
def _nm_prune_packed_op(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_triton(weight):
        return reference.nm_prune_packed(weight, scale, n, m)
    from . import select

    with torch.cuda.device_of(weight):
        return select.nm_prune_packed(weight, scale, n, m)


@_nm_prune_packed_op.register_fake
def _(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    E, N, K = weight.shape
    return weight.new_empty(E, N, K // m * n), weight.new_empty(E, N, K // 8, dtype=torch.uint8)


@overload
def nm_prune(
    weight: torch.Tensor, scale: torch.Tensor, n: int = 2, m: int = 4, packed: Literal[False] = False
) -> torch.Tensor: ...


@overload
def nm_prune(
    weight: torch.Tensor, scale: torch.Tensor, n: int = 2, m: int = 4, *, packed: Literal[True]
) -> NMWeight: ...


def nm_prune(
    weight: torch.Tensor, scale: torch.Tensor, n: int = 2, m: int = 4, packed: bool = False
) -> torch.Tensor | NMWeight:
    """Keep the n largest |weight| * scale of every m neighbouring columns; one read of the weight.

    The product is fp32. Equal scores go to the lower column, so a group of zeros keeps its first n. A NaN score is an
    error where finding it costs no wait for the device, that is in plain torch; the kernels rank NaN highest instead,
    so that a NaN weight stays visible in the result and every group keeps exactly n. Check `scale` where it is made.

    Args:
        weight: (E, N, K) or (N, K) bf16, fp16 or fp32; K a multiple of m, and of 8 when packed. Copied when not
            contiguous.
        scale: (E, K) or (K,) fp32, >= 0: scale of each column, per expert or the same for all. Its sign is ignored.
        n: weights kept in each group; 2:4 and 4:8 are the fast patterns.
        m: columns in a group: 4, 8, 16 or 32.
        packed: return the packed weight and never write the dense one.

    Returns:
        The shape and dtype of weight, +0.0 where pruned; packed: an NMWeight in "row" order, E = 1 for (N, K).

    Raises:
        ValueError: a shape, dtype, device or pattern does not fit, or (plain torch) a score is NaN.
    """
    if m not in GROUP_SIZES:
        raise ValueError(f"m must be one of {GROUP_SIZES}, got {m}")
    if not 0 < n <= m:
        raise ValueError(f"n must lie in 1..m={m}, got {n}")
    experts, scales = _weight_and_scale(weight, scale)
    step = math.lcm(m, 8) if packed else m
    if weight.shape[-1] % step:
        raise ValueError(f"K must be a multiple of {step} for {n}:{m}, got {weight.shape[-1]}")
    if not packed:
        return _nm_prune_op(experts, scales, n, m).view(weight.shape)
    values, index = _nm_prune_packed_op(experts, scales, n, m)
    E, N, K = experts.shape
    return NMWeight(values, index, (E, N, K), n, m, "row", weight.dtype)


@torch.library.custom_op("moesparse::row_topk", mutates_args=())
def _row_topk_op(weight: torch.Tensor, scale: torch.Tensor, keep: int) -> torch.Tensor:
    if not use_triton(weight):
        return reference.row_topk(weight, scale, keep)
    from . import threshold

    if weight.shape[-1] > threshold.MAX_COLUMNS:
        return reference.row_topk(weight, scale, keep)
    with torch.cuda.device_of(weight):
        return threshold.row_topk(weight, scale, keep)


@_row_topk_op.register_fake
def _(weight: torch.Tensor, scale: torch.Tensor, keep: int) -> torch.Tensor:
    return torch.empty_like(weight)


def row_topk(weight: torch.Tensor, scale: torch.Tensor, keep: int) -> torch.Tensor:
    """Keep the `keep` largest |weight| * scale of every row, exactly, without a sort.

    The product is fp32; equal scores go to the lower column. NaN scores are treated as in `nm_prune`. The kernel
    holds a row of up to 16,384 columns in registers; longer rows take plain torch (`kthvalue`) on the weight's device.

    Args:
        weight: (E, N, K) or (N, K) bf16, fp16 or fp32. Copied when not contiguous.
        scale: (E, K) or (K,) fp32, >= 0: scale of each column, per expert or the same for all. Its sign is ignored.
        keep: weights kept in each row, 0 <= keep <= K.

    Returns:
        The shape and dtype of weight, +0.0 where pruned.

    Raises:
        ValueError: a shape, dtype, device or keep does not fit, or (plain torch) a score is NaN.
    """
    experts, scales = _weight_and_scale(weight, scale)
    if not 0 <= keep <= weight.shape[-1]:
        raise ValueError(f"keep must lie in 0..K={weight.shape[-1]}, got {keep}")
    return _row_topk_op(experts, scales, keep).view(weight.shape)


def _sorted_slots(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> torch.Tensor:
    """The tensors of a `Routing` one after the other, (sum of `routing_sizes`,) int32."""
    if use_triton(top_k_index):
        from .routing import sort_slots

        return sort_slots(top_k_index, num_experts, block_m)
    routing = route_torch(top_k_index, num_experts, block_m)
    tensors = (routing.slot_of, routing.row_of, routing.offsets, routing.block_expert, routing.block_row)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def route_inside(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """`route` for the body of another op: arguments that were checked, and no second op around the same work."""
    return Routing.split(_sorted_slots(top_k_index, num_experts, block_m), top_k_index.shape, num_experts, block_m)


@torch.library.custom_op("moesparse::route", mutates_args=())
def _route_op(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> torch.Tensor:
    with torch.cuda.device_of(top_k_index):
        return _sorted_slots(top_k_index, num_experts, block_m)


@_route_op.register_fake
def _(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> torch.Tensor:
    sizes = routing_sizes(top_k_index.numel(), num_experts, block_m)
    return top_k_index.new_empty(sum(sizes), dtype=torch.int32)


def route(top_k_index: torch.Tensor, num_experts: int, block_m: int = 64) -> Routing:
    """Sort the slots of a batch by expert and cut each expert's rows into blocks, without waiting for the device.

    A slot is a token's choice, token * top_k + choice. The sort is stable and has no atomics: the same input gives the
    same rows. What depends on the data has the size of its upper bound, so a CUDA graph can hold the call.

    Args:
        top_k_index: (T, top_k) int32 or int64, the experts of each token; an id outside 0..num_experts-1 drops the
            slot. Copied when not contiguous.
        num_experts: E.
        block_m: rows in a block of the schedule.

    Returns:
        `Routing`: int32 slot of every row, row of every slot, first row of every expert, and the blocks.

    Raises:
        ValueError: a shape, dtype or size does not fit.
    """
    _check_dtype("top_k_index", top_k_index, (torch.int32, torch.int64))
    if top_k_index.dim() != 2:
        raise ValueError(f"top_k_index must be (T, top_k), got shape {tuple(top_k_index.shape)}")
    for name, size in (("num_experts", num_experts), ("block_m", block_m)):
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    buffer = _route_op(top_k_index.contiguous(), num_experts, block_m)
    return Routing.split(buffer, top_k_index.shape, num_experts, block_m)
