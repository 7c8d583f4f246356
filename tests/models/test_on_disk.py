"""A streamed model is the loaded one, layer by layer, and gives back what it took."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moesparse.errors import CheckpointError, NotInPiecesError, UnsupportedModelError
from moesparse.models.keys import checkpoint_views
from moesparse.models.on_disk import LayersOnDisk
from moesparse.testing import tiny_model

# fused from per-expert keys; dense first layers and a float32 correction; stored fused and transposed; no gate, layers
# of other kinds; tied embeddings; rotary tables per layer type; integer token tables
FAMILIES = [
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "nemotron_h",
    "cohere2_moe",
    "gemma4_text",
    "deepseek_v4",
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).to(torch.bfloat16).save_pretrained(path)
    return path


def test_the_parts_are_those_of_the_loaded_model(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    want = loaded.state_dict()
    streamed = LayersOnDisk(folder).open()
    parameters = dict(streamed.model.named_parameters())
    for name in streamed.outside:
        assert torch.equal(streamed.model.state_dict()[name], want[name]), name
    buffers = dict(streamed.model.named_non_persistent_buffers())
    for name, buffer in loaded.named_non_persistent_buffers():
        assert torch.equal(buffers[name], buffer), name
    seen = set(streamed.outside)
    for position in range(len(streamed)):
        assert all(tensor.is_meta for tensor in streamed.state(position).values())
        with streamed.hold(position):
            for name, tensor in streamed.state(position).items():
                assert tensor.dtype == want[name].dtype
                assert torch.equal(tensor, want[name]), name
                seen.add(name)
        assert all(tensor.is_meta for tensor in streamed.state(position).values())
    assert seen == set(want)
    # whoever held a parameter before still holds the model's
    assert all(parameters[name] is tensor for name, tensor in streamed.model.named_parameters())


def test_what_a_layer_is_saved_as_is_what_it_was_read_from(folder):
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    streamed = LayersOnDisk(folder).open()
    given = dict(streamed.checkpoint_tensors(None))
    for position in range(len(streamed)):
        with streamed.hold(position):
            given |= {key: tensor.clone() for key, tensor in streamed.checkpoint_tensors(position).items()}
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[key], stored[key]) for key in stored)


def test_writing_through_a_view_changes_the_model():
    model = tiny_model("mixtral")
    views = checkpoint_views(model, model.state_dict())
    views["model.layers.0.block_sparse_moe.experts.3.w3.weight"].fill_(7.0)
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    intermediate = gate_up.shape[1] // 2
    assert (gate_up[3, intermediate:] == 7).all()
    assert not (gate_up[3, :intermediate] == 7).any()


def altered(tmp_path, change):
    tiny_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path


KEY = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold model\.layers\.1\..*experts\.2\.w1\.weight, got none"):
        LayersOnDisk(altered(tmp_path, lambda tensors: tensors.pop(KEY))).open()


def test_a_strange_tensor_is_surplus(tmp_path):
    layers = LayersOnDisk(altered(tmp_path, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))).open()
    assert layers.surplus == ["extra.weight"]


def test_a_strange_tensor_in_the_place_of_another_is_named(tmp_path):
    def rename(tensors):
        tensors["extra.weight"] = tensors.pop(KEY)

    with pytest.raises(NotInPiecesError, match=r"got none but extra\.weight, which the model has no place"):
        LayersOnDisk(altered(tmp_path, rename)).open()


def test_another_shape_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.weight as \[96, 32\], got \[2, 2\]"):
        LayersOnDisk(altered(tmp_path, lambda tensors: tensors.update({KEY: torch.ones(2, 2)}))).open()


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("gpt_oss", "moesparse", "must be dense .* got packed experts of GptOss.* `moesparse unpack`"),
        ("mixtral", "bitsandbytes", "got 'bitsandbytes'"),
    ],
)
def test_packed_experts_held_the_other_way_round_and_unknown_formats_are_refused(family, method, message, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=message):
        LayersOnDisk(tmp_path)
