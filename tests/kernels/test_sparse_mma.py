"""The operands of the sparse tensor-core experiment: what is packed is the product, read as the PTX manual reads it."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.speed.sparse_mma import Tile, pack_tokens, pack_weight, sparse_matmul, sparse_matmul_torch
from moesparse_kernels import NMWeight, nm_prune

SMALL = Tile(row_fragments=2, token_fragments=2, warps=2)
TILES = [Tile(), Tile(2, 8, 4, 4), Tile(4, 8, 8)]


def operands(N, K, T, device="cpu"):
    random = torch.Generator().manual_seed(N + K + T)
    dense = torch.randn(1, N, K, generator=random).bfloat16().to(device)
    weight = nm_prune(dense, torch.rand(1, K, generator=random).to(device) + 0.1)
    # a group with one non-zero, one with none, and the columns that two bits can name wrongly
    weight[0, 0, :8] = torch.tensor([0, 0, 0, 3.0, 0, 0, 0, 0])
    return NMWeight.pack(weight), torch.randn(T, K, generator=random).bfloat16().to(device)


def test_fragments_hold_the_product():
    weight, x = operands(2 * SMALL.rows, 128, 2 * SMALL.tokens)
    got = sparse_matmul_torch(*pack_weight(weight, SMALL), pack_tokens(x, SMALL), SMALL)
    torch.testing.assert_close(got, x.double() @ weight.unpack()[0].double().T, rtol=1e-12, atol=1e-12)


def test_operands_that_fill_no_tile_are_refused():
    weight, x = operands(SMALL.rows, 128, SMALL.tokens)
    with pytest.raises(ValueError, match=r"N a multiple of 256 and K of 64, got NMWeight\(2:4, shape=\(1, 64, 128\)"):
        pack_weight(weight, Tile())
    with pytest.raises(ValueError, match=r"T a multiple of 16 and K of 64, got torch.bfloat16 \(8, 128\)"):
        pack_tokens(x[:8], SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [SMALL, *TILES], ids=str)
@pytest.mark.parametrize("k_steps", [1, 2, 7])
def test_the_hardware_reads_them_so(tile, k_steps):
    weight, x = operands(2 * tile.rows, 64 * k_steps, 2 * tile.tokens, "cuda")
    got = sparse_matmul(*pack_weight(weight, tile), pack_tokens(x, tile), tile).double()
    wanted = x.double() @ weight.unpack()[0].double().T
    # fp32 sums of a few hundred bf16 products, rounded once to bf16
    assert float((got - wanted).norm() / wanted.norm()) < 3e-3
