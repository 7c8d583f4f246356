"""Fill the launch table of a device, configs/<device>.json, from measurements.

Its form is described in moesparse_kernels/tuning.py.

    python -m benchmarks.speed.tune launch                # launch sizes of the grouped GEMMs, every shape
    python -m benchmarks.speed.tune dispatch              # the backend by load, from decode.json and prefill.json
    python -m benchmarks.speed.tune launch --dry --results out/dry

launch: for each number of rows, coordinate descent from what is launched today: one field at a time, the best value
kept. Both GEMMs of a layer take the block_m whose sum is least, so that one routing serves both. A configuration that
does not compile, or whose result is off, is left out. Entries of other shapes stay in the table; entries at hand are
skipped unless --again.

dispatch: at each load measured, the fastest of the packed backends at uniform routing; between two loads the switch
lies at their geometric mean.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.common import Session, parser, start
from benchmarks.speed.shapes import DRY_TOKENS, TUNE_TOKENS
from moesparse.benchmarking import time_call
from moesparse.benchmarking.layer import ExpertLayer, RoutedCall, device_is_lost, make_layer
from moesparse_kernels import NMWeight
from moesparse_kernels.moe_reference import down_reference, up_reference
from moesparse_kernels.ops import route_inside
from moesparse_kernels.schedule import Routings
from moesparse_kernels.tuning import GroupedConfig, config_folder, grouped_config

__all__ = ["backend_bounds", "descend", "main", "problems", "run_dispatch", "run_launch", "seconds_of"]

Run = Callable[[GroupedConfig], torch.Tensor]

_PACKED_BACKENDS = ("triton", "semi_structured", "unpack")
# values each field may take, in the order they are tried; block_m is chosen for both GEMMs together
_OPTIONS: dict[str, dict[str, Sequence[Any]]] = {
    "nm": {
        "swap": (False, True),
        "block_n": (64, 128),
        "num_stages": (2, 3, 4),
        "split_k": (1, 2, 4, 8),
        "group_m": (1, 8, 32),
    },
    "dense": {
        "block_k": (64, 128),
        "num_stages": (2, 3, 4),
        "num_warps": (4, 8),
        "split_k": (1, 2, 4, 8),
        "group_m": (1, 8, 32),
    },
}
_LARGEST_BLOCK_M = {"nm": 64, "dense": 128}
_NOT_FUSED: dict[str, Any] = {"activation": "none", "gated": False}


def descend(
    first: GroupedConfig, options: dict[str, Sequence[Any]], seconds: Callable[[GroupedConfig], float]
) -> tuple[GroupedConfig, float]:
    """The best configuration found by changing one field at a time, and its seconds; inf when none runs."""
    best, least = first, seconds(first)
    for name, values in options.items():
        for value in values:
            candidate = replace(best, **{name: value})
            if candidate == best:
                continue
            taken = seconds(candidate)
            if taken < least:
                best, least = candidate, taken
    return best, least


def problems(call: RoutedCall, kind: str) -> dict[str, tuple[Run, torch.Tensor]]:
    """The two GEMMs of a layer, each a function of its configuration, and the result in plain torch.

    On a CPU the plain torch runs in the kernels' place, whatever the configuration.
    """
    layer, activation = call.layer, call.layer.options["activation"]
    # a gate that is not fused runs between two plain GEMMs
    fused = {"activation": activation, "gated": True} if isinstance(activation, str) else _NOT_FUSED
    routings = Routings(call.top_k_index, layer.shape.num_experts, route_inside)
    up_bias, down_bias = layer.gate_up_bias, layer.down_bias
    random = torch.Generator(device=call.x.device).manual_seed(0)
    rows = torch.empty(
        call.top_k_index.numel(), layer.shape.intermediate, dtype=call.x.dtype, device=call.x.device
    ).normal_(generator=random)

    def plain_up() -> torch.Tensor:
        return up_reference(call.x, routings.rows(), layer.gate_up, up_bias, **fused)

    def plain_down() -> torch.Tensor:
        return down_reference(rows, routings.rows(), call.top_k_weights, layer.down, down_bias)

    if call.x.device.type != "cuda":
        return {"up": (lambda _: plain_up(), plain_up()), "down": (lambda _: plain_down(), plain_down())}

    from moesparse_kernels.epilogue import combine
    from moesparse_kernels.grouped_dense import grouped_dense
    from moesparse_kernels.grouped_nm import grouped_nm

    def grouped(x: torch.Tensor, weight: NMWeight | torch.Tensor, config: GroupedConfig, **how: Any) -> torch.Tensor:
        routing = routings.blocks(config.block_m)
        if isinstance(weight, torch.Tensor):
            return grouped_dense(x, weight, routing, call.top_k_index, config, **how)
        return grouped_nm(x, weight.values, weight.index, weight.shape[1], routing, call.top_k_index, config, **how)

    def up(config: GroupedConfig) -> torch.Tensor:
        weight = layer.packed_gate_up if kind == "nm" else layer.gate_up
        return grouped(call.x, weight, config, gather=True, bias=up_bias, **fused)

    def down(config: GroupedConfig) -> torch.Tensor:
        weight = layer.packed_down if kind == "nm" else layer.down
        # timed with the combine, because a split reduction leaves it more to add
        projected = grouped(rows, weight, config, gather=False, bias=down_bias, keep_splits=True)
        bias = down_bias if config.split_k > 1 else None
        row_of = routings.blocks(config.block_m).row_of
        return combine(projected, bias, call.top_k_index, call.top_k_weights, row_of, rows.dtype)

    return {"up": (up, plain_up()), "down": (down, plain_down())}


def seconds_of(run: Run, wanted: torch.Tensor, session: Session) -> Callable[[GroupedConfig], float]:
    """Seconds of a configuration; inf when it does not run or does not give `wanted`."""

    def seconds(config: GroupedConfig) -> float:
        try:
            off = float((run(config).float() - wanted.float()).norm() / wanted.float().norm())
            # a few roundings to bf16 of the same sums stay under this; NaN does not
            if not off < 1e-2:
                return math.inf
            return time_call(lambda: run(config), session.device, budget=session.budget / 2).median
        except Exception:
            if device_is_lost():
                raise
            return math.inf

    return seconds


def tune_call(call: RoutedCall, kind: str, session: Session) -> dict[str, tuple[GroupedConfig, float]]:
    """The best configuration of "up" and "down" and its seconds, at one block_m; empty when none runs."""
    shape, rows = call.layer.shape, call.top_k_index.numel()
    sizes = {"up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
    found: dict[int, dict[str, tuple[GroupedConfig, float]]] = {}
    for op, (run, wanted) in problems(call, kind).items():
        first = grouped_config(f"{op}_{kind}", rows, shape.num_experts, *sizes[op], call.x.dtype, call.x.device)
        seconds = seconds_of(run, wanted, session)
        for block_m in (first.block_m // 2, first.block_m, first.block_m * 2):
            if 16 <= block_m <= _LARGEST_BLOCK_M[kind]:
                best = descend(replace(first, block_m=block_m), _OPTIONS[kind], seconds)
                if math.isfinite(best[1]):
                    found.setdefault(block_m, {})[op] = best
    both = [ops for ops in found.values() if len(ops) == 2]
    return min(both, key=lambda ops: sum(seconds for _, seconds in ops.values()), default={})


def table_path(session: Session) -> Path:
    """The file moesparse_kernels reads; beside the results in a dry run."""
    folder = session.folder / "configs" if session.dry else config_folder()
    return folder / f"{session.folder.name}.json"


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"launch": [], "backend": []}


def _save(path: Path, table: dict[str, Any], session: Session) -> None:
    """Write the table whole or not at all, after the reader's own checks."""
    known = {field.name for field in fields(GroupedConfig)}
    for entry in table["launch"]:
        for config in entry["rows"].values():
            GroupedConfig(**{name: value for name, value in config.items() if name in known})
    for entry in table["backend"]:
        assert "inf" in entry["until_rows_per_expert"]
    record = {name: session.environment.get(name) for name in ("device", "driver_version", "torch", "triton", "commit")}
    record["driver"] = record.pop("driver_version")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**record, **table}, indent=1) + "\n")
    os.replace(temporary, path)


def _entry(entries: list[dict[str, Any]], values: str, **key: Any) -> dict[str, Any]:
    """The entry with this key, added when there is none."""
    for entry in entries:
        if all(entry[name] == wanted for name, wanted in key.items()):
            return entry
    entries.append({**key, values: {}})
    return entries[-1]


@torch.no_grad()
def run_launch(session: Session, tokens: Sequence[int] | None = None, dtype: str = "bfloat16") -> bool:
    """Tune the grouped GEMMs of every shape; write after every call, so that an interrupted run goes on."""
    path = table_path(session)
    print(f"{'shape':<17}{'kind':<7}{'tokens':>6}{'op':>6}{'us':>10}  configuration")
    complete = True
    for shape in session.shapes:
        layer: ExpertLayer | None = None
        for kind in _OPTIONS:
            for count in tokens or (DRY_TOKENS["tune"] if session.dry else TUNE_TOKENS):
                table = _load(path)
                rows = str(count * shape.top_k)
                sizes = {"up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
                entries = {
                    op: _entry(
                        table["launch"], "rows", op=f"{op}_{kind}", dtype=dtype, experts=shape.num_experts, n=n, k=k
                    )
                    for op, (n, k) in sizes.items()
                }
                if all(rows in entry["rows"] for entry in entries.values()) and not session.again:
                    continue
                layer = layer or make_layer(shape, getattr(torch, dtype), session.device)
                best = tune_call(RoutedCall.make(layer, count, "uniform"), kind, session)
                complete &= bool(best)
                for op, (config, seconds) in best.items():
                    entries[op]["rows"][rows] = {**asdict(config), "us": seconds * 1e6}
                    print(f"{shape.name[:16]:<17}{kind:<7}{count:>6}{op:>6}{seconds * 1e6:>10,.1f}  {_words(config)}")
                if best:
                    _save(path, table, session)
        del layer
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    return complete


def _words(config: GroupedConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def backend_bounds(fastest: Sequence[tuple[float, str]]) -> dict[str, str]:
    """(rows per expert, fastest backend) in rising order -> the bounds of the table, the last one "inf"."""
    bounds = {}
    for (load, name), (after, other) in itertools.pairwise(fastest):
        if name != other:
            bounds[f"{math.sqrt(load * after):.6g}"] = name
    return {**bounds, "inf": fastest[-1][1]}


def run_dispatch(session: Session) -> bool:
    """Write the backend of every shape that decode.json and prefill.json hold."""
    path = table_path(session)
    table = _load(path)
    rows = [row for part in ("decode", "prefill") for row in session.file(part).rows]
    # without a GPU the only packed backend is the reference: it stands for "unpack", dense after unpacking
    names = {f"moe_nm {name}": name for name in _PACKED_BACKENDS}
    if session.dry:
        names = {"moe_nm reference": "unpack"}
    loads: dict[tuple[Any, ...], dict[float, tuple[float, str]]] = {}
    for row in rows:
        if row["contender"] in names and row["status"] == "ok" and row["routing"] == "uniform":
            shape = loads.setdefault((row["dtype"], row["experts"], row["hidden"], row["intermediate"]), {})
            timed = (row["us"], names[row["contender"]])
            shape[row["rows_per_expert"]] = min(shape.get(row["rows_per_expert"], timed), timed)
    print(f"{'experts':>7}{'hidden':>7}{'inter.':>7}  backend until rows per expert")
    for (dtype, experts, hidden, intermediate), timed_at in loads.items():
        key = {"dtype": dtype, "experts": experts, "hidden": hidden, "intermediate": intermediate}
        bounds = backend_bounds([(load, timed_at[load][1]) for load in sorted(timed_at)])
        _entry(table["backend"], "until_rows_per_expert", **key)["until_rows_per_expert"] = bounds
        words = ", ".join(f"{name} until {bound}" for bound, name in bounds.items())
        print(f"{experts:>7}{hidden:>7}{intermediate:>7}  {words}")
    if loads:
        _save(path, table, session)
    return bool(loads)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=["launch", "dispatch"])
    options.add_argument("--tokens", nargs="*", type=int, help="tokens to tune at")
    chosen = options.parse_args(arguments)
    session = start(chosen)
    if not (run_launch(session, chosen.tokens) if chosen.part == "launch" else run_dispatch(session)):
        raise SystemExit("nothing to write: no configuration ran, or no decode and prefill results are at hand")


if __name__ == "__main__":
    main()
