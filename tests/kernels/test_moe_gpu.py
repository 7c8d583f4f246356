"""The expert layer on a GPU, at the shapes of real models."""

import pytest
import torch
import torch.nn.functional as F
from moe_cases import SHAPES, Layer, assert_layer, assert_within_budget, make_layer

from moesparse_kernels import moe_gpu, reference, route
from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm
from moesparse_kernels.schedule import route_torch
from moesparse_kernels.semi_structured import reason_unavailable
from moesparse_kernels.unpack import unpack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:moesparse_kernels has no measured launch table"),
]

# E, top_k, H, I of one layer; a few experts of the larger ones, so that the dense copy fits beside the packed one
MODELS = {
    "Mixtral-8x7B": (8, 2, 4096, 14336),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "OLMoE-1B-7B": (64, 8, 2048, 1024),
    # 2880 = 22.5 tiles of 128: gate and up share a tile, so the activation is a launch of its own
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
DTYPES = (torch.bfloat16, torch.float16)


def pack(weight):
    return NMWeight.pack(weight, n=2, m=4).to_order("fragment")


def prune_2_4(weight):
    # in plain torch, but without its topk, which takes seconds for these many groups on a GPU
    return reference.nm_prune(weight, torch.ones(len(weight), weight.shape[-1], device=weight.device), 2, 4)


def large_layer(model, tokens, dtype):
    """Like `make_layer`, made on the GPU."""
    E, top_k, H, I = MODELS[model]
    random = torch.Generator(device="cuda").manual_seed(tokens)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random, device="cuda", dtype=torch.float32) * scale).to(dtype)

    return Layer(
        x=normal(tokens, H),
        top_k_index=torch.rand(tokens, E, generator=random, device="cuda").topk(top_k, dim=-1).indices,
        top_k_weights=torch.rand(tokens, top_k, generator=random, device="cuda"),
        gate_up=prune_2_4(normal(E, 2 * I, H, scale=H**-0.5)),
        down=prune_2_4(normal(E, H, I, scale=I**-0.5)),
        gate_up_bias=None,
        down_bias=None,
        activation="silu",
        gated=True,
    )


def by_expert(layer, compute, rounded):
    """The oracle, a whole expert at a time."""
    out = torch.zeros(layer.x.shape, dtype=compute, device="cuda")

    def stored(value):
        return value.to(layer.x.dtype).to(compute) if rounded else value

    for e in layer.top_k_index.unique().tolist():
        token, choice = (layer.top_k_index == e).nonzero(as_tuple=True)
        gate, up = F.linear(layer.x[token].to(compute), layer.gate_up[e].to(compute)).chunk(2, dim=-1)
        row = F.linear(stored(F.silu(gate) * up), layer.down[e].to(compute))
        out.index_add_(0, token, stored(row) * layer.top_k_weights[token, choice, None].to(compute))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_small_shapes(shape, dtype):
    *sizes, options = shape
    layer = make_layer(*sizes, dtype=dtype, device="cuda", **options)
    packed = pack(layer.gate_up), pack(layer.down)
    for backend in ("auto", "triton", "unpack"):
        assert_layer(moe_nm(*layer.routed, *packed, **layer.options, backend=backend), layer, backend)
    assert_layer(moe_dense(*layer.routed, layer.gate_up, layer.down, **layer.options, backend="triton"), layer, "dense")


# one token, a decode batch, several blocks per expert, prefill
@pytest.mark.parametrize("tokens", [1, 32, 300, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_real_shapes(model, dtype, tokens):
    layer = large_layer(model, tokens, dtype)
    fp64, same_dtype = by_expert(layer, torch.float64, False), by_expert(layer, torch.float32, True)
    packed = pack(layer.gate_up), pack(layer.down)
    for backend in ("triton", "unpack"):
        out = moe_nm(*layer.routed, *packed, backend=backend)
        assert_within_budget(out, same_dtype, fp64, backend)
        assert torch.equal(out, moe_nm(*layer.routed, *packed, backend=backend)), f"{backend} is not deterministic"
    dense = moe_dense(*layer.routed, layer.gate_up, layer.down, backend="triton")
    assert_within_budget(dense, same_dtype, fp64, "dense")
    if dtype == torch.bfloat16:
        dense = moe_dense(*layer.routed, layer.gate_up, layer.down, backend="grouped_mm")
        assert_within_budget(dense, same_dtype, fp64, "grouped_mm", slack=2.0)
    if reason_unavailable(packed[0]) is None and reason_unavailable(packed[1]) is None:
        out = moe_nm(*layer.routed, *packed, backend="semi_structured")
        assert_within_budget(out, same_dtype, fp64, "semi_structured", slack=2.0)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 8, 128), (200, 8, 128), (16384, 8, 128), (500, 4, 512)])
def test_route(tokens, top_k, experts):
    top_k_index = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=-1).indices
    top_k_index[::7] = experts
    actual, wanted = route(top_k_index, experts, 16), route_torch(top_k_index, experts, 16)
    for name in ("slot_of", "row_of", "offsets", "block_expert", "block_row"):
        assert torch.equal(getattr(actual, name), getattr(wanted, name)), name


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("split_k", [1, 4])
def test_every_launch_size(block_m, swap, split_k, monkeypatch):
    layer = large_layer("OLMoE-1B-7B", 70, torch.bfloat16)
    fp64, same_dtype = by_expert(layer, torch.float64, False), by_expert(layer, torch.float32, True)
    from moesparse_kernels.tuning import GroupedConfig

    config = GroupedConfig(block_m, swap=swap, split_k=split_k, num_stages=2)
    monkeypatch.setattr(moe_gpu, "grouped_config", lambda *_: config)
    out = moe_nm(*layer.routed, pack(layer.gate_up), pack(layer.down), backend="triton")
    assert_within_budget(out, same_dtype, fp64, str(config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack_bit_for_bit(dtype):
    weight = large_layer("gpt-oss-20b", 1, dtype).gate_up
    assert torch.equal(unpack(pack(weight)).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_cuda_graph(packed):
    # captured with one routing, replayed with others: nothing about it may have been read on the host
    layer = large_layer("OLMoE-1B-7B", 32, torch.bfloat16)
    weights = (pack(layer.gate_up), pack(layer.down)) if packed else (layer.gate_up, layer.down)
    function = moe_nm if packed else moe_dense
    routed = [value.clone() for value in layer.routed]
    function(*routed, *weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*routed, *weights)
    for seed in (1, 2):
        torch.manual_seed(seed)
        routed[0].normal_()
        routed[1].copy_(torch.rand(32, 64, device="cuda").topk(8, dim=-1).indices if seed == 1 else routed[1] * 0 + 5)
        graph.replay()
        assert torch.equal(out, function(*routed, *weights))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_no_host_sync(packed):
    layer = large_layer("OLMoE-1B-7B", 32, torch.bfloat16)
    weights = (pack(layer.gate_up), pack(layer.down)) if packed else (layer.gate_up, layer.down)
    function = moe_nm if packed else moe_dense
    function(*layer.routed, *weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*layer.routed, *weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile():
    layer = large_layer("OLMoE-1B-7B", 32, torch.bfloat16)
    packed = pack(layer.gate_up), pack(layer.down)
    compiled = torch.compile(lambda *routed: moe_nm(*routed, *packed), fullgraph=True)
    assert torch.equal(compiled(*layer.routed), moe_nm(*layer.routed, *packed))
