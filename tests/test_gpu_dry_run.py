"""`make gpu DRY=1`: everything that will run on a GPU runs here, tiny and in plain torch. Nothing looks at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_cost
from benchmarks.gpu import PARTS
from moesparse.benchmarking import SHAPES, Ceilings, Shape, bench_layer, contenders_for, measure, time_call
from moesparse.benchmarking.layer import Contender, RoutedCall, make_layer, make_routing
from moesparse_kernels.tuning import GroupedConfig

ROOT = Path(__file__).resolve().parents[1]
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
    assert [row["contender"] for row in rows[::3]] == ["grouped_mm", "batched_mm", "packed"]
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
    ops = {"nm_prune 4:8", "nm_prune 2:4", "nm_prune 2:4 packed", "pack", "unpack", "row_topk 50%", "column_energy"}
    assert {row["op"] for row in rows if row["contender"] == "moesparse"} == ops
    assert {row["contender"] for row in rows} >= {"torch topk", "torch sort", "torch index_add_"}
    for row in rows:
        assert row["status"] == "ok", row
        assert (row["error"] == 0) or row["op"] == "column_energy" or row["contender"].startswith("torch")
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

    from moesparse.benchmarking.layer import CONTENDERS

    triton = next(contender for contender in CONTENDERS if contender.name == "moe_nm triton")
    contenders = [triton, Contender("broken", ("cpu",), True, broken)]
    skipped, failed = bench_layer(layer, 2, "uniform", CEILINGS, contenders, budget=0.001)
    assert skipped["status"] == "skipped" and "cpu tensors" in skipped["reason"]
    assert failed["status"] == "failed" and failed["reason"] == "RuntimeError: no such kernel"


def test_routing_laws():
    uniform, skewed = (make_routing(64, 8, 4000, law) for law in ("uniform", "skewed"))
    for index in (uniform, skewed):
        assert all(len(set(row)) == 8 for row in index[:50].tolist())
    loads = [index.flatten().bincount(minlength=64).double() for index in (uniform, skewed)]
    assert loads[0].max() < 1.2 * loads[0].mean()
    assert loads[1].max() > 4 * loads[1].mean()
    assert torch.equal(skewed, make_routing(64, 8, 4000, "skewed"))


def test_descent_finds_the_best_field_values():
    from benchmarks.tune import backend_bounds, descend

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
