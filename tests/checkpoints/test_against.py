"""`inspect --against` explains every difference between two folders, and names what nothing explains."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moesparse
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.cli import app
from moesparse.testing import tiny_model

MAGNITUDE = moesparse.Recipe(saliency="magnitude", update="none")
KEY = "model.layers.1.mlp.experts.2.up_proj.weight"


def windows():
    return torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("against") / "source"
    torch.manual_seed(0)
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["reward_head.weight"] = torch.randn(2, 3)
    for key in [key for key in tensors if "layers.1.mlp.experts" in key]:
        tensors[key.replace("model.layers.1", "mtp.layers.0")] = tensors[key].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "LICENSE").write_text("mine\n")
    return folder


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("against") / "pruned"
    moesparse.prune_checkpoint(source, out, None, MAGNITUDE)
    return out


EXPERT_MATRICES = 2 * 8 * 3


def test_a_folder_is_equal_to_itself(source):
    found = compare_folders(source, source)
    assert found.problems == [] and found.config == [] and found.tensors.keys() == {"equal"}
    assert found.files == {"equal": ["LICENSE", "generation_config.json"]}


@pytest.mark.parametrize("packed", [False, True])
def test_pruned_experts_are_told_from_the_rest(packed, source, pruned, tmp_path):
    folder = pruned
    if packed:
        pack_folder(pruned, tmp_path / "packed")
        folder = tmp_path / "packed"
    found = compare_folders(folder, source)
    assert found.problems == []
    assert found.tensors.keys() == {"equal", "pruned"} and len(found.tensors["pruned"]) == EXPERT_MATRICES
    assert "reward_head.weight" in found.tensors["equal"]
    assert set(found.config) == ({"quantization_config", "moesparse"} if packed else {"moesparse"})
    if packed:
        # and the other way, and to itself
        unpack_folder(folder, tmp_path / "dense")
        again = compare_folders(tmp_path / "dense", folder)
        assert again.problems == [] and again.tensors.keys() == {"equal"}
        assert compare_folders(folder, folder).problems == []


def test_removed_experts_and_what_hangs_on_them(source, tmp_path):
    recipe = moesparse.Recipe(weights="2:4", update="none", keep_experts=4)
    moesparse.prune_checkpoint(source, tmp_path / "out", windows(), recipe)
    found = compare_folders(tmp_path / "out", source)
    assert found.problems == []
    assert {what: len(names) for what, names in found.tensors.items() if what != "equal"} == {
        "pruned": EXPERT_MATRICES // 2,
        "removed": EXPERT_MATRICES // 2,
        "cut": 2,
        "dropped": 8 * 3,
    }
    assert set(found.config) == {"moesparse", "num_local_experts"}


def test_values_that_were_solved_again_are_explained_by_the_recipe_alone(source, tmp_path):
    moesparse.prune_checkpoint(source, tmp_path / "out", windows(), moesparse.Recipe())
    found = compare_folders(tmp_path / "out", source)
    assert found.problems == [] and len(found.tensors["updated"]) == EXPERT_MATRICES
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["moesparse"]["recipe"]["update"] = "none"
    file.write_text(json.dumps(config))
    assert len(compare_folders(tmp_path / "out", source).problems) == EXPERT_MATRICES


def spoil_value(tensors):
    tensors["model.norm.weight"][0] += 1


def spoil_expert(tensors):
    tensors[KEY][tensors[KEY] != 0] *= 2


def lose(tensors):
    del tensors["reward_head.weight"]


def add(tensors):
    tensors["other.weight"] = torch.ones(2)


def recast(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_value, "the tensor model.norm.weight is not what the source holds"),
        (spoil_expert, f"the tensor {KEY} is not what the source holds"),
        (lose, "the tensor reward_head.weight of the source is missing"),
        (add, "the tensor other.weight is not what the source holds"),
        (recast, "the tensor model.norm.weight is not what the source holds"),
    ],
)
def test_a_tensor_that_nothing_explains_is_named(spoil, named, source, pruned, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    file = out / "model-00001-of-00003.safetensors"
    files = sorted(out.glob("*.safetensors"))
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for file in [*files, out / "model.safetensors.index.json"]:
        file.unlink()
    spoil(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (problem,) = compare_folders(out, source).problems
    assert problem.startswith(named)


def test_files_and_settings_that_nothing_explains_are_named(source, pruned, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    (out / "LICENSE").unlink()
    (out / "generation_config.json").write_text("{}")
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = 1.0
    config["num_local_experts"] = 8
    (out / "config.json").write_text(json.dumps(config))
    assert compare_folders(out, source).problems == [
        "the file LICENSE of the source is missing",
        "the file generation_config.json of the source is changed",
        "rope_theta of config.json has another value",
    ]


def test_the_command_shows_it_and_ends_with_1_when_something_is_off(source, pruned, tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(pruned), "--against", str(source), "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["against"]["tensors"]["pruned"]) == EXPERT_MATRICES
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    (out / "LICENSE").write_text("yours\n")
    result = CliRunner().invoke(app, ["inspect", str(out), "--against", str(source)])
    assert result.exit_code == 1
    assert "tensors pruned" in result.stdout and "the file LICENSE of the source is changed" in result.stderr
