"""A result is its source folder with those bytes changed that pruning changes, and no others."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesparse
from moesparse.checkpoints.config_text import CONFIG_KEY
from moesparse.checkpoints.history import REPORT_FILE
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.errors import CalibrationError, CheckpointError, UnsupportedModelError
from moesparse.experts.plan_file import PLAN_FILE
from moesparse.models.on_disk import LayersOnDisk
from moesparse.system.json_text import json_with
from moesparse.system.manifest import MANIFEST_FILE
from moesparse.system.shards import Shards
from moesparse.testing import tiny_model

OWN = {"config.json", MANIFEST_FILE, PLAN_FILE, REPORT_FILE, "README.md"}
EXPERT = re.compile(r"(.*layers\.(\d+)\..*\bexperts\.)(\d+)(\..*)")


def planted(family: str, folder: Path) -> Path:
    """A checkpoint as people have them: odd dtypes, tensors no model knows, files of all kinds, config in hub form."""
    torch.manual_seed(0)
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = max((int(found[2]) for key in tensors if (found := EXPERT.fullmatch(key))), default=None)
    for key in list(tensors):
        # routers, norms and corrections in float32, with bits that bf16 does not have
        if tensors[key].is_floating_point() and not re.search(r"experts|embed|proj|head", key):
            tensors[key] = tensors[key].float() * (1 + torch.rand_like(tensors[key].float()) / 1000)
        found = EXPERT.fullmatch(key)
        if found and int(found[2]) == last:
            tensors[f"mtp.layers.0.mlp.experts.{found[3]}{found[4]}"] = tensors[key].clone()
    tensors["reward_head.weight"] = torch.randn(2, 3)
    tensors["model.rotary_emb.inv_freq"] = torch.randn(5)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["read by another engine"] = {"scale": 1e-6}
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=4).replace("1e-06", "0.0000010") + "\n\n")
    # transformers would not write such settings
    (folder / "generation_config.json").write_text('{"temperature": 0.6,   "do_sample": false, "eos_token_id": [1, 2]}')
    (folder / "LICENSE").write_bytes(b"mine\r\n")
    (folder / ".gitattributes").write_text("*.safetensors lfs\n")
    (folder / "modeling_mine.py").write_text("raise SystemExit('nobody runs this')\n")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.svg").write_text("<svg/>")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "safetensors" not in file.name and str(file.relative_to(folder)) not in OWN
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = Shards.open(folder)
    return {name: shards.read(name) for name in shards.tensors}


def assert_same(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape), name
    assert got.contiguous().view(-1).view(torch.uint8).equal(want.contiguous().view(-1).view(torch.uint8)), name


def prune(source: Path, out: Path, recipe: moesparse.Recipe, whole: bool, windows: torch.Tensor | None) -> None:
    if whole:
        model, _ = load_whole(source)
        report = moesparse.prune(model, windows, recipe)
        save_pretrained(model, out, source=source, recipe=report.recipe, report=report.to_dict())
    else:
        moesparse.prune_checkpoint(source, out, windows, recipe)


def load_whole(source: Path, dtype="auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval(), None


def test_two_steps_keep_what_each_of_them_carries(tmp_path):
    source, out = planted("qwen3_moe", tmp_path / "in"), tmp_path / "out"
    windows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    moesparse.prune_checkpoint(
        source, out, windows, moesparse.Recipe(weights="2:4", experts=0.5), card=lambda report: "# a card\n"
    )
    assert files_of(out) == files_of(source)
    report = json.loads((out / REPORT_FILE).read_text())
    assert set(report["surplus"]["carried"]) == {"reward_head.weight", "model.rotary_emb.inv_freq"}
    assert all(name.startswith("mtp.") for name in report["surplus"]["dropped"])
    card = (out / "README.md").read_text()
    assert card.startswith("# a card\n") and "reward_head.weight" in card and "mtp.layers.0" in card
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    before, after = tensors_of(source), tensors_of(out)
    for name in ("reward_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert_same(after[name], before[name], name)


def test_distillation_changes_expert_weights_alone(tmp_path):
    source, out = planted("mixtral", tmp_path / "in"), tmp_path / "pruned"
    windows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    moesparse.prune_checkpoint(source, out, None, moesparse.Recipe(saliency="magnitude", update="none"))
    from moesparse.distillation import Settings, distill_checkpoint

    distill_checkpoint(out, source, tmp_path / "distilled", windows, settings=Settings(epochs=1, batch_size=2))
    assert files_of(tmp_path / "distilled") == files_of(source)
    before, after = tensors_of(out), tensors_of(tmp_path / "distilled")
    assert after.keys() == before.keys()
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed and all(EXPERT.fullmatch(name) and not name.startswith("mtp.") for name in changed)
    for name in before:
        assert after[name].dtype == before[name].dtype
        if name not in changed:
            assert_same(after[name], before[name], name)


def test_stored_dtypes_of_experts_stay(tmp_path):
    """Experts of one layer in float32, a matrix in float16, in a checkpoint that runs in bf16."""
    source, out = planted("qwen3_moe", tmp_path / "in"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    for name in list(tensors):
        if name.startswith("model.layers.1.mlp.experts."):
            tensors[name] = tensors[name].float() * 1.0001
    half = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[half] = tensors[half].half() * 1.01
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    moesparse.prune_checkpoint(source, out, None, moesparse.Recipe(saliency="magnitude", update="none"))
    after = tensors_of(out)
    for name, tensor in tensors.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.where(after[name] == 0, 0, tensor).equal(after[name]), name
    assert (after[half] == 0).sum() * 2 == after[half].numel()


@pytest.mark.parametrize("tie", [True, False])
def test_a_head_beside_tied_embeddings_stays(tie, tmp_path):
    source, out = planted("qwen3_moe", tmp_path / "in"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = tie
    (source / "config.json").write_text(json.dumps(config))
    moesparse.prune_checkpoint(source, out, None, moesparse.Recipe(saliency="magnitude", update="none"))
    before, after = tensors_of(source), tensors_of(out)
    assert not before["lm_head.weight"].equal(before["model.embed_tokens.weight"])
    assert_same(after["lm_head.weight"], before["lm_head.weight"], "lm_head.weight")


def test_a_link_out_of_the_folder_is_refused_before_any_work(tmp_path):
    source = planted("mixtral", tmp_path / "in")
    (tmp_path / "secret").write_text("mine")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    seen = []
    with pytest.raises(CheckpointError, match=r"notes\.txt must not lead out of its folder"):
        moesparse.prune_checkpoint(
            source, tmp_path / "out", None, moesparse.Recipe(saliency="magnitude", update="none"), progress=seen.append
        )
    assert not seen and not (tmp_path / "out").exists()


def test_the_count_of_experts_is_changed_as_the_source_spells_it(tmp_path):
    """qwen3_moe on the hub says num_experts; transformers 5 calls it num_local_experts, and 4 knows the first alone."""
    source, out = planted("qwen3_moe", tmp_path / "in"), tmp_path / "out"
    file = source / "config.json"
    file.write_text(file.read_text().replace('"num_local_experts"', '"num_experts"'))
    windows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    moesparse.prune_checkpoint(source, out, windows, moesparse.Recipe(weights=None, update="none", keep_experts=4))
    want = file.read_text().replace('"num_experts": 8', '"num_experts": 4')
    want = want.replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0')
    got = (out / "config.json").read_text()
    assert got == json_with(want, {(CONFIG_KEY,): json.loads(got)[CONFIG_KEY]})
    assert load_whole(out)[0].config.num_local_experts == 4


def test_an_unknown_type_is_refused_in_our_words(tmp_path):
    source = planted("mixtral", tmp_path / "in")
    file = source / "config.json"
    text = json_with(file.read_text(), {("model_type",): "kimi_k9", ("auto_map",): {"AutoConfig": "modeling_mine.A"}})
    file.write_text(text)
    for opened in (lambda: LayersOnDisk(source), lambda: load_pretrained(source)):
        with pytest.raises(UnsupportedModelError, match=r"a model_type that transformers .* has, got 'kimi_k9'"):
            opened()


def test_an_index_without_metadata_is_refused_with_the_cure(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": held["weight_map"]}))
    with pytest.raises(CheckpointError, match=r'must hold "metadata".*: add "metadata": \{\}'):
        load_pretrained(tmp_path)


def test_zeros_that_rounding_leaves_are_dense_and_those_of_a_pruning_are_not():
    from moesparse.models.blocks import find_moe_blocks
    from moesparse.models.look import check_dense

    def zeroed(mask) -> list:
        blocks = find_moe_blocks(tiny_model("mixtral"))
        for block in blocks:
            for matrix in block.matrices:
                matrix.weight[mask(matrix.weight)] = 0
        return blocks

    torch.manual_seed(0)
    check_dense(zeroed(lambda weight: torch.rand_like(weight) < 0.14))
    one_in_each_row = lambda weight: torch.arange(weight.shape[-1]).expand_as(weight) < 3  # noqa: E731
    for pruned in (one_in_each_row, lambda weight: torch.rand_like(weight) < 0.3):
        with pytest.raises(CalibrationError, match=r"must be dense.*allow_pruned=True"):
            check_dense(zeroed(pruned))


def test_a_head_that_is_the_embedding_stays_so_when_it_was_trained(tmp_path):
    source, out = planted("qwen3_moe", tmp_path / "in"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(
        json_with((source / "config.json").read_text(), {("tie_word_embeddings",): True})
    )
    model, _ = load_whole(source)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    save_pretrained(model, out, source=source)
    after = tensors_of(out)
    assert after["lm_head.weight"].equal(after["model.embed_tokens.weight"])
    assert after["lm_head.weight"].equal(tensors["lm_head.weight"] + 1)


def test_what_was_carried_over_is_read_again(tmp_path):
    """Our own result, with tensors that no model knows."""
    source, out = planted("qwen3_moe", tmp_path / "in"), tmp_path / "out"
    moesparse.prune_checkpoint(source, out, None, moesparse.Recipe(saliency="magnitude", update="none"))
    with pytest.warns(UserWarning, match=r"has no place for: mtp\..*reward_head\.weight"):
        load_pretrained(out)
    found = inspect_folder(out, verify=True)
    assert found.problems == [] and found.verified["not the model's"] == 8 * 3 + 1  # inv_freq is known, and left alone
    pack_folder(out, tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "dense")
    before, after = tensors_of(out), tensors_of(tmp_path / "dense")
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)
    assert files_of(tmp_path / "packed") == files_of(tmp_path / "dense") == files_of(source)


def test_what_is_no_language_model_is_refused_in_one_sentence(tmp_path):
    """Not with the names of 200 classes."""
    source = planted("mixtral", tmp_path / "in")
    file = source / "config.json"
    file.write_text(json_with(file.read_text(), {("model_type",): "clip"}))
    for opened in (lambda: LayersOnDisk(source), lambda: load_pretrained(source)):
        with pytest.raises(UnsupportedModelError, match=r"got one of type 'clip', which is neither$"):
            opened()


@pytest.mark.parametrize("whole", [False, True])
def test_a_result_within_its_source_holds_no_other_result(whole, tmp_path):
    """Checkpoints that lie in a folder of the source, finished or not, are no files of it."""
    source = planted("mixtral", tmp_path / "in")
    recipe = moesparse.Recipe(saliency="magnitude", update="none")
    (source / "stopped").mkdir()
    (source / "stopped" / "moesparse_journal.json").write_text("{}")
    prune(source, source / "first", recipe, whole, None)
    prune(source, source / "second", recipe, whole, None)
    own = {name for name in files_of(source) if not name.startswith(("first", "second", "stopped"))}
    assert set(files_of(source / "second")) == set(files_of(source / "first")) == own


def test_packed_in_memory_it_is_the_folder_too(tmp_path):
    """Float32 routers, tensors no model knows, config.json's text: as `moesparse pack` writes them."""
    source = planted("qwen3_moe", tmp_path / "in")
    model, _ = load_whole(source)
    report = moesparse.prune(model, None, moesparse.Recipe(saliency="magnitude", update="none"))
    noted = {"recipe": report.recipe, "report": report.to_dict(), "card": "# a card\n", "source": source}
    found = save_pretrained(model, tmp_path / "out", packed=True, **noted)
    save_pretrained(model, tmp_path / "dense", **noted)
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    got, want = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "packed")
    assert got.keys() == want.keys()
    for name in want:
        assert_same(got[name], want[name], name)
    assert {"reward_head.weight", "model.rotary_emb.inv_freq"} <= set(found["carried"])
    assert found.keys() == {"carried", "mtp"}
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "packed" / "config.json").read_text()
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["surplus"] == found
    assert "reward_head.weight" in (tmp_path / "out" / "README.md").read_text()
    assert files_of(tmp_path / "out") == files_of(source)

    # in another dtype, with the folder named: its own is stored
    again, _ = load_whole(tmp_path / "dense", dtype=torch.float32)
    save_pretrained(again, tmp_path / "wider", packed=True, source=source, recipe=report.recipe)
    got, want = tensors_of(tmp_path / "wider"), tensors_of(tmp_path / "packed")
    assert got.keys() == want.keys()
    for name in want:
        assert_same(got[name], want[name], name)

    # a model that is packed in memory, from a packed folder; and dense again
    with pytest.warns(UserWarning, match="has no place for"):
        again, _ = load_pretrained(tmp_path / "out")
    save_pretrained(again, tmp_path / "again", packed=True)
    save_pretrained(again, tmp_path / "dense again")
    for folder, like in (("again", "out"), ("dense again", "dense")):
        got, want = tensors_of(tmp_path / folder), tensors_of(tmp_path / like)
        assert got.keys() == want.keys()
        for name in want:
            # pruned zeros come back without their sign
            assert got[name].dtype == want[name].dtype and got[name].equal(want[name]), name
        assert (tmp_path / folder / "config.json").read_text() == (tmp_path / like / "config.json").read_text()


def test_a_model_from_a_folder_is_saved_as_that_folder(tmp_path):
    source = planted("mixtral", tmp_path / "in")
    model, _ = load_whole(source)
    report = moesparse.prune(model, None, moesparse.Recipe(saliency="magnitude", update="none"))
    noted = {"recipe": report.recipe, "report": report.to_dict()}
    save_pretrained(model, tmp_path / "named", source=source, **noted)
    save_pretrained(model, tmp_path / "found", **noted)
    for name, tensor in tensors_of(tmp_path / "named").items():
        assert_same(tensors_of(tmp_path / "found")[name], tensor, name)
    assert files_of(tmp_path / "found") == files_of(source)
    assert (tmp_path / "found" / "config.json").read_text() == (tmp_path / "named" / "config.json").read_text()
    said = json.loads((tmp_path / "found" / REPORT_FILE).read_text())
    assert said["written"] == "as its source folder, edited"
    # one that came from nowhere
    save_pretrained(tiny_model("mixtral"), tmp_path / "new", report={"seconds": 1.0})
    assert json.loads((tmp_path / "new" / REPORT_FILE).read_text())["written"] == "as transformers writes a model"


def test_a_folder_of_several_dtypes_is_edited_as_it_is_loaded(tmp_path):
    """Most bytes may be in another dtype than the one that config.json names and the model runs in."""
    source = planted("mixtral", tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "experts" in name]:
        tensors[name] = tensors[name].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_whole(source)
    assert model.dtype == torch.bfloat16
    moesparse.prune(model, None, moesparse.Recipe(saliency="magnitude", update="none"))
    save_pretrained(model, tmp_path / "out", report={"seconds": 1.0})
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["written"] == "as its source folder, edited"
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == tensors[name].dtype, name


def another_shape(source, model):
    model.resize_token_embeddings(70)


def other_layers(source, model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def other_tensors(source, model):
    tensors = load_file(source / "model.safetensors")
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def other_model(source, model):
    file = source / "config.json"
    file.write_text(json_with(file.read_text(), {("model_type",): "olmoe"}))


def another_dtype(source, model):
    model.float()


def a_link(source, model):
    (source / "notes").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (another_shape, r"(embed_tokens|lm_head)\.weight has another shape there"),
        (other_layers, "it has another num_hidden_layers"),
        (other_tensors, r"it holds no model\.norm\.weight"),
        (other_model, "it holds a olmoe"),
        (another_dtype, r"it is loaded in torch\.bfloat16 and the model is in torch\.float32; source= names it"),
        (a_link, "notes must not lead out of its folder"),
    ],
)
def test_a_folder_that_the_model_is_no_edit_of_is_not_edited(change, why, tmp_path):
    """Nothing of it is in the result, and a warning and the report say so."""
    source = planted("mixtral", tmp_path / "in")
    model, _ = load_whole(source)
    change(source, model)
    with pytest.warns(UserWarning, match=rf"in is not edited, for .*{why}.* as transformers writes a model"):
        save_pretrained(model, tmp_path / "out", report={"seconds": 1.0})
    said = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert said["written"] == "as transformers writes a model" and "surplus" not in said
    assert not (tmp_path / "out" / "LICENSE").exists()
    load_whole(tmp_path / "out")


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_other_formats_are_named(whole, tmp_path):
    source = planted("mixtral", tmp_path / "in")
    (source / "original").mkdir()
    others = ["consolidated.safetensors", "model-q4.gguf", "original/consolidated.00.pth", "pytorch_model.bin"]
    for name in others:
        (source / name).write_bytes(b"weights")
    recipe = moesparse.Recipe(saliency="magnitude", update="none")
    if whole:
        model, _ = load_whole(source)
        report = moesparse.prune(model, None, recipe)
        noted = {"recipe": report.recipe, "report": report.to_dict(), "card": "# a card\n"}
        assert save_pretrained(model, tmp_path / "out", source=source, **noted)["formats"] == others
    else:
        report = moesparse.prune_checkpoint(source, tmp_path / "out", None, recipe, card=lambda report: "# a card\n")
        assert report.surplus["formats"] == others
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["surplus"]["formats"] == others
    said = "consolidated.safetensors, model-q4.gguf, original/consolidated.00.pth and 1 more: not copied"
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert not any((tmp_path / "out" / name).exists() for name in others)
    if not whole:
        # and by packing, where they come to lie beside a pruned folder
        (tmp_path / "out" / "model-f16.gguf").write_bytes(b"weights")
        assert pack_folder(tmp_path / "out", tmp_path / "packed").formats == ["model-f16.gguf"]
        found = json.loads((tmp_path / "packed" / REPORT_FILE).read_text())["surplus"]
        assert found["formats"] == [*others, "model-f16.gguf"] and found["carried"] == report.surplus["carried"]
        assert "model-f16.gguf: not copied" in (tmp_path / "packed" / "README.md").read_text()
