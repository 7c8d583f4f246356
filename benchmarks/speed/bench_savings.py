"""What each change for speed was worth: the commit before it and the commit itself prune one checkpoint in turn.

    python -m benchmarks.speed.bench_savings                  # in a clone with its history, 10 minutes
    python -m benchmarks.speed.bench_savings --repeats 1 --changes refit -o out/savings.json

The code of each commit is checked out beside the clone and runs in processes of its own, before and after in
alternation, on the small size of bench_cost.py (a synthetic bf16 Mixtral, 8 windows of 256 tokens). Seconds are CPU
seconds of one thread, the lowest of the repeats, from folder to folder, without starting Python and importing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS
from benchmarks.speed.bench_cost import BATCH, CPU_SIZES, LENGTH, RECIPES
from benchmarks.speed.synthetic import make_checkpoint, random_windows
from moesparse.benchmarking import environment

ROOT = Path(__file__).resolve().parents[2]
SIZE = "small"
WINDOWS = 8
# by name: commit, recipes whose time it was about
CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16 products by way of float32": ("0ef5a27", ("moe-pruner, none", "moe-pruner, rescale")),
    "2:4 by a column scale, sparsegpt with obs in one walk": ("beb7510", ("moe-pruner, none", "gated-sparsegpt, obs")),
    "refit by one factorisation, in float32": ("9206821", ("reap 25%, refit",)),
    "a pass that nobody reads leaves out the last matrix": ("0dec59b", ("moe-pruner, none",)),
}
# runs in the code of any of the commits: what it calls has stayed as it is
WORKER = """
import json, sys, time
import torch, moesparse
import transformers.models.mixtral.modeling_mixtral
source, out, windows, recipe, batch = sys.argv[1:]
torch.set_num_threads(1)
ids, recipe = torch.load(windows), moesparse.Recipe(**json.loads(recipe))
began = time.process_time()
moesparse.prune_checkpoint(source, out, ids, recipe, batch_size=int(batch), device="cpu")
print(json.dumps([moesparse.__file__, time.process_time() - began]))
"""


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the clone must hold the commits before and after each change, got: {done.stderr.strip()}")
    return done.stdout.strip()


def seconds_of(code: Path, source: Path, windows: Path, recipe: dict[str, Any]) -> float:
    """CPU seconds of one run of the code that lies in a folder."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as out:
        words = [str(source), str(Path(out, "pruned")), str(windows), json.dumps(recipe), str(BATCH)]
        found = subprocess.run(
            [sys.executable, "-c", WORKER, *words],
            cwd=out,
            env=os.environ | threads | {"PYTHONPATH": f"{code}{os.pathsep}{code / 'kernels'}"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    file, seconds = json.loads(found.stdout.splitlines()[-1])
    if not Path(file).is_relative_to(code):
        raise SystemExit(f"the code of {code} must run, got {file}")
    return seconds


def measure(changes: list[str], repeats: int, out: Path) -> None:
    """Time both sides of every change, and write the rows as they come."""
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        layers, hidden, intermediate, experts, top_k, heads = CPU_SIZES[SIZE]
        make_checkpoint(work / "model", layers, hidden, intermediate, experts=experts, top_k=top_k, heads=heads)
        torch.save(random_windows(WINDOWS, LENGTH["cpu"]), work / "windows.pt")
        for name in changes:
            after, recipes = CHANGES[name]
            commits = [git("rev-parse", "--short", f"{after}^"), after]
            try:
                for commit in commits:
                    git("worktree", "add", "--detach", str(work / commit), commit)
                for recipe in recipes:
                    taken: dict[str, list[float]] = {commit: [] for commit in commits}
                    for _ in range(repeats):
                        for commit in commits:
                            found = seconds_of(work / commit, work / "model", work / "windows.pt", RECIPES[recipe][0])
                            taken[commit].append(found)
                    rows = [row for row in rows if (row["change"], row["recipe"]) != (name, recipe)]
                    rows.append(
                        {"change": name, "recipe": recipe, "commits": commits, "seconds": list(taken.values())}
                        | environment(torch.device("cpu"))
                    )
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            finally:
                for commit in commits:
                    subprocess.run(["git", "worktree", "remove", "--force", str(work / commit)], cwd=ROOT, check=False)


def show(path: Path) -> None:
    """The table of docs/performance.md."""
    print("| change | recipe | before | after | ratio |")
    print("|---|---|---|---|---|")
    for row in json.loads(path.read_text())["rows"]:
        before, after = (min(seconds) for seconds in row["seconds"])
        print(f"| {row['change']} | {row['recipe']} | {before:.1f} | {after:.1f} | {before / after:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", nargs="*", default=[], metavar="WORD", help="those with a word in their name")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (3); 0 only prints the table")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / "cpu" / "savings.json")
    arguments = parser.parse_args()
    chosen = [name for name in CHANGES if not arguments.changes or any(word in name for word in arguments.changes)]
    if not chosen:
        raise SystemExit(f"--changes must name one of {', '.join(CHANGES)}, got {' '.join(arguments.changes)}")
    if arguments.repeats:
        measure(chosen, arguments.repeats, arguments.out)
    show(arguments.out)


if __name__ == "__main__":
    main()
