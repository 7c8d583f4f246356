"""One expert layer by llama.cpp beside ours, in the same sitting: milliseconds for 1 to 512 tokens.

    make bench-llama                                     # builds llama.cpp first, once (llama_cpp.py)
    make bench-llama ARGS="--kinds Q8_0 --tokens 1 16"
    python -m benchmarks.speed.cpu_tables                # of the results there are, as in README and docs

How a layer's time is had from llama.cpp, whose programs time whole models: two models in the shape of Qwen3-MoE, with
one layer and with three, a vocabulary of 1024 and an attention of one head of 64. Both run the same number of tokens,
and half of the difference of their times is a layer; embedding, output and what a call costs at all fall out, and so
does the last layer, which llama.cpp runs for the last token alone. That layer still holds its router, norms and
attention. They are measured by two models that have a dense feed-forward of 32 columns in the place of the experts,
which is about as many multiplications as the router (128 experts: 43 columns), and taken off. Ours is the expert layer
alone, given a routing.

Contenders come round after round, so that a disturbance hits all; times are medians over all rounds, by the clock. In
a round each runs for a stretch of its own, as llama.cpp's programs do: behind a call of another contender, whose code
and data are in the caches, a call takes up to a fifth longer (bench_cpu's turns are such, for all alike).
llama.cpp's random tokens and its routers choose the experts there, a uniform draw here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.bench_cpu import CALLS, CPU, threads_of_torch
from benchmarks.speed.cpu_contenders import CONTENDERS
from benchmarks.speed.gguf_model import random_qwen3, write_gguf
from benchmarks.speed.llama_cpp import RELEASE, TYPES, LlamaCpp, Sample, build
from moesparse.benchmarking import SHAPES, Shape, environment
from moesparse.benchmarking.layer import ExpertLayer, RoutedCall, make_layer

__all__ = ["layer_seconds", "main"]

TOKENS = (1, 4, 16, 64, 256, 512)
SHORT, LONG, VOCABULARY, HEAD, REST = 1, 3, 1024, 64, 32
OURS = (
    "packed",
    "packed int8",
    "packed int4",
    "dense int8",
    "dense native",
    "transformers grouped_mm",
    "transformers eager",
    "eager, oneDNN off",
)

Times = dict[tuple[str, int], list[float]]
"""(model or contender, tokens) -> seconds."""


@dataclass(frozen=True)
class Models:
    """GGUF files of one shape.

    Attributes:
        experts: type -> (with one layer, with three).
        rest: the same with a dense feed-forward of 32 columns in the place of the experts, in BF16.
    """

    experts: dict[str, tuple[Path, Path]]
    rest: tuple[Path, Path]


def layer_seconds(times: Times, pair: tuple[Path, Path], tokens: int) -> float:
    """Of one layer: the difference of two models' medians over the difference of their layers."""
    short, long = (statistics.median(times[file.name, tokens]) for file in pair)
    return (long - short) / (LONG - SHORT)


def make_models(shape: Shape, llama: LlamaCpp, kinds: list[str]) -> Models:
    """Write what is not there yet into the folder of llama.cpp."""
    if shape.activation != "silu":
        raise SystemExit(f"--shape must be one whose experts are like Qwen3's, got {shape.name}")

    experts = {
        "num_experts": shape.num_experts,
        "moe_intermediate_size": shape.intermediate,
        "num_experts_per_tok": shape.top_k,
    }
    stem = f"{shape.num_experts}x{shape.hidden}x{shape.intermediate}-top{shape.top_k}"
    files = _pair(llama.folder, stem, shape.hidden, experts)
    rest = _pair(llama.folder, f"{shape.hidden}x{REST}-dense", shape.hidden, {"intermediate_size": REST})
    return Models({kind: (llama.quantise(files[0], kind), llama.quantise(files[1], kind)) for kind in kinds}, rest)


def _pair(folder: Path, stem: str, hidden: int, sizes: dict[str, int]) -> tuple[Path, Path]:
    """Files of the same model with one layer and with three, made where they are not yet."""
    short, long = (folder / f"{stem}-{layers}.gguf" for layers in (SHORT, LONG))
    if not (short.is_file() and long.is_file()):
        attention = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD}
        model = random_qwen3(LONG, VOCABULARY, hidden_size=hidden, **attention, **sizes)
        for file, layers in ((short, SHORT), (long, LONG)):
            write_gguf(model, file.with_suffix(".partial"), layers).rename(file)
    return short, long


@dataclass
class Sitting:
    """Rounds of one shape at one number of threads."""

    llama: LlamaCpp
    models: Models
    layer: ExpertLayer
    tokens: list[int]
    threads: int
    seconds: float
    times: Times = field(default_factory=lambda: defaultdict(list))

    def round(self, contenders: list[str]) -> None:
        for pair in (*self.models.experts.values(), self.models.rest):
            samples: list[Sample] = self.llama.bench(pair, self.tokens, self.threads, repeats=2)
            for sample in samples:
                self.times[sample.model, sample.tokens] += sample.seconds
        with torch.inference_mode(), threads_of_torch(self.threads):
            for tokens in self.tokens:
                self._ours(tokens, contenders)

    def _ours(self, tokens: int, contenders: list[str]) -> None:
        calls = [RoutedCall.make(self.layer, tokens, "uniform", seed) for seed in range(CALLS)]
        for name in contenders:
            until = time.perf_counter() + self.seconds
            turn = 0
            while turn < 3 or time.perf_counter() < until:
                began = time.perf_counter()
                CONTENDERS[name].run(calls[turn % CALLS])
                # the first two warm up
                if turn > 1:
                    self.times[name, tokens].append(time.perf_counter() - began)
                turn += 1

    def rows(self, contenders: list[str], run: int) -> list[dict[str, Any]]:
        found = []
        for tokens in self.tokens:
            same = {"shape": self.layer.shape.name, "threads": self.threads, "tokens": tokens, "run": run}
            rest = layer_seconds(self.times, self.models.rest, tokens)
            for kind, pair in self.models.experts.items():
                layer = layer_seconds(self.times, pair, tokens)
                more = {"layer_us": layer * 1e6, "rest_us": rest * 1e6, "release": RELEASE}
                found.append(same | {"contender": f"llama.cpp {kind}", "us": (layer - rest) * 1e6, **more})
            for name in contenders:
                seconds = self.times[name, tokens]
                found.append(same | {"contender": name, "us": statistics.median(seconds) * 1e6, "turns": len(seconds)})
        return found


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        whole = f"  (with norms and attention {row['layer_us'] / 1e3:.2f})" if "layer_us" in row else ""
        print(f"{row['tokens']:>4} tokens {row['contender']:<26}{row['us'] / 1e3:>9.2f} ms{whole}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--build", action="store_true", help="build llama.cpp and make the models, measure nothing")
    options.add_argument("--shape", default="Qwen3-30B-A3B", choices=SHAPES, metavar="NAME")
    options.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    options.add_argument("--threads", nargs="*", type=int, default=[1])
    options.add_argument("--kinds", nargs="*", default=list(TYPES), choices=TYPES)
    options.add_argument("--contenders", nargs="*", default=list(OURS), choices=CONTENDERS, metavar="NAME")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=0.5, help="for each of our contenders and numbers of tokens")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    chosen = options.parse_args(arguments)
    llama, shape = build(), SHAPES[chosen.shape]
    models = make_models(shape, llama, chosen.kinds)
    if chosen.build:
        return
    results = ResultFile(device_folder(chosen.results, CPU) / "llama.json", environment(CPU))
    layer = make_layer(shape, torch.bfloat16, CPU)
    for threads in chosen.threads:
        sitting = Sitting(llama, models, layer, chosen.tokens, threads, chosen.seconds)
        run = round(time.time())
        for number in range(chosen.rounds):
            sitting.round(chosen.contenders)
            print(f"{shape.name}, {threads} threads, round {number + 1} of {chosen.rounds}", flush=True)
            # kept after every round: a sitting that is cut off has those it had
            rows = sitting.rows(chosen.contenders, run)
            results.put([row | {"rounds": number + 1} for row in rows])
        show(rows)


if __name__ == "__main__":
    main()
