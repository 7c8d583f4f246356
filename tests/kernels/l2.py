"""Which bytes a grouped GEMM reads from memory, given the order in which its programs start and a cache of some size.

Programs start in the order of their ids, as many at a time as fit, and read the same steps of the reduction at nearly
the same time: a simulation in turns, in each of which every program that runs reads one step. A piece (the weight tile
of one step, or the rows of one block at one step) is found in the cache when less was read since it was last wanted
than the cache holds: least recently used, as if everything read since were different.
"""

from __future__ import annotations

import numpy as np

__all__ = ["bytes_over_least"]


def bytes_over_least(
    order: np.ndarray,
    expert_of: np.ndarray,
    *,
    steps: int,
    tile_bytes: int,
    row_bytes: int,
    resident: int,
    cache: int,
    seed: int = 0,
) -> float:
    """Bytes read from memory over the bytes of one read of everything that is read.

    Args:
        order: (programs, 2), the block and the tile of each program.
        expert_of: (blocks,), the expert of each block, -1 for one that is none.
        steps: steps of the reduction.
        tile_bytes: of one weight tile in one step.
        row_bytes: of the rows of one block in one step; no two blocks share any.
        resident: programs that run at a time.
        cache: bytes.
        seed: of the turns in which a program that waits for memory falls behind, one in ten.
    """
    random = np.random.default_rng(seed)
    order = order[expert_of[order[:, 0]] >= 0]
    experts, tiles = int(expert_of.max()) + 1, int(order[:, 1].max()) + 1
    # bytes read so far when a piece was last wanted; a piece that never was is far back
    weight_seen = np.full(experts * tiles * steps, -np.inf)
    rows_seen = np.full(len(expert_of) * steps, -np.inf)
    running = np.arange(min(resident, len(order)))
    step = np.zeros(len(running), dtype=np.int64)
    following, read = len(running), 0.0
    while len(running):
        block, tile = order[running].T
        found = read - weight_seen[(expert_of[block] * tiles + tile) * steps + step] <= cache
        for seen, piece, size in (
            (weight_seen, (expert_of[block] * tiles + tile) * steps + step, tile_bytes),
            (rows_seen, block * steps + step, row_bytes),
        ):
            wanted = np.unique(piece)
            read_now = size * np.count_nonzero(read - seen[wanted] > cache)
            read += read_now
            seen[wanted] = read
        step += found | (random.random(len(step)) < 0.9)
        done = step == steps
        free = int(done.sum())
        more = np.arange(following, min(following + free, len(order)))
        following += len(more)
        running = np.concatenate([running[~done], more])
        step = np.concatenate([step[~done], np.zeros(len(more), dtype=np.int64)])
    least = tile_bytes * np.isfinite(weight_seen).sum() + row_bytes * np.isfinite(rows_seen).sum()
    return float(read / least)
