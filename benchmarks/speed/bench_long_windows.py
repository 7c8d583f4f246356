"""Peak memory of pruning on long windows: the same tokens in a batch, in windows of 512 up to 16384.

    python -m benchmarks.speed.bench_long_windows           # two CPU minutes
    python -m benchmarks.speed.bench_long_windows --table   # from the result file

A synthetic Mixtral of two layers (random weights, bf16) is pruned to 2:4 by moe-pruner, layer by layer, on 32768 tokens
of which 16384 are run at once, so that the windows alone differ. The peak is what the run adds to the resident memory
of its process, as in bench_memory.py. One mask of 16384 x 16384 for one head would be 268 MB in bytes and 1074 MB in
float32; with attention in memory that grows with the length the peak stays what it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from benchmarks.speed.bench_memory import measure
from benchmarks.speed.common import RESULTS
from benchmarks.speed.synthetic import make_checkpoint
from moesparse.benchmarking import environment

TOKENS, AT_ONCE = 32_768, 16_384
LENGTHS = (512, 2048, 8192, 16_384)
RULES = {"weights": "2:4", "saliency": "moe-pruner", "update": "none"}
HIDDEN, INTERMEDIATE = 256, 512


def show(rows: list[dict[str, float]]) -> None:
    """Peak by length."""
    print("| windows | at once | peak | of that at the shortest | CPU s |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {TOKENS // row['length']} x {row['length']} | {AT_ONCE // row['length']} | {row['peak'] / 1e6:.0f} MB "
            f"| {row['peak'] / rows[0]['peak']:.2f} | {row['seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help=f"that divide {AT_ONCE}")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "cpu" / "bench_long_windows.json")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of the result file")
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.output.read_text())["rows"])
        return
    rows = []
    with tempfile.TemporaryDirectory() as work:
        source, tiny, out = (Path(work) / name for name in ("model", "tiny", "out"))
        make_checkpoint(tiny, 2, 128, 256)
        make_checkpoint(source, 2, HIDDEN, INTERMEDIATE)
        for length in options.lengths:
            text = (TOKENS // length, length, AT_ONCE // length)
            rows.append({"length": length, **measure(source, tiny, out, RULES, text, whole=False)})
            shutil.rmtree(out)
            shutil.rmtree(f"{out}-tiny")
    show(rows)
    result = {"benchmark": "bench_long_windows", "environment": environment(torch.device("cpu")), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
