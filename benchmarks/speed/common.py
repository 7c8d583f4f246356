"""What every script here does first: read its arguments, find the device, measure the ceilings."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.shapes import choose_shapes
from moesparse.benchmarking import Ceilings, Shape, environment, measure_ceilings

__all__ = ["DEVICE_LOST", "Session", "end_with", "parser", "start"]

DEVICE_LOST = 70
"""Exit code of a script whose device answers no more: a process of its own can go on."""


@dataclass(frozen=True)
class Session:
    """One run of a script.

    Attributes:
        device: where everything runs.
        dry: tiny shapes and the reference backend on a CPU.
        shapes: what to measure.
        ceilings: of the device, measured now.
        environment: the record that enters every row.
        folder: results/<gpu>.
        again: measure also what this commit has measured already.
        budget: seconds for the timed runs of one contender.
    """

    device: torch.device
    dry: bool
    shapes: list[Shape]
    ceilings: Ceilings
    environment: dict[str, Any]
    folder: Path
    again: bool
    budget: float

    def file(self, name: str) -> ResultFile:
        return ResultFile(self.folder / f"{name}.json", self.environment)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all scripts share."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", nargs="*", help="names in shapes.py; all when left out")
    arguments.add_argument("--results", type=Path, help="folder of the results (benchmarks/results)")
    arguments.add_argument("--dry", action="store_true", help="tiny shapes and plain torch on the CPU; needs --results")
    arguments.add_argument("--again", action="store_true", help="measure also what this commit has measured already")
    return arguments


def start(options: argparse.Namespace) -> Session:
    """Check the machine and measure its ceilings.

    Raises:
        SystemExit: no CUDA device and no --dry, or a dry run that would write among real results.
    """
    if options.dry and options.results is None:
        raise SystemExit("--dry needs --results FOLDER: its numbers do not belong in benchmarks/results")
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device, and these are GPU benchmarks; --dry runs them tiny on a CPU")
    device = torch.device("cpu" if options.dry else f"cuda:{torch.cuda.current_device()}")
    shapes = choose_shapes(options.shapes, options.dry)
    ceilings = measure_ceilings(device)
    # after the ceilings, so that the clocks are those of a card at work
    record = environment(device) | ceilings.as_row()
    return Session(
        device=device,
        dry=options.dry,
        shapes=shapes,
        ceilings=ceilings,
        environment=record,
        folder=device_folder(options.results or RESULTS, device),
        again=options.again,
        budget=0.002 if options.dry else 0.06,
    )


def end_with(run: Callable[[], bool]) -> None:
    """End the process with 1 where a script's work was not all fine, and with DEVICE_LOST where it raises that."""
    try:
        fine = run()
    except SystemExit as end:
        if end.code == DEVICE_LOST:
            # the device's objects would abort an orderly end
            sys.stdout.flush()
            os._exit(DEVICE_LOST)
        raise
    if not fine:
        sys.exit(1)
