"""Measured rows of the expert layer on a CPU: what they say of themselves, and that a run goes on where it stopped."""

import json

import pytest

from benchmarks.speed import bench_cpu, bench_unpack, cpu_tables
from moesparse.benchmarking import Shape
from moesparse_kernels.native_library import library


@pytest.mark.skipif(library() is None, reason="no compiled CPU kernels here")
def test_rows_say_how_many_threads_they_had(tmp_path):
    asked = ["--shapes", "Qwen3-30B-A3B", "--tokens", "1", "--threads", "1", "--seconds", "0", "--memory", "0.29"]
    asked += ["--routing", "uniform"]
    bench_cpu.main([*asked, "--contenders", "packed", "transformers eager", "--results", str(tmp_path)])
    held = json.loads((tmp_path / "cpu" / "bench_cpu.json").read_text())["rows"]
    assert [(row["contender"], row["threads"], row["turns"]) for row in held] == [
        ("packed", 1, 3),
        ("transformers eager", 1, 3),
        ("read", 1, 3),
    ]
    assert len({row["run"] for row in held}) == 1
    assert cpu_tables.layers(tmp_path).splitlines()[2].startswith("| Qwen3-30B-A3B (10 experts) | 1 | uniform |")


@pytest.mark.skipif(library() is None, reason="no compiled CPU kernels here")
def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    # one commit, also in a tree that is being changed
    monkeypatch.setattr(bench_cpu, "environment", lambda device: {"commit": "abc1234", "threads": 8})
    monkeypatch.setattr(bench_cpu, "SHAPES", {"Qwen3-30B-A3B": Shape("tiny", 4, 2, 64, 32)})
    monkeypatch.setattr(bench_cpu, "show", lambda rows: None)
    calls = []

    def stub(layer, tokens, law, threads, seconds, wanted, native):
        calls.append((tokens, law, threads))
        same = {"shape": layer.shape.name, "tokens": tokens, "routing": law, "threads": threads}
        return [same | {"contender": name} for name in (*wanted, "read")]

    monkeypatch.setattr(bench_cpu, "measure", stub)
    asked = ["--shapes", "Qwen3-30B-A3B", "--contenders", "packed", "--tokens", "1", "--results", str(tmp_path)]

    def measured(*more):
        calls.clear()
        bench_cpu.main([*asked, *more])
        return calls

    assert measured("--threads", "1", "--routing", "uniform") == [(1, "uniform", 1)]
    # another number of threads is another row of the same file, whatever the process has
    assert measured("--threads", "1", "2", "--routing", "uniform") == [(1, "uniform", 2)]
    assert measured("--threads", "1", "2", "--routing", "uniform", "skewed") == [(1, "skewed", 1), (1, "skewed", 2)]
    assert measured("--threads", "1", "2") == []
    assert measured("--threads", "2", "--routing", "skewed", "--again") == [(1, "skewed", 2)]
    held = json.loads((tmp_path / "cpu" / "bench_cpu.json").read_text())["rows"]
    assert len(held) == 8 and {row["threads"] for row in held} == {1, 2}


@pytest.mark.skipif(library() is None, reason="no compiled CPU kernels here")
def test_a_path_that_is_not_the_best_has_a_file_of_its_own(tmp_path):
    native = library()
    asked = ["--shapes", "Qwen3-30B-A3B", "--tokens", "1", "--threads", "1", "--seconds", "0", "--memory", "0.29"]
    asked += ["--routing", "uniform", "--contenders", "packed", "--results", str(tmp_path)]
    native.force_path(native.paths[-1])
    try:
        bench_cpu.main(asked)
    finally:
        native.force_path(None)
    expected = "bench_cpu" if len(native.paths) == 1 else f"bench_cpu_{native.paths[-1]}"
    assert [file.stem for file in tmp_path.rglob("*.json")] == [expected]


@pytest.mark.skipif(library() is None, reason="no compiled CPU kernels here")
def test_unpacking_is_timed_in_both_ways(tmp_path):
    bench_unpack.main(["--size", "8", "64", "--seconds", "0", "--threads", "1", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "cpu/unpack.json").read_text())["rows"]
    assert {(row["dtype"], row["op"], row["contender"]) for row in rows} == {
        (dtype, pattern, way)
        for dtype, pattern in (("bfloat16", "2:4"), ("bfloat16", "4:8"), ("float32", "2:4"))
        for way in ("native", "torch")
    }
    assert all(0 < row["best_us"] < 1e6 and row["turns"] >= 5 for row in rows)
