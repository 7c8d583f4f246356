"""Linear layers of a served model on a CPU: few rows by the compiled kernels.

A decoded token meets attention's and the output's matrices with as many rows as there are texts. Then torch's product
of bf16 (oneDNN) reads them at about half of the speed of memory; the dense kernel reads them at nearly all of it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesparse_kernels.dispatch import rows_for_native
from moesparse_kernels.moe_native import gemm_native

__all__ = ["serve_few_rows"]

_DTYPES = (torch.bfloat16, torch.float16)
# a prompt is torch's, which has no instructions for these dtypes on every CPU: system/cpu_products.py helps it there
_MOST_ROWS = 64


def serve_few_rows(model: nn.Module) -> int:
    """Have every plain linear layer of half precision on a CPU take the faster product by its number of rows, in place.

    For inference: nothing is differentiated. Sums are float32 in another order than torch's, rounded once as they are.

    Returns:
        How many layers were changed: 0 where the compiled kernels are not there or not faster.
    """
    changed = 0
    for module in model.modules():
        # what a subclass does is its own
        if type(module) is nn.Linear and module.weight.is_cpu and module.weight.dtype in _DTYPES:
            most = min(rows_for_native(module.weight[None]), _MOST_ROWS)
            if most > 0 and module.weight.is_contiguous():
                module.forward = functools.partial(_linear, module, most)  # type: ignore[method-assign]
                changed += 1
    return changed


def _linear(module: nn.Linear, most: float, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < len(rows) <= most or x.dtype != module.weight.dtype:
        return F.linear(x, module.weight, module.bias)
    out = gemm_native(rows.contiguous(), module.weight[None], 0, module.bias)
    return out.view(*x.shape[:-1], out.shape[-1])
