"""What pruning published models on one H100 should take: a FORECAST from configs and ceilings, nothing is measured.

    python -m benchmarks.speed.forecast

128 windows of 2048 tokens, batches of 8 windows, bf16. The operations and bytes are those of the plan
(moesparse.pruning.plan); each is divided by a rate that is stated below with its source. The columns would overlap in
part (reading ahead); their sum is what they take one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import moesparse
from moesparse.calibration.plan import Plan
from moesparse.pruning.plan import plan_run
from moesparse.weights.solvers import memory_for_solver

WINDOWS, LENGTH, BATCH = 128, 2048, 8

# of one H100 80GB HBM3: bf16 8192^3 products reach 798 TFLOP/s with torch 2.11, measured elsewhere; passes of a model
# are taken to reach half of that
FORWARD = 0.5 * 798e12
# float32 outside of the tensor cores, NVIDIA's data sheet of the H100 SXM, of which half is taken
FLOAT32 = 0.5 * 67e12
# bytes a second, copied over PCIe 5 x16 (half of 64 GB/s each way), and read or written on one NVMe disk: assumptions
PCIE, DISK = 32e9, 3e9
# bytes a second that one core hashes (SHA-256 in hardware) and checks for NaN: assumptions
HASH, CHECK = 1.5e9, 10e9
# kernels that the recorder starts for one expert of a batch (of 57 operations, those that are no views), and seconds
# for each: an assumption
LAUNCHES, LAUNCH = 24, 5e-6

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": ("MixtralConfig", {}),
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "vocab_size": 151936,
        },
    ),
}
# recipe, passes over all layers, and of them those that a recorder watches
RECIPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "moe-pruner, none": ({"weights": "2:4", "saliency": "moe-pruner", "update": "none"}, 2, 1),
    "moe-pruner, rescale": ({"weights": "2:4", "saliency": "moe-pruner", "update": "rescale"}, 3, 2),
    "gated-sparsegpt, obs": ({"weights": "2:4", "saliency": "gated-sparsegpt", "update": "obs"}, 2, 1),
    "gated-admm, least-squares+rescale": (
        {"weights": "2:4", "saliency": "gated-admm", "update": "least-squares+rescale"},
        3,
        2,
    ),
    "reap 25%": ({"weights": None, "experts": 0.25, "update": "none"}, 1, 1),
}


def plan_of(model: str, recipe: str) -> Plan:
    """From the config alone; the workspace is that of a GPU, where solvers work on larger slices."""
    import transformers

    name, values = MODELS[model]
    with torch.device("meta"):
        config = getattr(transformers, name)(**values)
        meta = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rules = moesparse.Recipe(**RECIPES[recipe][0])
    blocks = moesparse.find_moe_blocks(meta)
    plan = plan_run(meta, blocks, rules, windows=WINDOWS, length=LENGTH, batch_size=BATCH)
    if not plan.moments or plan.keep is not None:
        return plan
    shapes = [matrix.weight.shape for block in blocks for matrix in block.matrices]
    kept = 7 if rules.update == "obs" else 3
    return replace(plan, workspace=max(memory_for_solver(*shape, kept, on_gpu=True) for shape in shapes))


def forecast(plan: Plan, passes: int, recorded: int) -> dict[str, float]:
    """Seconds of each kind of work."""
    written = plan.weights if plan.keep is None else plan.weights * plan.keep / plan.experts
    return {
        "passes": plan.flops["forward"] / FORWARD,
        "launches": recorded * plan.blocks * plan.experts * (WINDOWS / BATCH) * LAUNCHES * LAUNCH,
        "second moments": plan.flops["moments"] / FLOAT32,
        "solvers": plan.flops["solvers"] / FLOAT32,
        "PCIe": (2 * plan.weights + 2 * passes * plan.layers * plan.hidden_states) / PCIE,
        "disk": (2 * plan.weights + written) / DISK,
        "hash, check": written / HASH + plan.weights / CHECK,
    }


def main() -> None:
    print("FORECAST for one H100, not measured; seconds")
    shown = False
    for model in MODELS:
        for recipe, (_, passes, recorded) in RECIPES.items():
            plan = plan_of(model, recipe)
            parts = forecast(plan, passes, recorded)
            if not shown:
                print(f"\n| model | recipe | {' | '.join(parts)} | sum | GPU memory |")
                print("|---" * (len(parts) + 4) + "|")
                shown = True
            memory = plan.layer + plan.moments + max(plan.workspace, plan.activations)
            numbers = " | ".join(f"{seconds:,.0f}" for seconds in parts.values())
            print(f"| {model} | {recipe} | {numbers} | {sum(parts.values()):,.0f} | {memory / 1e9:.0f} GB |")


if __name__ == "__main__":
    main()
