"""What a distillation did."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesparse.checkpoints.pretrained import REPORT_FILE
from moesparse.distillation.matching import Pair

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
        peak_bytes: of memory.
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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self, windows: int) -> dict[str, Any]:
        """What config.json says of it beside the recipe of the pruning."""
        return {"mode": self.mode, **self.settings, "windows": windows}

    def beside(self, student: str | os.PathLike[str]) -> dict[str, Any] | None:
        """The pruning's report in the student's folder with this one as "distillation"; None where there is none."""
        file = Path(student) / REPORT_FILE
        return json.loads(file.read_text()) | {"distillation": self.to_dict()} if file.is_file() else None


def count_zeros(pairs: Sequence[Pair]) -> int:
    """Zero weights of the students' expert matrices."""
    return sum(int((matrix.weight == 0).sum()) for pair in pairs for matrix in pair.student.matrices)
