"""Rounded values in the pipeline: last of all steps, by the same sums, the same from folder to folder, and said so."""

import copy
import json

import pytest
import torch
from faults import assert_same
from quantised_folders import whole_model, write_quantised
from transformers import AutoModelForCausalLM

from moesparse import Recipe
from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.history import following, joined_recipe
from moesparse.checkpoints.recipe_words import recipe_in_words
from moesparse.distillation import distill
from moesparse.errors import CalibrationError, MoESparseError, UnsupportedModelError, UsageError
from moesparse.models.blocks import find_moe_blocks
from moesparse.pruning import block as pruning_block
from moesparse.pruning import values
from moesparse.pruning.card import model_card
from moesparse.pruning.plan import plan_run
from moesparse.pruning.report import BlockReport
from moesparse.pruning.run import prune, prune_checkpoint
from moesparse.testing import tiny_model
from moesparse.weights.patterns import Pattern, check_mask
from moesparse.weights.value_formats import ValueFormat
from moesparse.weights.value_rules import choose_values

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
TWO_FOUR = Pattern(n=2, m=4)


def matrices(model):
    return {(block.name, matrix.name): matrix.weight for block in find_moe_blocks(model) for matrix in block.matrices}


def assert_same_weights(folder, model):
    found = matrices(whole_model(folder))
    assert all(torch.equal(weight, found[name]) for name, weight in matrices(model).items())


def levels(weight, columns):
    """The most distinct sizes of weights in a group of a row, zero among them."""
    groups = weight.unflatten(-1, (-1, columns)).flatten(0, -2)
    return max(len(group.unique()) for group in groups)


def test_weights_are_rounded_as_they_are_by_the_sums_they_were_solved_with():
    """Against the rule itself on what the recipe without values leaves."""
    dense = tiny_model("mixtral").to(torch.bfloat16)
    sums = calibrate(dense, WINDOWS, moments="gated", progress=None)
    plain = Recipe(weights="2:4", saliency="gated-sparsegpt", update="least-squares+rescale", propagate=False)
    for rule in ("gated-gptq", "rtn-mse"):
        solved, rounded = copy.deepcopy(dense), copy.deepcopy(dense)
        prune(solved, sums, plain, progress=None)
        recipe = Recipe(**{**vars(plain), "values": "int4:32", "value_rule": rule})
        report = prune(rounded, sums, recipe, progress=None)
        for block in find_moe_blocks(solved):
            (named,) = [each for each in report.blocks if each.name == block.name]
            for matrix, tensor in zip(block.matrices, named.tensors, strict=True):
                want = choose_values(
                    matrix.weight, rule, ValueFormat.parse("int4:32"), sums.blocks[block.name], matrix.input
                )
                got = matrices(rounded)[block.name, matrix.name]
                assert torch.equal(got, want.quantised.dequantise().bfloat16())
                assert check_mask(got, TWO_FOUR).holds
                assert tensor.values.error == pytest.approx(want.error.tolist())
                assert (tensor.values.output_error is None) == (rule == "rtn-mse")
                assert tensor.values.bits == 0.5 * 4 + 1 + 16 / 32
                assert tensor.sparsity == pytest.approx(float((got == 0).double().mean()))
    # text that goes through the layers one by one has the same sums
    read, again = copy.deepcopy(dense), copy.deepcopy(dense)
    alone = Recipe(weights=None, values="int4:32", propagate=False)
    prune(read, WINDOWS, alone, progress=None)
    prune(again, sums, alone, progress=None)
    assert all(torch.equal(weight, matrices(again)[name]) for name, weight in matrices(read).items())


@pytest.mark.parametrize("update", ["auto", "least-squares+rescale", "asymmetric"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_rounding_is_the_last_step(family, update):
    """Of training and rescaling too: in the end no group has more values than its format."""
    model = tiny_model(family)
    report = prune(model, WINDOWS, Recipe(weights="2:4", update=update, values="int3:32"), progress=None)
    assert report.recipe["value_rule"] == "gated-gptq"
    for name, weight in matrices(model).items():
        assert levels(weight, 32) <= 8
        assert check_mask(weight, TWO_FOUR).holds, name
    assert report.bits == 0.5 * 3 + 1 + 0.5
    assert all(0 < error < 0.5 for block in report.blocks for t in block.tensors for error in t.values.output_error)
    again = [BlockReport.from_dict(json.loads(json.dumps(block.to_dict()))) for block in report.blocks]
    assert again == report.blocks


def test_without_a_mask_and_without_text():
    dense = tiny_model("mixtral").to(torch.bfloat16)
    model = copy.deepcopy(dense)
    report = prune(model, None, Recipe(weights=None, values="int8"), progress=None)
    assert report.recipe["value_rule"] == "rtn-mse"
    assert report.calibration["tokens"] == 0
    for name, weight in matrices(dense).items():
        found = choose_values(weight, "rtn-mse", ValueFormat.parse("int8"), None, "hidden").quantised
        assert torch.equal(matrices(model)[name], found.dequantise().bfloat16())
    assert {tensor.pattern for block in report.blocks for tensor in block.tensors} == {"dense"}
    words = recipe_in_words(report.recipe)
    assert "rounded to int8 by rtn-mse, and stored in the dtype of the model" in words
    card = model_card("mixtral", report)
    assert "expert weights rounded to int8" in card and "fake-quantised" in card and "not smaller" in card
    assert "| bits a weight of the experts in that format | 8.389 |" in card
    # text is read where the rule needs it, or where it is there
    other = copy.deepcopy(dense)
    assert (
        prune(other, WINDOWS, Recipe(weights=None, values="int8"), progress=None).recipe["value_rule"] == "gated-gptq"
    )
    assert any(not torch.equal(weight, matrices(model)[name]) for name, weight in matrices(other).items())


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(weights="2:4", saliency="moe-pruner", values="int4:32"),
        Recipe(weights=None, experts=0.25, values="int2:32:zero"),
        Recipe(weights="2:4", experts=0.25, saliency="magnitude", update="none", values="fp8", value_rule="rtn"),
    ],
    ids=["weights", "experts", "both"],
)
def test_from_folder_to_folder_the_bits_are_the_same(recipe, tmp_path):
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "out", WINDOWS, recipe, batch_size=3, progress=None)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    same = prune(whole, WINDOWS, recipe, batch_size=3, progress=None)
    assert_same_weights(tmp_path / "out", whole)
    assert [block.tensors for block in report.blocks] == [block.tensors for block in same.blocks]
    noted = json.loads((tmp_path / "out" / "config.json").read_text())["moesparse"]["recipe"]
    assert (noted["values"], noted["value_rule"]) == (recipe.values, same.recipe["value_rule"])


@pytest.mark.parametrize("stop", [1, 19])
def test_stopped_while_it_rounds_it_goes_on_to_the_same_bits(stop, tmp_path, monkeypatch):
    """In the first matrix of the first layer, and in the second of the second; experts that are rounded stay so."""
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    recipe = Recipe(weights="2:4", saliency="gated-sparsegpt", update="least-squares", values="int4:32")
    choose, seen = values.choose_values, []

    def one_by_one(weight):
        return [slice(expert, expert + 1) for expert in range(len(weight))]

    def run(out, resume=False, stop=None):
        seen.clear()

        def watched(*given, **more):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(more["name"])
            return choose(*given, **more)

        with monkeypatch.context() as patch:
            for module in (values, pruning_block):
                patch.setattr(module, "expert_slices", one_by_one)
            patch.setattr(values, "choose_values", watched)
            return prune_checkpoint(tmp_path / "dense", out, WINDOWS, recipe, resume=resume, progress=None)

    whole = run(tmp_path / "whole")
    assert len(seen) == 32
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop=stop)
    report = run(tmp_path / "out", resume=True)
    assert len(seen) == 32 - stop
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert [block.tensors for block in report.blocks] == [block.tensors for block in whole.blocks]


def test_what_cannot_be_is_refused(tmp_path):
    model = tiny_model("mixtral")
    before = {name: weight.clone() for name, weight in matrices(model).items()}
    with pytest.raises(UsageError, match=r"gate_up_proj: in_features must be a multiple of 64 for values .*, got 32"):
        prune(model, WINDOWS, Recipe(values="int4:64"), progress=None)
    with pytest.raises(CalibrationError, match=r"for value_rule='gptq', got None; .* rtn or rtn-mse, need no"):
        prune(model, None, Recipe(weights=None, values="int4:32", value_rule="gptq"), progress=None)
    sums = calibrate(model, WINDOWS, moments="none", progress=None)
    with pytest.raises(CalibrationError, match="needs the gated second moments"):
        prune(model, sums, Recipe(weights=None, values="int4:32"), progress=None)
    assert all(torch.equal(weight, before[name]) for name, weight in matrices(model).items())
    with pytest.raises(UsageError, match=r"values must be bf16, fp8,.* got 'int4'"):
        Recipe(values="int4")
    with pytest.raises(UsageError, match="value_rule must come with values, got 'rtn' alone"):
        Recipe(value_rule="rtn")
    with pytest.raises(UsageError, match="value_rule must be one of rtn, rtn-mse, gptq, gated-gptq, got 'awq'"):
        Recipe(values="int8", value_rule="awq")
    with pytest.raises(UsageError, match=r"values must be left out with target_bytes, .* got 'int8'"):
        Recipe(target_bytes=0.4, values="int8")
    with pytest.raises(UsageError, match="fake_quantised must come with values, got it alone"):
        Recipe(fake_quantised=True)
    with pytest.raises(UsageError, match="must prune weights, round them to values or remove experts"):
        Recipe(weights=None)


def test_training_would_leave_the_values():
    teacher = tiny_model("mixtral")
    student = copy.deepcopy(teacher)
    report = prune(student, WINDOWS, Recipe(weights="2:4", saliency="magnitude", values="int8"), progress=None)
    student.config.moesparse = {"recipe": report.recipe}
    with pytest.raises(MoESparseError, match=r"student must have plain values .* got values rounded to int8"):
        distill(student, teacher, WINDOWS, progress=None)


def test_quantised_folders_are_refused(tmp_path):
    folder = write_quantised(tmp_path / "fp8", "fp8 qwen")
    with pytest.raises(UnsupportedModelError, match="must be plain to have its values rounded"):
        prune_checkpoint(folder, tmp_path / "out", WINDOWS, Recipe(weights=None, values="int8"), progress=None)


def test_a_second_command_keeps_or_replaces_them():
    values_of = {"values": "int4:32", "value_rule": "rtn"}
    first = {"weights": "2:4", "saliency": "wanda", "update": "none", **values_of}
    removed = {"weights": None, "experts": 0.5, "update": "none"}
    assert joined_recipe(first, removed).items() >= values_of.items()
    # kept experts are solved for again: neither mask nor values hold
    refitted = joined_recipe(first, {**removed, "update": "least-squares"})
    assert "values" not in refitted
    # what was made plain again
    plain = joined_recipe(first, {**removed, "output_dtype": "bfloat16"})
    assert plain["fake_quantised"] and "stored in the dtype of the model" in recipe_in_words(plain)
    again = joined_recipe(first, {"weights": None, "values": "int8", "value_rule": "gptq"})
    assert (again["values"], again["value_rule"], again["weights"]) == ("int8", "gptq", "2:4")
    assert "values" not in joined_recipe(first, {"weights": "1:4", "saliency": "wanda", "update": "none"})
    # what was said of the experts that stay
    model = tiny_model("mixtral")
    report = prune(
        model, None, Recipe(saliency="magnitude", update="none", values="int8", value_rule="rtn"), progress=None
    )
    before = report.to_dict()
    removal = {"blocks": [{"name": block.name, "kept": [5, 2]} for block in report.blocks], "refit": []}
    found = following(before, {"recipe": removed, "experts": removal, "blocks": [], "seconds": 1.0})
    cut = found["blocks"][0]["tensors"][0]["values"]
    whole = before["blocks"][0]["tensors"][0]["values"]
    assert cut["error"] == [whole["error"][5], whole["error"][2]]


def test_the_plan_counts_it():
    model = tiny_model("mixtral")
    sizes = {"windows": 6, "length": 16, "batch_size": 8}
    recipes = [Recipe(weights=None, values="int4:32", value_rule=rule).on(None) for rule in ("rtn", "gated-gptq")]
    nearest, gptq = (plan_run(model, find_moe_blocks(model), recipe, **sizes) for recipe in recipes)
    assert gptq.flops["solvers"] > nearest.flops["solvers"] == 0
    assert gptq.moments > nearest.moments == 0
    int4 = ValueFormat.parse("int4:32")
    assert nearest.packed == gptq.packed == sum(int4.bytes_of(weight.shape) for weight in matrices(model).values())
