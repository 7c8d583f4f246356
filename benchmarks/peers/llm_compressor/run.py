"""llm-compressor on one checkpoint, folder to folder, in its own environment: `serve` of benchmarks/peers/clock.py.

Options: "modifier" (wanda, sparsegpt, reap), "fair" and "save". Its defaults are those of `oneshot` and of the
modifier. `fair` prunes nothing but experts, shows every expert its own tokens only, and hands in the causal mask that
is otherwise lost (`look` shows it). `save` is "repacked", which plain transformers can load, or "plain", what
`save_pretrained` alone writes after `oneshot`.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

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


def samples(windows: Tensor, fair: bool) -> list[dict[str, Tensor]]:
    """The windows as the pipeline takes them: token ids, and the mask that is added to the attention's scores."""
    if not fair:
        return [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    length = windows.shape[1]
    mask = torch.full((1, length, length), torch.finfo(torch.float32).min).triu(1)
    return [{"input_ids": window, "attention_mask": mask} for window in windows]


def load(source: str) -> Any:
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from transformers import AutoModelForCausalLM

    with load_quantizable_moe():
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto")


def compress(model: Any, windows: Tensor, job: dict[str, Any]) -> None:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    modifier, fair = job["options"]["modifier"], job["options"]["fair"]
    batches = DataLoader(samples(windows, fair), batch_size=job["batch_size"])  # type: ignore[arg-type]
    keywords: dict[str, Any] = {"moe_calibrate_all_experts": False} if fair else {}
    oneshot(model=model, dataset=batches, recipe=recipe(modifier, fair), **keywords)


def run(job: dict[str, Any], clock: Clock) -> None:
    from llmcompressor.modeling.moe.linearize import repack_moe

    model = load(job["source"])
    windows = torch.load(job["windows"])
    clock.prune(lambda: compress(model, windows, job))
    if job["options"]["save"] == "repacked":
        repack_moe(model)
    model.save_pretrained(job["out"])


def look(job: dict[str, Any]) -> dict[str, Any]:
    """Whether calibration shows the experts of the first layer what the model itself does, on one batch.

    Returns:
        "input_error": largest difference of their inputs, over the largest input; "routed_elsewhere": share of the
        choices of an expert that differ; "both_ways_error": the first, against the model with attention in both
        directions.
    """
    model = load(job["source"])
    windows = torch.load(job["windows"])[: job["batch_size"]]
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append((args[0].clone(), args[1].clone()))

    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(note)
    everywhere = torch.zeros(len(windows), 1, windows.shape[1], windows.shape[1])
    with torch.no_grad():
        model(windows)
        model(windows, attention_mask=everywhere)
    compress(model, windows, job)
    hook.remove()
    (own, routed), (both_ways, _), (calibrated, routed_there) = seen[:3]
    scale = float(own.abs().max())
    return {
        "input_error": float((calibrated - own).abs().max()) / scale,
        "routed_elsewhere": float((routed_there != routed).float().mean()),
        "both_ways_error": float((calibrated - both_ways).abs().max()) / scale,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(run, {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}, look)
