"""`moesparse compare` as a process of its own: what it prints, writes, refuses, and goes on with."""

import json
import os
import signal

import pytest
import torch
from faults import Watch, at
from processes import Started, command, moesparse_command
from small_text import make_tokenizer, prose
from typer.testing import CliRunner

import moesparse
from moesparse import evaluate
from moesparse.cli import app
from moesparse.errors import MoESparseError
from moesparse.experts.surgery import remove_experts
from moesparse.testing import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    model = tiny_model("mixtral", vocab_size=320)
    model.save_pretrained(root / "dense")
    remove_experts(model, [[0, 1, 2, 5, 6, 7]] * 2)
    model.save_pretrained(root / "pruned")
    for name in ("dense", "pruned"):
        make_tokenizer().save_pretrained(root / name)
    (root / "law.txt").write_text(prose(300, seed=1))
    (root / "code.txt").write_text(prose(200, seed=2))
    return root


QUICK = ("--length", "32", "--no-languages")


def texts(place):
    return ("--text", str(place / "law.txt"), "--text", f"{place / 'code.txt'}=programs")


HERE = {"COLUMNS": "160"}


def ran(place, *words):
    done = command("compare", "dense", "pruned", *words, place=place, environment=HERE)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_object_is_that_of_python_and_the_file_holds_it_too(place, tmp_path):
    out, _ = ran(place, *texts(place), *QUICK, "--generate", "2", "--json", "-o", str(tmp_path / "lost.json"))
    told = json.loads(out)
    assert told == json.loads((tmp_path / "lost.json").read_text())
    assert (told["schema"], told["dense"], told["pruned"]) == ("moesparse.compare/1", "dense", "pruned")
    tokenizer = make_tokenizer()
    cut = [moesparse.text.evaluation_windows(place / f"{name}.txt", tokenizer, 32)[0] for name in ("law", "code")]
    domains = ["law"] * len(cut[0]) + ["programs"] * len(cut[1])
    (found,) = evaluate.compare(place / "dense", place / "pruned", torch.cat(cut), domains)
    wanted = json.loads(json.dumps(found.as_dict()))
    for name in ("kl", "agreement", "perplexity", "domains", "positions", "layers", "changed"):
        assert told[name] == wanted[name], name
    model, _ = moesparse.load_pretrained(place / "pruned")
    by_eval = evaluate.perplexity_of_files(model, tokenizer, [place / "law.txt"], 32).overall.perplexity
    assert told["domains"]["law"]["perplexity"]["pruned"] == pytest.approx(by_eval, rel=1e-6)
    assert set(told["loops"]) == {"dense", "pruned"} and told["generation"]["prompts"] == 2
    assert not (tmp_path / "lost.json.unfinished").exists()


def test_the_tables_show_it(place):
    out, err = ran(place, *texts(place), "--length", "32", "--generate", "4", "--quiet")
    for words in ("pruned beside dense: KL(dense || pruned)", "law", "programs", "language French", "end in a loop"):
        assert words in out
    assert "by position in the window" in out and "tokens that changed most" in out
    assert err == ""


def stopped_at(place, arguments):
    """A command that is sent SIGTERM at a place (see faults.py)."""
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch, at(place, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        moesparse_command(arguments)


def test_what_is_stopped_goes_on_with_resume(place, tmp_path):
    output = tmp_path / "lost.json"
    words = (*texts(place), *QUICK, "--generate", "0", "-o", str(output))
    stopped = Started(stopped_at, "renamed .*/dense-states-00001", ["compare", "dense", "pruned", *words], place=place)
    _, err = stopped.communicate()
    assert stopped.returncode == 1
    assert "the same command with --resume goes on" in " ".join(err.split())
    assert "unfinished" in CliRunner().invoke(app, ["inspect", str(output)]).output
    again = command("compare", "dense", "pruned", *words, place=place)
    assert again.returncode == 1 and "--resume" in again.stderr
    ran(place, *words, "--resume")
    assert json.loads(output.read_text())["kl"]["mean"] > 0 and not (tmp_path / "lost.json.unfinished").exists()


def refused(place, *words):
    result = CliRunner().invoke(app, ["compare", str(place / "dense"), *map(str, words)])
    assert isinstance(result.exception, MoESparseError), result.output
    return str(result.exception)


def test_what_cannot_be_is_refused_before_any_work(place, tmp_path, monkeypatch):
    pruned = place / "pruned"
    assert "--text must name a text" in refused(place, pruned)
    assert "--resume must come with --output" in refused(place, pruned, "--resume")
    assert "--output must be a file to write" in refused(place, pruned, "-o", tmp_path)
    assert "--text must be a file or a datasets name" in refused(place, pruned, "--text", "gone.txt")
    named = f"{place / 'law.txt'}=French"
    said = "--no-languages must be given with a domain called French"
    assert said in refused(place, pruned, "--text", named, "--length", 32)
    hot = ("--text", place / "law.txt", "--length", 32, "--temperature", 0)
    assert "temperature above 0" in refused(place, pruned, *hot)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "moesparse compare must be left out with several processes" in refused(place, pruned)


def test_a_model_that_does_not_fit_is_not_loaded_unless_that_is_asked_for(place, monkeypatch):
    monkeypatch.setattr("moesparse.system.memory.available_memory", lambda: 1000)
    words = ["compare", str(place / "dense"), str(place / "pruned"), *texts(place), *QUICK, "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["loops"] is None
    assert "no continuations, and no loops counted" in result.stderr and "--generate N" in result.stderr
    asked = CliRunner().invoke(app, [*words, "--generate", "1"])
    assert json.loads(asked.stdout)["generation"]["prompts"] == 1


def test_the_page_has_its_sections(place, tmp_path):
    pytest.importorskip("matplotlib")
    ran(place, *texts(place), *QUICK, "--generate", "2", "-o", str(tmp_path / "lost.json"))
    words = ["report", str(place / "pruned"), "--comparison", str(tmp_path / "lost.json"), "--json"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "What was lost" in json.loads(result.stdout)["sections"]
    assert "programs" in (tmp_path / "page.html").read_text()
