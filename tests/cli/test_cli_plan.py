"""`--plan` and `--scores` of `moesparse calibrate` and `prune`, and GGUF files on the command line."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from gguf_files import EXPERTS, minimax

from moesparse.checkpoints.gguf import GGUFFiles
from moesparse.cli import main
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import PLAN_FILE, ExpertPlan
from moesparse.experts.scores_file import ExpertScores
from moesparse.pruning.gguf import GGUFModel
from moesparse.system.manifest import MANIFEST_FILE

TEXT = ("--samples", "6", "--length", "32", "--device", "cpu")


def run(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Statistics, a plan and scores of the embedded model."""
    folder, patch = tmp_path_factory.mktemp("made"), pytest.MonkeyPatch()
    files = ("--plan", folder / "plan.json", "--scores", folder / "scores.json")
    arguments = ["calibrate", "demo", folder / "stats", *TEXT, "--experts", "0.25", *files, "--json"]
    patch.setattr(sys, "argv", ["moesparse", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        main()
    patch.undo()
    return folder


def test_calibrate_writes_the_choice_that_it_shows(made, monkeypatch, capsys):
    counted = ("--experts", 0.3, "--divisible-by", 4)
    arguments = ("calibrate", "demo", made / "more", *TEXT, *counted, "--plan", made / "p", "--json")
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    said = json.loads(out)
    assert said["plan"] == str(made / "p")
    plan = ExpertPlan.load(made / "p")
    assert [list(ids) for ids in plan.kept] == list(said["choice"]["kept"].values())
    assert plan == ExpertPlan.load(made / "plan.json")
    assert (plan.criterion, plan.statistics) == ("reap", said["text"])
    (made / "more").unlink()
    code, _, err = run(monkeypatch, capsys, *arguments[:2], made / "more", *TEXT, "--scores", made / "s", "--whole")
    assert code == 0, err
    assert f"wrote {made / 's'}: for moesparse prune --scores" in err
    assert (made / "s").read_bytes() == (made / "scores.json").read_bytes()


def test_prune_carries_the_plan_out_with_and_without_text(made, tmp_path, monkeypatch, capsys):
    for name, more in (("plan", ("--plan", made / "plan.json")), ("scores", ("--scores", made / "scores.json"))):
        more = (*more, "--experts", "0.25") if name == "scores" else more
        code, out, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / name, *more, "--json")
        assert code == 0, err
        said = json.loads(out)
        assert (said["recipe"]["update"], said["calibration"]["tokens"], said["experts"]["refit"]) == ("none", 0, [])
        assert ExpertPlan.load(tmp_path / name / PLAN_FILE) == ExpertPlan.load(made / "plan.json")
        card = (tmp_path / name / "README.md").read_text()
        assert f"| experts chosen by | {name} of a file |" in card and "calibration tokens" not in card
    want = ("prune", "demo", tmp_path / "want", *TEXT, "--experts", "0.25", "--update", "none")
    assert run(monkeypatch, capsys, *want)[0] == 0
    for name in ("plan", "scores"):
        assert (tmp_path / name / MANIFEST_FILE).read_bytes() == (tmp_path / "want" / MANIFEST_FILE).read_bytes()
    code, _, err = run(monkeypatch, capsys, "inspect", tmp_path / "plan", "--against", "demo", "--verify")
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, "report", tmp_path / "plan", "--output", tmp_path / "page.html")
    assert code == 0, err
    assert "were named by a plan, made by reap before" in (tmp_path / "page.html").read_text()
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 60)
    refit = ("prune", "demo", tmp_path / "refit", "--plan", made / "plan.json", "--calibration", text, *TEXT, "--whole")
    code, _, err = run(monkeypatch, capsys, *refit)
    assert code == 0, err
    assert "output error" in err and "%" in err
    assert ExpertPlan.load(tmp_path / "refit" / PLAN_FILE) == ExpertPlan.load(made / "plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plan", "P", "--experts", "0.5"), "--experts, --keep-experts and --scores must be left out with --plan"),
        (
            ("--plan", "P", "--statistics", "S"),
            "--statistics must be left out with --plan, which says who stays, got both",
        ),
        (("--plan", "P", "--divisible-by", "8"), "--plan must keep a multiple of --divisible-by 8 experts in"),
        (("--plan", "P", "--refine-experts"), "--refine-experts must be left out with --plan, got True"),
        (("--plan", "P", "--calibration", "T", "--update", "none"), "--calibration must be left out with --plan"),
        (("--scores", "C"), "--scores must come with --experts or --keep-experts, for which they choose, got neither"),
        (("--scores", "C", "--experts", "0.5", "--expert-saliency", "aimer"), "must be one that --scores holds, freq"),
        (("--plan", "C"), 'scores.json must be a file with "format": "moesparse-plan", got \'moesparse-scores\''),
        (("--plan", "X"), "--plan must be a file to read, got"),
    ],
)
def test_what_does_not_go_together(options, message, made, tmp_path, monkeypatch, capsys):
    (made / "t").write_text("text")
    files = {"P": made / "plan.json", "C": made / "scores.json", "S": made / "stats", "T": made / "t", "X": made / "x"}
    options = [files.get(each, each) for each in options]
    code, _, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *options)
    assert code in (1, 2) and message in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plan", "P"), "--plan must come with --experts or --keep-experts, whose choice it holds, got neither"),
        (("--divisible-by", "8"), "--divisible-by must come with --experts or --keep-experts, whose choice it shows"),
        (("--scores", "."), "--scores must be a file to write, got the folder ."),
    ],
)
def test_files_that_calibrate_cannot_write(options, message, tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "calibrate", "demo", tmp_path / "stats", *options)
    assert code == 2 and message in err, err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gguf_model(tmp_path):
    """A GGUF file with a plan and scores of it."""
    source = minimax(tmp_path / "all.gguf", "Q4_0")
    model = GGUFModel(GGUFFiles(source))
    origin = model.origin(model.layers)
    ExpertPlan.of(origin, [torch.arange(12)] * 2, "reap").save(tmp_path / "plan.json")
    bare = Origin(origin.layers, EXPERTS, None, None, (None, None))
    ExpertScores(bare, {"aimer": torch.arange(32.0).view(2, 16)}).save(tmp_path / "scores.json")
    return source


def test_prune_and_inspect_a_gguf_file(gguf_model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "kept.gguf"
    code, _, err = run(monkeypatch, capsys, "prune", gguf_model, out, "--plan", tmp_path / "plan.json")
    assert code == 0, err
    assert "12 of 16 experts kept in each of 2 layers, chosen by reap; Q4_0 as they were" in err
    assert f"wrote {out}: " in err
    code, shown, err = run(monkeypatch, capsys, "inspect", out)
    assert code == 0, err
    assert "minimax-m2: 4 of 12 experts for a token" in shown and "experts removed by reap, of 16" in shown
    code, shown, err = run(monkeypatch, capsys, "inspect", out, "--json")
    facts = json.loads(shown)
    assert facts["layers"][1]["tensors"]["ffn_up_exps.weight"]["shape"] == [12, 256, 256]
    assert facts["removed"]["kept"] == {"0": list(range(12)), "1": list(range(12))}
    # scores of another program, by sizes alone, and their one criterion
    options = ("--scores", tmp_path / "scores.json", "--keep-experts", 8, "--report", tmp_path / "r.json", "--json")
    code, said, err = run(monkeypatch, capsys, "prune", gguf_model, tmp_path / "eight.gguf", *options)
    assert code == 0, err
    report = json.loads(said)
    assert (report["kept"], report["criterion"], report["routers"]) == (8, "aimer", "not compared")
    assert json.loads((tmp_path / "r.json").read_text()) | {"schema": "moesparse.prune.gguf/1"} == report
    note = json.loads(GGUFFiles(tmp_path / "eight.gguf").value("moesparse.plan"))
    assert note["kept"] == {"0": list(range(8, 16)), "1": list(range(8, 16))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --plan, or --scores with --experts or --keep-experts, must be given for a GGUF model"),
        (("--experts", "0.25"), "every criterion of --experts alone reads text, which is not run through GGUF files"),
        (("--plan", "P", "--experts", "0.25"), "either --plan, or --scores with"),
        (("--scores", "C"), "--scores must come with --experts or --keep-experts"),
        (("--plan", "P", "--weights", "2:4"), "--weights must be left out for a GGUF model"),
        (("--plan", "P", "--calibration", "t.txt"), "--calibration must be left out for a GGUF model"),
        (("--plan", "P", "--dry-run"), "--dry-run must be left out for a GGUF model"),
        (("--plan", "P", "--divisible-by", "8"), "--plan must keep a multiple of --divisible-by 8 experts"),
        (
            ("--scores", "C", "--keep-experts", "12", "--divisible-by", "8"),
            "--keep-experts must be a multiple of --divisible-by 8",
        ),
    ],
)
def test_what_a_gguf_file_has_no_use_for(options, message, gguf_model, tmp_path, monkeypatch, capsys):
    files = {"P": tmp_path / "plan.json", "C": tmp_path / "scores.json"}
    options = [files.get(each, each) for each in options]
    code, _, err = run(monkeypatch, capsys, "prune", gguf_model, tmp_path / "out.gguf", *options)
    assert code == 2 and message in err, err
    assert not (tmp_path / "out.gguf").exists()
    code, _, err = run(monkeypatch, capsys, "inspect", gguf_model, "--verify")
    assert code == 2 and "--verify and --against must be left out for a GGUF file" in err
