"""What a distillation did."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesparse.checkpoints.history import EARLIER, read_report
from moesparse.distillation.log import TrainingLog
from moesparse.distillation.matching import Pair
from moesparse.distillation.settings import Settings
from moesparse.system.memory import peak_memory

__all__ = ["DistillReport", "count_zeros"]


@dataclass
class DistillReport:
    """What a distillation did, ready for JSON.

    Attributes:
        mode: "global" or "blockwise".
        settings: `Settings.to_dict`.
        expert_weight: lambda of the loss, as used; None in blockwise mode.
        rows: one per step: "step", "experts" (the sum of MSE; 0 where lambda is 0), "learning_rate", "grad_norm", and
            "ce" with "loss" (and "kl" where the teacher's logits count) or, in blockwise mode, "block".
        warnings: early signs of failure that were seen.
        zeros: zero weights of the expert matrices before and after; none of those before is lost.
        weights: of the expert matrices.
        seconds: of the run, of this process.
        peak_bytes: resident memory of the process at most until then; on a GPU, of the tensors there meanwhile.
        surplus: tensors of the student's folder that the model has no place for, by what became of them.
    """

    mode: str
    settings: dict[str, Any]
    expert_weight: float | None
    rows: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    zeros: tuple[int, int] = (0, 0)
    weights: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    surplus: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        mode: str,
        settings: Settings,
        log: TrainingLog,
        pairs: Sequence[Pair],
        expert_weight: float | None,
        zeros: tuple[int, int],
        seconds: float,
    ) -> DistillReport:
        """Of a run that has just ended: its peak memory is that of this process by now."""
        return cls(
            mode=mode,
            settings=settings.to_dict(),
            expert_weight=expert_weight,
            rows=log.rows,
            warnings=log.warnings,
            zeros=zeros,
            weights=sum(matrix.weight.numel() for pair in pairs for matrix in pair.student.matrices),
            seconds=seconds,
            peak_bytes=peak_memory(),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self, windows: int) -> dict[str, Any]:
        """What config.json says of it beside the recipe of the pruning."""
        return {"mode": self.mode, **self.settings, "windows": windows}

    def beside(self, student: str | os.PathLike[str], windows: int) -> dict[str, Any] | None:
        """The pruning's report in the student's folder with this one as "distillation"; None where there is none.

        Of a student that was distilled before, that report stays among those of the steps before.
        """
        held = read_report(student)
        if held is None:
            return None
        earlier = held.pop(EARLIER, [])
        if "distillation" in held:
            earlier = [*earlier, dict(held)]
        recipe = {**(held.get("recipe") or {}), "distillation": self.summary(windows)}
        return held | {"recipe": recipe, "distillation": self.to_dict(), EARLIER: earlier}


def count_zeros(pairs: Sequence[Pair]) -> int:
    """Zero weights of the students' expert matrices."""
    return sum(int((matrix.weight == 0).sum()) for pair in pairs for matrix in pair.student.matrices)
