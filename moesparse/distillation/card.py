"""The model card of a distilled checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesparse.distillation.report import DistillReport

__all__ = ["distilled_card"]


def distilled_card(card: str, teacher: str, report: DistillReport, windows: int, length: int) -> str:
    """The README.md of a pruned checkpoint, and that it was distilled.

    Args:
        card: text of the pruned checkpoint's README.md, or "".
        teacher: as the user named it.
        report: what `distill` returned.
        windows: it was trained on.
        length: tokens of each.
    """
    name = teacher.rstrip("/").rsplit("/", 2)[-1] if teacher.startswith(("/", ".")) else teacher
    share = report.settings["logit_share"]
    parts = ["cross-entropy"] * (share < 1) + ["KL to the teacher's logits"] * (share > 0)
    parts += ["expert-wise distillation"] * (report.expert_weight != 0)
    how = " and ".join(parts) if report.mode == "global" else "blockwise distillation"
    what = "kept expert weights" if report.settings["train"] == "experts" else "kept expert weights and all others"
    return (
        f"{card.rstrip()}\n\nAfterwards the {what} were trained by {how} from `{name}`: "
        f"{len(report.rows)} steps on {windows} windows of {length} tokens. No zero was lost.\n"
    ).lstrip()
