"""Tokens a second of whole models on a CPU, dense against packed, and llama.cpp on the same weights.

    make bench-generate-cpu                                  # makes the models first, once (cpu_models.py)
    make bench-generate-cpu ARGS="--models embedded --threads 1 --batches 1 4"
    python -m benchmarks.speed.cpu_tables                    # of the results there are, as in README and docs

transformers' `generate`, greedily: its dense experts by grouped_mm (its default) and eager, our dense layer in it, and
packed experts. With one sequence also eager and packed with oneDNN off, which is the faster product of torch for one
token, for attention and output too, and for no more. The contenders' models are in memory side by side and take turns.
Counted are the new tokens of all sequences over the time from the first to the last of them, which leaves out the
prompt; the median of the runs.
llama.cpp: llama-batched-bench, which counts the same. `agree` is the share of new tokens that are those of the first
contender: random weights give nearly equal logits, so some differ by rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.bench_cpu import CPU, threads_of_torch
from benchmarks.speed.cpu_models import FOLDER, MODELS, gguf_file, make
from benchmarks.speed.llama_cpp import RELEASE, TYPES, build
from moesparse.benchmarking import environment

__all__ = ["Run", "main", "timed_generate"]

BATCHES = (1, 4, 16)
PROMPT, NEW = 16, 33
DENSE = ("transformers grouped_mm", "transformers eager", "dense native")
OFF = ", oneDNN off"


@dataclass(frozen=True)
class Run:
    """One call of generate.

    Attributes:
        ids: [batch, new] tokens.
        first: seconds until the first token of every sequence.
        rest: seconds from there to the last.
    """

    ids: torch.Tensor
    first: float
    rest: float

    @property
    def rate(self) -> float:
        """New tokens a second behind the first."""
        return self.ids.shape[0] * (self.ids.shape[1] - 1) / self.rest


def timed_generate(model: Any, prompts: torch.Tensor, new: int) -> Run:
    """Generate greedily and note when each token came."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    came: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            came.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    began = time.perf_counter()
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([Clock()]),
    )
    return Run(ids[:, prompts.shape[1] :], came[0] - began, came[-1] - came[0])


def contenders(batch: int) -> list[str]:
    """Those of a number of sequences, dense ones first."""
    return [*DENSE, "packed", *([f"transformers eager{OFF}", f"packed{OFF}"] if batch == 1 else [])]


def _run(models: dict[str, Any], contender: str, prompts: torch.Tensor) -> Run:
    name = contender.removesuffix(OFF)
    model = models[_form(contender)]
    if name != "packed":
        model.set_experts_implementation({"dense native": "moesparse"}.get(name, name.removeprefix("transformers ")))
    with torch.backends.mkldnn.flags(enabled=False) if contender.endswith(OFF) else contextlib.nullcontext():
        return timed_generate(model, prompts, NEW)


def _form(contender: str) -> str:
    return "packed" if contender.startswith("packed") else "dense"


def measure(models: dict[str, Any], name: str, batch: int, threads: int, runs: int) -> list[dict[str, Any]]:
    """Rows of one model and batch: dense contenders and packed ones in turn, the first turn not counted."""
    words = models["dense"].config.vocab_size
    prompts = torch.randint(1, words, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[Run]] = {contender: [] for contender in contenders(batch)}
    for _ in range(1 + runs):
        for contender, timed in found.items():
            timed.append(_run(models, contender, prompts))
    wanted = found[DENSE[0]][0].ids
    return [
        {
            "part": "generate",
            "shape": name,
            "contender": contender,
            "tokens": batch,
            "threads": threads,
            "tokens_per_second": statistics.median(run.rate for run in timed[1:]),
            "first_token_s": statistics.median(run.first for run in timed[1:]),
            "agree": (timed[0].ids == wanted).float().mean().item(),
            "weight_bytes": _bytes(models[_form(contender)]),
            "runs": runs,
        }
        for contender, timed in found.items()
    ]


def _bytes(model: Any) -> int:
    # a tied output is there once
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def measure_llama(folder: Path, kinds: list[str], batches: list[int], threads: int) -> list[dict[str, Any]]:
    """Rows of the large model by llama.cpp."""
    llama, rows = build(), []
    for kind in kinds:
        file = llama.quantise(gguf_file(folder), kind)
        for batch, rate in llama.generate(file, batches, PROMPT, NEW - 1, threads).items():
            same = {"part": "generate", "shape": "large", "tokens": batch, "threads": threads, "release": RELEASE}
            size = {"weight_bytes": file.stat().st_size}
            rows.append(same | {"contender": f"llama.cpp {kind}", "tokens_per_second": rate} | size)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        agree = f"  {row['agree']:.0%} of the tokens agree" if "agree" in row else ""
        print(
            f"{row['shape']:<10}{row['threads']} threads, batch {row['tokens']:>2} {row['contender']:<32}"
            f"{row['tokens_per_second']:>9.1f} tokens/s {row['weight_bytes'] / 1e9:>7.2f} GB{agree}",
            flush=True,
        )


def load(folders: dict[str, Path]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return {form: AutoModelForCausalLM.from_pretrained(folder).eval() for form, folder in folders.items()}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    options.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    options.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    options.add_argument("--runs", type=int, default=3)
    options.add_argument(
        "--kinds", nargs="*", default=list(TYPES), choices=TYPES, help="of llama.cpp; none to leave it out"
    )
    options.add_argument("--make", action="store_true", help="make the models, measure nothing")
    options.add_argument("--folder", type=Path, default=FOLDER, help="of the models (build/models)")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    chosen = options.parse_args(arguments)
    folders = {name: make(name, chosen.folder) for name in chosen.models}
    if chosen.make:
        for kind in chosen.kinds if "large" in chosen.models else ():
            build().quantise(gguf_file(chosen.folder), kind)
        return
    results = ResultFile(device_folder(chosen.results, CPU) / "generate_cpu.json", environment(CPU))
    for name in chosen.models:
        models = load(folders[name])
        for threads in chosen.threads:
            for batch in chosen.batches:
                with torch.inference_mode(), threads_of_torch(threads):
                    rows = measure(models, name, batch, threads, chosen.runs)
                results.put(rows)
                show(rows)
            if name == "large" and chosen.kinds:
                rows = measure_llama(chosen.folder, chosen.kinds, chosen.batches, threads)
                results.put(rows)
                show(rows)
        del models


if __name__ == "__main__":
    main()
