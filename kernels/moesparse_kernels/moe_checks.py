"""What the arguments of an expert layer must be, whatever its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .moe_reference import ACTIVATIONS
from .quantised import AnyWeight, QuantisedWeight

__all__ = ["Activation", "check_choice", "check_layer"]

Activation = str | Callable[[torch.Tensor], torch.Tensor]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_layer(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: AnyWeight,
    down: AnyWeight,
    activation: Activation,
    gated: bool,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the arguments of a layer; return x, top_k_index and top_k_weights contiguous."""
    if x.dim() != 2:
        raise ValueError(f"x must be 2-D (tokens, hidden), got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be one of {_DTYPES}, got {x.dtype}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x must not require grad, these experts have no backward; call under torch.no_grad()")
    if top_k_index.dim() != 2 or top_k_index.shape[0] != x.shape[0]:
        raise ValueError(f"top_k_index must be (tokens={x.shape[0]}, top_k), got shape {tuple(top_k_index.shape)}")
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"top_k_index must be int32 or int64, got {top_k_index.dtype}")
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_weights must have the shape of top_k_index, {tuple(top_k_index.shape)}, "
            f"got {tuple(top_k_weights.shape)}"
        )
    if not top_k_weights.dtype.is_floating_point:
        raise ValueError(f"top_k_weights must be floating point, got {top_k_weights.dtype}")
    if isinstance(activation, str):
        check_choice("activation", activation, ACTIVATIONS)
        if activation == "swigluoai" and not gated:
            raise ValueError('activation "swigluoai" must be gated, got gated=False')
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if len(weight.shape) != 3:
            raise ValueError(f"{name} must be 3-D (experts, rows, columns), got shape {tuple(weight.shape)}")
        if not isinstance(weight, QuantisedWeight) and weight.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {weight.dtype}")
        if isinstance(weight, torch.Tensor) and weight.stride(-1) != 1 and weight.shape[-1] > 1:
            raise ValueError(f"{name} must have a contiguous last dim, got strides {weight.stride()}")
    E, N, H = gate_up.shape
    if x.shape[1] != H:
        raise ValueError(f"gate_up must have hidden={x.shape[1]} columns like x, got {H}")
    halves = 2 if gated and isinstance(activation, str) else 1
    if N % halves:
        raise ValueError(f"gate_up must have an even number of rows when gated, got {N}")
    wanted = (E, H, N // halves if isinstance(activation, str) else down.shape[2])
    if tuple(down.shape) != wanted:
        raise ValueError(f"down must be (experts, hidden, intermediate) = {wanted}, got {tuple(down.shape)}")
    for name, bias, size in (("gate_up_bias", gate_up_bias, N), ("down_bias", down_bias, H)):
        if bias is not None and (tuple(bias.shape) != (E, size) or not bias.is_contiguous()):
            raise ValueError(f"{name} must be contiguous of shape {(E, size)}, got {tuple(bias.shape)}")
        if bias is not None and bias.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {bias.dtype}")
    tensors = {"top_k_index": top_k_index, "top_k_weights": top_k_weights, "gate_up": gate_up, "down": down}
    for name, tensor in tensors.items():
        device = tensor.device
        if device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {device}")
    return x.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
