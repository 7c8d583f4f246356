"""`make gpu`: prove, measure, tune and draw, in parts that each fit into ten minutes.

    make gpu                                    # all parts, in order
    make gpu PART="decode prefill" SHAPES=OLMoE-1B-7B
    make gpu PART=decode AGAIN=1                # measure again what this commit has measured
    make gpu DRY=1                              # on a CPU: plain torch, tiny shapes, results under out/

    tests      the gpu-marked tests, then compute-sanitizer's memcheck and racecheck on a few of them where it exists
    ceilings   copy bandwidth and bf16 matmul, with the record of the machine
    kernels    pruning, packing and unpacking against plain torch
    tune       launch sizes into kernels/moesparse_kernels/configs/<gpu>.json
    decode     the expert layer at batch 1-256
    prefill    the expert layer at 512-16k tokens
    sparse_mma the sparse tensor cores from Gluon: operand order, then a bound on what a kernel could reach
    dispatch   the backend by load, from decode and prefill, into the same table
    cost       pruning whole blocks of published shapes, folder to folder
    generate   tokens a second of a whole model, dense against packed
    figures    roofline and speed-ups, from the result files

Every part is a process of its own: one that fails, or loses the device, does not take the others along. Nothing needs
a network or an installation beyond torch, triton, transformers and pytest (matplotlib for the figures). The last lines
say which parts held. A run without git at hand takes the commit from $MOESPARSE_COMMIT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import parser, start
from benchmarks.results import RESULTS, device_folder

__all__ = ["PARTS", "main"]

ROOT = Path(__file__).resolve().parents[1]
# a few small shapes: every access of a kernel is checked, which is slow
_SANITIZED = "test_small_shapes and (bias or token) and bfloat16"
_SANITIZER_SECONDS = 150


def _python(*arguments: str, timeout: float | None = None, prefix: tuple[str, ...] = (), **environment: str) -> bool:
    command = [*prefix, sys.executable, *arguments]
    print("$", " ".join(command), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=timeout).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {timeout:.0f} s", flush=True)
        return False


def _tests(options: argparse.Namespace) -> bool:
    if options.dry:
        # no test can run: that all of them are found and import is what is left to see
        return _python("-m", "pytest", "tests", "benchmarks", "-m", "gpu", "-q", "--collect-only", "--no-summary")
    held = _python("-m", "pytest", "tests", "-m", "gpu", "-q", "-x" if options.first_failure else "--tb=short")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH: memory and race checks did not run")
        return held
    for tool in ("memcheck", "racecheck"):
        held &= _python(
            *("-m", "pytest", "tests/kernels/test_moe_gpu.py", "-m", "gpu", "-q", "-k", _SANITIZED),
            prefix=(sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"),
            timeout=_SANITIZER_SECONDS,
            # the caching allocator would hide an access beyond a tensor's end
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
    return held


def _ceilings(options: argparse.Namespace) -> bool:
    session = start(options)
    results = session.file("ceilings")
    results.put([{"part": "ceilings", "contender": "measured"}])
    print(json.dumps(results.rows[-1], indent=1))
    return True


def _script(module: str, *words: str) -> Callable[[argparse.Namespace], bool]:
    def run(options: argparse.Namespace) -> bool:
        arguments = ["-m", f"benchmarks.{module}", *words]
        if options.shapes:
            arguments += ["--shapes", *options.shapes]
        if options.results:
            arguments += ["--results", str(options.results)]
        arguments += ["--dry"] if options.dry else []
        arguments += ["--again"] if options.again else []
        return _python(*arguments)

    return run


def _figures(options: argparse.Namespace) -> bool:
    device = torch.device("cpu" if options.dry else f"cuda:{torch.cuda.current_device()}")
    return _python("-m", "benchmarks.figures", str(device_folder(options.results or RESULTS, device)))


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "tests": _tests,
    "ceilings": _ceilings,
    "kernels": _script("bench_kernels"),
    "tune": _script("tune", "launch"),
    "decode": _script("bench_layer", "decode"),
    "prefill": _script("bench_layer", "prefill"),
    "sparse_mma": _script("bench_sparse_mma"),
    "dispatch": _script("tune", "dispatch"),
    "cost": _script("bench_cost"),
    "generate": _script("bench_generate"),
    "figures": _figures,
}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="*", choices=PARTS, default=[], help="all when left out")
    options.add_argument("--first-failure", action="store_true", help="stop the tests at the first failure")
    chosen = options.parse_args(arguments)
    if not chosen.dry and not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device, and torch sees none; `make gpu DRY=1` runs it tiny on a CPU")
    if chosen.results is not None:
        chosen.results = chosen.results.resolve()
    held = {}
    for part in chosen.parts or PARTS:
        print(f"== {part}", flush=True)
        began = time.monotonic()
        held[part] = (PARTS[part](chosen), time.monotonic() - began)
    print("\npart       seconds  held")
    for part, (fine, seconds) in held.items():
        print(f"{part:<10} {seconds:>7.0f}  {'yes' if fine else 'NO'}")
    sys.exit(0 if all(fine for fine, _ in held.values()) else 1)


if __name__ == "__main__":
    main()
