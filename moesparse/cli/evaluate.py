"""`moesparse eval MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moesparse.cli.common import (
    embedded_texts,
    model_source,
    print_json,
    progress_bar,
    quiet_libraries,
    resolve_device,
)
from moesparse.errors import CheckpointError, UsageError

EMBEDDED_LENGTH = 256
"""Window of the embedded model's own figures; it was trained on it."""


def evaluate(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE.txt, .jsonl or .parquet (field 'text'), or a datasets name. FILE=NAME names it. Repeat."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens in a window (2048; 256 for the embedded text); bounded by the context.", min=2),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window's start to the next; the window's length if left out.", min=1),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity and bits per byte of a model on text, per file and over all.

    Every window is scored on its own and its first token is not scored; the last partial window is dropped. Figures
    compare only at equal window, stride and text; across tokenizers compare bits per byte.

    Examples:

      moesparse eval demo

      moesparse eval out/olmoe --text wikitext:wikitext-2-raw-v1:test --length 2048 --json
    """
    values = measure(model, text, length=length, stride=stride, batch_size=batch_size, device=device)
    if as_json:
        print_json(values)
        return
    from moesparse.evaluate import Protocol

    protocol = Protocol(**values["protocol"])
    table = Table(title=str(protocol))
    table.add_column("text")
    for name in ("perplexity", "bits/byte", "tokens"):
        table.add_column(name, justify="right")
    for row in values["files"]:
        table.add_row(row["name"], *_cells(row))
    table.add_row("all", *_cells(values), style="bold")
    Console().print(table)


def measure(
    model: str,
    text: list[str] | None,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity of MODEL as `moesparse eval --json` prints it: over all texts, per text, and the protocol.

    Args:
        model: MODEL of the command line.
        text: FILE=NAME arguments; None takes the embedded texts where they fit the tokenizer.
        length: tokens in a window; 2048, or 256 for the embedded texts, when None.
        stride: tokens from one window's start to the next; `length` when None.
        batch_size: windows in one forward.
        device: argument of --device.

    Raises:
        UsageError: no text, or one that is no file and no datasets name. CheckpointError: no model, no tokenizer.
    """
    import torch

    from moesparse.checkpoint import load_pretrained
    from moesparse.evaluate import perplexity_of_files
    from moesparse.text import parse_source

    target = resolve_device(device)
    source = model_source(model)
    sources = [parse_source(argument) for argument in text or embedded_texts("heldout", source)]
    if not sources:
        raise UsageError("--text must name a text (.txt, .jsonl, .parquet or a datasets name), got none")
    if text is None and length is None:
        length = EMBEDDED_LENGTH
    for one in sources:
        # a wrong name should not cost the loading of a model
        if not Path(one.path).exists() and ":" not in one.path:
            raise UsageError(f"--text must be a file or a datasets name such as NAME:SPLIT, got {one.path!r}")
    with quiet_libraries(), progress_bar() as progress:
        network, tokenizer = load_pretrained(source)
        if tokenizer is None:
            raise CheckpointError(f"MODEL must hold a tokenizer, got {model} without one")
        if target is None and torch.cuda.is_available():
            target = torch.device("cuda")
        if target is not None:
            network.to(target)
        result = perplexity_of_files(
            network,
            tokenizer,
            [one.path for one in sources],
            length=length or 2048,
            stride=stride,
            batch_size=batch_size,
            progress=progress,
        )
    values = result.as_dict()
    for one, row in zip(sources, values["files"], strict=True):
        row["name"] = one.domain
    return values


def _cells(row: dict[str, Any]) -> list[str]:
    bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    return [f"{row['perplexity']:.3f}", bits, f"{row['tokens']:,}"]
