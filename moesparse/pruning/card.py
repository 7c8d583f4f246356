"""The model card of a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moesparse.checkpoints.card import FAKE_QUANTISED, PLAIN_LOADS, STORED_CODES, STORED_DENSE, TEMPLATE
from moesparse.checkpoints.hub import hub_id
from moesparse.checkpoints.recipe_words import recipe_in_words, stores_codes
from moesparse.experts.surgery import say_readers

if TYPE_CHECKING:
    from moesparse.pruning.report import Report

__all__ = ["model_card"]


def model_card(base: str, report: Report, base_model: str | None = None) -> str:
    """Markdown for the checkpoint's README.md.

    Args:
        base: the model that was pruned, as the user named it.
        report: what `prune` returned.
        base_model: its name on the hub; None takes what `hub_id` finds, and the card names none where that is nothing.
    """
    recipe = report.recipe
    what: list[str] = []
    rows: dict[str, object] = {}
    if report.experts is not None:
        counts = {len(block["kept"]) for block in report.experts["blocks"]}
        stay = " to ".join(map(str, sorted({min(counts), max(counts)})))
        stay += f" of {report.experts['blocks'][0]['before']}"
        what.append(f"{stay} experts kept")
        rows |= {
            "experts per block": stay,
            "expert criterion": report.experts["criterion"],
            "kept experts refitted": "yes" if report.experts["refit"] else "no",
        }
        if "readers" in report.experts:
            rows["layers of different counts, per_layer_config"] = say_readers(report.experts["readers"])
        if "method" in report.experts:
            rows["the others merged by"] = report.experts["method"]
    codes = stores_codes(recipe)
    rounded = [tensor.values for block in report.blocks for tensor in block.tensors if tensor.values is not None]
    if report.blocks and recipe["weights"] is None and "patterns" not in recipe:
        what.append(f"expert weights rounded to {recipe['values']}")
    elif report.blocks:
        found = {tensor.pattern for block in report.blocks for tensor in block.tensors}
        pattern = recipe["weights"] or ", ".join(sorted(found))
        what.append(f"experts pruned to {pattern}")
        fallbacks = len({(block, expert) for block, _, expert in report.fallbacks})
        if rounded:
            what[-1] += f" and rounded to {recipe['values']}"
        rows |= {
            "pattern": pattern,
            "mask rule": recipe["saliency"],
            "weight rule": recipe["update"],
            "zeros in expert matrices": f"{report.sparsity:.2%}",
            "experts without calibration tokens": fallbacks,
        }
    if rounded:
        rows |= {
            "values": recipe["values"],
            "value rule": recipe["value_rule"],
            "bits a weight of the experts in that format": f"{report.bits:.3f}",
        }
    if recipe.get("output_dtype"):
        rows["dequantised to"] = recipe["output_dtype"]
    if report.rounding:
        rows["rounding to the formats, squared error"] = f"{report.rounding:.2g}"
    told = next((name for name in ("plan", "scores") if name in recipe), None)
    if told is None or report.calibration["tokens"]:
        rows["calibration tokens"] = f"{report.calibration['tokens']:,}"
    if told is not None:
        rows["experts chosen by"] = f"{told} of a file"
    if report.sizes:
        dense, packed = report.sizes["before"]["experts"], report.sizes["after"]["packed"]
        rows["bytes of the experts, dense before and packed now"] = f"{dense:,}, {packed:,} ({packed / dense:.1%})"
    known = base_model or hub_id(base)
    return TEMPLATE.format(
        tag=_tag(report, codes),
        base=known or Path(base).resolve().name,
        base_model="" if known is None else f"base_model: {known}\n",
        recipe=recipe_in_words(recipe),
        version=report.version,
        what=", ".join(what),
        router="" if report.experts is not None else ", and so is the router",
        loads=STORED_CODES if codes else PLAIN_LOADS + (STORED_DENSE if report.blocks else "") + ".",
        rounded=f" {FAKE_QUANTISED}" if rounded and not codes else "",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


def _tag(report: Report, codes: bool) -> str:
    weights = report.recipe["weights"]
    if weights == "2:4":
        return "2-4-sparsity"
    if weights is not None or "patterns" in report.recipe:
        return "sparse"
    rounded = "quantized" if codes else "fake-quantized"
    return rounded if report.blocks else "expert-pruned"
