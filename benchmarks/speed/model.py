"""What share of the packed roofline a decode step of an expert layer should reach: a MODEL, nothing is measured.

    python -m benchmarks.speed.model                                 # an H200, at the rates below
    python -m benchmarks.speed.model --results out/gpu-short/NVIDIA_H200   # at that card's rates, its rows beside

The launch sizes are those that the package takes (tuning.py); instructions are those of the machine code, which
tests/kernels/aot holds to the same numbers. The GEMMs take as long as the slowest of three: the bytes of the packed
weights of the experts that have tokens, the issue slots, and the tensor cores; what is decoded and multiplied counts
once for every block of rows. To that come a node of the graph for every launch, and ramps. Assumed, until a card says
otherwise: how much of its own limit each resource reaches (`REACHED`), what a ramp and a routing cost (`Rates`), and
that what two blocks of an expert read is read from memory once. What pruning takes is another matter, from the plan of
a run: benchmarks/speed/forecast.py.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesparse.benchmarking import SHAPES, Shape
from moesparse.benchmarking.layer import make_routing
from moesparse_kernels import tuning
from moesparse_kernels.tuning import GroupedConfig

__all__ = ["Forecast", "Rates", "forecast", "main", "measured_rates"]

# instructions of a warp for a group of four weights in the loop of the packed GEMM, by block_m and block_n, and cycles
# of its tensor core for a step of 128 x 128 weights: of mma.sync 62% of wgmma's rate, an assumption
INSTRUCTIONS = {(16, 128): 13.9, (16, 64): 16.8, (32, 128): 13.6, (64, 128): 15.1}
TENSOR_CYCLES = {16: 205, 32: 256, 64: 512}
# instructions before the first copy: with a routing, and where a program finds its rows itself
BEFORE = {False: 217, True: 567}
REACHED = {"memory": 0.92, "issue": 0.75, "tensor": 0.80}
# packed bytes of one step, and groups of four that a thread decodes in it
STEP_BYTES, STEP_GROUPS = 128 * 128 * 9 // 8, 32


@dataclass(frozen=True)
class Rates:
    """Of a card.

    Attributes:
        copy: bytes a second, read and written.
        node: seconds of a node of a CUDA graph that does nothing.
        ramp: seconds until a GEMM's first bytes are there and behind its last: an assumption.
        routing: seconds of the routing kernel beside its node: an assumption.
        multiprocessors, clock: of the card, the clock in Hz.
    """

    copy: float = 4.3e12
    node: float = 1.5e-6
    ramp: float = 2.0e-6
    routing: float = 3.5e-6
    multiprocessors: int = 132
    clock: float = 1.98e9


@dataclass(frozen=True)
class Forecast:
    """Of one call: seconds, and which of "memory", "issue" and "tensor" the GEMMs wait for."""

    seconds: float
    floor: float
    nodes: int
    blocks_per_expert: float
    bound: str

    @property
    def share(self) -> float:
        """Of the packed roofline: the bytes of the weights at the rate of a copy."""
        return self.floor / self.seconds


def _config(shape: Shape, op: str, rows: int, rates: Rates) -> GroupedConfig:
    n, k = (2 * shape.intermediate, shape.hidden) if op == "up" else (shape.hidden, shape.intermediate)
    kept = {name: getattr(tuning, name) for name in ("_has_wgmma", "_multiprocessors")}
    tuning._has_wgmma, tuning._multiprocessors = lambda _: True, lambda _: rates.multiprocessors
    try:
        return tuning.grouped_config(f"{op}_nm", rows, shape.num_experts, n, k, torch.bfloat16, torch.device("cpu"))
    finally:
        for name, value in kept.items():
            setattr(tuning, name, value)


def forecast(shape: Shape, tokens: int, rates: Rates) -> Forecast:
    """The packed layer on a batch of uniform routing, that of the benchmarks."""
    from moesparse_kernels.own_slots import MOST_SLOTS
    from moesparse_kernels.routing import CHUNK

    rows = tokens * shape.top_k
    counts = make_routing(shape.num_experts, shape.top_k, tokens, "uniform").flatten().bincount()
    counts = counts[counts > 0]
    own = rows <= MOST_SLOTS
    busy = dict.fromkeys(REACHED, 0.0)
    blocks = floor = 0.0
    for op, weights in (("up", 2), ("down", 1)):
        config = _config(shape, op, rows, rates)
        blocks = float(((counts + config.block_m - 1) // config.block_m).sum())
        steps = weights * shape.hidden * shape.intermediate / 128**2
        moved = len(counts) * steps * STEP_BYTES / rates.copy
        # of one of four schedulers, each with a warp of every program
        cycle = 1 / (rates.clock * rates.multiprocessors)
        issued = steps * STEP_GROUPS * INSTRUCTIONS[config.block_m, config.block_n]
        size = shape.hidden if op == "up" else shape.intermediate
        issued += BEFORE[own] * steps / math.ceil(size / 128) * 128 / config.block_n * config.split_k
        floor += moved
        for name, seconds in (
            ("memory", moved),
            ("issue", blocks * issued * cycle),
            ("tensor", blocks * steps * TENSOR_CYCLES[config.block_m] * cycle),
        ):
            busy[name] += seconds / REACHED[name]
    bound = max(busy, key=lambda name: busy[name])
    nodes = 3 if own else 4 + (rows > CHUNK)
    # a combine moves little: one more node and half a ramp
    seconds = busy[bound] + nodes * rates.node + 2.5 * rates.ramp + (0 if own else rates.routing)
    return Forecast(seconds, floor, nodes, blocks / len(counts), bound)


def measured_rates(folder: Path, rates: Rates) -> Rates:
    """The rates that the files of `make gpu-short` hold, those at hand for the others."""
    found: dict[str, Any] = {}
    for row in _rows(folder, "ceilings"):
        found["copy"] = row["copy_gb_s"] * 1e9
        if "multiprocessors" in row:
            found["multiprocessors"] = row["multiprocessors"]
        if row.get("clocks_sm"):
            found["clock"] = float(row["clocks_sm"]) * 1e6
    for row in _rows(folder, "launch"):
        if row["part"] == "gap" and row["contender"] == "one after the other":
            found["node"] = row["us_node"] / 1e6
    return replace(rates, **found)


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.speed.short import DECODE, NAMES

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(NAMES))
    options.add_argument("--tokens", nargs="*", type=int, default=list(DECODE))
    options.add_argument("--results", type=Path, help="RESULTS/<gpu> of make gpu-short")
    chosen = options.parse_args(arguments)
    rates, measured = Rates(), {}
    if chosen.results is not None:
        rates = measured_rates(chosen.results, rates)
        for row in _rows(chosen.results, "decode"):
            if row["contender"] == "moe_nm triton" and row["routing"] == "uniform" and row["status"] == "ok":
                measured[row["shape"], row["tokens"]] = row["us"]
    print(f"MODEL, not measured; {rates}; reached of a limit: {REACHED}")
    print(
        "\n| shape | batch | nodes | blocks an expert | floor us | model us | of the roofline | bound | measured us |"
    )
    print("|---" * 9 + "|")
    for name in chosen.shapes:
        for tokens in chosen.tokens:
            said = forecast(SHAPES[name], tokens, rates)
            seen = f"{measured[name, tokens]:.1f}" if (name, tokens) in measured else "-"
            print(
                f"| {name} | {tokens} | {said.nodes} | {said.blocks_per_expert:.2f} | {said.floor * 1e6:.1f} | "
                f"{said.seconds * 1e6:.1f} | {said.share:.0%} | {said.bound} | {seen} |"
            )


if __name__ == "__main__":
    main()
