"""A recipe in sentences, for whoever looks at a folder: `moesparse inspect`, the report page, the card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["EXPERT_FIELDS", "VALUE_FIELDS", "WEIGHT_FIELDS", "merges", "recipe_in_words", "refits", "stores_codes"]

EXPERT_FIELDS = (
    "experts",
    "keep_experts",
    "expert_saliency",
    "expert_method",
    "refine_experts",
    "expert_mix",
    "expert_budget",
    "expert_floor",
    "allow_non_uniform",
    "protect_experts",
)
"""Of a recipe: they say how experts are removed."""

WEIGHT_FIELDS = (
    "weights",
    "patterns",
    "saliency",
    "update",
    "propagate",
    "target_bytes",
    "choices",
    "compare_uniform",
)
"""Of a recipe: they say how weights are pruned."""

VALUE_FIELDS = ("values", "value_rule", "fake_quantised")
"""Of a recipe: they say to what the weights that stay are rounded."""

_UPDATES = {
    "none": "keep the values they had",
    "obs": "are updated as SparseGPT does",
    "least-squares": "are solved for again by least squares",
    "asymmetric": "are solved for again by least squares, with down answering for gate and up,",
    "rescale": "are rescaled, one number for each expert",
    "tune": "are trained together for the output of each expert",
    "auto": "are solved for again by the rule that suits the data",
}
_REFITS = ("least-squares", "asymmetric", "auto")
_MTP = {
    "prune": "are pruned like the others",
    "keep": "are kept as they were",
    "drop": "are left out",
}
_KNOWN = {
    *WEIGHT_FIELDS,
    *EXPERT_FIELDS,
    *VALUE_FIELDS,
    "seed",
    "plan",
    "scores",
    "divisible_by",
    "mtp",
    "output_dtype",
    "distillation",
}


def recipe_in_words(recipe: Mapping[str, Any]) -> str:
    """What was done to a model, in a few sentences.

    Args:
        recipe: as config.json or a report has it (`moesparse.pruning.recipe.Recipe.to_dict`), of a command or of
            several; it may come from anywhere, and what is not known is named with its value.
    """
    parts = [_target(recipe), _experts(recipe), _weights(recipe), _values(recipe), _further(recipe), _trained(recipe)]
    said = [f"{part[0].upper()}{part[1:]}." for part in parts if part]
    other = [f"{name} is {value}" for name, value in recipe.items() if name not in _KNOWN]
    if other:
        said.append(f"Noted besides: {', '.join(other)}.")
    return " ".join(said) or "Nothing is said of how."


def merges(recipe: Mapping[str, Any]) -> bool:
    """Whether experts were merged by a recipe, or by the plan that it names."""
    plan = recipe.get("plan")
    found = plan.get("method") if isinstance(plan, Mapping) else recipe.get("expert_method")
    return found not in (None, "remove")


def refits(recipe: Mapping[str, Any]) -> bool:
    """Whether experts that stay are re-solved where a recipe removes others; also by one that was never settled."""
    return _solver(recipe) in _REFITS


def _target(recipe: Mapping[str, Any]) -> str:
    target = recipe.get("target_bytes")
    if target is None:
        return ""
    among = ", ".join(map(str, recipe.get("choices") or ()))
    try:
        share = f"{float(target)} of the dense bytes of the experts"
    except (TypeError, ValueError):
        share = f"{target} for the experts"
    return f"how many experts stay and the pattern of each matrix were searched for to take {share} once packed" + (
        f", among {among}" if among else ""
    )


def _experts(recipe: Mapping[str, Any]) -> str:
    keep, share, plan = (recipe.get(name) for name in ("keep_experts", "experts", "plan"))
    criterion = recipe.get("expert_saliency")
    method = plan.get("method") if isinstance(plan, Mapping) else recipe.get("expert_method")
    merged = merges(recipe)
    ranked = recipe.get("expert_budget") == "global"
    every, average = ("all blocks, ranked together,", "a block on average ") if ranked else ("every block", "")
    gone = f"are merged into those that stay by {method}" if merged else "are removed"
    if plan is not None:
        made = plan.get("criterion") if isinstance(plan, Mapping) else None
        text = "the experts that stay in every block are those that a plan names" + (f", made by {made}" * bool(made))
    elif keep is not None:
        text = f"{keep} experts {average or f'of {every} '}stay, {_chosen(recipe, criterion)}"
    elif share is not None:
        text = f"{_percent(share)} of the experts of {every} {gone}, {_chosen(recipe, criterion)}"
    else:
        return ""
    if merged and share is None:
        text += f", and the others {gone}"
    if recipe.get("refine_experts"):
        text += ", then swapped while the block's output error fell"
    if recipe.get("protect_experts"):
        text += ", super-experts kept whatever their score"
    if recipe.get("divisible_by") is not None:
        text += f", how many stay being a multiple of {recipe['divisible_by']}"
    if refits(recipe):
        text += "; those that stay are refitted"
    return text


def _chosen(recipe: Mapping[str, Any], criterion: Any) -> str:
    text = f"chosen by {criterion or 'a criterion that is not named'}"
    if recipe.get("scores") is not None:
        text += " as a file of scores has it"
    if recipe.get("expert_mix") == "equal":
        text += ", every domain of the text counting the same"
    return text + (f", seed {recipe.get('seed')}" if criterion == "random" else "")


def _weights(recipe: Mapping[str, Any]) -> str:
    pattern, mixed, rule = (recipe.get(name) for name in ("weights", "patterns", "saliency"))
    if pattern is not None:
        group = re.fullmatch(r"(\d+):(\d+)", str(pattern))
        share = f"{group[1]} of every {group[2]} weights stay ({pattern})" if group else _removed(pattern)
    elif mixed is not None:
        share = "weights are pruned to a pattern for each matrix"
    elif recipe.get("target_bytes") is not None:
        share = "weights are pruned to those patterns"
    else:
        return ""
    chosen = f", chosen by {rule}" if rule else ""
    chosen += f", seed {recipe.get('seed')}" if rule == "random" else ""
    update = [_UPDATES.get(each, each) for each in str(recipe.get("update") or "none").split("+")]
    text = f"of the experts, {share}{chosen}; the kept ones {' and '.join(update)}".rstrip(",")
    if rule == "magnitude" and recipe.get("update") in (None, "none"):
        return text
    if recipe.get("propagate") is False:
        return f"{text}; every block was calibrated on what the dense blocks before it give"
    return text


def stores_codes(recipe: Mapping[str, Any]) -> bool:
    """Whether rounded values are stored as codes: `moesparse.pruning.recipe.Recipe.stores_codes`."""
    return recipe.get("values") not in (None, "bf16") and not recipe.get("fake_quantised")


def _values(recipe: Mapping[str, Any]) -> str:
    values, rule = recipe.get("values"), recipe.get("value_rule")
    if values is None:
        return ""
    by = "" if rule in (None, "auto") else f" by {rule}"
    how = "as codes with their scales" if stores_codes(recipe) else "in the dtype of the model"
    return f"the weights of the experts are rounded to {values}{by}, and stored {how}"


def _removed(share: Any) -> str:
    return f"{_percent(share)} of the weights of every row go"


def _percent(share: Any) -> str:
    try:
        return f"{100 * float(share):g}%"
    except (TypeError, ValueError):
        return str(share)


def _solver(recipe: Mapping[str, Any]) -> str:
    return str(recipe.get("update") or "none").partition("+")[0]


def _further(recipe: Mapping[str, Any]) -> str:
    parts = []
    mtp, dtype = recipe.get("mtp"), recipe.get("output_dtype")
    if mtp is not None:
        parts.append(f"layers that predict further tokens {_MTP.get(str(mtp), str(mtp))}")
    if dtype is not None:
        parts.append(f"quantised weights became {dtype}")
    return "; ".join(parts)


def _trained(recipe: Mapping[str, Any]) -> str:
    trained = recipe.get("distillation")
    if not isinstance(trained, Mapping):
        return "" if trained is None else f"distillation: {trained}"
    windows = trained.get("windows")
    text = f" on {windows} windows of text" if windows is not None else ""
    return f"what stayed was trained afterwards by {trained.get('mode', 'an unknown')} distillation{text}"
