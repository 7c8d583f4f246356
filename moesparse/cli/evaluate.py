"""`moesparse eval MODEL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moesparse.cli import options
from moesparse.cli.console import print_json, quiet_libraries, with_schema
from moesparse.cli.options import SCORED, check_output_file, model_source, option, resolve_device
from moesparse.cli.text import EMBEDDED_LENGTH, embedded_texts, held_out_texts, tell_embedded
from moesparse.cli.voice import shown_progress
from moesparse.errors import UsageError
from moesparse.progress import ProgressEvent

_TASKS = "Tasks"


def evaluate(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE.txt, .jsonl or .parquet (field 'text'), in gzip too, or a datasets name. FILE=NAME names it. "
            "Repeat."
        ),
    ] = None,
    chat: options.ScoredChat = False,
    length: options.ScoredLength = None,
    stride: Annotated[
        int | None,
        option(SCORED, "Tokens from one window's start to the next; the window's length if left out.", min=1),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of text, tasks of lm-eval, joined by commas: its own, 'demo' (about the embedded held-out "
            "text, needs no network) or 'paper' (the nine of arXiv 2410.12013). Repeat."
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        option(_TASKS, "A folder with lm-eval task files of your own. Python functions they name are run."),
    ] = None,
    num_fewshot: Annotated[
        int | None, option(_TASKS, "Examples before each question of a task; the task's own if left out.", min=0)
    ] = None,
    limit: Annotated[int | None, option(_TASKS, "Only the first questions of each task.", min=1)] = None,
    seed: Annotated[int, option(_TASKS, "Seed of the choice of examples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows, or answers to a task, in one forward.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    r"""Measure a model, packed or dense: perplexity and bits per byte on text, or accuracy on tasks of lm-eval.

    On text, every window is scored on its own and its first token is not scored; the last partial window is dropped.
    Figures compare only at equal window, stride and text; across tokenizers compare bits per byte. Tasks need the
    extra moesparse\[eval].

    Examples:

      moesparse eval demo

      moesparse eval out/olmoe --text wikitext:wikitext-2-raw-v1:test --length 2048 --json

      moesparse eval out/demo-2to4 --tasks demo_continuation

      moesparse eval out/olmoe --tasks paper --batch-size 16 -o olmoe.json
    """
    _check_kind(
        tasks is not None,
        text_options={"--text": text, "--chat": chat or None, "--length": length, "--stride": stride},
        task_options={"--tasks-path": tasks_path, "--num-fewshot": num_fewshot, "--limit": limit},
    )
    if output is not None:
        check_output_file("--output", output)
    if tasks is not None:
        names = [name.strip() for argument in tasks for name in argument.split(",") if name.strip()]
        shown = {"num_fewshot": num_fewshot, "limit": limit, "seed": seed}
        values = ask(model, names, path=tasks_path, batch_size=batch_size, device=device, **shown)
    else:
        if not text and embedded_texts("heldout", source := model_source(model)):
            tell_embedded("--text", source)
        values = measure(model, text, chat=chat, length=length, stride=stride, batch_size=batch_size, device=device)
    # shown first: a file that cannot be written after all does not lose what was measured
    kind = "eval" if tasks is None else "eval.tasks"
    if as_json:
        print_json(kind, values)
    elif tasks is not None:
        _show_tasks(values)
    else:
        _show_text(values)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(with_schema(kind, {"model": model} | values), indent=2) + "\n")


def _check_kind(asks: bool, text_options: dict[str, Any], task_options: dict[str, Any]) -> None:
    """Options of one kind of measurement go with it alone."""
    strangers = [option for option, value in (text_options if asks else task_options).items() if value is not None]
    if strangers:
        raise UsageError(f"{', '.join(strangers)} must {'not ' if asks else ''}be given with --tasks")


def _show_text(values: dict[str, Any]) -> None:
    from moesparse.evaluate.on_text import Protocol

    protocol = Protocol(**values["protocol"])
    table = Table(title=str(protocol))
    table.add_column("text")
    for name in ("perplexity", "bits/byte", "tokens"):
        table.add_column(name, justify="right")
    for row in values["files"]:
        table.add_row(row["name"], *_cells(row))
    table.add_row("all", *_cells(values), style="bold")
    Console().print(table)


def _show_tasks(values: dict[str, Any]) -> None:
    table = Table(title=f"lm-eval {values['lm_eval']}" + (f", first {values['limit']}" if values["limit"] else ""))
    table.add_column("task")
    table.add_column("metric")
    for name in ("value", "+-", "questions", "shots"):
        table.add_column(name, justify="right")
    for task in values["tasks"]:
        label = "  " * task["depth"] + task["name"].rpartition("::")[2]
        counts = (f"{task['samples']:,}", "" if task["shots"] is None else str(task["shots"]))
        for metric, value in task["metrics"].items() or [("", None)]:
            error = task["stderr"].get(metric)
            figures = ("" if value is None else f"{value:.4f}", "" if error is None else f"{error:.4f}")
            table.add_row(label, metric, *figures, *counts)
            label, counts = "", ("", "")
    if values["paper_mean"] is not None:
        table.add_row("mean of the nine", "acc", f"{values['paper_mean']:.4f}", "", "", "", style="bold")
    Console().print(table)


def ask(
    model: str,
    names: list[str],
    *,
    path: Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """What MODEL answers to tasks, as `moesparse eval --tasks --json` prints it.

    Args:
        model: MODEL of the command line.
        names: names of tasks.
        path: a folder of task files.
        batch_size: answers in one forward.
        device: argument of --device.
        options: others of `moesparse.evaluate.tasks`.

    Raises:
        UsageError: an unknown task. CheckpointError: no model, no tokenizer. MoESparseError: a task cannot be loaded.
    """
    from moesparse.evaluate.on_tasks import load_tasks, tasks

    target = resolve_device(device)
    with quiet_libraries(), shown_progress() as progress:
        progress(ProgressEvent(f"ask {', '.join(names)}", 0, 1))
        found = load_tasks(names, path)
        network, tokenizer = _load(model, target)
        return tasks(network, tokenizer, found, batch_size=batch_size, **options).as_dict()


def _load(model: str, device: Any) -> tuple[Any, Any]:
    """Model and tokenizer, on the device, or on a GPU when there is one."""
    import torch

    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.pretrained import check_model_folder, load_model
    from moesparse.models.tokenizer import load_tokenizer

    folder = local_folder(model_source(model))
    check_model_folder(folder)
    # before the weights, which take longer
    tokenizer = load_tokenizer(folder)
    network = load_model(folder)
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda")
    return network if device is None else network.to(device), tokenizer


def measure(
    model: str,
    text: list[str] | None,
    *,
    chat: bool = False,
    length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity of MODEL as `moesparse eval --json` prints it: over all texts, per text, and the protocol.

    Args:
        model: MODEL of the command line.
        text: FILE=NAME arguments; None takes the embedded texts where they fit the tokenizer.
        chat: argument of --chat.
        length: tokens in a window; 2048, or 256 for the embedded texts, when None.
        stride: tokens from one window's start to the next; `length` when None.
        batch_size: windows in one forward.
        device: argument of --device.

    Raises:
        UsageError: no text, or one that is no file and no datasets name. CheckpointError: no model, no tokenizer.
    """
    from moesparse.evaluate.on_text import perplexity_of_files

    target = resolve_device(device)
    source = model_source(model)
    sources = held_out_texts(text, source)
    if text is None and length is None:
        length = EMBEDDED_LENGTH
    with quiet_libraries(), shown_progress() as progress:
        network, tokenizer = _load(model, target)
        result = perplexity_of_files(
            network,
            tokenizer,
            [one.path for one in sources],
            chat=chat,
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
