"""Routing, grouped GEMMs, epilogues and the whole layer, kernel by kernel, against plain torch and fp64."""

import pytest
import torch
import triton
import triton.language as tl
from moe_cases import ACTIVATE, SHAPES, assert_layer, assert_within_budget, make_layer, oracle, prune_2_4

from moesparse_kernels import moe, moe_gpu, route, routing
from moesparse_kernels.epilogue import activate_rows, combine
from moesparse_kernels.grouped_dense import grouped_dense
from moesparse_kernels.grouped_nm import grouped_nm
from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm
from moesparse_kernels.own_slots import own_slots, padded_experts
from moesparse_kernels.schedule import block_bound, route_torch
from moesparse_kernels.tuning import GroupedConfig
from moesparse_kernels.unpack_fragment import unpack_fragment


@triton.jit
def _own_slots_kernel(ids_ptr, out_ptr, R, E, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    expert, slots, count = own_slots(ids_ptr, block, R, E, BLOCK_M, EXPERTS)
    tl.store(out_ptr + block * (BLOCK_M + 2), expert)
    tl.store(out_ptr + block * (BLOCK_M + 2) + 1, count)
    tl.store(out_ptr + block * (BLOCK_M + 2) + 2 + tl.arange(0, BLOCK_M), slots)


def pack(weight):
    return NMWeight.pack(weight, n=2, m=4).to_order("fragment")


def force(monkeypatch, most_slots=None, **config):
    """Give every grouped GEMM these launch sizes, but packed ones their own block_n; a routing above `most_slots`."""

    packed_n = config.pop("packed_n", 128)

    def chosen(op, *_):
        return GroupedConfig(**(config | {"block_n": packed_n} if op.endswith("nm") else config))

    monkeypatch.setattr(moe_gpu, "grouped_config", chosen)
    if most_slots is not None:
        monkeypatch.setattr(moe_gpu, "MOST_SLOTS", most_slots)


@pytest.mark.parametrize(
    ("T", "top_k", "E", "block_m", "dtype"),
    [
        (1, 2, 8, 16, torch.int64),  # one token
        (0, 2, 4, 16, torch.int64),  # no tokens
        (40, 1, 7, 16, torch.int32),  # no power of two; int32 ids
        (37, 4, 4, 4, torch.int64),  # top_k = E, blocks smaller than an expert's rows
        (300, 8, 128, 16, torch.int64),  # several chunks
        (30, 8, 512, 32, torch.int64),  # experts that do not fit one table
    ],
)
@pytest.mark.parametrize("ids", ["spread", "one expert", "sentinels", "only sentinels"])
def test_route(T, top_k, E, block_m, dtype, ids, monkeypatch):
    monkeypatch.setattr(routing, "CHUNK", 256)
    top_k_index = torch.rand(T, E, generator=torch.Generator().manual_seed(T)).topk(min(top_k, E)).indices.to(dtype)
    if ids == "one expert":
        top_k_index.fill_(E - 1)
    if ids == "sentinels":
        top_k_index = top_k_index + (top_k_index % 3 == 0) * E - (top_k_index % 5 == 0) * 2 * E
    if ids == "only sentinels":
        top_k_index.fill_(E)
    actual, wanted = route(top_k_index, E, block_m), route_torch(top_k_index, E, block_m)
    for name in ("slot_of", "row_of", "offsets", "block_expert", "block_row"):
        torch.testing.assert_close(getattr(actual, name), getattr(wanted, name), rtol=0, atol=0, msg=name)


# a piece of 64 and around it, one chunk and around it, chunks of no power of two
@pytest.mark.parametrize("slots", [1, 63, 64, 65, 255, 256, 257, 400, 1100])
def test_route_at_every_size(slots, monkeypatch):
    monkeypatch.setattr(routing, "CHUNK", 256)
    monkeypatch.setattr(routing, "_MAX_CHUNKS", 3)
    top_k_index = torch.randint(-1, 6, (slots, 1), generator=torch.Generator().manual_seed(slots))
    actual, wanted = route(top_k_index, 5, 16), route_torch(top_k_index, 5, 16)
    for name in ("slot_of", "row_of", "offsets", "block_expert", "block_row"):
        torch.testing.assert_close(getattr(actual, name), getattr(wanted, name), rtol=0, atol=0, msg=name)


def test_route_is_one_kernel_for_all_batches(monkeypatch):
    constants = {"_histogram_kernel": set(), "_sort_kernel": set()}

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **named: constants[self.name].add(tuple(named.items()))

    for name in constants:
        monkeypatch.setattr(routing, name, Kernel(name))
    for tokens in (1, 2, 8, 32, 128, 129, 256, 1000, 4096, 16384):
        routing.sort_slots(torch.zeros(tokens, 8, dtype=torch.int64), 128, 16)
    assert {name: len(found) for name, found in constants.items()} == {"_histogram_kernel": 1, "_sort_kernel": 1}


# with a routing launched before, and with none
@pytest.mark.parametrize(("dtype", "most_slots"), [(torch.bfloat16, 0), (torch.float16, 128)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layer(shape, dtype, most_slots, monkeypatch):
    *sizes, options = shape
    layer = make_layer(*sizes, dtype=dtype, **options)
    force(monkeypatch, most_slots, block_m=16, block_n=64, block_k=64)
    sparse = moe_nm(*layer.routed, pack(layer.gate_up), pack(layer.down), **layer.options, backend="triton")
    dense = moe_dense(*layer.routed, layer.gate_up, layer.down, **layer.options, backend="triton")
    assert_layer(sparse, layer, "packed")
    assert_layer(dense, layer, "dense")


@pytest.mark.parametrize(
    "config",
    [
        {"block_m": 16, "split_k": 2},
        {"block_m": 32, "swap": True},
        {"block_m": 64, "swap": True, "split_k": 2, "group_m": 4},
        {"block_m": 16, "group_m": 3},
    ],
    ids=str,
)
def test_launch_sizes_change_nothing_but_rounding(config, monkeypatch):
    # 40 rows on one expert are several blocks of 16; I = 256 gives both halves of two tiles; H = 136 leaves a K tail
    layer = make_layer(40, 1, 2, 136, 256, routing="one", bias=True)
    force(monkeypatch, block_n=64, block_k=32, **config)
    sparse = moe_nm(*layer.routed, pack(layer.gate_up), pack(layer.down), **layer.options, backend="triton")
    dense = moe_dense(*layer.routed, layer.gate_up, layer.down, **layer.options, backend="triton")
    assert_layer(sparse, layer, "packed")
    assert_layer(dense, layer, "dense")
    again = moe_nm(*layer.routed, pack(layer.gate_up), pack(layer.down), **layer.options, backend="triton")
    assert torch.equal(sparse, again)


class Counted:
    """A kernel that notes its name at every launch."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.kernel.__name__)
        return self.kernel[grid]


# slots of several blocks of an expert; sentinels; a program of half as many weight rows
@pytest.mark.parametrize(
    ("sizes", "options", "packed_n"),
    [
        ((18, 1, 2, 136, 128), {"routing": "one"}, 64),
        ((5, 3, 4, 128, 128), {"routing": "sentinels", "bias": True}, 128),
    ],
    ids=str,
)
def test_without_a_routing_the_bits_are_the_same(sizes, options, packed_n, monkeypatch):
    layer = make_layer(*sizes, **options)
    packed, launched = (pack(layer.gate_up), pack(layer.down)), []
    for module in (moe_gpu.grouped_nm.__globals__, moe_gpu.grouped_dense.__globals__, combine.__globals__):
        for name in ("_grouped_nm_kernel", "_grouped_dense_kernel", "_combine_kernel"):
            if name in module:
                monkeypatch.setitem(module, name, Counted(module[name], launched))
    monkeypatch.setitem(routing.sort_slots.__globals__, "_sort_kernel", Counted(routing._sort_kernel, launched))
    results = []
    for most_slots in (0, 128):
        force(monkeypatch, most_slots, block_m=16, block_n=64, block_k=64, packed_n=packed_n)
        sparse = moe_nm(*layer.routed, *packed, **layer.options, backend="triton")
        dense = moe_dense(*layer.routed, layer.gate_up, layer.down, **layer.options, backend="triton")
        results.append((sparse, dense))
    assert_layer(results[1][0], layer, "packed")
    for before, without in zip(*results, strict=True):
        assert torch.equal(before, without)
    both = [[f"_grouped_{kind}_kernel"] * 2 + ["_combine_kernel"] for kind in ("nm", "dense")]
    assert launched == ["_sort_kernel", *both[0], "_sort_kernel", *both[1], *both[0], *both[1]]


# one slot, blocks that are full and one slot more, no slot of any expert
@pytest.mark.parametrize(
    ("R", "E", "block_m"), [(1, 4, 16), (33, 2, 16), (128, 1, 32), (100, 128, 16), (5, 3, 16), (90, 90, 4)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_own_slots(R, E, block_m, dtype):
    ids = torch.randint(-1, E + 1, (R, 1), generator=torch.Generator().manual_seed(R), dtype=dtype)
    if R == 5:
        ids.fill_(E)
    blocks = block_bound(R, E, block_m)
    out = torch.full((blocks, block_m + 2), -7, dtype=torch.int32)
    _own_slots_kernel[(blocks,)](ids, out, R, E, BLOCK_M=block_m, EXPERTS=padded_experts(R, E))
    found = {}
    for expert, count, *slots in out.tolist():
        if expert >= 0:
            assert 0 < count <= block_m
            found.setdefault(expert, []).append(slots[:count])
    wanted = {}
    for slot, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < E:
            wanted.setdefault(expert, []).append(slot)
    cut = {e: [slots[i : i + block_m] for i in range(0, len(slots), block_m)] for e, slots in wanted.items()}
    assert {expert: sorted(cuts) for expert, cuts in found.items()} == cut


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_products_accumulate_in_fp32(packed, swap):
    # partial sums leave in fp32: a product that was rounded to 16 bits on the way is far outside this budget
    layer = make_layer(6, 2, 3, 256, 128)
    routing = route(layer.top_k_index, 3, 16)
    config = GroupedConfig(16, block_n=128 if packed and swap else 64, block_k=64, split_k=2, swap=swap)
    how = {"gather": True, "keep_splits": True}
    if packed:
        weight = pack(layer.gate_up)
        partial = grouped_nm(layer.x, weight.values, weight.index, 256, routing, layer.top_k_index, config, **how)
    else:
        partial = grouped_dense(layer.x, layer.gate_up, routing, layer.top_k_index, config, **how)
    assert partial.dtype == torch.float32 and partial.shape == (2, 12, 256)
    slot = routing.slot_of.long()
    weight, x = layer.gate_up[layer.top_k_index.reshape(-1)[slot]], layer.x[slot // 2]
    fp64 = torch.einsum("rnk,rk->rn", weight.double(), x.double())
    assert_within_budget(partial.sum(0), torch.einsum("rnk,rk->rn", weight.float(), x.float()), fp64, "partial sums")


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("gated", [True, False])
def test_activation_fp32(activation, gated):
    partial = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)) * 2
    bias = torch.randn(2, 24)
    top_k_index = torch.tensor([[0], [1], [1], [2], [0]])
    routing = route(top_k_index, 2, 16)
    out = activate_rows(
        partial, bias, top_k_index, routing.slot_of, routing.offsets, activation, gated, dtype=torch.float32
    )

    def plain(dtype):
        value = partial.to(dtype).sum(0)[:4] + bias.to(dtype)[[0, 0, 1, 1]]
        gate, up = value.chunk(2, dim=-1)
        return ACTIVATE[activation](gate) * up if gated else ACTIVATE[activation](value)

    assert_within_budget(out[:4], plain(torch.float32), plain(torch.float64), activation)
    assert out[4].isnan().all(), "the row of the dropped slot was written"


def test_combine_fp32():
    random = torch.Generator().manual_seed(2)
    rows, gates = torch.randn(2, 6, 40, generator=random), torch.rand(3, 2, generator=random)
    top_k_index = torch.tensor([[1, 0], [5, 1], [-1, 9]])
    # a sentinel's gate must not matter
    gates[2] = torch.nan
    bias = torch.randn(2, 40)
    row_of = route(top_k_index, 2, 16).row_of
    out = combine(rows, bias, top_k_index, gates, row_of, torch.float32)

    def plain(dtype):
        row = rows.to(dtype).sum(0)
        first = gates[0, 0].to(dtype) * (row[1] + bias[1]) + gates[0, 1].to(dtype) * (row[0] + bias[0])
        return torch.stack([first, gates[1, 1].to(dtype) * (row[2] + bias[1]), torch.zeros(40, dtype=dtype)])

    assert_within_budget(out, plain(torch.float32), plain(torch.float64), "combine")
    assert torch.equal(out[2], torch.zeros(40))


def test_callable_activation_and_forced_backends(monkeypatch):
    layer = make_layer(5, 2, 3, 128, 128, bias=True)
    force(monkeypatch, block_m=16, block_n=64, block_k=64)

    def gate(projected):
        gate, up = projected.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    bias = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias}
    packed = pack(layer.gate_up), pack(layer.down)
    fused = moe_nm(*layer.routed, *packed, **bias, backend="triton")
    called = moe_nm(*layer.routed, *packed, **bias, activation=gate, backend="triton")
    fp64 = oracle(layer, torch.float64, rounded=False)
    # the function sees [gate | up] rounded: one more rounding than the fused epilogue
    assert_within_budget(called, fused, fp64, "callable", slack=2.0)
    assert torch.equal(
        moe_dense(*layer.routed, layer.gate_up, layer.down, **bias, activation=gate, backend="triton"), called
    )


def test_what_a_capture_takes_has_run_before(monkeypatch):
    # "auto" takes the library where it waits for the device; a captured call of the same sizes takes our kernels
    layer = make_layer(5, 2, 3, 128, 128)
    force(monkeypatch, block_m=16)
    packed, ran = (pack(layer.gate_up), pack(layer.down)), []
    monkeypatch.setattr(moe, "choose_nm_backend", lambda backend, *_: "semi_structured")
    monkeypatch.setattr(moe_gpu, "_WARM", set())
    for name, width in (("up_semi_structured", 128), ("down_semi_structured", 128)):
        monkeypatch.setattr(moe_gpu, name, lambda *_, width=width: torch.zeros(10, width, dtype=layer.x.dtype))
    monkeypatch.setattr(moe_gpu, "grouped_nm", lambda *a, **how: ran.append(how["gather"]) or grouped_nm(*a, **how))
    out = moe_nm(*layer.routed, *packed)
    assert ran == [True, False] and not out.any()
    moe_nm(*layer.routed, *packed)
    assert ran == [True, False]
    moe_nm(*layer.routed, *packed, activation="relu")
    assert ran == [True, False, True]
    # asked for by name it cannot be captured at all
    moe_nm(*layer.routed, *packed, activation="gelu", backend="semi_structured")
    assert ran == [True, False, True]


def test_torch_grouped_mm_backend():
    layer = make_layer(9, 2, 4, 64, 32, routing="sentinels", bias=True)
    out = moe_dense(*layer.routed, layer.gate_up, layer.down, **layer.options, backend="grouped_mm")
    reference = moe_dense(*layer.routed, layer.gate_up, layer.down, **layer.options, backend="reference")
    assert_within_budget(out, reference, oracle(layer, torch.float64, rounded=False), "grouped_mm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unpack_fragment_bit_for_bit(dtype):
    # no multiples of 128: padding is cut off; -0.0 and subnormals are values like any other
    weight = prune_2_4(torch.randn(2, 130, 136, generator=torch.Generator().manual_seed(3)).to(dtype))
    weight[0, 0, :8] = torch.tensor([-0.0, 1e-7, 0, 0, 0, 0, 0, 0]).to(dtype)
    assert torch.equal(unpack_fragment(pack(weight)).view(torch.int16), weight.view(torch.int16))
