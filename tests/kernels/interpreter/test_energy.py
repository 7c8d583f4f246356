"""column_energy's kernels against fp64 loops."""

import pruning_oracle as oracle
import pytest
import torch

from moesparse_kernels import column_energies, column_energy, column_energy_sorted

EPS = torch.finfo(torch.float32).eps


def _routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return index, torch.rand(tokens, top_k, generator=generator) + 0.05


def _x(tokens: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3)).to(dtype)


def _assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """The product and the square round once each to fp32; 16 terms are added before the compensation starts."""
    assert actual.dtype == torch.float64
    assert bool((exact > 0).eq(actual > 0).all())
    assert bool(((actual - exact).abs() <= (2 + 16 / 2) * EPS / 2 * exact).all())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_loops(dtype, gated):
    # 70 tokens of which each expert gets about 35: three blocks of 16 rows, the last ragged; K = 264: a ragged program
    index, gates = _routing(70, 4, 2)
    x, gates = _x(70, 264, dtype), gates.to(dtype) if gated else None
    _assert_close(column_energy(x, index, gates, 4), oracle.column_energy(x, index, gates, 4))


def test_more_rows_than_a_chunk():
    # 300 tokens on one expert make chunks of 128, 128 and 44: the fp64 sum across chunks; the others are empty
    x, gates = _x(300, 16), torch.rand(300, 1, generator=torch.Generator().manual_seed(5))
    index = torch.full((300, 1), 2)
    _assert_close(column_energy(x, index, gates, 4), oracle.column_energy(x, index, gates, 4))


def test_chunks_end_with_their_expert():
    # 129 and 127 rows: a chunk with one row, then an expert that starts inside the sorted rows
    index = torch.tensor([0] * 129 + [1] * 127).unsqueeze(1)
    x = _x(256, 16)
    _assert_close(column_energy(x, index, None, 2), oracle.column_energy(x, index, None, 2))


# one token; top_k = 1; top_k = E
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (9, 4, 1), (9, 3, 3)])
def test_edges_of_routing(tokens, experts, top_k):
    index, gates = _routing(tokens, experts, top_k)
    x = _x(tokens, 24)
    _assert_close(column_energy(x, index.int(), gates, experts), oracle.column_energy(x, index, gates, experts))


def test_sentinels_and_empty_experts():
    # expert-parallel ranks mark what is not theirs with E or -1; 128 experts of which 120 stay empty
    index = torch.tensor([[0, 128], [-1, 7], [3, -5], [128, 4000], [5, 6]])
    x, gates = _x(5, 24), torch.rand(5, 2, generator=torch.Generator().manual_seed(5))
    energy = column_energy(x, index, gates, 128)
    _assert_close(energy, oracle.column_energy(x, index, gates, 128))
    assert int((energy.sum(1) > 0).sum()) == 5


def test_no_tokens():
    energy = column_energy(torch.empty(0, 24), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 3)
    assert torch.equal(energy, torch.zeros(3, 24, dtype=torch.float64))


def test_strided_input():
    # every second row of a wider tensor, and a transposed one
    index, gates = _routing(20, 3, 2)
    wide = _x(40, 64)
    for x in (wide[::2, 8:40], _x(32, 20).t()):
        _assert_close(column_energy(x, index, gates, 3), oracle.column_energy(x, index, gates, 3))


@pytest.mark.parametrize("gated", [True, False])
def test_sorted_rows(gated):
    # rows 0 and 37.. belong to no expert, expert 1 is empty, int32 offsets as a router kernel makes them
    x, offsets = _x(40, 264), torch.tensor([1, 20, 20, 37], dtype=torch.int32)
    gates = torch.rand(40, generator=torch.Generator().manual_seed(5)) if gated else None
    index = torch.bucketize(torch.arange(40), offsets.long()[1:], right=True).masked_fill(torch.arange(40) < 1, -1)
    exact = oracle.column_energy(x, index[:, None], None if gates is None else gates[:, None], 3)
    _assert_close(column_energy_sorted(x, offsets, gates)[[0, 2]], exact[[0, 2]])
    assert not column_energy_sorted(x, offsets, gates)[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ordered", [True, False])
def test_both_sums_in_one_pass_are_those_of_two(ordered, dtype):
    # 300 rows of one expert: three chunks; expert 1 is empty; rows of x in any order, some twice
    x, offsets = _x(300, 264, dtype), torch.tensor([0, 290, 290, 300])
    gates = torch.rand(300, generator=torch.Generator().manual_seed(5)).to(dtype)
    order = torch.randint(0, 300, (300,), generator=torch.Generator().manual_seed(6)) if ordered else None
    plain, gated = column_energies(x, offsets, gates, order)
    rows = x if order is None else x[order]
    assert torch.equal(plain, column_energy_sorted(rows, offsets))
    assert torch.equal(gated, column_energy_sorted(rows, offsets, gates))


def test_offsets_outside_the_rows_read_nothing():
    x = _x(4, 16)
    energy = column_energy_sorted(x, torch.tensor([0, 2, 1000]), None)
    index = torch.tensor([[0], [0], [1], [1]])
    _assert_close(energy, oracle.column_energy(x, index, None, 2))


def test_compensation_and_same_bits_twice():
    # one chunk: 2**14, then blocks of 16 * 2**-16, each under half an ulp of it, together most of one ulp, 2**-9
    x = torch.full((128, 8), 2.0**-8)
    x[0] = 2.0**7
    index = torch.zeros(128, 1, dtype=torch.int64)
    first = column_energy(x, index, None, 1)
    assert torch.equal(first, torch.full((1, 8), 2.0**14 + 2.0**-9, dtype=torch.float64))
    assert torch.equal(first, column_energy(x, index, None, 1))
