"""Weights of quantised checkpoints pruned in their own format: by zeros alone, or solved for and quantised again."""

import json
from dataclasses import replace

import pytest
import torch
from faults import at, kill, killed
from further_tokens import checkpoint
from quantised_folders import (
    BY_COMPRESSED_TENSORS,
    BY_TRANSFORMERS,
    CASES,
    dequantised,
    quantise_folder,
    raw,
    whole_model,
    write_quantised,
)
from safetensors.torch import load_file, save_file

from moesparse import Recipe, prune
from moesparse.calibration.checkpoint import calibrate_checkpoint
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.experts.merging import merge_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.on_disk import LayersOnDisk
from moesparse.pruning.run import prune_checkpoint

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
ZEROS = Recipe(weights="2:4", saliency="wanda", update="none")
SOLVED = replace(ZEROS, update="least-squares+rescale", propagate=False)


def expert_weights(folder):
    """Key -> matrix in float32, of the experts, as they are read."""
    weights = LayersOnDisk(folder).open().shards
    keys = [key for key in weights.stored if "experts" in key and "shared" not in key]
    return {key: weights.stored[key].format.decode(weights.parts_of(key), torch.float32) for key in keys}, weights


def codes_that_differ(one, other, bits):
    """How many codes of two runs of bytes."""
    both = torch.frombuffer(bytearray(one), dtype=torch.uint8) ^ torch.frombuffer(bytearray(other), dtype=torch.uint8)
    return int((both != 0).sum()) if bits == 8 else int(((both & 15) != 0).sum() + ((both >> 4) != 0).sum())


@pytest.mark.parametrize("case", CASES)
def test_pruned_by_zeros_nothing_else_changes(case, tmp_path):
    source, out = write_quantised(tmp_path / "source", case), tmp_path / "out"
    report = prune_checkpoint(source, out, WINDOWS, ZEROS, batch_size=4)
    before, after = raw(source), raw(out)
    assert before.keys() == after.keys()
    (old, held), (new, _) = expert_weights(source), expert_weights(out)
    codes = {held.stored[key].names["codes"]: key for key in old}
    assert {name for name in before if before[name] != after[name]} == set(codes)
    for name, key in codes.items():
        # every group of four has two zeros, and what is not zero is what it was
        rows = new[key].mT if case == "mxfp4" else new[key]
        assert ((rows.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()
        assert new[key].equal(torch.where(new[key] == 0, 0, old[key]))
        zeroed = int(((new[key] == 0) & (old[key] != 0)).sum())
        assert before[name][:2] == after[name][:2] and zeroed
        bits = 8 if len(before[name][2]) == old[key].numel() else 4
        assert codes_that_differ(before[name][2], after[name][2], bits) == zeroed
    # the masks are those of the dequantised model in memory, and so are the logits
    dense = whole_model(source)
    prune(dense, WINDOWS, ZEROS, batch_size=4)
    with torch.no_grad():
        want = dense(WINDOWS).logits
        assert whole_model(out)(WINDOWS).logits.equal(want)
        if case in BY_TRANSFORMERS:
            assert dequantised(out)(WINDOWS).logits.equal(want)
    found, looked = compare_folders(out, source), inspect_folder(out, verify=True)
    assert found.problems == looked.problems == [] and set(found.tensors["pruned"]) == set(old)
    assert {tensor.pattern for block in looked.blocks for tensor in block.tensors} == {"2:4"}
    assert report.rounding == 0 and report.sparsity == pytest.approx(
        sum(int((each == 0).sum()) for each in new.values()) / sum(each.numel() for each in new.values())
    )
    config, other = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert other == config | {"moesparse": other["moesparse"]}


@pytest.mark.parametrize("case", BY_COMPRESSED_TENSORS)
def test_compressed_tensors_reads_the_zeros(case, tmp_path):
    pytest.importorskip("compressed_tensors")
    source, out = write_quantised(tmp_path / "source", case), tmp_path / "out"
    recipe = replace(ZEROS, saliency="magnitude")
    prune_checkpoint(source, out, None, recipe)
    dense = dequantised(source)
    prune(dense, None, recipe)
    with torch.no_grad():
        assert dequantised(out)(WINDOWS).logits.equal(dense(WINDOWS).logits)


@pytest.mark.parametrize("case", CASES)
def test_what_is_solved_for_is_quantised_again(case, tmp_path):
    source, out = write_quantised(tmp_path / "source", case), tmp_path / "out"
    report = prune_checkpoint(source, out, WINDOWS, SOLVED, batch_size=4)
    dense, stored = whole_model(source), whole_model(out)
    prune(dense, WINDOWS, SOLVED, batch_size=4)
    solved, rounded = dense.state_dict(), stored.state_dict()
    for block in report.blocks:
        error, norm = 0.0, 0.0
        for tensor in block.tensors:
            name = f"{block.name}.{tensor.name}"
            wanted, got = solved[name].double(), rounded[name].double()
            assert not got[wanted == 0].any()
            error, norm = error + float((got - wanted).square().sum()), norm + float(wanted.square().sum())
        # a scale for every row or block, codes of 8 or 4 bits: each weight within half a step
        bound = 1e-3 if case.startswith("fp8") else 0.03
        assert block.rounding.relative == pytest.approx(error / norm) and 0 < error / norm < bound
    before, after = raw(source), raw(out)
    kept = [name for name in before if "experts" not in name or "shared" in name]
    assert before.keys() == after.keys() and all(before[name] == after[name] for name in kept)
    assert all(before[name][:2] == after[name][:2] for name in before)
    found = compare_folders(out, source)
    assert found.problems == inspect_folder(out, verify=True).problems == []
    # what the recipe does not say is not explained
    note = json.loads((out / "config.json").read_text())
    note["moesparse"]["recipe"]["update"] = "none"
    (out / "config.json").write_text(json.dumps(note))
    assert len(compare_folders(out, source).problems) == len(found.tensors["requantised"])


@pytest.mark.parametrize("case", CASES)
def test_sums_and_plans_are_those_of_the_dequantised_model(case, tmp_path):
    source, plain = write_quantised(tmp_path / "source", case), tmp_path / "plain"
    whole_model(source).save_pretrained(plain)
    got, wanted = (
        calibrate_checkpoint(folder, tmp_path / f"{folder.name} sums", WINDOWS, batch_size=4)
        for folder in (source, plain)
    )
    for name, sums in wanted.blocks.items():
        assert sums.tokens.equal(got.blocks[name].tokens)
        assert sums.gated_norm_sum.equal(got.blocks[name].gated_norm_sum)
    recipe = Recipe(weights=None, experts=0.25, update="none")
    report = prune_checkpoint(source, tmp_path / "out", got, recipe)
    # a plan that a copy, or a GGUF file of it, is given
    assert prune_checkpoint(plain, tmp_path / "out plain", wanted, recipe).plan == report.plan


def test_a_refit_quantises_the_down_projections_alone(tmp_path):
    source, out = write_quantised(tmp_path / "source", "int4"), tmp_path / "out"
    recipe = Recipe(weights=None, experts=0.25, update="least-squares")
    report = prune_checkpoint(source, out, WINDOWS, recipe, batch_size=4)
    found = compare_folders(out, source)
    assert found.problems == []
    assert len(found.tensors["requantised"]) == 6 and all("down_proj" in key for key in found.tensors["requantised"])
    (fit,) = report.experts["refit"]
    assert 0 < fit["rounding"]["relative"] < 0.03 and report.rounding == fit["rounding"]["relative"]
    # better than without
    prune_checkpoint(source, tmp_path / "cut", WINDOWS, replace(recipe, update="none"), batch_size=4)
    with torch.no_grad():
        want, refitted, cut = (whole_model(each)(WINDOWS).logits.float() for each in (source, out, tmp_path / "cut"))
    assert (refitted - want).square().sum() < (cut - want).square().sum()


# codes of 4 bits in words, a stack with biases, and two matrices under one scale
@pytest.mark.parametrize("case", ["int4", "mxfp4", "nvfp4"])
def test_merged_experts_are_quantised_again_and_the_others_are_copied(case, tmp_path):
    source, out = write_quantised(tmp_path / "source", case), tmp_path / "out"
    recipe = Recipe(weights=None, experts=0.25, update="none", expert_method="ream")
    report = prune_checkpoint(source, out, WINDOWS, recipe, batch_size=4)
    found = compare_folders(out, source)
    assert found.problems == [] and found.tensors["requantised"]
    cost = [block["rounding"]["relative"] for block in report.experts["blocks"]]
    assert all(0 < each < 0.03 for each in cost) and 0 < report.rounding < 0.03
    # the experts that took none in are the source's to the bit, the merged ones what their mean rounds to
    plan, dense = report.plan, whole_model(source)
    for before, after, kept, groups in zip(
        find_moe_blocks(dense), find_moe_blocks(whole_model(out)), plan.kept, plan.merged, strict=True
    ):
        merge_experts(before, groups)
        took = {group.experts[0] for group in groups}
        for old, new in zip(before.matrices, after.matrices, strict=True):
            for place, expert in enumerate(kept):
                want, got = old.weight[expert].float(), new.weight[place].float()
                if expert in took:
                    assert 0 < (got - want).square().sum() < 0.03 * want.square().sum()
                else:
                    assert got.equal(want)
            assert old.bias is None or torch.equal(old.bias[list(kept)], new.bias)
    replayed = prune_checkpoint(source, tmp_path / "again", None, Recipe(weights=None, update="none", plan=plan))
    assert raw(tmp_path / "again").keys() == raw(out).keys()
    assert all(raw(out)[name] == bytes_ for name, bytes_ in raw(tmp_path / "again").items())
    assert replayed.rounding == report.rounding


# what is stored as a stack, one by one, and beside quantised attention
@pytest.mark.parametrize("case", ["mxfp4", "fp8 qwen"])
def test_experts_removed_and_weights_pruned_in_one_run(case, tmp_path):
    source, out = write_quantised(tmp_path / "source", case), tmp_path / "out"
    recipe = replace(ZEROS, experts=0.25)
    prune_checkpoint(source, out, WINDOWS, recipe, batch_size=4)
    dense = whole_model(source)
    prune(dense, WINDOWS, recipe, batch_size=4)
    with torch.no_grad():
        assert whole_model(out)(WINDOWS).logits.equal(dense(WINDOWS).logits)
    found = compare_folders(out, source)
    assert found.problems == [] and found.tensors.keys() <= {"equal", "pruned", "cut", "removed"}
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out"]
    # another code than that of zero is explained by nothing
    weights = LayersOnDisk(out).open().shards
    name = weights.stored[found.tensors["pruned"][0]].names["codes"]
    file = weights.raw.tensors[name].file
    tensors = load_file(file)
    codes = tensors[name].view(torch.uint8).flatten()
    codes[(codes != 0).nonzero()[0]] ^= 1
    save_file(tensors, file)
    assert len(compare_folders(out, source).problems) == 1


RUNS = {
    "removal": Recipe(weights=None, experts=0.25, update="none"),
    "refit": Recipe(weights=None, experts=0.25, update="least-squares"),
    "zeros": ZEROS,
    "solved": replace(ZEROS, update="obs"),
}


@pytest.mark.parametrize(
    ("case", "run", "place", "count"),
    [
        ("fp8 qwen", "removal", "renamed out/layer-00000", 1),
        ("mxfp4", "removal", "write outside.partial", 1),
        ("fp8 qwen", "refit", "progress remove experts", 2),
        ("mxfp4", "refit", "renamed out/layer-00000", 1),
        ("mxfp4", "zeros", "write layer-00001.partial", 1),
        ("fp8 qwen", "zeros", "progress calibrate .*layers.1", 1),
        # the second layer is solved for what the first one gives as it is stored
        ("fp8 qwen", "solved", "progress calibrate .*layers.1", 1),
        ("mxfp4", "solved", "progress calibrate .*layers.1", 1),
    ],
)
def test_killed_it_goes_on_to_the_same_bytes(case, run, place, count, tmp_path):
    source, recipe = write_quantised(tmp_path / "source", case), RUNS[run]

    def go(out, **options):
        return prune_checkpoint(source, tmp_path / out, WINDOWS, recipe, batch_size=4, **options)

    go("want")
    killed(lambda progress: go("out", progress=progress), at(place, kill, count))
    go("out", resume=True)
    assert raw(tmp_path / "out") == raw(tmp_path / "want")
    assert compare_folders(tmp_path / "out", source).problems == []


@pytest.mark.parametrize("update", ["none", "obs"])
def test_layers_that_predict_further_tokens_are_pruned_in_their_format(update, tmp_path):
    source, out = checkpoint(tmp_path / "source", "deepseek_v3", dtype=torch.bfloat16), tmp_path / "out"
    _, is_quantised, quantise, said = CASES["fp8 deepseek"]
    quantise_folder(source, lambda key, tensor: is_quantised(key, tensor) and "eh_proj" not in key, quantise, said)
    prune_checkpoint(source, out, WINDOWS, replace(ZEROS, update=update, mtp="prune"), batch_size=4)
    (old, _), (new, _) = expert_weights(source), expert_weights(out)
    further = [key for key in old if key.startswith("model.layers.2.")]
    assert len(further) == 8 * 3
    for key in further:
        assert ((new[key].unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()
        kept = new[key] != 0
        assert new[key][kept].equal(old[key][kept]) == (update == "none")
    found = compare_folders(out, source)
    assert found.problems == []
    assert set(further) <= set(found.tensors["pruned" if update == "none" else "requantised"])
