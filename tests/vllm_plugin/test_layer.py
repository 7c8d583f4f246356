"""One expert layer of vLLM at a time, no engine: packed against the masked dense layer and fp64, sliced, refused.

This is the contract with the parts of vLLM that are not a stable API. `make test-vllm` runs it on two releases. The
newer one is built from source without its compiled code, which vLLM's own dense layer needs on a CPU; there the dense
layer is plain torch.
"""

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed; make test-vllm runs this in its own environments")

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import DeviceConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import config as fused_moe_config
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight
from vllm.plugins import load_general_plugins

from moesparse.errors import CheckpointError, UnsupportedModelError, UsageError
from moesparse.testing import assert_within_budget
from moesparse.weights.patterns import Pattern, mask_from_score
from moesparse_kernels import NMWeight

# all sizes differ, so that a transposed or swapped matrix cannot pass; tokens and experts are no powers of two
E, H, I, TOP_K, TOKENS = 6, 64, 96, 2, 13
BLOCK = "model.layers.3.mlp.experts"
PREFIX = "model.layers.3.block_sparse_moe.experts"
NAMES = ("w1", "w2", "w3")
COMPILED = find_spec("vllm._C") is not None

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def _vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    load_general_plugins()
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config):
        store = tmp_path_factory.mktemp("store") / "init"
        init_distributed_environment(1, 0, f"file://{store}", local_rank=0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield config


@pytest.fixture(autouse=True)
def vllm_config(_vllm: VllmConfig) -> Iterator[VllmConfig]:
    with set_current_vllm_config(_vllm):
        yield _vllm


def masked_weights(up: str | None = "2:4", down: str | None = "2:4", gated: bool = True) -> Weights:
    """Dense expert matrices [E, out, in] with a pattern each; None is dense."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(E, *shape, generator=generator) * 0.2
        for name, shape in (("w1", (I, H)), ("w2", (H, I)), ("w3", (I, H)))
        if gated or name != "w3"
    }
    for name, pattern in (("w1", up), ("w3", up), ("w2", down)):
        if pattern and name in weights:
            weights[name] *= mask_from_score(weights[name].abs(), Pattern.parse(pattern))
    return weights


def quantization(up: str = "2:4", down: str = "2:4", up_name: str = "gate_up_proj", **entries):
    config = {"quant_method": "moesparse", "format_version": 1, "blocks": {BLOCK: {up_name: up, "down_proj": down}}}
    return get_quantization_config("moesparse").from_config(config | entries)


def stored(weights: Weights, patterns: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """What a packed folder holds, by the names that vLLM's expert loader sees."""
    for name, weight in weights.items():
        n, m = Pattern.parse(patterns[name]).group
        packed = NMWeight.pack(weight, n=n, m=m)
        for expert in range(E):
            yield f"{expert}.{name}.weight", packed.values[expert]
            yield f"{expert}.{name}.weight_meta", packed.index[expert]


def build(quant_config=None, **options) -> nn.Module:
    # every layer here has the same name, which one model's layers must not
    get_current_vllm_config().compilation_config.static_forward_context.clear()
    sizes = {"num_experts": E, "top_k": TOP_K, "hidden_size": H, "intermediate_size": I}
    defaults = {"renormalize": True, "params_dtype": torch.float32, "ckpt_names": NAMES, "prefix": PREFIX}
    return FusedMoEFactory(quant_config=quant_config, **(sizes | defaults | options))


def routed(layer: nn.Module) -> RoutedExperts:
    return next(module for module in layer.modules() if isinstance(module, RoutedExperts))


def load(layer: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> nn.Module:
    experts = routed(layer)
    list(experts.load_weights(tensors))
    experts.quant_method.process_weights_after_loading(experts)
    return layer


def packed_layer(weights: Weights, up: str = "2:4", down: str = "2:4", **options) -> nn.Module:
    up_name = "gate_up_proj" if "w3" in weights else "up_proj"
    layer = build(quantization(up, down, up_name), **options)
    return load(layer, stored(weights, {"w1": up, "w3": up, "w2": down}))


def dense(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    return ((f"{e}.{name}.weight", weight[e]) for name, weight in weights.items() for e in range(E))


def dense_layer(weights: Weights, **options) -> nn.Module:
    return load(build(**options), dense(weights))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, H, generator=generator).to(dtype), torch.randn(TOKENS, E, generator=generator).to(dtype)


def run(layer: nn.Module, config: VllmConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad(), set_forward_context(None, config):
        return layer(*inputs(dtype))


def plain(weights: Weights, activation, given: torch.dtype, dtype: torch.dtype = torch.float64) -> Tensor:
    """The layer's definition in plain torch at `dtype`, from what is rounded to `given`; sums over experts are wide."""
    x, logits = inputs(given)
    w = {name: weight.to(given).to(dtype) for name, weight in weights.items()}
    wide = torch.promote_types(dtype, torch.float32)
    gates, experts = logits.to(wide).softmax(-1).topk(TOP_K)
    gates = gates / gates.sum(-1, keepdim=True)
    x, out = x.to(dtype), torch.zeros(x.shape, dtype=wide)
    for token in range(TOKENS):
        for gate, e in zip(gates[token], experts[token].tolist(), strict=True):
            h = activation(x[token] @ w["w1"][e].T)
            if "w3" in w:
                h = h * (x[token] @ w["w3"][e].T)
            out[token] += gate * (h @ w["w2"][e].T).to(wide)
    return out.to(dtype)


def assert_is_the_dense_layer(
    actual: Tensor, weights: Weights, config: VllmConfig, activation=F.silu, **options
) -> None:
    """Within the budget of plain torch at the same dtype, and of vLLM's own dense layer where it is compiled."""
    dtype = actual.dtype
    exact = plain(weights, activation, dtype)
    assert_within_budget(actual, plain(weights, activation, dtype, dtype), exact, "beside plain torch")
    if COMPILED:
        dense = run(dense_layer(weights, params_dtype=dtype, **options), config, dtype)
        assert_within_budget(actual, dense, exact, "beside vLLM's dense layer")


# the two matrices of a layer may hold different patterns; 2:8 has groups of whole index bytes, 4:32 of several
@pytest.mark.parametrize(("up", "down"), [("2:4", "2:4"), ("4:8", "1:4"), ("2:8", "4:32")])
def test_a_packed_layer_is_the_masked_dense_layer(up: str, down: str, vllm_config: VllmConfig):
    weights = masked_weights(up, down)
    assert_is_the_dense_layer(run(packed_layer(weights, up, down), vllm_config), weights, vllm_config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, vllm_config: VllmConfig):
    weights = masked_weights()
    packed = run(packed_layer(weights, params_dtype=dtype), vllm_config, dtype)
    assert packed.dtype == dtype
    assert_is_the_dense_layer(packed, weights, vllm_config)


@pytest.mark.parametrize(
    ("name", "activation"), [("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))]
)
def test_other_activations(name: str, activation, vllm_config: VllmConfig):
    weights = masked_weights()
    packed = run(packed_layer(weights, activation=name), vllm_config)
    assert_is_the_dense_layer(packed, weights, vllm_config, activation=activation)


def test_experts_without_a_gate(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch):
    # vLLM has no such dense layer on a CPU and says so while it describes one; the packed layer does not need it
    anywhere = SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False, is_rocm=lambda: False)
    monkeypatch.setattr(fused_moe_config, "current_platform", anywhere)
    weights = masked_weights(gated=False)
    packed = packed_layer(weights, activation="relu2_no_mul", ckpt_names=("w1", "w2", None))

    def relu2(x: Tensor) -> Tensor:
        return x.relu().square()

    exact, same = (plain(weights, relu2, torch.float32, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(run(packed, vllm_config), same, exact, "relu2")


@contextmanager
def rank_of_two(monkeypatch: pytest.MonkeyPatch, config: VllmConfig, rank: int, experts: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(fused_moe_config, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(config.parallel_config, "enable_expert_parallel", experts)
        yield


@pytest.mark.parametrize("experts", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("down", ["2:4", "4:16"])
def test_the_ranks_partial_sums_make_the_whole(
    experts: bool, down: str, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
):
    weights = masked_weights("2:4", down)
    parts = []
    for rank in range(2):
        with rank_of_two(monkeypatch, vllm_config, rank, experts):
            layer = packed_layer(weights, "2:4", down, tp_size=2)
        held = routed(layer).w2_weight.shape
        n, m = Pattern.parse(down).group
        assert held == ((E // 2, H, I // m * n) if experts else (E, H, I // 2 // m * n))
        parts.append(run(layer, vllm_config))
        assert parts[rank].abs().max() > 0
    assert_is_the_dense_layer(parts[0] + parts[1], weights, vllm_config)


def test_slots_that_vllm_left_empty_are_dropped(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch):
    # -1 is no expert; as an index into the map of experts it would be the last one, which the second rank holds
    with rank_of_two(monkeypatch, vllm_config, rank=1, experts=True):
        experts = routed(packed_layer(masked_weights(), tp_size=2))
    x, gates = inputs()[0], torch.full((TOKENS, TOP_K), 0.5)
    answers = []
    for absent in (-1, 0):
        ids = torch.tensor([[absent, E - 2]] * TOKENS, dtype=torch.int32)
        answers.append(experts.quant_method.apply(experts, x, gates, ids, None, None))
    assert torch.equal(*answers)


def test_blocks_that_are_not_named_are_vllm_s_own_dense_ones():
    weights = masked_weights(None, None)
    config = quantization()
    layer = build(config, prefix="model.layers.4.block_sparse_moe.experts")
    assert isinstance(routed(layer).quant_method, UnquantizedFusedMoEMethod)
    linear = ReplicatedLinear(H, H, quant_config=config, prefix="model.layers.3.mlp.gate")
    assert isinstance(linear.quant_method, UnquantizedLinearMethod)
    list(routed(layer).load_weights(dense(weights)))
    experts = routed(layer)
    assert torch.equal(experts.w13_weight, torch.cat([weights["w1"], weights["w3"]], dim=1))
    assert torch.equal(experts.w2_weight, weights["w2"])


def test_the_layer_is_one_op_for_the_compiler(vllm_config: VllmConfig):
    packed = routed(packed_layer(masked_weights()))
    x = inputs()[0]
    ids, gates = torch.tensor([[0, 5]] * TOKENS), torch.full((TOKENS, TOP_K), 0.5)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def layer(x: Tensor) -> Tensor:
        return packed.quant_method.apply(packed, x, gates, ids, None, None)

    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert graphs == [[torch.ops.moesparse.moe_nm]]


def test_dummy_weights_are_whole():
    layer = routed(build(quantization("2:8", "2:4")))
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    layer.quant_method.process_weights_after_loading(layer)


def without(dropped: str, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors if name != dropped)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("4.w3.weight", "w13_weight of expert 4 on this rank holds NaN: the folder lacks it"),
        ("4.w2.weight_meta", "w2_weight_meta is missing in the folder or damaged: .* in expert 4, row 0, group 0"),
    ],
)
def test_a_tensor_that_is_missing_is_named(dropped: str, message: str):
    with pytest.raises(CheckpointError, match=message):
        load(build(quantization()), without(dropped, stored(masked_weights(), dict.fromkeys(NAMES, "2:4"))))


def test_blocks_in_a_wrapper_for_images_are_refused():
    blocks = {"model.language_model.layers.0.mlp.experts": {"gate_up_proj": "2:4", "down_proj": "2:4"}}
    with pytest.raises(UnsupportedModelError, match=r"do not run inside a wrapper for images, got model.lang"):
        quantization(blocks=blocks)


def test_tensors_of_another_pattern_than_the_config_says_are_refused():
    message = r"w13_weight of an expert must be floating point of shape \(96, 32\) in the folder, .* \(96, 16\)"
    with pytest.raises(CheckpointError, match=message):
        load(build(quantization()), stored(masked_weights("1:4"), {"w1": "1:4", "w3": "1:4", "w2": "2:4"}))


def test_tensor_parallelism_that_cuts_an_index_byte_is_refused():
    message = "must leave each rank a multiple of 32 columns .* got 96 columns over 2 ranks; 1, 3 fit, or split whole"
    with pytest.raises(UsageError, match=message):
        build(quantization("2:4", "4:32"), tp_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"has_bias": True}, "do not run biases"),
        ({"activation": "swigluoai"}, "do not run the activation swigluoai; they run silu, gelu, gelu_tanh, relu2"),
        ({"swiglu_limit": 7.0}, "do not run a clamped activation"),
        ({"apply_router_weight_on_input": True}, "do not run gates that scale an expert's input"),
    ],
)
def test_layers_that_packed_experts_do_not_run_are_refused_by_name(options: dict, message: str):
    with pytest.raises(UnsupportedModelError, match=f"{BLOCK}: packed experts in vLLM {message}"):
        build(quantization(), **options)


def test_shared_experts_fused_into_the_routed_ones_are_refused(monkeypatch: pytest.MonkeyPatch):
    # what ROCm does; the buffer that it makes first needs such a device
    monkeypatch.setattr(ExpertMapManager, "_init_aiter_shared_experts_topK_buffer", lambda *_, **__: None)
    with pytest.raises(UnsupportedModelError, match="do not run shared experts fused into the routed ones"):
        build(quantization(), n_shared_experts=1, fuse_shared_experts=True)


def test_lora_is_refused(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_config, "lora_config", SimpleNamespace())
    with pytest.raises(UnsupportedModelError, match="do not run LoRA; start vLLM without --enable-lora"):
        build(quantization())


def test_a_hidden_size_padded_for_a_communication_library_is_refused(monkeypatch: pytest.MonkeyPatch):
    from moesparse.packed.vllm_experts import PackedExpertsMethod

    monkeypatch.setattr(PackedExpertsMethod, "maybe_roundup_sizes", lambda self, hidden, inner, *_: (128, inner))
    with pytest.raises(UnsupportedModelError, match="hidden states padded to 128; choose another --all2all-backend"):
        build(quantization())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format_version": 2}, "format_version 1, got 2; a newer moesparse wrote it"),
        (
            {"blocks": {BLOCK: {}, "model.layers.3.other.experts": {}}},
            "one block of experts in each packed decoder layer",
        ),
        ({"blocks": {"model.experts": {}}}, "one block of experts in each packed decoder layer, got model.experts"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(entries: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        quantization(**entries)


@pytest.mark.parametrize(("up", "message"), [("0.5", "must be n:m, got '0.5'"), ("2:5", "m in 4, 8, 16, 32, got 2:5")])
def test_a_pattern_that_is_none_is_refused(up: str, message: str):
    with pytest.raises(CheckpointError, match=message):
        build(quantization(up))


def test_an_expert_layer_outside_the_numbered_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="'experts' must lie in a numbered decoder layer"):
        build(quantization(), prefix="experts")
