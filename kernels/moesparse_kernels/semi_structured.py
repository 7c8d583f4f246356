"""2:4 experts through torch's semi-structured GEMMs (cuSPARSELt, or CUTLASS where that is missing). NVIDIA GPUs only.

These run the sparse tensor cores, so they can beat a dense GEMM when an expert has many rows; with few rows the
library's set-up of every call costs more than the product. They take one 2-D weight at a time and the number of rows
on the host, so a call waits for the device and cannot be captured in a CUDA graph.

The library has its own compressed form. It is made from the packed weight at first use and kept as long as the
weight lives: this backend needs the packed experts twice over.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from .layout import NMWeight
from .moe_reference import activate_torch
from .schedule import Routing

__all__ = ["compressed_experts", "down_semi_structured", "linear", "reason_unavailable", "up_semi_structured"]

# compressed experts, by the tensor that holds the packed values
_COMPRESSED: WeakIdKeyDictionary = WeakIdKeyDictionary()
# algorithm found for (rows of the weight, columns, rows of x rounded up, dtype, device)
_ALGORITHMS: dict[tuple[int, int, int, torch.dtype, torch.device], int] = {}

# smallest sizes the libraries take, in rows and columns of the sparse operand
_MIN_ROWS, _MIN_COLUMNS = 32, 64


@cache
def _has_cusparselt() -> bool:
    backend = getattr(torch.backends, "cusparselt", None)
    return backend is not None and backend.is_available()


def reason_unavailable(weight: NMWeight) -> str | None:
    """Why this backend cannot run a weight, or None when it can."""
    if not hasattr(torch.sparse, "to_sparse_semi_structured"):
        return "this torch has no torch.sparse.to_sparse_semi_structured"
    if weight.values.device.type != "cuda" or torch.version.hip:
        return f"it runs on NVIDIA GPUs only and the weight is on {weight.values.device}"
    if (weight.n, weight.m) != (2, 4) or weight.dtype.itemsize != 2:
        return f"it takes 2:4 weights of 16 bits and this one is {weight.n}:{weight.m} {weight.dtype}"
    _, N, K = weight.shape
    if N % _MIN_ROWS or K % _MIN_COLUMNS:
        return f"it needs rows by {_MIN_ROWS} and columns by {_MIN_COLUMNS} and the weight is {N} x {K}"
    return None


def compressed_experts(weight: NMWeight) -> list[torch.Tensor]:
    """Every expert (N, K) in the library's own form, made at first use and kept as long as the weight lives."""
    experts = _COMPRESSED.get(weight.values)
    if experts is None:
        experts = [torch.sparse.to_sparse_semi_structured(weight.unpack_expert(e)) for e in range(weight.shape[0])]
        _COMPRESSED[weight.values] = experts
    return experts


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear with the fastest algorithm for the size, searched the first time it is seen."""
    if _has_cusparselt() and hasattr(weight, "alg_id_cusparselt") and hasattr(torch, "_cslt_sparse_mm_search"):
        # the search is worth sharing between neighbouring row counts; powers of two keep the table small
        bucket = 1 << max(3, (x.shape[0] - 1).bit_length())
        key = (weight.shape[0], weight.shape[1], bucket, x.dtype, x.device)
        if key not in _ALGORITHMS:
            sample = torch.zeros(bucket, x.shape[1], dtype=x.dtype, device=x.device)
            packed = weight.packed  # type: ignore[attr-defined]
            _ALGORITHMS[key] = int(torch._cslt_sparse_mm_search(packed, sample.t()))
        weight.alg_id_cusparselt = _ALGORITHMS[key]
    return F.linear(x, weight, bias)


def up_semi_structured(
    x: torch.Tensor,
    routing: Routing,
    weight: NMWeight,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """`moe_reference.up_reference` on sparse tensor cores; same arguments and result."""
    experts, top_k = compressed_experts(weight), routing.row_of.shape[1]
    out = torch.empty(routing.slot_of.numel(), weight.shape[1] // (2 if gated else 1), dtype=x.dtype, device=x.device)
    bounds = routing.offsets.tolist()
    gathered = x.index_select(0, torch.div(routing.slot_of[: bounds[-1]], top_k, rounding_mode="floor"))
    for e, expert in enumerate(experts):
        if bounds[e] < bounds[e + 1]:
            rows = slice(bounds[e], bounds[e + 1])
            projected = linear(gathered[rows], expert, None if bias is None else bias[e])
            out[rows] = activate_torch(projected, activation, gated)
    return out


def down_semi_structured(
    rows: torch.Tensor, routing: Routing, weight: NMWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Second projection of every row, (R, I) -> (R, H); gates and sum are `epilogue.combine`'s."""
    experts = compressed_experts(weight)
    out = torch.empty(rows.shape[0], weight.shape[1], dtype=rows.dtype, device=rows.device)
    bounds = routing.offsets.tolist()
    for e, expert in enumerate(experts):
        if bounds[e] < bounds[e + 1]:
            span = slice(bounds[e], bounds[e + 1])
            out[span] = linear(rows[span], expert, None if bias is None else bias[e])
    return out
