"""blocks.py: that the blocks found in every family hold the model's real experts, and that nothing is passed over."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesparse.errors import UnsupportedModelError
from moesparse.models.blocks import MoEBlock, check_coverage, decoder_layers, find_moe_blocks
from moesparse.testing import MOE_FAMILIES, UNSUPPORTED_FAMILIES, has_family, tiny_model

# In every supported transformers release.
CORE_FAMILIES = [
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "gemma4_text",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2_moe",
    "minimax",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
]
CLAMPED = {"deepseek_v4", "hy_v4"}
SWIGLU_OAI = {"gpt_oss", "minimax_m3_vl_text", "openai_privacy_filter"}

_models: dict[str, nn.Module] = {}


def model_of(family: str) -> nn.Module:
    """The family's tiny model, built once and never changed; tests that write take a copy."""
    if not has_family(family):
        pytest.skip(f"this transformers release has no {family} behind ExpertsInterface")
    if family not in _models:
        _models[family] = tiny_model(family)
    return _models[family]


def routed_tokens(block: MoEBlock, tokens: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, K distinct experts of each token and their gate weights; the last expert gets no token."""
    generator = torch.Generator().manual_seed(seed)
    top_k = block.top_k or 2
    hidden = torch.randn(tokens, block.hidden_size, generator=generator)
    index = torch.rand(tokens, block.num_experts - 1, generator=generator).topk(top_k, dim=-1).indices
    gates = torch.rand(tokens, top_k, generator=generator) + 0.1
    return hidden, index, gates


def slow_experts(block: MoEBlock, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """sum_k g_k * down(act(up(x))) by a loop over tokens and slots, from what the block hands out alone."""
    up, down = block.matrices
    out = torch.zeros_like(hidden)
    for t in range(len(hidden)):
        for k in range(index.shape[1]):
            e = index[t, k]
            h = up.weight[e] @ hidden[t]
            if up.bias is not None:
                h = h + up.bias[e]
            f = down.weight[e] @ block.activation(h[None])[0]
            if down.bias is not None:
                f = f + down.bias[e]
            out[t] += gates[t, k] * block.post_expert_norm(f[None])[0]
    return out


def test_core_families_are_all_there():
    """Without this, a renamed flag would turn every family's test into a skip."""
    assert [family for family in CORE_FAMILIES if not has_family(family)] == []
    assert sum(has_family(family) for family in MOE_FAMILIES) >= 40


@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_forward_equals_slow_reference(family: str):
    for block in find_moe_blocks(model_of(family)):
        inputs = routed_tokens(block)
        expected = slow_experts(block, *inputs)
        # Both the family's own loop and the fused forward that transformers puts in its place.
        experts = copy.deepcopy(block.experts)
        for implementation in ("eager", "batched_mm"):
            experts.config._experts_implementation = implementation
            actual = experts(*inputs)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_writes_reach_the_model(family: str):
    block = find_moe_blocks(copy.deepcopy(model_of(family)))[-1]
    hidden, index, gates = routed_tokens(block)
    touched = (index == 2).any(dim=-1)
    assert touched.any() and not touched.all()
    for matrix in block.matrices:
        before = block.experts(hidden, index, gates)
        # One row, so that a view on the wrong axis would touch other outputs than its reference says.
        matrix.weight[2, 1] *= -1.5
        if matrix.bias is not None:
            matrix.bias[2, 1] += 1
        after = block.experts(hidden, index, gates)
        assert not torch.allclose(before[touched], after[touched])
        torch.testing.assert_close(before[~touched], after[~touched], rtol=0, atol=0)
        torch.testing.assert_close(after, slow_experts(block, hidden, index, gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_whole_model_calls_each_block(family: str):
    """The model runs, and calls every block once, in order, with [T, H], [T, K], [T, K]."""
    model = model_of(family)
    blocks = find_moe_blocks(model)
    calls: list[tuple[int, list[tuple[int, ...]]]] = []

    def hook(block: MoEBlock):
        return lambda module, args, kwargs: calls.append(
            (block.index, [tuple(value.shape) for value in (*args, *kwargs.values())])
        )

    hooks = [block.experts.register_forward_pre_hook(hook(block), with_kwargs=True) for block in blocks]
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=tokens)[0]
    for handle in hooks:
        handle.remove()
    assert output.isfinite().all()
    assert [index for index, _ in calls] == list(range(len(blocks)))
    for block, (_, shapes) in zip(blocks, calls, strict=True):
        assert shapes == [(24, block.hidden_size), (24, block.top_k), (24, block.top_k)]


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_names_and_flags(family: str):
    model = model_of(family)
    blocks = find_moe_blocks(model)
    layers, layers_name = decoder_layers(model, blocks)
    assert model.get_submodule(layers_name) is layers
    for index, block in enumerate(blocks):
        assert block.index == index
        assert model.get_submodule(block.name) is block.experts
        assert model.get_submodule(block.moe_name) is block.moe
        assert any(model.get_submodule(block.layer) is layer for layer in layers)
        assert block.name.startswith(f"{block.moe_name}.") and f"{block.moe_name}.".startswith(f"{block.layer}.")
        assert block.router_name is not None and model.get_submodule(block.router_name) is block.router
        assert block.top_k == (1 if family == "zaya" else 2)
        up, down = block.matrices
        width = 2 * block.intermediate_size if block.has_gate else block.intermediate_size
        assert (up.input, down.input) == ("hidden", "activation")
        assert up.weight.shape == (block.num_experts, width, block.hidden_size) == (8, width, block.hidden_size)
        assert down.weight.shape == (block.num_experts, block.hidden_size, block.intermediate_size)
        assert block.intermediate_size == 96 and block.hidden_size in (32, 64)
        assert (up.bias is not None) == (down.bias is not None) == block.has_bias
        assert up.parameter is getattr(block.experts, up.name)
        assert not up.weight.requires_grad and up.weight.data_ptr() == up.parameter.data_ptr()


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_activation_is_named_by_what_it_computes(family: str):
    block = find_moe_blocks(model_of(family))[0]
    if family == "nemotron_h":
        expected = "relu2"
    elif family in CLAMPED | SWIGLU_OAI | {"inkling2_text"}:
        expected = None
    elif family == "gemma4_text":
        expected = "gelu_tanh"
    else:
        expected = "silu"
    assert block.activation_name == expected


@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("tanh", None),
    ],
)
def test_activations_of_one_family(act: str, name: str | None):
    block = find_moe_blocks(tiny_model("mixtral", num_hidden_layers=1, hidden_act=act))[0]
    assert block.activation_name == name
    gate, up = torch.randn(5, 2, block.intermediate_size).unbind(1)
    out = block.activation(torch.cat([gate, up], dim=-1))
    torch.testing.assert_close(out, block.experts.act_fn(gate) * up)
    assert name != "silu" or torch.allclose(out, F.silu(gate) * up)


def test_a_clamp_out_of_reach_of_small_values_is_still_seen():
    """deepseek_v4 clamps at 10: on activations of ordinary size it looks exactly like silu."""
    block = find_moe_blocks(tiny_model("deepseek_v4", swiglu_limit=10.0))[0]
    assert block.activation_name is None
    small = torch.randn(5, 2 * block.intermediate_size)
    gate, up = small.chunk(2, dim=-1)
    torch.testing.assert_close(block.activation(small), F.silu(gate) * up)


class LearnedSilu(nn.SiLU):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


def test_an_activation_with_weights_is_not_named():
    """At its first value it is silu, and training will change that."""
    model = tiny_model("mixtral", num_hidden_layers=1)
    model.model.layers[0].mlp.experts.act_fn = LearnedSilu()
    assert find_moe_blocks(model)[0].activation_name is None


def test_flags_of_the_unusual_layouts():
    (gpt_oss, *_) = find_moe_blocks(model_of("gpt_oss"))
    assert (gpt_oss.is_transposed, gpt_oss.has_bias, gpt_oss.is_concatenated) == (True, True, False)
    assert gpt_oss.matrices[0].parameter.shape == (8, 32, 192)
    assert gpt_oss.matrices[0].weight.shape == (8, 192, 32)
    (nemotron, *_) = find_moe_blocks(model_of("nemotron_h"))
    assert (nemotron.has_gate, nemotron.matrices[0].name) == (False, "up_proj")
    (gemma, *_) = find_moe_blocks(model_of("gemma4_text"))
    assert gemma.moe_name == gemma.layer == "model.layers.0"
    (dense_first, *_) = find_moe_blocks(model_of("deepseek_v3"))
    assert (dense_first.index, dense_first.layer) == (0, "model.layers.1")


def test_repr_fits_on_a_screen():
    assert len(repr(find_moe_blocks(model_of("mixtral"))[0])) < 800


def test_latent_experts_are_narrower_than_the_model():
    model = tiny_model("nemotron_h", moe_latent_size=16)
    block = find_moe_blocks(model)[0]
    assert block.hidden_size == 16
    inputs = routed_tokens(block)
    with torch.no_grad():
        torch.testing.assert_close(block.experts(*inputs), slow_experts(block, *inputs))


def test_post_expert_norm():
    block = find_moe_blocks(model_of("muse_spark_text"))[0]
    assert block.has_post_expert_norm
    rows = torch.randn(3, block.hidden_size)
    torch.testing.assert_close(block.post_expert_norm(rows), block.experts.post_expert_norm(rows))
    assert not torch.allclose(block.post_expert_norm(rows), rows)
    plain = find_moe_blocks(model_of("mixtral"))[0]
    rows = torch.randn(3, plain.hidden_size)
    assert plain.post_expert_norm(rows) is rows


def test_matrix_follows_a_replaced_parameter():
    """Loading from meta replaces the parameters; a block found before must not write to the old ones."""
    with torch.device("meta"):
        model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    assert block.matrices[0].weight.is_meta
    model.to_empty(device="cpu")
    assert block.matrices[0].weight.device.type == "cpu"
    assert block.matrices[0].weight.data_ptr() == block.experts.gate_up_proj.data_ptr()


def test_router_and_top_k_without_the_usual_names():
    model = tiny_model("mixtral", num_hidden_layers=1)
    moe = model.model.layers[0].mlp
    moe.chooser = moe.gate
    del moe.gate
    assert find_moe_blocks(model)[0].router_name == "model.layers.0.mlp.chooser"
    del moe.chooser.top_k
    moe.top_k = 3
    assert find_moe_blocks(model)[0].top_k == 3
    del moe.top_k
    model.config.top_k = 5  # of sampling
    assert find_moe_blocks(model)[0].top_k == 2  # from the config
    model.config.num_experts_per_tok = 9  # more than there are
    assert find_moe_blocks(model)[0].top_k is None
    moe.second = nn.Linear(32, 8)
    block = find_moe_blocks(model)[0]
    assert (block.router, block.router_name) == (None, None)


@pytest.mark.parametrize("seed", [0, 1])
def test_tiny_models_are_reproducible(seed: int):
    state = torch.random.get_rng_state()
    first, second = (tiny_model("mixtral", seed=seed).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first["lm_head.weight"], tiny_model("mixtral", seed=2).state_dict()["lm_head.weight"])


def test_unknown_family():
    with pytest.raises(ValueError, match=r"family must be one of .*'mixtral'.*, got 'mistral'"):
        tiny_model("mistral")


# Refusals


def refused(model: nn.Module, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        find_moe_blocks(model)


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("dbrx", r"^dbrx: transformer\.blocks\.0\.ffn\.experts\.mlp\.w1 \[768, 32\] .*stacked in 2-D tensors"),
        ("jetmoe", r"^jetmoe: model\.layers\.0\.\S+ .*JetMoeParallelExperts.*attention heads are experts too"),
        ("llama4_text", r"^llama4_text: model\.layers\.0\.feed_forward\.experts\.gate_up_proj .*gate scales the input"),
        ("longcat_flash", r"^longcat_flash: model\.layers\.0\.mlp\.experts\.gate_up_proj .*zero experts"),
        ("nllb-moe", r"^nllb-moe: \S+\.experts\.expert_0\.fc1\.weight .*NllbMoeExperts.*a module of its own"),
        ("switch_transformers", r"^switch_transformers: \S+\.experts\.expert_0\.wi\.weight .*a module of its own"),
    ],
)
def test_unsupported_families_are_refused_by_name(family: str, match: str):
    model = tiny_model(family)
    refused(model, match)
    # The words differ without the family's own reason, the refusal does not: it is found from the modules.
    model.config.model_type = "somebody_elses"
    refused(model, r"^somebody_elses: .* does not go through ExpertsInterface: ")


def test_every_unsupported_family_has_its_case():
    cases = test_unsupported_families_are_refused_by_name.pytestmark[0].args[1]
    assert {family for family, _ in cases} == set(UNSUPPORTED_FAMILIES)


def test_family_older_than_its_interface_is_refused():
    """aria's experts came behind the interface after transformers 5.17: before, a refusal and not a wrong block."""
    if has_family("aria_text"):
        pytest.skip("this release has aria behind ExpertsInterface")
    refused(tiny_model("aria_text"), r"^aria_text: .*forward takes \(hidden_states, router_logits\)")


def test_dense_model_has_no_experts():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    refused(model, r"must have experts, got LlamaForCausalLM \(model type llama\), which is dense")
    refused(nn.Linear(4, 4), r"got Linear \(model type Linear\), which is dense")


def mixtral() -> tuple[nn.Module, nn.Module]:
    model = tiny_model("mixtral")
    return model, model.model.layers[1].mlp


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_packed_experts_are_refused(dtype: torch.dtype):
    model, moe = mixtral()
    packed = moe.experts.down_proj.detach().to(dtype)
    moe.experts.down_proj = nn.Parameter(packed, requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    refused(model, rf"layers\.1\.mlp\.experts\.down_proj holds {name} values: .*packed or quantised")


def test_packed_experts_in_buffers_of_another_module_are_refused():
    model, moe = mixtral()
    packed = nn.Module()
    packed.register_buffer("gate_up_values", torch.zeros(8, 192, 16, dtype=torch.int32))
    moe.experts = packed
    refused(model, r"mixtral: model\.layers\.1\.mlp\.experts\.gate_up_values holds int32 values: .*packed or quantised")


def test_a_parameter_replaced_by_a_parametrization_is_refused():
    model, moe = mixtral()
    torch.nn.utils.parametrize.register_parametrization(moe.experts, "down_proj", nn.Identity())
    refused(model, r"layers\.1\.mlp\.experts\.down_proj must be a parameter .* missing or was replaced")


def test_expert_parallel_shards_are_refused():
    model, moe = mixtral()
    moe.experts._is_expert_parallel = True
    refused(model, r"layers\.1\.mlp\.experts must hold all experts, got an expert-parallel shard")


def test_shapes_that_do_not_fit_are_refused():
    model, moe = mixtral()
    moe.experts.gate_up_proj = nn.Parameter(torch.zeros(8, 96, 32))
    refused(model, r"gate_up_proj must be \[8, 192, 32\] .*down_proj \[8, 32, 96\], got \[8, 96, 32\]")
    moe.experts.gate_up_proj = nn.Parameter(torch.zeros(192, 32))
    refused(model, r"gate_up_proj must be 3-D, got \[192, 32\]")


def test_another_call_is_refused():
    model, moe = mixtral()
    moe.experts.forward = lambda hidden_states: hidden_states
    refused(
        model, r"must be called with \(hidden_states, top_k_index, top_k_weights\), its forward takes \(hidden_states\)"
    )


def test_experts_without_gate_or_activation_are_refused():
    model, moe = mixtral()
    moe.experts.has_gate = False
    moe.experts.act_fn = None
    refused(model, r"layers\.1\.mlp\.experts has no gate and no act_fn")


def test_experts_outside_a_list_of_layers_are_refused():
    _, moe = mixtral()
    refused(moe, r"MixtralSparseMoeBlock: experts must lie in a list of layers")


def test_shared_weights_are_refused():
    model, moe = mixtral()
    moe.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    refused(
        model, r"layers\.1\.mlp\.experts\.down_proj is the same tensor as model\.layers\.0\.mlp\.experts\.down_proj"
    )


def test_one_module_in_two_layers_is_refused():
    model, moe = mixtral()
    moe.experts = model.model.layers[0].mlp.experts
    refused(model, r"layers\.1\.mlp\.experts is the same module as model\.layers\.0\.mlp\.experts")


# Coverage


@pytest.mark.parametrize(
    ("place", "shape", "match"),
    [
        (
            "experts.extra",
            (8, 4, 4),
            r"experts\.extra \[8, 4, 4\] .* none of the weights .* reads from \S+\.mlp\.experts",
        ),
        ("experts.extra", (4, 4), r"experts\.extra \[4, 4\] .* none of the weights"),
        ("experts.down_proj_bias", (8, 32), r"experts\.down_proj_bias \[8, 32\] .* none of the weights"),
        ("stray", (8, 4, 4), r"mlp\.stray \[8, 4, 4\] belongs to experts"),
        ("gate.stray", (8, 4, 4), r"mlp\.gate\.stray \[8, 4, 4\] belongs to experts"),
        ("local_experts.stray", (4, 4), r"mlp\.local_experts\.stray \[4, 4\] belongs to experts"),
    ],
)
def test_a_stray_expert_parameter_is_named(place: str, shape: tuple[int, ...], match: str):
    model, moe = mixtral()
    module_name, _, name = place.rpartition(".")
    if module_name and not hasattr(moe, module_name):
        moe.add_module(module_name, nn.Module())
    moe.get_submodule(module_name).register_parameter(name, nn.Parameter(torch.zeros(shape)))
    refused(model, match)


@pytest.mark.parametrize(
    ("place", "tensor"),
    [
        ("experts.norm", torch.zeros(4)),  # a norm inside the experts
        ("gate.stray", torch.zeros(7, 4, 4)),  # 3-D, of another length
        ("shared_experts.up_proj", torch.zeros(8, 4, 4)),  # inkling keeps its shared experts so
        ("pre_expert_proj.weight", torch.zeros(4, 4)),  # muse_spark's latent projection
    ],
)
def test_what_is_no_expert_is_left_alone(place: str, tensor: Tensor):
    model, moe = mixtral()
    module_name, _, name = place.rpartition(".")
    if not hasattr(moe, module_name):
        moe.add_module(module_name, nn.Module())
    moe.get_submodule(module_name).register_parameter(name, nn.Parameter(tensor))
    assert len(find_moe_blocks(model)) == 2


def test_convolutions_and_attention_are_left_alone():
    model, moe = mixtral()
    moe.conv = nn.Conv1d(8, 8, 3)
    model.model.layers[0].self_attn.per_head = nn.Parameter(torch.zeros(8, 4, 4))
    model.vision_tower = nn.Conv3d(3, 8, 2)
    # As long as the experts are many, but not equal.
    moe.num_experts = 2
    moe.steps = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
    assert len(find_moe_blocks(model)) == 2


def test_attention_below_the_parent_of_the_experts_is_left_alone():
    """gemma4's experts hang in the layer itself, beside its attention."""
    model = tiny_model("gemma4_text")
    model.model.layers[0].self_attn.per_head = nn.Parameter(torch.zeros(8, 4, 4))
    assert len(find_moe_blocks(model)) == 2
    model.model.layers[0].stray = nn.Parameter(torch.zeros(8, 4, 4))
    refused(model, r"^gemma4_text: model\.layers\.0\.stray \[8, 4, 4\] belongs to experts")


class OldStyleMoE(nn.Module):
    """The experts of remote code written before transformers 5: a list of small networks."""

    def __init__(self, list_name: str):
        super().__init__()
        self.num_experts = 4
        self.gate = nn.Linear(8, 4)
        experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(4))
        self.add_module(list_name, experts)


@pytest.mark.parametrize("list_name", ["experts", "networks"])
def test_lists_of_expert_modules_are_refused(list_name: str):
    model = nn.Module()
    model.layers = nn.ModuleList([OldStyleMoE(list_name)])
    refused(model, rf"layers\.0\.{list_name}\.0\.0\.weight .* every expert is a module of its own")


def test_a_mixed_model_is_refused_for_the_experts_it_would_skip():
    model, _ = mixtral()
    model.model.layers[0].moe = OldStyleMoE("experts")
    refused(model, r"model\.layers\.0\.moe\.experts\.0\.0\.weight")


def test_an_undecorated_class_of_the_right_form_is_refused():
    model, moe = mixtral()
    del moe.experts.is_transposed
    refused(
        model, r"layers\.1\.mlp\.experts\.gate_up_proj .*MixtralExperts.* not decorated with use_experts_implementation"
    )


def test_coverage_of_given_blocks():
    model, _ = mixtral()
    blocks = find_moe_blocks(model)
    check_coverage(model, blocks)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        check_coverage(model, blocks[:1])
    with pytest.raises(UnsupportedModelError, match="is the same tensor as"):
        check_coverage(model, [*blocks, blocks[0]])


# Layers


def test_blocks_in_several_lists_are_named():
    model = nn.Module()
    model.encoder, model.decoder = tiny_model("mixtral"), tiny_model("gpt_oss")
    blocks = find_moe_blocks(model)
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    with pytest.raises(
        UnsupportedModelError, match=r"one list of layers, got encoder\.model\.layers, decoder\.model\.la"
    ):
        decoder_layers(model, blocks)
    layers, name = decoder_layers(model, blocks[2:])
    assert (name, layers) == ("decoder.model.layers", model.decoder.model.layers)
    with pytest.raises(UnsupportedModelError, match="one list of layers, got no blocks"):
        decoder_layers(model, [])


def test_lists_inside_a_layer_do_not_count():
    """longcat_flash has lists of MLPs in each layer: the layer is what hangs in the outermost list."""
    model, moe = mixtral()
    model.model.layers[1].mlp = nn.ModuleList([moe])
    block = find_moe_blocks(model)[1]
    assert (block.layer, block.name) == ("model.layers.1", "model.layers.1.mlp.0.experts")
    assert decoder_layers(model, [block])[1] == "model.layers"
