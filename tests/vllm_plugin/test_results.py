"""vLLM's config, its model classes and their loaders take what is written as they take its source.

The model classes are built whole and loaded, not run: running takes vLLM's compiled code; test_vllm_engine.py has it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed; make test-vllm runs this in its own environments")

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

import moesparse
from moesparse.experts.ask_vllm import NOT_KNOWN, ask_vllm
from moesparse.experts.surgery import remove_experts
from moesparse.testing import tiny_model

# as the hub's config.json has them, under the names of transformers 4
HUB = {
    "qwen3_moe": {"num_experts": 8, "rope_theta": 1000000.0, "rope_scaling": None},
    "mixtral": {"num_local_experts": 8, "rope_theta": 1000000.0},
    "olmoe": {"num_experts": 8, "rope_theta": 50000.0, "rope_scaling": None},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "glm4_moe": {"n_routed_experts": 8, "rope_theta": 1000000, "rope_scaling": None, "partial_rotary_factor": 0.5},
}
CLASSES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
# gate, down, up of an expert, and where a family has its experts and its router
NAMES = {"mixtral": ("w1", "w2", "w3")}
MOE = {"mixtral": "block_sparse_moe"}
# heads of 32, the smallest that vLLM takes on a CPU
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "vocab_size": 256,
}
LATENT = {"qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 32}
RECIPES = {
    "2:4": moesparse.Recipe(saliency="magnitude", update="none"),
    "experts": moesparse.Recipe(weights=None, update="none", experts=0.25),
    "both": moesparse.Recipe(saliency="magnitude", update="none", experts=0.25),
}


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        if not model_parallel_is_initialized():
            store = tmp_path_factory.mktemp("store") / "init"
            init_distributed_environment(1, 0, f"file://{store}", local_rank=0, backend="gloo")
            initialize_model_parallel(1, 1)
        yield
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture(scope="module", params=HUB)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    family = request.param
    folder = tmp_path_factory.mktemp(family) / "source"
    tiny_model(family, **SIZES, **(LATENT if family == "deepseek_v3" else {})).save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_parameters", "dtype", "num_experts", "num_local_experts", "n_routed_experts"):
        config.pop(key, None)
    file.write_text(json.dumps(config | HUB[family] | {"torch_dtype": "float32"}, indent=2))
    return family, folder


def read(folder: Path) -> ModelConfig:
    return ModelConfig(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64)


def loaded(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The class of vLLM's registry for a folder with all its tensors loaded, and those."""
    tensors = {key: each for file in sorted(folder.glob("*.safetensors")) for key, each in load_file(file).items()}
    config = VllmConfig(model_config=read(folder), device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
        model = initialize_model(config)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        # raises for a tensor that it has no place for, or of another shape
        names = model.load_weights(iter(tensors.items()))
    assert names == dict(model.named_parameters()).keys()
    return model, tensors


@pytest.mark.parametrize("step", RECIPES)
def test_vllm_takes_results_as_it_takes_their_source(step: str, source: tuple[str, Path], tmp_path: Path):
    family, folder = source
    out = tmp_path / "out"
    windows = torch.randint(3, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    moesparse.prune_checkpoint(folder, out, windows, RECIPES[step])
    experts = 8 if step == "2:4" else 6

    before, after = read(folder), read(out)
    assert before.architectures == after.architectures == [CLASSES[family]]
    assert (before.get_num_experts(), after.get_num_experts()) == (8, experts)
    was, now = (each.hf_config.to_dict() for each in (before, after))
    counts = {key for key in HUB[family] if "experts" in key}
    differing = {key for key in {*was, *now} if was.get(key) != now.get(key)} - {"moesparse", "_name_or_path"}
    assert differing <= {*counts, "num_experts", "num_local_experts"} and bool(differing) == (experts < 8)

    model, tensors = loaded(out)
    parameters = dict(model.named_parameters())
    assert type(model).__name__ == CLASSES[family]
    # every number of the folder has a place of its own, and no place is left without one
    assert sum(each.numel() for each in parameters.values()) == sum(each.numel() for each in tensors.values())
    assert not any(each.isnan().any() for each in parameters.values())
    moe = MOE.get(family, "mlp")
    gate, down, up = NAMES.get(family, ("gate_proj", "down_proj", "up_proj"))
    layers = sorted({key.split(".")[2] for key in tensors if f".{moe}.experts." in key})
    assert layers
    for layer in layers:
        place = f"model.layers.{layer}.{moe}"
        (joined,) = (each for key, each in parameters.items() if key.startswith(place) and key.endswith("w13_weight"))
        (second,) = (each for key, each in parameters.items() if key.startswith(place) and key.endswith("w2_weight"))
        assert len(joined) == len(second) == experts
        for expert in range(experts):
            held = [tensors[f"{place}.experts.{expert}.{name}.weight"] for name in (gate, up, down)]
            assert joined[expert].equal(torch.cat(held[:2])) and second[expert].equal(held[2])
            if step != "experts":
                assert all(int((each == 0).sum()) * 2 == each.numel() for each in held)
        for name in (f"{place}.gate.weight", f"{place}.gate.e_score_correction_bias"):
            assert (name in parameters) == (name in tensors)
            assert name not in tensors or (parameters[name].equal(tensors[name]) and len(tensors[name]) == experts)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_what_we_say_of_layers_of_different_counts_is_what_vllm_does(family: str, tmp_path: Path):
    model = tiny_model(family, **SIZES, **(LATENT if family == "deepseek_v3" else {}))
    said = ask_vllm(type(model), model.config, [8, 6])
    assert not said.startswith(NOT_KNOWN) and ask_vllm(type(model), model.config, [8, 8]) == ""
    # a folder as `prune --allow-non-uniform` writes it
    remove_experts(model, [list(range(8)), list(range(6))], allow_non_uniform=True)
    moesparse.save_pretrained(model, tmp_path)
    failed = ""
    try:
        loaded(tmp_path)
    except Exception as error:
        failed = type(error).__name__
    assert said.partition(":")[0] == failed
