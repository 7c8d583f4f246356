"""Folder in, folder out: the bits of pruning in memory, whatever stops the run on its way."""

import os
import random

import pytest
import torch
from faults import assert_same, at, kill, killed, lines
from transformers import AutoModelForCausalLM

import moesparse
from moesparse import Recipe
from moesparse.errors import CalibrationError, CheckpointError, MoESparseError, UsageError
from moesparse.models.on_disk import LayersOnDisk
from moesparse.progress import silent
from moesparse.pruning.plan import plan_pruning
from moesparse.pruning.run import prune_checkpoint
from moesparse.system.folders import JOURNAL_FILE
from moesparse.testing import tiny_model

RECIPE = Recipe(weights="2:4", saliency="gated-sparsegpt", update="least-squares+rescale")
WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    tiny_model("mixtral", num_hidden_layers=3).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune_checkpoint(source, out, WINDOWS, RECIPE, batch_size=4)
    return out


# a layer without experts first; transposed experts; layers of other kinds behind the last block
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("propagate", [True, False])
def test_the_result_is_that_of_pruning_in_memory(family, propagate, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    recipe = Recipe(weights="2:4", saliency="moe-pruner", update="least-squares+rescale", propagate=propagate)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    want = moesparse.prune(model, WINDOWS, recipe, batch_size=4)
    moesparse.save_pretrained(model, tmp_path / "want", recipe=want.recipe)

    got = prune_checkpoint(tmp_path / "dense", tmp_path / "got", WINDOWS, recipe, batch_size=4)

    assert_same(tmp_path / "want", tmp_path / "got")
    assert got.sparsity == want.sparsity
    assert got.fingerprint == want.fingerprint
    assert got.sizes == want.sizes
    for one, other in zip(want.blocks, got.blocks, strict=True):
        assert (one.name, one.tensors, one.rescale) == (other.name, other.tensors, other.rescale)
    AutoModelForCausalLM.from_pretrained(tmp_path / "got")
    assert not list((tmp_path / "got").glob("*partial*"))


# transposed experts; layers of other kinds before, between and behind
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("weights", ["2:4", 0.5])
def test_magnitude_needs_no_text_and_gives_the_bits_of_the_whole_model(family, weights, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    recipe = Recipe(weights=weights, saliency="magnitude", update="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    want = moesparse.prune(model, None, recipe)
    moesparse.save_pretrained(model, tmp_path / "want", recipe=want.recipe)

    with pytest.MonkeyPatch.context() as patch:
        # nothing is run
        patch.setattr("torch.nn.Module.__call__", None)
        got = prune_checkpoint(tmp_path / "dense", tmp_path / "got", None, recipe)

    assert_same(tmp_path / "want", tmp_path / "got")
    assert (got.calibration, got.fingerprint, got.sizes) == (want.calibration, want.fingerprint, want.sizes)
    assert [(block.name, block.tensors) for block in got.blocks] == [(b.name, b.tensors) for b in want.blocks]


@pytest.mark.parametrize("places", [2, pytest.param(8, marks=pytest.mark.long)])
def test_magnitude_killed_anywhere_goes_on_to_the_same_bits(places, source, tmp_path):
    recipe = Recipe(weights="2:4", saliency="magnitude", update="none")

    def go_on(out, progress, resume=False):
        prune_checkpoint(source, out, None, recipe, resume=resume, progress=progress)

    total = len(lines(lambda progress: go_on(tmp_path / "whole", progress)))
    for step in sorted(random.Random(1).sample(range(1, total + 1), places)):
        out = tmp_path / f"killed-{step}"
        killed(lambda progress, out=out: go_on(out, progress), at("", kill, step))
        if not (out / "config.json").exists() or (out / JOURNAL_FILE).exists():
            go_on(out, silent, resume=True)
        assert_same(out, tmp_path / "whole")


def test_without_text_what_needs_it_is_refused(source, tmp_path):
    rules = "only magnitude without an update needs no data"
    refit = "windows to refit the experts that expert_saliency='aimer' keeps"
    recipes = {Recipe(): rules, Recipe(saliency="magnitude"): rules, Recipe(weights=None, experts=0.25): refit}
    for recipe, message in recipes.items():
        with pytest.raises(CalibrationError, match=message):
            prune_checkpoint(source, tmp_path / "out", None, recipe)
    assert not (tmp_path / "out").exists()


def run(source, out, resume=False, **options):
    return prune_checkpoint(source, out, WINDOWS, RECIPE, batch_size=4, resume=resume, **options)


def killed_at(step, source, out):
    killed(lambda progress: run(source, out, resume=out.exists(), progress=progress), at("", kill, step))


@pytest.mark.parametrize("places", [4, pytest.param(20, marks=pytest.mark.long)])
def test_killed_anywhere_the_run_goes_on_to_the_same_bits(places, source, pruned, tmp_path):
    total = len(lines(lambda progress: run(source, tmp_path / "counted", progress=progress)))
    chosen = sorted(random.Random(0).sample(range(1, total + 1), places))
    for step in chosen:
        out = tmp_path / f"killed-{step}"
        killed_at(step, source, out)
        if (out / "config.json").exists() and not (out / JOURNAL_FILE).exists():
            assert_same(out, pruned)  # killed behind its last write
            continue
        with pytest.raises(CheckpointError, match="must be"):
            moesparse.load_pretrained(out)
        run(source, out, resume=True)
        assert_same(out, pruned)
        assert not list(out.glob("*partial*"))
        assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}


def test_killed_again_and_again_it_still_ends(source, pruned, tmp_path):
    for step in (60, 80, 100):
        killed_at(step, source, tmp_path / "out")
    run(source, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", pruned)


@pytest.fixture
def stopped(source, tmp_path):
    """A run that ended by an error after its first two layers."""

    def stop(event):
        if event.stage.endswith("layers.2.mlp.experts"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", progress=stop)
    assert sorted(part.name for part in (tmp_path / "out").iterdir() if part.is_dir()) == ["layer-00000", "layer-00001"]
    return tmp_path / "out"


def test_without_resume_it_says_what_it_found(source, stopped):
    with pytest.raises(CheckpointError, match=r"unfinished run, 2 parts done: .*resume=True"):
        run(source, stopped)
    with pytest.raises(CheckpointError, match="unfinished"):
        moesparse.load_pretrained(stopped)


def test_finished_layers_are_not_pruned_again(source, stopped, pruned):
    stages = []
    run(source, stopped, resume=True, progress=lambda event: stages.append(event.stage))
    calibrated = {stage for stage in stages if stage.startswith("calibrate")}
    assert calibrated == {"calibrate model.layers.2.mlp.experts"}
    assert_same(stopped, pruned)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"calibration": WINDOWS[:4]}, "another windows"),
        ({"recipe": Recipe(weights="1:4", saliency="moe-pruner", update="none")}, "another recipe"),
        ({"batch_size": 3}, "another batch size: 4, now 3"),
    ],
)
def test_a_run_does_not_go_on_with_other_inputs(source, stopped, changed, named):
    given = {"calibration": WINDOWS, "recipe": RECIPE, "batch_size": 4} | changed
    with pytest.raises(CheckpointError, match=named):
        prune_checkpoint(source, stopped, **given, resume=True)
    assert len(list(stopped.glob("layer-*"))) == 2


def test_a_run_does_not_go_on_with_another_model(stopped, tmp_path):
    tiny_model("mixtral", seed=1, num_hidden_layers=3).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another source"):
        run(tmp_path / "other", stopped, resume=True)


@pytest.mark.parametrize("harm", ["flip", "vanish"])
def test_a_damaged_part_is_done_again(source, stopped, pruned, harm):
    shard = stopped / "layer-00001" / "model.safetensors"
    if harm == "vanish":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[-7] ^= 1
        shard.write_bytes(data)
    stages = []
    run(source, stopped, resume=True, progress=lambda event: stages.append(event.stage))
    assert "redo layer-00001 and what follows: it was damaged" in stages
    assert "calibrate model.layers.1.mlp.experts" in stages
    assert "calibrate model.layers.0.mlp.experts" not in stages
    assert_same(stopped, pruned)


def test_a_second_run_on_the_folder_is_refused_and_a_dead_one_is_not(source, tmp_path, pruned):
    held = []

    def second(event):
        if event.stage.startswith("rescale") and not held:
            with pytest.raises(CheckpointError, match=rf"process {os.getpid()} is at work") as refused:
                run(source, tmp_path / "out", resume=True)
            held.append(refused)

    run(source, tmp_path / "out", progress=second)
    assert held
    assert_same(tmp_path / "out", pruned)


def spoiled(source, folder, value):
    """The source with one weight of layer 2 replaced."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[1, 2, 3] = value
    model.save_pretrained(folder)
    return folder


def test_a_weight_that_is_not_finite_is_refused_before_any_work(source, tmp_path):
    with pytest.raises(MoESparseError, match=r"layers\.2\.mlp\.experts\.down_proj must hold finite weights"):
        run(spoiled(source, tmp_path / "source", float("nan")), tmp_path / "out")
    assert not list((tmp_path / "out").glob("layer-*"))


def test_a_pruned_source_is_refused(source, pruned, tmp_path):
    with pytest.raises(CalibrationError, match="must be dense"):
        run(pruned, tmp_path / "out")


def test_a_folder_with_other_files_is_refused_and_left(source, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="new or empty folder"):
        run(source, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_recipe_of_many_patterns_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="one pattern for all weights"):
        prune_checkpoint(source, tmp_path / "out", WINDOWS, Recipe(target_bytes=0.5))


def test_hidden_states_in_a_file_change_nothing(source, tmp_path, pruned, monkeypatch):
    monkeypatch.setattr("moesparse.calibration.plan.available_memory", lambda: 1)
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: mapped.append(1) or from_file(*args, **kwargs))
    run(source, tmp_path / "out")
    assert mapped
    assert_same(tmp_path / "out", pruned)


def test_too_little_memory_is_refused_with_what_is_needed(source, tmp_path):
    with pytest.raises(UsageError, match=r"max_memory must be at least [\d,]+ bytes .* second moments.*got 1,000"):
        run(source, tmp_path / "out", max_memory=1000)
    assert not (tmp_path / "out").exists()
    needed = plan_pruning(
        LayersOnDisk(source).model, LayersOnDisk(source).blocks, RECIPE, windows=6, length=16, batch_size=4
    ).peak
    run(source, tmp_path / "out", max_memory=needed)
