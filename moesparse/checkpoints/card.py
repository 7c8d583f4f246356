"""The README.md of a pruned checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesparse.distillation import DistillReport
    from moesparse.pruning import Report

STORED_DENSE = ": its weights are stored dense with zeros"
STORED_PACKED = " after `import moesparse`: its experts are stored packed"

TEMPLATE = """---
library_name: transformers
tags: [moesparse, mixture-of-experts, pruned, {tag}]
base_model: {base}
---
# {base}, {what}

The experts of `{base}` were pruned one-shot with moesparse {version}. Attention, norms, embeddings and shared experts
are unchanged{router}. Plain transformers loads the folder{zeros}.

| | |
|---|---|
{rows}
"""


def model_card(base: str, report: Report) -> str:
    """Markdown for the checkpoint's README.md.

    Args:
        base: the model that was pruned, as the user named it.
        report: what `prune` returned.
    """
    recipe = report.recipe
    what: list[str] = []
    rows: dict[str, object] = {}
    if report.experts is not None:
        first = report.experts["blocks"][0]
        what.append(f"{len(first['kept'])} of {first['before']} experts kept")
        rows |= {
            "experts per block": f"{len(first['kept'])} of {first['before']}",
            "expert criterion": recipe["expert_saliency"],
            "kept experts refitted": "yes" if report.experts["refit"] else "no",
        }
    if report.blocks:
        found = {tensor.pattern for block in report.blocks for tensor in block.tensors}
        pattern = recipe["weights"] or ", ".join(sorted(found))
        what.append(f"experts pruned to {pattern}")
        fallbacks = len({(block, expert) for block, _, expert in report.fallbacks})
        rows |= {
            "pattern": pattern,
            "mask rule": recipe["saliency"],
            "weight rule": recipe["update"],
            "zeros in expert matrices": f"{report.sparsity:.2%}",
            "experts without calibration tokens": fallbacks,
        }
    rows["calibration tokens"] = f"{report.calibration['tokens']:,}"
    return TEMPLATE.format(
        tag="2-4-sparsity" if recipe["weights"] == "2:4" else "sparse" if report.blocks else "expert-pruned",
        base=base.rstrip("/").rsplit("/", 2)[-1] if base.startswith(("/", ".")) else base,
        version=report.version,
        what=", ".join(what),
        router="" if report.experts is not None else ", and so is the router",
        zeros=STORED_DENSE if report.blocks else "",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


def card_in_form(card: str, packed: bool) -> str:
    """A card that `model_card` wrote, for a checkpoint that was packed or unpacked; other cards stay the same."""
    return card.replace(STORED_DENSE, STORED_PACKED) if packed else card.replace(STORED_PACKED, STORED_DENSE)


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
