"""A choice of experts carried out on copies of the model: without text, or to the bits of the run that made it."""

import json

import pytest
import torch
from faults import assert_same
from further_tokens import DEEPSEEK, QWEN, checkpoint
from transformers import AutoModelForCausalLM

from moesparse import Recipe, prune, prune_checkpoint
from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.errors import CalibrationError, CheckpointError, UsageError
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import PLAN_FILE, ExpertPlan
from moesparse.experts.scores_file import ExpertScores
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.look import sketches
from moesparse.system.manifest import MANIFEST_FILE
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
CUT = {"weights": None, "update": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in three dtypes, and what a run on one of them left: it was calibrated in float32."""
    path = tmp_path_factory.mktemp("copies")
    model = tiny_model("deepseek_v3", num_hidden_layers=3)
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        model.to(dtype).save_pretrained(path / name)
    prune_checkpoint(path / "f32", path / "cut", WINDOWS, Recipe(weights=None, experts=0.5), batch_size=4)
    return path


@pytest.fixture(scope="module")
def plan(folder):
    return ExpertPlan.load(folder / "cut" / PLAN_FILE)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_a_copy_in_another_dtype_loses_the_same_experts(name, folder, plan, tmp_path):
    report = prune_checkpoint(folder / name, tmp_path / "out", None, Recipe(**CUT, plan=plan))
    want = json.loads((folder / "cut" / "moesparse_report.json").read_text())["experts"]
    assert report.experts["blocks"] == want["blocks"]
    assert (report.experts["criterion"], report.experts["refit"]) == ("reap", [])
    assert "scores" not in report.experts and report.experts["domains"] is None
    assert report.recipe["plan"] == plan.identity() and report.recipe["expert_saliency"] == "reap"
    assert report.calibration["tokens"] == 0
    # every tensor that stays has its bytes
    dense = AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for before, after, kept in zip(find_moe_blocks(dense), find_moe_blocks(got), plan.kept, strict=True):
        assert torch.equal(after.router.weight, before.router.weight[list(kept)])
        for old, new in zip(before.matrices, after.matrices, strict=True):
            assert torch.equal(new.weight, old.weight[list(kept)])
    # the plan of the result is of what was cut, and has the text of the first choice
    again = ExpertPlan.load(tmp_path / "out" / PLAN_FILE)
    assert (again.kept, again.criterion, again.statistics) == (plan.kept, "reap", plan.statistics)
    model, _ = load_pretrained(folder / name)
    assert prune(model, None, Recipe(**CUT, plan=plan)).plan == again
    save_pretrained(model, tmp_path / "whole", recipe=report.recipe, plan=again)
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("recipe", [{"weights": None}, {"weights": "2:4", "saliency": "wanda"}])
def test_with_the_text_it_is_the_run_that_made_it(recipe, folder, plan, tmp_path):
    want = prune_checkpoint(folder / "f32", tmp_path / "want", WINDOWS, Recipe(**recipe, experts=0.5), batch_size=4)
    got = prune_checkpoint(folder / "f32", tmp_path / "got", WINDOWS, Recipe(**recipe, plan=plan), batch_size=4)
    # the hashes of all shards
    assert (tmp_path / "got" / MANIFEST_FILE).read_bytes() == (tmp_path / "want" / MANIFEST_FILE).read_bytes()
    assert got.experts["refit"] == want.experts["refit"] and len(got.experts["refit"]) == 2
    assert got.plan == want.plan == plan
    assert (tmp_path / "got" / PLAN_FILE).read_bytes() == (folder / "cut" / PLAN_FILE).read_bytes()


def test_weights_by_magnitude_need_no_text_either(folder, plan, tmp_path):
    recipe = Recipe(weights="2:4", saliency="magnitude", update="none", plan=plan)
    report = prune_checkpoint(folder / "bf16", tmp_path / "out", None, recipe)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert (tmp_path / "out" / PLAN_FILE).is_file()
    model, _ = load_pretrained(folder / "bf16")
    assert prune(model, None, recipe).plan.kept == plan.kept
    save_pretrained(model, tmp_path / "whole", recipe=report.recipe)
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(("family", "style"), [("deepseek_v3", DEEPSEEK), ("qwen3_next", QWEN)])
def test_layers_that_predict_further_tokens_are_in_the_plan(family, style, tmp_path):
    source = checkpoint(tmp_path / "source", family, style, num_hidden_layers=2)
    recipe = {**CUT, "mtp": "prune"}
    report = prune_checkpoint(source, tmp_path / "cut", WINDOWS, Recipe(**recipe, keep_experts=6))
    # behind the last layer, whatever it is called in the folder: so llama.cpp counts them too
    assert report.plan.origin.layers[-1] == 2
    prune_checkpoint(source, tmp_path / "again", None, Recipe(**recipe, plan=report.plan))
    assert (tmp_path / "again" / MANIFEST_FILE).read_bytes() == (tmp_path / "cut" / MANIFEST_FILE).read_bytes()
    with pytest.raises(CalibrationError, match=r"layers with experts is [01]-2 there and"):
        prune_checkpoint(source, tmp_path / "no", None, Recipe(**CUT, plan=report.plan))


def test_scores_of_a_file_choose_as_their_text_does(folder, tmp_path):
    model, _ = load_pretrained(folder / "f32")
    blocks = find_moe_blocks(model)
    statistics = calibrate(model, WINDOWS, batch_size=4)
    scores = ExpertScores.of(Origin.of(model, blocks, sketches(blocks)), statistics)
    scores.save(tmp_path / "scores.json")
    scores = ExpertScores.load(tmp_path / "scores.json")
    for name in ("gated-norm", "man"):
        asked = Recipe(**CUT, experts=0.25, expert_saliency=name, scores=scores)
        report = prune_checkpoint(folder / "bf16", tmp_path / f"{name}", None, asked)
        assert report.recipe["scores"] == {"statistics": statistics.text_hash, "tokens": WINDOWS.numel()}
        want = prune(load_pretrained(folder / "f32")[0], statistics, Recipe(**CUT, experts=0.25, expert_saliency=name))
        assert report.plan.kept == want.plan.kept
        assert report.plan.statistics == statistics.text_hash
        assert report.experts["scores"] == want.experts["scores"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"experts": 0.5}, "experts must be left out with plan, got 0.5"),
        ({"keep_experts": 4}, "keep_experts must be left out with plan, got 4"),
        ({"refine_experts": True}, "refine_experts must be left out with plan, got True"),
        ({"protect_experts": True}, "protect_experts must be left out with plan, got True"),
        ({"target_bytes": 0.5}, "target_bytes must be left out with plan, got 0.5"),
        ({"divisible_by": 8}, "plan must keep a multiple of divisible_by=8 experts in every layer, got 4 in layer 1"),
    ],
)
def test_a_plan_leaves_nothing_to_choose(plan, more, message):
    with pytest.raises(UsageError, match=message):
        Recipe(weights=None, plan=plan, **more)


def test_scores_leave_the_count_to_choose(plan):
    scores = ExpertScores(plan.origin, {"mine": torch.zeros(2, 8)})
    with pytest.raises(UsageError, match="scores must come with experts or keep_experts, got neither"):
        Recipe(scores=scores, expert_saliency="mine")
    with pytest.raises(UsageError, match="criterion must be one that the scores hold, mine, got reap"):
        Recipe(weights=None, experts=0.5, scores=scores)
    with pytest.raises(UsageError, match="scores must be left out with plan, got some"):
        Recipe(weights=None, plan=plan, scores=scores)
    recipe = Recipe(weights="2:4", experts=0.5, scores=scores, expert_saliency="mine", divisible_by=4)
    assert recipe.without_experts() == Recipe(weights="2:4", expert_saliency="reap")


def test_what_does_not_go_with_a_plan_is_refused_before_any_work(folder, plan, tmp_path):
    out, cut = tmp_path / "out", Recipe(**CUT, plan=plan)
    with pytest.raises(
        CalibrationError, match=r"calibration must be windows to refit the experts that a plan keeps, got"
    ):
        prune_checkpoint(folder / "f32", out, None, Recipe(weights=None, plan=plan))
    with pytest.raises(UsageError, match="calibration must be None with a plan and update='none', which run no text"):
        prune_checkpoint(folder / "f32", out, WINDOWS, cut)
    model, _ = load_pretrained(folder / "f32")
    with pytest.raises(
        UsageError, match="calibration must be windows or None with a plan, which says who stays, got stat"
    ):
        prune(model, calibrate(model, WINDOWS), cut)
    with pytest.raises(CalibrationError, match="layers with experts is 1-2 there and 0-1 here"):
        prune(tiny_model("mixtral"), None, cut)
    with pytest.raises(CalibrationError, match="windows or statistics for saliency='wanda', update='none', got None"):
        prune_checkpoint(folder / "f32", out, None, Recipe("2:4", saliency="wanda", update="none", plan=plan))
    uneven = ExpertPlan(plan.origin, (plan.kept[0], (0, 1, 2, 4, 5, 6)), "reap")
    with pytest.raises(UsageError, match=r"plan must keep equally many experts in every layer, .*, got 4 to 6"):
        prune_checkpoint(folder / "f32", out, None, Recipe(**CUT, plan=uneven))
    with torch.no_grad():
        for block in find_moe_blocks(model):
            block.router.weight.neg_()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="the routers of layers 1-2 differ"):
        prune(model, None, cut)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CalibrationError, match="the routers of layers 1-2 differ"):
        prune_checkpoint(tmp_path / "other", out, None, cut)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other"]


def test_a_run_goes_on_with_its_own_plan_only(folder, plan, tmp_path):
    other = ExpertPlan(plan.origin, tuple(tuple(range(4)) for _ in plan.kept), "reap")

    def stop(event):
        if event.stage == "remove experts" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(folder / "f32", tmp_path / "out", None, Recipe(**CUT, plan=plan), progress=stop)
    with pytest.raises(CheckpointError, match="with another recipe"):
        prune_checkpoint(folder / "f32", tmp_path / "out", None, Recipe(**CUT, plan=other), resume=True)
    prune_checkpoint(folder / "f32", tmp_path / "out", None, Recipe(**CUT, plan=plan), resume=True)
    prune_checkpoint(folder / "f32", tmp_path / "want", None, Recipe(**CUT, plan=plan))
    assert_same(tmp_path / "want", tmp_path / "out")


def test_a_result_keeps_no_plan_of_an_earlier_removal(tmp_path):
    """Weights pruned or not, the plan of the source is carried over; once more experts went it would tell a lie."""
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    first = Recipe(**CUT, experts=0.25)
    prune_checkpoint(tmp_path / "dense", tmp_path / "six", WINDOWS, first)
    model, _ = load_pretrained(tmp_path / "six")
    save_pretrained(model, tmp_path / "same", source=tmp_path / "six")
    assert (tmp_path / "same" / PLAN_FILE).read_bytes() == (tmp_path / "six" / PLAN_FILE).read_bytes()
    blocks = find_moe_blocks(model)
    origin = Origin.of(model, blocks, sketches(blocks))
    report = prune(model, None, Recipe(**CUT, plan=ExpertPlan(origin, ((0, 1, 2, 5), (2, 3, 4, 5)), "mine")))
    save_pretrained(model, tmp_path / "four", source=tmp_path / "six", recipe=report.recipe)
    assert not (tmp_path / "four" / PLAN_FILE).exists()
    save_pretrained(model, tmp_path / "told", source=tmp_path / "six", recipe=report.recipe, plan=report.plan)
    assert ExpertPlan.load(tmp_path / "told" / PLAN_FILE) == report.plan
    assert (report.plan.origin.experts, report.plan.criterion) == (6, "mine")
