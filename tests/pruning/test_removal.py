"""The driver for whole experts: recipe, order, saved statistics, checkpoints and the command line's report."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.choice import choose_from_statistics
from moesparse.experts.criteria import FAMILY, aimer_scores, super_experts
from moesparse.experts.selection import choose_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.pruning.card import model_card
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(3))


def parameters(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("criterion", [*FAMILY, "easy-ep"])
def test_layer_by_layer_chooses_as_saved_statistics_do(criterion):
    model = tiny_model("mixtral")
    statistics = calibrate(model, WINDOWS)
    want = choose_from_statistics(find_moe_blocks(model), statistics, criterion, keep=5)
    recipe = Recipe(weights=None, keep_experts=5, expert_saliency=criterion, update="none")
    report = prune(copy.deepcopy(model), WINDOWS, recipe, batch_size=4).experts
    assert report is not None
    assert [block["kept"] for block in report["blocks"]] == [ids.tolist() for ids in want]
    saved = prune(model, statistics, recipe).experts
    assert saved is not None
    for name in ("blocks", "config", "bytes_before", "bytes_after"):
        assert saved[name] == report[name], name


def test_experts_then_weights_equals_two_runs():
    at_once, stepwise = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    report = prune(at_once, WINDOWS, Recipe(weights="2:4", experts=0.25))
    assert [tensor.shape[0] for block in report.blocks for tensor in block.tensors] == [6] * 4
    assert report.experts is not None
    assert all(fit["after"] < fit["before"] for fit in report.experts["refit"])
    prune(stepwise, WINDOWS, Recipe(weights=None, experts=0.25))
    prune(stepwise, WINDOWS, Recipe(weights="2:4"))
    for (name, a), b in zip(parameters(at_once).items(), parameters(stepwise).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_refined_choice_is_reported_with_its_gain():
    model = tiny_model("mixtral")
    recipe = Recipe(weights=None, keep_experts=4, expert_saliency="random", update="none", refine_experts=True)
    report = prune(model, WINDOWS, recipe)
    assert report.experts is not None
    refined = report.experts["refine"]
    assert all(block["after"] <= block["before"] for block in refined)
    assert any(block["swaps"] for block in refined)
    for block, kept in zip(refined, report.experts["blocks"], strict=True):
        assert {new for _, new in block["swaps"]} & set(kept["kept"]) or not block["swaps"]


def test_a_checkpoint_says_which_experts_are_left(tmp_path):
    model = tiny_model("mixtral")
    recipe = Recipe(weights=None, keep_experts=4, expert_saliency="gated-norm", update="none")
    report = prune(model, WINDOWS, recipe)
    card = model_card("tiny", report)
    assert "# tiny, 4 of 8 experts kept" in card
    assert "| expert criterion | gated-norm |" in card
    assert report.sparsity == 0
    save_pretrained(model, tmp_path / "out", recipe=recipe.to_dict(), card=card)
    loaded, _ = load_pretrained(tmp_path / "out")
    noted = loaded.config.moesparse
    assert noted["recipe"]["keep_experts"] == 4
    kept = {block["name"]: block["kept"] for block in report.experts["blocks"]}
    assert noted["kept_experts"] == kept
    for (name, a), b in zip(parameters(model).items(), parameters(loaded).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"weights": None}, "must prune weights, round them to values or remove experts"),
        ({"experts": 0.25, "keep_experts": 4}, "only one of experts and keep_experts"),
        ({"experts": 1.5}, "experts must be a share between 0 and 1, got 1.5"),
        ({"refine_experts": True}, "must come with experts or keep_experts"),
        ({"experts": 0.5, "expert_floor": 3}, "expert_floor must be left out with expert_budget='per-layer', got 3"),
        ({"expert_budget": "global"}, "expert_budget must come with experts or keep_experts"),
        ({"experts": 0.5, "allow_non_uniform": True}, "must come with expert_budget='global' or plan, got neither"),
        (
            {"experts": 0.5, "expert_budget": "global", "divisible_by": 2},
            "divisible_by must be left out with expert_budget='global', got 2",
        ),
        (
            {"target_bytes": 0.5, "expert_budget": "global"},
            "target_bytes must be left out with expert_budget='global', got 0.5",
        ),
        ({"experts": 0.5, "expert_budget": "equal"}, "expert_budget must be one of per-layer, global, got 'equal'"),
        ({"experts": 0.25, "expert_saliency": "reep"}, "expert_saliency must be one of frequency, .* got 'reep'"),
    ],
)
def test_recipes_that_cannot_be(recipe, message):
    with pytest.raises(UsageError, match=message):
        Recipe(**recipe)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"keep_experts": 0}, "keep_experts must be between 1 and the 8 experts"),
        ({"keep_experts": 9}, "keep_experts must be between 1 and the 8 experts"),
        (
            {"experts": 0.5, "expert_budget": "global"},
            r"unless allow_non_uniform=True, got 'global': .* read by moesparse .*, not by transformers .*'num_lo",
        ),
        (
            {"experts": 0.5, "expert_budget": "global", "allow_non_uniform": True, "expert_floor": 5},
            "experts must leave at least 5 of 8 experts per block, got 0.5",
        ),
    ],
)
def test_counts_that_cannot_be_change_nothing(recipe, message):
    model = tiny_model("mixtral")
    before = parameters(model)
    with pytest.raises(UsageError, match=message):
        prune(model, WINDOWS, Recipe(weights=None, **recipe))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), parameters(model).values(), strict=True))


def test_statistics_must_be_this_models_and_suffice():
    model = tiny_model("mixtral")
    other = calibrate(tiny_model("mixtral", seed=1), WINDOWS)
    with pytest.raises(CalibrationError, match="statistics must come from this model"):
        prune(model, other, Recipe(weights=None, experts=0.25, update="none"))
    own = calibrate(model, WINDOWS)
    with pytest.raises(CalibrationError, match="must be windows to refit"):
        prune(model, own, Recipe(weights=None, experts=0.25))
    with pytest.raises(CalibrationError, match="windows to remove experts and then prune weights"):
        prune(model, own, Recipe(weights="2:4", experts=0.25, update="none"))
    with pytest.raises(CalibrationError, match="windows or statistics to choose experts by reap, got None; only exp"):
        prune(model, None, Recipe(weights=None, experts=0.25, expert_saliency="reap", update="none"))


def test_without_text_the_weights_alone_choose():
    model = tiny_model("gpt_oss")
    want = choose_experts(torch.stack([aimer_scores(block) for block in find_moe_blocks(model)]), keep=5, top_k=2)
    for saliency in ("auto", "aimer"):
        recipe = Recipe(weights=None, keep_experts=5, update="none", expert_saliency=saliency)
        report = prune(copy.deepcopy(model), None, recipe)
        assert report.recipe["expert_saliency"] == report.experts["criterion"] == "aimer"
        assert [block["kept"] for block in report.experts["blocks"]] == [ids.tolist() for ids in want]
        assert (report.experts["dead"], report.experts["domains"]) == ([[], []], None)
        assert (report.plan.criterion, report.plan.statistics) == ("aimer", None)
    # text is for the refit
    fitted = prune(copy.deepcopy(model), WINDOWS, Recipe(weights=None, keep_experts=5, expert_saliency="aimer"))
    assert [block["kept"] for block in fitted.experts["blocks"]] == [ids.tolist() for ids in want]
    assert all(fit["after"] < fit["before"] for fit in fitted.experts["refit"])
    assert fitted.plan.statistics is None
    by_text = prune(model, WINDOWS, Recipe(weights=None, keep_experts=5, update="none"))
    assert by_text.recipe["expert_saliency"] == "reap"


@pytest.mark.parametrize(
    ("recipe", "calibration", "error", "message"),
    [
        ({}, None, CalibrationError, "windows to refit the experts that expert_saliency='aimer' keeps, got None"),
        ({"update": "none"}, WINDOWS, UsageError, "must be None with expert_saliency='aimer' and update='none', which"),
        ({"update": "none"}, "statistics", UsageError, "windows or None with expert_saliency='aimer', which says who"),
        (
            {"update": "none", "refine_experts": True},
            None,
            CalibrationError,
            "windows to refine the choice of expert",
        ),
        ({"weights": "2:4", "saliency": "wanda", "update": "none"}, None, CalibrationError, "for saliency='wanda'"),
    ],
)
def test_what_the_weights_alone_leave_text_for(recipe, calibration, error, message):
    model = tiny_model("mixtral")
    given = calibrate(model, WINDOWS) if isinstance(calibration, str) else calibration
    with pytest.raises(error, match=message):
        prune(model, given, Recipe(**{"weights": None, "experts": 0.25, "expert_saliency": "aimer"} | recipe))


@pytest.mark.parametrize("other", [{"protect_experts": True}, {"expert_mix": "equal"}])
def test_a_criterion_without_text_has_no_domains_and_no_super_experts(other):
    with pytest.raises(UsageError, match="must be left out with expert_saliency='aimer', which reads no text"):
        Recipe(experts=0.25, expert_saliency="aimer", **other)


def test_super_experts_stay_whatever_their_score():
    model = tiny_model("mixtral")
    choice = choose_from_statistics(find_moe_blocks(model), calibrate(model, WINDOWS), "frequency", keep=4)
    loud = next(expert for expert in range(8) if expert not in choice[1].tolist())
    with torch.no_grad():
        find_moe_blocks(model)[1].matrices[-1].weight[loud] *= 1000
    statistics = calibrate(model, WINDOWS)
    assert super_experts(statistics) == [(1, loud)]
    assert loud not in choose_from_statistics(find_moe_blocks(model), statistics, "frequency", keep=4)[1]
    recipe = Recipe(weights=None, keep_experts=4, expert_saliency="frequency", update="none", protect_experts=True)
    report = prune(model, WINDOWS, recipe)
    assert report.experts is not None
    assert report.experts["protected"] == [[1, loud]]
    assert loud in report.experts["blocks"][1]["kept"]


def test_super_experts_stay_where_weights_are_pruned_too():
    model = tiny_model("mixtral")
    recipe = Recipe(weights="2:4", experts=0.25, saliency="wanda", update="none", protect_experts=True)
    report = prune(model, WINDOWS, recipe)
    assert report.recipe == recipe.on(None).to_dict()
    assert report.experts is not None
    assert [tensor.shape[0] for block in report.blocks for tensor in block.tensors] == [6] * 4


def test_a_model_without_outliers_has_no_super_experts():
    statistics = calibrate(tiny_model("mixtral"), WINDOWS)
    assert super_experts(statistics) == []
    for block in statistics.blocks.values():
        block.maxima.clear()
    with pytest.raises(CalibrationError, match="must hold the largest outputs"):
        super_experts(statistics)


GLOBAL = Recipe(weights=None, experts=0.5, expert_budget="global", expert_floor=3, allow_non_uniform=True)


def test_a_global_budget_keeps_what_the_statistics_choose():
    model = tiny_model("mixtral")
    blocks, statistics = find_moe_blocks(model), calibrate(model, WINDOWS)
    kept = choose_from_statistics(blocks, statistics, "reap", remove=0.5, budget="global", floor=3)
    assert sorted(map(len, kept)) == [3, 5]
    again, merged = tiny_model("mixtral"), tiny_model("mixtral")
    report = prune(model, WINDOWS, dataclasses.replace(GLOBAL, update="none"))
    assert [block["kept"] for block in report.experts["blocks"]] == [ids.tolist() for ids in kept]
    assert report.recipe["allow_non_uniform"] is True and report.recipe["expert_floor"] == 3
    # the plan of it, on the same model; a plan alone says no such thing is wanted
    with pytest.raises(UsageError, match=r"plan must keep equally many experts in every layer, .* got 3 to 5: config"):
        prune(again, None, Recipe(weights=None, plan=report.plan, update="none"))
    prune(again, None, Recipe(weights=None, plan=report.plan, update="none", allow_non_uniform=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters(model).values(), parameters(again).values(), strict=True))
    # as many, merged
    report = prune(merged, WINDOWS, dataclasses.replace(GLOBAL, update="none", expert_method="m-smoe"))
    assert sum(len(block["kept"]) for block in report.experts["blocks"]) == 8
    assert all(block["merged"] for block in report.experts["blocks"])


def test_a_router_of_groups_has_no_global_budget():
    recipe = dataclasses.replace(GLOBAL, expert_floor=None)
    with pytest.raises(UsageError, match="expert_budget must be 'per-layer' for a router with groups, got 'global'"):
        prune(tiny_model("deepseek_v3"), WINDOWS, recipe)
