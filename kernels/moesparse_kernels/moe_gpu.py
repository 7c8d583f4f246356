"""The two halves of the expert layer on a GPU, for every backend but the reference.

up: rows of the first projection, activated. down: second projection, gates, and the sum over a token's experts.
Nothing here waits for the device except "semi_structured".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cuda.grouped import grouped_mma_sp
from .cuda.plan import block_m_for
from .epilogue import activate_rows, combine
from .grouped_dense import grouped_dense
from .grouped_nm import can_fuse_gate, grouped_nm
from .layout import NMWeight
from .own_slots import MOST_SLOTS
from .schedule import Routing, Routings
from .semi_structured import down_semi_structured, up_semi_structured
from .tuning import GroupedConfig, grouped_config, starts_early

__all__ = ["down_gpu", "has_few_slots", "layer_of_few_slots", "up_gpu"]

# calls that ran "semi_structured" and for which the kernels that a capture of them takes have run too
_WARM: set[tuple[object, ...]] = set()


def _config(op: str, weight: NMWeight | torch.Tensor, rows: int, device: torch.device) -> GroupedConfig:
    E, N, K = weight.shape
    kind = "nm" if isinstance(weight, NMWeight) else "dense"
    return grouped_config(f"{op}_{kind}", rows, E, N, K, weight.dtype, device)


def _triton(
    x: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    routing: Routing | None,
    top_k_index: torch.Tensor,
    config: GroupedConfig,
    **how,
) -> torch.Tensor:
    if isinstance(weight, NMWeight):
        return grouped_nm(x, weight.values, weight.index, weight.shape[1], routing, top_k_index, config, **how)
    return grouped_dense(x, weight, routing, top_k_index, config, **how)


def _grouped(
    op: str,
    x: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    top_k_index: torch.Tensor,
    routings: Routings,
    **how,
) -> tuple[torch.Tensor, Routing]:
    """The grouped GEMM of the weight's own kind, and the routing it was made on."""
    rows = top_k_index.numel()
    if isinstance(weight, NMWeight) and weight.order == "mma_sp":
        routing = routings.blocks(block_m_for(rows, weight.shape[0]))
        return grouped_mma_sp(x, weight, routing, top_k_index, **how), routing
    config = _config(op, weight, rows, x.device)
    routing = routings.blocks(config.block_m)
    return _triton(x, weight, routing, top_k_index, config, **how), routing


def _own(weight: NMWeight) -> str:
    """The backend of the order that a weight is held in."""
    return "mma_sp" if weight.order == "mma_sp" else "triton"


def _launch_sizes(op: str, weight: NMWeight, rows: int) -> GroupedConfig | int:
    """What tells apart the kernels of the weight's order that calls of so many rows take."""
    if weight.order == "mma_sp":
        return block_m_for(rows, weight.shape[0])
    return _config(op, weight, rows, weight.device)


def _is_cold(op: str, weight: NMWeight, top_k_index: torch.Tensor, *how: object) -> bool:
    """Whether the kernels of the weight's order for such a call have not run yet; asked once, they have.

    A CUDA graph cannot hold "semi_structured", which waits for the device, and takes these instead. They would be
    compiled and loaded while the graph is captured, if no call before it had run them.
    """
    sizes = _launch_sizes(op, weight, top_k_index.numel())
    key = (op, weight.shape, weight.dtype, weight.device, top_k_index.shape[1], top_k_index.dtype, sizes, *how)
    cold = key not in _WARM
    _WARM.add(key)
    return cold


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Rows behind the last expert, those of dropped slots, are left alone."""
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=routing.offsets[1:])


def up_gpu(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    backend: str,
    routings: Routings,
    warm: bool = False,
) -> torch.Tensor:
    """`moe_reference.up_reference` by "triton", "mma_sp", "grouped_mm" (dense) or "semi_structured" (packed).

    `warm`: run once what a captured call would take instead of "semi_structured".
    """
    if backend == "semi_structured":
        assert isinstance(weight, NMWeight)
        if warm and _is_cold("up", weight, top_k_index, bias is None, activation, gated):
            up_gpu(x, top_k_index, weight, bias, activation, gated, _own(weight), routings)
        return up_semi_structured(x, routings.rows(), weight, bias, activation, gated)
    if backend == "grouped_mm":
        assert isinstance(weight, torch.Tensor)
        routing = routings.rows()
        token = torch.div(routing.slot_of, top_k_index.shape[1], rounding_mode="floor")
        projected = _grouped_mm(x.index_select(0, token), weight, routing)[None]
        return activate_rows(
            projected, bias, top_k_index, routing.slot_of, routing.offsets, activation, gated, dtype=x.dtype
        )
    how = {"gather": True, "bias": bias, "activation": activation, "gated": gated}
    return _grouped("up", x, weight, top_k_index, routings, **how)[0]


def down_gpu(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: NMWeight | torch.Tensor,
    bias: torch.Tensor | None,
    backend: str,
    routings: Routings,
    warm: bool = False,
) -> torch.Tensor:
    """`moe_reference.down_reference` by the backends of `up_gpu`, and as that."""
    if backend == "semi_structured":
        assert isinstance(weight, NMWeight)
        if warm and _is_cold("down", weight, top_k_index, bias is None, top_k_weights.dtype):
            down_gpu(rows, top_k_index, top_k_weights, weight, bias, _own(weight), routings)
        routing = routings.rows()
        projected, bias = down_semi_structured(rows, routing, weight, bias)[None], None
    elif backend == "grouped_mm":
        assert isinstance(weight, torch.Tensor)
        routing = routings.rows()
        projected = _grouped_mm(rows, weight, routing)[None]
    else:
        projected, routing = _grouped(
            "down", rows, weight, top_k_index, routings, gather=False, bias=bias, keep_splits=True
        )
        # partial sums carry no bias yet
        bias = bias if projected.shape[0] > 1 else None
    return combine(projected, bias, top_k_index, top_k_weights, routing.row_of, rows.dtype)


def has_few_slots(gate_up: NMWeight | torch.Tensor, top_k_index: torch.Tensor, gated: bool) -> bool:
    """Whether "triton" runs a layer by `layer_of_few_slots`."""
    R, (_, N, _) = top_k_index.numel(), gate_up.shape
    if R > MOST_SLOTS or (gated and isinstance(gate_up, NMWeight) and not can_fuse_gate(N)):
        return False
    return _config("up", gate_up, R, top_k_index.device).split_k == 1


def layer_of_few_slots(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: NMWeight | torch.Tensor,
    down: NMWeight | torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """(T, H) -> (T, H) in three launches, the two GEMMs and the combine: no routing comes before them.

    Where `starts_early`, the second and the third may begin while the one before them ends. What the second reads
    before it waits, top_k_index and its weight, was written before the first began, which itself does not begin early.
    """
    configs = [_config(op, weight, top_k_index.numel(), x.device) for op, weight in (("up", gate_up), ("down", down))]
    early = starts_early(x.device)
    how = {"activation": activation, "gated": gated}
    hidden = _triton(x, gate_up, None, top_k_index, configs[0], gather=True, bias=gate_up_bias, first=early, **how)
    projected = _triton(
        hidden, down, None, top_k_index, configs[1], gather=False, bias=down_bias, keep_splits=True, early=early
    )
    bias = down_bias if configs[1].split_k > 1 else None
    return combine(projected, bias, top_k_index, top_k_weights, None, x.dtype, num_experts=down.shape[0], early=early)
