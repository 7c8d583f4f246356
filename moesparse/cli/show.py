"""What a run has done, as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesparse.cli.console import console
from moesparse.system.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from moesparse.distillation.report import DistillReport
    from moesparse.pruning.report import Report

__all__ = ["show_budget", "show_distilled", "show_domains", "show_plan", "show_pruned"]

_FALLBACKS_SHOWN = 10


def show_domains(found: Mapping[str, Any], criterion: Any) -> None:
    """What each domain would keep, how far they agree, and how firm the choice is."""
    names = list(found["kept"])
    table = Table(title=f"domains by {criterion}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("domain", no_wrap=True)
    table.add_column("windows", justify="right", no_wrap=True)
    if len(names) > 1:
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        pairs = {frozenset(each["domains"]): each["blocks"] for each in found["overlap"]}
        for name in names:
            cells = ["" if name == other else _span(pairs[frozenset((name, other))]) for other in names]
            windows = found["windows"][name]
            table.add_row(name, "" if windows is None else str(windows), *cells)
        console.print(table)
        console.print(
            "between domains: Jaccard overlap of the kept experts, mean over blocks (lowest)", highlight=False
        )
    if found["stability"] is not None:
        colour = "green" if found["stability"]["stable"] else "yellow"
        console.print(f"[{colour}]{found['stability']['summary']}[/]", highlight=False, soft_wrap=True)


def _span(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}\n({min(values):.2f})"


def show_budget(budget: dict[str, Any], out: Console = console) -> None:
    """The plan of a target in bytes: what each block keeps, and what that is estimated to cost."""
    plan = budget[budget["kept"]]
    share = plan["bytes"] / budget["dense"]
    table = Table(
        title=f"{budget['kept']} choice: {plan['keep']} of {budget['experts']} experts, {share:.4f} of the dense bytes",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    matrices = list(next(iter(plan["patterns"].values())))
    for column in ("block", *matrices):
        table.add_column(column, no_wrap=True)
    for column in ("loss by removal", "by patterns"):
        table.add_column(column, justify="right")
    for block, patterns in plan["patterns"].items():
        losses = f"{plan['drop_loss'][block]:.4f}", f"{plan['pattern_loss'][block]:.4f}"
        table.add_row(block, *(patterns[name] for name in matrices), *losses)
    out.print(table)
    out.print(f"losses are estimates in nats per token, {plan['loss']:.4f} in all", highlight=False)
    if not budget["met"]:
        out.print(
            f"the target is {budget['target'] / budget['dense']:.4f}: no choice that takes more of it is estimated to "
            "lose less",
            highlight=False,
        )
    out.print(budget["summary"], highlight=False)


def show_pruned(result: Report, out: Path) -> None:
    """What pruning did, and what to do next."""
    from moesparse.checkpoints.edit import say_surplus

    if result.budget is not None:
        show_budget(result.budget)
    if result.experts is not None:
        _show_experts(result)
    for sentence in say_surplus(result.surplus):
        console.print(sentence, highlight=False, soft_wrap=True)
    wrote = f"wrote {out}"
    if result.blocks:
        _show_weights(result)
        wrote += f": {100 * result.sparsity:.1f}% of the expert weights are zero"
        if result.bits is not None:
            _show_values(result)
    if result.rounding:
        console.print(
            "quantised again in the formats of the checkpoint: squared error "
            f"{result.rounding:.2g} of the weights' squares",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{wrote}\nnext: moesparse eval {out}   |   moesparse inspect {out}   |   moesparse report {out}",
        highlight=False,
        soft_wrap=True,
    )


def _show_experts(result: Any) -> None:
    removed = result.experts
    how = f", the others merged by {removed['method']}" if "method" in removed else ""
    table = Table(
        title=f"experts by {removed['criterion']}{how}", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False
    )
    table.add_column("block", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    table.add_column("merged into others" if how else "removed")
    table.add_column("output error", justify="right", no_wrap=True)
    fits = {fit["name"]: f"{fit['before']:.1%} > {fit['after']:.1%}" for fit in removed["refit"]}
    for block, dead in zip(removed["blocks"], removed["dead"], strict=True):
        ids = " ".join(map(str, block["removed"])) + (f" (no tokens: {' '.join(map(str, dead))})" if dead else "")
        table.add_row(block["name"], f"{len(block['kept'])} of {block['before']}", ids, fits.get(block["name"], ""))
    console.print(table)
    if "readers" in removed:
        from moesparse.experts.surgery import say_readers

        console.print(
            "Layers keep different numbers of experts, which config.json says as per_layer_config: "
            f"{say_readers(removed['readers'])}.",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    for block, expert in removed["protected"]:
        console.print(f"super-expert kept: {removed['blocks'][block]['name']} {expert}", highlight=False)
    if removed["domains"] is not None:
        show_domains(removed["domains"], removed["criterion"])
    before, after = removed["bytes_before"], removed["bytes_after"]
    console.print(f"model: {before / 2**20:.1f} > {after / 2**20:.1f} MiB", highlight=False)


def _show_values(result: Report) -> None:
    from moesparse.checkpoints.card import FAKE_QUANTISED, STORED_CODES
    from moesparse.checkpoints.recipe_words import stores_codes

    stored = STORED_CODES if stores_codes(result.recipe) else FAKE_QUANTISED
    console.print(
        f"values {result.recipe['values']} by {result.recipe['value_rule']}: {result.bits:.3f} bits a weight in that "
        f"format. {stored}",
        highlight=False,
        soft_wrap=True,
    )
    found = sum(len(t.values.fallbacks) for block in result.blocks for t in block.tensors if t.values)
    if found:
        console.print(
            f"[yellow]no calibration tokens:[/] {found} matrices of experts were rounded with all inputs alike",
            soft_wrap=True,
        )


def _show_weights(result: Any) -> None:
    recipe = result.recipe
    title = f"{recipe['saliency']} + {recipe['update']} at {recipe['weights'] or 'mixed patterns'}"
    values = f"{recipe['values']} by {recipe['value_rule']}" if result.bits is not None else ""
    if values:
        pruned = recipe["weights"] is not None or "patterns" in recipe
        title = f"{title}, {values}" if pruned else values
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("block\n  tensor", no_wrap=True)
    more = ["of rounding"] if values else []
    for column in ("shape", "zeros", "error", *more, "s", "peak"):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for block in result.blocks:
        empty = [""] * (3 + len(more))
        table.add_row(block.name, *empty, f"{block.seconds:.1f}", format_bytes(block.peak_bytes))
        for tensor in block.tensors:
            error = (
                ""
                if tensor.error_after is None
                else f"{_percent(tensor.error_before)} > {_percent(tensor.error_after)}"
            )
            shape = "x".join(map(str, tensor.shape))
            rounded = [_percent(tensor.values.output_error or tensor.values.error, 1)] if tensor.values else []
            table.add_row(f"  {tensor.name}", shape, f"{100 * tensor.sparsity:.1f}%", error, *rounded, "", "")
    console.print(table)
    for block, tensor, expert in result.fallbacks[:_FALLBACKS_SHOWN]:
        console.print(
            f"[yellow]no calibration tokens:[/] {block} expert {expert}: {tensor} was masked by magnitude",
            soft_wrap=True,
        )
    if len(result.fallbacks) > _FALLBACKS_SHOWN:
        console.print(f"and {len(result.fallbacks) - _FALLBACKS_SHOWN} more, in the report", highlight=False)


def _percent(values: list[float], digits: int = 0) -> str:
    return f"{100 * sum(values) / len(values):.{digits}f}%"


def show_plan(facts: dict[str, Any], out: Console) -> None:
    """A table of what a run will take."""
    table = Table(title="plan", box=SIMPLE_HEAD, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("what")
    table.add_column("how much", justify="right", no_wrap=True)
    table.add_row("decoder layers, with experts", f"{facts['layers']}, {facts['blocks']}")
    keep = "" if facts["keep"] is None else f", {facts['keep']} stay"
    table.add_row("experts of a block", f"{facts['experts']}{keep}")
    table.add_row("parameters, active for a token", f"{facts['parameters']:.3g}, {facts['active_parameters']:.3g}")
    if facts["formats"]:
        table.add_row("quantised in", ", ".join(facts["formats"]))
    if facts["values"] is not None:
        plain = ", fake-quantised: files no smaller" if facts["fake_quantised"] else ""
        table.add_row(f"values{plain}", f"{facts['values']} by {facts['value_rule']}")
    table.add_row("calibration tokens", f"{facts['tokens']:,}")
    if facts["processes"] > 1:
        table.add_row("processes, each with what is in memory below", str(facts["processes"]))
    for what, key in (
        ("checkpoint, dequantised" if facts["stored"] else "checkpoint", "weights"),
        ("  on the disk", "stored"),
        ("  on the disk, the result", "stored_after"),
        ("experts of the result, packed", "packed"),
        ("in memory: outside of the layers", "outside"),
        ("  one layer", "layer"),
        ("  its second moments", "moments"),
        ("  to prune its largest matrix, or to refit it", "workspace"),
        ("  sums of all experts and windows", "sums"),
        ("  hidden states (in a file when RAM is short)", "hidden_states"),
        ("  at most, with the hidden states", "peak_in_memory"),
        ("  at most, without", "peak"),
        ("  this process before: Python, torch, libraries", "process"),
    ):
        if facts[key]:
            table.add_row(what, format_bytes(facts[key]))
    if facts["process"]:
        whole = format_bytes(facts["peak_in_memory"] + facts["process"])
        table.add_row("  at most, with it: the peak column, time -v", whole)
    at_load = "" if facts["load"] is None else " at this load"
    table.add_row(f"time{at_load}, within a factor of three", format_seconds(facts["seconds"]))
    if facts["load"] is not None:
        table.add_row("  this load: average of a minute, CPUs", f"{facts['load']:.1f}, {facts['cpus']}")
    if facts["seconds_without_load"] is not None:
        when = f"  without load, as measured here on {facts['measured_without_load']}"
        table.add_row(when, format_seconds(facts["seconds_without_load"]))
    out.print(table)


def show_distilled(report: DistillReport, output: Path) -> None:
    """How the losses fell, what it took, and what to do next."""
    from moesparse.checkpoints.edit import say_surplus

    for sentence in say_surplus(report.surplus):
        console.print(sentence, highlight=False, soft_wrap=True)
    rows = report.rows
    if report.expert_weight == 0 and report.settings["expert_weight"] is None:
        console.print(
            "the experts that are left give what the teacher's give: lambda 0, the text alone trains them",
            highlight=False,
            soft_wrap=True,
        )
    for text in report.warnings:
        console.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True)
    if report.mode == "global":
        first, last = rows[0], rows[-1]
        parts = [f"cross-entropy {first['ce']:.3f} > {last['ce']:.3f}"]
        parts += [f"KL {first['kl']:.4g} > {last['kl']:.4g}"] if "kl" in first else []
        if report.expert_weight:
            parts += [f"expert loss {first['experts']:.4g} > {last['experts']:.4g}, lambda {report.expert_weight:.3g}"]
        console.print(", ".join(parts), highlight=False)
    else:
        for name in dict.fromkeys(row["block"] for row in rows):
            losses = [row["experts"] for row in rows if row["block"] == name]
            console.print(f"{name}: expert loss {losses[0]:.4g} > {losses[-1]:.4g}", highlight=False)
    console.print(
        f"{len(rows)} steps in {report.seconds:.0f} s, peak memory {format_bytes(report.peak_bytes)}; "
        f"{report.zeros[0]:,} zeros of {report.weights:,} expert weights, all kept",
        highlight=False,
    )
    console.print(f"wrote {output}; next: moesparse eval {output}", highlight=False, soft_wrap=True)
