"""Which expert of the teacher each expert of the student learns from; what does not match is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.checkpoints.config_text import CONFIG_KEY
from moesparse.errors import MoESparseError
from moesparse.experts.surgery import KEPT_KEY
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.weights.patterns import Pattern, check_mask

__all__ = [
    "Pair",
    "check_pair",
    "check_pattern",
    "differs",
    "is_pruned",
    "match",
    "pair_blocks",
    "refuse_dense",
    "refuse_equal",
    "stated_pattern",
]

# exact zeros are rare in a trained weight; a pruned one has far more
_DENSE_ZEROS = 0.01


@dataclass(frozen=True, eq=False)
class Pair:
    """A block of the student and the teacher's block it was made from.

    Attributes:
        student: with E' experts.
        teacher: with E experts.
        new_ids: [E + 1] int64, teacher id -> student id; E' for experts the student has no longer, and for id E, which
            marks an empty slot.
    """

    student: MoEBlock
    teacher: MoEBlock
    new_ids: Tensor


def match(student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """Pair the blocks of two models, in forward order.

    Experts that were removed from the student are matched through config.moesparse["kept_experts"], which
    `remove_experts` writes.

    Raises:
        MoESparseError: other family, layers, sizes or expert count; zeros of the student that break the pattern its
            config states; a weight that the student keeps and a pruned teacher does not; nothing pruned at all.
    """
    pairs = pair_blocks(student, teacher)
    for pair in pairs:
        check_pair(pair, stated_pattern(student))
    refuse_dense(is_pruned(pair) for pair in pairs)
    return pairs


def pair_blocks(student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """The pairs of `match` from the modules alone: weights may be on the meta device. Raises for what modules tell."""
    families = [
        getattr(getattr(model, "config", None), "model_type", type(model).__name__) for model in (student, teacher)
    ]
    if families[0] != families[1]:
        raise MoESparseError(f"student must be of the teacher's family {families[1]}, got {families[0]}")
    students, teachers = find_moe_blocks(student), find_moe_blocks(teacher)
    names = [[block.name for block in blocks] for blocks in (students, teachers)]
    if names[0] != names[1]:
        missing = next((name for name in names[1] if name not in names[0]), None) or names[0][-1]
        raise MoESparseError(
            f"student must have the teacher's {len(teachers)} MoE blocks, got {len(students)}; the first that differs "
            f"is {missing}"
        )
    return [
        Pair(ours, theirs, _new_ids(ours, theirs, _noted(student), _noted(teacher)))
        for ours, theirs in zip(students, teachers, strict=True)
    ]


def stated_pattern(student: nn.Module) -> Pattern | None:
    """The pattern that a student's config says its experts hold."""
    recipe = _noted(student).get("recipe") or {}
    return Pattern.parse(recipe["weights"]) if recipe.get("weights") else None


def refuse_rounded(student: nn.Module, train: str) -> None:
    """MoESparseError where experts would train whose config says that their values are rounded to a format."""
    values = (_noted(student).get("recipe") or {}).get("values")
    if values is not None and train != "routers":
        raise MoESparseError(
            f"student must have plain values for its experts to train, got values rounded to {values}, which training "
            "would leave: distil first and round the result (prune with values), or give train='routers'"
        )


def refuse_dense(pruned: Iterable[bool]) -> None:
    """MoESparseError when no block of a student is pruned."""
    if not any(pruned):
        raise MoESparseError(
            "student must be pruned, got all of the teacher's experts and no zeros in them: prune it first"
        )


def refuse_equal(different: Iterable[bool]) -> None:
    """MoESparseError when the experts of no block of a student that trains block by block differ from the teacher's."""
    if not any(different):
        raise MoESparseError(
            "student's experts must differ from the teacher's to learn block by block, got the teacher's own, of which "
            "some were removed: mode='global' trains them on the text"
        )


def _noted(model: nn.Module) -> dict[str, Any]:
    return getattr(getattr(model, "config", None), CONFIG_KEY, None) or {}


def _new_ids(student: MoEBlock, teacher: MoEBlock, ours: dict[str, Any], theirs: dict[str, Any]) -> Tensor:
    E, kept_count = teacher.num_experts, student.num_experts
    new_ids = torch.full((E + 1,), kept_count)
    in_teacher = (theirs.get(KEPT_KEY) or {}).get(teacher.name, list(range(E)))
    in_student = (ours.get(KEPT_KEY) or {}).get(student.name)
    if in_student is None:
        if kept_count != E:
            raise MoESparseError(
                f"{student.name}: student must have the teacher's {E} experts, or say which it kept in "
                f'config.{CONFIG_KEY}["{KEPT_KEY}"], got {kept_count} experts and no such entry'
            )
        in_student = in_teacher
    unknown = [expert for expert in in_student if expert not in in_teacher]
    if unknown or len(in_student) != kept_count:
        raise MoESparseError(
            f"{student.name}: student must have kept {kept_count} experts of the teacher's {E}, got ids "
            f"{' '.join(map(str, in_student))}"
            + (f", of which {unknown[0]} is none of the teacher's" if unknown else "")
        )
    for new, dense_id in enumerate(in_student):
        new_ids[in_teacher.index(dense_id)] = new
    return new_ids


def check_pair(pair: Pair, pattern: Pattern | None) -> None:
    """Compare the weights of two blocks that are in memory; raises as `match`."""
    kept = _kept_ids(pair)
    check_pattern(pair.student, pattern)
    for ours, theirs in zip(pair.student.matrices, pair.teacher.matrices, strict=True):
        name = f"{pair.student.name}.{ours.name}"
        if ours.weight.shape[1:] != theirs.weight.shape[1:]:
            raise MoESparseError(
                f"{name}: student's matrices must have the teacher's shape {list(theirs.weight.shape[1:])} as "
                f"[out, in], got {list(ours.weight.shape[1:])}"
            )
        for new, old in enumerate(kept):
            zeros = (theirs.weight[old] == 0).to(ours.weight.device)
            if zeros.float().mean() > _DENSE_ZEROS and (ours.weight[new][zeros] != 0).any():
                raise MoESparseError(
                    f"{name}: student's pattern must lie within the teacher's, got weights in expert {new} that "
                    f"expert {old} of the teacher has pruned; give the model that the student was pruned from"
                )


def check_pattern(block: MoEBlock, pattern: Pattern | None) -> None:
    """Refuse a student's block that breaks the pattern its config states, None for no pattern; raises as `match`."""
    for matrix in block.matrices:
        name = f"{block.name}.{matrix.name}"
        if pattern is not None and not check_mask(matrix.weight, pattern, name=name).holds:
            raise MoESparseError(
                f"{name}: student must hold the pattern {pattern} that its config states, got rows or groups with more "
                "weights than it keeps"
            )


def _kept_ids(pair: Pair) -> list[int]:
    """Teacher ids of the student's experts, in the student's order."""
    ids = pair.new_ids[:-1]
    kept = (ids < pair.student.num_experts).nonzero().flatten()
    return kept[ids[kept].argsort()].tolist()


def is_pruned(pair: Pair) -> bool:
    """Whether experts or weights of the student's block are gone."""
    if pair.student.num_experts < pair.teacher.num_experts:
        return True
    return any((m.weight == 0).float().mean() > _DENSE_ZEROS for m in pair.student.matrices)


def differs(pair: Pair) -> bool:
    """Whether an expert of the student's block has other weights than the teacher's expert that it was."""
    return any(
        not ours.weight[new].equal(theirs.weight[old].to(ours.weight.device))
        for ours, theirs in zip(pair.student.matrices, pair.teacher.matrices, strict=True)
        for new, old in enumerate(_kept_ids(pair))
    )
