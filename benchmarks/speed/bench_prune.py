"""Seconds and peak memory of every mask rule, weight rule and value rule, on whole expert matrices.

    python benchmarks/speed/bench_prune.py                     # the embedded model and a slice of Mixtral-8x7B's up
    python benchmarks/speed/bench_prune.py --shapes mixtral-up # all of it: 14336 x 4096; mixtral-down has 14336 inputs
    python benchmarks/speed/bench_prune.py --quick --json      # small, for CI: everything runs, times mean nothing

The baseline of a mask from a score is the plain way: a stable sort of every row (or group) and a scatter of the first
columns. It gives the same mask, which is checked before anything is timed. Weights are random; the inputs are
correlated with a spectrum that decays as 1/k, and the gates lie between 0 and 1. Statistics are made outside the clock.
A mask rule is timed with its scores, a weight rule on moe-pruner's mask, a value rule on what least squares makes of
that; its error is that of rounding alone. The slice of Mixtral is an eighth of its rows:
rows are independent, so all but the factorisations scale with them.

Times are medians with the 20-80% range over the repeats, after one call that is not timed unless --repeats is 1; CPU
seconds stand beside them, for a machine that is shared. Peak memory is what a call adds to the process (to the GPU's
allocations, when there is one) over its inputs. Losses count too: `error` is |(W - V) X| / |W X| over the gated inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.system.memory import peak_memory, reset_peak_memory
from moesparse.weights.mask_rules import MASK_RULES, choose_masks, obs_gate
from moesparse.weights.patterns import Pattern, check_mask, mask_from_score
from moesparse.weights.value_formats import ValueFormat
from moesparse.weights.value_rules import VALUE_RULES, ValueChoice, choose_values
from moesparse.weights.weight_rules import UPDATE_RULES, Update, output_energy, update_weights

# experts, out_features, in_features; what the matrix reads
SHAPES = {
    "tiny": (4, 64, 128),
    "embedded-gate-up": (16, 256, 192),
    "embedded-down": (16, 192, 128),
    "mixtral-up": (1, 14336, 4096),
    "mixtral-up-slice": (1, 1792, 4096),
    "mixtral-down": (1, 4096, 14336),
}
DEFAULT_SHAPES = ("embedded-gate-up", "embedded-down", "mixtral-up-slice")


@dataclass
class Sums:
    """What the rules read of ExpertStatistics."""

    tokens: Tensor
    energy: dict[str, Tensor]
    gated_energy: dict[str, Tensor]
    moment: dict[str, Tensor]
    gated_moment: dict[str, Tensor]


def synthetic(shape: tuple[int, int, int], device: torch.device, seed: int = 0) -> tuple[Tensor, Sums]:
    """Weights [E, out, in] and sums over in/4 low-rank directions plus noise: correlated, full rank, any width."""
    experts, _, in_features = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(device)
    rank = max(16, in_features // 4)
    directions = torch.randn(experts, rank, in_features, generator=generator).to(device)
    scale = torch.arange(1, rank + 1, device=device).float().rsqrt()[None, :, None]
    noise = 0.1 + torch.rand(experts, in_features, generator=generator).to(device)
    moments = []
    # the gate weighs directions differently, so that the gated sums are no multiple of the plain ones
    for gate in (torch.ones(experts, rank, 1), torch.rand(experts, rank, 1, generator=generator)):
        mixed = directions * scale * gate.to(device)
        moment = (mixed.mT @ mixed).double()
        moment.diagonal(dim1=-2, dim2=-1).add_(noise.double() ** 2)
        moments.append(moment)
    energies = [moment.diagonal(dim1=-2, dim2=-1).clone() for moment in moments]
    named = [{"activation": tensor} for tensor in (*energies, *moments)]
    return weight, Sums(torch.full((experts,), 4 * in_features), *named)


def sorted_mask(score: Tensor, pattern: Pattern) -> Tensor:
    """The plain way: sort every row or group, best first and the lower column before its equals, keep the first."""
    n, size = pattern.group or (pattern.kept(score.shape[-1]), score.shape[-1])
    groups = score.unflatten(-1, (-1, size))
    order = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)


def measure(call: Callable[[], Any], repeats: int, device: torch.device) -> tuple[Any, dict[str, float]]:
    """The call's result, seconds (median, 20% and 80%) and the peak memory it adds, in MB."""
    seconds, cpu_seconds = [], []
    result = call() if repeats > 1 else None
    peak = 0
    for _ in range(repeats):
        result = None
        reset_peak_memory()
        before = peak_memory()
        _synchronise(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        result = call()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        peak = max(peak, peak_memory() - before)
    low, median, high = (float(torch.tensor(seconds, dtype=torch.float64).quantile(q)) for q in (0.2, 0.5, 0.8))
    return result, {
        "seconds": median,
        "seconds_20": low,
        "seconds_80": high,
        "cpu_seconds": sorted(cpu_seconds)[repeats // 2],
        "peak_mb": peak / 2**20,
    }


@dataclass
class Case:
    """One matrix at one pattern, and how to time it."""

    weight: Tensor
    sums: Sums
    pattern: Pattern
    masks: list[str]
    updates: list[str]
    values: list[str]
    repeats: int

    def measure(self, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        return measure(call, self.repeats, self.weight.device)

    def mask(self, rule: str) -> Tensor:
        mask = choose_masks(self.weight, rule, self.pattern, self.sums, "activation").mask
        if not check_mask(mask, self.pattern).exact:
            raise SystemExit(f"{rule} at {self.pattern}: the mask is not exact")
        return mask

    def update(self, mask: Tensor, rule: str) -> Update:
        update = update_weights(self.weight, mask, rule, self.sums, "activation", gate=obs_gate("moe-pruner"))
        if not check_mask(update.weight, self.pattern).holds:
            raise SystemExit(f"{rule} at {self.pattern}: the pattern does not hold")
        return update

    def selection_rows(self) -> Iterator[dict[str, Any]]:
        """Selection against sorting, on moe-pruner's score by itself."""
        score = self.weight.abs() * self.sums.gated_energy["activation"].sqrt().float()[:, None]
        # rounded to nine values, so that most groups hold ties
        for candidate in (score, (score * 8 / score.max()).round()):
            if not torch.equal(mask_from_score(candidate, self.pattern), sorted_mask(candidate, self.pattern)):
                raise SystemExit(f"selection and sorting disagree at {self.pattern}")
        _, sorting = self.measure(lambda: sorted_mask(score, self.pattern))
        yield {"step": "score to mask", "rule": "sort (baseline)", **sorting}
        _, selection = self.measure(lambda: mask_from_score(score, self.pattern))
        speedup = sorting["cpu_seconds"] / selection["cpu_seconds"]
        yield {"step": "score to mask", "rule": "selection", **selection, "speedup_cpu": speedup}

    def mask_rows(self) -> Iterator[dict[str, Any]]:
        """Every mask rule, scores and factorisations included; the error is that of least squares on its mask."""
        for rule in self.masks:
            mask, figures = self.measure(partial(self.mask, rule))
            error = self.update(mask, "least-squares").error_after
            yield {"step": "mask", "rule": rule, **figures, "error": float(error.mean()) if error is not None else None}

    def update_rows(self) -> Iterator[dict[str, Any]]:
        """Every weight rule on moe-pruner's mask."""
        mask = self.mask("moe-pruner")
        for rule in self.updates:
            update, figures = self.measure(partial(self.update, mask, rule))
            error = update.error_after
            yield {
                "step": "weights",
                "rule": rule,
                **figures,
                "error": float(error.mean()) if error is not None else None,
            }

    def value(self, weight: Tensor, rule: str, format: ValueFormat) -> ValueChoice:
        choice = choose_values(weight, rule, format, self.sums, "activation")
        if not check_mask(choice.quantised.dequantise(), self.pattern).holds:
            raise SystemExit(f"{rule} at {self.pattern}: the pattern does not hold")
        return choice

    def value_rows(self) -> Iterator[dict[str, Any]]:
        """Every value rule on least squares' weights."""
        weight = self.update(self.mask("moe-pruner"), "least-squares").weight
        for name in self.values:
            for rule in VALUE_RULES:
                choice, figures = self.measure(partial(self.value, weight, rule, ValueFormat.parse(name)))
                moment = self.sums.gated_moment["activation"]
                off, whole = (output_energy(each, moment) for each in (weight - choice.quantised.dequantise(), weight))
                yield {"step": f"values {name}", "rule": rule, **figures, "error": float((off / whole).sqrt().mean())}


def rows(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    for shape in args.shapes:
        weight, sums = synthetic(SHAPES[shape], device)
        for pattern in map(Pattern.parse, args.patterns):
            case = Case(weight, sums, pattern, args.masks, args.updates, args.values, args.repeats)
            for row in chain(case.selection_rows(), case.mask_rows(), case.update_rows(), case.value_rows()):
                yield {"shape": shape, "size": list(weight.shape), "pattern": str(pattern), **row}


def hardware(device: torch.device) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": model,
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(DEFAULT_SHAPES))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    parser.add_argument(
        "--masks", nargs="*", choices=MASK_RULES, default=[rule for rule in MASK_RULES if rule != "random"]
    )
    parser.add_argument(
        "--updates", nargs="*", choices=UPDATE_RULES, default=["none", "rescale", "obs", "least-squares"]
    )
    parser.add_argument("--values", nargs="*", default=["int4:64"], help="formats of values")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small shape once; nothing is written")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the result files"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.repeats = ["tiny"], 1
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    ran_on = {**hardware(device), "repeats": args.repeats}
    path = args.out / ran_on["device"].lower().replace(" ", "-") / "bench_prune.json"
    found = []
    for row in rows(args, device):
        found.append({**row, **ran_on})
        if not args.quick:
            # row by row: a long run that is stopped keeps what it measured
            write(path, found)
        if not args.json:
            notes = f"  error {row['error']:.4f}" if row.get("error") is not None else ""
            notes += f"  {row['speedup_cpu']:.1f}x" if "speedup_cpu" in row else ""
            print(
                f"{row['shape']:17} {row['pattern']:5} {row['step']:14} {row['rule']:16} "
                f"{row['seconds']:9.3f} s  {row['cpu_seconds']:9.3f} s cpu  {row['peak_mb']:7.0f} MB{notes}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"benchmark": "bench_prune", "rows": found}))
    elif not args.quick:
        print(f"wrote {path}; {ran_on}")


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """Keep the rows of earlier runs that this one did not measure again; each row says where it was measured."""
    key = itemgetter("shape", "pattern", "step", "rule")
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {key(row): row for row in (*earlier, *found)}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in merged.values())
    path.write_text(f'{{"benchmark": "bench_prune", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
