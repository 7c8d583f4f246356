"""`make gpu DRY=1`: everything that will run on a GPU runs here, tiny and in plain torch. Nothing looks at a time."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import PARTS
from benchmarks.speed import bench_cost, bench_generate
from benchmarks.speed import bench_layer as layer_script
from benchmarks.speed.common import DEVICE_LOST, Session
from moesparse.benchmarking import (
    CONTENDERS,
    SHAPES,
    Ceilings,
    Shape,
    bench_layer,
    contenders_for,
    layer,
    measure,
    time_call,
)
from moesparse.benchmarking.layer import Contender, RoutedCall, make_layer, make_routing
from moesparse_kernels.tuning import GroupedConfig

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e9, matmul=1e12)
TINY = Shape("tiny", 4, 2, 128, 160)
GPT_OSS = Shape("tiny-gpt-oss", 4, 2, 160, 128, activation="gpt_oss", bias=True)


def make(*words, **environment):
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", "BIN=nowhere", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Result folder and output of one whole dry run."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    before = sorted((ROOT / "benchmarks").rglob("*.json"))
    tables = sorted((ROOT / "kernels").rglob("*.json"))
    results = tmp_path_factory.mktemp("results")
    done = make("DRY=1", f"RESULTS={results}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((ROOT / "benchmarks").rglob("*.json")) == before
    assert sorted((ROOT / "kernels").rglob("*.json")) == tables
    return results / "cpu", done.stdout


def rows_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["rows"]


def test_every_part_runs_and_is_named(dry_run):
    _, output = dry_run
    for part in PARTS:
        assert f"== {part}" in output
        assert any(line.split()[0] == part and line.endswith("yes") for line in output.splitlines()[-len(PARTS) :])


def test_the_cost_model_finds_what_made_the_seconds():
    rows = [
        {"shape": shape, "contender": name, "passes": passes, "tokens": tokens, "active": active, "weights": weights}
        for shape, name, passes, tokens, active, weights in [
            ("large", "moe-pruner, none", 2, 300, 90, 2000),
            ("medium", "moe-pruner, rescale", 3, 100, 40, 500),
            ("small", "reap 25%", 1, 100, 10, 300),
            ("small", "moe-pruner, none", 2, 200, 10, 300),
        ]
    ]
    for row in rows:
        row["seconds"] = bench_cost.forecast(row, 3e-4, 2e-3)
    # experts are removed with no work on weights
    assert rows[2]["seconds"] == pytest.approx(3e-4 * 1000)
    rows[0]["seconds"] = rows[2]["seconds"] = 1e6
    found = bench_cost.fitted(rows, ["small", "medium", "large"])
    assert [(row["shape"], row["contender"], row["fitted"]) for row in found] == [
        ("small", "moe-pruner, none", True),
        ("small", "reap 25%", False),
        ("medium", "moe-pruner, rescale", True),
        ("large", "moe-pruner, none", False),
    ]
    assert all((row["a"], row["b"]) == pytest.approx((3e-4, 2e-3)) for row in found)
    assert found[-1]["forecast"] == pytest.approx(3e-4 * 2 * 300 * 90 + 2e-3 * 2000)


def test_a_packed_model_generates_what_the_dense_one_does(dry_run):
    rows = rows_of(dry_run[0], "generate")
    assert [row["contender"] for row in rows[::3]] == ["grouped_mm", "moesparse", "packed"]
    assert min(row["agree"] for row in rows) > 0.8  # nearly equal logits
    dense, packed = rows[0]["weight_bytes"], rows[-1]["weight_bytes"]
    experts = 2 * 8 * 3 * 64 * 64 * 2
    assert dense - packed == experts - experts * 9 // 16


@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_every_layer_row_was_verified(dry_run, part):
    rows = rows_of(dry_run[0], part)
    assert {row["contender"] for row in rows} == {contender.name for contender in contenders_for(CPU)}
    assert {row["shape"] for row in rows} == {"tiny", "tiny-gpt-oss"}
    assert {row["routing"] for row in rows} == {"uniform", "skewed"}
    for row in rows:
        assert row["status"] == "ok", row
        # bf16 results of the right layer: never exact, never past the budget
        assert 0 < row["error"] <= row["error_budget"]
        assert 1e-4 < row["relative_error"] < 1e-2
        assert row["us_20"] <= row["us"] <= row["us_80"]
        # computed again from the sizes
        rows_of_call = row["tokens"] * row["top_k"]
        assert row["dense_flops"] == 6 * rows_of_call * row["hidden"] * row["intermediate"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["touched_experts"] <= min(rows_of_call, row["experts"])
        assert row.keys() >= {"device", "torch", "triton", "commit", "copy_gb_s", "matmul_tflop_s"}
        same_call = [other for other in rows if all(other[k] == row[k] for k in ("shape", "tokens", "routing"))]
        best = min(other["us"] for other in same_call if not other["sparse"])
        assert row["speedup"] == pytest.approx(best / row["us"])


def test_packed_bytes_are_nine_sixteenths(dry_run):
    for row in rows_of(dry_run[0], "decode"):
        weights = 3 * row["hidden"] * row["intermediate"] * row["touched_experts"] * 2
        if row["sparse"]:
            weights = weights * 9 // 16
        bias = 2 * row["touched_experts"] * (2 * row["intermediate"] + row["hidden"])
        bias *= row["shape"] == "tiny-gpt-oss"
        routed = row["tokens"] * row["top_k"] * (8 + 2)
        assert row["bytes"] == weights + bias + 2 * row["tokens"] * row["hidden"] * 2 + routed


def test_every_kernel_row_was_verified(dry_run):
    rows = rows_of(dry_run[0], "kernels")
    ops = {"nm_prune 4:8", "nm_prune 2:4", "nm_prune 2:4 packed", "pack", "unpack", "row_topk 50%"}
    ops |= {"column_energy", "column_energies"}
    assert {row["op"] for row in rows if row["contender"] == "moesparse"} == ops
    assert {row["contender"] for row in rows} >= {"torch topk", "torch sort", "torch index_add_"}
    for row in rows:
        assert row["status"] == "ok", row
        assert (row["error"] == 0) or row["op"].startswith("column_energ") or row["contender"].startswith("torch")
        assert row["us"] > 0 and row["bytes"] > 0


def test_the_launch_table_is_one_the_package_reads(dry_run, monkeypatch):
    from moesparse_kernels import tuning

    (path,) = (dry_run[0] / "configs").glob("*.json")
    table = json.loads(path.read_text())
    assert table.keys() >= {"device", "torch", "triton", "driver", "launch", "backend"}
    monkeypatch.setattr(tuning, "_table", lambda device: table)
    for entry in table["launch"]:
        for rows, wanted in entry["rows"].items():
            found = tuning.grouped_config(
                entry["op"], int(rows), entry["experts"], entry["n"], entry["k"], torch.bfloat16, CPU
            )
            assert vars(found) == {name: value for name, value in wanted.items() if name != "us"}
    assert {entry["op"] for entry in table["launch"]} == {"up_nm", "down_nm", "up_dense", "down_dense"}
    assert tuning.backend_from_table(0.5, 4, 128, 160, torch.bfloat16, CPU) == "unpack"


def test_figures_are_drawn(dry_run):
    for name in ("roofline", "speedup_decode", "speedup_prefill"):
        assert (dry_run[0] / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_second_run_measures_nothing_again(dry_run):
    folder, _ = dry_run
    before = rows_of(folder, "decode")
    done = make("DRY=1", "PART=decode", f"RESULTS={folder.parent}", "SHAPES=tiny", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert rows_of(folder, "decode") == before


def test_nothing_begins_once_the_time_is_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "_SHARED", ())
    with pytest.raises(SystemExit) as end:
        gpu.main(["--dry", "--results", str(tmp_path), "--parts", "decode", "figures", "--limit", "0.3"])
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "stopped after 0 s" in lines
    decode, figures = (line.split(None, 2) for line in lines[-2:])
    assert (decode[0], decode[2]) == ("decode", "NO")
    assert figures == ["figures", "0", "not begun: no time was left"]


def test_what_is_stopped_leaves_no_process_behind(tmp_path):
    # the sanitizer stands between `make gpu` and the tests that it runs
    note = tmp_path / "pid"
    waiting = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {waiting!r}])"
    options = argparse.Namespace(dry=False, until=time.monotonic() + 60)
    assert gpu._python(options, "-c", outer, limit=3) == gpu._STOPPED
    inner = Path(f"/proc/{note.read_text()}/stat")
    deadline = time.monotonic() + 5
    # gone, or dead and waiting for its new parent to notice
    while inner.exists() and inner.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_gpu_tests_are_found_by_their_mark():
    wanted = {"kernels/test_moe_gpu.py", "kernels/test_pruning_gpu.py", "kernels/test_sparse_mma.py"}
    wanted |= {"calibration/test_calibration.py", "packed/test_packed_experts.py"}
    assert {f"tests/{name}" for name in wanted} <= set(gpu.gpu_tests())
    assert "tests/test_text.py" not in gpu.gpu_tests()


def test_without_a_gpu_it_refuses(monkeypatch):
    done = make(CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "make gpu needs a CUDA device" in done.stderr


@pytest.mark.parametrize("shape", [TINY, GPT_OSS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("damage", ["one value", "wrong experts", "gates ignored", "nan", "noise"])
def test_a_wrong_contender_is_seen_and_not_timed(shape, damage):
    layer = make_layer(shape, torch.bfloat16, CPU)
    right = contenders_for(CPU)[0]

    def prepare(call):
        x, index, gates = call.routed
        if damage == "gates ignored":
            call = RoutedCall(call.layer, x, index, torch.ones_like(gates))
        if damage == "wrong experts":
            call = RoutedCall(call.layer, x, index.roll(1, 0), gates)
        out = right.prepare(call)()
        if damage == "one value":
            out[-1, 3] += 0.25 * out.abs().max()
        if damage == "nan":
            out[0, 0] = float("nan")
        if damage == "noise":
            out = out + 0.02 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return lambda: out

    wrong = Contender("wrong", ("cpu",), True, prepare, slack=right.slack)
    (row,) = bench_layer(layer, 5, "uniform", CEILINGS, [wrong], budget=0.001)
    assert row["status"] == "wrong"
    assert "us" not in row


def test_what_cannot_run_is_skipped_or_failed_with_its_reason():
    layer = make_layer(TINY, torch.bfloat16, CPU)

    def broken(call):
        raise RuntimeError("no such kernel")

    triton = next(contender for contender in CONTENDERS if contender.name == "moe_nm triton")
    contenders = [triton, Contender("broken", ("cpu",), True, broken)]
    skipped, failed = bench_layer(layer, 2, "uniform", CEILINGS, contenders, budget=0.001)
    assert skipped["status"] == "skipped" and "cpu tensors" in skipped["reason"]
    assert failed["status"] == "failed" and failed["reason"] == "RuntimeError: no such kernel"


def test_a_contender_that_loses_the_device_stops_its_process_and_is_left_out_of_the_next(tmp_path, monkeypatch):
    right, gone = contenders_for(CPU)[0], []
    monkeypatch.setattr(layer, "device_is_lost", lambda: bool(gone))

    def prepare(call):
        gone.append(call)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    contenders = [right, Contender("breaks", ("cpu",), True, prepare), replace(right, name="dense", sparse=False)]
    monkeypatch.setattr(layer_script, "contenders_for", lambda device: contenders)
    session = Session(CPU, True, [TINY], CEILINGS, {"commit": "this"}, tmp_path, again=False, budget=0.001)
    with pytest.raises(SystemExit) as end:
        layer_script.run(session, "decode")
    assert end.value.code == DEVICE_LOST
    assert [row["status"] for row in rows_of(tmp_path, "decode")] == ["ok", "lost"]

    gone.clear()  # the next process has the device back
    assert not layer_script.run(session, "decode")
    rows = rows_of(tmp_path, "decode")
    assert gone == [] and len(rows) == 3 * 4
    for row in rows:
        assert row["status"] == ("lost" if row["contender"] == "breaks" else "ok")
        assert row["status"] == "ok" or "illegal memory access" in row["reason"]


def test_a_device_is_lost_when_it_answers_no_more(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not layer.device_is_lost()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert layer.device_is_lost()


def test_a_part_whose_device_is_lost_goes_on_in_a_new_process(monkeypatch):
    codes, commands = [DEVICE_LOST, DEVICE_LOST, 0], []
    monkeypatch.setattr(gpu, "_python", lambda options, *words, limit: commands.append(words) or codes.pop(0))
    options = argparse.Namespace(shapes=None, results=None, dry=False, again=True)
    assert PARTS["decode"](options)
    assert ["--again" in words for words in commands] == [True, False, False]


def test_a_capture_that_fails_is_closed(monkeypatch):
    # torch itself leaves its stream current and its pool open, and then nothing can be captured any more
    stream, ended = SimpleNamespace(device_index=3, wait_stream=lambda other: None), []

    @contextlib.contextmanager
    def graph(made, pool):
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "current_stream": lambda: stream,
        "Stream": lambda: stream,
        "stream": lambda chosen: contextlib.nullcontext(),
        "CUDAGraph": object,
        "graph_pool_handle": lambda: (0, 7),
        "graph": graph,
        "set_stream": lambda chosen: ended.append(chosen),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *where: ended.append(where), raising=False)
    assert measure._capture(lambda: None) is None
    assert ended == [stream, (3, (0, 7)), (3, (0, 7))]


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_spoils_no_later_one():
    x, device = torch.ones(1024, device="cuda"), torch.device("cuda", 0)
    assert not time_call(lambda: x.sum().item(), device).graph
    assert time_call(lambda: x.sum(), device).graph
    torch.cuda.empty_cache()


def test_what_does_not_fit_into_memory_is_left_out_of_generation(tmp_path, monkeypatch, capsys):
    def generate(model, prompts, new):
        if len(prompts) > 1 and model.get_experts_implementation() == {"": "grouped_mm"}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB\nmore")
        return torch.zeros(len(prompts), new), 1.0

    monkeypatch.setattr(bench_generate, "generate", generate)
    monkeypatch.setattr(bench_generate, "BATCHES", (1, 2))
    monkeypatch.setattr(sys, "argv", ["bench_generate", "--dry", "--results", str(tmp_path)])
    bench_generate.main()
    measured = [(row["contender"], row["tokens"]) for row in rows_of(tmp_path / "cpu", "generate")]
    assert measured == [("grouped_mm", 1), ("moesparse", 1), ("moesparse", 2), ("packed", 1), ("packed", 2)]
    assert "| grouped_mm | 2 | CUDA out of memory. Tried to allocate 64 GiB |" in capsys.readouterr().out


def test_routing_laws():
    uniform, skewed = (make_routing(64, 8, 4000, law) for law in ("uniform", "skewed"))
    for index in (uniform, skewed):
        assert all(len(set(row)) == 8 for row in index[:50].tolist())
    loads = [index.flatten().bincount(minlength=64).double() for index in (uniform, skewed)]
    assert loads[0].max() < 1.2 * loads[0].mean()
    assert loads[1].max() > 4 * loads[1].mean()
    assert torch.equal(skewed, make_routing(64, 8, 4000, "skewed"))


def test_descent_finds_the_best_field_values():
    from benchmarks.speed.tune import backend_bounds, descend

    def seconds(config):
        if config.num_stages == 4:
            return float("inf")
        return abs(config.split_k - 4) + abs(config.num_stages - 3) + 1.0

    first = GroupedConfig(16, num_stages=2)
    best, least = descend(first, {"num_stages": (2, 3, 4), "split_k": (1, 2, 4, 8)}, seconds)
    assert (best.num_stages, best.split_k, least) == (3, 4, 1.0)
    assert backend_bounds([(1, "triton"), (4, "triton"), (16, "unpack")]) == {"8": "triton", "inf": "unpack"}


def test_time_call_counts_its_calls():
    calls = []
    timing = time_call(lambda: calls.append(1), CPU, budget=0.0)
    assert timing.repeats == 5 and len(calls) == 6
    assert timing.low <= timing.median <= timing.high and not timing.graph


def test_floor_is_the_larger_bound():
    assert CEILINGS.floor(moved=2e9, flops=1e12) == 2.0
    assert CEILINGS.floor(moved=1e9, flops=3e12) == 3.0


def test_the_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("MOESPARSE_COMMIT", "abc")
    measure._commit.cache_clear()
    try:
        assert measure.environment(CPU)["commit"] == "abc"
    finally:
        measure._commit.cache_clear()


def test_every_shape_names_its_source():
    for shape in SHAPES.values():
        assert "/" in shape.source
        assert shape.hidden % 64 == 0 and shape.intermediate % 64 == 0
