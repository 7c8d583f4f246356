"""The pruning ops in plain torch, their errors, and how they behave under torch's tracers."""

import os
import subprocess
import sys
from pathlib import Path

import pruning_oracle as oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moesparse_kernels import (
    NMWeight,
    column_energies,
    column_energy,
    column_energy_sorted,
    nm_prune,
    route,
    row_order,
    row_topk,
)

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="these are the tests of plain torch")


# ---- values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (4, 8), (5, 16), (1, 32), (32, 32)])
def test_nm_prune(n, m, dtype):
    # rows of ties, zeros of both signs, subnormals; three groups of 32
    weight, scale = oracle.hard_weight(2, 5, 96, dtype), oracle.column_scale(2, 96)
    mask = oracle.keep_mask(weight, scale, n, m)
    assert oracle.same_bits(nm_prune(weight, scale, n, m), oracle.masked(weight, mask))
    assert nm_prune(weight, scale, n, m, packed=True).equal(NMWeight.pack(weight, mask, n, m))


# nothing, one, half, everything, of a row that is no power of two
@pytest.mark.parametrize("keep", [0, 1, 100, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_topk(keep, dtype):
    weight, scale = oracle.hard_weight(2, 5, 200, dtype), oracle.column_scale(2, 200)
    mask = oracle.keep_mask(weight, scale, keep, 200)
    assert oracle.same_bits(row_topk(weight, scale, keep), oracle.masked(weight, mask))


def test_shared_scale_strides_and_no_rows():
    weight, scale = oracle.hard_weight(1, 16, 8, torch.bfloat16)[0].t(), oracle.column_scale(1, 16)
    expected = oracle.masked(weight[None], oracle.keep_mask(weight[None], scale, 2, 4))[0]
    assert oracle.same_bits(nm_prune(weight, scale[0]), expected)
    assert oracle.same_bits(nm_prune(torch.stack([weight] * 3), scale[0])[2], expected)
    assert nm_prune(weight, scale[0], packed=True).shape == (1, 8, 16)
    for shape in [(0, 8, 16), (2, 0, 16)]:
        assert nm_prune(torch.empty(shape), torch.ones(16)).shape == shape
        assert row_topk(torch.empty(shape), torch.ones(16), 3).shape == shape


def test_blocks_of_rows(monkeypatch):
    # blocks of 32 weights are two rows of 16, of which five rows make three
    weight, scale = oracle.hard_weight(2, 5, 16, torch.bfloat16), oracle.column_scale(2, 16)
    index, gates = torch.randint(0, 3, (20, 2)), torch.rand(20, 2)
    x = torch.randn(20, 16)
    monkeypatch.setattr(row_order, "_BLOCK_CPU", 32)
    assert oracle.same_bits(nm_prune(weight, scale), oracle.masked(weight, oracle.keep_mask(weight, scale, 2, 4)))
    assert nm_prune(weight, scale, packed=True).equal(NMWeight.pack(weight, oracle.keep_mask(weight, scale, 2, 4)))
    assert oracle.same_bits(row_topk(weight, scale, 7), oracle.masked(weight, oracle.keep_mask(weight, scale, 7, 16)))
    torch.testing.assert_close(
        column_energy(x, index, gates, 3), oracle.column_energy(x, index, gates, 3), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_column_energy(dtype, gated):
    # sentinels on both sides, an expert without tokens, a column count that is no power of two
    index = torch.randint(-1, 6, (60, 3), generator=torch.Generator().manual_seed(0)).masked_fill_(
        torch.arange(3) == 1, 2
    )
    index[index == 4] = 5
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    gates = torch.rand(60, 3, generator=torch.Generator().manual_seed(2)).to(dtype) if gated else None
    energy = column_energy(x, index, gates, 5)
    assert energy.dtype == torch.float64 and not energy[4].any()
    # the gate's product and the square round once each to fp32
    torch.testing.assert_close(energy, oracle.column_energy(x, index, gates, 5), rtol=2e-7, atol=0)


def test_column_energy_of_no_tokens():
    assert torch.equal(
        column_energy(torch.empty(0, 8), torch.empty(0, 2, dtype=torch.int64), None, 3), torch.zeros(3, 8).double()
    )


@pytest.mark.parametrize("ordered", [True, False])
def test_column_energies(ordered):
    x, gates = torch.randn(10, 8), torch.rand(10)
    order = torch.tensor([9, 0, 0, 3, 4, 5, 6, 7, 8, 1]) if ordered else None
    rows = x if order is None else x[order]
    index = torch.tensor([-1, 0, 0, 0, 2, 2, 2, 2, -1, -1])[:, None]
    plain, gated = column_energies(x, torch.tensor([1, 4, 4, 8]), gates, order)
    torch.testing.assert_close(plain, oracle.column_energy(rows, index, None, 3), rtol=2e-7, atol=0)
    torch.testing.assert_close(gated, oracle.column_energy(rows, index, gates[:, None], 3), rtol=2e-7, atol=0)


def test_column_energy_sorted():
    # row 0 and the last two belong to no expert; expert 1 has none; one offset points past the end
    x, gates = torch.randn(10, 8), torch.rand(10)
    index = torch.tensor([-1, 0, 0, 0, 2, 2, 2, 2, -1, -1])[:, None]
    energy = column_energy_sorted(x, torch.tensor([1, 4, 4, 8], dtype=torch.int32), gates)
    torch.testing.assert_close(energy, oracle.column_energy(x, index, gates[:, None], 3), rtol=2e-7, atol=0)
    everything = column_energy_sorted(x, torch.tensor([0, 99]))
    torch.testing.assert_close(everything[0], x.double().square().sum(0), rtol=2e-7, atol=0)


# ---- errors

W, S = torch.zeros(2, 4, 16), torch.ones(2, 16)
X, INDEX, GATES = torch.zeros(6, 8), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm_prune(W.double(), S), r"weight must be one of .*, got torch.float64"),
        (lambda: nm_prune(W[None], S), r"weight must be \(E, N, K\) or \(N, K\), got shape \(1, 2, 4, 16\)"),
        (lambda: nm_prune(W, S.bfloat16()), r"scale must be one of .*, got torch.bfloat16"),
        (lambda: nm_prune(W, S[:, :8]), r"scale must be \(E=2, K=16\) or \(K=16,\), got shape \(2, 8\)"),
        (lambda: nm_prune(W[0], S), r"scale must be \(K=16,\), got shape \(2, 16\)"),
        (lambda: nm_prune(W, S.to("meta")), r"scale must be on the device of weight, cpu, got meta"),
        (lambda: nm_prune(W, S, 2, 6), r"m must be one of \(4, 8, 16, 32\), got 6"),
        (lambda: nm_prune(W, S, 5, 4), r"n must lie in 1..m=4, got 5"),
        (lambda: nm_prune(W[..., :6], S[:, :6]), r"K must be a multiple of 4 for 2:4, got 6"),
        (lambda: nm_prune(W[..., :12], S[:, :12], packed=True), r"K must be a multiple of 8 for 2:4, got 12"),
        (
            lambda: nm_prune(W, S.masked_fill(torch.arange(16) == 5, float("nan"))),
            r"\|weight\| \* scale must not be NaN, got NaN in expert 0, row 0, column 5",
        ),
        (
            lambda: row_topk(W + (torch.arange(4)[:, None] == 3) * float("inf"), 0 * S, 2),
            r"must not be NaN, got NaN in expert 0, row 0, column 0",
        ),
        (lambda: row_topk(W, S, 17), r"keep must lie in 0..K=16, got 17"),
        (lambda: row_topk(W, S, -1), r"keep must lie in 0..K=16, got -1"),
        (lambda: column_energy(X.int(), INDEX, GATES, 2), r"x must be one of .*, got torch.int32"),
        (lambda: column_energy(X[0], INDEX, GATES, 2), r"x must be \(T, K\), got shape \(8,\)"),
        (lambda: column_energy(X, INDEX.float(), GATES, 2), r"top_k_index must be one of .*, got torch.float32"),
        (lambda: column_energy(X, INDEX[:5], GATES, 2), r"top_k_index must be \(T=6, top_k\), got shape \(5, 2\)"),
        (lambda: column_energy(X, INDEX, GATES[:, 0], 2), r"top_k_weights must have the shape .* \(6, 2\), got \(6,\)"),
        (lambda: column_energy(X, INDEX, GATES.long(), 2), r"top_k_weights must be one of .*, got torch.int64"),
        (lambda: column_energy(X, INDEX, GATES, 0), r"num_experts must be positive, got 0"),
        (lambda: column_energy(X, INDEX.to("meta"), None, 2), r"top_k_index must be on the device of x, cpu, got meta"),
        (lambda: column_energy_sorted(X[0], INDEX[:, 0]), r"x must be \(R, K\), got shape \(8,\)"),
        (lambda: column_energy_sorted(X, INDEX), r"offsets must be \(E \+ 1,\) with E >= 1, got shape \(6, 2\)"),
        (lambda: column_energy_sorted(X, INDEX[:1, 0]), r"offsets must be \(E \+ 1,\) with E >= 1, got shape \(1,\)"),
        (lambda: column_energy_sorted(X, GATES[:, 0]), r"offsets must be one of .*, got torch.float32"),
        (lambda: column_energy_sorted(X, INDEX[:, 0], GATES), r"gates must be \(R=6,\), got shape \(6, 2\)"),
        (lambda: column_energy_sorted(X.int(), INDEX[:, 0]), r"x must be one of .*, got torch.int32"),
        (lambda: column_energy_sorted(X, INDEX[:, 0], GATES[:, 0].long()), r"gates must be one of .*, got torch.int64"),
        (lambda: column_energy_sorted(X, INDEX[:, 0].to("meta")), r"offsets must be on the device of x, cpu, got meta"),
        (
            lambda: column_energy_sorted(X, INDEX[:, 0], GATES[:, 0].to("meta")),
            r"gates must be on the device of x, cpu, got meta",
        ),
        (lambda: column_energies(X[0], INDEX[:, 0], GATES[:, 0]), r"x must be \(R, K\), got shape \(8,\)"),
        (lambda: column_energies(X, INDEX, GATES[:, 0]), r"offsets must be \(E \+ 1,\) with E >= 1, got shape"),
        (lambda: column_energies(X, INDEX[:, 0], GATES), r"gates must be \(R=6,\), got shape \(6, 2\)"),
        (lambda: column_energies(X, INDEX[:, 0], GATES[:, 0], INDEX), r"order must be \(R,\), got shape \(6, 2\)"),
        (lambda: column_energies(X, INDEX[:, 0], GATES[:, 0], GATES[:, 0]), r"order must be one of .*float32"),
        (
            lambda: column_energies(X, INDEX[:, 0], GATES[:, 0], INDEX[:, 0].to("meta")),
            r"order must be on the device of x, cpu, got meta",
        ),
        (
            lambda: column_energy(X, INDEX, GATES.to("meta"), 2),
            r"top_k_weights must be on the device of x, cpu, got meta",
        ),
        (lambda: nm_prune(W, S, 0, 4), r"n must lie in 1..m=4, got 0"),
        (lambda: route(INDEX.float(), 2), r"top_k_index must be one of .*, got torch.float32"),
        (lambda: route(INDEX[0], 2), r"top_k_index must be \(T, top_k\), got shape \(2,\)"),
        (lambda: route(INDEX, 0), r"num_experts must be positive, got 0"),
        (lambda: route(INDEX, 2, 0), r"block_m must be positive, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- tracers

CALLS = {
    "nm_prune": (torch.ops.moesparse.nm_prune, (torch.randn(2, 4, 16), torch.rand(2, 16), 2, 4)),
    "nm_prune_packed": (torch.ops.moesparse.nm_prune_packed, (torch.randn(2, 4, 16), torch.rand(2, 16), 3, 8)),
    "row_topk": (torch.ops.moesparse.row_topk, (torch.randn(2, 4, 16), torch.rand(2, 16), 5)),
    "column_energy": (
        torch.ops.moesparse.column_energy,
        (torch.randn(6, 8), torch.randint(0, 3, (6, 2)), torch.rand(6, 2), 3),
    ),
    "column_energy, no gates": (
        torch.ops.moesparse.column_energy,
        (torch.randn(6, 8), torch.randint(0, 3, (6, 2)), None, 3),
    ),
    "column_energies": (
        torch.ops.moesparse.column_energies,
        (torch.randn(6, 8), torch.tensor([0, 2, 6]), torch.rand(6), torch.tensor([5, 0, 0, 1, 2, 3])),
    ),
    "column_energy_sorted": (
        torch.ops.moesparse.column_energy_sorted,
        (torch.randn(6, 8), torch.tensor([0, 2, 6]), torch.rand(6)),
    ),
    "route": (torch.ops.moesparse.route, (torch.randint(-1, 4, (6, 2)), 3, 4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    op, arguments = CALLS[name]
    # no gradients flow, so there is no autograd registration to check
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def _everything(weight, scale, x, index, gates):
    packed = nm_prune(weight, scale, packed=True)
    energy = column_energy(x, index, gates, 3)
    rows = route(index, 3).slot_of
    return nm_prune(weight, scale, 4, 8), packed.values, packed.index, row_topk(weight, scale, 5), energy, rows


def _inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(2, 4, 16).bfloat16(),
        torch.rand(2, 16),
        torch.randn(tokens, 8),
        torch.randint(0, 3, (tokens, 2)),
        torch.rand(tokens, 2),
    )


def test_compile_in_one_graph_at_any_token_count():
    compiled = torch.compile(_everything, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (6, 9):
        inputs = _inputs(tokens)
        for actual, expected in zip(compiled(*inputs), _everything(*inputs), strict=True):
            assert oracle.same_bits(actual, expected)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return _everything(*inputs)

    program = torch.export.export(Module(), _inputs(6))
    names = {str(node.target) for node in program.graph.nodes}
    assert {
        f"moesparse.{name}.default" for name in ("nm_prune", "nm_prune_packed", "row_topk", "column_energy", "route")
    } <= names


def test_fake_cuda_tensors():
    # the shapes, dtypes and device for a GPU that is not there
    with FakeTensorMode():
        weight = torch.empty(2, 4, 16, device="cuda", dtype=torch.bfloat16)
        scale = torch.empty(2, 16, device="cuda")
        x, index = torch.empty(6, 8, device="cuda"), torch.empty(6, 2, device="cuda", dtype=torch.int64)
        packed = nm_prune(weight, scale, packed=True)
        assert (packed.values.shape, packed.index.shape, packed.device.type) == ((2, 4, 8), (2, 4, 2), "cuda")
        assert (packed.values.dtype, packed.index.dtype) == (torch.bfloat16, torch.uint8)
        for pruned in (nm_prune(weight, scale), row_topk(weight, scale, 3)):
            assert (pruned.shape, pruned.dtype, pruned.device.type) == ((2, 4, 16), torch.bfloat16, "cuda")
        routing = route(index, 3, block_m=4)
        # 12 rows of three experts fill at most five blocks of four
        assert [tuple(size.shape) for size in (routing.row_of, routing.offsets, routing.block_row)] == [
            (6, 2),
            (4,),
            (5,),
        ]
        assert (routing.slot_of.dtype, routing.slot_of.device.type) == (torch.int32, "cuda")
        energies = (
            column_energy(x, index, None, 3),
            column_energy_sorted(x, torch.empty(4, device="cuda", dtype=torch.int32)),
        )
        for energy in energies:
            assert (energy.shape, energy.dtype, energy.device.type) == ((3, 8), torch.float64, "cuda")


def test_works_without_triton():
    # as on a Mac: importing triton fails, the references serve
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, moesparse_kernels as k\n"
        "w = k.nm_prune(torch.tensor([[3., 1., 2., 4., 0., 0., 0., 0.]]), torch.ones(8))\n"
        "assert w.tolist() == [[3, 0, 0, 4, 0, 0, 0, 0]], w\n"
        "assert k.column_energy(torch.ones(2, 8), torch.zeros(2, 1).long(), None, 1).sum() == 16\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
