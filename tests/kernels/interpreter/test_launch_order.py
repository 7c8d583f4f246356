"""In which order the grouped GEMMs read the weights, at the launch sizes taken where nothing was measured."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from l2 import bytes_over_least

from moesparse.benchmarking import SHAPES
from moesparse_kernels import tuning
from moesparse_kernels.launch_order import block_and_tile
from moesparse_kernels.schedule import block_bound, route_torch

# multiprocessors of an H200, and programs of the packed kernel that one holds, by block_m: its registers on sm_90
MULTIPROCESSORS = 132
PROGRAMS = {16: 5, 32: 3, 64: 2, 128: 1}


@triton.jit
def _order_kernel(out_ptr, tiles, num_blocks, group_m, BLOCK: tl.constexpr):
    # the last program once more behind the end
    pid = tl.minimum(tl.arange(0, BLOCK), tiles * num_blocks - 1)
    block, tile = block_and_tile(pid, tiles, num_blocks, group_m)
    tl.store(out_ptr + pid * 2, block)
    tl.store(out_ptr + pid * 2 + 1, tile)


def launch_order(tiles, num_blocks, group_m):
    """(programs, 2): block and tile of every program, as the kernels compute them."""
    programs = tiles * num_blocks
    out = torch.empty(programs, 2, dtype=torch.int32)
    _order_kernel[(1,)](out, tiles, num_blocks, group_m, BLOCK=triton.next_power_of_2(programs))
    return out.numpy()


@pytest.fixture
def config_of(monkeypatch):
    """Launch sizes of an op for a shape and a number of tokens on an H200 without a table."""
    monkeypatch.setattr(tuning, "_multiprocessors", lambda _: MULTIPROCESSORS)
    monkeypatch.setattr(tuning, "_has_wgmma", lambda _: True)

    def config(shape, op, tokens):
        n, k = (2 * shape.intermediate, shape.hidden) if op.startswith("up") else (shape.hidden, shape.intermediate)
        rows = tokens * shape.top_k
        return tuning.grouped_config(op, rows, shape.num_experts, n, k, torch.bfloat16, torch.device("cpu"))

    return config


def expert_of_blocks(shape, tokens, block_m, law):
    """(blocks,): the expert of each block, -1 behind the last."""
    random = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, shape.num_experts, generator=random)
    if law == "skewed":
        chosen[:, : shape.top_k] += 1
    routing = route_torch(chosen.topk(shape.top_k).indices, shape.num_experts, block_m)
    return routing.block_expert.numpy()


@pytest.mark.parametrize(("op", "law"), [("up_nm", "uniform"), ("down_dense", "skewed")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_blocks_of_an_expert_are_neighbours(shape, op, law, config_of):
    # one token, a block or two for an expert, prefill
    for tokens in (1, 8, 64, 256, 1024):
        config = config_of(shape, op, tokens)
        expert_of = expert_of_blocks(shape, tokens, config.block_m, law)
        tiles = (2 * shape.intermediate if op == "up_nm" else shape.hidden) // 128
        order = launch_order(tiles, len(expert_of), config.group_m)
        assert len(np.unique(order[:, 0] * tiles + order[:, 1])) == len(order), "a tile of a block is missing"
        place = np.empty((len(expert_of), tiles), dtype=np.int64)
        place[order[:, 0], order[:, 1]] = np.arange(len(order))
        same = (expert_of[1:] == expert_of[:-1]) & (expert_of[1:] >= 0)
        apart = same & ((place[1:] - place[:-1]) != 1).any(1)
        # only where a group ends is an expert torn, and few experts are one group
        assert apart.sum() <= (len(expert_of) - 1) // 32, (tokens, config)
        assert not same.any() or config.group_m > 1


def read(shape, op, tokens, config, group_m=None, cache=50 << 20):
    """Bytes over least of one GEMM: packed tiles of 128 x 128 are 9/16 of dense ones."""
    rows, packed, up = tokens * shape.top_k, op.endswith("_nm"), op.startswith("up")
    n, k = (2 * shape.intermediate, shape.hidden) if up else (shape.hidden, shape.intermediate)
    expert_of = expert_of_blocks(shape, tokens, config.block_m, "uniform")
    assert len(expert_of) == block_bound(rows, shape.num_experts, config.block_m)
    return bytes_over_least(
        launch_order(n // 128, len(expert_of), config.group_m if group_m is None else group_m),
        expert_of,
        # four of the kernel's steps at a time
        steps=k // 512,
        tile_bytes=4 * 128 * 128 * 2 * (9 if packed else 16) // 16,
        # rows of the up projection are tokens, read by each of their experts
        row_bytes=4 * 128 * 2 * config.block_m // (shape.top_k if up else 1),
        resident=MULTIPROCESSORS * PROGRAMS[config.block_m],
        cache=cache,
    )


@pytest.mark.parametrize("op", ["up_nm", "down_nm", "up_dense", "down_dense"])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_few_experts_are_read_once(tokens, op, config_of):
    # half of the L2 of an H200, which is two halves
    shape = SHAPES["Mixtral-8x7B"]
    assert read(shape, op, tokens, config_of(shape, op, tokens), cache=25 << 20) <= 1.15


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "OLMoE-1B-7B"])
def test_many_experts_are_read_once(name, config_of):
    for op in ("up_nm", "down_nm"):
        assert read(SHAPES[name], op, 256, config_of(SHAPES[name], op, 256), cache=25 << 20) <= 1.15


def test_the_simulation_sees_weights_read_twice(config_of):
    # 13 blocks of 8 experts, those of one expert 224 programs apart
    shape = SHAPES["Mixtral-8x7B"]
    assert read(shape, "up_nm", 256, config_of(shape, "up_nm", 256), group_m=1) >= 1.25
    # nor can anything be read less than once: all weights fit this cache
    assert read(shape, "up_nm", 256, config_of(shape, "up_nm", 256), group_m=1, cache=1 << 40) == 1
