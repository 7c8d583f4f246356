"""Words for a person, results for a program: the console, JSON, progress bars, sizes."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from moesparse.progress import Progress, ProgressEvent

__all__ = ["console", "format_bytes", "paragraphs", "print_json", "progress_bar", "quiet_libraries"]

console = Console(stderr=True)
"""Words for a person: progress, tables of a run, errors."""


def paragraphs(text: str | None) -> str:
    """A help text whose lines are joined to paragraphs, to be folded where the terminal ends."""
    return re.sub(r"(\S)\n(?=\S)", r"\1 ", inspect.cleandoc(text or ""))


def print_json(value: Any) -> None:
    """The one result of a --json run, alone on standard output."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A progress bar with the step's name, tokens/s and time left, on standard error."""
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None, speed="")
        started = time.perf_counter()
        told = False

        def show(event: ProgressEvent) -> None:
            nonlocal told
            if event.memory and not told:
                bars.console.print(f"second moments of the experts take {format_bytes(event.memory)} at a time")
                told = True
            rate = event.tokens / max(time.perf_counter() - started, 1e-9)
            bars.update(
                task,
                description=event.stage,
                completed=event.done,
                total=event.total,
                speed=f"{rate:,.0f} tokens/s" if event.tokens else "",
            )

        yield show


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' own bars and warnings out of our output."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


def format_bytes(count: int) -> str:
    """12.3 GiB, 4.0 MiB: three digits and a binary unit."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
