"""The order in which the programs of a grouped GEMM walk over blocks of rows and tiles of the weight."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["block_and_tile"]


@triton.jit
def block_and_tile(pid, tiles, num_blocks, group_m):
    """The block of rows and the weight tile of a program: `group_m` blocks walk the weight together.

    All blocks of a group come with a tile before any comes with the next one. Blocks of one expert are neighbours, so a
    tile that one of them has read is in L2 for the others, unless a group ends between them.
    """
    group = pid // (group_m * tiles)
    within = pid % (group_m * tiles)
    blocks_here = tl.minimum(num_blocks - group * group_m, group_m)
    return group * group_m + within % blocks_here, within // blocks_here
