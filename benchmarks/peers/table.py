"""The rows as Markdown tables, the goals, and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "goals", "show"]

Rows = Sequence[dict[str, Any]]

OURS, OURS_EXPERTS = "moesparse moe-pruner", "moesparse reap"
PEER = "llm-compressor"


def _of(rows: Rows, part: str, contender: str | None = None) -> list[dict[str, Any]]:
    found = [row for row in rows if row["part"] == part and contender in (None, row["contender"])]
    return [row for row in found if row["status"] == "ok"]


def _names(rows: Rows, part: str) -> list[str]:
    """In the order of the contenders' table; those of an older one come last."""
    from benchmarks.peers.contenders import CONTENDERS

    order = [each.name for each in CONTENDERS]
    names = dict.fromkeys(row["contender"] for row in rows if row["part"] == part)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _median(rows: Rows, key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return statistics.median(values) if values else None


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _range(rows: Rows, key: str) -> str:
    """One value, or the lowest and the highest of the repeats."""
    values = [row[key] for row in rows if key in row]
    ends = [_number(end(values)) for end in (min, max)] if values else [""]
    return " to ".join(dict.fromkeys(ends))


def _zeros(row: dict[str, Any]) -> str:
    return ", ".join(f"{part} {share:.0%}" for part, share in row["zeros"].items() if share >= 0.005)


def _agreement(row: dict[str, Any]) -> str:
    like = row.get("like", {})
    if "differing" in like:
        return f"{like['differing'] / like['expert_weights']:.3%} of the masks"
    return f"{1 - like['shared'] / like['matrices']:.1%} of the experts" if "matrices" in like else ""


def _quality(rows: Rows) -> list[str]:
    lines = ["| | perplexity | zeros | unlike moesparse's | weights missing on load |", "|---|---|---|---|---|"]
    for name in _names(rows, "quality"):
        found = _of(rows, "quality", name)
        if not found:
            lines.append(f"| {name} | failed | | | |")
            continue
        values = [row["perplexity"] for row in found]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 and name != "dense" else ""
        lines.append(
            f"| {name} | {statistics.mean(values):.2f}{spread} | {_zeros(found[0])} | {_agreement(found[0])} "
            f"| {found[0]['missing'] or ''} |"
        )
    return lines


def _cost(rows: Rows) -> list[str]:
    lines = [
        "| | CPU seconds | between load and save | seconds | peak MB | unlike moesparse's |",
        "|---|---|---|---|---|---|",
    ]
    for name in _names(rows, "cost"):
        found = _of(rows, "cost", name)
        if not found:
            lines.append(f"| {name} | failed | | | | |")
            continue
        seconds, cpu, inside = (_range(found, key) for key in ("seconds", "cpu_seconds", "prune_cpu_seconds"))
        peak = _median(found, "peak_bytes")
        agreement = next((_agreement(row) for row in found if "like" in row), "")
        lines.append(
            f"| {name} | {cpu} | {inside} | {seconds} | {_number(None if peak is None else peak / 1e6, 0)} "
            f"| {agreement} |"
        )
    return lines


def goals(rows: Rows) -> list[dict[str, Any]]:
    """What was aimed at against what was measured: {"goal", "value", "wanted", "met"}; unmeasured ones are left out.

    Against the peer's fair setting, and against its defaults. Speed is that of CPU seconds: on one thread they are the
    seconds of a machine with nothing else to do, and a busy one adds little to them.
    """
    found: list[dict[str, Any]] = []

    def compare(goal: str, key: str, ours: str, peer: str, wanted: float) -> None:
        mine, theirs = (_median(_of(rows, "cost", name), key) for name in (ours, peer))
        if mine and theirs:
            value = theirs / mine
            found.append({"goal": f"{goal} {peer}", "value": value, "wanted": wanted, "met": value >= wanted})

    for how in ("experts, routed", "defaults"):
        peer = f"{PEER} wanda, {how}"
        compare("2:4, times as fast as", "cpu_seconds", OURS, peer, 3.0)
        compare("2:4, a part of the peak memory of", "peak_bytes", OURS, peer, 2.0)
    for how in ("routed", "defaults"):
        compare("expert removal, times as fast as", "cpu_seconds", OURS_EXPERTS, f"{PEER} reap, {how}", 3.0)
    drawn: dict[str, dict[int, float]] = {}
    for row in _of(rows, "quality"):
        if row["task"] == "2:4":
            drawn.setdefault(row["contender"], {})[row["seed"]] = row["perplexity"]
    peers = [name for name in drawn if name.startswith(PEER)]
    best = min(peers, key=lambda name: statistics.mean(drawn[name].values()), default="")
    for name in ("moesparse default", "moesparse sparsegpt + obs"):
        seeds = drawn.get(best, {}).keys() & drawn.get(name, {}).keys()
        if seeds:  # those that both were measured with
            theirs, mine = (statistics.mean(drawn[each][seed] for seed in seeds) for each in (best, name))
            value = theirs / mine
            goal = f"2:4, perplexity of {best} over that of {name}"
            found.append({"goal": goal, "value": value, "wanted": 1.0, "met": value > 1.0})
    return found


def show(rows: Rows) -> str:
    """Tables, goals and failures."""
    lines: list[str] = []
    if any(row["part"] == "quality" for row in rows):
        lines += [*_quality(rows), ""]
    if any(row["part"] == "cost" for row in rows):
        lines += [*_cost(rows), ""]
    aimed = goals(rows)
    if aimed:
        lines += ["| goal | measured | wanted | |", "|---|---|---|---|"]
        for goal in aimed:
            met = "met" if goal["met"] else "**missed**"
            lines.append(f"| {goal['goal']} | {goal['value']:.2f} | {goal['wanted']:g} | {met} |")
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['part']} {row['contender']} failed: {row['reason']}")
    return "\n".join(lines)


def draw(rows: Rows, path: Path) -> None:
    """Bars of perplexity, CPU seconds and peak memory; what has no rows is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.figures import COLOURS

    panels = [
        ("quality", "perplexity", 1.0, "held-out perplexity, embedded model"),
        ("cost", "cpu_seconds", 1.0, "CPU seconds, synthetic model"),
        ("cost", "peak_bytes", 1e6, "peak memory over the imports, MB"),
    ]
    panels = [each for each in panels if _of(rows, each[0])]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 5.0), squeeze=False)
    for axis, (part, key, unit, title) in zip(axes[0], panels, strict=True):
        # a folder whose experts are drawn at random has a perplexity that would leave nothing else to see
        whole = {row["contender"] for row in _of(rows, part) if not row.get("missing")}
        names = [name for name in _names(rows, part) if name in whole]
        values = [(_median(_of(rows, part, name), key) or 0.0) / unit for name in names]
        bars = axis.barh(range(len(names)), values, color=[COLOURS[_side(name)] for name in names])
        labels = [_number(value, 0 if value >= 100 else 1) for value in values]
        axis.bar_label(bars, labels=labels, fontsize=8, padding=3)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
    row = rows[-1]
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.text(
        0.01, 0.01, f"{row['cpu']}, one thread, float32, torch {row['torch']}, commit {row['commit']}", fontsize=7
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _side(name: str) -> int:
    return 0 if name.startswith("moesparse") else 1 if name.startswith(PEER) else 2
