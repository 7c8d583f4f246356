"""pack and unpack: swap the experts of a whole model for packed ones, in place, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moesparse.errors import MoESparseError
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.packed.experts import PACKED_DTYPES, SparseExperts
from moesparse.weights.patterns import Pattern, detect_patterns
from moesparse_kernels import NMWeight

__all__ = [
    "PackReport",
    "choose_among",
    "choose_pattern",
    "nothing_to_pack",
    "pack",
    "pack_block",
    "packed_blocks",
    "state_in_form",
    "unpack",
]

_NO_PATTERN = "holds no n:m pattern"
_WIDTH = "and only multiples of 8 can be packed"


@dataclass
class PackReport:
    """What `pack` or `unpack` did.

    Attributes:
        bytes_before: of all expert matrices of the model.
        bytes_after: the same afterwards.
        packed: block name -> parameter name -> "n:m", of the blocks that were swapped.
        dense: block name -> why it stays dense.
    """

    bytes_before: int = 0
    bytes_after: int = 0
    packed: dict[str, dict[str, str]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def pack(model: nn.Module) -> PackReport:
    """Replace the experts of every block whose weights hold an n:m pattern by packed ones, in place.

    Patterns are read from the weights; the two matrices of a block may differ. Afterwards `model.save_pretrained`
    writes a packed checkpoint, where the family's checkpoints allow it. Peak memory: the model and one packed
    block, since a block's dense weights are freed when it is swapped.

    Args:
        model: a pruned transformers model, on any device.

    Returns:
        Bytes before and after, the patterns, and the blocks that stay dense with the reason.

    Raises:
        UnsupportedModelError: the model has no experts, or some that do not fit, or is packed already.
        MoESparseError: no block holds a pattern worth packing; the model is unchanged.
    """
    from moesparse.packed.quantizer import attach

    report = PackReport()
    # taken off the list one by one: a block that stays on it would keep its dense weights alive
    blocks = find_moe_blocks(model)[::-1]
    while blocks:
        block = blocks.pop()
        dense_bytes = sum(matrix.weight.nbytes for matrix in block.matrices)
        report.bytes_before += dense_bytes
        packed = pack_block(block)
        if isinstance(packed, SparseExperts):
            model.set_submodule(block.name, packed)
            report.packed[block.name] = _patterns(packed)
            report.bytes_after += packed.nbytes
        else:
            report.dense[block.name] = packed
            report.bytes_after += dense_bytes
    if not report.packed:
        raise nothing_to_pack(report.dense)
    attach(model, report.packed)
    return report


@torch.no_grad()
def unpack(model: nn.Module) -> PackReport:
    """Replace packed experts by the dense modules they were, bit for bit, in place.

    Peak memory: the model and one dense block.

    Raises:
        MoESparseError: the model holds no packed experts.
    """
    from moesparse.packed.quantizer import detach

    report = PackReport()
    # as in pack: what stays on the list stays in memory
    blocks = list(packed_blocks(model))[::-1]
    while blocks:
        name, packed = blocks.pop()
        report.bytes_before += packed.nbytes
        report.bytes_after += packed.dense_nbytes
        report.packed[name] = _patterns(packed)
        model.set_submodule(name, packed.to_dense())
    if not report.packed:
        raise MoESparseError(f"model must hold packed experts, got {type(model).__name__} without any")
    detach(model)
    return report


@torch.no_grad()
def state_in_form(model: nn.Module, packed: bool) -> tuple[dict[str, Tensor], dict[str, dict[str, str]] | None]:
    """The model's state dict with its experts packed, or all dense, whatever they are in memory.

    Blocks of a model that is packed in part stay as they are when packed. Memory: the tensors that differ from the
    model's own.

    Returns:
        The state dict, and block name -> parameter name -> "n:m" of the packed blocks; None when all are dense.

    Raises:
        MoESparseError: packed, and no block holds a pattern worth packing.
    """
    state = dict(model.state_dict())
    in_memory = dict(packed_blocks(model))
    if packed and in_memory:
        return state, {name: _patterns(module) for name, module in in_memory.items()}
    if not packed:
        for name, module in in_memory.items():
            _replace(state, name, module.to_dense())
        return state, None
    patterns, reasons = {}, {}
    for block in find_moe_blocks(model):
        experts = pack_block(block)
        if isinstance(experts, SparseExperts):
            _replace(state, block.name, experts)
            patterns[block.name] = _patterns(experts)
        else:
            reasons[block.name] = experts
    if not patterns:
        raise nothing_to_pack(reasons)
    return state, patterns


def _replace(state: dict[str, Tensor], name: str, module: nn.Module) -> None:
    """Put a module's tensors in the place of those that the state dict holds for it."""
    for key in [key for key in state if key.startswith(f"{name}.")]:
        del state[key]
    state.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})


def _patterns(module: SparseExperts) -> dict[str, str]:
    return {name: layout.pattern for name, layout in module.layouts.items()}


def nothing_to_pack(reasons: dict[str, str]) -> MoESparseError:
    """What to say of a model none of whose blocks can be packed, for the reason of the first."""
    name, reason = next(iter(reasons.items()))
    cure = "; prune it to one first, such as 2:4" if _NO_PATTERN in reason and _WIDTH not in reason else ""
    return MoESparseError(f"model must hold n:m sparse experts to be packed: {name}: {reason}{cure}")


def packed_blocks(model: nn.Module) -> Iterator[tuple[str, SparseExperts]]:
    """Name and module of every packed block, in forward order."""
    for name, module in model.named_modules():
        if isinstance(module, SparseExperts):
            yield name, module


def choose_pattern(weight: Tensor) -> Pattern | str:
    """The sparsest n:m pattern that holds in a weight [E, out, in] and saves memory, or why there is none."""
    return choose_among(detect_patterns(weight), weight.dtype, weight.shape[-1])


def choose_among(patterns: Sequence[Pattern], dtype: torch.dtype | None, in_features: int) -> Pattern | str:
    """The one of the patterns found, sparsest first, that a weight is packed in, or why it is not."""
    if dtype not in PACKED_DTYPES:
        return f"is {dtype}, which cannot be packed"
    if in_features % 8:
        return f"has rows of {in_features} inputs, {_WIDTH}: a row of the bitmask is whole bytes"
    bits = dtype.itemsize * 8
    for pattern in patterns:
        # one bit per weight says where the kept ones are
        if in_features % (pattern.m or 1) == 0 and bits * pattern.density + 1 < bits:
            return pattern
    return f"holds {patterns[0]}, which takes no less memory packed" if patterns else _NO_PATTERN


def pack_block(block: MoEBlock) -> SparseExperts | str:
    """The packed experts, or why they stay dense."""
    weights: dict[str, NMWeight] = {}
    choices = {matrix.name: choose_pattern(matrix.weight) for matrix in block.matrices}
    reasons = [f"{name} {choice}" for name, choice in choices.items() if isinstance(choice, str)]
    if reasons:
        return "; ".join(reasons)
    for matrix in block.matrices:
        pattern = choices[matrix.name]
        assert isinstance(pattern, Pattern) and pattern.group is not None
        n, m = pattern.group
        weights[matrix.name] = NMWeight.pack(matrix.weight, n=n, m=m)
    return SparseExperts(block, weights)
