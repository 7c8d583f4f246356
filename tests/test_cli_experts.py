"""`moesparse calibrate` and the expert options of `moesparse prune`, on a tiny model saved to a folder."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from moesparse.calibration import calibrate
from moesparse.cli import main
from moesparse.saliency.experts import expert_scores
from moesparse.statistics import ModelStatistics
from moesparse.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mixtral with a tokenizer of 64 words, and a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_model("mixtral").save_pretrained(path / "dense")
    words = {f"w{number}": number for number in range(64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path / "dense")
    for name, low, high in (("text", 3, 60), ("law", 3, 20), ("code", 40, 60)):
        ids = torch.randint(low, high, (600,), generator=torch.Generator().manual_seed(0)).tolist()
        (path / f"{name}.txt").write_text(" ".join(f"w{number}" for number in ids))
    (path / "short.txt").write_text("w3 w4 w5")
    (path / "empty.txt").write_text("\n")
    return path


def domains(folder, *names):
    """--calibration for files of the folder, each its own domain."""
    return [word for name in names for word in ("--calibration", f"{folder / name}.txt={name}")]


def run(monkeypatch, capsys, folder, command, *arguments, text=None):
    """(exit code, standard output, standard error) of a command with the folder's text, or another."""
    text = ["--calibration", str(folder / "text.txt")] if text is None else text
    text = [*text, "--samples", "8", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["moesparse", command, str(folder / "dense"), *map(str, arguments), *text])
    monkeypatch.setenv("COLUMNS", "120")
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_prune_removes_experts_and_says_which(folder, tmp_path, monkeypatch, capsys):
    arguments = (tmp_path / "out", "--keep-experts", 6, "--expert-saliency", "gated-norm", "--json")
    code, out, err = run(monkeypatch, capsys, folder, "prune", *arguments)
    assert code == 0, err
    report = json.loads(out)
    assert report["recipe"]["weights"] is None
    assert [len(block["kept"]) for block in report["experts"]["blocks"]] == [6, 6]
    assert report["experts"]["criterion"] == "gated-norm"
    assert len(report["experts"]["refit"]) == 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 6
    assert "# dense, 6 of 8 experts kept" in (tmp_path / "out" / "README.md").read_text()


def test_the_table_names_the_removed(folder, tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--experts", 0.25, "--weights", "2:4")
    assert code == 0, err
    assert "experts by reap" in err
    assert "6 of 8" in err
    assert "50.0% of the expert weights are zero" in err


def test_calibrate_writes_statistics_that_score(folder, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / "new" / "s.stats", "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 8 * 32
    statistics = ModelStatistics.load(tmp_path / "new" / "s.stats")
    assert expert_scores(statistics, "easy-ep").shape == (2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep-experts", 0), "keep must be between 1 and the 8 experts of a block, got 0"),
        (("--keep-experts", 9), "keep must be between 1 and the 8 experts of a block, got 9"),
        (("--experts", 0.5, "--expert-saliency", "reep"), "criterion must be one of frequency, gate-sum"),
        (("--experts", 0.5, "--keep-experts", 4), "only one of experts and keep_experts"),
        (("--weights", "none"), "must prune weights or remove experts"),
        (("--experts", 0.5, "--mix", "loud"), "mix must be one of pooled, equal, got 'loud'"),
        (("--experts", 0.5, "--budget", "equal"), "expert_budget must be one of per-layer, global, got 'equal'"),
        (("--experts", 0.5, "--budget", "global"), "got 'global': it keeps another number of experts in every block"),
        (("--experts", 0.5, "--expert-floor", 3), "floor must be left out with budget='per-layer', got 3"),
        (("--experts", 0.5, "--demonstrations-from-model", 32), "give 1 to 31 of its 32 tokens to the model, got 32"),
        (("--experts", 0.5, "--demonstrations-from-model", 8, "--temperature", -1), "temperature must be 0"),
        (("--experts", 0.5, "--statistics", "s.stats"), "only one of --statistics and calibration text"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(folder, tmp_path, monkeypatch, capsys, options, message):
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *options)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_named_domains_are_compared_and_mixed(folder, tmp_path, monkeypatch, capsys):
    arguments = (tmp_path / "out", "--experts", 0.5, "--mix", "equal", "--expert-saliency", "gated-norm")
    text = domains(folder, "law", "code")
    code, out, err = run(monkeypatch, capsys, folder, "prune", *arguments, "--json", text=text)
    assert code == 0, err
    report = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["recipe"]["expert_mix"] == "equal"
    found = report["experts"]["domains"]
    assert found["windows"] == {"code": 4, "law": 4}
    assert set(found["kept"]) == set(found["scores"]) == {"code", "law"}
    for number, overlap in enumerate(found["overlap"][0]["blocks"]):
        a, b = (set(found["kept"][name][number]) for name in ("code", "law"))
        assert overlap == len(a & b) / len(a | b)
    assert found["stability"]["demonstrations"] == 8
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "table", *arguments[1:], text=text)
    assert code == 0, err
    assert "domains by gated-norm" in err
    assert "overlap with law" in err
    assert "resampling the 8 demonstrations keeps" in err


def test_calibrate_shows_the_choice_of_any_budget(folder, tmp_path, monkeypatch, capsys):
    arguments = ("--experts", 0.5, "--budget", "global", "--expert-floor", 3)
    text = domains(folder, "law", "code")
    code, out, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / "s", *arguments, "--json", text=text)
    assert code == 0, err
    choice = json.loads(out)["choice"]
    counts = [len(ids) for ids in choice["kept"].values()]
    assert sum(counts) == 8
    assert min(counts) >= 3
    assert set(choice["domains"]["kept"]) == {"law", "code"}


def test_statistics_by_domain_choose_as_their_text_does(folder, tmp_path, monkeypatch, capsys):
    saved = []
    for name in ("law", "code"):
        path = tmp_path / f"{name}.stats"
        code, _, err = run(monkeypatch, capsys, folder, "calibrate", path, text=domains(folder, name))
        assert code == 0, err
        saved += ["--statistics", f"{path}={name}"]
    arguments = ("--experts", 0.5, "--update", "none", "--mix", "equal", "--json")
    code, out, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "a", *arguments, text=saved)
    assert code == 0, err
    found = json.loads(out)["experts"]["domains"]
    assert set(found["kept"]) == {"law", "code"}
    assert found["stability"] is None


def test_statistics_of_another_model_are_refused(folder, tmp_path, monkeypatch, capsys):
    windows = torch.randint(3, 60, (2, 16))
    calibrate(tiny_model("mixtral", seed=1), windows).save(tmp_path / "other.stats")
    text = ["--statistics", str(tmp_path / "other.stats")]
    arguments = ("--experts", 0.5, "--update", "none")
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *arguments, text=text)
    assert code == 1
    assert "statistics must come from this model" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "domain 'short' must give at least one window of 32 tokens, got none from"),
        ("empty", "empty.txt must hold text, got none"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "calibrate"])
def test_a_domain_without_text_is_refused(folder, tmp_path, monkeypatch, capsys, command, name, message):
    text = domains(folder, "law", name)
    options = ("--experts", 0.5)
    code, _, err = run(monkeypatch, capsys, folder, command, tmp_path / "out", *options, text=text)
    assert code == 1
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_the_model_writes_its_own_demonstrations(folder, tmp_path, monkeypatch, capsys):
    arguments = (tmp_path / "out", "--experts", 0.25, "--demonstrations-from-model", 8, "--protect-super-experts")
    code, out, err = run(monkeypatch, capsys, folder, "prune", *arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["calibration"]["tokens from the model"] == 8
    assert report["calibration"]["length"] == 32
    assert report["recipe"]["protect_experts"] is True


def test_target_bytes_is_planned_without_writing_and_then_carried_out(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mixed"
    arguments = (out, "--target-bytes", "0.7", "--saliency", "moe-pruner", "--update", "none", "--no-compare-uniform")
    code, printed, _ = run(monkeypatch, capsys, folder, "prune", *arguments, "--dry-run", "--json")
    plan = json.loads(printed)
    assert code == 0 and not out.exists()
    assert plan["mixed"]["bytes"] <= 0.7 * plan["dense"]
    code, _, told = run(monkeypatch, capsys, folder, "prune", *arguments)
    assert code == 0
    assert "experts, 0." in told and "estimates in nats per token" in told
    config = json.loads((out / "config.json").read_text())
    recipe = config["moesparse"]["recipe"]
    assert recipe["patterns"] == plan["mixed"]["patterns"] and recipe["target_bytes"] == "0.7"
    assert config["num_local_experts"] == plan["mixed"]["keep"]


def test_target_bytes_takes_the_place_of_a_pattern(folder, tmp_path, monkeypatch, capsys):
    for extra, names in ((("--weights", "2:4"), "--weights"), (("--experts", "0.25"), "experts")):
        code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--target-bytes", "0.5", *extra)
        assert code == 2 and f"{names} must be left out with" in err
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--target-bytes", "a lot")
    assert code == 2 and "must be a share" in err
