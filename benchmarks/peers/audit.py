"""What a pruned folder is when plain transformers loads it: what it lacks, and where its zeros are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Loaded", "experts_shared", "load", "mask_difference", "zeros_by_part"]

# the first that occurs in a parameter's name
PARTS = {".experts.": "experts", ".gate.": "router", "self_attn": "attention", "embed_tokens": "embedding"}


@dataclass(frozen=True)
class Loaded:
    """A model, and the weights that its folder does not hold or holds in vain."""

    model: nn.Module
    missing: list[str]
    unexpected: list[str]


def load(folder: Path) -> Loaded:
    """As a user does who knows nothing of where the folder comes from; missing weights are drawn at random."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return Loaded(model.eval(), sorted(found["missing_keys"]), sorted(found["unexpected_keys"]))


def part_of(name: str) -> str:
    return next((part for piece, part in PARTS.items() if piece in name), "head" if "lm_head" in name else "other")


def zeros_by_part(model: nn.Module) -> dict[str, float]:
    """Share of zeros of each part of a model that has any."""
    counts: dict[str, list[int]] = {}
    for name, weight in _weights(model).items():
        count = counts.setdefault(part_of(name), [0, 0])
        count[0] += int((weight == 0).sum())
        count[1] += weight.numel()
    return {part: zeros / total for part, (zeros, total) in counts.items() if zeros}


def mask_difference(left: nn.Module, right: nn.Module) -> dict[str, Any]:
    """Expert weights that one of two pruned models keeps and the other does not, of how many; {} where sizes differ."""
    others = _weights(right)
    differing = total = 0
    for name, weight in _weights(left).items():
        if part_of(name) != "experts":
            continue
        if weight.shape != others[name].shape:
            return {}
        differing += int(((weight == 0) != (others[name] == 0)).sum())
        total += weight.numel()
    return {"differing": differing, "expert_weights": total}


def experts_shared(left: nn.Module, right: nn.Module) -> dict[str, Any]:
    """Experts' matrices of one model that the other has too, in the same layer, of how many."""
    others = _weights(right)
    shared = total = 0
    for name, weight in _weights(left).items():
        if part_of(name) == "experts":
            shared += sum(any(torch.equal(each, other) for other in others[name]) for each in weight)
            total += len(weight)
    return {"shared": shared, "matrices": total}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    # tied weights are listed twice: an untied head is a part of its own
    return {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}
