"""The expert layer in plain torch: the CPU path, and what the kernels are compared with.

One expert at a time, and only experts that have rows: a packed or quantised weight is unpacked into a scratch the size
of one dense expert, so the memory in use stays near the packed size. Matrix products are torch's (fp32 accumulation,
result in the dtype of x); activation, gates and the sum over a token's experts are fp32.

On a GPU this waits for the device, to learn how many rows each expert has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .quantised import AnyWeight
from .schedule import Routing

__all__ = ["ACTIVATIONS", "activate_torch", "down_reference", "up_reference"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


ACTIVATIONS = (*_ACTIVATIONS, "swigluoai")


def _swigluoai(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def activate_torch(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """act(gate) * up of x = [gate | up], or act(x) when not gated; fp32, rounded once to the dtype of x.

    "swigluoai" is gpt-oss's own: gate and up in alternating columns, clamped, and computed in the dtype of x as
    transformers does.
    """
    if activation == "swigluoai":
        return _swigluoai(x)
    function = _ACTIVATIONS[activation]
    if not gated:
        return x if activation == "none" else function(x.float()).to(x.dtype)
    gate, up = x.chunk(2, dim=-1)
    return function(gate.float()).mul_(up).to(x.dtype)


def _experts_with_rows(weight: AnyWeight, offsets: torch.Tensor, rows: int) -> list[tuple[slice, int]]:
    if rows == 0:
        return []
    bounds = offsets.tolist()
    return [(slice(bounds[e], bounds[e + 1]), e) for e in range(weight.shape[0]) if bounds[e] < bounds[e + 1]]


def _dense_expert(weight: AnyWeight, expert: int, scratch: torch.Tensor | None) -> torch.Tensor:
    return weight[expert] if isinstance(weight, torch.Tensor) else weight.unpack_expert(expert, out=scratch)


def _scratch(weight: AnyWeight, dtype: torch.dtype) -> torch.Tensor | None:
    if isinstance(weight, torch.Tensor):
        return None
    return torch.empty(weight.shape[1:], dtype=dtype, device=weight.device)


def up_reference(
    x: torch.Tensor,
    routing: Routing,
    weight: AnyWeight,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """First projection and activation of every row.

    Args:
        x: (T, H).
        routing: from `route`, any block_m.
        weight: (E, N, H), packed, quantised or dense; N = 2 * I, [gate; up], when gated.
        bias: (E, N) or None.
        activation: one of ACTIVATIONS.
        gated: multiply the activated first half by the second.

    Returns:
        (R, I) when gated, else (R, N), expert-sorted. Rows of dropped slots are not written.
    """
    R, top_k = routing.slot_of.numel(), routing.row_of.shape[1]
    out = torch.empty(R, weight.shape[1] // (2 if gated else 1), dtype=x.dtype, device=x.device)
    scratch = _scratch(weight, x.dtype)
    for rows, expert in _experts_with_rows(weight, routing.offsets, R):
        token = torch.div(routing.slot_of[rows], top_k, rounding_mode="floor")
        projected = F.linear(
            x.index_select(0, token), _dense_expert(weight, expert, scratch), None if bias is None else bias[expert]
        )
        out[rows] = activate_torch(projected, activation, gated)
    return out


def down_reference(
    rows: torch.Tensor,
    routing: Routing,
    top_k_weights: torch.Tensor,
    weight: AnyWeight,
    bias: torch.Tensor | None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """Second projection, gates, and the sum over each token's experts.

    Args:
        rows: (R, I), expert-sorted.
        routing: from `route`, any block_m.
        top_k_weights: (T, top_k), any float dtype.
        weight: (E, H, I), packed, quantised or dense.
        bias: (E, H) or None.
        add_to: (T, H) fp32, to which the sum is added; None for zeros.

    Returns:
        (T, H) in the dtype of rows; the sum is fp32 and rounded once.
    """
    T, top_k = routing.row_of.shape
    out = torch.zeros(T, weight.shape[1], dtype=torch.float32, device=rows.device) if add_to is None else add_to
    gates = top_k_weights.reshape(-1)
    scratch = _scratch(weight, rows.dtype)
    for span, expert in _experts_with_rows(weight, routing.offsets, rows.shape[0]):
        dense = _dense_expert(weight, expert, scratch)
        projected = F.linear(rows[span], dense, None if bias is None else bias[expert])
        slot = routing.slot_of[span]
        weighted = projected.float().mul_(gates.index_select(0, slot).float().unsqueeze(-1))
        out.index_add_(0, torch.div(slot, top_k, rounding_mode="floor"), weighted)
    return out.to(rows.dtype)
