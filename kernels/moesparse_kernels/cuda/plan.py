"""Launch sizes of the kernel of grouped_mma_sp.cu: plain numbers, from numbers alone.

A piece of work is a block of tokens, a pair of units of the weight (128 rows) and a part of the reduction. A block of
threads holds a multiprocessor alone, with as many stages in shared memory as fit, and takes every `grid`-th piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "ACTIVATIONS",
    "INDEX_BYTES",
    "KERNELS",
    "SOURCE",
    "THREADS",
    "TOKENS",
    "UNIT_BYTES",
    "VALUES_BYTES",
    "Plan",
    "block_m_for",
    "plan",
    "stage_bytes",
]

SOURCE = Path(__file__).with_name("grouped_mma_sp.cu")

# as in SOURCE
VALUES_BYTES, INDEX_BYTES = 8192, 1024
UNIT_BYTES = VALUES_BYTES + INDEX_BYTES
X_ROW_BYTES = 272
THREADS = 192
MAX_STAGES = 8
BARRIER_BYTES = 2 * 8 * MAX_STAGES
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}

KERNELS = {torch.bfloat16: (), torch.float16: ("FP16",)}
"""What is defined where the kernels of a dtype are compiled."""

TOKENS = (8, 16, 32, 64)

# stages that are worth their memory: five under way are 92 KB of weights, twice what the latency of an H200's memory
# asks for, by an estimate
_WANTED_STAGES = 6
# parts of the reduction, each of so many steps or more
_MAX_SPLITS, _MIN_STEPS = 8, 4
# what a piece of work costs besides its steps, in steps
_STEPS_OF_A_START = 2


@dataclass(frozen=True)
class Plan:
    """Launch sizes of one grouped GEMM.

    Attributes:
        kernel: name of the kernel.
        stages: of the pipeline.
        splits: parts of the reduction; their fp32 sums are added afterwards, in order.
        grid: blocks of threads.
        shared: bytes of dynamic shared memory.
    """

    kernel: str
    stages: int
    splits: int
    grid: int
    shared: int


def stage_bytes(tokens: int) -> int:
    """Shared memory of a stage: two units of the weight and 128 columns of the tokens."""
    return 2 * UNIT_BYTES + tokens * X_ROW_BYTES


def block_m_for(rows: int, num_experts: int) -> int:
    """The smallest block of TOKENS that holds an expert's average share of the rows."""
    share = rows / max(1, min(rows, num_experts))
    return next((tokens for tokens in TOKENS if tokens >= share), TOKENS[-1])


def _splits(works: int, steps: int, multiprocessors: int) -> int:
    """Parts that end soonest: pieces one after the other on a multiprocessor, times the steps of one."""

    def cost(splits: int) -> int:
        return math.ceil(works * splits / multiprocessors) * (math.ceil(steps / splits) + _STEPS_OF_A_START)

    possible = [s for s in range(1, _MAX_SPLITS + 1) if s == 1 or steps >= _MIN_STEPS * s]
    return min(possible, key=cost)


def plan(
    block_m: int,
    num_blocks: int,
    pairs: int,
    steps: int,
    *,
    may_split: bool,
    multiprocessors: int,
    shared_memory: int,
) -> Plan:
    """Launch sizes of one grouped GEMM.

    Args:
        block_m: tokens in a block, one of TOKENS.
        num_blocks: the most blocks of tokens there can be.
        pairs: of units along N.
        steps: units along K.
        may_split: parts of the reduction may be left to be added by others.
        multiprocessors: of the device.
        shared_memory: bytes that a block of threads may have on the device.

    Raises:
        ValueError: not even two stages fit.
    """
    stages = min(_WANTED_STAGES, MAX_STAGES, (shared_memory - BARRIER_BYTES) // stage_bytes(block_m))
    if stages < 2:
        raise ValueError(
            f"shared_memory must hold two stages of {stage_bytes(block_m)} bytes for blocks of {block_m} tokens, "
            f"got {shared_memory} bytes"
        )
    works = num_blocks * pairs
    splits = _splits(works, steps, multiprocessors) if may_split else 1
    return Plan(
        kernel=f"grouped_{block_m}",
        stages=stages,
        splits=splits,
        grid=max(1, min(works * splits, multiprocessors)),
        shared=BARRIER_BYTES + stages * stage_bytes(block_m),
    )
