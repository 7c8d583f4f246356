"""Launch sizes and backend choice: from measured tables where there are any, else a heuristic and one warning.

A table is `configs/<device>.json`, the name of the GPU as torch reports it with spaces as underscores. It is written
by a tuning run and read once per process; nothing is timed while serving. Its form:

    {
      "device": "...", "torch": "...", "triton": "...", "driver": "...",
      "launch": [
        {"op": "up_nm" | "down_nm" | "up_dense" | "down_dense", "dtype": "bfloat16", "experts": E, "n": N, "k": K,
         "rows": {"<R>": {"block_m": ..., every field of GroupedConfig}}}
      ],
      "backend": [
        {"dtype": "bfloat16", "experts": E, "hidden": H, "intermediate": I,
         "until_rows_per_expert": {"<float>": "<backend>"}}
      ]
    }

"rows" is looked up at the nearest number of rows measured; "until_rows_per_expert" at the first bound that is not
passed, the last one being "inf". A shape that is not in the table takes the heuristic.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .schedule import block_bound

__all__ = [
    "GroupedConfig",
    "backend_from_table",
    "block_m_for",
    "config_folder",
    "grouped_config",
    "starts_early",
]

# programs wanted for each multiprocessor before the reduction is split further
_WAVES = 2
_MAX_SPLITS = 8
# Blocks that walk the weight together. Where they are all of them, as in decode of few experts, no weight is read
# twice; more would sweep the rows of too many experts out of L2 (tests/kernels/l2.py).
_GROUP_M = 32


@dataclass(frozen=True)
class GroupedConfig:
    """Launch sizes of one grouped GEMM.

    Attributes:
        block_m: rows of one expert in a program.
        block_n: weight rows in a program; of packed weights 128, the tile, or 64 where not swapped.
        block_k: columns in a step of the reduction; packed weights have a fixed step of 128.
        split_k: programs that share one reduction; their fp32 partial sums are added afterwards in order.
        group_m: blocks that walk the weight together.
        swap: multiply W @ x.T instead of x @ W.T, so that the long side of wgmma is the weight's.
        num_warps: 4 for packed weights.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int = 128
    block_k: int = 128
    split_k: int = 1
    group_m: int = 1
    swap: bool = False
    num_warps: int = 4
    num_stages: int = 3


def config_folder() -> Path:
    """Where tables are read from: $MOESPARSE_CONFIGS if set, else the folder shipped with the package."""
    return Path(os.environ.get("MOESPARSE_CONFIGS", "") or Path(__file__).with_name("configs"))


def _load_table(device_name: str, folder: Path) -> dict[str, Any]:
    path = folder / (device_name.replace(" ", "_").replace("/", "_") + ".json")
    if not path.is_file():
        return {}
    with open(path) as file:
        return json.load(file)


@cache
def _table(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    name = torch.cuda.get_device_name(device)
    table = _load_table(name, config_folder())
    if not table:
        # cached, so this is said once
        warnings.warn(
            f"moesparse_kernels has no measured launch table for {name!r}: using a heuristic, which may be slower. "
            f"Expected in {config_folder()}.",
            stacklevel=4,
        )
    return table


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _has_wgmma(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends: NVIDIA's from sm_90 on, where $MOESPARSE_EARLY=1 asks.

    It has to be asked for as long as no GPU has run it.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False
    return os.environ.get("MOESPARSE_EARLY") == "1" and torch.cuda.get_device_capability(device)[0] >= 9


def block_m_for(rows: int, num_experts: int, largest: int) -> int:
    """The smallest block that holds an expert's average share of the rows: 16, 32, 64 ... `largest`."""
    share = rows / max(1, min(rows, num_experts))
    block_m = 16
    while block_m < largest and block_m < share:
        block_m *= 2
    return block_m


def _split_k(programs: int, k_steps: int, device: torch.device) -> int:
    """Splits of the reduction, of four steps or more, that bring `_WAVES` programs to each multiprocessor."""
    wanted = _WAVES * _multiprocessors(device)
    split = 1
    while split < _MAX_SPLITS and programs * split * 2 <= wanted and k_steps >= 8 * split:
        split *= 2
    return split


def _heuristic(op: str, rows: int, num_experts: int, n: int, k: int, device: torch.device) -> GroupedConfig:
    if op.endswith("_nm"):
        block_m = block_m_for(rows, num_experts, largest=64)
        swap = _has_wgmma(device) and block_m >= 32
        # Two programs of 64 rows keep too little under way with two stages, on wgmma; with three they need 84 KB of
        # shared memory each, which other GPUs may not have.
        base = GroupedConfig(block_m, swap=swap, num_stages=3 if block_m < 64 or swap else 2)
    else:
        block_m = block_m_for(rows, num_experts, largest=128)
        if block_m <= 32:
            base = GroupedConfig(block_m, block_n=128, block_k=128, num_stages=3)
        else:
            base = GroupedConfig(block_m, block_n=128, block_k=64, num_warps=4 if block_m == 64 else 8, num_stages=3)
    blocks = block_bound(rows, num_experts, block_m)
    programs = blocks * math.ceil(n / base.block_n)
    # up to block_m rows no expert can have a second block
    base = replace(base, group_m=min(_GROUP_M, blocks) if rows > block_m else 1)
    if op.startswith("up") and n % 256 == 0:
        # a split reduction would need a launch for the activation: half the weight rows in a program instead
        halves = block_m == 16 and 2 * programs <= _WAVES * _multiprocessors(device)
        return replace(base, block_n=64) if halves else base
    return replace(base, split_k=_split_k(programs, math.ceil(k / base.block_k), device))


def grouped_config(
    op: str, rows: int, num_experts: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> GroupedConfig:
    """Launch sizes of one grouped GEMM: from the device's table, else the heuristic.

    Args:
        op: "up_nm", "down_nm", "up_dense" or "down_dense".
        rows: R, tokens times top_k.
        num_experts: E.
        n: rows of the weight, 2 * I for gate and up.
        k: columns of the weight.
        dtype: of the weight.
        device: the tensors' device.
    """
    key = {"op": op, "dtype": str(dtype).removeprefix("torch."), "experts": num_experts, "n": n, "k": k}
    for entry in _table(device).get("launch", ()):
        if all(entry[name] == wanted for name, wanted in key.items()):
            nearest = min(entry["rows"], key=lambda measured: abs(math.log(int(measured)) - math.log(max(rows, 1))))
            known = {field.name for field in fields(GroupedConfig)}
            return GroupedConfig(**{name: value for name, value in entry["rows"][nearest].items() if name in known})
    return _heuristic(op, rows, num_experts, n, k, device)


def backend_from_table(
    rows_per_expert: float, num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The backend measured fastest for 2:4 experts of this shape at this load, or None when it was not measured."""
    key = {
        "dtype": str(dtype).removeprefix("torch."),
        "experts": num_experts,
        "hidden": hidden,
        "intermediate": intermediate,
    }
    for entry in _table(device).get("backend", ()):
        if all(entry[name] == wanted for name, wanted in key.items()):
            bounds = sorted(entry["until_rows_per_expert"].items(), key=lambda item: float(item[0]))
            for bound, name in bounds:
                if rows_per_expert <= float(bound):
                    return name
    return None
