"""moesparse and its peers on a CPU, side by side: quality, seconds, peak memory, and what each leaves undone.

    python -m benchmarks.peers                      # everything; `make peers` is the same
    python -m benchmarks.peers --parts cost --contenders "moesparse moe-pruner" "plain wanda"
    python -m benchmarks.peers --table              # measure nothing; table, goals and figure from what was measured
    python -m benchmarks.peers --quick --results out/peers    # tiny, our own environment only: it runs

A peer's environment is made when it is missing (environment.py). Every contender runs from folder to folder in a
process of its own, on one thread, with the same windows, 8 of them in a forward: loading and saving count, imports do
not (a small model is pruned first). Peak memory is what the run adds to the resident memory of the process. Both models
are float32: products in bf16 are many times slower on a CPU without instructions for them, and all would measure
that. What comes out is loaded by plain transformers and looked at: missing weights, zeros, masks.

Quality: the embedded model, 160 of its 242 calibration windows, one draw for each seed; held-out perplexity of
moesparse.evaluate, 24 windows of 256 tokens a domain, geometric mean over six domains. Cost: a synthetic Mixtral of 4
layers of 8 experts of 1024 x 2048, random weights, 32 random windows of 256 tokens. Rows
are written as they are measured, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.audit import experts_shared, load, mask_difference, zeros_by_part
from benchmarks.peers.contenders import CONTENDERS, Contender
from benchmarks.peers.environment import ROOT, python_of
from benchmarks.peers.table import draw, show
from benchmarks.results import RESULTS, ResultFile
from benchmarks.speed.bench_prune import hardware
from benchmarks.speed.synthetic import make_checkpoint, random_windows
from benchmarks.studies.testbed import open_testbed
from moesparse import demo

BATCH = 8
LENGTH = 256
COST_WINDOWS = 32
WINDOWS = 160
HELDOUT = 24
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Failed(Exception):
    """A contender that ended with an error; the message is its last line."""


@dataclass
class Part:
    """One model, and the folders of a run.

    Attributes:
        name: "quality" or "cost".
        shape: name of the model.
        source: its folder.
        work: for what comes out.
        warm_up: the part of a job that is not counted.
        limit: held-out windows of a domain.
        quick: few windows.
    """

    name: str
    shape: str
    source: Path
    work: Path
    warm_up: dict[str, Any]
    limit: int
    quick: bool

    def windows(self, seed: int) -> Tensor:
        """Of one draw; the windows of the synthetic model are the same every time."""
        if self.name == "cost":
            return random_windows(BATCH if self.quick else COST_WINDOWS, LENGTH)
        every = demo.windows("calibration")
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        return every[chosen[: BATCH if self.quick else WINDOWS]]

    def out(self, contender: Contender, seed: int) -> Path:
        return self.work / f"{contender.name.replace(' ', '_')}-{seed}"

    def run(self, contender: Contender, seed: int) -> dict[str, Any]:
        """Do the contender's job; what its process measured.

        Raises:
            Failed: the process ended with an error.
        """
        out, file = self.out(contender, seed), self.work / f"windows-{seed}.pt"
        torch.save(self.windows(seed), file)
        shutil.rmtree(out, ignore_errors=True)
        warm_up = {**self.warm_up, "out": str(self.work / "warm-up")}
        shutil.rmtree(warm_up["out"], ignore_errors=True)
        job = {
            "source": str(self.source),
            "out": str(out),
            "windows": str(file),
            "batch_size": BATCH,
            "options": contender.options,
            "warm_up": warm_up,
            "look": self.name == "quality" and seed == 0,
        }
        path = [str(ROOT), str(ROOT / "kernels")] if contender.peer is None else [str(ROOT)]
        done = subprocess.run(
            [python_of(contender.peer), "-m", contender.module, json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(path)},
        )
        if done.returncode:
            raise Failed((done.stderr.strip() or f"ended with code {done.returncode}").splitlines()[-1])
        return json.loads(done.stdout.splitlines()[-1])

    def looked_at(self, contender: Contender, seed: int) -> dict[str, Any]:
        """What the contender's folder is to plain transformers."""
        dense = contender.task == "dense"
        found = load(self.source if dense else self.out(contender, seed))
        row: dict[str, Any] = {"missing": len(found.missing), "unexpected": len(found.unexpected)}
        row["zeros"] = zeros_by_part(found.model)
        if contender.like is not None:
            like = next(other for other in CONTENDERS if other.name == contender.like)
            if not self.out(like, seed).is_dir():
                self.run(like, seed)
            compare = experts_shared if contender.task == "experts" else mask_difference
            row["like"] = {"contender": like.name, **compare(found.model, load(self.out(like, seed)).model)}
        if self.name == "quality":
            testbed = open_testbed()
            row["perplexity"] = testbed.score(found.model.float(), testbed.heldout(self.limit)).perplexity
        return row


def prepare(name: str, work: Path, quick: bool) -> Part:
    """Write the model of a part, and the small one that is pruned first."""
    work.mkdir(parents=True)
    source, small = work / "model", work / "small"
    make_checkpoint(small, 2, 128, 256, dtype=torch.float32)
    if name == "quality":
        model, tokenizer = demo.load()
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    elif quick:
        make_checkpoint(source, 2, 128, 256, dtype=torch.float32)
    else:
        make_checkpoint(source, 4, 1024, 2048, dtype=torch.float32)
    for folder in (small, source):
        # llm-compressor wants a tokenizer in the folder; the windows are token ids already
        for file in demo.model_path().glob("tokenizer*"):
            shutil.copy(file, folder)
    torch.save(random_windows(BATCH, LENGTH), work / "small.pt")
    warm_up = {"source": str(small), "windows": str(work / "small.pt")}
    shape = "embedded" if name == "quality" else "synthetic"
    return Part(name, shape, source, work, warm_up, 1 if quick else HELDOUT, quick)


def measure_part(part: Part, contenders: list[Contender], seeds: int, file: ResultFile, again: bool) -> None:
    """Every contender at every seed, row by row."""
    for seed in range(seeds):
        for contender in contenders:
            key = {"part": part.name, "shape": part.shape, "seed": seed, "contender": contender.name}
            known = [row for row in file.rows if all(row.get(name) == key[name] for name in key)]
            if part.name not in contender.parts or (known and known[0]["status"] == "ok" and not again):
                continue
            row = {**key, "task": contender.task, "dtype": "float32", "tokens": part.windows(seed).numel()}
            try:
                measured = {} if contender.task == "dense" else part.run(contender, seed)
                row |= {"status": "ok", **measured}
                if part.name == "quality" or seed == 0:  # a repeat gives the same folder
                    row |= part.looked_at(contender, seed)
            except Failed as error:
                row |= {"status": "failed", "reason": str(error)}
            file.put([row])
            said = {name: row[name] for name in ("seconds", "cpu_seconds", "perplexity", "reason") if name in row}
            print(f"{part.name} {seed} {contender.name}: {said}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("quality", "cost"), default=["quality", "cost"])
    parser.add_argument("--contenders", nargs="+", choices=[each.name for each in CONTENDERS], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration windows, for quality")
    parser.add_argument("--repeats", type=int, default=2, help="runs, for cost")
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny, only what needs no peer; needs --results")
    parser.add_argument("--results", type=Path, help="folder of peers.json and peers.png (benchmarks/results/cpu)")
    options = parser.parse_args(arguments)
    if options.quick and options.results is None:
        raise SystemExit("--quick needs --results FOLDER: its numbers do not belong in benchmarks/results")
    torch.set_num_threads(1)
    folder = options.results or RESULTS / "cpu"
    file = ResultFile(folder / "peers.json", hardware(torch.device("cpu")))
    chosen = [each for each in CONTENDERS if options.contenders is None or each.name in options.contenders]
    if options.quick and options.contenders is None:
        chosen = [each for each in chosen if each.peer is None]
    if not options.table:
        for contender in chosen:
            python_of(contender.peer)  # a peer that cannot be installed is known before anything is measured
        for name in options.parts:
            with tempfile.TemporaryDirectory(prefix="peers-") as work:
                part = prepare(name, Path(work) / name, options.quick)
                times = 1 if options.quick else options.seeds if name == "quality" else options.repeats
                measure_part(part, chosen, times, file, options.again)
    print(show(file.rows))
    draw(file.rows, folder / "peers.png")


if __name__ == "__main__":
    main()
