"""`moesparse prune --values`: what it does by itself and beside a pattern, and what it says."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from moesparse.cli import app, main
from moesparse.testing import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, standard output, standard error) of `moesparse prune`."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["moesparse", "prune", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def test_alone_it_leaves_all_weights(source, tmp_path, call):
    code, out, err = call(source, tmp_path / "out", "--values", "int4:32", "--value-rule", "rtn", "--json")
    assert code == 0, err
    found = json.loads(out)
    recipe = found["recipe"]
    assert (recipe["weights"], recipe["values"], recipe["value_rule"]) == (None, "int4:32", "rtn")
    assert found["bits"] == 4.5
    assert found["calibration"]["tokens"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stored as codes and scales" in card and "fake-quantised" not in card
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert "rounded to int4:32 by rtn" in " ".join(inspected.split())


def test_beside_a_pattern(source, tmp_path, call):
    given = (
        "--weights",
        "2:4",
        "--saliency",
        "magnitude",
        "--update",
        "none",
        "--values",
        "int8",
        "--value-rule",
        "rtn",
    )
    code, _, err = call(source, tmp_path / "out", *given)
    said = " ".join(err.split())
    assert code == 0
    assert "values int8 by rtn: 5.389 bits a weight in that format. Its experts are stored as codes and scales" in said
    assert "magnitude + none at 2:4, int8 by rtn" in said


def test_the_plan_names_it(source, tmp_path, call):
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 400)
    code, out, err = call(source, tmp_path / "out", "--values", "fp8", "--calibration", text, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["values"], plan["value_rule"], plan["saliency"]) == ("fp8", "gated-gptq", None)
    assert plan["moments"] > 0
    fake = ("--values", "fp8", "--fake-quantised", "--calibration", text, "--dry-run")
    shown = call(source, tmp_path / "out", *fake)[1]
    assert "fake-quantised: files no smaller" in shown and "fp8 by gated-gptq" in shown


def test_a_whole_model_has_no_codes(source, tmp_path, call):
    code, _, err = call(source, tmp_path / "out", "--values", "int8", "--value-rule", "rtn", "--whole")
    said = " ".join(err.split())
    assert code and "--fake-quantised must come with --values where the whole model is loaded (--whole)" in said
    given = ("--values", "int8", "--value-rule", "rtn", "--whole", "--fake-quantised")
    code, _, err = call(source, tmp_path / "out", *given)
    assert code == 0 and "Its values are fake-quantised" in " ".join(err.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--values", "int4"), "--values must be bf16, fp8"),
        (("--value-rule", "rtn"), "--value-rule must come with --values, got 'rtn' alone"),
        (("--values", "int8", "--value-rule", "awq"), "--value-rule must be one of rtn, rtn-mse, gptq, gated-gptq"),
        (("--values", "int8", "--target-bytes", "0.4"), "--values must be left out with --target-bytes"),
        (("--values", "int4:64", "--value-rule", "rtn"), "in_features must be a multiple of 64 for values int4:64"),
    ],
)
def test_what_cannot_be_is_refused(source, tmp_path, call, given, said):
    code, _, err = call(source, tmp_path / "out", *given)
    assert code == 2
    assert said in " ".join(err.split())
    assert not (tmp_path / "out").exists()
