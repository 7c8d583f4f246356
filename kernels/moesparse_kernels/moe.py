"""The expert layer of a mixture of experts, on packed n:m weights and on dense ones.

    h[r] = act(gate) * up,   [gate | up] = x[token(r)] @ gate_up[e(r)].T + gate_up_bias[e(r)]
    y[t] = sum_k top_k_weights[t, k] * (h[row(t, k)] @ down[e].T + down_bias[e])

Numerics of every backend but "reference" and "semi_structured": products accumulate in fp32; bias and activation are
fp32; h is rounded once to the dtype of x; gates are applied and summed in fp32; y is rounded once. A row of the down
projection is rounded to the dtype of x before the gate, unless its reduction was split, when it stays fp32.
"native" never rounds such a row. "reference", "semi_structured" and "grouped_mm" also round [gate | up], as torch's
matrix products return it. No atomics anywhere: the same input gives the same bits.

The functions check arguments and call a torch op each (`torch.ops.moesparse.*`), so that
torch.compile(fullgraph=True), torch.export and fake tensors see one node; ops take the tensors of an `NMWeight`
apart and put them together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .define_op import define_op
from .dispatch import (
    DENSE_BACKENDS,
    NM_BACKENDS,
    choose_dense_backend,
    choose_nm_backend,
    experts_for_torch,
    rows_for_native,
)
from .layout import NMWeight
from .moe_checks import Activation, check_choice, check_layer
from .moe_native import down_native, layer_native, up_native
from .moe_reference import activate_torch, down_reference, up_reference
from .ops import route_inside
from .schedule import Routings
from .unpack import unpack

__all__ = ["moe_dense", "moe_nm"]


def moe_nm(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: NMWeight,
    down: NMWeight,
    *,
    activation: Activation = "silu",
    gated: bool = True,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Run the experts of one layer on packed n:m weights.

    Args:
        x: (T, H) tokens; bf16 or fp16, fp32 with the "native" and the "reference" backend.
        top_k_index: (T, top_k) int32 or int64, the experts of each token. Ids outside 0..E-1 are dropped.
        top_k_weights: (T, top_k), any float dtype: the gates, used as they are.
        gate_up: (E, 2 * I, H), gate rows then up rows; (E, I, H) when not gated. Dtype of x.
        down: (E, H, I), dtype of x.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" or "none", fused into the first GEMM; "swigluoai",
            gpt-oss's: gate and up in alternating rows, (clamp(up) + 1) * gate * sigmoid(1.702 * gate) with gate clamped
            to at most 7 and up to -7..7, fused by "native" alone; or a function from the (R, 2 * I) first projection to
            (R, I), for gates of another form. Rows of dropped slots hold anything.
        gated: multiply the activated gate by up. Not looked at when `activation` is a function.
        gate_up_bias: (E, 2 * I) or (E, I), or None.
        down_bias: (E, H) or None.
        backend: "auto" chooses by rows per expert, shape, dtype and device (dispatch.py). "native", the compiled
            kernels, wants a CPU and row order; "mma_sp" (NVIDIA, sm_80 and newer) and "triton" want 2:4 weights in
            "mma_sp" and in "fragment" order, as "auto" does on a GPU; "semi_structured" wants 2:4 on an NVIDIA GPU, and
            waits for the device; "unpack" and "reference" run any pattern. "reference" waits for the device on a GPU.

    Returns:
        (T, H), dtype of x. No gradient: call under torch.no_grad().

    Raises:
        ValueError: shapes, dtypes or devices do not fit, x requires grad, or a forced backend cannot run.
    """
    check_choice("backend", backend, NM_BACKENDS)
    x, top_k_index, top_k_weights = check_layer(
        x, top_k_index, top_k_weights, gate_up, down, activation, gated, gate_up_bias, down_bias
    )
    gate_up_parts = (gate_up.values, gate_up.index, [*gate_up.shape, gate_up.n, gate_up.m], gate_up.order)
    down_parts = (down.values, down.index, [*down.shape, down.n, down.m], down.order)
    ops = torch.ops.moesparse
    if isinstance(activation, str):
        return ops.moe_nm(
            x,
            top_k_index,
            top_k_weights,
            *gate_up_parts,
            *down_parts,
            gate_up_bias,
            down_bias,
            activation,
            gated,
            backend,
        )
    rows = ops.moe_nm_up(x, top_k_index, *gate_up_parts, gate_up_bias, backend)
    return ops.moe_nm_down(
        _apply(activation, rows, down.shape[2]), top_k_index, top_k_weights, *down_parts, down_bias, backend
    )


def moe_dense(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: Activation = "silu",
    gated: bool = True,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Run the experts of one layer on dense weights: `moe_nm` with tensors in place of packed weights.

    Args:
        gate_up: (E, 2 * I, H), gate rows then up rows; (E, I, H) when not gated. Last dim contiguous.
        down: (E, H, I), last dim contiguous.
        backend: "auto", "native" (a CPU), "triton", "grouped_mm" (bf16, torch's grouped GEMM) or "reference".

    The other arguments, the result and the errors are those of `moe_nm`.
    """
    check_choice("backend", backend, DENSE_BACKENDS)
    x, top_k_index, top_k_weights = check_layer(
        x, top_k_index, top_k_weights, gate_up, down, activation, gated, gate_up_bias, down_bias
    )
    ops = torch.ops.moesparse
    if isinstance(activation, str):
        return ops.moe_dense(
            x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias, activation, gated, backend
        )
    rows = ops.moe_dense_up(x, top_k_index, gate_up, gate_up_bias, backend)
    return ops.moe_dense_down(
        _apply(activation, rows, down.shape[2]), top_k_index, top_k_weights, down, down_bias, backend
    )


def _apply(activation: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, intermediate: int) -> torch.Tensor:
    hidden = activation(rows)
    if hidden.shape != (rows.shape[0], intermediate) or hidden.dtype != rows.dtype:
        raise ValueError(
            f"activation must return {rows.dtype} of shape {(rows.shape[0], intermediate)}, "
            f"got {hidden.dtype} of shape {tuple(hidden.shape)}"
        )
    return hidden.contiguous()


def _rebuild(
    values: torch.Tensor, index: torch.Tensor, layout: Sequence[int], order: str, dtype: torch.dtype
) -> NMWeight:
    E, N, K, n, m = layout
    return NMWeight(values=values, index=index, shape=(E, N, K), n=n, m=m, order=order, dtype=dtype)


def _chosen(backend: str, weight: NMWeight | torch.Tensor, rows: int, hidden: int, intermediate: int) -> str:
    """The backend that will run."""
    if isinstance(weight, NMWeight):
        return choose_nm_backend(backend, weight, rows, hidden, intermediate)
    return choose_dense_backend(backend, weight, rows)


def _choose(
    backend: str, weight: NMWeight | torch.Tensor, rows: int, hidden: int, intermediate: int
) -> tuple[str, NMWeight | torch.Tensor]:
    """The backend that will run, and the weight it runs on: dense where the choice is to unpack."""
    chosen = _chosen(backend, weight, rows, hidden, intermediate)
    if chosen == "unpack" and isinstance(weight, NMWeight):
        weight = unpack(weight)
        chosen = choose_dense_backend("auto", weight, rows)
    return chosen, weight


def _up(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    backend: str,
    routings: Routings,
) -> torch.Tensor:
    """(T, H) -> (R, I) when gated, else (R, N), expert-sorted."""
    _, N, H = weight.shape
    chosen, weight = _choose(backend, weight, top_k_index.numel(), H, N // 2 if gated else N)
    if chosen == "native":
        return activate_torch(up_native(x, top_k_index, weight, bias), activation, gated)
    if chosen == "reference":
        return up_reference(x, routings.rows(), weight, bias, activation, gated)
    # here, because a machine that only ever takes the reference needs no triton
    from .moe_gpu import up_gpu

    return up_gpu(x, top_k_index, weight, bias, activation, gated, chosen, routings, warm=backend == "auto")


def _down(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
    backend: str,
    routings: Routings,
) -> torch.Tensor:
    """(R, I), expert-sorted -> (T, H)."""
    _, H, K = weight.shape
    chosen, weight = _choose(backend, weight, top_k_index.numel(), H, K)
    if chosen == "native":
        return down_native(rows, top_k_index, top_k_weights, weight, bias)
    if chosen == "reference":
        return down_reference(rows, routings.rows(), top_k_weights, weight, bias)
    from .moe_gpu import down_gpu

    return down_gpu(rows, top_k_index, top_k_weights, weight, bias, chosen, routings, warm=backend == "auto")


def _layer(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: NMWeight | torch.Tensor,
    down: NMWeight | torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    backend: str,
) -> torch.Tensor:
    """(T, H) -> (T, H): both projections on one routing, or on none."""
    _, H, I = down.shape
    weights = (gate_up, down, gate_up_bias, down_bias, activation, gated)
    most = min(rows_for_native(gate_up), rows_for_native(down)) if backend == "auto" else 0
    if most:
        return _layer_by_experts(x, top_k_index, top_k_weights, *weights, most=most)
    if x.device.type == "cpu" and all(
        _choose(backend, weight, top_k_index.numel(), H, I)[0] == "native" for weight in (gate_up, down)
    ):
        return layer_native(x, top_k_index, top_k_weights, *weights)
    with torch.cuda.device_of(x):
        rows = top_k_index.numel()
        if activation != "swigluoai" and all(_chosen(backend, one, rows, H, I) == "triton" for one in (gate_up, down)):
            from .moe_gpu import has_few_slots, layer_of_few_slots

            if has_few_slots(gate_up, top_k_index, gated):
                return layer_of_few_slots(x, top_k_index, top_k_weights, *weights)
        routings = Routings(top_k_index, gate_up.shape[0], route_inside)
        if activation == "swigluoai":
            # no other backend fuses it
            projected = _up(x, top_k_index, gate_up, gate_up_bias, "none", False, backend, routings)
            hidden = activate_torch(projected, activation, gated)
        else:
            hidden = _up(x, top_k_index, gate_up, gate_up_bias, activation, gated, backend, routings)
        return _down(hidden, top_k_index, top_k_weights, down, down_bias, backend, routings)


def _layer_by_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: NMWeight | torch.Tensor,
    down: NMWeight | torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    most: float,
) -> torch.Tensor:
    """(T, H) -> (T, H) on a CPU: experts of more than `most` rows by torch's products, the others by the compiled
    kernels."""
    weights = (gate_up, down, gate_up_bias, down_bias, activation, gated)
    E = gate_up.shape[0]
    many = experts_for_torch(top_k_index, E, most)
    if many is None:
        return layer_native(x, top_k_index, top_k_weights, *weights)
    by_torch = many[top_k_index.clamp(0, E - 1)]
    light, rest = top_k_index.masked_fill(by_torch, -1), top_k_index.masked_fill(~by_torch, -1)
    # fp32 until all experts are added
    out = None
    if bool(((light >= 0) & (light < E)).any()):
        out = layer_native(x, light, top_k_weights, *weights, out_dtype=torch.float32)
    routing = Routings(rest, E, route_inside).rows()
    fused = activation != "swigluoai"
    rows = up_reference(x, routing, gate_up, gate_up_bias, activation if fused else "none", gated and fused)
    hidden = rows if fused else activate_torch(rows, activation, gated)
    return down_reference(hidden, routing, top_k_weights, down, down_bias, add_to=out)


def _up_alone(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """(T, H) -> (R, N), expert-sorted, without an activation."""
    with torch.cuda.device_of(x):
        routings = Routings(top_k_index, weight.shape[0], route_inside)
        return _up(x, top_k_index, weight, bias, "none", False, backend, routings)


def _down_alone(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """(R, I), expert-sorted -> (T, H)."""
    with torch.cuda.device_of(rows):
        routings = Routings(top_k_index, weight.shape[0], route_inside)
        return _down(rows, top_k_index, top_k_weights, weight, bias, backend, routings)


# an op takes tensors, numbers and strings: a packed weight travels as its values, index, (E, N, K, n, m) and order


@define_op("moe_nm")
def _moe_nm(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_values: torch.Tensor,
    gate_up_index: torch.Tensor,
    gate_up_layout: Sequence[int],
    gate_up_order: str,
    down_values: torch.Tensor,
    down_index: torch.Tensor,
    down_layout: Sequence[int],
    down_order: str,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    backend: str,
) -> torch.Tensor:
    gate_up = _rebuild(gate_up_values, gate_up_index, gate_up_layout, gate_up_order, x.dtype)
    down = _rebuild(down_values, down_index, down_layout, down_order, x.dtype)
    return _layer(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias, activation, gated, backend)


@define_op("moe_nm_up")
def _moe_nm_up(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    layout: Sequence[int],
    order: str,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    return _up_alone(x, top_k_index, _rebuild(values, index, layout, order, x.dtype), bias, backend)


@define_op("moe_nm_down")
def _moe_nm_down(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    layout: Sequence[int],
    order: str,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    weight = _rebuild(values, index, layout, order, rows.dtype)
    return _down_alone(rows, top_k_index, top_k_weights, weight, bias, backend)


@define_op("moe_dense")
def _moe_dense(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    backend: str,
) -> torch.Tensor:
    return _layer(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias, down_bias, activation, gated, backend)


@define_op("moe_dense_up")
def _moe_dense_up(
    x: torch.Tensor, top_k_index: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str
) -> torch.Tensor:
    return _up_alone(x, top_k_index, weight, bias, backend)


@define_op("moe_dense_down")
def _moe_dense_down(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    return _down_alone(rows, top_k_index, top_k_weights, weight, bias, backend)


@torch.library.register_fake("moesparse::moe_nm")
@torch.library.register_fake("moesparse::moe_dense")
def _layer_fake(x: torch.Tensor, top_k_index: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("moesparse::moe_nm_up")
def _nm_up_fake(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    layout: Sequence[int],
    *_: Any,
) -> torch.Tensor:
    return x.new_empty(top_k_index.numel(), layout[1])


@torch.library.register_fake("moesparse::moe_nm_down")
def _nm_down_fake(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    layout: Sequence[int],
    *_: Any,
) -> torch.Tensor:
    return rows.new_empty(top_k_index.shape[0], layout[1])


@torch.library.register_fake("moesparse::moe_dense_up")
def _dense_up_fake(x: torch.Tensor, top_k_index: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(top_k_index.numel(), weight.shape[1])


@torch.library.register_fake("moesparse::moe_dense_down")
def _dense_down_fake(
    rows: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, weight: torch.Tensor, *_: Any
) -> torch.Tensor:
    return rows.new_empty(top_k_index.shape[0], weight.shape[1])
