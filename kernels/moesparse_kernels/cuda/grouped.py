"""Grouped GEMM on 2:4 weights in "mma_sp" order, on the sparse tensor cores: what `grouped_nm` is for "fragment"."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ..epilogue import activate_rows
from ..layout import NMWeight
from ..schedule import Routing
from . import nvrtc
from .driver import Module, shared_memory
from .plan import ACTIVATIONS, KERNELS, SOURCE, THREADS, Plan, plan

__all__ = ["Arguments", "arguments_of", "can_fuse_gate", "grouped_mma_sp", "launch"]

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class Arguments(ctypes.Structure):
    """The struct of that name in the kernel, where its fields are described."""

    _fields_ = (
        *((name, _POINTER) for name in ("values", "index", "x", "bias", "out", "slot_of", "offsets")),
        *((name, _POINTER) for name in ("block_expert", "block_row")),
        *((name, _INT) for name in ("R", "N", "K", "n_out", "tiles", "pairs", "steps", "splits")),
        *((name, _INT) for name in ("num_blocks", "top_k", "stages", "activation", "gated", "float_out")),
    )


def can_fuse_gate(n: int) -> bool:
    """Whether gate and up rows start on unit borders; if not, the activation runs as a launch of its own."""
    return n % 128 == 0


@cache
def _module(device: torch.device, dtype: torch.dtype) -> Module:
    compiler = nvrtc.find()
    assert compiler is not None, "check.py asks before"
    arch = nvrtc.architecture(torch.cuda.get_device_capability(device))
    return Module(nvrtc.compiled(compiler, SOURCE, arch, KERNELS[dtype]))


@cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block of threads may have."""
    return torch.cuda.get_device_properties(device).multi_processor_count, shared_memory()


def arguments_of(
    x: torch.Tensor,
    weight: NMWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    routing: Routing,
    top_k: int | None,
    activation: str,
    gated: bool,
    chosen: Plan,
) -> Arguments:
    """The kernel's parameter; `top_k` is None where row r is x[r], `out` is (splits, R, n_out)."""
    _, N, K = weight.shape
    tiles, steps = weight.index.shape[1:3]
    return Arguments(
        values=weight.values.data_ptr(),
        index=weight.index.data_ptr(),
        x=x.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        slot_of=None if top_k is None else routing.slot_of.data_ptr(),
        offsets=routing.offsets.data_ptr(),
        block_expert=routing.block_expert.data_ptr(),
        block_row=routing.block_row.data_ptr(),
        R=out.shape[1],
        N=N,
        K=K,
        n_out=out.shape[2],
        tiles=tiles,
        pairs=out.shape[2] // 64 if gated else tiles // 2,
        steps=steps,
        splits=chosen.splits,
        num_blocks=routing.block_expert.numel(),
        top_k=top_k or 1,
        stages=chosen.stages,
        activation=ACTIVATIONS[activation],
        gated=gated,
        float_out=out.dtype == torch.float32,
    )


def launch(device: torch.device, dtype: torch.dtype, chosen: Plan, arguments: Arguments) -> None:
    stream = torch.cuda.current_stream(device).cuda_stream
    _module(device, dtype).launch(chosen.kernel, chosen.grid, THREADS, chosen.shared, stream, arguments)


def grouped_mma_sp(
    x: torch.Tensor,
    weight: NMWeight,
    routing: Routing,
    top_k_index: torch.Tensor,
    *,
    gather: bool,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    keep_splits: bool = False,
) -> torch.Tensor:
    """Multiply expert-sorted rows by their expert's 2:4 weight; optionally bias and activation.

    Args:
        x: (T, K) when `gather`, else (R, K) in the order of `routing`; bf16 or fp16, contiguous.
        weight: (E, n, K) in "mma_sp" order, of the dtype of x.
        routing: from `route` with a block of plan.TOKENS.
        top_k_index: (T, top_k), what was routed.
        gather, bias, activation, gated, keep_splits: as for `grouped_nm`.

    Returns:
        (R, n), or (R, n / 2) when gated; (splits, R, n) when keep_splits. fp32 accumulation, rounded once to the dtype
        of x; fp32 for keep_splits with more than one split. Rows of dropped slots are not written.
    """
    R, N = routing.slot_of.numel(), weight.shape[1]
    separate = gated and not can_fuse_gate(N)
    fused_gate = gated and not separate
    num_blocks = routing.block_expert.numel()
    tiles, steps = weight.index.shape[1:3]
    multiprocessors, bytes_of_a_block = _limits(x.device)
    chosen = plan(
        routing.block_m,
        num_blocks,
        N // 128 if fused_gate else tiles // 2,
        steps,
        may_split=keep_splits,
        multiprocessors=multiprocessors,
        shared_memory=bytes_of_a_block,
    )
    fused = not separate and chosen.splits == 1
    n_out = N // 2 if fused_gate else N
    out = torch.empty(chosen.splits, R, n_out, dtype=x.dtype if fused else torch.float32, device=x.device)
    if out.numel():
        # a piece of 16 bytes is copied at a time
        x = x if x.data_ptr() % 16 == 0 else x.clone()
        arguments = arguments_of(
            x,
            weight,
            bias if fused else None,
            out,
            routing,
            top_k_index.shape[1] if gather else None,
            activation if fused else "none",
            fused_gate,
            chosen,
        )
        launch(x.device, x.dtype, chosen, arguments)
    if separate:
        return activate_rows(
            out, bias, top_k_index, routing.slot_of, routing.offsets, activation, gated=gated, dtype=x.dtype
        )
    return out if keep_splits else out[0]
