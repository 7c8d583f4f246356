"""`inspect --against` explains every difference between two folders, and names what nothing explains."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moesparse
from moesparse.checkpoints.against import check_written, compare_folders
from moesparse.checkpoints.edit import SourceFolder
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.cli import app
from moesparse.errors import CheckpointError, ResultError
from moesparse.models.meta import bare_model, read_config
from moesparse.system import folders
from moesparse.system.folders import JOURNAL_FILE
from moesparse.system.manifest import MANIFEST_FILE, write_manifest
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


def rewritten(folder, spoil):
    """A folder with other tensors, in one shard."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink()
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder, [folder / "model.safetensors"])


def add_columns(tensors):
    tensors[KEY] = torch.cat([tensors[KEY], tensors[KEY]], 1)


def lose_expert(tensors):
    del tensors[KEY]


def lose_file(folder):
    (folder / "LICENSE").unlink()


def change_setting(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))


def cut_shard(folder):
    file = folder / MANIFEST_FILE
    held = json.loads(file.read_text())
    held["shards"]["model.safetensors"]["bytes"] -= 1
    file.write_text(json.dumps(held))


@pytest.mark.parametrize(
    ("spoil", "spoil_files", "named"),
    [
        (lose, None, "the tensor reward_head.weight of the source is missing"),
        (lose_expert, None, f"the tensor {KEY} of the source is missing"),
        (add, None, "the tensor other.weight is not in the source"),
        (recast, None, "the tensor model.norm.weight is F32, and BF16 in the source"),
        (add_columns, None, rf"the tensor {KEY} has the shape \[96, 64\], and \[96, 32\] in the source"),
        (None, lose_file, "the file LICENSE of the source is missing"),
        (None, change_setting, "num_hidden_layers of config.json has another value"),
        (None, cut_shard, "model.safetensors has .* bytes, and .* in moesparse_manifest.json"),
    ],
)
def test_the_last_look_at_a_result_names_what_nothing_explains(spoil, spoil_files, named, source, pruned, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    rewritten(out, spoil or (lambda tensors: None))
    edit = SourceFolder(source, bare_model(source), read_config(source))
    if spoil_files is not None:
        check_written(out, edit)
        spoil_files(out)
    with pytest.raises(ResultError, match=f"out must be .*source with what was pruned, got: {named}"):
        check_written(out, edit)


def test_a_router_that_lost_other_rows_than_experts_is_named(source, tmp_path):
    moesparse.prune_checkpoint(source, tmp_path / "out", windows(), moesparse.Recipe(weights=None, keep_experts=4))
    edit = SourceFolder(source, bare_model(tmp_path / "out"), read_config(source))
    check_written(tmp_path / "out", edit)
    gate = "model.layers.1.mlp.gate.weight"
    rewritten(tmp_path / "out", lambda tensors: tensors.update({gate: torch.ones(3, 32).bfloat16()}))
    with pytest.raises(ResultError, match=rf"{gate} has the shape \[3, 32\], and \[8, 32\]"):
        check_written(tmp_path / "out", edit)


def test_a_run_that_ends_otherwise_than_meant_is_not_called_done(source, tmp_path, monkeypatch):
    """The source is changed while a run is at work: the folder stays unfinished, and all of it is kept."""
    shutil.copytree(source, tmp_path / "in")
    real = shutil.copy2

    def copy2(*arguments):
        found = real(*arguments)
        (tmp_path / "in" / "LICENSE").write_text("yours\n")
        return found

    monkeypatch.setattr(folders.shutil, "copy2", copy2)
    with pytest.raises(ResultError, match=r"the file LICENSE of the source is changed$"):
        moesparse.prune_checkpoint(tmp_path / "in", tmp_path / "out", None, MAGNITUDE)
    assert (tmp_path / "out" / JOURNAL_FILE).exists()
    with pytest.raises(CheckpointError, match="must be a finished checkpoint"):
        load_pretrained(tmp_path / "out")

    # in memory: kept beside, under a name of its own
    model, _ = load_pretrained(source)
    moesparse.prune(model, None, MAGNITUDE)
    for number in ("", "1"):
        (tmp_path / "in" / "LICENSE").write_text("mine\n")
        with pytest.raises(ResultError, match=rf"What was written is kept in .*saved\.unfinished{number}$"):
            save_pretrained(model, tmp_path / "saved", source=tmp_path / "in")
    assert not (tmp_path / "saved").exists() and load_pretrained(tmp_path / "saved.unfinished1")
    # and what was to be packed behind it
    (tmp_path / "in" / "LICENSE").write_text("mine\n")
    other = torch.float16 if model.dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(ResultError, match=r"What was written is kept in .*packed\.unfinished$"):
        save_pretrained(model.to(other), tmp_path / "packed", packed=True, source=tmp_path / "in")
    assert not (tmp_path / "packed").exists() and load_pretrained(tmp_path / "packed.unfinished")


def test_merged_experts_are_new_values_and_what_was_not_merged_is_not(tmp_path):
    """Weights and biases of experts; a router's row and a bias of a kept one are the source's."""
    tiny_model("gpt_oss").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    recipe = moesparse.Recipe(weights=None, experts=0.25, update="none", expert_method="ream")
    moesparse.prune_checkpoint(tmp_path / "source", tmp_path / "out", windows(), recipe)
    found = compare_folders(tmp_path / "out", tmp_path / "source")
    assert found.problems == []
    # two layers of gate_up, down and the biases of both
    assert len(found.tensors["updated"]) == 8 and all(".experts." in key for key in found.tensors["updated"])
    name = "model.layers.0.mlp.router.weight"
    file = next(each for each in (tmp_path / "out").glob("*.safetensors") if name in load_file(each))
    tensors = load_file(file)
    tensors[name][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    (problem,) = compare_folders(tmp_path / "out", tmp_path / "source").problems
    assert "router.weight" in problem
