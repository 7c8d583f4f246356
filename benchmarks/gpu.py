"""`make gpu`: prove, measure, tune and draw, in parts that each fit into ten minutes.

    make gpu                                    # all parts, in order
    make gpu PART="decode prefill" SHAPES=OLMoE-1B-7B
    make gpu PART=decode AGAIN=1                # measure again what this commit has measured
    make gpu LIMIT=540                          # after so many seconds stop what is at work and begin nothing more
    make gpu DRY=1                              # on a CPU: plain torch, tiny shapes, results under out/

    tests      the gpu-marked tests, several at a time where pytest-xdist is there
    ceilings   copy bandwidth and bf16 matmul, with the record of the machine
    kernels    pruning, packing and unpacking against plain torch
    tune       launch sizes into kernels/moesparse_kernels/configs/<gpu>.json
    decode     the expert layer at batch 1-256
    prefill    the expert layer at 512-16k tokens
    sparse_mma the sparse tensor cores from Gluon: operand order, then a bound on what a kernel could reach
    dispatch   the backend by load, from decode and prefill, into the same table
    cost       pruning whole blocks of published shapes, folder to folder
    generate   tokens a second of a whole model, dense against packed
    sanitize   compute-sanitizer's memcheck and racecheck on a few of the tests, where it exists
    figures    roofline and speed-ups, from the result files

`make gpu-short` (`--short`) is for a lease of minutes; its parts keep few rows of much, in the same files:

    rates      ceilings, and what a node of a CUDA graph costs
    operands   what the sparse tensor cores read, in the tests of it
    checks     every kernel on small shapes, pruning bit for bit
    measure    kernels, layers, launch sizes and sparse rate: benchmarks/speed/short.py, one process
    profile    two launches under ncu, where there is one

Every part is a process of its own: one that fails, or loses the device, does not take the others along. A kernel that
loses the device is named in its row, and its part goes on without it. Rows are on the disk as soon as they are
measured. Nothing needs a network or an installation beyond torch, triton, transformers and pytest (matplotlib for the
figures). The last lines say which parts held. A run without git at hand takes the commit from $MOESPARSE_COMMIT.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, device_folder
from benchmarks.speed.common import DEVICE_LOST, parser

__all__ = ["PARTS", "main"]

ROOT = Path(__file__).resolve().parents[1]
# a few small shapes: every access of a kernel is checked, which is slow
_SANITIZED = "test_small_shapes and (bias or token) and bfloat16"
_SANITIZER_SECONDS = 150
# tests at a time: most of their seconds are Triton's compiler; the largest hold some 15 GB of the device
_WORKERS, _WORKER_BYTES = 4, 30 * 10**9
# processes of one part that may lose the device, each to another kernel
_RESTARTS = 8
_STOPPED = 124
# pytest's exit code where no test was left to run
_NOTHING_COLLECTED = 5
# a session of `--short` keeps so much of its time for the profiler
_PROFILE_SECONDS = 45
# what the parts of a dry run import, all of it together some seconds
_SHARED = (
    *("moesparse.benchmarking", "matplotlib.pyplot", "pytest", "triton"),
    *("transformers.models.mixtral.modeling_mixtral", "transformers.models.olmoe.modeling_olmoe"),
)


def _python(
    options: argparse.Namespace,
    *arguments: str,
    limit: float = math.inf,
    prefix: tuple[str, ...] = (),
    **environment: str,
) -> int:
    """Exit code of a Python process, which ends with all that it started when its time is up."""
    command = [*prefix, sys.executable, *arguments]
    print("$", " ".join(command), flush=True)
    limit = min(limit, options.until - time.monotonic())
    # a group of its own, because a tool between us and Python would leave Python behind, at work on the device
    if options.dry:
        process: Any = _Forked(arguments, environment)
    else:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, process_group=0)
    try:
        return process.wait(None if math.isinf(limit) else max(limit, 0))
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit:.0f} s", flush=True)
        return _STOPPED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Forked:
    """A module run as Python would run it, in a copy of this process, which has imported what takes seconds.

    For dry runs alone: where a GPU was looked for, no copy of the process could use it.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        sys.stdout.flush()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(arguments, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        # whoever of the two comes first
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    @staticmethod
    def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        assert arguments[0] == "-m", f"a module must be run, got {arguments}"
        os.chdir(ROOT)
        os.environ |= environment
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode


def gpu_tests() -> list[str]:
    """The files with gpu-marked tests: the others may import what this machine does not have."""
    files = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text())


def _tests(options: argparse.Namespace) -> bool:
    pytest = ("-m", "pytest", *gpu_tests(), "-m", "gpu", "-q")
    if options.dry:
        # no test can run: that all of them are found and import is what is left to see
        return _python(options, *pytest, "benchmarks", "--collect-only", "--no-summary") == 0
    workers = min(_WORKERS, torch.cuda.get_device_properties().total_memory // _WORKER_BYTES)
    parallel = ("-n", str(workers)) if workers > 1 and find_spec("xdist") else ()
    return _python(options, *pytest, *parallel, "-x" if options.first_failure else "--tb=short") == 0


def _sanitize(options: argparse.Namespace) -> bool:
    sanitizer = shutil.which("compute-sanitizer")
    if options.dry or sanitizer is None:
        print("memory and race checks do not run: they need a GPU and compute-sanitizer on the PATH")
        return True
    codes = [
        _python(
            options,
            *("-m", "pytest", "tests/kernels/test_moe_gpu.py", "-m", "gpu", "-q", "-k", _SANITIZED),
            prefix=(sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"),
            limit=_SANITIZER_SECONDS,
            # the caching allocator would hide an access beyond a tensor's end
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        for tool in ("memcheck", "racecheck")
    ]
    return not any(codes)


def _script(module: str, *words: str, leaving: float = 0.0) -> Callable[[argparse.Namespace], bool]:
    """Run a script of benchmarks/speed; it is stopped `leaving` so many seconds for what follows."""

    def run(options: argparse.Namespace) -> bool:
        limit = options.until - time.monotonic() - leaving if leaving else math.inf
        arguments = ["-m", f"benchmarks.speed.{module}", *words]
        if options.shapes:
            arguments += ["--shapes", *options.shapes]
        if options.results:
            arguments += ["--results", str(options.results)]
        arguments += ["--dry"] if options.dry else []
        arguments += ["--again"] if options.again else []
        code = _python(options, *arguments, limit=limit)
        for _ in range(_RESTARTS):
            if code != DEVICE_LOST:
                break
            # what it has measured it does not measure again
            limit = options.until - time.monotonic() - leaving if leaving else math.inf
            code = _python(options, *(word for word in arguments if word != "--again"), limit=limit)
        return code == 0

    return run


def _figures(options: argparse.Namespace) -> bool:
    device = torch.device("cpu" if options.dry else f"cuda:{torch.cuda.current_device()}")
    return _python(options, "-m", "benchmarks.figures", str(device_folder(options.results or RESULTS, device))) == 0


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "tests": _tests,
    "ceilings": _script("ceilings"),
    "kernels": _script("bench_kernels"),
    "tune": _script("tune", "launch"),
    "decode": _script("bench_layer", "decode"),
    "prefill": _script("bench_layer", "prefill"),
    "sparse_mma": _script("bench_sparse_mma"),
    "dispatch": _script("tune", "dispatch"),
    "cost": _script("bench_cost"),
    "generate": _script("bench_generate"),
    "sanitize": _sanitize,
    "figures": _figures,
}


def _kept_tests(files: Callable[[], list[str]], expression: str = "") -> Callable[[argparse.Namespace], bool]:
    """Run gpu-marked tests and keep what each said; those that this commit has passed are left out."""

    def run(options: argparse.Namespace) -> bool:
        pytest = ["-m", "pytest", *files(), "-m", "gpu", "-q", "--tb=line", "-p", "benchmarks.kept_tests"]
        pytest += ["-p", "no:cacheprovider", *(("-k", expression) if expression else ())]
        if not options.dry and find_spec("xdist"):
            pytest += ["-n", str(_WORKERS)]
        results = str(options.results or RESULTS)
        # nothing is left to run where all have passed
        return _python(options, *pytest, MOESPARSE_TEST_ROWS=results) in (0, _NOTHING_COLLECTED)

    return run


def _operand_tests() -> list[str]:
    """Those of the sparse tensor cores: Gluon's, and CUDA's where there are any."""
    return [name for name in gpu_tests() if "mma" in name or "cuda" in name]


def _kernel_tests() -> list[str]:
    return ["tests/kernels/test_moe_gpu.py", "tests/kernels/test_pruning_gpu.py"]


SHORT: dict[str, Callable[[argparse.Namespace], bool]] = {
    "rates": _script("short", "ceilings"),
    "operands": _kept_tests(_operand_tests),
    "checks": _kept_tests(_kernel_tests, "not real_shapes and not compile"),
    "measure": _script("short", "kernels", "layers", "launch", "sparse_mma", leaving=_PROFILE_SECONDS),
    "profile": _script("short", "profile"),
}
"""What `--short` runs, in the order of what it tells."""


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="*", choices=[*PARTS, *SHORT], default=[], help="all when left out")
    options.add_argument("--short", action="store_true", help="the parts of a short lease: " + " ".join(SHORT))
    options.add_argument("--first-failure", action="store_true", help="stop the tests at the first failure")
    options.add_argument("--limit", type=float, default=math.inf, help="seconds until all is stopped (none)")
    chosen = options.parse_args(arguments)
    if not chosen.dry and not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device, and torch sees none; `make gpu DRY=1` runs it tiny on a CPU")
    if chosen.results is not None:
        chosen.results = chosen.results.resolve()
    parts = chosen.parts or list(SHORT if chosen.short else PARTS)
    if chosen.dry and len(parts) > 3:
        for module in _SHARED:
            importlib.import_module(module)
    chosen.until = time.monotonic() + chosen.limit
    # so that being ended ends the part at work too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    held = {}
    for part in parts:
        began = time.monotonic()
        if began < chosen.until:
            print(f"== {part}", flush=True)
            held[part] = ("yes" if (PARTS | SHORT)[part](chosen) else "NO", time.monotonic() - began)
        else:
            held[part] = ("not begun: no time was left", 0.0)
    print("\npart       seconds  held")
    for part, (word, seconds) in held.items():
        print(f"{part:<10} {seconds:>7.0f}  {word}")
    sys.exit(0 if all(word == "yes" for word, _ in held.values()) else 1)


if __name__ == "__main__":
    main()
