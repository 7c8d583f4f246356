"""Recipes in sentences: each field is said, and nothing that a config.json may hold breaks it."""

import dataclasses

import pytest

from moesparse import Recipe
from moesparse.checkpoints import recipe_words
from moesparse.checkpoints.recipe_words import recipe_in_words
from moesparse.weights.weight_rules import UPDATE_RULES


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            Recipe(saliency="gated-admm", update="least-squares+rescale"),
            "Of the experts, 2 of every 4 weights stay (2:4), chosen by gated-admm; the kept ones are solved for again "
            "by least squares and are rescaled, one number for each expert.",
        ),
        (
            Recipe(weights=0.25, saliency="magnitude", update="none", propagate=False),
            "Of the experts, 25% of the weights of every row go, chosen by magnitude; the kept ones keep the values "
            "they had.",
        ),
        (
            Recipe(saliency="wanda", update="none", propagate=False),
            "Of the experts, 2 of every 4 weights stay (2:4), chosen by wanda; the kept ones keep the values they had; "
            "every block was calibrated on what the dense blocks before it give.",
        ),
        (
            Recipe(weights=None, keep_experts=12, update="none", protect_experts=True, divisible_by=4, mtp="drop"),
            "12 experts of every block stay, chosen by reap, super-experts kept whatever their score, how many stay "
            "being a multiple of 4. Layers that predict further tokens are left out.",
        ),
        (
            Recipe(None, experts=0.25, expert_saliency="reap", update="none", expert_method="ream"),
            "25% of the experts of every block are merged into those that stay by ream, chosen by reap.",
        ),
        (
            Recipe(None, keep_experts=6, expert_saliency="frequency", expert_method="m-smoe"),
            "6 experts of every block stay, chosen by frequency, and the others are merged into those that stay by "
            "m-smoe; those that stay are refitted.",
        ),
        (
            Recipe(
                "4:8",
                "gated-admm",
                "asymmetric+tune",
                experts=0.25,
                expert_saliency="random",
                seed=3,
                expert_mix="equal",
            ),
            "25% of the experts of every block are removed, chosen by random, every domain of the text counting the "
            "same, seed 3; those that stay are refitted. Of the experts, 4 of every 8 weights stay (4:8), chosen by "
            "gated-admm; the kept ones are solved for again by least squares, with down answering for gate and up, and "
            "are trained together for the output of each expert.",
        ),
        (
            Recipe(saliency="wanda", update="asymmetric"),
            "Of the experts, 2 of every 4 weights stay (2:4), chosen by wanda; the kept ones are solved for again by "
            "least squares, with down answering for gate and up.",
        ),
        (
            Recipe(target_bytes=0.7, choices=("drop", "2:4"), saliency="sparsegpt", update="obs"),
            "How many experts stay and the pattern of each matrix were searched for to take 0.7 of the dense bytes of "
            "the experts once packed, among drop, 2:4. Of the experts, weights are pruned to those patterns, chosen "
            "by sparsegpt; the kept ones are updated as SparseGPT does.",
        ),
    ],
    ids=[
        "default",
        "ratio",
        "dense calibration",
        "removal",
        "merged",
        "merged and refitted",
        "both",
        "asymmetric",
        "target",
    ],
)
def test_a_recipe_is_said_in_sentences(recipe, words):
    assert recipe_in_words(recipe.on(None).to_dict()) == words


def test_what_a_file_decided_what_was_aimed_at_and_what_was_trained_is_said():
    plan = {"plan": {"kept": "abc", "criterion": "man"}, "update": "none"}
    assert recipe_in_words(plan) == "The experts that stay in every block are those that a plan names, made by man."
    for target, words in (("0.7", "to take 0.7 of the dense bytes"), ("3.2GB", "to take 3.2GB for the experts")):
        assert words in recipe_in_words({"target_bytes": target})
    trained = {"weights": "2:4", "update": "none", "distillation": {"mode": "blockwise", "windows": 64}}
    assert recipe_in_words(trained).endswith(
        "What stayed was trained afterwards by blockwise distillation on 64 windows of text."
    )


def test_every_field_and_every_weight_rule_has_words():
    assert {each.name for each in dataclasses.fields(Recipe)} <= recipe_words._KNOWN
    parts = {part for rule in UPDATE_RULES for part in rule.split("+")}
    assert parts | {Recipe().update} == set(recipe_words._UPDATES)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({}, "Nothing is said of how."),
        ({"weights": ["2:4"], "experts": "many", "plan": 7}, "['2:4'] of the weights of every row go"),
        ({"colour": "[/red]"}, "Noted besides: colour is [/red]."),
        ({"update": None, "weights": {}, "distillation": 3}, "Distillation: 3."),
    ],
    ids=["nothing", "other types", "unknown", "none"],
)
def test_what_a_hostile_config_holds_is_said_as_it_is(recipe, words):
    assert words in recipe_in_words(recipe)
