"""Every piece of work of the CUDA kernel for the layers of benchmarks/speed/shapes.py, in numbers alone.

A model of its producers and consumers: what is copied from where to where, what is read there, and what is stored. The
kernel's own source is run in test_cuda_kernel.py, on sizes that a CPU can multiply; the formulas here are the same.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks.speed.shapes import DECODE_TOKENS, SHAPES
from moesparse_kernels.cuda import plan as sizes
from moesparse_kernels.cuda.plan import block_m_for, plan
from moesparse_kernels.schedule import route_torch

H200 = {"multiprocessors": 132, "shared_memory": 232448}
BATCHES = [tokens for tokens in DECODE_TOKENS if tokens in (1, 8, 64, 256)]


def _pad(size):
    return -(-size // 128) * 128


def _works(chosen, blocks, pairs, steps):
    """block, pair, first and last step and split of every piece, and the block of threads that takes it."""
    w = np.arange(blocks * pairs * chosen.splits)
    part = -(-steps // chosen.splits)
    split = w // blocks // pairs
    first = np.minimum(split * part, steps)
    return w % blocks, w // blocks % pairs, first, np.minimum(first + part, steps), split, w % chosen.grid


@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("name", SHAPES)
def test_each_unit_is_copied_once_for_each_block_and_each_output_stored_once(name, tokens):
    shape = SHAPES[name]
    E, H, I = shape.num_experts, shape.hidden, shape.intermediate
    random = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, E, generator=random).topk(shape.top_k, dim=-1).indices
    R = index.numel()
    block_m = block_m_for(R, E)
    routing = route_torch(index, E, block_m)
    experts, rows = routing.block_expert.numpy(), routing.block_row.numpy()
    offsets = routing.offsets.numpy()
    blocks = int((experts >= 0).sum())
    assert (experts[:blocks] >= 0).all()
    for N, K, gated in ((2 * I, H, I % 64 == 0 and shape.activation != "gpt_oss"), (H, I, False)):
        tiles, steps = _pad(N) // 64, _pad(K) // 128
        pairs = I // 64 if gated else tiles // 2
        chosen = plan(block_m, len(experts), pairs, steps, may_split=not gated, **H200)
        assert 2 <= chosen.stages <= sizes.MAX_STAGES and chosen.shared <= H200["shared_memory"]
        block, pair, first, last, split, taker = _works(chosen, blocks, pairs, steps)
        # pieces are dealt out evenly
        assert np.ptp(np.bincount(taker, minlength=chosen.grid)) <= 1
        expert = experts[block].astype(np.int64)
        # units of the weight: those of a piece lie one after the other, so that a count of them is one of ranges
        units = np.stack([pair, pair + pairs] if gated else [2 * pair, 2 * pair + 1])
        start = (expert * tiles + units) * steps
        assert units.max() < tiles and (start + last).max() * sizes.VALUES_BYTES <= E * _pad(N) * _pad(K)
        change = np.zeros(E * tiles * steps + 1, np.int64)
        np.add.at(change, start + first, 1)
        np.add.at(change, start + last, -1)
        copied = change.cumsum()[:-1].reshape(E, -1)
        assert (copied == np.bincount(experts[:blocks], minlength=E)[:, None]).all()
        # outputs: rows of real tokens by 64 rows of a unit, gate and up being one
        row, row_end = rows[block], np.minimum(rows[block] + block_m, offsets[expert + 1])
        assert (row_end > row).all() and row_end.max() <= R
        n_out = I if gated else N
        stored = np.zeros((chosen.splits, R + 1, -(-n_out // 64)), np.int64)
        for unit in units[:1] if gated else units:
            real = 64 * unit < n_out
            np.add.at(stored, (split[real], row[real], unit[real]), 1)
            np.add.at(stored, (split[real], row_end[real], unit[real]), -1)
        assert (stored.cumsum(axis=1)[:, :R] == 1).all()
        # tokens: 16 bytes are copied where their first column is inside, so that all of them are
        column = np.arange(steps * 16) * 8
        assert K % 8 == 0 and (column[column < K] + 8 <= K).all()
        source = routing.slot_of.numpy() // shape.top_k if K == H else np.arange(R)
        assert source.max() < (tokens if K == H else R)


@pytest.mark.parametrize("block_m", sizes.TOKENS)
def test_a_stage_is_filled_once_and_read_as_it_was_filled(block_m):
    size = sizes.stage_bytes(block_m)
    lane, byte = np.arange(32), np.arange(16)
    filled = np.zeros(size, int)
    for half in range(2):
        filled[half * 8192 + np.arange(8192)] += 1
        filled[2 * 8192 + half * 1024 + np.arange(1024)] += 1
    for i in range(block_m // 2):
        to = 2 * sizes.UNIT_BYTES + (2 * i + lane // 16) * sizes.X_ROW_BYTES + lane % 16 * 16
        filled[to[:, None] + byte] += 1
    padding = np.arange(block_m)[:, None] * sizes.X_ROW_BYTES + 2 * sizes.UNIT_BYTES + np.arange(256, 272)
    assert (np.delete(filled, padding) == 1).all() and not filled[padding].any()

    read = np.zeros(size, int)
    for warp, half in np.ndindex(4, 2):
        for kt in range(4):
            values = half * 8192 + kt * 2048 + 16 * (32 * warp + lane)
            read[values[:, None] + byte] += 1
        read[(2 * 8192 + half * 1024 + 8 * (32 * warp + lane))[:, None] + byte[:8]] += 1
    for nt, kt in np.ndindex(block_m // 8, 4):
        row = 2 * sizes.UNIT_BYTES + (8 * nt + lane % 8) * sizes.X_ROW_BYTES + lane // 8 * 16 + kt * 64
        assert not (row % 16).any()
        # eight rows of a matrix lie in 32 different banks
        for matrix in row.reshape(4, 8):
            assert len(np.unique((matrix[:, None] // 4 + np.arange(4)) % 32)) == 32
        read[row[:, None] + byte] += 1
    assert np.array_equal(read, filled)
    # bulk copies start at multiples of 16 bytes in every stage
    assert size % 128 == 0 and sizes.BARRIER_BYTES % 128 == 0


@pytest.mark.parametrize(
    ("shared_memory", "stages"),
    # sm_90, sm_80, sm_86 and sm_89: what a block of threads may have
    [(232448, [6, 6, 6, 6]), (166912, [6, 6, 6, 4]), (101376, [4, 4, 3, 2])],
)
def test_stages_fit(shared_memory, stages):
    chosen = [
        plan(tokens, 8, 8, 16, may_split=False, multiprocessors=100, shared_memory=shared_memory)
        for tokens in sizes.TOKENS
    ]
    assert [each.stages for each in chosen] == stages
    # the weights under way cover the latency of the memory of an H200: 40 KB a multiprocessor (see plan.py)
    if shared_memory > 200000:
        assert min((each.stages - 1) * 2 * sizes.UNIT_BYTES for each in chosen) >= 2 * 40 * 1024


def test_too_little_shared_memory_is_refused():
    with pytest.raises(
        ValueError, match="must hold two stages of 35840 bytes for blocks of 64 tokens, got 65536 bytes"
    ):
        plan(64, 8, 8, 16, may_split=False, multiprocessors=40, shared_memory=65536)


@pytest.mark.parametrize(
    ("works", "steps", "splits"),
    # Mixtral's down projection of one token; as many pieces as multiprocessors; a reduction too short to cut
    [(64, 112, 2), (128, 6, 1), (8, 7, 1)],
)
def test_a_long_reduction_is_cut_where_multiprocessors_would_wait(works, steps, splits):
    assert plan(8, works, 1, steps, may_split=True, **H200).splits == splits
    assert plan(8, works, 1, steps, may_split=False, **H200).splits == 1


@pytest.mark.parametrize(
    ("rows", "experts", "tokens"), [(1, 8, 8), (64, 8, 8), (72, 8, 16), (2048, 128, 16), (9000, 8, 64)]
)
def test_blocks_hold_an_average_share(rows, experts, tokens):
    assert block_m_for(rows, experts) == tokens
