"""How a distillation runs: the numbers of a run, and two sets of them by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from moesparse.errors import UsageError

__all__ = ["MODES", "PRESETS", "TRAINED", "Settings", "check_mode", "resolve_settings"]

MODES = ("global", "blockwise")
TRAINED = ("experts", "all", "routers")


@dataclass(frozen=True)
class Settings:
    """Numbers of a run. Rate, schedule and epochs are by default those of MoE-Pruner (Xie et al., 2024, 2410.12013).

    Attributes:
        learning_rate: of AdamW at the first step; falls to zero along a cosine. Of expert matrices; of the rest a
            tenth of it, where that trains.
        epochs: times every window is seen; in blockwise mode, by every block.
        batch_size: windows in one step of the optimizer.
        micro_batch: windows in one forward. A step's loss is the mean over its forwards; each expert's MSE is the mean
            over the tokens it got in one forward.
        expert_weight: lambda of the loss CE + lambda * sum of MSE; None is L_CE / L_expert at step 0, and with 0 the
            sum is not computed. Has no meaning in blockwise mode, where there is no CE.
        logit_share: s in (1 - s) * CE + s * KL(teacher || student), which then stands in the place of CE; KL is over
            the vocabulary, the mean over the tokens that CE counts. 0 is the paper's loss. Global mode only.
        train: what trains: "experts", their matrices, as in the paper; "all", every parameter of the student with
            zeros held in the expert matrices, in global mode only; or "routers" alone, in global mode on CE or KL (with
            logit_share 1 Router KD, Hyeon and Do 2026, arXiv 2603.02217), in blockwise mode on the output of the dense
            block. lambda is 0 then: what experts give for the teacher's routing depends on no router.
        weight_decay: of AdamW.
        max_grad_norm: gradients of a step are scaled down to this norm over all trained weights.
        seed: of the order of the windows.

    Raises:
        UsageError: a number out of range.
    """

    learning_rate: float = 2e-5
    epochs: int = 3
    batch_size: int = 16
    micro_batch: int = 1
    expert_weight: float | None = None
    logit_share: float = 0.0
    train: str = "experts"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "expert_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} must be at least 0, got {value}")
        if not 0 <= self.logit_share <= 1:
            raise UsageError(f"logit_share must be from 0 to 1, got {self.logit_share}")
        if self.train not in TRAINED:
            raise UsageError(f"train must be one of {', '.join(TRAINED)}, got {self.train!r}")
        if self.train == "routers" and self.expert_weight:
            raise UsageError(f"expert_weight must be 0 or None with train='routers', got {self.expert_weight}")
        if self.batch_size % self.micro_batch:
            raise UsageError(f"batch_size must be a multiple of micro_batch={self.micro_batch}, got {self.batch_size}")

    def steps(self, windows: int) -> int:
        """Steps of the optimizer for so many windows; the last step of an epoch takes what is left."""
        return self.epochs * math.ceil(windows / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


PRESETS: dict[str, dict[str, Settings]] = {
    "paper": dict.fromkeys(MODES, Settings()),
    # a model of 192 columns learns at rates that would wreck a large one; over few windows, seen twice, cross-entropy
    # and higher rates in global mode learn the windows by heart
    "small": {
        "global": Settings(1e-3, epochs=2, batch_size=8, micro_batch=8, expert_weight=0.0, logit_share=1.0),
        "blockwise": Settings(2e-3, epochs=2, batch_size=8, micro_batch=8),
    },
}
"""By name and mode: the paper's, and one that takes minutes on two CPU cores for models of a few million parameters."""


def check_mode(mode: str, settings: Settings | None = None) -> None:
    """Raise UsageError unless `mode` is one of MODES, and can be run with the settings."""
    if mode not in MODES:
        raise UsageError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if settings is not None and settings.logit_share and mode == "blockwise":
        raise UsageError(f"logit_share must be 0 in blockwise mode, which has no logits, got {settings.logit_share}")
    if settings is not None and settings.train == "all" and mode == "blockwise":
        raise UsageError("train must be 'experts' or 'routers' in blockwise mode, which runs nothing else, got 'all'")


def resolve_settings(settings: Settings | str, mode: str) -> Settings:
    """The settings, or those that the name has for the mode.

    Raises:
        UsageError: no such name or mode, or settings that the mode cannot run with.
    """
    check_mode(mode)
    if isinstance(settings, Settings):
        check_mode(mode, settings)
        return settings
    if settings not in PRESETS:
        raise UsageError(f"settings must be Settings or one of {', '.join(PRESETS)}, got {settings!r}")
    return PRESETS[settings][mode]
