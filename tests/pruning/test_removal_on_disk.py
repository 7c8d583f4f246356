"""Experts removed layer by layer: the bits of removing them in memory, whatever stops the run on its way."""

import json

import pytest
import torch
from faults import Watch, assert_same, at, fail, kill, killed
from transformers import AutoModelForCausalLM

import moesparse
from moesparse import Recipe
from moesparse.calibration.checkpoint import calibrate_checkpoint
from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, CheckpointError, UsageError
from moesparse.experts.plan_file import PLAN_FILE, ExpertPlan
from moesparse.pruning.run import prune_checkpoint
from moesparse.system.folders import JOURNAL_FILE
from moesparse.system.manifest import MANIFEST_FILE
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
DOMAINS = ["law", "code"] * 3
RECIPES = {
    "refit": Recipe(weights=None, experts=0.25),
    "cut": Recipe(weights=None, keep_experts=4, update="none", expert_saliency="gated-norm", expert_mix="equal"),
    "merge": Recipe(weights=None, experts=0.25, update="none", expert_method="hc-smoe"),
    "merge and refit": Recipe(weights=None, experts=0.5, expert_method="ream"),
    "both": Recipe(weights="2:4", experts=0.25, saliency="moe-pruner", update="least-squares+rescale"),
}


def in_memory(source, out, recipe, windows=WINDOWS):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    report = moesparse.prune(model, windows, recipe, domains=DOMAINS, batch_size=4)
    moesparse.save_pretrained(model, out, recipe=report.recipe)
    return report


def run(source, out, recipe, **options):
    return prune_checkpoint(
        source, out, options.pop("windows", WINDOWS), recipe, domains=DOMAINS, batch_size=4, **options
    )


# a dense layer first and groups of experts; transposed experts with biases; layers of other kinds; a table of experts
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "deepseek_v4"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_result_is_that_of_removing_in_memory(family, name, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    want = in_memory(tmp_path / "dense", tmp_path / "want", RECIPES[name])
    got = run(tmp_path / "dense", tmp_path / "got", RECIPES[name])
    assert_same(tmp_path / "want", tmp_path / "got")
    assert json.dumps(got.experts) == json.dumps(want.experts)
    for part in ("recipe", "fingerprint", "sizes", "calibration", "sparsity"):
        assert getattr(got, part) == getattr(want, part), part
    AutoModelForCausalLM.from_pretrained(tmp_path / "got")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "got", "want"]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("weights", [None, "2:4"])
def test_by_the_weights_alone_too(family, weights, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    recipe = Recipe(weights=weights, saliency="magnitude", update="none", experts=0.25)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    want = moesparse.prune(model, None, recipe)
    moesparse.save_pretrained(model, tmp_path / "want", recipe=want.recipe)
    got = prune_checkpoint(tmp_path / "dense", tmp_path / "got", None, recipe)
    assert got.experts["criterion"] == "aimer"
    assert json.dumps(got.experts) == json.dumps(want.experts)
    assert_same(tmp_path / "want", tmp_path / "got")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    tiny_model("mixtral", num_hidden_layers=3).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def both(source, tmp_path_factory):
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    run(source, out, RECIPES["both"])
    return out


@pytest.mark.parametrize(
    ("place", "count"),
    [
        pytest.param("progress check", 2, id="probe"),
        pytest.param("progress score experts", 3, id="score"),
        pytest.param("renamed out.experts/statistics-00001", 1, id="statistics that are not in the journal"),
        pytest.param("progress remove experts", 2, id="remove and refit"),
        pytest.param("write layer-00001.partial", 9, id="write a smaller layer"),
        pytest.param("renamed out.experts/moesparse_journal", 6, id="the journal is renewed"),
        pytest.param("rename out.experts/config.json", 1, id="before the smaller model is one"),
        pytest.param("remove out.experts/moesparse_journal", 1, id="the smaller model's journal goes"),
        pytest.param("progress calibrate .*layers.1", 1, id="prune what stays"),
        pytest.param("write others.partial/moesparse_report", 2, id="companions"),
        pytest.param("remove out/moesparse_journal", 1, id="the journal goes"),
    ],
)
def test_killed_at_a_named_step_it_goes_on_to_the_same_bits(source, both, tmp_path, place, count):
    out = tmp_path / "out"
    killed(lambda progress: run(source, out, RECIPES["both"], progress=progress), at(place, kill, count))
    run(source, out, RECIPES["both"], resume=True)
    assert_same(out, both)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("place", ["progress merge experts", "renamed out/layer-00001"])
@pytest.mark.parametrize("name", ["merge", "merge and refit"])
def test_a_killed_merge_goes_on_to_the_same_bits(source, tmp_path, name, place):
    killed(
        lambda progress: run(source, tmp_path / "out", RECIPES[name], progress=progress),
        at(place, kill, 1 + ("prog" in place)),
    )
    got = run(source, tmp_path / "out", RECIPES[name], resume=True)
    want = in_memory(source, tmp_path / "want", RECIPES[name])
    assert_same(tmp_path / "out", tmp_path / "want")
    assert json.dumps(got.experts) == json.dumps(want.experts)
    assert got.plan == want.plan == ExpertPlan.load(tmp_path / "out" / PLAN_FILE)
    assert got.plan.merged[2] and got.plan.method == RECIPES[name].expert_method
    prune_checkpoint(source, tmp_path / "again", None, Recipe(weights=None, update="none", plan=got.plan))
    if name == "merge":
        shards = [(tmp_path / folder / MANIFEST_FILE).read_bytes() for folder in ("out", "again")]
        assert shards[0] == shards[1]


def stopped(source, out, recipe, place, count=1):
    killed(lambda progress: run(source, out, recipe, progress=progress), at(place, kill, count))


def test_without_resume_it_says_what_it_found(source, tmp_path):
    stopped(source, tmp_path / "out", RECIPES["refit"], "renamed out/moesparse_journal", 5)
    with pytest.raises(CheckpointError, match=r"unfinished run, 4 parts done: .*out. Go on with resume=True"):
        run(source, tmp_path / "out", RECIPES["refit"])
    stopped(source, tmp_path / "two", RECIPES["both"], "progress calibrate")
    with pytest.raises(CheckpointError, match=r"left the smaller model in .*two.experts. Go on with resume=True"):
        run(source, tmp_path / "two", RECIPES["both"])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"windows": WINDOWS.flip(0)}, "another windows"),
        ({"recipe": Recipe(weights="2:4", experts=0.5)}, "another recipe"),
    ],
)
def test_a_run_does_not_go_on_with_other_inputs(source, tmp_path, changed, named):
    stopped(source, tmp_path / "out", RECIPES["both"], "progress calibrate")
    given = {"recipe": RECIPES["both"]} | changed
    with pytest.raises(CheckpointError, match=named):
        run(source, tmp_path / "out", resume=True, **given)


def test_finished_layers_are_not_done_again(source, tmp_path):
    stopped(source, tmp_path / "out", RECIPES["refit"], "write layer-00002.partial")
    stages = []
    run(source, tmp_path / "out", RECIPES["refit"], resume=True, progress=lambda event: stages.append(event.stage))
    assert "score experts" not in stages
    in_memory(source, tmp_path / "want", RECIPES["refit"])
    assert_same(tmp_path / "out", tmp_path / "want")


def test_a_full_disk_keeps_what_is_finished(source, both, tmp_path, monkeypatch):
    for place, done in (("write statistics-00002", 2), ("write layer-00001", 4)):
        with monkeypatch.context() as patch:
            progress = Watch(patch, at(place, fail())).progress
            with pytest.raises(CheckpointError, match=rf"No space left on device. {done} finished parts .*resume=True"):
                run(source, tmp_path / "out", RECIPES["both"], resume=True, progress=progress)
    run(source, tmp_path / "out", RECIPES["both"], resume=True)
    assert_same(tmp_path / "out", both)


def test_saved_statistics_choose_and_no_text_is_run(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    found = {name: calibrate(model, WINDOWS[at::2], batch_size=3) for at, name in enumerate(("law", "code"))}
    report = moesparse.prune(model, found, RECIPES["cut"])
    moesparse.save_pretrained(model, tmp_path / "want", recipe=report.recipe)
    prune_checkpoint(source, tmp_path / "got", found, RECIPES["cut"])
    assert_same(tmp_path / "got", tmp_path / "want")
    with pytest.raises(CalibrationError, match="must be windows to refit the experts that stay, got statistics"):
        prune_checkpoint(source, tmp_path / "out", found, RECIPES["refit"])
    with pytest.raises(CalibrationError, match="statistics must come from this model"):
        prune_checkpoint(tmp_path / "got", tmp_path / "out", found, Recipe(weights=None, keep_experts=2, update="none"))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(weights=None, experts=0.5, refine_experts=True), "refine_experts must be False to run layer by layer"),
        (Recipe(weights=None, keep_experts=9), "keep_experts must be between 1 and the 8 experts"),
        (Recipe(weights=None, experts=0.5, expert_budget="global"), "unless allow_non_uniform=True, got 'global'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(source, tmp_path, recipe, said):
    with pytest.raises(UsageError, match=said):
        run(source, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moments", ["none", "both"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "nemotron_h"])
def test_calibrating_a_checkpoint_gives_the_file_of_the_model(family, moments, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    mask = torch.ones_like(WINDOWS)
    mask[2, :5] = 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    by_window = {"want": {}, "got": {}}
    want = calibrate(
        model, (WINDOWS, mask), moments=moments, batch_size=4, seed=7, by_window=by_window["want"]
    )  # fmt: skip
    got = calibrate_checkpoint(
        tmp_path / "dense",
        tmp_path / "s.stats",
        (WINDOWS, mask),
        moments=moments,
        batch_size=4,
        seed=7,
        by_window=by_window["got"],
    )
    read = ModelStatistics.load(tmp_path / "s.stats")
    assert read.metadata() == want.metadata() == got.metadata()
    for name, block in want.blocks.items():
        tensors = block.named_tensors() | block.named_maxima()
        others = read.blocks[name].named_tensors() | read.blocks[name].named_maxima()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    assert by_window["want"].keys() == by_window["got"].keys()
    assert all(torch.equal(tensor, by_window["got"][key]) for key, tensor in by_window["want"].items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "s.stats"]


@pytest.mark.parametrize(
    ("place", "count"),
    [
        pytest.param("progress score experts", 2, id="a layer"),
        pytest.param("write statistics-00001", 3, id="write a part"),
        pytest.param("write file.partial", 9, id="write the file"),
        pytest.param("rename .*/s.stats", 1, id="before the file has its name"),
    ],
)
def test_a_calibration_that_is_killed_goes_on(source, tmp_path, place, count):
    def calibration(path, **options):
        return calibrate_checkpoint(source, path, WINDOWS, moments="gated", batch_size=4, **options)

    path = tmp_path / "s.stats"
    killed(lambda progress: calibration(path, progress=progress), at(place, kill, count))
    if json.loads((tmp_path / "s.stats.unfinished" / JOURNAL_FILE).read_text())["parts"]:
        with pytest.raises(CheckpointError, match=r"unfinished run, \d parts done: .*resume=True"):
            calibration(path)
        with pytest.raises(CheckpointError, match="with another seed: 0, now 1"):
            calibration(path, seed=1, resume=True)
    calibration(path, resume=True)
    calibration(tmp_path / "whole.stats")
    assert path.read_bytes() == (tmp_path / "whole.stats").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.stats", "whole.stats"]
    with pytest.raises(CheckpointError, match=r"must be a new file, got .*s\.stats, which is there: old statistics"):
        calibration(path)
