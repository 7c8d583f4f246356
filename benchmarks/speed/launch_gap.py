"""What a launch costs inside a CUDA graph: kernels of one program that do nothing, one behind the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["launches"]


@triton.jit
def _nothing_kernel(out_ptr, EARLY: tl.constexpr):
    """Grid (1,)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(out_ptr, 1)


def launches(count: int, early: bool, device: torch.device) -> Callable[[], None]:
    """`count` launches; with `early` each may begin before the one in front of it has ended (sm_90 and later)."""
    out = torch.zeros(1, dtype=torch.int32, device=device)

    def run() -> None:
        for _ in range(count):
            _nothing_kernel[(1,)](out, EARLY=early, num_warps=1, **({"launch_pdl": True} if early else {}))

    return run
