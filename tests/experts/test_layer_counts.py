"""Layers that keep different numbers of experts: written as per_layer_config, read again, refused elsewhere."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

import moesparse
from moesparse.checkpoints.pretrained import save_pretrained
from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.experts.surgery import plan_removal, remove_experts, say_readers
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.layer_counts import has_layer_counts, unregistered
from moesparse.models.on_disk import LayersOnDisk
from moesparse.testing import tiny_model

TOKENS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
# a family, what its config calls the number, and the experts that stay in each of its blocks
CASES = {
    "mixtral": ("num_local_experts", {}, [[0, 2, 3, 6, 7], [1, 2, 4]]),
    "qwen3_moe": ("num_local_experts", {}, [[1, 5], [0, 1, 2, 3, 4, 5, 6, 7]]),
    "deepseek_v3": ("n_routed_experts", {"num_hidden_layers": 3, "n_group": 1}, [[0, 1, 2, 4, 5, 6], [3, 5, 7]]),
}


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def sliced(model, kept):
    """The model with rows taken out of its tensors by hand: those of the experts and of the router."""
    layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for mlp, ids in zip(layers, kept, strict=True):
        for owner in (mlp.experts, mlp.gate):
            for name, tensor in list(owner.named_parameters()) + list(owner.named_buffers()):
                cut = tensor[ids].clone()
                if name in owner._parameters:
                    owner._parameters[name] = nn.Parameter(cut)
                else:
                    owner._buffers[name] = cut
        for owner in (mlp, mlp.experts, mlp.gate):
            for name in ("num_experts", "n_routed_experts"):
                if hasattr(owner, name):
                    setattr(owner, name, len(ids))
    return model


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Key, kept ids, the dense model, and the folder of one that lost experts, with its report."""
    key, settings, kept = CASES[request.param]
    dense = tiny_model(request.param, **settings)
    model = copy.deepcopy(dense)
    report = remove_experts(model, kept, allow_non_uniform=True)
    save_pretrained(model, tmp_path / "out")
    return key, kept, dense, model, tmp_path / "out", report


def test_a_folder_computes_what_the_dense_model_does_with_rows_taken_out(case):
    key, kept, dense, model, folder, report = case
    want = logits(sliced(dense, kept))
    assert torch.equal(logits(model), want)
    for loaded in (moesparse.load_pretrained(folder)[0], AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(logits(loaded), want)
        assert [block.num_experts for block in find_moe_blocks(loaded)] == [len(ids) for ids in kept]
        # one config for all layers: what is set on it later is set for each
        configs = {id(vars(module)["config"]) for module in loaded.modules() if "config" in vars(module)}
        assert configs == {id(loaded.config)}
    with LayersOnDisk(folder).open().hold(0):
        pass
    most, numbers = max(map(len, kept)), [int(block.layer.rpartition(".")[2]) for block in find_moe_blocks(model)]
    apart = {str(number): {key: len(ids)} for number, ids in zip(numbers, kept, strict=True) if len(ids) < most}
    config = json.loads((folder / "config.json").read_text())
    assert (config[key], config["per_layer_config"]) == (most, apart)
    assert config["per_layer_config"] == model.config.to_dict()["per_layer_config"]
    assert [each.num_local_experts for each in model.config.per_layer_config][numbers[0] :] == [len(i) for i in kept]
    assert report.config.get(key, (8, 8)) == (8, most)


def test_transformers_alone_refuses_the_folder_and_the_report_says_so(case):
    key, _, _, _, folder, report = case
    with unregistered(), pytest.raises(AmbiguousGlobalPerLayerAttributeError, match=key):
        AutoModelForCausalLM.from_pretrained(folder)
    ours, theirs = report.readers.items()
    assert ours[0].startswith("moesparse ") and ours[1] == ""
    assert theirs[0].startswith("transformers ") and f"'{key}' is a per-layer attribute" in theirs[1]
    assert say_readers(report.readers).startswith(f"read by {ours[0]}, not by {theirs[0]} (Ambiguous")


def test_models_of_equal_layers_are_built_as_ever():
    model = tiny_model("mixtral")
    assert not has_layer_counts(model.config)
    report = remove_experts(model, [[0, 1, 2]] * 2, allow_non_uniform=True)
    assert "per_layer_config" not in model.config.to_dict()
    assert report.readers == {} and "readers" not in report.to_dict()


def test_what_a_config_says_of_its_layers_otherwise_stays(tmp_path):
    own = {"0": {"num_key_value_heads": 1}}
    with unregistered():
        model = tiny_model("gemma4_text", per_layer_config=own)
    remove_experts(model, [[0, 1, 2, 3], [0, 1]], allow_non_uniform=True)
    save_pretrained(model, tmp_path / "out")
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    assert held["per_layer_config"] == {"0": {"num_key_value_heads": 1}, "1": {"num_experts": 2}}
    assert torch.equal(logits(moesparse.load_pretrained(tmp_path / "out")[0]), logits(model))


def test_counts_are_those_of_layers_in_any_spelling_that_transformers_takes(tmp_path):
    model = tiny_model("qwen3_moe")
    remove_experts(model, [[0, 1, 2, 3], [0, 1]], allow_non_uniform=True)
    save_pretrained(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace('"num_local_experts": 2', '"num_experts": 2'))
    assert torch.equal(logits(moesparse.load_pretrained(tmp_path / "out")[0]), logits(model))


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ([[0, 1, 2], [4]], UsageError, r"at least the 2 experts each token uses \(top_k\), got 1"),
        ([[0, 1, 2], [0, 1, 8]], UsageError, "must be experts from 0 to 7, got 0 to 8"),
    ],
)
def test_fewer_than_a_token_uses_are_refused_in_any_layer(kept, error, message):
    model = tiny_model("mixtral")
    with pytest.raises(error, match=message):
        remove_experts(model, kept, allow_non_uniform=True)
    assert model.config.num_local_experts == 8


def test_experts_are_removed_from_the_model_of_equal_layers_alone():
    model = tiny_model("mixtral")
    remove_experts(model, [[0, 1, 2, 3], [0, 1, 2]], allow_non_uniform=True)
    with pytest.raises(UsageError, match="same number of experts in every layer for some to be removed, got 3, 4"):
        plan_removal(model, [[0, 1], [0, 1]], allow_non_uniform=True)


def test_a_model_that_counts_its_experts_while_it_runs_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"ZayaRouter, which asks for self.config.num_experts"):
        plan_removal(tiny_model("zaya"), [[0, 1, 2], [0, 1]], allow_non_uniform=True)
