"""`moesparse demo`: the embedded model pruned several ways, measured, saved, reloaded, and made to speak."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesparse.cli.console import console, print_json, quiet_libraries
from moesparse.cli.voice import shown_progress
from moesparse.progress import ProgressEvent

PATTERN = "2:4"
METHODS = (
    ("magnitude", "none"),
    ("wanda", "none"),
    ("moe-pruner", "none"),
    ("moe-pruner", "rescale"),
    ("moe-pruner", "least-squares"),
    ("gated-admm", "least-squares+rescale"),
    ("gated-admm", "asymmetric+tune"),
)
"""Mask and weight rules in the order of the table; the best one by held-out perplexity is saved."""

PROMPTS = {
    "scripture": "And the king said unto",
    "code": "def __init__(self, ",
    "novel": "She could not help",
}
LENGTH = 256
NEW_TOKENS = 24


def demo(
    output: Annotated[
        Path | None, typer.Option(help="New folder for the best pruned model; moesparse-demo, or the next free name.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Held-out windows of 256 tokens a domain; 0 takes all.", min=0)] = 32,
    seed: Annotated[int, typer.Option(help="Recorded with the run; every rule is deterministic.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Prune the small trained MoE inside this package to 2:4 in several ways and compare them on held-out text.

    Needs no download and no GPU. Every method is calibrated on the same text (from the training side of six domains);
    perplexity is measured on other documents, per domain and as their geometric mean. The best model is saved as an
    ordinary transformers checkpoint, loaded back, and continues a few lines beside the dense one.
    """
    from moesparse import demo as embedded
    from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
    from moesparse.evaluate.on_text import generate
    from moesparse.pruning.card import model_card
    from moesparse.pruning.recipe import Recipe
    from moesparse.pruning.run import prune
    from moesparse.system.folders import check_output_folder

    folder = check_output_folder(output if output is not None else _free_name(Path("moesparse-demo")))
    with quiet_libraries(), shown_progress() as progress:
        dense, tokenizer = embedded.load()
        calibration = embedded.windows("calibration", length=LENGTH)
        heldout = {
            domain: embedded.windows("heldout", domain, length=LENGTH)[: windows or None] for domain in embedded.DOMAINS
        }
        steps = len(METHODS) + 1
        progress(ProgressEvent("evaluate dense", 0, steps))
        reference = _measure(dense, heldout)
        methods: list[dict[str, Any]] = []
        best: tuple[float, Any, Any] = (math.inf, None, None)
        for number, (saliency, update) in enumerate(METHODS):
            progress(ProgressEvent(f"{saliency} + {update}", number + 1, steps))
            recipe = Recipe(weights=PATTERN, saliency=saliency, update=update, seed=seed)
            pruned = copy.deepcopy(dense)
            started = time.perf_counter()
            report = prune(pruned, None if saliency == "magnitude" else calibration, recipe)
            seconds = time.perf_counter() - started
            measured = _measure(pruned, heldout)
            methods.append({"saliency": saliency, "update": update, "pattern": PATTERN, **measured, "seconds": seconds})
            if measured["perplexity"] < best[0]:
                best = (measured["perplexity"], pruned, report)
        progress(ProgressEvent("save and reload the best", steps, steps))
        _, pruned, report = best
        # in float32, as it was measured: not as the embedded folder, edited, whose bf16 it would be stored in
        pruned.config._name_or_path = ""
        save_pretrained(
            pruned,
            folder,
            tokenizer=tokenizer,
            recipe=report.recipe,
            card=model_card("moesparse-demo", report),
            report=report.to_dict(),
        )
        reloaded, _ = load_pretrained(folder)
        lines = list(PROMPTS.values())
        texts = {
            "dense": generate(dense, tokenizer, lines, max_new_tokens=NEW_TOKENS),
            "pruned": generate(reloaded, tokenizer, lines, max_new_tokens=NEW_TOKENS),
        }
    result = {"dense": reference, "methods": methods, "output": str(folder)}
    if as_json:
        print_json("demo", result)
        return
    _show_table(result)
    _show_texts(texts, methods)
    console.print(
        f"\nsaved to {folder}: an ordinary transformers checkpoint, dense with zeros. Next:\n"
        f"  moesparse inspect {folder}\n"
        f"  moesparse eval {folder}\n"
        f"  moesparse prune YOUR_MODEL OUT --weights 2:4 --calibration YOUR_TEXT.jsonl",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _measure(model: Any, heldout: dict[str, Any]) -> dict[str, Any]:
    """{"perplexity": geometric mean over domains, "domains": {name: perplexity}}."""
    from moesparse.evaluate.on_text import perplexity

    domains = {domain: perplexity(model, ids, batch_size=16).perplexity for domain, ids in heldout.items()}
    mean = math.exp(sum(math.log(value) for value in domains.values()) / len(domains))
    return {"perplexity": mean, "domains": domains}


def _free_name(wanted: Path) -> Path:
    path, number = wanted, 2
    while path.exists():
        path, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return path


def _show_table(result: dict[str, Any]) -> None:
    domains = list(result["dense"]["domains"])
    # 80 columns wide, so that no terminal folds the numbers
    table = Table(
        title=f"held-out perplexity at {PATTERN}, lower is better",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("mask rule\n  weight rule", no_wrap=True)
    for name in ("mean", *domains, "s"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    table.add_row("dense", *_cells(result["dense"], domains), "", style="bold")
    lowest = min(method["perplexity"] for method in result["methods"])
    for method in result["methods"]:
        style = "green" if method["perplexity"] == lowest else None
        name = f"{method['saliency']}\n  {method['update']}"
        table.add_row(name, *_cells(method, domains), f"{method['seconds']:.0f}", style=style)
    Console().print(table)


def _cells(row: dict[str, Any], domains: list[str]) -> list[str]:
    return [f"{row['perplexity']:.2f}", *(f"{row['domains'][domain]:.2f}" for domain in domains)]


def _show_texts(texts: dict[str, list[str]], methods: list[dict[str, Any]]) -> None:
    best = min(methods, key=lambda method: method["perplexity"])
    table = Table(title="the same beginnings, continued greedily", show_lines=True)
    table.add_column("dense", ratio=1)
    table.add_column(f"{best['saliency']} + {best['update']} at {PATTERN}", ratio=1)
    for prompt, dense, pruned in zip(PROMPTS.values(), texts["dense"], texts["pruned"], strict=True):
        table.add_row(*(f"[bold]{escape(prompt)}[/]{escape(text)}" for text in (dense, pruned)))
    Console().print(table)
