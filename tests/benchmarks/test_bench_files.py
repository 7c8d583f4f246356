"""The benchmarks of whole files make what they say, and see a result that is wrong; nothing here looks at a time."""

import json

import pytest

from benchmarks.speed import bench_gguf, bench_removal
from benchmarks.speed.files import copy_runs, joined, watched
from moesparse import Recipe, prune_checkpoint
from moesparse.experts.plan_file import ExpertPlan
from moesparse.pruning.gguf import prune_gguf

MEMORY = {"seconds": 2.0, "cpu_seconds": 1.0, "resident": 3, "anonymous": 2, "mapped": 1}


def shrink(monkeypatch):
    for name, value in (("H", 64), ("I", 32), ("E", 8), ("TOP", 2)):
        monkeypatch.setattr(bench_gguf, name, value)


def test_bytes_are_copied_in_runs(tmp_path):
    data = bytes(range(200))
    (tmp_path / "a").write_bytes(data)
    runs = [(tmp_path / "a", 50, 60), (tmp_path / "a", 0, 20), (tmp_path / "a", 20, 50), (tmp_path / "a", 90, 200)]
    assert joined(runs) == [(tmp_path / "a", 0, 60), (tmp_path / "a", 90, 200)]
    copy_runs(runs, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data[:60] + data[90:]


def test_what_a_command_takes_is_seen():
    found = watched(["python3", "-c", "x = bytearray(200_000_000); import time; time.sleep(0.3)"])
    assert found["anonymous"] > 200e6 and found["resident"] >= found["anonymous"]
    assert found["seconds"] > 0.3
    with pytest.raises(RuntimeError, match=r"(?s)failed: .*ZeroDivisionError"):
        watched(["python3", "-c", "1 / 0"])


@pytest.mark.parametrize("module", [bench_removal, bench_gguf], ids=["safetensors", "gguf"])
def test_a_small_one_is_made_cut_and_compared(module, tmp_path, monkeypatch, capsys):
    def in_process(source, out, file):
        plan = ExpertPlan.load(file)
        if module is bench_gguf:
            prune_gguf(source, out, plan)
        else:
            prune_checkpoint(source, out, None, Recipe(weights=None, update="none", plan=plan))
        return dict(MEMORY)

    monkeypatch.setattr(module, "pruned", in_process)
    if module is bench_gguf:
        shrink(monkeypatch)
    else:
        monkeypatch.setattr(module, "SIZES", module.SIZES | module.TINY)
    file = tmp_path / "result.json"
    module.main(["--gigabytes", "0.0000001", "--work", str(tmp_path), "-o", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["layers"], row["removal_seconds"], len(row["copy_seconds"])) == (2, [2.0, 2.0], 3)
    # three quarters of the experts and all else: the routers' rows aside what is copied is what is there, and headers
    assert row["copied"] <= row["bytes_before"] and row["bytes_after"] < row["bytes_before"]
    assert row["bytes_after"] == pytest.approx(row["copied"], rel=0.2)
    assert "removals 2, 2 s" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_byte_that_differs_is_seen(tmp_path, monkeypatch):
    shrink(monkeypatch)
    bench_gguf.make_file(tmp_path / "all.gguf", 1)
    plan = bench_gguf.make_plan(tmp_path / "all.gguf", tmp_path / "plan.json")
    prune_gguf(tmp_path / "all.gguf", tmp_path / "cut.gguf", plan)
    bench_gguf.check(tmp_path / "all.gguf", tmp_path / "cut.gguf", plan)
    with (tmp_path / "cut.gguf").open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)
        file.seek(-100, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(AssertionError):
        bench_gguf.check(tmp_path / "all.gguf", tmp_path / "cut.gguf", plan)
