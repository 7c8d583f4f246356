"""`moesparse calibrate` and the expert options of `moesparse prune`, on a tiny model saved to a folder."""

from __future__ import annotations

import json
import sys

import pytest
import torch

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
    ids = torch.randint(3, 60, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "text.txt").write_text(" ".join(f"w{number}" for number in ids))
    return path


def run(monkeypatch, capsys, folder, command, *arguments):
    """(exit code, standard output, standard error) of a command with the folder's text."""
    text = ["--calibration", str(folder / "text.txt"), "--samples", "8", "--length", "32"]
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
    ],
)
def test_mistakes_are_one_line_and_exit_2(folder, tmp_path, monkeypatch, capsys, options, message):
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *options)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
