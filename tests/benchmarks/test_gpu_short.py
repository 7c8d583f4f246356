"""`make gpu-short`: the steps of a short lease run here in plain torch, tiny, and take up where they were cut off."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, kept_tests, kernel_cache
from benchmarks.results import ResultFile
from benchmarks.speed import short
from benchmarks.speed.common import DEVICE_LOST
from moesparse.benchmarking import CONTENDERS, SHAPES, Shape
from moesparse_kernels.tuning import GroupedConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["ceilings", "layers", "launch", "sparse_mma", "profile"]


def rows_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["rows"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the steps leave, in a dry run without the pruning kernels, which `make gpu DRY=1` runs."""
    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short, "use_carried", lambda: False)
        short.main([*STEPS, "--dry", "--results", str(folder)])
    return folder / "cpu"


def test_every_step_leaves_its_rows(results):
    assert {path.name for path in results.iterdir()} == {
        f"{name}.json" for name in ("ceilings", "decode", "prefill", "launch", "sparse_mma")
    }
    for part, tokens in (("decode", {1, 5}), ("prefill", {40})):
        rows = rows_of(results, part)
        assert {row["tokens"] for row in rows} == tokens and {row["routing"] for row in rows} == {"uniform"}
        assert {row["status"] for row in rows} == {"ok"}
        contenders = {row["contender"] for row in rows}
        assert "moe_nm" in contenders and not contenders & short._LEFT_OUT[part]
    launched = rows_of(results, "launch")
    gaps = [row for row in launched if row["part"] == "gap"]
    assert [row["contender"] for row in gaps] == ["one after the other", "started early"]
    tried = [row for row in launched if row["part"] == "launch"]
    assert {row["op"] for row in tried} == {"up_nm", "down_nm"}
    for op in ("up_nm", "down_nm"):
        found = {row["contender"]: row for row in tried if row["op"] == op}
        assert {"as it is", "num_stages=2"} <= found.keys() and all(row["us"] > 0 for row in found.values())
        assert found["num_stages=2"]["num_stages"] == 2
    (profiled,) = [row for row in launched if row["part"] == "profile"]
    assert profiled["status"] == "skipped" and "ncu" in profiled["reason"]


def test_a_second_session_measures_nothing_again(results, monkeypatch):
    monkeypatch.setattr(short, "use_carried", lambda: False)
    before = {path.name: path.read_text() for path in results.iterdir()}
    short.main(["layers", "launch", "sparse_mma", "--dry", "--results", str(results.parent)])
    assert {path.name: path.read_text() for path in results.iterdir()} == before


def test_a_step_that_lost_the_device_is_not_repeated(results, tmp_path, monkeypatch, capsys):
    ran, session = [], SimpleNamespace(again=False, file=lambda name: ResultFile(tmp_path / name, {"commit": "this"}))
    monkeypatch.setattr(short, "STEPS", {name: lambda _, name=name: ran.append(name) or True for name in "ab"})
    monkeypatch.setattr(short, "device_is_lost", lambda: ran == ["a"])
    with pytest.raises(SystemExit) as end:
        short.run(session, "ab")
    assert end.value.code == DEVICE_LOST and ran == ["a"]
    assert not short.run(session, "ab")
    assert ran == ["a", "b"] and "a: it lost the device and is left out" in capsys.readouterr().out


def test_one_field_at_a_time_is_changed():
    first = GroupedConfig(16, group_m=8, num_stages=3)
    assert {name: vars(config) for name, config in short.variants(first).items()} == {
        "as it is": vars(first),
        "group_m=1": vars(first) | {"group_m": 1},
        "num_stages=2": vars(first) | {"num_stages": 2},
    }


def test_who_is_left_out_exists():
    names = {contender.name for contender in CONTENDERS}
    assert set.union(*short._LEFT_OUT.values()) <= names and set(short.NAMES) <= SHAPES.keys()
    many, few = (short._contenders("prefill", torch.device("cuda"), SHAPES[name]) for name in short.NAMES[:2])
    assert {one.name for one in few} - {one.name for one in many} == {"moe_nm semi_structured"}


# form of `ncu --csv --metrics`: one line for a metric of a launch, notes before them
PROFILE = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","_grouped_nm_kernel(x)","gpu__time_duration.sum","ns","1,234"
"0","1","_grouped_nm_kernel(x)","smsp__issue_active.avg.pct_of_peak_sustained_active","%","41.5"
"0","1","_grouped_nm_kernel(x)","another","","7"
"1","1","_grouped_nm_kernel(x)","gpu__time_duration.sum","ns","n/a"
"""


def test_the_profiler_is_read():
    first, second = short.read_profile(PROFILE)
    assert first == {"kernel": "_grouped_nm_kernel", "ns": 1234.0, "issue_percent": 41.5}
    assert second == {"kernel": "_grouped_nm_kernel", "ns": None}
    assert short.read_profile("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_what_has_passed_is_left_out(tmp_path):
    file = ResultFile(tmp_path / "tests.json", {"commit": "this"})
    config = SimpleNamespace(stash={kept_tests._FILE: file}, hook=SimpleNamespace(pytest_deselected=lambda items: None))
    items = [SimpleNamespace(nodeid=name) for name in ("passed", "failed", "skipped", "new")]
    kept_tests._KEPT[:] = [file]
    try:
        for when, outcome, reason in (
            ("setup", "passed", None),
            ("call", "passed", None),
            ("call", "failed", "E  wrong"),
            ("setup", "skipped", ("file", 1, "needs a CUDA device")),
        ):
            report = SimpleNamespace(when=when, outcome=outcome, passed=outcome == "passed", duration=0.25)
            report.nodeid, report.longrepr = outcome, reason
            kept_tests.pytest_runtest_logreport(report)
    finally:
        kept_tests._KEPT.clear()
    assert [(row["contender"], row["status"], row.get("reason")) for row in file.rows] == [
        ("passed", "ok", None),
        ("failed", "failed", "E  wrong"),
        ("skipped", "skipped", "needs a CUDA device"),
    ]
    kept_tests.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == ["failed", "skipped", "new"]
    other = ResultFile(tmp_path / "tests.json", {"commit": "another"})
    assert not other.passed(part="tests", contender="passed")


def test_the_measurements_leave_time_for_the_profiler(monkeypatch):
    limits = []
    monkeypatch.setattr(gpu, "_python", lambda options, *words, limit: limits.append(limit) or 0)
    options = argparse.Namespace(shapes=None, results=None, dry=False, again=False, until=time.monotonic() + 100)
    assert gpu.SHORT["measure"](options)
    assert 100 - gpu._PROFILE_SECONDS - 1 < limits[0] <= 100 - gpu._PROFILE_SECONDS


def test_the_tests_of_operands_are_found():
    assert "tests/kernels/test_sparse_mma.py" in gpu._operand_tests()
    for name in gpu._kernel_tests():
        assert name in gpu.gpu_tests()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_keeps_eight_files_and_takes_up_earlier_ones(tmp_path, results):
    out = tmp_path / "out"
    words = ("DRY=1", "PART=operands profile", f"RESULTS={out}", f"FROM={results.parent}")
    command = ["make", "--no-print-directory", "gpu-short", f"PYTHON={sys.executable}", "BIN=nowhere", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "short.log").read_text() in done.stdout
    assert {row["status"] for row in rows_of(out / "cpu", "tests")} == {"skipped"}
    # what another folder held, and what was run now
    assert rows_of(out / "cpu", "decode") == rows_of(results, "decode")
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert len(files | {Path("cpu/kernels.json")}) == 8


def test_kernels_are_compiled_for_a_card_that_is_not_there(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    compiled = []
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda self, *_, grid, warmup, **how: compiled.append((self.__name__, warmup, how))
    )
    shape = Shape("small", 8, 2, 256, 256)
    with kernel_cache.compiling(90, 132) as launched:
        kernel_cache.calls(shape, 3)
        kernel_cache._weight_calls(shape)
    names = {name for name, _, _ in compiled}
    assert names == set(launched)
    assert names >= {"_grouped_nm_kernel", "_grouped_dense_kernel", "_combine_kernel", "_unpack_kernel"}
    assert all(warmup for _, warmup, _ in compiled)
    # launch sizes are those of the card that is not there
    assert any(name == "_grouped_nm_kernel" and how["STAGES"] == 3 for name, _, how in compiled)


def test_a_carried_cache_is_used_where_there_is_one(tmp_path, monkeypatch):
    cache = pytest.importorskip("triton.runtime.cache")
    monkeypatch.setattr(cache, "triton_key", cache.triton_key)
    monkeypatch.setenv("TRITON_CACHE_DIR", "unused")
    assert not kernel_cache.use_carried(tmp_path / "none") and os.environ["TRITON_CACHE_DIR"] == "unused"
    assert kernel_cache.use_carried(tmp_path) and os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    assert cache.triton_key().startswith("moesparse-carried-")
