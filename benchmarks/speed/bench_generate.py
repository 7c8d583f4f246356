"""Tokens a second of a whole model, dense against packed: random weights in the shape of OLMoE-1B-7B.

    make gpu PART=generate
    python -m benchmarks.speed.bench_generate --dry --results out    # a tiny model on the CPU, to see that it runs

The model is built on the device and pruned to 2:4 by magnitude; that changes no speed. Every contender generates
greedily from the same prompts: the dense experts through transformers' `grouped_mm`, which on a GPU decodes with
`batched_mm` and copies every token's experts, and through this package's dense layer, where the gate is a launch of
its own; the packed ones through moesparse. What does not fit into memory is left out. A time is that of the whole
`generate` call with its prefill, the median of the runs after one that is not counted; tokens are the new ones of all
sequences. `agree` is the share of new tokens equal to the first contender's: random weights give nearly equal logits,
so a few differ by rounding.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import moesparse
from benchmarks.results import RESULTS, ResultFile, device_folder
from benchmarks.speed.common import parser
from moesparse.benchmarking import environment
from moesparse.system.memory import peak_memory, reset_peak_memory

DENSE = ("grouped_mm", "moesparse")
BATCHES = (1, 8, 64)
PROMPT, NEW, RUNS = 128, 128, 3
OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
}
TINY = OLMOE | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 500,
}


def build(sizes: dict[str, int], device: torch.device) -> Any:
    """A random bf16 model on the device, its experts 2:4."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    torch.manual_seed(0)
    config = OlmoeConfig(**sizes, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    moesparse.prune(model, None, moesparse.Recipe(weights="2:4", saliency="magnitude", update="none"))
    return model


def generate(model: Any, prompts: torch.Tensor, new: int) -> tuple[torch.Tensor, float]:
    """The new tokens and the seconds they took."""
    wait = torch.cuda.synchronize if prompts.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    wait()
    return ids[:, prompts.shape[1] :], time.perf_counter() - began


def main() -> None:
    options = parser(__doc__).parse_args()
    if options.dry and options.results is None:
        raise SystemExit("--dry needs --results FOLDER: its numbers do not belong in benchmarks/results")
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry runs a tiny model on the CPU")
    device = torch.device("cpu" if options.dry else f"cuda:{torch.cuda.current_device()}")
    sizes, prompt, new, runs = (TINY, 8, 4, 1) if options.dry else (OLMOE, PROMPT, NEW, RUNS)
    model = build(sizes, device)
    file = ResultFile(device_folder(options.results or RESULTS, device) / "generate.json", environment(device))
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, sizes["vocab_size"], (max(BATCHES), prompt), generator=draw).to(device)
    first: dict[int, torch.Tensor] = {}
    print("| experts | batch | tokens/s | agree | weights GB | peak GB |\n|---|---|---|---|---|---|")
    for contender in (*DENSE, "packed"):
        if contender == "packed":
            moesparse.pack(model)
        else:
            model.set_experts_implementation(contender)
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        for batch in BATCHES:
            reset_peak_memory()
            try:
                timed = [generate(model, prompts[:batch], new) for _ in range(1 + runs)]
            except torch.OutOfMemoryError as full:
                print(f"| {contender} | {batch} | {str(full).splitlines()[0]} |", flush=True)
                continue
            seconds = statistics.median(seconds for _, seconds in timed[1:])
            tokens = timed[0][0]
            agree = (tokens == first.setdefault(batch, tokens)).float().mean().item()
            row = {
                "part": "generate",
                "shape": "tiny" if options.dry else "OLMoE-1B-7B",
                "contender": contender,
                "tokens": batch,
                "tokens_per_second": batch * new / seconds,
                "agree": agree,
                "weight_bytes": weights,
                "peak_bytes": peak_memory(),
                "prompt": prompt,
                "new": new,
            }
            file.put([row])
            print(
                f"| {contender} | {batch} | {row['tokens_per_second']:,.0f} | {agree:.0%} | {weights / 1e9:.2f} | "
                f"{row['peak_bytes'] / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
