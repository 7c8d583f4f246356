"""What a comparison has found, as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["show_comparison"]

# layers and tokens that are named on a terminal; the JSON has all
_LAYERS, _TOKENS = 8, 5
_WIDTH = 60


def show_comparison(found: Mapping[str, Any]) -> None:
    """Figures by text, routers by layer, continuations, the tokens that changed most, and what not to miss.

    Args:
        found: as `Comparison.as_dict` gives it.
    """
    out = Console()
    out.print(_by_text(found))
    out.print(_by_position(found))
    out.print(_routers(found["layers"]))
    if found["generation"] is not None:
        out.print(_continuations(found["generation"]))
    if found["changed"]:
        out.print("tokens that changed most", style="italic")
    for each in found["changed"][:_TOKENS]:
        out.print(_in_context(each), highlight=False, soft_wrap=not out.is_terminal)
    for sentence in found["warnings"]:
        out.print(f"[bold yellow]warning sign:[/] {escape(sentence)}", highlight=False, soft_wrap=not out.is_terminal)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    from moesparse.evaluate.divergence import format_perplexity

    kl, agreement, perplexity = row["kl"], row["agreement"], row["perplexity"]
    return [
        f"{kl['mean']:.4f}",
        f"{kl['p99']:.3f}",
        f"{agreement['top1']:.1%}",
        f"{agreement['top5']:.1%}",
        *(format_perplexity(perplexity[side]) for side in ("dense", "pruned")),
        f"{perplexity['ratio']:.3f}",
        f"{row['tokens']:,}",
    ]


_COLUMNS = ("KL", "p99", "top-1", "top-5", "dense", "pruned", "ratio", "tokens")


def _by_text(found: Mapping[str, Any]) -> Table:
    title = (
        f"{found['pruned']} beside {found['dense']}: KL(dense || pruned) in nats, windows of {found['window']} tokens"
    )
    table = _table(escape(title), "text", *_COLUMNS)
    for name, row in found["domains"].items():
        table.add_row(escape(name), *_cells(row))
    table.add_row("all", *_cells(found), style="bold", end_section=True)
    for kind in ("scripts", "languages"):
        for name, row in found[kind].items() if len(found[kind]) > 1 else ():
            table.add_row(f"{kind[:-1]} {escape(name)}", *_cells(row))
    return table


def _by_position(found: Mapping[str, Any]) -> Table:
    table = _table("by position in the window", "position", *_COLUMNS)
    for row in found["positions"]:
        table.add_row(f"{row['from']}-{row['to']}", *_cells(row))
    return table


def _routers(layers: list[dict[str, Any]]) -> Table:
    known = [row for row in layers if row["chosen"] is not None]
    shown = sorted(sorted(known, key=lambda row: row["chosen"])[:_LAYERS], key=lambda row: row["layer"])
    which = "" if len(shown) == len(layers) else f", the {len(shown)} of {len(layers)} layers that agree least"
    columns = ("same experts", "of those kept", "choices gone", "most of whom are taken over by")
    table = _table(f"routers, the share of the dense one's choices{which}", "layer", *columns)
    for row in shown:
        kept = "" if row["kept"] is None else f"{row['kept']:.1%}"
        table.add_row(str(row["layer"]), f"{row['chosen']:.1%}", kept, f"{row['gone']:.1%}", _takers(row["taken_over"]))
    return table


def _takers(gone: list[dict[str, Any]]) -> str:
    """Of the two experts with the most tokens, who took most of them."""
    most = sorted((each for each in gone if each["by"]), key=lambda each: -each["tokens"])[:2]
    return ", ".join(f"{each['expert']} → {each['by'][0][0]} ({each['by'][0][1]:.0%})" for each in most)


def _continuations(found: Mapping[str, Any]) -> Table:
    title = f"{found['prompts']} prompts of {found['prompt_tokens']} tokens, up to {found['new_tokens']} written after"
    table = _table(title, "", "end in a loop", "distinct 4-grams", "tokens", "stopped", "alike until")
    for kind in ("greedy", "sampled"):
        for side in ("dense", "pruned"):
            row = found[kind][side]
            alike = str(found[kind]["first_divergence"]) if kind == "greedy" and side == "pruned" else ""
            name = f"{kind}, {side}" if kind == "greedy" else f"at temperature {found['temperature']:g}, {side}"
            figures = (f"{row['distinct']:.1%}", f"{row['length']:.0f}", f"{row['stopped']:.1%}", alike)
            table.add_row(name, f"{row['loops']:.1%}", *figures)
    return table


def _in_context(each: Mapping[str, Any]) -> str:
    before = str(each["before"]).replace("\n", "⏎")[-_WIDTH:]
    tops = "; ".join(
        f"{side} " + ", ".join(f"{_quoted(token)} {p:.0%}" for token, p in each[side][:2])
        for side in ("dense", "pruned")
    )
    text = f"  {each['domain']}, KL {each['kl']:.2f}: ...{before}"
    return f"{escape(text)}[bold]{escape(str(each['token']))}[/]  ({escape(tops)})".replace("\n", "⏎")


def _quoted(token: Any) -> str:
    return repr(token) if isinstance(token, str) else str(token)
