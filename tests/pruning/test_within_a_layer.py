"""A run that is stopped within a layer keeps the experts that are done, and goes on to the same bits."""

import signal
import time

import pytest
import torch
from faults import assert_same, at, kill, killed
from processes import Started, command, moesparse_command
from small_text import make_tokenizer, prose

from moesparse import Recipe
from moesparse.errors import CheckpointError
from moesparse.pruning import block
from moesparse.pruning.run import prune_checkpoint
from moesparse.system import pieces, run_folder
from moesparse.system.folders import JOURNAL_FILE
from moesparse.system.unfinished import unfinished_run, what_is_kept
from moesparse.testing import tiny_model

EXPERTS, LAYERS = 8, 2
ALL = 2 * EXPERTS * LAYERS
WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
RECIPES = {
    # solved twice, and a factor that is measured on all of the layer
    "rescaled": Recipe(weights="2:4", saliency="gated-sparsegpt", update="least-squares+rescale"),
    # down is solved for what gate and up have become, from sums recorded in between
    "asymmetric": Recipe(weights="2:4", saliency="gated-admm", update="asymmetric"),
}


# nothing done, between the looks, between the layers, the last; within gate and up, behind the first of down
STOPS = {"rescaled": (0, EXPERTS, 2 * EXPERTS, ALL - 1), "asymmetric": (1, EXPERTS + 1, ALL - 1)}


def one_by_one(weight):
    return [slice(expert, expert + 1) for expert in range(len(weight))]


@pytest.fixture(autouse=True)
def _one_expert_at_a_time(monkeypatch):
    """As those of large models: a slice is one expert."""
    monkeypatch.setattr(block, "expert_slices", one_by_one)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    tiny_model("mixtral", num_hidden_layers=LAYERS).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    """What uninterrupted runs give, and their reports."""
    root = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "expert_slices", one_by_one)
        return {name: (root / name, run(source, root / name, recipe)) for name, recipe in RECIPES.items()}


def run(source, out, recipe, resume=False, **options):
    return prune_checkpoint(source, out, WINDOWS, recipe, batch_size=4, resume=resume, progress=None, **options)


def solved_and_stopped(monkeypatch, work, stop=None):
    """Names of the experts that `work` solves, of which it is interrupted in the `stop`-th."""
    solve, seen = block._prune_experts, []

    def watched(of, matrix, experts, *given):
        if len(seen) == stop:
            # gate and up have been written, or half of them
            with torch.no_grad():
                matrix.weight[experts].mul_(0.5)
            raise KeyboardInterrupt
        seen.append((of.name, matrix.name, experts.start, experts.stop))
        return solve(of, matrix, experts, *given)

    with monkeypatch.context() as patch:
        patch.setattr(block, "_prune_experts", watched)
        if stop is None:
            work()
        else:
            with pytest.raises(KeyboardInterrupt):
                work()
    return seen


def folders(out):
    return sorted(path.name for path in out.iterdir() if path.is_dir())


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["some", "every"])
@pytest.mark.parametrize("name", RECIPES)
def test_stopped_at_an_expert_it_goes_on_with_the_next_to_the_same_bits(
    name, every, source, pruned, tmp_path, monkeypatch
):
    (whole, report), recipe = pruned[name], RECIPES[name]
    experts = solved_and_stopped(monkeypatch, lambda: run(source, tmp_path / "counted", recipe))
    assert len(experts) == len(set(experts)) == ALL
    for stop in range(ALL) if every else STOPS[name]:
        out, reports = tmp_path / str(stop), []
        before = solved_and_stopped(monkeypatch, lambda out=out: run(source, out, recipe), stop)
        done, open_ones = divmod(stop, 2 * EXPERTS)
        if stop:
            found = unfinished_run(out)
            assert (found.done, found.solved) == (done, open_ones)
        else:
            # nothing was done, nothing is there
            assert not out.exists()
        after = solved_and_stopped(
            monkeypatch,
            lambda out=out, reports=reports: reports.append(run(source, out, recipe, resume=True)),
        )
        assert before + after == experts
        assert_same(out, whole)
        assert [(each.tensors, each.rescale) for each in reports[0].blocks] == [
            (each.tensors, each.rescale) for each in report.blocks
        ]
        assert folders(out) == []


def test_stopped_again_and_again_it_keeps_all_of_it(source, pruned, tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", RECIPES["rescaled"]
    seen = []
    for _ in range(3):
        seen += solved_and_stopped(monkeypatch, lambda: run(source, out, recipe, resume=True), 2)
    assert len(seen) == len(set(seen)) == 6
    # a layer that is finished needs its pieces no more, also where the run ends between the two
    assert folders(out) == ["layer-00000.pieces"]
    monkeypatch.setattr(run_folder.shutil, "rmtree", lambda *_, **__: None)
    solved_and_stopped(monkeypatch, lambda: run(source, out, recipe, resume=True), 2 * EXPERTS - 4)
    assert folders(out) == ["layer-00000", "layer-00000.pieces", "layer-00001.pieces"]
    monkeypatch.undo()
    monkeypatch.setattr(block, "expert_slices", one_by_one)
    run(source, out, recipe, resume=True)
    assert folders(out) == []
    assert_same(out, pruned["rescaled"][0])


def test_without_resume_pieces_are_an_unfinished_run(source, tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", RECIPES["rescaled"]
    solved_and_stopped(monkeypatch, lambda: run(source, out, recipe), 5)
    assert what_is_kept(out) == f"5 matrices of experts of the layer at work are kept in {out}"
    with pytest.raises(CheckpointError, match=r"unfinished run, 0 parts done: .*resume=True"):
        run(source, out, recipe)
    with pytest.raises(CheckpointError, match=r"another recipe: update was 'least-squares.rescale', now 'obs'"):
        run(source, out, Recipe(weights="2:4", saliency="gated-sparsegpt", update="obs"), resume=True)


@pytest.mark.parametrize("harm", ["cut", "flip", "sums"])
def test_what_does_not_fit_is_solved_again(harm, source, pruned, tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", RECIPES["rescaled"]
    solved_and_stopped(monkeypatch, lambda: run(source, out, recipe), 5)
    [file] = (out / "layer-00000.pieces").iterdir()
    data = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        notes = data.replace(b'\\"key\\": \\"', b'\\"key\\": \\"0', 1)
        # as long as it was
        at_key = notes.index(b'\\"key\\": \\"0') + 11
        del notes[at_key + 1]
        file.write_bytes(notes)
    after = solved_and_stopped(monkeypatch, lambda: run(source, out, recipe, resume=True))
    assert len(after) == ALL - (0 if harm == "cut" else 4)
    assert_same(out, pruned["rescaled"][0])


def test_what_is_quick_is_not_written(source, tmp_path, monkeypatch):
    written, write = [], pieces.Pieces._write
    monkeypatch.setattr(pieces.Pieces, "_write", lambda self: written.append(1) or write(self))
    run(source, tmp_path / "quick", RECIPES["rescaled"])
    assert not written
    # a rule without second moments takes no longer than its file
    monkeypatch.setattr(pieces, "FLUSH_SECONDS", 0)
    run(source, tmp_path / "scored", Recipe(weights="2:4", saliency="wanda", update="none"))
    assert not written
    run(source, tmp_path / "slow", RECIPES["rescaled"])
    assert len(written) >= ALL


@pytest.mark.parametrize(
    ("place", "solved"),
    [
        ("call choose_masks", 6),
        # written, and not yet under its name
        (r"write 0000-000006.partial", 6),
        (r"rename layer-00000.pieces/0000-000006", 6),
        (r"renamed layer-00000.pieces/0000-000006", 7),
    ],
)
def test_killed_it_keeps_what_was_written(place, solved, source, pruned, tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", RECIPES["rescaled"]
    monkeypatch.setattr(pieces, "FLUSH_SECONDS", 0)
    count = 7 if place.startswith("call") else 1
    killed(lambda _: run(source, out, recipe), at(place, kill, count), ("choose_masks",))
    assert unfinished_run(out).solved == solved
    after = solved_and_stopped(monkeypatch, lambda: run(source, out, recipe, resume=True))
    assert len(after) == ALL - solved
    assert_same(out, pruned["rescaled"][0])


def pausing_at(number, arguments):
    """A command that says when an expert is solved, and waits behind the one of this number."""
    solve, solved = block._prune_experts, []

    def watched(*given):
        done = solve(*given)
        solved.append(1)
        print("solved", flush=True)
        if len(solved) == number:
            time.sleep(60)
        return done

    block.expert_slices, block._prune_experts = one_by_one, watched
    moesparse_command(arguments)


def test_sigterm_keeps_the_experts_that_are_done_and_inspect_says_it(tmp_path):
    tiny_model("mixtral", num_hidden_layers=LAYERS, vocab_size=320).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(prose(400))
    text = ["--calibration", "text.txt", "--samples", "6", "--length", "32"]
    rules = ["--saliency", "gated-sparsegpt", "--update", "least-squares", "--device", "cpu"]

    def start(out, pause, *more):
        return Started(pausing_at, pause, ["prune", "model", out, *text, *rules, *more], place=tmp_path)

    start("whole", None).ended_well()
    process, out = start("out", 5), tmp_path / "out"
    while process.said()[0].count("solved") < 5:
        assert process.poll() is None, process.said()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate()
    assert process.returncode == 1
    held = unfinished_run(out)
    # the fifth is within its pause, which is within its work
    assert (held.done, held.solved, printed.count("solved")) == (0, 4, 5)
    kept = f"stopped: {held.solved} matrices of experts of the layer at work are kept in out"
    assert kept in said.replace("\n", " ")
    told = command("inspect", out)
    assert told.returncode == 1
    assert f"0 of {LAYERS} layers are finished and {held.solved} matrices of experts of the next one." in told.stdout
    again = start("out", None, "--resume").ended_well()
    assert again.stdout.count("solved") == ALL - held.solved
    assert_same(out, tmp_path / "whole")
    assert not (out / JOURNAL_FILE).exists()
