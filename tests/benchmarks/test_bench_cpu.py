"""The table of the expert layer on a CPU, and one measured row of it."""

import json

import pytest

from benchmarks.speed import bench_cpu
from moesparse_kernels.native_library import library

TIMES = {
    "packed": 2000.0,
    "dense native": 3000.0,
    "transformers eager": 9000.0,
    "transformers grouped_mm": 8000.0,
    "eager, oneDNN off": 5000.0,
}


def rows(tokens: int, scale: float = 1.0, **more):
    same = {"shape": "S", "threads": 1, "routing": "uniform", "tokens": tokens} | more
    return [same | {"contender": name, "best_us": time * scale} for name, time in TIMES.items()]


def test_the_table_names_the_fastest_dense_layer_of_each_kind():
    held = [*rows(1), *rows(4, 10), *rows(1, 100, routing="skewed"), *rows(1, threads=2)[:2]]
    lines = bench_cpu.table(held).splitlines()
    assert lines[0].startswith("| a whole layer, 1 / 4 tokens | threads |")
    assert lines[2] == "| S | 1 | 2.00 / 20.0 | 4.00 / 4.00 | 2.50 / 2.50 | 1.50 / 1.50 |"
    # not measured is no number
    assert lines[3] == "| S | 2 | 2.00 / - | - / - | - / - | 1.50 / - |"


@pytest.mark.skipif(library() is None, reason="no compiled CPU kernels here")
def test_rows_say_how_many_threads_they_had(tmp_path, capsys):
    asked = ["--shapes", "Qwen3-30B-A3B", "--tokens", "1", "--threads", "1", "--seconds", "0", "--memory", "0.2"]
    bench_cpu.main([*asked, "--contenders", "packed", "transformers eager", "--results", str(tmp_path)])
    held = json.loads((tmp_path / "cpu" / "bench_cpu.json").read_text())["rows"]
    assert [(row["contender"], row["threads"], row["turns"]) for row in held] == [
        ("packed", 1, 3),
        ("transformers eager", 1, 3),
        ("read", 1, 3),
    ]
    bench_cpu.main(["--table", "--results", str(tmp_path)])
    assert "| Qwen3-30B-A3B (10 experts) | 1 |" in capsys.readouterr().out
