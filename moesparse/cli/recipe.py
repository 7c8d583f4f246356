"""The recipe that options of `moesparse prune` describe, over the fields of a file where --recipe names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesparse.cli import options
from moesparse.cli.text import embedded_texts
from moesparse.errors import UsageError

if TYPE_CHECKING:
    from moesparse.pruning.recipe import Recipe

__all__ = ["Asked"]

# options that are fields of a recipe: parameter -> field
_FIELDS = {
    "saliency": "saliency",
    "update": "update",
    "values": "values",
    "value_rule": "value_rule",
    "fake_quantised": "fake_quantised",
    "propagate": "propagate",
    "seed": "seed",
    "experts": "experts",
    "keep_experts": "keep_experts",
    "divisible_by": "divisible_by",
    "budget": "expert_budget",
    "expert_floor": "expert_floor",
    "allow_non_uniform": "allow_non_uniform",
    "expert_saliency": "expert_saliency",
    "expert_method": "expert_method",
    "refine_experts": "refine_experts",
    "target_bytes": "target_bytes",
    "compare_uniform": "compare_uniform",
    "mtp": "mtp",
    "output_dtype": "output_dtype",
    "mix": "expert_mix",
    "protect_super_experts": "protect_experts",
}


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    Attributes:
        recipe: all of it.
        names_update: a weight rule was named, or none is needed.
        seed: that was named, or None.
    """

    recipe: Recipe
    names_update: bool
    seed: int | None

    @classmethod
    def by(cls, given: Mapping[str, Any]) -> Asked:
        """Of the parameters of the command; a file's fields hold where no option says otherwise.

        Raises:
            UsageError: options that cannot go together, or with the fields of the file, which are named.
        """
        from moesparse.experts.plan_file import ExpertPlan
        from moesparse.pruning.recipe import Recipe, recipe_fields

        held = recipe_fields(given["recipe"]) if given["recipe"] else {}
        fields = held | _named(given)
        removes = fields.get("experts") is not None or fields.get("keep_experts") is not None
        plan, scores, statistics = given["plan"], given["scores"], given["statistics"]
        _check_files(plan, scores, removes, statistics)
        _check_companions(given, fields.get("target_bytes"), removes)
        loaded, criterion = options.load_scores(scores, fields.get("expert_saliency", ""))
        if criterion:
            fields["expert_saliency"] = criterion
        others = removes or plan is not None or fields.get("values") is not None
        if "weights" not in fields and not held and others:
            fields["weights"] = None
        text = given["calibration"] or given["demonstrations_from_model"]
        unnamed = removes and fields.get("expert_saliency", "auto") == "auto" and not (plan or scores or statistics)
        unnamed = unnamed and fields.get("expert_method", "remove") == "remove"
        if unnamed and not text and not embedded_texts("calibration", options.model_source(given["model"])):
            fields["expert_saliency"] = "aimer"
        without_text = plan or scores or fields.get("expert_saliency") == "aimer"
        if without_text and fields.get("weights", "") is None and not text:
            # no text that the kept experts could be refitted on
            fields.setdefault("update", "none")
        try:
            made = Recipe(**fields, plan=None if plan is None else ExpertPlan.load(plan), scores=loaded)
        except UsageError as error:
            if not held:
                raise
            said = ", ".join(f"{name}: {value}" for name, value in held.items())
            raise UsageError(f"{error}; --recipe {given['recipe']} says {said}") from error
        return cls(made, "update" in fields, fields.get("seed"))


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that options name."""
    found = {field: given[name] for name, field in _FIELDS.items()}
    # a flag that is not given is no field
    flags = ("refine_experts", "protect_experts", "allow_non_uniform", "fake_quantised")
    found |= {name: found[name] or None for name in flags}
    found = {name: value for name, value in found.items() if value not in (None, "")}
    if given["weights"]:
        found["weights"] = None if given["weights"] == "none" else given["weights"]
    if given["choices"]:
        found["choices"] = given["choices"].split(",")
    return found


def _check_companions(given: Mapping[str, Any], target_bytes: Any, removes: bool) -> None:
    """Refuse an option that has no effect without another one, or none beside it."""
    if given["weights"] and target_bytes:
        raise UsageError(
            f"--weights must be left out with --target-bytes, which chooses patterns, got {given['weights']}"
        )
    if given["expert_saliency"] and not (removes or target_bytes):
        raise UsageError("--expert-saliency must come with --experts, --keep-experts or --target-bytes, got none")
    if given["statistics"] and not removes:
        raise UsageError("--statistics must come with --experts or --keep-experts, for which they choose, got neither")
    if given["choices"] and not target_bytes:
        raise UsageError(
            f"--choices must come with --target-bytes, which searches among them, got {given['choices']} alone"
        )


def _check_files(plan: Path | None, scores: Path | None, removes: bool, statistics: list[str] | None) -> None:
    """Refuse files that are not there, and what a choice from a file leaves nothing to do for."""
    for option, file in (("--plan", plan), ("--scores", scores)):
        if file is not None and statistics:
            raise UsageError(f"--statistics must be left out with {option}, which says who stays, got both")
    if plan is not None and (removes or scores is not None):
        raise UsageError("--experts, --keep-experts and --scores must be left out with --plan, which says who stays")
    if scores is not None and not removes:
        raise UsageError("--scores must come with --experts or --keep-experts, for which they choose, got neither")
    for option, file in (("--plan", plan), ("--scores", scores)):
        if file is not None:
            options.check_input_file(option, file)
