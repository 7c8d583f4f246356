"""What a run of pruning says of itself, ready for JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moesparse.experts.plan_file import ExpertPlan
from moesparse.models.blocks import MoEBlock
from moesparse.models.formats.rounding import Rounding
from moesparse.pruning.budget import DENSE, matrix_sizes, packed_bytes
from moesparse.pruning.recipe import Recipe

__all__ = ["BlockReport", "Report", "TensorReport", "ValuesReport", "expert_sizes"]


@dataclass
class ValuesReport:
    """The values of one fused expert matrix once they are rounded; the checkpoint holds them in its own dtype.

    Attributes:
        format: of moesparse.weights.value_formats.
        rule: of moesparse.weights.value_rules.
        bits: a weight would take in the format, with its scales and under its mask.
        error: per expert, |W - V| / |W| of the weights before and after.
        output_error: the same of the outputs on the calibration tokens, |(W - V) X| / |W X|; None for rules without
            second moments.
        fallbacks: experts without calibration tokens, rounded with all inputs alike.
    """

    format: str
    rule: str
    bits: float
    error: list[float]
    output_error: list[float] | None = None
    fallbacks: list[int] = field(default_factory=list)


@dataclass
class TensorReport:
    """One fused expert matrix after pruning.

    Attributes:
        name: parameter name in the experts module.
        shape: (E, out, in), contraction last, whatever the family stores.
        sparsity: share of exact zeros.
        pattern: the pattern asked for, "dense" where the weights were left as they are.
        holds: the pattern was found in every row after the weights were written back.
        error_before: per expert, |(W - V) X| / |W X| of the masked dense weights on the calibration tokens; None where
            the rules need no second moments.
        error_after: the same once the kept weights were re-solved.
        fallbacks: experts without calibration tokens, masked by magnitude.
        values: what rounding the weights that stay has cost; None where they stay as they were solved for.
    """

    name: str
    shape: tuple[int, int, int]
    sparsity: float
    pattern: str
    holds: bool
    error_before: list[float] | None = None
    error_after: list[float] | None = None
    fallbacks: list[int] = field(default_factory=list)
    values: ValuesReport | None = None

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> TensorReport:
        """What `dataclasses.asdict` gave, also read from JSON."""
        values = entry.get("values")
        made = None if values is None else ValuesReport(**values)
        return cls(**{**entry, "shape": tuple(entry["shape"]), "values": made})


@dataclass
class BlockReport:
    """One MoE block: its tensors, the tokens each expert saw, time and memory.

    Attributes:
        peak_bytes: resident memory of the process at most until then; on a GPU, of the tensors there meanwhile.
        rounding: what quantising its weights again has cost; None where they are stored as they were solved for.
        tuned: per expert, how far its output is from the dense one on tokens held back, before and after its weights
            were trained (moesparse.pruning.tuning), None for those that were left; None where the rule trains nothing.
    """

    name: str
    experts: int
    tokens_per_expert: list[int] | None
    tensors: list[TensorReport]
    rescale: list[float] | None
    seconds: float
    peak_bytes: int
    rounding: Rounding | None = None
    tuned: list[tuple[float, float] | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> BlockReport:
        """What `to_dict` gave, also read from JSON."""
        tensors = [TensorReport.from_dict(each) for each in entry["tensors"]]
        rounding = entry.get("rounding")
        return cls(**{**entry, "tensors": tensors, "rounding": None if rounding is None else Rounding(**rounding)})


@dataclass
class Report:
    """What `prune` did, ready for JSON; a checkpoint carries it as moesparse_report.json.

    Attributes:
        recipe: `Recipe.to_dict`.
        version: of moesparse.
        blocks: what was done to the weights, in forward order; empty when only experts were removed.
        calibration: windows, length and tokens, or the hash and tokens of the statistics.
        seconds: of the whole run.
        experts: `ExpertReport.to_dict` when experts were removed.
        fingerprint: `model_fingerprint` of the model before: statistics of it can be shown beside the result. None
            where experts were removed from a quantised checkpoint by a file, and their weights not read.
        sizes: see `expert_sizes`, before ("before") and after ("after").
        budget: `BudgetReport.to_dict` when bytes were given.
        surplus: tensors of the source that the model has no place for, by what became of them, see
            moesparse.checkpoints.edit.Surplus.
        plan: the choice of experts for other copies of the model, a file of its own beside the report.
    """

    recipe: dict[str, Any]
    version: str
    blocks: list[BlockReport]
    calibration: dict[str, Any]
    seconds: float
    experts: dict[str, Any] | None = None
    fingerprint: str | None = None
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    budget: dict[str, Any] | None = None
    surplus: dict[str, list[str]] = field(default_factory=dict)
    plan: ExpertPlan | None = None

    @property
    def sparsity(self) -> float:
        """Share of exact zeros over all expert matrices that are left; 0 when only experts were removed."""
        tensors = [tensor for block in self.blocks for tensor in block.tensors]
        if not tensors:
            return 0.0
        sizes = [torch.Size(tensor.shape).numel() for tensor in tensors]
        return sum(t.sparsity * size for t, size in zip(tensors, sizes, strict=True)) / sum(sizes)

    @property
    def fallbacks(self) -> list[tuple[str, str, int]]:
        """(block, tensor, expert) for every expert that fell back to magnitude."""
        return [(b.name, t.name, expert) for b in self.blocks for t in b.tensors for expert in t.fallbacks]

    @property
    def bits(self) -> float | None:
        """A weight of the expert matrices would take in the formats of their values; None where none were rounded."""
        rounded = [(t.values.bits, torch.Size(t.shape).numel()) for b in self.blocks for t in b.tensors if t.values]
        return sum(bits * size for bits, size in rounded) / sum(size for _, size in rounded) if rounded else None

    @property
    def rounding(self) -> float | None:
        """What quantising again has cost: squared error as a share, over all weights that were pruned or refitted.

        Of both where experts were removed first it is that of the weights. None for a model that is not quantised.
        """
        removal = self.experts or {"refit": [], "blocks": []}
        fits = [each.get("rounding") for each in removal["refit"] or removal["blocks"]]
        found = [block.rounding for block in self.blocks] or [each and Rounding(**each) for each in fits]
        known = [each for each in found if each is not None]
        return sum(known, Rounding()).relative if known else None

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(dataclasses.replace(self, plan=None))
        del found["plan"]
        return {**found, "sparsity": self.sparsity, "rounding": self.rounding, "bits": self.bits}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def expert_sizes(model: nn.Module, blocks: Sequence[MoEBlock], recipe: Recipe | None = None) -> dict[str, int]:
    """Bytes of a model, its buffers left out.

    Args:
        model: holds the blocks.
        blocks: its MoE blocks.
        recipe: whose patterns the expert matrices hold, and in whose values they are stored; None counts them dense.

    Returns:
        {"model": all parameters as they are in memory, "experts": the expert matrices among them, "packed": the expert
        matrices in the packed format, `Pattern.packed_bytes` or `ValueFormat.bytes_of`}.
    """
    matrices = [matrix.weight for block in blocks for matrix in block.matrices]
    experts = sum(weight.numel() * weight.element_size() for weight in matrices)
    packed = experts if recipe is None else sum(_packed_bytes(block, recipe) for block in blocks)
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"model": whole, "experts": experts, "packed": packed}


def _packed_bytes(block: MoEBlock, recipe: Recipe) -> int:
    if recipe.stores_codes and (values := recipe.value_format) is not None:
        shapes = {matrix.name: matrix.weight.shape for matrix in block.matrices}
        return sum(values.bytes_of(shape, recipe.pattern_of(block.name, name)) for name, shape in shapes.items())
    found = {matrix.name: recipe.pattern_of(block.name, matrix.name) for matrix in block.matrices}
    named = {name: DENSE if pattern is None else str(pattern) for name, pattern in found.items()}
    return packed_bytes(matrix_sizes(block), named, block.num_experts)
