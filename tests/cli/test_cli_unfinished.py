"""A run that was stopped and one that is finished, as `moesparse inspect` and `--resume` meet them."""

import fcntl
import json

import pytest
from small_text import WORDS, make_tokenizer
from typer.testing import CliRunner

from moesparse.checkpoints.history import REPORT_FILE
from moesparse.cli import app
from moesparse.errors import CheckpointError
from moesparse.pruning.run import experts_folder
from moesparse.system.folders import JOURNAL_FILE, LOCK_FILE
from moesparse.system.run_folder import RunFolder
from moesparse.system.unfinished import check_inputs
from moesparse.testing import tiny_model

WANDA = ("--saliency", "wanda", "--update", "none")
IN_WORDS = "Of the experts, 2 of every 4 weights stay (2:4), chosen by wanda; the kept ones keep the values they had."
GOES_ON = "The same command with --resume goes on."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_model("qwen3_moe", vocab_size=320).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS) * 200)
    return ("--calibration", file, "--samples", "8", "--length", "32")


def run(*arguments):
    """(exit code, standard output, standard error, what was raised)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr, result.exception


def stopped(monkeypatch, part, *arguments):
    """A run that is stopped where a part of this name is to be written."""
    write = RunFolder.write

    def stop(self, name, *args, **options):
        if name == part:
            raise KeyboardInterrupt
        return write(self, name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", stop)
        code, _, said, _ = run(*arguments)
    assert code == 1 and "stopped:" in said


def test_inspect_says_how_far_a_stopped_run_is_and_how_it_goes_on(source, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(monkeypatch, "layer-00001", "prune", source, out, *WANDA, *text)
    code, said, _, _ = run("inspect", out)
    assert code == 1
    assert said == f"{out} holds a run that was stopped: 1 of 2 layers are finished.\n{IN_WORDS}\n{GOES_ON}\n"
    code, said, _, _ = run("inspect", out, "--json")
    told = json.loads(said)["unfinished"]
    assert code == 1
    assert (told["folder"], told["layers"], told["done"], told["measured"]) == (str(out), 2, 1, 0)
    assert (told["step"], told["process"], told["recipe"]["saliency"]) == (None, None, "wanda")


def test_inspect_names_the_process_at_work(source, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(monkeypatch, "layer-00001", "prune", source, out, *WANDA, *text)
    with (out / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4321")
        file.flush()
        _, said, _, _ = run("inspect", out)
    assert said.startswith(f"{out} holds a run that process 4321 is at work on: 1 of 2 layers are finished.")
    assert "--resume" not in said


@pytest.mark.parametrize(
    ("part", "folder", "step", "far"),
    [
        ("statistics-00001", "out.experts", "1 of 2", "experts were scored on 1 of 2 layers, 0 of 2 layers"),
        ("layer-00001", "out.experts", "1 of 2", "experts were scored on 2 of 2 layers, 1 of 2 layers"),
    ],
    ids=["scoring", "cutting"],
)
def test_inspect_says_which_of_two_steps_it_is(part, folder, step, far, source, text, tmp_path, monkeypatch):
    out, both = tmp_path / "out", ("--weights", "2:4", "--experts", "0.5", *WANDA, *text)
    stopped(monkeypatch, part, "prune", source, out, *both)
    code, said, _, _ = run("inspect", out)
    assert code == 1
    assert said.startswith(f"{tmp_path / folder} holds a run that was stopped, step {step}: {far} are finished.\n")


def test_inspect_of_a_run_stopped_between_its_steps(source, text, tmp_path, monkeypatch):
    out, both = tmp_path / "out", ("--weights", "2:4", "--experts", "0.5", *WANDA, *text)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moesparse.pruning.run.ExpertPlan.load", stop)
        run("prune", source, out, *both)
    assert not out.exists() and not (experts_folder(out) / JOURNAL_FILE).exists()
    code, said, _, _ = run("inspect", out)
    assert code == 1
    assert "was stopped, step 1 of 2: 2 of 2 layers are finished." in said


def test_inspect_of_statistics_that_are_not_whole(source, text, tmp_path, monkeypatch):
    file = tmp_path / "sums.stats"
    stopped(monkeypatch, "statistics-00001", "calibrate", source, file, *text)
    for asked in (file, tmp_path / "sums.stats.unfinished"):
        code, said, _, _ = run("inspect", asked)
        assert code == 1
        where = tmp_path / "sums.stats.unfinished"
        assert said == f"{where} holds a run that was stopped: the text went through 1 of 2 layers.\n{GOES_ON}\n"


def test_inspect_of_a_finished_folder_and_of_no_folder_is_as_before(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    assert run("inspect", ".")[0] == 0
    (tmp_path / "empty").mkdir()
    assert isinstance(run("inspect", tmp_path / "empty")[3], CheckpointError)


def test_resume_of_what_is_finished_does_nothing_and_says_what_it_holds(source, text, tmp_path):
    out = tmp_path / "out"
    words = ("prune", source, out, *WANDA, *text, "--resume")
    assert run(*words)[0] == 0
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    code, _, said, _ = run(*words)
    assert code == 0
    assert f"already finished: {out}, nothing was done. {IN_WORDS} On 8 windows of 32 tokens.\n" in said
    code, said, _, _ = run(*words, "--json", "--report", tmp_path / "report.json")
    told = json.loads(said)
    assert code == 0
    assert (told.pop("already_finished"), told.pop("output")) == (True, str(out))
    held = json.loads((out / REPORT_FILE).read_text())
    assert held.items() <= told.items() and json.loads((tmp_path / "report.json").read_text()) == held
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_resume_of_what_is_finished_by_another_recipe_names_the_fields(source, text, tmp_path):
    out = tmp_path / "out"
    assert run("prune", source, out, *WANDA, *text)[0] == 0
    error = run("prune", source, out, *text, "--resume", "--saliency", "magnitude", "--update", "none")[3]
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(
        f"OUT is finished: {out}, with another recipe: saliency was 'wanda', now 'magnitude'. Give the same again"
    )


def test_resume_after_a_second_command_knows_the_first(source, text, tmp_path):
    six, out = tmp_path / "six", tmp_path / "out"
    assert run("prune", source, six, "--experts", "0.25", "--update", "none", *text)[0] == 0
    words = ("prune", six, out, *WANDA, *text, "--resume")
    assert run(*words)[0] == 0
    code, _, said, _ = run(*words)
    assert code == 0
    assert "25% of the experts of every block are removed, chosen by reap. Of the experts, 2 of every 4" in said


def test_resume_with_another_recipe_names_the_fields_old_and_new(source, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(monkeypatch, "layer-00001", "prune", source, out, *WANDA, *text)
    other = ("--saliency", "magnitude", "--update", "none", "--seed", "1")
    error = run("prune", source, out, *text, "--resume", *other)[3]
    assert isinstance(error, CheckpointError)
    said = "with another recipe: saliency was 'wanda', now 'magnitude', seed was 0, now 1; with another windows: "
    assert said in str(error)


def test_every_input_that_differs_is_named():
    with pytest.raises(
        CheckpointError, match=r"^found, with another a: 1, now None; with another b: y was 2, now 3\. G"
    ):
        check_inputs("found", {"a": 1, "b": {"x": 1, "y": 2}}, {"b": {"x": 1, "y": 3}}, resume=True)


def test_resume_of_a_finished_training(source, text, tmp_path):
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert run("prune", source, pruned, *WANDA, *text)[0] == 0
    words = ("distill", pruned, "--teacher", source, "-o", out, "--mode", "blockwise", "--resume", *text)
    assert run(*words, "--epochs", "1")[0] == 0
    code, _, said, _ = run(*words, "--epochs", "1")
    assert code == 0
    assert f"already finished: {out}" in said and "blockwise distillation on 8 windows of text" in said
    error = run(*words, "--epochs", "2")[3]
    assert isinstance(error, CheckpointError)
    assert str(error).startswith(f"OUT is finished: {out}, with another settings: epochs was 1, now 2. ")


def test_resume_of_finished_statistics(source, text, tmp_path):
    file = tmp_path / "sums.stats"
    assert run("calibrate", source, file, *text)[0] == 0
    code, _, said, _ = run("calibrate", source, file, *text, "--resume")
    assert code == 0
    assert f"already finished: {file}, nothing was done. 256 tokens, 2 blocks" in said
    assert json.loads(run("calibrate", source, file, *text, "--resume", "--json")[1])["already_finished"] is True
    error = run("calibrate", source, file, *text, "--resume", "--seed", "4")[3]
    assert isinstance(error, CheckpointError) and "with another seed: 0, now 4" in str(error)
    # a choice of experts takes the sums of every window, which the file has not
    error = run("calibrate", source, file, *text, "--resume", "--experts", "0.5")[3]
    assert isinstance(error, CheckpointError) and "STATISTICS must be a new file" in str(error)


def test_resume_clears_what_a_finished_run_of_two_steps_had_left(source, text, tmp_path):
    out, beside = tmp_path / "out", experts_folder(tmp_path / "out")
    words = ("prune", source, out, "--weights", "2:4", "--experts", "0.5", *WANDA, *text)
    assert run(*words)[0] == 0 and not beside.exists()
    beside.mkdir()
    (beside / REPORT_FILE).write_text("{}")
    assert run(*words, "--resume")[0] == 0
    # what is no half of a run is somebody's own
    assert beside.exists()
    (beside / REPORT_FILE).write_text('{"inputs": {}}')
    assert run(*words, "--resume")[0] == 0
    assert not beside.exists()
