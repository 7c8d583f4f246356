"""moesparse, and the plain baselines, on one checkpoint, folder to folder: `serve` of benchmarks/peers/clock.py.

Options: "rule" for a baseline of plain.py; else "recipe", the fields of a moesparse.Recipe, and "whole", true for the
model loaded as a whole (`prune`) in place of layer by layer (`prune_checkpoint`, the way of the command line).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

import moesparse
from benchmarks.peers import plain
from benchmarks.peers.clock import Clock, serve
from moesparse.system.memory import bound_compiled_products


def run(job: dict[str, Any], clock: Clock) -> None:
    options, batch_size = job["options"], job["batch_size"]
    if "rule" in options:
        plain.run(job, clock)
        return
    recipe = moesparse.Recipe(**options["recipe"])
    windows = torch.load(job["windows"])
    if not options.get("whole"):
        moesparse.prune_checkpoint(job["source"], job["out"], windows, recipe, batch_size=batch_size)
        return
    model, _ = moesparse.load_pretrained(job["source"])
    report = clock.prune(lambda: moesparse.prune(model, windows, recipe, batch_size=batch_size))
    moesparse.save_pretrained(model, job["out"], recipe=report.recipe)


if __name__ == "__main__":
    torch.set_num_threads(1)
    bound_compiled_products()
    serve(run, {package.__name__: package.__version__ for package in (moesparse, transformers, torch)})
