"""llm-compressor on one checkpoint, folder to folder, in its own environment: `serve` of benchmarks/peers/clock.py.

Options: "modifier" (wanda, sparsegpt, reap), "fair" and "save". Its defaults are those of `oneshot` and of the
modifier; `fair` leaves the experts' matrices alone to be pruned and shows every expert its own tokens only. `save` is
"repacked", which plain transformers can load, or "plain", what `save_pretrained` alone writes after `oneshot`.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

from benchmarks.peers.clock import Clock, serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# all that is a Linear and no matrix of an expert; a router of transformers 5 is no Linear
NOT_EXPERTS = ["re:.*lm_head", "re:.*self_attn.*"]


def recipe(modifier: str, fair: bool) -> Any:
    from llmcompressor.modifiers.pruning import REAPPruningModifier, SparseGPTModifier, WandaPruningModifier

    if modifier == "reap":
        return REAPPruningModifier(sparsity=0.25)
    rule = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[modifier]
    return rule(sparsity=0.5, mask_structure="2:4", **({"ignore": NOT_EXPERTS} if fair else {}))


def run(job: dict[str, Any], clock: Clock) -> None:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe, repack_moe
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    options = job["options"]
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto")
    windows = torch.load(job["windows"])
    batches = DataLoader([{"input_ids": window} for window in windows], batch_size=job["batch_size"])
    keywords: dict[str, Any] = {"moe_calibrate_all_experts": False} if options["fair"] else {}
    clock.prune(
        lambda: oneshot(model=model, dataset=batches, recipe=recipe(options["modifier"], options["fair"]), **keywords)
    )
    if options["save"] == "repacked":
        repack_moe(model)
    model.save_pretrained(job["out"])


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    serve(run, {name: version(name) for name in packages})
