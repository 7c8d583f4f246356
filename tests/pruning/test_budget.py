"""A mixed budget: the search against enumeration, costs against raw activations, bytes against the packed model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesparse.pruning.to_budget
from moesparse.calibration.data import FromText
from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, UsageError
from moesparse.evaluate import Perplexity
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.layers import LayersInMemory, RunOptions
from moesparse.packed.model import pack
from moesparse.pruning.budget import BlockCosts, check_choices, check_target, packed_bytes, search, target_in_bytes
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.pruning.to_budget import measure_costs, plan_budget
from moesparse.testing import tiny_model
from moesparse.weights.patterns import Pattern, mask_from_score

WINDOWS = torch.randint(3, 60, (16, 20), generator=torch.Generator().manual_seed(3))
CHOICES = ("drop", "2:4", "4:8", "6:8", "dense")
QUICK = {"saliency": "moe-pruner", "update": "none"}


def made_up_costs(seed, blocks=3, experts=4, sizes=(96, 64)):
    """Costs that no model has: any block may be dear or cheap."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [
        BlockCosts(
            f"block {number}",
            {"up": (sizes[0], 2), "down": (sizes[1], 2)},
            float(1 + 9 * draw(1)),
            10 * draw(experts),
            {name: {p: draw(experts) for p in ("2:4", "4:8", "6:8")} for name in ("up", "down")},
        )
        for number in range(blocks)
    ]


def first(count, blocks=3):
    return [torch.arange(count)] * blocks


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.3, 0.98),
    sizes=st.sampled_from([(96, 64), (1048, 520)]),  # a large common divisor, and one of 8 weights
)
def test_no_other_plan_of_these_bytes_is_estimated_to_lose_less(seed, share, sizes):
    costs = made_up_costs(seed, sizes=sizes)
    dense = sum(cost.bytes({"up": "dense", "down": "dense"}, 4) for cost in costs)
    target = int(share * dense)
    found = search(costs, target, [2, 3, 4], first, CHOICES)
    assert found.dense == dense and found.mixed.bytes <= target
    pairs = [*itertools.product(("2:4", "4:8", "6:8"), repeat=2), ("dense", "dense")]
    best = min(
        sum(
            cost.drop_loss(torch.arange(count)) + cost.pattern_loss(torch.arange(count), {"up": up, "down": down})
            for cost, (up, down) in zip(costs, chosen, strict=True)
        )
        for count in (2, 3, 4)
        for chosen in itertools.product(pairs, repeat=3)
        if sum(c.bytes({"up": up, "down": down}, count) for c, (up, down) in zip(costs, chosen, strict=True)) <= target
    )
    assert found.mixed.loss == pytest.approx(best, rel=1e-12)
    patterns = {pattern for matrices in found.uniform.patterns.values() for pattern in matrices.values()}
    assert len(patterns) == 1 and found.uniform.bytes <= target
    assert found.mixed.loss <= found.uniform.loss


def test_sizes_without_a_common_divisor_are_rounded_up_never_down(monkeypatch):
    monkeypatch.setattr("moesparse.pruning.budget._LEVELS", 50)
    costs = made_up_costs(0, sizes=(1048, 520))
    dense = sum(cost.bytes({"up": "dense", "down": "dense"}, 4) for cost in costs)
    for share in (0.4, 0.6, 0.9):
        assert search(costs, int(share * dense), [2, 3, 4], first, CHOICES).mixed.bytes <= share * dense


def test_a_block_with_a_dense_matrix_is_stored_dense():
    sizes = {"up": (96, 2), "down": (64, 2)}
    assert packed_bytes(sizes, {"up": "2:4", "down": "dense"}, 3) == 3 * 2 * (96 + 64)
    assert packed_bytes(sizes, {"up": "2:4", "down": "6:8"}, 3) == 3 * (96 + 96 // 8 + 96 + 64 // 8)


def test_an_expert_that_does_nothing_goes_before_any_weight():
    costs = made_up_costs(1)
    for cost in costs:
        cost.energy[3] = 0
    dense = sum(cost.bytes({"up": "dense", "down": "dense"}, 4) for cost in costs)
    found = search(costs, int(0.76 * dense), [2, 3, 4], first, CHOICES)
    assert found.mixed.keep == 3 and found.mixed.loss == 0 and not found.met
    assert search(costs, int(0.75 * dense), [2, 3, 4], first, CHOICES).met


def test_costs_are_those_of_raw_activations():
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    calls = []
    handle = block.experts.register_forward_hook(lambda _m, args, _out: calls.append(args))
    with torch.no_grad():
        states = model(WINDOWS, output_hidden_states=True).hidden_states
    handle.remove()
    (hidden, index, gates), W = calls[0], block.matrices[0].weight
    V = W.masked_fill(~mask_from_score(W.abs(), Pattern.parse("2:4")), 0)
    want = torch.zeros(block.num_experts, dtype=torch.float64)
    for expert in range(block.num_experts):
        off = whole = 0.0
        for token, slot in (index == expert).nonzero().tolist():
            x = (gates[token, slot] * hidden[token]).double()
            off += float(((W[expert] - V[expert]).double() @ x).square().sum())
            whole += float((W[expert].double() @ x).square().sum())
        want[expert] = off / whole if whole else 0
    recipe = Recipe(saliency="magnitude", update="none", target_bytes=0.6)
    costs, scores, protected = measure_costs(LayersInMemory(model), FromText(WINDOWS, None), recipe, RunOptions(5))
    torch.testing.assert_close(costs[0].errors["gate_up_proj"]["2:4"], want, rtol=1e-5, atol=1e-8)
    assert costs[0].residual == pytest.approx(float(states[1].square().sum()), rel=1e-6)
    statistics = calibrate(model, WINDOWS, batch_size=5).blocks[block.name]
    torch.testing.assert_close(costs[0].energy, statistics.gated_norm_sq_sum, rtol=1e-5, atol=0)
    assert scores.shape == (len(costs), block.num_experts) and protected == []
    four, two = (costs[0].errors["down_proj"][pattern] for pattern in ("4:8", "2:4"))
    assert (four <= two + 1e-12).all() and (costs[0].errors["down_proj"]["6:8"] < four).any()


@pytest.mark.parametrize("target", [0.45, 0.7, "3.2KB"])
def test_a_plan_is_carried_out_and_takes_the_bytes_it_says(target):
    model = tiny_model("mixtral").bfloat16()
    recipe = Recipe(target_bytes=target, compare_uniform=False, **QUICK)
    dense_bytes = sum(matrix.weight.nbytes for block in find_moe_blocks(model) for matrix in block.matrices)
    if target == "3.2KB":
        assert dense_bytes > 3200
        with pytest.raises(UsageError, match="target_bytes must be at least"):
            prune(model, WINDOWS, recipe)
        return
    report = prune(model, WINDOWS, recipe)
    plan = report.budget["mixed"]
    assert plan["bytes"] <= target * dense_bytes
    assert report.sizes["after"]["packed"] == plan["bytes"]
    assert report.recipe["target_bytes"] == target and report.recipe["patterns"] == plan["patterns"]
    assert {t.name: t.pattern for t in report.blocks[0].tensors} == plan["patterns"][report.blocks[0].name]
    assert all(block.experts == plan["keep"] for block in report.blocks)
    assert "not measured" in report.budget["summary"] or "the best that was found" in report.budget["summary"]
    assert pack(model).bytes_after == plan["bytes"]


def test_patterns_by_hand_differ_by_matrix_and_leave_dense_ones_alone():
    model = tiny_model("mixtral")
    names = [block.name for block in find_moe_blocks(model)]
    dense = {name: matrix.weight.clone() for name, matrix in _matrices(model)}
    patterns = {
        names[0]: {"gate_up_proj": "2:4", "down_proj": "6:8"},
        names[1]: {"gate_up_proj": "dense", "down_proj": "dense"},
    }
    report = prune(model, WINDOWS, Recipe(patterns=patterns))
    assert [t.pattern for block in report.blocks for t in block.tensors] == ["2:4", "6:8", "dense", "dense"]
    zeros = [round(float((matrix.weight == 0).float().mean()), 3) for _, matrix in _matrices(model)]
    assert zeros == [0.5, 0.25, 0, 0]
    for name, matrix in _matrices(model):
        assert torch.equal(matrix.weight, dense[name]) == (names[1] in name)
    with pytest.raises(UsageError, match=r"patterns must name .*down_proj"):
        prune(tiny_model("mixtral"), WINDOWS, Recipe(patterns={names[0]: {"gate_up_proj": "2:4"}}))


def _matrices(model):
    return [(f"{block.name}.{m.name}", m) for block in find_moe_blocks(model) for m in block.matrices]


@pytest.mark.parametrize(("better", "says"), [("mixed", "beats the uniform one"), ("uniform", "does NOT beat")])
def test_the_better_of_mixed_and_uniform_is_kept_and_named(better, says, monkeypatch):
    """The losses are made up, in the order dense, uniform, mixed; the pruning is real."""
    losses = iter([2.0, 2.5, 2.4] if better == "mixed" else [2.0, 2.3, 2.4])
    monkeypatch.setattr(moesparse.pruning.to_budget, "perplexity", lambda *_, **__: Perplexity(next(losses), 1))
    recipe = Recipe(target_bytes=0.7, choices=("drop", "2:4", "6:8", "dense"), **QUICK)
    model = tiny_model("mixtral")
    report = prune(model, WINDOWS, recipe)
    budget = report.budget
    assert budget["mixed"]["patterns"] != budget["uniform"]["patterns"], "the test needs two different plans"
    assert says in budget["summary"] and budget["kept"] == better and budget["measured"]["windows"] == 2
    plan = budget[better]
    assert report.sizes["after"]["packed"] == plan["bytes"]
    again = tiny_model("mixtral")
    rest = torch.cat((WINDOWS[:7], WINDOWS[8:15]))
    prune(again, rest, moesparse.pruning.to_budget.recipe_of(recipe, _plan_of(plan), 8))
    for (name, want), got in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(want, got), name
    assert model.config.num_local_experts == plan["keep"]


def _plan_of(plan):
    return moesparse.pruning.to_budget.BudgetPlan(**{name: value for name, value in plan.items() if name != "loss"})


def test_planning_changes_nothing_and_dead_experts_cost_nothing():
    model = tiny_model("mixtral")
    before = copy.deepcopy(model.state_dict())
    found = plan_budget(model, WINDOWS, Recipe(target_bytes=0.5, **QUICK), RunOptions())
    assert json.loads(json.dumps(found.to_dict()))["mixed"]["keep"] == found.mixed.keep
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_counts_that_do_not_divide_are_not_tried():
    model = tiny_model("mixtral")
    found = plan_budget(model, WINDOWS, Recipe(target_bytes=0.6, choices=("drop",), **QUICK), RunOptions())
    assert found.mixed.keep == 4 and model.config.num_local_experts == 8
    recipe = Recipe(target_bytes=0.6, choices=("drop",), divisible_by=3, **QUICK)
    assert plan_budget(model, WINDOWS, recipe, RunOptions()).mixed.keep == 3
    report = prune(model, WINDOWS, recipe)
    assert (model.config.num_local_experts, report.recipe["divisible_by"]) == (3, 3)
    with pytest.raises(UsageError, match=r"divisible_by must divide a count that may stay of the 8 experts .* got 16"):
        plan_budget(tiny_model("mixtral"), WINDOWS, dataclasses.replace(recipe, divisible_by=16), RunOptions())
    with pytest.raises(UsageError, match="divisible_by must come with drop among choices, got 2:4"):
        Recipe(target_bytes=0.6, choices=("2:4",), divisible_by=8)


@pytest.mark.parametrize("target", [0, 1, 1.5, -0.1, "0", "40%", "3.2 parsecs", "GB", "nan", True, 400])
def test_a_target_that_is_none_is_refused(target):
    with pytest.raises(UsageError, match=r"target_bytes must be a share .* got"):
        Recipe(target_bytes=target)


def test_targets_have_one_meaning():
    assert check_target("0.4") == 0.4
    assert check_target("3.2GB") == 3_200_000_000 and check_target("3 gib") == 3 * 2**30
    assert target_in_bytes("0.5", 1001) == 500 and target_in_bytes("1KB", 1001) == 1000
    with pytest.raises(UsageError, match="below the 1001 bytes of the dense experts"):
        target_in_bytes("1KiB", 1001)


def test_choices_are_checked():
    assert check_choices(["2:4", " 2:4", "drop"]) == ("2:4", "drop")
    for choices in (["2:5"], ["half"], ["0.5"], [], ["dense"]):
        with pytest.raises(UsageError, match=r"choices must|pattern n:m must"):
            check_choices(choices)
    with pytest.raises(UsageError, match=r"in_features must be a multiple of m=32"):
        plan_budget(
            tiny_model("mixtral", intermediate_size=40),
            WINDOWS,
            Recipe(target_bytes=0.5, choices=["8:32"]),
            RunOptions(),
        )


@pytest.mark.parametrize(("name", "value"), [("experts", 0.25), ("keep_experts", 4), ("weights", "4:8")])
def test_what_the_target_chooses_cannot_be_given_too(name, value):
    with pytest.raises(UsageError, match=f"{name} must be left out with target_bytes"):
        Recipe(target_bytes=0.5, **{name: value})


def test_text_is_needed():
    model = tiny_model("mixtral")
    with pytest.raises(CalibrationError, match="calibration must be windows for target_bytes"):
        prune(model, calibrate(model, WINDOWS), Recipe(target_bytes=0.5))
    with pytest.raises(UsageError, match="windows must be at least 2"):
        prune(model, WINDOWS[:1], Recipe(target_bytes=0.5))
