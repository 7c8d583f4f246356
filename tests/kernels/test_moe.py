"""The expert layer without a GPU: plain torch, transformers' experts, argument checks, torch ops, dispatch."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from moe_cases import SHAPES, assert_layer, assert_within_budget, make_layer, oracle, prune_2_4
from torch._subclasses.fake_tensor import FakeTensorMode

from moesparse_kernels import dispatch, route, tuning
from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm
from moesparse_kernels.schedule import block_bound
from moesparse_kernels.tuning import GroupedConfig, backend_from_table, grouped_config
from moesparse_kernels.unpack import unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed(layer, order="row", n=2, m=4):
    return tuple(NMWeight.pack(weight, n=n, m=m).to_order(order) for weight in (layer.gate_up, layer.down))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reference_against_fp64(shape, dtype):
    *sizes, options = shape
    layer = make_layer(*sizes, dtype=dtype, **options)
    options = {**layer.options, "backend": "reference"}
    sparse = moe_nm(*layer.routed, *packed(layer), **options)
    assert torch.equal(sparse, moe_dense(*layer.routed, layer.gate_up, layer.down, **options))
    if dtype == torch.float32:
        assert_layer(sparse, layer, "reference")
    else:
        # torch's product also rounds [gate | up]; that is one rounding more than the kernels promise
        fp64, same = oracle(layer, torch.float64, rounded=False), oracle(layer, torch.float32, rounded=True)
        assert_within_budget(sparse, same, fp64, "reference", slack=2.0)


def test_other_patterns_and_orders_agree():
    # 4:8 in row order and 2:4 in fragment order are the same numbers when the zeros are the same
    layer = make_layer(5, 2, 3, 128, 64)
    wanted = moe_nm(*layer.routed, *packed(layer), backend="reference")
    assert torch.equal(moe_nm(*layer.routed, *packed(layer, n=4, m=8), backend="reference"), wanted)
    assert torch.equal(moe_nm(*layer.routed, *packed(layer, order="fragment")), wanted)
    dense = moe_dense(*layer.routed, layer.gate_up, layer.down)
    assert torch.equal(moe_nm(*layer.routed, *packed(layer), backend="unpack"), dense)


def test_non_contiguous_input():
    layer = make_layer(6, 2, 3, 64, 32)
    wanted = moe_nm(*layer.routed, *packed(layer))
    spread = [torch.stack([value, value], dim=-1)[..., 0] for value in layer.routed]
    assert not spread[0].is_contiguous()
    assert torch.equal(moe_nm(*spread, *packed(layer)), wanted)


def test_all_slots_dropped_is_zero():
    layer = make_layer(3, 2, 3, 64, 32)
    layer.top_k_index.fill_(3)
    layer.top_k_weights.fill_(torch.nan)
    assert torch.equal(moe_nm(*layer.routed, *packed(layer)), torch.zeros(3, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_like_transformers_mixtral_experts(implementation):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = implementation
    experts = modeling.MixtralExperts(config)
    layer = make_layer(11, 2, 4, 64, 96, dtype=torch.float32)
    with torch.no_grad():
        experts.gate_up_proj.copy_(layer.gate_up)
        experts.down_proj.copy_(layer.down)
        theirs = experts(*layer.routed)
    fp64 = oracle(layer, torch.float64, rounded=False)
    assert_within_budget(moe_nm(*layer.routed, *packed(layer)), theirs, fp64, "packed")
    assert_within_budget(theirs, oracle(layer, torch.float32, rounded=True), fp64, "theirs", slack=2.0)


def test_a_function_as_activation():
    # interleaved and clamped, as gpt-oss has it: no built-in activation fits
    def gate(projected):
        gate, up = projected[..., ::2].clamp(max=7.0), projected[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    layer = make_layer(5, 2, 3, 64, 32, dtype=torch.float32, bias=True)
    bias = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias}
    out = moe_nm(*layer.routed, *packed(layer), activation=gate, **bias)
    wanted = torch.zeros_like(layer.x)
    for t, k in torch.cartesian_prod(torch.arange(5), torch.arange(2)).tolist():
        e = int(layer.top_k_index[t, k])
        hidden = gate(F.linear(layer.x[t], layer.gate_up[e], layer.gate_up_bias[e]))
        wanted[t] += layer.top_k_weights[t, k] * F.linear(hidden, layer.down[e], layer.down_bias[e])
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(out, moe_dense(*layer.routed, layer.gate_up, layer.down, activation=gate, **bias))
    with pytest.raises(ValueError, match=r"activation must return torch.float32 of shape \(10, 32\)"):
        moe_nm(*layer.routed, *packed(layer), activation=lambda rows: rows)


def test_route_sorts_stably_and_covers_every_row():
    top_k_index = torch.tensor([[2, 0], [0, 3], [-1, 2], [2, 1]])
    routing = route(top_k_index, num_experts=3, block_m=2)
    assert routing.offsets.tolist() == [0, 2, 3, 6]
    # slots of expert 0, of 1, of 2, then the dropped ones (ids 3 and -1), each in order of their slots
    assert routing.slot_of.tolist() == [1, 2, 7, 0, 5, 6, 3, 4]
    assert routing.row_of.tolist() == [[3, 0], [1, -1], [-1, 4], [5, 2]]
    assert routing.block_expert.tolist() == [0, 1, 2, 2, -1]
    assert routing.block_row.tolist() == [0, 2, 3, 5, 0]


@pytest.mark.parametrize(("rows", "experts", "block_m"), [(0, 4, 16), (3, 8, 16), (64, 4, 16), (65, 4, 16), (9, 1, 2)])
def test_block_bound_holds_the_worst_split(rows, experts, block_m):
    # the worst split leaves one row more than whole blocks on as many experts as possible
    counts = [1] * min(rows, experts) + [0] * (experts - min(rows, experts))
    if rows > experts:
        counts[0] += rows - experts
    used = sum(-(-count // block_m) for count in counts)
    assert used <= block_bound(rows, experts, block_m) <= used + experts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_unpack_bit_for_bit(dtype, n, m):
    weight = torch.randn(3, 37, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = weight.float().unflatten(-1, (-1, m)).topk(n, dim=-1).indices
    mask = torch.zeros(3, 37, 1000 // m, m, dtype=torch.bool).scatter_(-1, keep, True).flatten(-2)
    weight = weight.where(mask, 0)
    # every nibble with its sign bits, -0.0 and a subnormal
    weight[0, 0, :4] = torch.tensor([-0.0, 0, 0, 1e-7]).to(dtype).where(mask[0, 0, :4], 0)
    row = NMWeight.pack(weight, mask=mask, n=n, m=m)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(unpack(row).view(bits), weight.view(bits))
    scratch = torch.full((37, 1000), torch.nan, dtype=dtype)
    assert row.unpack_expert(1, out=scratch) is scratch
    assert torch.equal(scratch.view(bits), weight[1].view(bits))


ERRORS = {
    "x 1-D": (lambda a: a.update(x=a["x"][0]), r"x must be 2-D"),
    "x int": (lambda a: a.update(x=a["x"].int()), r"x must be one of"),
    "x grad": (lambda a: a["x"].requires_grad_(), r"x must not require grad, .* call under torch.no_grad"),
    "index tokens": (lambda a: a.update(top_k_index=a["top_k_index"][1:]), r"top_k_index must be \(tokens=4, top_k\)"),
    "index float": (lambda a: a.update(top_k_index=a["top_k_index"].float()), r"top_k_index must be int32 or int64"),
    "weights shape": (
        lambda a: a.update(top_k_weights=a["top_k_weights"][:, :1]),
        r"top_k_weights must have the shape",
    ),
    "weights int": (lambda a: a.update(top_k_weights=a["top_k_index"]), r"top_k_weights must be floating point"),
    "dtypes": (lambda a: a.update(x=a["x"].half()), r"gate_up must have the dtype of x, torch.float16"),
    "hidden": (lambda a: a.update(x=a["x"][:, :32]), r"gate_up must have hidden=32 columns like x, got 64"),
    "down": (lambda a: a.update(down=a["gate_up"]), r"down must be \(experts, hidden, intermediate\) = \(3, 64, 32\)"),
    "gated": (lambda a: a.update(gated=False), r"down must be \(experts, hidden, intermediate\) = \(3, 64, 64\)"),
    "activation": (lambda a: a.update(activation="tanh"), r"activation must be one of none, silu, .*, got 'tanh'"),
    "bias": (lambda a: a.update(down_bias=torch.zeros(3, 4)), r"down_bias must be contiguous of shape \(3, 64\)"),
    "bias dtype": (lambda a: a.update(down_bias=torch.zeros(3, 64)), r"down_bias must have the dtype of x"),
    "weight 2-D": (lambda a: a.update(gate_up=torch.zeros(3, 64, dtype=torch.bfloat16)), r"gate_up must be 3-D"),
    "odd rows": (
        lambda a: a.update(gate_up=torch.zeros(3, 63, 64, dtype=torch.bfloat16)),
        r"gate_up must have an even number of rows when gated, got 63",
    ),
    "strides": (
        lambda a: a.update(gate_up=torch.zeros(3, 64, 64, dtype=torch.bfloat16).mT),
        r"gate_up must have a contiguous last dim, got strides \(4096, 1, 64\)",
    ),
    "device": (
        lambda a: a.update(top_k_index=a["top_k_index"].to("meta")),
        r"top_k_index must be on the device of x, cpu, got meta",
    ),
    "backend": (lambda a: a.update(backend="cuda"), r"backend must be one of auto, native, triton, .*, got 'cuda'"),
    "triton on cpu": (
        lambda a: a.update(backend="triton"),
        r'backend must be "auto", "native" or "reference" on cpu tensors',
    ),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("function", [moe_nm, moe_dense])
def test_one_clear_error(function, change, message):
    layer = make_layer(4, 2, 3, 64, 32)
    gate_up, down = packed(layer) if function is moe_nm else (layer.gate_up, layer.down)
    arguments = dict(zip(("x", "top_k_index", "top_k_weights"), layer.routed, strict=True), gate_up=gate_up, down=down)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_backends_that_cannot_run_say_why():
    layer = make_layer(4, 2, 3, 64, 32)
    with pytest.raises(ValueError, match=r'"semi_structured" must fit .* NVIDIA GPUs only and the weight is on cpu'):
        moe_nm(*layer.routed, *packed(layer), backend="semi_structured")
    with pytest.raises(ValueError, match=r'"grouped_mm" must have bf16 weights on a GPU'):
        moe_dense(*layer.routed, layer.gate_up, layer.down, backend="grouped_mm")


def op_arguments(layer, order="row"):
    flat = []
    for weight in packed(layer, order):
        flat += [weight.values, weight.index, [*weight.shape, weight.n, weight.m], weight.order]
    return flat


def test_opcheck():
    layer = make_layer(4, 2, 3, 64, 32, bias=True)
    ops, flat = torch.ops.moesparse, op_arguments(layer)
    bias = (layer.gate_up_bias, layer.down_bias)
    check = torch.library.opcheck
    check(ops.moe_nm.default, (*layer.routed, *flat, *bias, "silu", True, "auto"))
    check(ops.moe_dense.default, (*layer.routed, layer.gate_up, layer.down, *bias, "silu", True, "auto"))
    # no dropped slots here: their rows are not written, and opcheck compares runs
    check(ops.moe_nm_up.default, (*layer.routed[:2], *flat[:4], bias[0], "auto"))
    check(ops.moe_dense_up.default, (*layer.routed[:2], layer.gate_up, bias[0], "auto"))
    rows = torch.ones(8, 32, dtype=torch.bfloat16)
    check(ops.moe_nm_down.default, (rows, *layer.routed[1:], *flat[4:], bias[1], "auto"))
    check(ops.moe_dense_down.default, (rows, *layer.routed[1:], layer.down, bias[1], "auto"))


class Experts(torch.nn.Module):
    def __init__(self, layer, activation="silu"):
        super().__init__()
        self.gate_up, self.down = packed(layer)
        self.activation = activation

    def forward(self, x, top_k_index, top_k_weights):
        return moe_nm(x, top_k_index, top_k_weights, self.gate_up, self.down, activation=self.activation) + 1


def silu_and_mul(projected):
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("activation", ["silu", silu_and_mul], ids=["built in", "function"])
def test_compile_without_graph_breaks(activation):
    # another number of tokens must not compile again once sizes are dynamic
    experts = Experts(make_layer(4, 2, 3, 64, 32), activation)
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9, 33):
        routed = make_layer(tokens, 2, 3, 64, 32, seed=tokens).routed
        with torch.no_grad():
            assert torch.equal(compiled(*routed), experts(*routed))


def test_export_holds_one_op():
    layer = make_layer(4, 2, 3, 64, 32)
    with torch.no_grad():
        program = torch.export.export(Experts(layer), layer.routed)
        calls = [node.target for node in program.graph.nodes if "moesparse" in str(node.target)]
        assert calls == [torch.ops.moesparse.moe_nm.default]
        assert torch.equal(program.module()(*layer.routed), Experts(layer)(*layer.routed))


@pytest.mark.parametrize("activation", ["silu", silu_and_mul], ids=["built in", "function"])
def test_fake_cuda_tensors(activation):
    with FakeTensorMode():
        cuda = {"device": "cuda", "dtype": torch.bfloat16}
        x, gates = torch.empty(7, 64, **cuda), torch.empty(7, 2, device="cuda")
        index = torch.empty(7, 2, dtype=torch.int64, device="cuda")
        out = moe_dense(x, index, gates, torch.empty(3, 64, 64, **cuda), torch.empty(3, 64, 32, **cuda))
        assert (out.shape, out.dtype, out.device.type) == ((7, 64), torch.bfloat16, "cuda")
        words = {"device": "cuda", "dtype": torch.int32}
        gate_up = NMWeight(
            values=torch.empty(3, 2, 2, 4, 4, 32, 4, **words),
            index=torch.empty(3, 2, 1, 4, 32, 4, **words),
            shape=(3, 256, 64),
            n=2,
            m=4,
            order="fragment",
            dtype=torch.bfloat16,
        )
        down = NMWeight(
            values=torch.empty(3, 1, 2, 4, 4, 32, 4, **words),
            index=torch.empty(3, 1, 1, 4, 32, 4, **words),
            shape=(3, 64, 128),
            n=2,
            m=4,
            order="fragment",
            dtype=torch.bfloat16,
        )
        out = moe_nm(x, index, gates, gate_up, down, activation=activation)
        assert (out.shape, out.dtype, out.device.type) == ((7, 64), torch.bfloat16, "cuda")


CONFIG = {"block_m": 32, "block_n": 128, "block_k": 128, "split_k": 2, "group_m": 1, "swap": True, "num_warps": 4}


@pytest.fixture
def pretend_gpu(monkeypatch, tmp_path):
    """A device named "Some GPU" whose table this test writes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_multiprocessors", lambda _: 132)
    monkeypatch.setattr(tuning, "_has_wgmma", lambda _: True)
    monkeypatch.setenv("MOESPARSE_CONFIGS", str(tmp_path))
    tuning._table.cache_clear()
    yield tmp_path / "Some_GPU.json"
    tuning._table.cache_clear()


def test_measured_table_is_used_for_its_shape_only(pretend_gpu):
    shape = {"dtype": "bfloat16", "experts": 8}
    launch = {"op": "up_nm", **shape, "n": 256, "k": 128, "rows": {"8": CONFIG, "512": {**CONFIG, "split_k": 1}}}
    backend = {**shape, "hidden": 128, "intermediate": 64, "until_rows_per_expert": {"inf": "unpack", "40": "triton"}}
    pretend_gpu.write_text(json.dumps({"device": "Some GPU", "launch": [launch], "backend": [backend]}))
    cuda = torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grouped_config("up_nm", 10, 8, 256, 128, torch.bfloat16, cuda) == GroupedConfig(**CONFIG)
        assert grouped_config("up_nm", 4096, 8, 256, 128, torch.bfloat16, cuda).split_k == 1
        assert grouped_config("up_nm", 10, 8, 256, 128, torch.float16, cuda).block_m == 16
        assert backend_from_table(40.0, 8, 128, 64, torch.bfloat16, cuda) == "triton"
        assert backend_from_table(40.5, 8, 128, 64, torch.bfloat16, cuda) == "unpack"
        assert backend_from_table(1.0, 8, 128, 65, torch.bfloat16, cuda) is None


def test_heuristic_warns_once(pretend_gpu):
    ask = ("down_nm", 8, 128, 2048, 768, torch.bfloat16, torch.device("cuda"))
    with pytest.warns(UserWarning, match=r"no measured launch table for 'Some GPU': using a heuristic"):
        grouped_config(*ask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouped_config(*ask)


@pytest.mark.parametrize("rows", [1, 8, 64, 2048, 131072])
@pytest.mark.parametrize("op", ["up_nm", "down_nm", "up_dense", "down_dense"])
def test_heuristic_fits_the_kernels(op, rows, pretend_gpu):
    pretend_gpu.write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = grouped_config(op, rows, 128, 1536, 2048, torch.bfloat16, torch.device("cuda"))
    assert config.block_m in (16, 32, 64, 128) and 1 <= config.split_k <= 8
    if op.endswith("_nm"):
        # the fragment layout is made for four warps and steps of 128 columns; 128 rows would spill
        assert (config.num_warps, config.block_k) == (4, 128) and config.block_m <= 64
        assert config.swap == (config.block_m >= 32)
    # few programs leave most of the GPU idle: down splits its reduction, up, whose activation would then be a launch of
    # its own, takes half the weight rows in a program
    few = rows <= 8 and config.block_m == 16 and rows * 12 * 2 <= 2 * 132
    assert (config.split_k > 1) == (few and op.startswith("down"))
    assert config.block_n == (64 if few and op.startswith("up") else 128)


class OnCuda:
    """What dispatch reads of a packed weight."""

    values = torch.device("cuda")

    def __init__(self, order="fragment", dtype=torch.bfloat16, m=4):
        self.values = type("Tensor", (), {"device": torch.device("cuda")})
        self.order, self.dtype, self.shape, self.n, self.m = order, dtype, (8, 256, 128), m // 2, m


def test_dispatch_makes_no_layer_dense_unasked(monkeypatch):
    monkeypatch.setattr(dispatch, "backend_from_table", lambda *_: None)
    choose = dispatch.choose_nm_backend
    assert choose("auto", OnCuda(), rows=8 * 16, hidden=128, intermediate=128) == "triton"
    assert choose("auto", OnCuda(), rows=8 * 4096, hidden=128, intermediate=128) == "triton"
    # where it was measured to be the fastest
    monkeypatch.setattr(dispatch, "backend_from_table", lambda *_: "unpack")
    assert choose("auto", OnCuda(), rows=8 * 16, hidden=128, intermediate=128) == "unpack"
    with pytest.raises(
        ValueError, match=r'must be in "fragment" or "mma_sp" order on a GPU, got \'row\'; reorder once with weight'
    ):
        choose("auto", OnCuda(order="row"), rows=8, hidden=128, intermediate=128)
    assert choose("unpack", OnCuda(order="row"), rows=8, hidden=128, intermediate=128) == "unpack"
    # a pattern without kernels is made dense, which is said once, and fp32 is the reference's
    dispatch._warn_of_unpacking.cache_clear()
    with pytest.warns(UserWarning, match="no GPU kernels for packed 4:8 weights: every call makes the layer dense"):
        assert choose("auto", OnCuda(order="row", m=8), rows=8, hidden=128, intermediate=128) == "unpack"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", OnCuda(order="row", m=8), rows=8, hidden=128, intermediate=128) == "unpack"
    assert choose("auto", OnCuda(dtype=torch.float32), rows=8, hidden=128, intermediate=128) == "reference"
    with pytest.raises(ValueError, match=r'"fragment" order, got \'row\'; repack once with weight.to_order'):
        choose("triton", OnCuda(order="row"), rows=8, hidden=128, intermediate=128)
    with pytest.raises(ValueError, match=r"must have bf16 or fp16 weights, got torch.float32"):
        choose("triton", OnCuda(dtype=torch.float32), rows=8, hidden=128, intermediate=128)


def test_dispatch_never_waits_for_the_device_in_a_graph(monkeypatch):
    monkeypatch.setattr(dispatch, "backend_from_table", lambda *_: "semi_structured")
    monkeypatch.setattr(dispatch, "reason_unavailable", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dispatch.choose_nm_backend("auto", OnCuda(), 8, 128, 128) == "semi_structured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose_nm_backend("auto", OnCuda(), 8, 128, 128) == "triton"


def test_shipped_tables_fit_their_schema():
    for path in Path(tuning.__file__).with_name("configs").glob("*.json"):
        table = json.loads(path.read_text())
        assert {"device", "torch", "triton"} <= table.keys(), path.name
        for entry in table.get("launch", ()):
            for config in entry["rows"].values():
                GroupedConfig(**config)


def test_pruned_layers_have_the_zeros():
    # what every other test here stands on
    groups = prune_2_4(torch.randn(5, 64)).unflatten(-1, (-1, 4))
    assert torch.equal((groups != 0).sum(-1), torch.full((5, 16), 2))
