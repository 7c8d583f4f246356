"""Recipes as YAML files: what is written is read again, what is wrong is named, what is published runs."""

import pytest
import torch

import moesparse
from moesparse import demo
from moesparse.errors import CheckpointError, MissingFileError, UsageError
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.recipe_file import PUBLISHED

RECIPES = [
    Recipe(),
    Recipe(weights="4:8", saliency="wanda", update="none", propagate=False, seed=3),
    Recipe(weights=0.3),
    Recipe(weights=None, experts=0.25, expert_saliency="ean", expert_mix="equal", protect_experts=True),
    Recipe(keep_experts=12, divisible_by=4, refine_experts=True, mtp="drop"),
    Recipe(target_bytes=0.7, choices=["drop", "2:4"], compare_uniform=False),
    Recipe(target_bytes="3.2GB"),
    Recipe(patterns={"model.layers.0.mlp.experts": {"gate_up_proj": "2:4", "down_proj": "dense"}}),
    Recipe(output_dtype="bfloat16"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_is_loaded(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert Recipe.of(str(tmp_path / "recipe.yaml")) == recipe


def test_a_pattern_needs_no_quotes(tmp_path):
    # YAML 1.1 counts it in minutes
    (tmp_path / "a.yaml").write_text("weights: 2:4\nsaliency: wanda\nexperts: 25e-2\n")
    found = Recipe.load(tmp_path / "a.yaml")
    assert (found.weights, found.saliency, found.experts) == ("2:4", "wanda", 0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("saliencey: wanda", r"a\.yaml must hold fields of a recipe, got 'saliencey'; the nearest is 'saliency'"),
        ("keep-experts: 4", "got 'keep-experts'; the nearest is 'keep_experts'"),
        ("protect_super_experts: true", "got 'protect_super_experts'; the nearest is 'protect_experts'"),
        ("3: 4", "must hold fields of a recipe, got 3; the nearest is"),
        ("plan: moesparse_plan.json", r"plan must be left out of .*a\.yaml: it is a file of its own, given beside"),
        ("scores: s.json", r"scores must be left out of .*a\.yaml"),
        ("keep_experts: twelve", r"'keep_experts' in .*a\.yaml must be a whole number or null, got 'twelve'"),
        ("keep_experts: true", "'keep_experts' in .* must be a whole number or null, got True"),
        ("keep_experts: 010", "'keep_experts' in .* must be a whole number or null, got '010'"),
        ("seed: 1.5", "'seed' in .* must be a whole number, got 1.5"),
        ("propagate: 1", "'propagate' in .* must be true or false, got 1"),
        ("choices: drop,2:4", "'choices' in .* must be a list, got 'drop,2:4'"),
        ("patterns: [2:4]", r"'patterns' in .* must be a mapping or null, got \['2:4'\]"),
        ("saliency: [wanda]", r"'saliency' in .* must be text, got \['wanda'\]"),
        ("seed: 1\nseed: 2", r"a\.yaml must be YAML, got 'seed' comes twice"),
        ("seed: [1", r"a\.yaml must be YAML, got while parsing"),
        ("", r"a\.yaml must hold fields of a recipe, such as saliency: wanda, got None"),
        ("- seed", "must hold fields of a recipe, such as saliency: wanda, got"),
        ("saliency: mystery", "saliency must be one of magnitude"),
        ("experts: 0.5\nkeep_experts: 3", "only one of experts and keep_experts may be given"),
    ],
)
def test_what_is_no_recipe_file(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        Recipe.load(tmp_path / "a.yaml")


def test_what_is_not_there_is_told_the_published_ones(tmp_path):
    with pytest.raises(MissingFileError, match=r"YAML file, or one of cpu, default, paper, reap-25, got 'papre'"):
        Recipe.load("papre")
    with pytest.raises(CheckpointError, match=r"cannot write .*recipe\.yaml"):
        Recipe().save(tmp_path / "none" / "recipe.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"saliency: \xff")
    with pytest.raises(UsageError, match=r"latin\.yaml must be YAML, got .*utf-8"):
        Recipe.load(tmp_path / "latin.yaml")


def test_a_recipe_with_a_plan_is_not_saved(tmp_path):
    plan = ExpertPlan.of(Origin((0, 1), 16, None, None, (None, None)), [torch.arange(12)] * 2, "reap")
    with pytest.raises(UsageError, match=r"plan must be left out of a recipe that is saved: plan\.save writes its own"):
        Recipe(weights=None, plan=plan).save(tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_published_recipes_are_what_they_are_called():
    assert PUBLISHED == ("cpu", "default", "paper", "reap-25")
    assert Recipe.load("default") == Recipe()
    assert Recipe.load("paper") == Recipe(weights="2:4", saliency="moe-pruner", update="none")
    assert Recipe.load("reap-25") == Recipe(weights=None, experts=0.25, expert_saliency="reap")
    assert Recipe.load("cpu") == Recipe(saliency="gated-sparsegpt")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_runs_on_the_embedded_model(name):
    model, _ = demo.load()
    experts = model.config.num_local_experts
    report = moesparse.prune(model, demo.windows("calibration")[:24], name, device="cpu")
    assert report.recipe == Recipe.load(name).on(torch.device("cpu")).to_dict()
    if name == "reap-25":
        assert model.config.num_local_experts == experts - experts // 4
        assert report.experts["criterion"] == "reap"
    else:
        assert report.sparsity == 0.5
