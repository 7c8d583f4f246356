"""The whole way on the embedded model: text in, calibrated, pruned, saved, reloaded by plain transformers, measured."""

import contextlib
import io
import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesparse
from moesparse import demo
from moesparse.cli import main


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """`moesparse demo --json`, few held-out windows."""
    folder = tmp_path_factory.mktemp("demo") / "best"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["moesparse", "demo", "--json", "--windows", "6", "--output", str(folder)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code in (0, None)
    return json.loads(printed.getvalue())


def test_the_demo_orders_the_methods_as_they_are(table):
    dense = table["dense"]["perplexity"]
    found = {(row["saliency"], row["update"]): row["perplexity"] for row in table["methods"]}
    assert dense < min(found.values())
    assert found["magnitude", "none"] > found["wanda", "none"]
    assert found["moe-pruner", "none"] == pytest.approx(found["wanda", "none"], rel=0.02)
    assert found["moe-pruner", "rescale"] < found["moe-pruner", "none"]
    # least squares takes most of the way back to dense, and a better mask more
    gap = found["moe-pruner", "none"] - dense
    assert found["moe-pruner", "least-squares"] < dense + 0.5 * gap
    best = min(table["methods"], key=lambda row: row["perplexity"])
    assert (best["saliency"], best["update"]) == ("gated-admm", "asymmetric+tune")


def test_the_means_are_those_of_the_domains(table):
    for row in (table["dense"], *table["methods"]):
        assert set(row["domains"]) == set(demo.DOMAINS)
        mean = math.exp(sum(map(math.log, row["domains"].values())) / len(row["domains"]))
        assert row["perplexity"] == pytest.approx(mean)


def test_plain_transformers_gives_the_bits_that_were_in_memory(table, tmp_path):
    windows = demo.windows("heldout", "novel")[:2]
    model, tokenizer = demo.load()
    report = moesparse.prune(model, demo.windows("calibration")[::8], moesparse.Recipe(weights="2:4"))
    moesparse.save_pretrained(model, tmp_path / "out", tokenizer=tokenizer, recipe=report.recipe)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(windows).logits, model(windows).logits)
    text = demo.text("heldout", "novel")[:500]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_demo_saved_the_best_one(table):
    model, _ = moesparse.load_pretrained(table["output"])
    best = min(table["methods"], key=lambda row: row["perplexity"])
    assert model.config.moesparse["recipe"]["saliency"] == best["saliency"]
    scripture = moesparse.evaluate.perplexity(model, demo.windows("heldout", "scripture")[:6]).perplexity
    assert scripture == pytest.approx(best["domains"]["scripture"], rel=1e-5)
