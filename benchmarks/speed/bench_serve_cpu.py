"""`moesparse serve` on a CPU under eight clients at once, dense folder against packed one: tokens a second, memory.

    make bench-serve-cpu                                     # makes the models first, once (cpu_models.py)
    make bench-serve-cpu ARGS="--models embedded --threads 1"
    python -m benchmarks.speed.cpu_tables                    # of the results there are, as in docs

A server process for each folder, by turns. Every client asks for greedy completions of a few words, one behind the
other, 32 tokens each; counted are all new tokens over the time from the first request to the last answer. `together` is
the server as it is, `one by one` is --max-batch 1; how many times as fast the first is is printed behind them.
The first request warms the server up and is not counted. Memory is the server's peak.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.bench_cpu import CPU
from benchmarks.speed.cpu_models import FOLDER, MODELS, make
from moesparse.benchmarking import environment

__all__ = ["main", "measure"]

CLIENTS, NEW = 8, 32
PROMPTS = ("The king said", "It is a truth", "def __init__", "Enter the King", "a small", "And the", "She was", "In")
ALONE = ("--max-batch", "1")


@contextmanager
def _served(folder: Path, threads: int, options: tuple[str, ...]) -> Iterator[tuple[Any, int]]:
    """A client of a server that is up, and the server's process id."""
    import openai

    command = [sys.executable, "-m", "moesparse", "serve", str(folder), "--port", "0", *options]
    with TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("w") as file:
            variables = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(command, stdout=file, stderr=file, env=variables)
        try:
            address = _wait_for(process, log, r"at (http://127.0.0.1:\d+/v1)")
            _wait_for(process, log, "(Application startup complete)")
            yield openai.OpenAI(base_url=address, api_key="none", timeout=600, max_retries=0), process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        found = re.search(pattern, log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server said no {pattern!r}:\n{log.read_text()[-2000:]}")


def _peak(process: int) -> int | None:
    """Bytes of a process's peak resident memory, where the system says."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def measure(folder: Path, threads: int, together: bool, requests: int) -> dict[str, Any]:
    """What eight clients with some requests each got of one server."""
    with _served(folder, threads, () if together else ALONE) as (client, process):

        def ask(prompt: str) -> int:
            answer = client.completions.create(model=str(folder), prompt=prompt, max_tokens=NEW, temperature=0)
            return int(answer.usage.completion_tokens)

        def of_client(number: int) -> int:
            return sum(ask(PROMPTS[(number + turn) % len(PROMPTS)]) for turn in range(requests))

        ask(PROMPTS[0])
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            tokens = sum(clients.map(of_client, range(CLIENTS)))
        seconds = time.perf_counter() - began
        return {"tokens_per_second": tokens / seconds, "new": tokens, "seconds": seconds, "peak_bytes": _peak(process)}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    options.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    options.add_argument("--modes", nargs="*", default=["one by one", "together"], choices=["one by one", "together"])
    options.add_argument("--requests", type=int, default=2, help="of each client")
    options.add_argument("--rounds", type=int, default=1, help="servers of each folder; the fastest counts")
    options.add_argument("--folder", type=Path, default=FOLDER, help="of the models (build/models)")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    chosen = options.parse_args(arguments)
    results = ResultFile(device_folder(chosen.results, CPU) / "serve_cpu.json", environment(CPU))
    for name in chosen.models:
        folders = make(name, chosen.folder)
        for threads in chosen.threads:
            rates: dict[str, list[float]] = {form: [] for form in folders}
            for mode in chosen.modes:
                best: dict[str, dict[str, Any]] = {}
                for form in [*folders] * chosen.rounds:
                    found = measure(folders[form], threads, mode == "together", chosen.requests)
                    if form not in best or found["tokens_per_second"] > best[form]["tokens_per_second"]:
                        best[form] = found
                same = {"part": mode, "shape": name, "threads": threads, "tokens": CLIENTS, "rounds": chosen.rounds}
                rows = [same | {"contender": form} | found for form, found in best.items()]
                results.put(rows)
                for row in rows:
                    rates[row["contender"]].append(row["tokens_per_second"])
                    print(
                        f"{name:<10}{threads} threads, {mode:<12}{row['contender']:<8}"
                        f"{row['tokens_per_second']:>8.1f} tokens/s, peak {(row['peak_bytes'] or 0) / 1e9:.2f} GB",
                        flush=True,
                    )
            for form, (first, *others) in rates.items():
                for mode, rate in zip(chosen.modes[1:], others, strict=True):
                    gain = f"{mode} is {rate / first:.2f} times as fast as {chosen.modes[0]}"
                    print(f"{name:<10}{threads} threads, {form}: {gain}")


if __name__ == "__main__":
    main()
