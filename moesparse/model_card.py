"""The README.md of a pruned checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesparse.pruning import Report

_TEMPLATE = """---
library_name: transformers
tags: [moesparse, mixture-of-experts, pruned, {tag}]
base_model: {base}
---
# {base}, experts pruned to {weights}

The expert matrices of `{base}` were pruned one-shot with moesparse {version}. Router, attention, norms, embeddings and
shared experts are unchanged. The weights are stored dense with zeros: plain transformers loads them.

| | |
|---|---|
| pattern | {weights} |
| mask rule | {saliency} |
| weight rule | {update} |
| calibration tokens | {tokens:,} |
| zeros in expert matrices | {sparsity:.2%} |
| experts without calibration tokens | {fallbacks} |
"""


def model_card(base: str, report: Report) -> str:
    """Markdown for the checkpoint's README.md.

    Args:
        base: the model that was pruned, as the user named it.
        report: what `prune` returned.
    """
    recipe = report.recipe
    return _TEMPLATE.format(
        tag="2-4-sparsity" if recipe["weights"] == "2:4" else "sparse",
        base=base.rstrip("/").rsplit("/", 2)[-1] if base.startswith(("/", ".")) else base,
        version=report.version,
        tokens=report.calibration["tokens"],
        sparsity=report.sparsity,
        fallbacks=len({(block, expert) for block, _, expert in report.fallbacks}),
        weights=recipe["weights"],
        saliency=recipe["saliency"],
        update=recipe["update"],
    )
