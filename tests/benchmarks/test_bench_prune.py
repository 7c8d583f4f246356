"""benchmarks/speed/bench_prune.py runs, verifies and prints what a machine can read; nothing here looks at a time."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from moesparse.weights.patterns import Pattern, mask_from_score

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed" / "bench_prune.py"


@pytest.fixture(scope="module")
def bench():
    return runpy.run_path(str(SCRIPT))


def test_quick_prints_one_object_with_every_rule(bench, capsys):
    bench["main"](["--quick", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert all(row.keys() >= {"cpu", "threads", "torch", "commit"} for row in result["rows"])
    rules = {(row["step"], row["rule"]) for row in result["rows"]}
    assert rules >= {("mask", "gated-admm"), ("mask", "magnitude"), ("weights", "obs"), ("weights", "least-squares")}
    assert rules >= {("values int4:64", "rtn-mse"), ("values int4:64", "gated-gptq")}
    assert all(row["seconds"] > 0 for row in result["rows"])


def test_a_result_file_keeps_the_rows_of_earlier_runs(bench, tmp_path):
    for rule in ("wanda", "magnitude", "wanda"):
        arguments = [
            "--shapes",
            "tiny",
            "--patterns",
            "2:4",
            "--masks",
            rule,
            "--updates",
            "none",
            "--values",
            "--repeats",
            "1",
        ]
        bench["main"]([*arguments, "--out", str(tmp_path)])
    (file,) = tmp_path.rglob("bench_prune.json")
    rules = [row["rule"] for row in json.loads(file.read_text())["rows"]]
    assert rules == ["sort (baseline)", "selection", "wanda", "none", "magnitude"]


def test_the_baseline_is_the_same_mask(bench):
    score = torch.rand(3, 5, 32, generator=torch.Generator().manual_seed(0)).mul_(4).round_()
    for pattern in (Pattern(n=2, m=4), Pattern(ratio=0.3)):
        assert torch.equal(bench["sorted_mask"](score, pattern), mask_from_score(score, pattern))
