"""The measurements of a short lease of a card, in one process: one import, one layer at a time, the most telling first.

    make gpu-short                                          # with the tests, within a limit
    python -m benchmarks.speed.short layers launch          # some steps
    python -m benchmarks.speed.short layers --dry --results out/dry

    ceilings    copy and matmul, and what a node of a CUDA graph costs: kernels that do nothing
    kernels     OLMoE's pruning, packing and unpacking, bit for bit, then timed
    layers      three shapes, uniform routing: decode at batch 1 to 256, prefill at 1k, 4k and 8k
    launch      Mixtral at batch 64 and 256 with other launch sizes than are taken: one field at a time
    sparse_mma  what the sparse tensor cores reach on one expert of OLMoE
    profile     two launches under Nsight Compute, where `ncu` is on the PATH
    call        the layer twice, and nothing else: what `profile` profiles

Rows are on the disk as they come, in the files of the parts of `make gpu`; those of gaps, launch sizes and profiles are
in launch.json. What this commit has measured is not measured again, and a step that lost the device is not repeated.
"""

from __future__ import annotations

import csv
import functools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.kernel_cache import use_carried
from benchmarks.speed import bench_kernels, bench_layer, bench_sparse_mma
from benchmarks.speed.common import DEVICE_LOST, Session, end_with, parser, start
from benchmarks.speed.shapes import DRY_SHAPES, SHAPES
from benchmarks.speed.tune import problems, seconds_of
from moesparse.benchmarking import Shape, contenders_for, time_call
from moesparse.benchmarking.layer import Contender, ExpertLayer, RoutedCall, device_is_lost, make_layer
from moesparse_kernels import moe_nm
from moesparse_kernels.tuning import GroupedConfig, grouped_config

__all__ = ["DECODE", "NAMES", "PREFILL", "main", "read_profile", "variants"]

NAMES = ("OLMoE-1B-7B", "Mixtral-8x7B", "Qwen3-30B-A3B")
DECODE, PREFILL = (1, 8, 32, 64, 128, 256), (1024, 4096, 8192)
# who would not win there, or takes minutes: a library call for each expert, the dense layer written at every call, the
# experts of every token copied
_LEFT_OUT = {
    "decode": {"moe_nm semi_structured", "moe_nm unpack"},
    "prefill": {"transformers batched_mm"},
}
_MOST_LIBRARY_CALLS = 16
# the launch that fills the device, and the one in which launching is most of the time
_PROFILED = (("Mixtral-8x7B", 32), ("Qwen3-30B-A3B", 1))
_METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "alu_percent",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled_on_memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stalled_on_barriers",
}


def _shape(session: Session, name: str) -> Shape:
    return session.shapes[0] if session.dry else SHAPES[name]


@functools.lru_cache(maxsize=1)
def _layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> ExpertLayer:
    """The last one is kept: steps ask for the same shape one after the other."""
    return make_layer(shape, dtype, device)


def ceilings(session: Session) -> bool:
    """The two rates, and microseconds of one to five kernels that do nothing, in one graph."""
    session.file("ceilings").put([{"part": "ceilings", "contender": "measured", "status": "ok"}])
    results = session.file("launch")
    for early in (False, True):
        times = []
        for nodes in (1, 5):
            if session.dry:
                times.append(time_call(lambda: None, session.device, budget=0.0))
            else:
                from benchmarks.speed.launch_gap import launches

                times.append(time_call(launches(nodes, early, session.device), session.device, flush=False))
        gap = (times[1].median - times[0].median) / 4 * 1e6
        name = "started early" if early else "one after the other"
        row = {"part": "gap", "contender": name, "status": "ok", "us_1": times[0].median * 1e6, "us_node": gap}
        results.put([row | {"us_5": times[1].median * 1e6, "graph": times[1].graph}])
        print(f"a node of a graph, {name}: {gap:.2f} us")
    return True


def kernels(session: Session) -> bool:
    return bench_kernels.run(replace(session, shapes=[_shape(session, "OLMoE-1B-7B")]))


def layers(session: Session) -> bool:
    fine = True
    for shape in session.shapes[:1] if session.dry else [SHAPES[name] for name in NAMES]:
        for part, tokens in (("decode", DECODE), ("prefill", PREFILL)):
            fine &= bench_layer.run(
                replace(session, shapes=[shape]),
                part,
                None if session.dry else list(tokens),
                laws=("uniform",),
                contenders=functools.partial(_contenders, part, session.device),
                make=_layer,
            )
    return fine


def _contenders(part: str, device: torch.device, shape: Shape) -> list[Contender]:
    left_out = set(_LEFT_OUT[part])
    if shape.num_experts > _MOST_LIBRARY_CALLS:
        left_out.add("moe_nm semi_structured")
    return [contender for contender in contenders_for(device) if contender.name not in left_out]


def variants(first: GroupedConfig) -> dict[str, GroupedConfig]:
    """What is launched, and the same with one field changed."""
    found = {"as it is": first}
    for field, values in {"group_m": (1, 8), "num_stages": (2, 3)}.items():
        for value in values:
            if value != getattr(first, field):
                found[f"{field}={value}"] = replace(first, **{field: value})
    return found


@torch.no_grad()
def launch(session: Session) -> bool:
    shape, results, fine = _shape(session, "Mixtral-8x7B"), session.file("launch"), True
    for tokens in (5,) if session.dry else (64, 256):
        rows = tokens * shape.top_k
        sizes = {"up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
        chosen = {
            op: variants(grouped_config(f"{op}_nm", rows, shape.num_experts, n, k, torch.bfloat16, session.device))
            for op, (n, k) in sizes.items()
        }
        keys = {
            op: {"part": "launch", "shape": shape.name, "op": f"{op}_nm", "dtype": "bfloat16", "tokens": tokens}
            for op in chosen
        }
        if all(results.has(contenders=list(chosen[op]), **keys[op]) for op in chosen) and not session.again:
            continue
        call = RoutedCall.make(_layer(shape, torch.bfloat16, session.device), tokens, "uniform")
        for op, (run, wanted) in problems(call, "nm").items():
            seconds = seconds_of(run, wanted, session)
            for name, config in chosen[op].items():
                us = seconds(config) * 1e6
                status = {"status": "ok", "us": us} if math.isfinite(us) else {"status": "wrong", "reason": "or no run"}
                results.put([{**keys[op], "routing": "uniform", "contender": name, **asdict(config), **status}])
                fine &= status["status"] == "ok"
                print(f"{shape.name} {tokens} {op:<5} {name:<14} {us:>10,.1f} us", flush=True)
    return fine


def sparse_mma(session: Session) -> bool:
    shapes = [_shape(session, "OLMoE-1B-7B")]
    return bench_sparse_mma.run(replace(session, shapes=shapes), (16,) if session.dry else (512, 2048))


def call(session: Session, tokens: int) -> None:
    """The packed layer of the first shape twice: the first call compiles."""
    made = RoutedCall.make(make_layer(session.shapes[0], torch.bfloat16, session.device), tokens, "uniform")
    packed = made.layer.packed_gate_up, made.layer.packed_down
    for _ in range(2):
        moe_nm(*made.routed, *packed, **made.layer.options, backend="auto" if session.dry else "triton")


def read_profile(text: str) -> list[dict[str, Any]]:
    """The launches in the output of `ncu --csv`, with the fields of `_METRICS`; a field it does not give is missing."""
    lines = text.splitlines()
    head = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launched: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[head:]):
        found = launched.setdefault(row["ID"], {"kernel": row["Kernel Name"].partition("(")[0]})
        if row["Metric Name"] in _METRICS:
            with_commas = row["Metric Value"].replace(",", "")
            found[_METRICS[row["Metric Name"]]] = float(with_commas) if with_commas[:1].isdigit() else None
    return list(launched.values())


def profile(session: Session) -> bool:
    results, ncu, fine = session.file("launch"), shutil.which("ncu"), True
    for name, tokens in (("tiny", 5),) if session.dry else _PROFILED:
        key = {"part": "profile", "shape": name, "tokens": tokens}
        command = [sys.executable, "-m", "benchmarks.speed.short", "call", "--shapes", name, "--tokens", str(tokens)]
        if ncu is None or session.dry:
            rows = [{"contender": "ncu", "status": "skipped", "reason": "it needs a GPU and ncu on the PATH"}]
        else:
            # both grouped launches of the second call; clocks stay as they are
            how = [
                "--csv",
                "--clock-control",
                "none",
                "--kernel-name",
                "regex:_grouped_nm_kernel",
                "--launch-skip",
                "2",
            ]
            how += ["--launch-count", "2", "--metrics", ",".join(_METRICS)]
            done = subprocess.run([ncu, *how, *command], capture_output=True, text=True)
            rows = [{"contender": op, "status": "ok"} for op in ("up", "down")]
            found = read_profile(done.stdout)
            rows = [row | launched for row, launched in zip(rows, found, strict=False)]
            if not rows:
                reason = (done.stdout + done.stderr).strip()[-500:]
                rows, fine = [{"contender": "ncu", "status": "failed", "reason": reason}], False
        results.put([key | row for row in rows])
        for row in rows:
            print(", ".join(f"{field} {value}" for field, value in (key | row).items()), flush=True)
    return fine


STEPS: dict[str, Callable[[Session], bool]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "layers": layers,
    "launch": launch,
    "sparse_mma": sparse_mma,
    "profile": profile,
}


def run(session: Session, steps: Sequence[str]) -> bool:
    """The steps in order; False when one did not hold.

    Raises:
        SystemExit: DEVICE_LOST, after a note of the step that lost it.
    """
    noted, fine = session.file("launch"), True
    lost = {} if session.again else noted.lost(part="step")
    for step in steps:
        if step in lost:
            print(f"{step}: it lost the device and is left out", flush=True)
            fine = False
            continue
        print(f"-- {step}", flush=True)
        fine &= STEPS[step](session)
        if device_is_lost():
            noted = session.file("launch")
            noted.put([{"part": "step", "contender": step, "status": "lost", "reason": "see the step's own rows"}])
            raise SystemExit(DEVICE_LOST)
    return fine


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("steps", nargs="+", choices=[*STEPS, "call"])
    options.add_argument("--tokens", type=int, default=1, help="of `call`, which stands alone")
    chosen = options.parse_args(arguments)
    use_carried()
    if chosen.dry and chosen.shapes is None:
        chosen.shapes = list(DRY_SHAPES)[:1]
    if chosen.steps == ["call"]:
        call(start(chosen), chosen.tokens)
        return
    end_with(lambda: run(start(chosen), chosen.steps))


if __name__ == "__main__":
    main()
