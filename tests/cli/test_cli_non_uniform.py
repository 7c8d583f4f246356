"""Every command on a folder whose layers keep different numbers of experts."""

import json

import pytest
import torch
from small_text import WORDS, make_tokenizer
from typer.testing import CliRunner

import moesparse
from moesparse import evaluate
from moesparse.cli import app
from moesparse.errors import MoESparseError
from moesparse.experts.plan_file import PLAN_FILE
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import tiny_model

WANDA = ("--weights", "2:4", "--saliency", "wanda", "--update", "none")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def ran(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@torch.no_grad()
def logits(folder):
    return moesparse.load_pretrained(folder)[0](torch.arange(3, 35)[None]).logits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense folder, one pruned by a global budget, a text and the options that name it."""
    root = tmp_path_factory.mktemp("counts")
    tiny_model("qwen3_moe", vocab_size=320).save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    (root / "text.txt").write_text(" ".join(WORDS) * 200)
    text = ("--calibration", root / "text.txt", "--samples", "8", "--length", "32")
    asked = ("--experts", "0.3", "--budget", "global", "--expert-floor", "3", "--allow-non-uniform")
    said = run("prune", root / "dense", root / "pruned", *asked, *text)
    assert said.exit_code == 0, said.output
    assert "per_layer_config: read by moesparse" in said.output and "not by transformers" in said.output
    counts = [block.num_experts for block in find_moe_blocks(moesparse.load_pretrained(root / "pruned")[0])]
    assert sum(counts) == 11 and min(counts) >= 3
    return root, text, counts


def test_what_looks_at_it(place, tmp_path):
    root, text, counts = place
    assert "verified" in ran("inspect", root / "pruned", "--verify", "--against", root / "dense")
    told = json.loads(ran("eval", root / "pruned", "--text", root / "text.txt", "--length", "32", "--json"))
    model, tokenizer = moesparse.load_pretrained(root / "pruned")
    want = evaluate.perplexity_of_files(model, tokenizer, [root / "text.txt"], 32)
    assert told["perplexity"] == pytest.approx(want.overall.perplexity, rel=1e-6)
    words = ("--text", root / "text.txt", "--length", "32", "--no-languages", "--generate", "0", "--json")
    lost = json.loads(ran("compare", root / "dense", root / "pruned", *words))
    assert lost["perplexity"]["pruned"] == pytest.approx(want.overall.perplexity, rel=1e-5)
    ran("calibrate", root / "pruned", tmp_path / "statistics", *text)
    ran("report", root / "pruned", "-o", tmp_path / "page.html")
    assert f"{min(counts)} to {max(counts)} of 8" in (tmp_path / "page.html").read_text()


def test_what_changes_it(place, tmp_path):
    root, text, _ = place
    ran("prune", root / "pruned", tmp_path / "sparse", *WANDA, *text)
    ran("pack", tmp_path / "sparse", tmp_path / "packed")
    ran("unpack", tmp_path / "packed", tmp_path / "dense")
    want = logits(tmp_path / "sparse")
    assert torch.equal(logits(tmp_path / "dense"), want)
    assert torch.allclose(logits(tmp_path / "packed"), want, atol=1e-4)
    for mode in ("blockwise", "global"):
        teacher = ("--teacher", root / "dense", "--mode", mode, "--epochs", "1", *text)
        ran("distill", tmp_path / "sparse", "-o", tmp_path / mode, *teacher)
        assert not torch.equal(logits(tmp_path / mode), want)
    for name in ("packed", "dense", "blockwise", "global"):
        assert "verified" in ran("inspect", tmp_path / name, "--verify", "--against", root / "dense")


def test_what_serves_it(place):
    pytest.importorskip("starlette")
    from asgi import ask

    from moesparse.serving.app import Served
    from moesparse.serving.engine import Engine

    model, tokenizer = moesparse.load_pretrained(place[0] / "pruned")
    want = evaluate.generate(model, tokenizer, ["the quick brown"], max_new_tokens=6)
    engine = Engine(model, tokenizer, rows=2)
    served = Served("pruned", engine, tokenizer, vocabulary=320, context=64)
    status, text = ask(served, "/v1/completions", prompt="the quick brown", max_tokens=6, temperature=0)
    assert engine.close(30) and status == 200
    assert json.loads(text)["choices"][0]["text"] == want[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", "0.3"), "same number of experts in every layer for some to be removed"),
        (("--target-bytes", "0.5"), "same number of experts in every layer for some to be removed"),
    ],
)
def test_experts_are_not_removed_from_it_again(options, message, place, tmp_path):
    root, text, _ = place
    result = run("prune", root / "pruned", tmp_path / "out", *options, *text)
    assert isinstance(result.exception, MoESparseError) and message in str(result.exception), result.output
    assert not (tmp_path / "out").exists()


def test_a_plan_of_different_counts(place, tmp_path):
    root, text, _ = place
    plan = root / "pruned" / PLAN_FILE
    result = run("prune", root / "dense", tmp_path / "out", "--plan", plan)
    assert "plan must keep equally many experts in every layer" in str(result.exception)
    ran("prune", root / "dense", tmp_path / "out", "--plan", plan, "--allow-non-uniform", *text)
    assert "verified" in ran("inspect", tmp_path / "out", "--verify", "--against", root / "pruned")
    asked = ("--experts", "0.3", "--budget", "global", "--expert-floor", "3", "--plan", tmp_path / "plan.json")
    ran("calibrate", root / "dense", tmp_path / "statistics", *asked, *text)
    first, second = (json.loads(file.read_text())["layers"] for file in (plan, tmp_path / "plan.json"))
    assert [layer["kept"] for layer in first] == [layer["kept"] for layer in second]
