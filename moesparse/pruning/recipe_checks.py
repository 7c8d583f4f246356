"""What fields of a recipe cannot be, where that takes no other field or several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moesparse.errors import UsageError
from moesparse.experts.selection import BUDGETS
from moesparse.models.blocks import MoEBlock
from moesparse.weights.patterns import Pattern

__all__ = ["check_layers_alike", "check_patterns", "check_removal"]


def check_removal(experts: float | None, keep_experts: int | None) -> None:
    """Raise UsageError for both at once, or a share outside of (0, 1); how many can stay is for the model to say."""
    if experts is not None and keep_experts is not None:
        raise UsageError(f"only one of experts and keep_experts may be given, got {experts} and {keep_experts}")
    if experts is not None and not 0 < experts < 1:
        raise UsageError(f"experts must be a share between 0 and 1, got {experts}")


def check_patterns(blocks: Sequence[MoEBlock], pattern_of: Callable[[str, str], Pattern | None]) -> None:
    """Raise UsageError for a matrix that its pattern, by names of block and matrix, does not divide."""
    for block in blocks:
        for matrix in block.matrices:
            pattern = pattern_of(block.name, matrix.name)
            if pattern is not None:
                pattern.check_matrix(f"{block.name}.{matrix.name}", matrix.weight.shape[-1])


def check_layers_alike(recipe: Any) -> None:
    """Raise UsageError for a budget over all layers beside what it cannot be with, and for a leave that allows nothing.

    Args:
        recipe: a moesparse.Recipe.
    """
    budget, floor = recipe.expert_budget, recipe.expert_floor
    if budget not in BUDGETS:
        raise UsageError(f"expert_budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    if budget == BUDGETS[0] and floor is not None:
        raise UsageError(f"expert_floor must be left out with expert_budget={budget!r}, got {floor}")
    if budget == BUDGETS[0] and recipe.allow_non_uniform and recipe.plan is None:
        raise UsageError("allow_non_uniform must come with expert_budget='global' or plan, got neither")
    for name in ("target_bytes", "plan", "divisible_by") if budget != BUDGETS[0] else ():
        value = getattr(recipe, name)
        if value is not None:
            got = "one" if name == "plan" else repr(value)
            raise UsageError(f"{name} must be left out with expert_budget={budget!r}, got {got}")
