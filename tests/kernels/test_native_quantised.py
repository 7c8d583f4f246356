"""Weights of 8 and 4 bits: their layout byte by byte, and the compiled kernels against whole numbers in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_cases import ACTIVATE, SHAPES, gated_hidden, make_layer, oracle

from moesparse_kernels import NMWeight, QuantisedWeight, moe_dense, moe_quantised, native_library
from moesparse_kernels.quantised_layer import gemm_quantised

NATIVE = native_library.library()
PATHS = NATIVE.paths if NATIVE is not None else ()
needs_native = pytest.mark.skipif(NATIVE is None, reason=str(native_library.reason_without()))
ANYHOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# None is dense; every group size, few to all kept; 2:4 has code of its own
PATTERNS = (None, (2, 4), (1, 4), (4, 4), (3, 8), (5, 16), (1, 32), (29, 32))
LEVELS = {8: 127, 13: 4095}


@pytest.fixture(params=PATHS)
def path(request):
    NATIVE.force_path(request.param)
    yield request.param
    NATIVE.force_path(None)


def random_weight(E, N, K, pattern, bits, group, scales_dtype=torch.float32, seed=0):
    """Any bytes that the layout allows: also -128, which `quantise` never makes, but not one byte more."""
    random = torch.Generator().manual_seed(seed)
    n, m = pattern or (1, 1)
    size = -(-(K // m * n) * bits // 8)
    low, high, dtype = (-128, 128, torch.int8) if bits == 8 else (0, 256, torch.uint8)
    values = torch.randint(low, high, (E, N, size), generator=random, dtype=dtype)
    scales = (torch.rand(E, N, -(-K // group) if group else 1, generator=random) + 0.1).to(scales_dtype)
    index = None
    if pattern:
        keep = torch.rand(E, N, K // m, m, generator=random).topk(n, dim=-1).indices
        mask = torch.zeros(E, N, K // m, m, dtype=torch.bool).scatter_(-1, keep, True).view(E, N, K // 8, 8)
        index = (mask * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
    return QuantisedWeight(values, scales, index, (E, N, K), n, m, bits, group)


def plain_unpack(weight, expert):
    """The values one by one, as the layout says."""
    _, N, K = weight.shape
    values, index = weight.values[expert].tolist(), None if weight.index is None else weight.index[expert].tolist()
    dense = torch.zeros(N, K, dtype=torch.float64)
    for row in range(N):
        next_value = 0
        for column in range(K):
            if index is not None and not index[row][column // 8] >> column % 8 & 1:
                continue
            if weight.bits == 8:
                value = values[row][next_value]
            else:
                value = (values[row][next_value // 2] >> 4 * (next_value % 2) & 15) - 8
            scale = weight.scales[expert, row, column // weight.group if weight.group else 0]
            dense[row, column] = value * scale.double()
            next_value += 1
    return dense


def whole_numbers(x, x_bits):
    """x as the kernels promise to bring it to whole numbers, and their scales, in fp64."""
    most = x.float().abs().amax(-1, keepdim=True)
    levels = torch.full_like(most, LEVELS[x_bits])
    factor = torch.where(most > 2.0**-100, levels / most, 0)
    return (x.double() * factor.double()).round(), torch.where(most > 2.0**-100, most / levels, 0).double()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32), (4, 0), (4, 64), (4, 128)])
def test_unpack_reads_the_layout(pattern, bits, group):
    # three values of a row for 3:8, so that half a byte is left over; a group that ends with the row
    K = {(1, 32): 160, (29, 32): 160, (5, 16): 48, (3, 8): 8}.get(pattern, 72)
    weight = random_weight(2, 3, K, pattern, bits, group, torch.bfloat16)
    assert torch.equal(weight.unpack_expert(1).double(), plain_unpack(weight, 1))
    assert torch.equal(weight.unpack(torch.float16)[1], weight.unpack_expert(1).half())


def test_bytes_of_an_example():
    # the mask of the example in docs/packed-format.md
    dense = torch.tensor([[7.0, 0, 0, -2, 0, 5, 3, 0], [0, 0, 0, 0, 7, 0, 0, 0]]).unsqueeze(0)
    packed = NMWeight.pack(dense)
    half = QuantisedWeight.quantise(packed, 4)
    # 7 + 8 in the low half, -2 + 8 in the high one; kept zeros are 8
    assert half.values.tolist() == [[[0x6F, 0xBD], [0x88, 0x8F]]]
    assert half.index.tolist() == [[[0x69], [0x33]]] and half.scales.tolist() == [[[1.0], [1.0]]]
    full = QuantisedWeight.quantise(packed, 8)
    assert full.values.tolist() == [[[127, -36, 91, 54], [0, 0, 127, 0]]]
    assert QuantisedWeight.quantise(dense, 4).values.tolist() == [[[0x8F, 0x68, 0xD8, 0x8B], [0x88, 0x88, 0x8F, 0x88]]]


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 8)], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 128), (4, 32)])
def test_quantise_is_off_by_half_a_step(pattern, bits, group):
    weight = torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    if pattern:
        n, m = pattern
        keep = weight.abs().unflatten(-1, (-1, m)).topk(n, dim=-1).indices
        mask = torch.zeros(2, 5, 200 // m, m, dtype=torch.bool).scatter_(-1, keep, True).flatten(-2)
        weight = weight * mask
    weight[1, 2] = 0
    given = NMWeight.pack(weight, mask, *pattern) if pattern else weight
    made = QuantisedWeight.quantise(given, bits, group)
    width = group or 200
    largest = F.pad(weight.float().abs(), (0, -200 % width)).unflatten(-1, (-1, width)).amax(-1)
    # a bf16 scale may be too small for the largest, by half a unit in its last place
    step = (largest / (127 if bits == 8 else 7)).repeat_interleave(width, -1)[..., :200]
    slack = 0.5 if made.scales.dtype == torch.float32 else 0.5 + 127 * 2**-9
    assert ((made.unpack() - weight.float()).abs() <= step * slack * 1.01).all()
    if pattern:
        assert torch.equal(made.index, given.index) and made.validate() is made


@ANYHOW
@given(
    sizes=st.tuples(
        st.sampled_from((8, 24, 32, 40, 64, 72, 96, 160, 1056, 2080, 4224)),
        st.sampled_from((1, 3, 4, 5, 33, 65)),
        st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 30, 200)),
    ),
    pattern=st.sampled_from(PATTERNS),
    bits=st.sampled_from((8, 4)),
    group=st.sampled_from((0, 32, 64, 128)),
    scales_dtype=st.sampled_from(DTYPES),
    x_bits=st.sampled_from((8, 13)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@needs_native
def test_product_of_whole_numbers(path, sizes, pattern, bits, group, scales_dtype, x_bits, dtype, seed):
    K, N, T = sizes
    m = pattern[1] if pattern else 8
    K = K // max(m, 8) * max(m, 8) or m
    weight = random_weight(2, N, K, pattern, bits, group, scales_dtype, seed)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(seed)).to(dtype) if seed % 2 else None
    product = gemm_quantised(x, weight, 1, bias, x_bits=x_bits)
    assert product.dtype == dtype and product.shape == (T, N)
    whole, scale = whole_numbers(x, x_bits)
    dense = weight.unpack_expert(1).double()
    exact = whole @ dense.T * scale
    terms = whole.abs() @ dense.abs().T * scale
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    # sums of a span and lane are exact, and turned to fp32; then there is an addition for each span, those of the lanes
    # and of up to K / 2048 pieces, two scales and a bias, each rounding to fp32
    spans = K / (max(group, 64) if group else 2048) + K / 2048
    bound = terms * (spans + 12) * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 2.0**-25
    assert ((product.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("x_bits", [8, 13])
@pytest.mark.parametrize("bits", [8, 4])
@needs_native
def test_the_largest_numbers(path, bits, x_bits):
    # every product at its largest, of one sign: where sums would leave 32 bits first
    K = 8192
    values = torch.full((1, 4, K * bits // 8), -128 if bits == 8 else 0, dtype=torch.int8 if bits == 8 else torch.uint8)
    weight = QuantisedWeight(values, torch.ones(1, 4, 1), None, (1, 4, K), 1, 1, bits, 0)
    product = gemm_quantised(torch.ones(5, K), weight, 0, x_bits=x_bits)
    exact = torch.full((5, 4), -(128.0 if bits == 8 else 8.0) * K)
    torch.testing.assert_close(product, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x_bits", [8, 13])
@needs_native
def test_numbers_that_are_none(path, x_bits):
    weight = random_weight(1, 6, 96, (2, 4), 8, 0)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    alone = gemm_quantised(x[:1], weight, 0, x_bits=x_bits)
    x[1, 3], x[2, 95], x[3, 0], x[4], x[5] = torch.nan, torch.inf, -torch.inf, 0, 2.0**-101
    product = gemm_quantised(x, weight, 0, x_bits=x_bits)
    assert product[1:4].isnan().all() and (product[4:] == 0).all()
    # whatever the tokens beside it hold; more of them may change the order of the fp32 sums
    torch.testing.assert_close(product[:1], alone, rtol=1e-5, atol=1e-5)
    # a large number makes the others zeros, and does no other harm
    x[0, 7] = 1e35
    assert gemm_quantised(x[:1], weight, 0, x_bits=x_bits).isfinite().all()


def quantised_pair(layer, kind):
    pattern, up, down = kind
    pack = NMWeight.pack if pattern else lambda weight: weight
    return QuantisedWeight.quantise(pack(layer.gate_up), *up), QuantisedWeight.quantise(pack(layer.down), *down)


# under the mask and dense, one scale a row and groups, and the two projections unlike
KINDS = {
    "int8 2:4": (True, (8, 0), (8, 0)),
    "int8": (False, (8, 0), (8, 0)),
    "int4 2:4": (True, (4, 32), (4, 32)),
    "int4 and int8": (True, (4, 64), (8, 0)),
}


def layer_from_whole_numbers(layer, gate_up, down, x_bits):
    """The layer in fp64 but for what the kernels round, and what one level of h in each sum would change."""
    out, level = torch.zeros(2, *layer.x.shape, dtype=torch.float64)
    E = gate_up.shape[0]
    for t, k in torch.cartesian_prod(torch.arange(len(layer.x)), torch.arange(layer.top_k_index.shape[1])).tolist():
        e = int(layer.top_k_index[t, k])
        if not 0 <= e < E:
            continue
        whole, scale = whole_numbers(layer.x[t : t + 1], x_bits)
        projected = (whole @ gate_up.unpack_expert(e).double().T * scale).squeeze(0)
        if layer.gate_up_bias is not None:
            projected = projected + layer.gate_up_bias[e].double()
        hidden = gated_hidden(layer.activation, projected) if layer.gated else ACTIVATE[layer.activation](projected)
        whole, scale = whole_numbers(hidden.float().unsqueeze(0), x_bits)
        dense = down.unpack_expert(e).double()
        row = (whole @ dense.T * scale).squeeze(0)
        if layer.down_bias is not None:
            row = row + layer.down_bias[e].double()
        out[t] += layer.top_k_weights[t, k].double() * row
        level[t] += layer.top_k_weights[t, k].double() * scale.squeeze() * dense.abs().amax(-1)
    return out, level


@pytest.mark.parametrize("x_bits", [8, 13])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
@needs_native
def test_layer_of_whole_numbers(path, name, kind, x_bits):
    *sizes, options = SHAPES[name]
    if KINDS[kind][1][0] == 4 and name == "100 empty experts of 128":
        # enough with the other kinds
        sizes[0] = 1
    layer = make_layer(*sizes, dtype=torch.float32, **options)
    gate_up, down = quantised_pair(layer, KINDS[kind])
    out = moe_quantised(*layer.routed, gate_up, down, **layer.options, x_bits=x_bits)
    exact, level = layer_from_whole_numbers(layer, gate_up, down, x_bits)
    # h is fp32 here and fp64 there: now and then a value of it lies on the other side of a half
    assert ((out.double() - exact).abs() <= 2 * level + exact.abs() * 1e-5 + 1e-5).all()


@pytest.mark.parametrize(("x_bits", "most"), [(8, 0.02), (13, 0.0007)])
@pytest.mark.parametrize("kind", KINDS)
@needs_native
def test_layer_against_x_as_it_is(path, kind, x_bits, most):
    # the weights' own rounding left out: what 8 and 13 bits of x and h cost
    layer = make_layer(40, 2, 4, 256, 192, dtype=torch.float32, bias=True)
    gate_up, down = quantised_pair(layer, KINDS[kind])
    layer.gate_up, layer.down = gate_up.unpack(), down.unpack()
    exact = oracle(layer, torch.float64, rounded=False)
    out = moe_quantised(*layer.routed, gate_up, down, **layer.options, x_bits=x_bits)
    assert (out.double() - exact).norm() <= most * exact.norm()


@pytest.mark.parametrize("activation", [*ACTIVATE, "swigluoai"])
def test_reference_is_the_dense_layer(activation):
    layer = make_layer(7, 2, 4, 96, 72, dtype=torch.bfloat16, bias=True, activation=activation)
    gate_up, down = quantised_pair(layer, KINDS["int4 and int8"])
    out = moe_quantised(*layer.routed, gate_up, down, **layer.options, backend="reference")
    dense = gate_up.unpack(torch.bfloat16), down.unpack(torch.bfloat16)
    assert torch.equal(out, moe_dense(*layer.routed, *dense, **layer.options, backend="reference"))
    with native_library.turned_off():
        assert torch.equal(moe_quantised(*layer.routed, gate_up, down, **layer.options), out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 7, 300])
@needs_native
def test_threads_change_no_bit(path, T, kind):
    # chunks of 64 rows for one thread, of 32 for more; dropped rows, an empty expert, shared packing
    layer = make_layer(T, 2, 8, 1000, 136, routing="sentinels")
    weights, results = quantised_pair(layer, KINDS[kind]), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(moe_quantised(*layer.routed, *weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
def test_dropped_slots_add_nothing(path):
    layer = make_layer(5, 3, 4, 64, 32, dtype=torch.float32)
    weights = quantised_pair(layer, KINDS["int8 2:4"])
    wanted = moe_quantised(*layer.routed, *weights)
    outside = torch.tensor([[-1], [4], [2**31], [-(2**40)], [1000]])
    index = torch.cat([outside, layer.top_k_index], dim=1)
    gates = torch.cat([torch.full((5, 1), torch.nan), layer.top_k_weights], dim=1)
    assert torch.equal(moe_quantised(layer.x, index, gates, *weights), wanted)


def test_compiles_and_exports():
    layer = make_layer(5, 2, 3, 64, 32)
    weights = quantised_pair(layer, KINDS["int4 and int8"])

    class Experts(torch.nn.Module):
        def forward(self, x, index, gates):
            return moe_quantised(x, index, gates, *weights) + 1

    wanted = Experts()(*layer.routed)
    compiled = torch.compile(Experts(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*layer.routed), wanted)
    exported = torch.export.export(Experts(), layer.routed)
    assert torch.equal(exported.module()(*layer.routed), wanted)


def test_what_does_not_fit_is_refused():
    weight = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    made = QuantisedWeight.quantise(weight, 4, 32)
    with pytest.raises(ValueError, match=r"bits must be one of \(8, 4\), got 3"):
        QuantisedWeight.quantise(weight, 3)
    with pytest.raises(ValueError, match=r"group must be one of .* 0 for a whole row, got 16"):
        QuantisedWeight.quantise(weight, 8, 16)
    with pytest.raises(ValueError, match=r"scales_dtype must be one of .*, got torch.int8"):
        QuantisedWeight.quantise(weight, 8, 0, torch.int8)
    with pytest.raises(ValueError, match=r"scales_dtype must hold the scales of the weight, got torch.float16"):
        QuantisedWeight.quantise(weight * 1e9, 8, 0, torch.float16)
    with pytest.raises(ValueError, match=r"weight must be \(E, N, K\) of .*, got torch.int64"):
        QuantisedWeight.quantise(torch.zeros(1, 4, 64, dtype=torch.int64))
    spoiled = weight.clone()
    spoiled[0, 2, 5] = torch.inf
    with pytest.raises(ValueError, match=r"weight must be finite .* expert 0, row 2"):
        QuantisedWeight.quantise(spoiled)
    with pytest.raises(
        ValueError, match=r"values must be contiguous torch.int8 of shape \(1, 4, 64\), got torch.uint8"
    ):
        QuantisedWeight(made.values, made.scales[..., :1].clone(), None, (1, 4, 64), 1, 1, 8, 0)
    with pytest.raises(ValueError, match=r"scales must be contiguous .* of shape \(1, 4, 2\), .* \(1, 4, 1\)"):
        QuantisedWeight(made.values, made.scales[..., :1].clone(), None, (1, 4, 64), 1, 1, 4, 32)
    with pytest.raises(ValueError, match=r"n and m must be 1 where there is no index, got 2:4"):
        QuantisedWeight(made.values, made.scales, None, (1, 4, 64), 2, 4, 4, 32)
    under = QuantisedWeight.quantise(NMWeight.pack(weight, torch.arange(64).expand(1, 4, 64) % 4 < 2), 8)
    under.index[0, 3, 1] = 0x13
    with pytest.raises(ValueError, match=r"index must keep exactly 2 of every 4 columns, got 1 .* row 3, group 3"):
        under.validate()


def test_calls_that_do_not_fit_are_refused():
    layer = make_layer(3, 1, 2, 64, 32)
    gate_up, down = quantised_pair(layer, KINDS["int8"])
    with pytest.raises(ValueError, match=r"x_bits must be one of \(8, 13\), got 4"):
        moe_quantised(*layer.routed, gate_up, down, x_bits=4)
    with pytest.raises(ValueError, match=r"backend must be one of auto, native, reference, got 'triton'"):
        moe_quantised(*layer.routed, gate_up, down, backend="triton")
    with pytest.raises(ValueError, match=r"activation must be a name where weights are quantised, got <built-in"):
        moe_quantised(*layer.routed, gate_up, down, activation=torch.relu)
    with pytest.raises(ValueError, match=r"down must be \(experts, hidden, intermediate\)"):
        moe_quantised(*layer.routed, gate_up, gate_up)
    with native_library.turned_off(), pytest.raises(ValueError, match=r'backend "native" must fit the machine'):
        moe_quantised(*layer.routed, gate_up, down, backend="native")
    if NATIVE is None:
        return
    with pytest.raises(ValueError, match=r"expert must lie in 0\.\.1, got 2"):
        gemm_quantised(layer.x, gate_up, 2)
    with pytest.raises(ValueError, match=r"x must be \(tokens, 64\) of bf16, fp16 or fp32, got torch.bfloat16"):
        gemm_quantised(layer.x[:, :32], gate_up, 0)
    with pytest.raises(ValueError, match=r"bias must be torch.bfloat16 of shape \(64,\), got torch.float32"):
        gemm_quantised(layer.x, gate_up, 0, torch.zeros(64))
