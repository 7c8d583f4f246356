"""The compiled CPU kernels: every instruction path this machine has, in turn, against fp64 and against plain torch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_cases import ACTIVATE, SHAPES, Layer, assert_layer, gated_hidden, make_layer, prune_2_4

from moesparse_kernels import native_library, row_order
from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm
from moesparse_kernels.moe_native import gemm_native

NATIVE = native_library.library()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(native_library.reason_without()))
PATHS = NATIVE.paths if NATIVE is not None else ()

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# every group size; few, half, most and all kept; 2:4 has code of its own
PATTERNS = ((2, 4), (1, 4), (3, 4), (4, 4), (3, 8), (4, 8), (5, 16), (8, 16), (1, 32), (16, 32), (29, 32))
ANYHOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=PATHS)
def path(request):
    NATIVE.force_path(request.param)
    yield request.param
    NATIVE.force_path(None)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def random_mask(E, N, K, n, m, generator):
    keep = torch.rand(E, N, K // m, m, generator=generator).topk(n, dim=-1).indices
    return torch.zeros(E, N, K // m, m, dtype=torch.bool).scatter_(-1, keep, True).flatten(-2)


def random_packed(E, N, K, n, m, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(E, N, K, generator=generator) * K**-0.5).to(dtype)
    return NMWeight.pack(weight, random_mask(E, N, K, n, m, generator), n, m)


def packed(layer, n=2, m=4):
    return NMWeight.pack(layer.gate_up, n=n, m=m), NMWeight.pack(layer.down, n=n, m=m)


# K that is no multiple of the 32 columns of a step, less than one, and more than a piece that stays in L1;
# N around a group of 4 rows and around tiles of 32 and 64; T around every block size and tier
columns = st.sampled_from((8, 24, 32, 40, 64, 96, 1000, 1056, 2080))
sizes = st.tuples(
    st.sampled_from(PATTERNS),
    columns,
    st.sampled_from((1, 3, 4, 5, 31, 64, 65, 130)),
    st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 23, 24, 29, 200)),
    st.sampled_from(DTYPES),
)


@ANYHOW
@given(size=sizes, seed=st.integers(0, 2**16))
def test_product_against_fp64(path, size, seed):
    (n, m), K, N, T, dtype = size
    K = K // max(m, 8) * max(m, 8) or m
    assert_product(random_packed(1, N, K, n, m, dtype, seed), T, seed)


def assert_product(weight, T, seed):
    _, _, K = weight.shape
    dtype = weight.dtype
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    dense = weight.unpack()
    product = gemm_native(x, weight, 0)
    exact = x.double() @ dense[0].double().T
    # the result is rounded once, half a unit in the last place (subnormals of fp16: half their step); a lane adds at
    # most K / 8 products and what the lanes and pieces give, each addition rounding to fp32
    terms = x.double().abs() @ dense[0].double().abs().T
    bound = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + terms * (K / 8 + 16) * 2.0**-24 + 2.0**-25
    assert ((product.double() - exact).abs() <= bound).all()
    # zeros of a dense weight change no sum, and the order of the products is the same
    assert torch.equal(product, gemm_native(x, dense, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [(2, 4), (3, 8)])
# blocks of few tokens whose piece of x is 32 and 54 steps of columns; tokens that share decoded weights, 16 or 32 steps
@pytest.mark.parametrize("T", [7, 12, 30])
def test_columns_of_several_pieces(path, T, pattern, dtype):
    assert_product(random_packed(1, 9, 2104, *pattern, dtype), T, seed=0)


def sum_error(terms: torch.Tensor, count: int) -> torch.Tensor:
    """What an fp32 sum of products may be off: a lane adds at most count / 8, then lanes and pieces are added."""
    return terms * (count / 8 + 16) * 2.0**-24


def hidden_and_error(layer: Layer, projected: torch.Tensor, off: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h of a projection that is off by so much, and what h may be off: the slope of the activation times that, and 1e-6
    of the argument for the function itself."""
    slope = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "swigluoai": 1.1}.get(layer.activation, 1.0)
    if not layer.gated:
        gate, gate_off, factor, factor_off = projected, off, torch.ones_like(projected), torch.zeros_like(off)
        hidden = ACTIVATE[layer.activation](projected)
    elif layer.activation == "swigluoai":
        gate, gate_off, factor_off = projected[::2], off[::2], off[1::2]
        factor = projected[1::2].clamp(-7, 7) + 1
        hidden = gated_hidden("swigluoai", projected)
    else:
        (gate, factor), (gate_off, factor_off) = projected.chunk(2), off.chunk(2)
        hidden = gated_hidden(layer.activation, projected)
    if layer.activation == "relu2":
        # the slope at the far end of what the gate may be; the value of relu2 is at most the slope times the gate
        slope = 2 * (gate.abs() + gate_off)
    within = slope * (gate_off * (factor.abs() + factor_off) + gate.abs() * factor_off)
    return hidden, within + slope * gate.abs() * factor.abs() * 1e-6


def exact_and_bound(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer in fp64, token by token, and how far from it the kernels may be."""
    rounding = torch.finfo(layer.x.dtype).eps / 2 * 1.01
    E, H, I = layer.down.shape
    exact, bound = torch.zeros(2, len(layer.x), H, dtype=torch.float64)
    for t, k in torch.cartesian_prod(torch.arange(len(layer.x)), torch.arange(layer.top_k_index.shape[1])).tolist():
        e = int(layer.top_k_index[t, k])
        if not 0 <= e < E:
            continue
        x, up, down = layer.x[t].double(), layer.gate_up[e].double(), layer.down[e].double()
        up_bias, down_bias = (
            0.0 if bias is None else bias[e].double() for bias in (layer.gate_up_bias, layer.down_bias)
        )
        off = sum_error(up.abs() @ x.abs() + abs(up_bias), H)
        hidden, hidden_off = hidden_and_error(layer, up @ x + up_bias, off)
        hidden_off = hidden_off + hidden.abs() * rounding + 2.0**-25
        row = down @ hidden + down_bias
        row_off = down.abs() @ hidden_off + sum_error(down.abs() @ hidden.abs() + abs(down_bias), I)
        gate = layer.top_k_weights[t, k].double().abs()
        exact[t] += layer.top_k_weights[t, k].double() * row
        bound[t] += gate * (row_off + row.abs() * 4 * 2.0**-24)
    return exact, bound * 1.01 + exact.abs() * rounding + 2.0**-25


@ANYHOW
@given(
    sizes=st.tuples(
        st.integers(0, 40),
        st.integers(1, 4),
        st.sampled_from((4, 7)),
        st.sampled_from((40, 64, 96)),
        st.sampled_from((8, 40, 72, 160)),
    ),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from((*ACTIVATE, "swigluoai")),
    gated=st.booleans(),
    bias=st.booleans(),
    routing=st.sampled_from(("spread", "one", "sentinels")),
    ids=st.sampled_from((torch.int32, torch.int64)),
    gates=st.sampled_from((torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    seed=st.integers(0, 2**16),
)
def test_layer_against_fp64(path, sizes, dtype, activation, gated, bias, routing, ids, gates, seed):
    if routing == "sentinels" and sizes[0] == 0:
        routing = "spread"
    options = {"bias": bias, "gated": gated or activation == "swigluoai", "routing": routing, "seed": seed}
    layer = make_layer(*sizes, dtype=dtype, activation=activation, **options)
    layer = replace(layer, top_k_index=layer.top_k_index.to(ids), top_k_weights=layer.top_k_weights.to(gates))
    out = moe_nm(*layer.routed, *packed(layer), **layer.options, backend="native")
    exact, bound = exact_and_bound(layer)
    assert out.dtype == dtype and ((out.double() - exact).abs() <= bound).all()
    dense = moe_dense(*layer.routed, layer.gate_up, layer.down, **layer.options, backend="native")
    assert torch.equal(out, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_with_a_reason(path, shape, dtype):
    *sizes, options = shape
    layer = make_layer(*sizes, dtype=dtype, **options)
    assert_layer(moe_nm(*layer.routed, *packed(layer), **layer.options, backend="native"), layer, "native")


def test_tokens_of_more_than_one_tile(path):
    # 420 tokens on one expert are three tiles of results, the last one small
    layer = make_layer(420, 1, 2, 96, 72, routing="one", dtype=torch.float32)
    assert_layer(moe_nm(*layer.routed, *packed(layer), backend="native"), layer, "native")


def test_two_patterns_in_a_layer(path):
    layer = make_layer(5, 2, 3, 64, 32, dtype=torch.float32)
    mask = random_mask(3, 64, 32, 1, 4, torch.Generator().manual_seed(0))
    layer = replace(layer, down=layer.down.where(mask, 0))
    down = NMWeight.pack(layer.down, mask, 1, 4)
    assert_layer(moe_nm(*layer.routed, packed(layer)[0], down, backend="native"), layer, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATE, "swigluoai"])
def test_activations_over_the_whole_range(path, activation, dtype):
    # weights that let every value through: what comes out is the activation itself
    values = torch.cat(
        [torch.linspace(-20, 20, 4001), torch.tensor([-1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e4])]
    )
    x = torch.zeros(values.numel(), 8)
    x[:, 0], x[:, 1] = values, 0.75
    x = x.to(dtype)
    gate_up = torch.zeros(1, 16, 8, dtype=dtype)
    # gate of hidden value 0 is the value, its up is 0.75; in alternating rows up is row 1
    gate_up[0, 0, 0] = gate_up[0, 1 if activation == "swigluoai" else 8, 1] = 1
    down = torch.zeros(1, 8, 8, dtype=dtype)
    down[0, 0, 0] = 1
    ids, gates = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    out = moe_dense(x, ids, gates, gate_up, down, activation=activation, backend="native")[:, 0].double()
    projected = torch.stack([x[:, 0], x[:, 1]], -1).double()
    exact = gated_hidden(activation, projected).squeeze(-1)
    eps = torch.finfo(dtype).eps
    # rounded once, to infinity where fp16 ends; the functions in fp32 are off by at most 1e-6 of their argument, where
    # they are a difference of ones times it
    argument = projected[:, 0].abs().clamp(max=20) * (projected[:, 1].abs() + 1)
    exact = exact.where(exact.abs() < torch.finfo(dtype).max, torch.inf)
    close = (out - exact).abs() <= exact.abs() * (eps / 2 + 1e-6) + argument * 1e-6
    assert (close | (out == exact)).all(), values[~(close | (out == exact))]


def test_a_function_as_activation(path):
    layer = make_layer(5, 2, 3, 64, 32, dtype=torch.float32, bias=True, activation="swigluoai")
    weights = packed(layer)
    biases = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias}
    out = moe_nm(
        *layer.routed, *weights, activation=lambda rows: gated_hidden("swigluoai", rows), backend="native", **biases
    )
    assert_layer(out, layer, "a function")
    # the same rows in the same order as the other backends give and take
    rows = []
    for backend in ("native", "reference"):
        kept = lambda projected: rows.append(projected) or projected[:, :32].contiguous()  # noqa: E731
        moe_nm(*layer.routed, *weights, activation=kept, backend=backend, **biases)
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)


@ANYHOW
@given(
    pattern=st.sampled_from(PATTERNS),
    K=columns,
    N=st.sampled_from((1, 3, 70)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_unpack_any_bit_pattern(path, pattern, K, N, dtype, seed):
    n, m = pattern
    K = K // max(m, 8) * max(m, 8) or m
    weight = random_packed(2, N, K, n, m, dtype, seed)
    # NaN with any payload, infinities, -0.0 and subnormals are among them
    random = torch.Generator().manual_seed(seed)
    half = torch.randint(-(2**15), 2**15, (2, *bits(weight.values).shape), generator=random)
    bits(weight.values).copy_(half[0] if dtype.itemsize == 2 else half[0] << 16 | half[1] & 0xFFFF)
    wanted = torch.zeros(N, K, dtype=bits(weight.values).dtype)
    wanted[weight.mask()[1]] = bits(weight.values)[1].reshape(-1)
    # one element behind the result, which must stay
    room = torch.full((N * K + 1,), 7, dtype=wanted.dtype)
    out = room[:-1].view(dtype).view(N, K)
    assert native_library.unpack_rows(weight.values[1], weight.index[1], n, m, out)
    assert torch.equal(bits(out), wanted) and room[-1] == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unpack_past_the_caches(path, dtype):
    # large enough for streaming stores; rows of 8,200 bytes do not all begin at a cache line
    weight = random_packed(1, 2100, 4104, 2, 4, dtype)
    wanted = torch.zeros(2100, 4104, dtype=bits(weight.values).dtype)
    wanted[weight.mask()[0]] = bits(weight.values).reshape(-1)
    assert torch.equal(bits(weight.unpack())[0], wanted)


def test_unpack_is_what_plain_torch_writes():
    for n, m in PATTERNS:
        weight = random_packed(1, 9, 320, n, m, torch.float16)
        here = weight.unpack()
        with native_library.turned_off():
            assert torch.equal(bits(weight.unpack()), bits(here)), (n, m)


def test_special_values(path):
    weight = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    weight[0, :, 0], weight[0, :, 5] = 1.0, 2.0
    weight[0, 1, 5], weight[0, 2, 5], weight[0, 3, 5] = torch.nan, torch.inf, -torch.inf
    weight[0, 4, 0] = weight[0, 4, 5] = -0.0
    x = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) + 0.5
    # the third token has a NaN where every row is pruned, and the second an infinity at a weight of -0.0
    x[2, 3], x[1, 5] = torch.nan, torch.inf
    out, wanted = gemm_native(x, NMWeight.pack(weight), 0), F.linear(x, weight[0])
    for same in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(same(out), same(wanted)), same.__name__
    assert out[2].isnan().all() and out[0, 4] == 0


def test_subnormal_weights(path):
    weight = torch.zeros(1, 8, 64)
    weight[0, :, 0] = 1e-39
    x = torch.zeros(1, 64)
    x[0, 0] = 1e30
    for dtype in (torch.bfloat16, torch.float32):
        stored = weight.to(dtype)
        out = gemm_native(x.to(dtype), NMWeight.pack(stored), 0)
        exact = (x.to(dtype).double() @ stored[0].double().T).to(dtype)
        # bf16 products of AVX-512 flush them, those of fp32 do not
        flushed = path == "avx512_bf16" and dtype == torch.bfloat16
        assert torch.equal(out, torch.zeros_like(exact) if flushed else exact), dtype


def test_dropped_slots_add_nothing(path):
    layer = make_layer(5, 3, 4, 64, 32, dtype=torch.float32)
    wanted = moe_nm(*layer.routed, *packed(layer), backend="native")
    # a fourth choice of every token outside of the experts, with a gate that would spoil every sum
    outside = torch.tensor([[-1], [4], [2**31], [-(2**40)], [1000]])
    index = torch.cat([outside, layer.top_k_index], dim=1)
    gates = torch.cat([torch.full((5, 1), torch.nan), layer.top_k_weights], dim=1)
    assert torch.equal(moe_nm(layer.x, index, gates, *packed(layer), backend="native"), wanted)
    nothing = torch.full((5, 3), 4)
    assert torch.equal(
        moe_nm(layer.x, nothing, layer.top_k_weights * torch.nan, *packed(layer), backend="native"),
        torch.zeros(5, 64),
    )


def test_dense_rows_with_any_stride(path):
    layer = make_layer(5, 2, 3, 64, 32)
    wanted = moe_dense(*layer.routed, layer.gate_up, layer.down, backend="native")
    wide = [torch.cat([weight, weight], dim=-1)[..., : weight.shape[-1]] for weight in (layer.gate_up, layer.down)]
    assert not wide[0].is_contiguous()
    assert torch.equal(moe_dense(*layer.routed, *wide, backend="native"), wanted)
    # a dense matrix may have any number of columns
    x = torch.randn(3, 45, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(1, 6, 45, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        product = gemm_native(x.to(dtype), weight.to(dtype), 0)
        exact = x.to(dtype).double() @ weight[0].to(dtype).double().T
        torch.testing.assert_close(product.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("T", [1, 7, 40, 300])
def test_threads_change_no_bit(path, T):
    # chunks of 64 rows for one thread, of 32 for more; dropped rows, an empty expert, several tiles
    layer = make_layer(T, 2, 8, 200, 136, routing="sentinels")
    weights, results = packed(layer), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(moe_nm(*layer.routed, *weights, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_same_bits_without_torch_threads(path):
    layer = make_layer(40, 2, 8, 200, 136)
    wanted = moe_nm(*layer.routed, *packed(layer), backend="native")
    assert NATIVE.threads
    NATIVE._library.moesparse_set_threads(None, None)
    try:
        assert torch.equal(moe_nm(*layer.routed, *packed(layer), backend="native"), wanted)
    finally:
        NATIVE._use_torch_threads()


def test_compiles_and_exports():
    layer = make_layer(5, 2, 3, 64, 32)
    weights = packed(layer)

    class Experts(torch.nn.Module):
        def forward(self, x, index, gates):
            return moe_nm(x, index, gates, *weights, backend="native") + 1

    wanted = Experts()(*layer.routed)
    compiled = torch.compile(Experts(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*layer.routed), wanted)
    exported = torch.export.export(Experts(), layer.routed)
    assert torch.equal(exported.module()(*layer.routed), wanted)


def test_swigluoai_wants_a_gate():
    layer = make_layer(1, 1, 1, 64, 32, gated=False, activation="relu")
    with pytest.raises(ValueError, match=r'activation "swigluoai" must be gated, got gated=False'):
        moe_nm(*layer.routed, *packed(layer), activation="swigluoai", gated=False)


def test_rows_of_a_real_layout():
    # what every test here stands on: the bitmask's bits are columns, lowest first
    weight = prune_2_4(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)))
    layer = Layer(None, None, None, weight, weight, None, None, "silu", True)
    assert torch.equal(gemm_native(torch.eye(32), packed(layer)[0], 0), weight[0].T)
    assert row_order.unpack_bits(packed(layer)[0].index[0]).sum() == 64
