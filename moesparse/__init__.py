"""moesparse: prune Mixture-of-Experts language models, keep what they know, and run the sparse result.

    model, tokenizer = moesparse.demo.load()
    windows = moesparse.demo.windows("calibration")
    report = moesparse.prune(model, windows, moesparse.Recipe(weights="2:4"))
    moesparse.save_pretrained(model, "out", tokenizer=tokenizer)

Names are loaded when they are first used; importing the package imports neither transformers nor triton. It does see to
it that transformers, once it is in use, can load packed checkpoints (_register.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesparse._register import register_with_transformers
from moesparse._version import __version__

if TYPE_CHECKING:
    from moesparse import demo, evaluate, text
    from moesparse.calibration.checkpoint import calibrate_checkpoint
    from moesparse.calibration.statistics import ModelStatistics
    from moesparse.calibration.whole import calibrate
    from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
    from moesparse.distillation import distill, distill_checkpoint
    from moesparse.errors import MoESparseError
    from moesparse.experts.criteria import expert_scores
    from moesparse.experts.plan_file import ExpertPlan
    from moesparse.experts.scores_file import ExpertScores
    from moesparse.experts.selection import choose_experts
    from moesparse.experts.surgery import remove_experts
    from moesparse.models.blocks import MoEBlock, find_moe_blocks
    from moesparse.packed.experts import SparseExperts
    from moesparse.packed.model import PackReport, pack, unpack
    from moesparse.pruning.gguf import prune_gguf
    from moesparse.pruning.recipe import Recipe
    from moesparse.pruning.report import Report
    from moesparse.pruning.run import prune, prune_checkpoint
    from moesparse.system.installation import info

_HOMES = {
    "calibrate_checkpoint": "calibration.checkpoint",
    "ModelStatistics": "calibration.statistics",
    "calibrate": "calibration.whole",
    "load_pretrained": "checkpoints.pretrained",
    "save_pretrained": "checkpoints.pretrained",
    "distill": "distillation",
    "distill_checkpoint": "distillation",
    "MoESparseError": "errors",
    "expert_scores": "experts.criteria",
    "ExpertPlan": "experts.plan_file",
    "ExpertScores": "experts.scores_file",
    "choose_experts": "experts.selection",
    "remove_experts": "experts.surgery",
    "MoEBlock": "models.blocks",
    "find_moe_blocks": "models.blocks",
    "SparseExperts": "packed.experts",
    "PackReport": "packed.model",
    "pack": "packed.model",
    "unpack": "packed.model",
    "prune_gguf": "pruning.gguf",
    "Recipe": "pruning.recipe",
    "Report": "pruning.report",
    "prune": "pruning.run",
    "prune_checkpoint": "pruning.run",
    "info": "system.installation",
}
_MODULES = ("demo", "evaluate", "text")

__all__ = [
    "ExpertPlan",
    "ExpertScores",
    "MoEBlock",
    "MoESparseError",
    "ModelStatistics",
    "PackReport",
    "Recipe",
    "Report",
    "SparseExperts",
    "__version__",
    "calibrate",
    "calibrate_checkpoint",
    "choose_experts",
    "demo",
    "distill",
    "distill_checkpoint",
    "evaluate",
    "expert_scores",
    "find_moe_blocks",
    "info",
    "load_pretrained",
    "pack",
    "prune",
    "prune_checkpoint",
    "prune_gguf",
    "remove_experts",
    "save_pretrained",
    "text",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"moesparse.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"moesparse.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moesparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_transformers()
