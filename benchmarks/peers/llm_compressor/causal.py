"""Whether llm-compressor's calibration keeps the causal mask: does a position see a token that comes after it?

    .venv-peers-llm-compressor/bin/python -m benchmarks.peers.llm_compressor.causal    # about a minute

Small random models of two layers, float32. The calibration windows come in pairs that differ in their last token only,
so the inputs of the second layer at all other positions must be the same in both, whatever is pruned before it. "sees"
is their largest difference over the largest input: rounding with the mask, and the order of one without; "plain_sees"
is that of the model's own forward. Rows go to benchmarks/results/cpu/peers_causal.json.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers.llm_compressor.run import samples

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "moesparse" / "demo" / "model"
LENGTH = 24

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 96, "head_dim": 16},
    "phimoe": {"num_local_experts": 4},
    "mistral": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 96},
    "olmoe": {"num_experts": 4},
    "llama": {},
}


def batches(windows: Tensor, size: int = 1, fair: bool = False) -> dict[str, Any]:
    return {"dataset": DataLoader(samples(windows, fair), batch_size=size)}  # type: ignore[arg-type]


def without_mask(windows: Tensor) -> dict[str, Any]:
    return {"dataset": DataLoader([{"input_ids": window} for window in windows])}  # type: ignore[arg-type]


def tokenised(windows: Tensor, padded: bool = False) -> dict[str, Any]:
    """As in llm-compressor's examples: a datasets.Dataset, which `oneshot` makes batches of."""
    from datasets import Dataset

    mask = torch.ones_like(windows)
    if padded:
        windows = torch.cat([windows, torch.zeros_like(windows[:, :4])], dim=1)
        mask = torch.cat([mask, torch.zeros_like(mask[:, :4])], dim=1)
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": mask.tolist()})
    return {
        "dataset": data,
        "max_seq_length": windows.shape[1],
        "num_calibration_samples": len(windows),
        "shuffle_calibration_samples": False,
    }


# of Mixtral: how the model is loaded, and what `oneshot` is given
SETTINGS: dict[str, tuple[dict[str, str], Callable[[Tensor], dict[str, Any]]]] = {
    "defaults": ({}, batches),
    "four windows in a batch": ({}, lambda windows: batches(windows, 4)),
    "loaded with attention eager": ({"attn_implementation": "eager"}, batches),
    "loaded with attention sdpa": ({"attn_implementation": "sdpa"}, batches),
    "no attention mask given": ({}, without_mask),
    "a dataset, as in the examples": ({}, tokenised),
    "a dataset, padded": ({}, lambda windows: tokenised(windows, padded=True)),
    "sequential_targets attention": (
        {},
        lambda windows: batches(windows) | {"sequential_targets": ["MixtralAttention"]},
    ),
    "float causal mask in every sample": ({}, lambda windows: batches(windows, fair=True)),
    "config.attn_implementation set": ({}, batches),
    'pipeline="basic"': ({}, lambda windows: batches(windows) | {"pipeline": "basic"}),
}


def pairs() -> Tensor:
    """[8, LENGTH] token ids; rows 2i and 2i + 1 differ in their last token."""
    windows = torch.randint(0, 200, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    other = windows.clone()
    other[:, -1] = (other[:, -1] + 7) % 200
    return torch.stack([windows, other], 1).flatten(0, 1)


def sees(inputs: Tensor) -> float:
    """Of the second layer's inputs [8, >= LENGTH, hidden]."""
    left, right = inputs[0::2, : LENGTH - 1], inputs[1::2, : LENGTH - 1]
    return float((left - right).abs().max() / inputs.abs().max())


def build(name: str, folder: Path) -> None:
    """Write a model, and the tokenizer that `oneshot` asks for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **MODELS[name]))
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)


def measure(folder: Path, setting: str) -> dict[str, Any]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from transformers import AutoModelForCausalLM

    load, given = SETTINGS[setting]
    model, windows = AutoModelForCausalLM.from_pretrained(folder, **load), pairs()
    if setting.startswith("config."):
        model.config.attn_implementation = "eager"
    seen: list[Tensor] = []

    def note(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().clone())

    # the first module of a layer that no setting takes apart
    hook = model.model.layers[1].input_layernorm.register_forward_pre_hook(note)
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
    plain = sees(torch.cat(seen))
    seen.clear()
    recipe = WandaPruningModifier(sparsity=0.5, mask_structure="2:4", ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, **given(windows))
    hook.remove()
    return {
        "model": folder.name,
        "setting": setting,
        "plain_sees": plain,
        "sees": sees(torch.cat(seen)[: len(windows)]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("llmcompressor", "transformers", "torch")}
    rows = []
    with tempfile.TemporaryDirectory(prefix="causal-") as work:
        for model in MODELS:
            build(model, Path(work) / model)
            for setting in SETTINGS if model == "mixtral" else ["defaults"]:
                rows.append(measure(Path(work) / model, setting) | {"versions": versions})
                print(f"{model}, {setting}: {rows[-1]['sees']:.1e}", flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path = ROOT / "benchmarks" / "results" / "cpu" / "peers_causal.json"
    path.write_text(f'{{"benchmark": "peers_causal", "rows": [\n{lines}\n]}}\n')
