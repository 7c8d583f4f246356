"""What the commands that work layer by layer share: plans, limits, text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moesparse.cli.common import console, format_bytes, print_json
from moesparse.cli.processes import count
from moesparse.errors import NotInPiecesError, UsageError
from moesparse.system.sizes import parse_size

if TYPE_CHECKING:
    from moesparse.cli.common import CalibrationText, TextOptions
    from moesparse.progress import Progress
    from moesparse.pruning.plan import Plan
    from moesparse.pruning.recipe import Recipe


def parse_limit(text: str) -> int | None:
    """--max-memory: "24GiB", "8GB", or "500000000", which are bytes; None for ""."""
    if not text:
        return None
    try:
        return parse_size(f"{text}B" if text.strip()[-1:].isdigit() else text)
    except ValueError as error:
        raise UsageError(f"--max-memory must be a size such as 24GiB or 8GB, got {text!r}") from error


def plan_for(folder: Path, recipe: Recipe, text: TextOptions) -> Plan:
    """The plan of a run that prunes, from config.json alone."""
    from moesparse.pruning.plan import plan_run

    model, blocks, sizes = _planned_for(folder, text)
    return plan_run(model, blocks, recipe, **sizes)


def calibration_plan_for(folder: Path, moments: str, text: TextOptions) -> Plan:
    """The plan of a run that calibrates, from config.json alone."""
    from moesparse.pruning.plan import plan_calibration

    model, blocks, sizes = _planned_for(folder, text)
    return plan_calibration(model, blocks, moments, **sizes)


def _planned_for(folder: Path, text: TextOptions) -> tuple[Any, Any, dict[str, int]]:
    """The model without weights, its blocks, and the windows: of at most its context."""
    from moesparse.models.blocks import find_moe_blocks
    from moesparse.models.meta import context_length, meta_model

    model = meta_model(folder)
    length = min(text.length, context_length(model))
    sizes = {"windows": text.samples, "length": length, "batch_size": text.batch_size, "processes": count()}
    return model, find_moe_blocks(model), sizes


def tell_plan(plan: Plan, device: Any, *, dry_run: bool, as_json: bool) -> bool:
    """Show what a run will take; whether that was all that was asked for."""
    if as_json and not dry_run:
        return False
    facts = plan_with_time(plan, device)
    if as_json:
        print_json(facts)
    else:
        show_plan(facts)
    return dry_run


def read_text(text: TextOptions, folder: Path, progress: Progress) -> tuple[CalibrationText, Any]:
    """Calibration text for a checkpoint of which no weight is read, and its tokenizer."""
    from moesparse.checkpoints.pretrained import load_tokenizer
    from moesparse.models.meta import meta_model

    tokenizer = load_tokenizer(folder)
    return text.read(tokenizer, str(folder), meta_model(folder), progress), tokenizer


@contextlib.contextmanager
def naming_the_whole() -> Iterator[None]:
    """A checkpoint that cannot be read layer by layer may still be one that can be loaded: the error says how."""
    try:
        yield
    except NotInPiecesError as error:
        raise NotInPiecesError(
            f"{error}. So it is not read layer by layer; --whole loads it at once, as transformers does, if it fits in "
            "memory"
        ) from error


def plan_with_time(plan: Plan, device: Any) -> dict[str, Any]:
    """The plan for JSON, with an estimate of the time at the speed of this machine."""
    import torch

    from moesparse.pruning.plan import gemm_rate

    rate = gemm_rate(device)
    half = plan.weights < 3 * plan.parameters
    forward = gemm_rate(device, torch.bfloat16) if half else rate
    rates = {"flops_per_second": rate, "forward_flops_per_second": forward}
    return {**plan.to_dict(), **rates, "seconds": plan.seconds(rate, forward)}


def show_plan(facts: dict[str, Any]) -> None:
    """A table of what a run will take."""
    table = Table(title="plan", box=SIMPLE_HEAD, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("what")
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_row("decoder layers, with experts", f"{facts['layers']}, {facts['blocks']}")
    keep = "" if facts["keep"] is None else f", {facts['keep']} stay"
    table.add_row("experts of a block", f"{facts['experts']}{keep}")
    table.add_row("parameters, active for a token", f"{facts['parameters']:.3g}, {facts['active_parameters']:.3g}")
    table.add_row("calibration tokens", f"{facts['tokens']:,}")
    if facts["processes"] > 1:
        table.add_row("processes, each with what is in memory below", str(facts["processes"]))
    for what, key in (
        ("checkpoint", "weights"),
        ("experts of the result, packed", "packed"),
        ("in memory: outside of the layers", "outside"),
        ("  one layer", "layer"),
        ("  its second moments", "moments"),
        ("  to prune its largest matrix, or to refit it", "workspace"),
        ("  sums of all experts and windows", "sums"),
        ("  hidden states (in a file when RAM is short)", "hidden_states"),
        ("  at most, with the hidden states", "peak_in_memory"),
        ("  at most, without", "peak"),
    ):
        if facts[key]:
            table.add_row(what, format_bytes(facts[key]))
    table.add_row("time, within a factor of three", _duration(facts["seconds"]))
    console.print(table)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
