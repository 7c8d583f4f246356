"""The half of `moesparse prune` that works layer by layer: its plan, and what it may take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moesparse.cli.common import console, format_bytes
from moesparse.errors import UsageError

if TYPE_CHECKING:
    from moesparse.plan import Plan
    from moesparse.pruning import Recipe

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {unit.replace("B", "IB"): 2 ** (10 * power) for power, unit in enumerate(("KB", "MB", "GB", "TB"), start=1)}


def parse_bytes(text: str) -> int:
    """ "24GiB", "8GB", "500000000" as bytes."""
    digits = text.strip().rstrip("BbIiKkMmGgTt").rstrip()
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        count = float(digits) * _UNITS[unit]
    except (ValueError, KeyError) as error:
        raise UsageError(f"--max-memory must be a size such as 24GiB or 8GB, got {text!r}") from error
    if count < 1:
        raise UsageError(f"--max-memory must be positive, got {text!r}")
    return int(count)


def plan_for(folder: Path, recipe: Recipe, samples: int, length: int, batch_size: int) -> Plan:
    """The plan of a run from config.json alone, for windows of at most the model's context."""
    from moesparse.blocks import find_moe_blocks
    from moesparse.evaluate import context_length
    from moesparse.plan import plan_pruning
    from moesparse.streaming import meta_model

    model = meta_model(folder)
    length = min(length, context_length(model))
    return plan_pruning(model, find_moe_blocks(model), recipe, windows=samples, length=length, batch_size=batch_size)


def plan_with_time(plan: Plan, device: Any) -> dict[str, Any]:
    """The plan for JSON, with an estimate of the time at the speed of this machine."""
    from moesparse.plan import gemm_rate

    rate = gemm_rate(device)
    return {**plan.to_dict(), "flops_per_second": rate, "seconds": plan.seconds(rate)}


def show_plan(facts: dict[str, Any]) -> None:
    """A table of what a run will take."""
    table = Table(title="plan", box=SIMPLE_HEAD, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("what")
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_row("decoder layers, with experts", f"{facts['layers']}, {facts['blocks']}")
    table.add_row("experts of a block", str(facts["experts"]))
    table.add_row("parameters, active for a token", f"{facts['parameters']:.3g}, {facts['active_parameters']:.3g}")
    table.add_row("calibration tokens", f"{facts['tokens']:,}")
    for what, key in (
        ("checkpoint", "weights"),
        ("experts of the result, packed", "packed"),
        ("in memory: outside of the layers", "outside"),
        ("  one layer", "layer"),
        ("  its second moments", "moments"),
        ("  to prune its largest matrix", "workspace"),
        ("  hidden states (in a file when RAM is short)", "hidden_states"),
        ("  at most, with the hidden states", "peak_in_memory"),
        ("  at most, without", "peak"),
    ):
        table.add_row(what, format_bytes(facts[key]))
    table.add_row("time, within a factor of three", _duration(facts["seconds"]))
    console.print(table)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
