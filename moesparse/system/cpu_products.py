"""Products of half-precision matrices on a CPU without units for them, by way of float32: five to seven times as fast.

torch multiplies bfloat16 on such a CPU in plain loops. The product of two half-precision numbers is exact in float32,
and either way the sum is one of float32 that is rounded once: what differs is the order of adding up, as it does
between one device and another. Weights are widened a few megabytes at a time. Training gains as much: its backward is
products, and that of attention, which torch computes in the same loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["fast_products"]

# below this many rows, widening the weights costs more than it saves
_FEW_ROWS = 8
# weights widened at once: 4 MiB, which stay in a cache
_PART = 1 << 20


def fast_products(module: nn.Module) -> AbstractContextManager[Any]:
    """Have the matrix products of the body done in float32 where `module` holds weights this CPU multiplies slowly.

    To be entered around forward passes, or around them and their backward; a generator must not yield inside of it.
    """
    slow = any(tensor.device.type == "cpu" and _is_slow(tensor.dtype) for tensor in module.parameters())
    return _InFloat32() if slow else nullcontext()


@functools.cache
def _is_slow(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    supported: Any = getattr(torch.ops.mkldnn, name, None) if name else None
    return supported is not None and not supported()


class _InFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _PRODUCTS.get(func)
        result = None if product is None else product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _mm(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor | None:
    """[M, K] @ [K, N] (+ start); None where the plain product serves."""
    if not _is_slow(a.dtype) or b.dtype != a.dtype or not a.is_cpu or len(a) < _FEW_ROWS:
        return None
    out = a.new_empty(len(a), b.shape[1])
    wide = a.float()
    step = min(max(1, _PART // max(len(b), 1)), b.shape[1])
    # one buffer for all parts, in the layout of a linear layer's weight
    buffer = wide.new_empty(step, len(b)).t()
    for left in range(0, b.shape[1], step):
        columns = slice(left, left + step)
        weights = b[:, columns]
        part = wide @ buffer[:, : weights.shape[1]].copy_(weights)
        out[:, columns] = part if start is None else part.add_(start[..., columns])
    return out


def _addmm(start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    return _mm(a, b, start) if beta == alpha == 1 else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    out = _mm(x.reshape(-1, x.shape[-1]), weight.t(), bias)
    return None if out is None else out.view(*x.shape[:-1], len(weight))


def _bmm(a: Tensor, b: Tensor) -> Tensor | None:
    if not _is_slow(a.dtype) or not a.is_cpu or a.shape[1] < _FEW_ROWS:
        return None
    return torch.bmm(a.float(), b.float()).to(a.dtype)


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor | None:
    """Rows [S, K], cut at `offs`, by one matrix of [E, K, N] each."""
    if not _is_slow(a.dtype) or not a.is_cpu or (a.dim(), b.dim()) != (2, 3) or offs is None or bias is not None:
        return None
    out = a.new_empty(len(a), b.shape[2], dtype=out_dtype)
    start = 0
    for matrix, stop in zip(b, offs.tolist(), strict=True):
        rows = slice(start, stop)
        if stop > start:
            product = _mm(a[rows], matrix)
            out[rows] = a[rows] @ matrix if product is None else product
        start = stop
    return out


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *options: Any,
    attn_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, ...] | None:
    """Gradients of query, key and value; the forward, which is a fifth of it, stays torch's own."""
    if not _is_slow(query.dtype) or not query.is_cpu:
        return None
    wide = [tensor.float() for tensor in (grad, query, key, value, out)]
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    found = backward(*wide, logsumexp, *options, attn_mask=attn_mask, **more)
    return tuple(each.to(query.dtype) for each in found)


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.linear.default: _linear,
    _aten.bmm.default: _bmm,
    _aten._grouped_mm.default: _grouped_mm,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}
