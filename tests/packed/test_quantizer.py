"""Packed checkpoints in transformers: written, loaded, saved again and run, bit for bit; refused where they must be.

This is also the contract with the parts of transformers that are not public API (the weight converters).
"""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import moesparse
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.errors import CheckpointError, MoESparseError, UnsupportedModelError
from moesparse.models.blocks import find_moe_blocks
from moesparse.packed.experts import SparseExperts
from moesparse.packed.model import pack, packed_blocks, unpack
from moesparse.testing import MOE_FAMILIES, assert_within_budget, has_family, prune_by_magnitude, tiny_model

# merged with and without a renamed block; first layers dense and shared experts; stored fused, transposed, with biases
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
# the checkpoints call the fused matrices by names of a linear layer
RENAMED = ("aria_text", "granitemoe", "granitemoehybrid", "granitemoeshared")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.ERROR)


def pruned(family: str, pattern: str = "2:4") -> nn.Module:
    if not has_family(family):
        pytest.skip(f"this transformers release has no {family} behind ExpertsInterface")
    model = prune_by_magnitude(tiny_model(family), pattern)
    for parameter in model.parameters():
        # not model.bfloat16(), which rounds the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    return tensors


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[key].dtype and torch.equal(x.view(torch.uint8), b[key].view(torch.uint8)) for key, x in a.items()
    )


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=tokens)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_folder_loads_runs_and_saves_the_same(family: str, tmp_path: Path):
    model = pruned(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_pretrained(model, tmp_path / "a", packed=True, recipe={"weights": "2:4"}, max_shard_size="100KB")
    assert same_bits(dict(model.state_dict()), before)
    assert not hasattr(model.config, "quantization_config")

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    names = [name for name, _ in packed_blocks(loaded)]
    assert names == [block.name for block in find_moe_blocks(model)]
    assert all(isinstance(loaded.get_submodule(name), SparseExperts) for name in names)
    pack(model)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.quantization_config.recipe == {"weights": "2:4"}

    loaded.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "c")
    first = stored(tmp_path / "a")
    assert same_bits(first, stored(tmp_path / "b"))
    assert same_bits(first, stored(tmp_path / "c"))
    for name in "bc":
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["quantization_config"]["blocks"] == {
            name: {"gate_up_proj": "2:4", "down_proj": "2:4"} for name in names
        }

    unpack(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    save_pretrained(model, tmp_path / "unpacked")
    assert same_bits({name: each.to(before[name].dtype) for name, each in loaded.state_dict().items()}, before)
    # a dense model holds tensors in float32 by its own rules, and writes them so
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert same_bits(dict(loaded.state_dict()), dict(dense.state_dict()))
    dense.save_pretrained(tmp_path / "again")
    assert same_bits(stored(tmp_path / "dense"), stored(tmp_path / "again"))
    assert isinstance(next(packed_blocks(model))[1], SparseExperts)
    assert not any(key.endswith("_meta") for key in stored(tmp_path / "dense"))


def test_what_transformers_holds_wider_than_the_model_is_written_as_the_file_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, router = pruned("qwen3_moe"), "model.layers.0.mlp.gate.weight"
    save_pretrained(model, tmp_path / "a", packed=True)
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules_strict", ["mlp.gate.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.get_parameter(router).dtype == torch.float32 and loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "b")
    first = stored(tmp_path / "a")
    assert same_bits(first, stored(tmp_path / "b"))
    # a value that bfloat16 has not
    with torch.no_grad():
        loaded.get_parameter(router)[0, 0] = 1 + 2**-20
    loaded.save_pretrained(tmp_path / "c")
    second = stored(tmp_path / "c")
    assert second[router].dtype == torch.float32 and second[router][0, 0] == 1 + 2**-20
    assert same_bits(first | {router: second[router]}, second)
    # of a model in float32 all is written so: it was asked for
    AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).save_pretrained(tmp_path / "d")
    third = stored(tmp_path / "d")
    assert third[router].dtype == third["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("family", sorted(MOE_FAMILIES))
def test_every_family_comes_back_bit_for_bit_or_is_refused(family: str, tmp_path: Path):
    model = pruned(family)
    if family in RENAMED:
        with pytest.raises(UnsupportedModelError, match="a name that cannot be given to a packed matrix"):
            save_pretrained(model, tmp_path / "out", packed=True)
        return
    save_pretrained(model, tmp_path / "out", packed=True)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(list(packed_blocks(loaded))) == len(find_moe_blocks(model))
    unpack(loaded)
    save_pretrained(model, tmp_path / "dense")
    # what transformers makes of a file (fp32 buffers, say) is its own
    dense = type(model).from_pretrained(tmp_path / "dense").state_dict()
    assert loaded.state_dict().keys() == dense.keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == dense[name].dtype and torch.equal(value, dense[name]), name


def test_keys_are_the_family_s_with_a_bitmask_beside_each_expert_matrix(tmp_path: Path):
    save_pretrained(pruned("mixtral"), tmp_path / "out", packed=True)
    tensors = stored(tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    assert tensors[name].shape == (32, 48)
    assert tensors[name].dtype == torch.bfloat16
    assert tensors[f"{name}_meta"].shape == (32, 12)
    assert tensors[f"{name}_meta"].dtype == torch.uint8


def test_a_block_left_dense_stays_dense_on_disk(tmp_path: Path):
    model = pruned("qwen3_moe")
    with torch.no_grad():
        find_moe_blocks(model)[0].matrices[0].weight.add_(1)
    save_pretrained(model, tmp_path / "out", packed=True)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert [name for name, _ in packed_blocks(loaded)] == ["model.layers.1.mlp.experts"]
    unpack(loaded)
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("pattern", ["4:8", "1:4"])
def test_other_patterns(pattern: str, tmp_path: Path):
    model = pruned("mixtral", pattern)
    save_pretrained(model, tmp_path / "out", packed=True)
    loaded, _ = load_pretrained(tmp_path / "out")
    unpack(loaded)
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))


def test_loading_in_another_dtype_casts_the_values(tmp_path: Path):
    model = pruned("mixtral")
    save_pretrained(model, tmp_path / "out", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert next(packed_blocks(loaded))[1].dtype == torch.float32
    unpack(loaded)
    assert same_bits(dict(loaded.state_dict()), dict(model.float().state_dict()))


def test_generate(tmp_path: Path):
    model = pruned("gpt_oss").float()
    save_pretrained(model, tmp_path / "out", packed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[3, 4, 5]])
    settings = {"do_sample": False, "min_new_tokens": 20, "max_new_tokens": 20}
    assert torch.equal(loaded.generate(tokens, **settings), model.generate(tokens, **settings))


def test_a_damaged_bitmask_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    save_pretrained(pruned("mixtral"), tmp_path / "out", packed=True)
    tensors = stored(tmp_path / "out")
    tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight_meta"][3, 2] ^= 1
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    message = r"damaged model.layers.1.mlp.experts.down_proj: index must keep exactly 2 of every 4 columns, got"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 1, got 2; a newer moesparse wrote it"),
        ({"blocks": {"model.layers.7.mlp.experts": {}}}, "names the block model.layers.7.mlp.experts, which this"),
        ({"blocks": {"model.layers.0.mlp.experts": {"gate_up_proj": "2:4"}}}, "experts.down_proj: pattern must be n:m"),
        ({"blocks": {"model.layers.0.mlp.experts": {"gate_up_proj": 0.5}}}, "gate_up_proj: pattern must be n:m"),
        ({"blocks": {"model.layers.0.mlp.experts": {"gate_up_proj": "0.5"}}}, "must be n:m, got '0.5'"),
        ({"blocks": ["model"]}, "must hold blocks"),
        ({"blocks": {"model.layers.0.mlp.experts": "2:4"}}, "must hold blocks"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict, message: str, tmp_path: Path):
    save_pretrained(pruned("mixtral"), tmp_path / "out", packed=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_family_that_cannot_be_stored_packed_runs_and_says_so(tmp_path: Path):
    model = pruned("granitemoe")
    expected, exact = logits(model), logits(copy.deepcopy(model).float()).double()
    with pytest.raises(UnsupportedModelError, match=r"block_sparse_moe.input_linear.weight, a name that cannot"):
        save_pretrained(model, tmp_path / "out", packed=True)
    assert not (tmp_path / "out").exists()
    pack(model)
    assert_within_budget(logits(model), expected, exact, "logits")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "out")
    save_pretrained(model, tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_packing_a_dense_model_is_refused_and_leaves_no_folder(tmp_path: Path):
    with pytest.raises(MoESparseError, match="model must hold n:m sparse experts to be packed"):
        save_pretrained(tiny_model("mixtral"), tmp_path / "out", packed=True)
    assert not (tmp_path / "out").exists()


def test_experts_left_dense_run_through_our_kernels_when_asked(monkeypatch: pytest.MonkeyPatch):
    calls = []
    from moesparse.packed import quantizer as integration

    real = integration.moe_dense
    monkeypatch.setattr(integration, "moe_dense", lambda *a, **k: calls.append(1) or real(*a, **k))
    for family in ("mixtral", "nemotron_h", "gpt_oss"):
        model = tiny_model(family)
        expected = logits(model)
        model.set_experts_implementation("moesparse")
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        # transposed weights go to transformers' own
        assert bool(calls) == (family != "gpt_oss")
        calls.clear()
        model(input_ids=torch.tensor([[3, 4]]))[0].sum().backward()
        assert find_moe_blocks(model)[0].matrices[0].parameter.grad is not None
        assert not calls


@pytest.mark.parametrize("order", ["import moesparse, transformers", "import transformers, moesparse"])
def test_importing_in_either_order_registers(order: str):
    code = f"""
{order}
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("moesparse" in AUTO_QUANTIZER_MAPPING)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True"]


def test_importing_moesparse_imports_neither_torch_nor_transformers():
    code = "import sys, moesparse; print([name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    assert moesparse.SparseExperts is SparseExperts
