"""A global budget from folder to folder: as in memory, with weights, of quantised experts, in a wrapper."""

import dataclasses
import json

import further_tokens
import pytest
import torch
from faults import assert_same
from quantised_folders import whole_model, write_quantised

import moesparse
from moesparse import Recipe
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.recipe_words import recipe_in_words
from moesparse.checkpoints.repack import pack_folder
from moesparse.errors import UsageError
from moesparse.experts.surgery import remove_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.on_disk import LayersOnDisk
from moesparse.pruning.card import model_card
from moesparse.pruning.plan import plan_run
from moesparse.pruning.run import prune_checkpoint
from moesparse.testing import prune_by_magnitude, tiny_model

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
GLOBAL = Recipe(weights=None, experts=0.3, expert_budget="global", allow_non_uniform=True)
RECIPES = {
    "refit": GLOBAL,
    "merge": dataclasses.replace(GLOBAL, update="none", expert_method="ream"),
    "both": dataclasses.replace(GLOBAL, weights="2:4", saliency="moe-pruner", update="least-squares+rescale"),
}


def counts(folder):
    return [block.num_experts for block in LayersOnDisk(folder).blocks]


@pytest.mark.parametrize(("family", "name"), [*(("mixtral", name) for name in RECIPES), ("gpt_oss", "both")])
def test_the_folder_is_that_of_pruning_in_memory(family, name, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model, _ = moesparse.load_pretrained(tmp_path / "dense")
    want = moesparse.prune(model, WINDOWS, RECIPES[name], batch_size=4)
    moesparse.save_pretrained(model, tmp_path / "want", recipe=want.recipe)
    got = prune_checkpoint(tmp_path / "dense", tmp_path / "got", WINDOWS, RECIPES[name], batch_size=4)
    assert_same(tmp_path / "want", tmp_path / "got")
    assert json.dumps(got.experts) == json.dumps(want.experts)
    found = counts(tmp_path / "got")
    assert found == [len(block["kept"]) for block in got.experts["blocks"]]
    assert sum(found) == 11
    with torch.no_grad():
        again = moesparse.load_pretrained(tmp_path / "got")[0](WINDOWS).logits
        assert torch.equal(again, model(WINDOWS).logits)
    assert compare_folders(tmp_path / "got", tmp_path / "dense").problems == []
    said = f"{min(found)} to {max(found)} of 8"
    card = model_card("base", got)
    assert f"| experts per block | {said} |" in card and "not by transformers" in card
    assert "30% of the experts of all blocks, ranked together, are " in recipe_in_words(got.recipe)


def test_the_plan_counts_the_experts_that_stay_on_average(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    layers = LayersOnDisk(tmp_path / "dense")
    sizes = {"windows": 1, "length": 8, "batch_size": 1}
    assert plan_run(layers.model, layers.blocks, GLOBAL, **sizes).keep == 6
    refused = dataclasses.replace(GLOBAL, allow_non_uniform=False)
    with pytest.raises(UsageError, match=r"unless allow_non_uniform=True, got 'global': config.json then says"):
        plan_run(layers.model, layers.blocks, refused, **sizes)


@pytest.mark.parametrize("case", ["fp8 qwen", "mxfp4"])
def test_quantised_experts_that_stay_have_their_bytes(case, tmp_path):
    source, out = write_quantised(tmp_path / "source", case), tmp_path / "out"
    recipe = dataclasses.replace(GLOBAL, update="none", expert_saliency="aimer", expert_floor=3)
    report = prune_checkpoint(source, out, None, recipe)
    kept = [block["kept"] for block in report.experts["blocks"]]
    dense = whole_model(source)
    remove_experts(dense, kept, allow_non_uniform=True)
    with torch.no_grad():
        assert whole_model(out)(WINDOWS).logits.equal(dense(WINDOWS).logits)
    found = compare_folders(out, source)
    assert found.problems == [] and found.tensors.keys() <= {"equal", "cut", "removed"}
    assert inspect_folder(out, verify=True).problems == []
    assert counts(out) == list(map(len, kept))


def test_packed_experts_that_stay_compute_the_same(tmp_path):
    prune_by_magnitude(tiny_model("mixtral")).save_pretrained(tmp_path / "sparse")
    pack_folder(tmp_path / "sparse", tmp_path / "packed")
    recipe = dataclasses.replace(GLOBAL, update="none", expert_saliency="aimer")
    report = prune_checkpoint(tmp_path / "packed", tmp_path / "out", None, recipe)
    want, got = (moesparse.load_pretrained(tmp_path / name)[0] for name in ("sparse", "out"))
    remove_experts(want, [block["kept"] for block in report.experts["blocks"]], allow_non_uniform=True)
    with torch.no_grad():
        assert torch.allclose(got(WINDOWS).logits, want(WINDOWS).logits, atol=1e-5)
    assert compare_folders(tmp_path / "out", tmp_path / "packed").problems == []


def test_layers_that_predict_further_tokens_cannot_have_a_count_of_their_own(tmp_path):
    source = further_tokens.checkpoint(tmp_path / "source", "qwen3_next")
    cut = dataclasses.replace(GLOBAL, update="none", expert_saliency="aimer")
    with pytest.raises(UsageError, match="mtp must be keep or drop where layers keep different numbers of experts"):
        prune_checkpoint(source, tmp_path / "out", None, dataclasses.replace(cut, mtp="prune"))
    assert not (tmp_path / "out").exists()
    report = prune_checkpoint(source, tmp_path / "out", None, cut)
    assert report.surplus["dropped"] and compare_folders(tmp_path / "out", source).problems == []


def test_a_text_model_in_a_wrapper(tmp_path):
    model = tiny_model("qwen3_5_moe")
    model.save_pretrained(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", None, dataclasses.replace(GLOBAL, update="none"))
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    found = counts(tmp_path / "out")
    assert held["text_config"]["num_experts"] == max(found) and "per_layer_config" not in held
    (layer,) = held["text_config"]["per_layer_config"].items()
    assert layer == (str(found.index(min(found))), {"num_experts": min(found)})
    loaded, _ = moesparse.load_pretrained(tmp_path / "out")
    assert [block.num_experts for block in find_moe_blocks(loaded)] == found
