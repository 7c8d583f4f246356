"""Experts that can be trained, and the expert-wise loss: all experts of a block in one grouped product per matrix.

Notation: T tokens, K slots a token, R = rows that are routed, E experts. An id of E or above marks an empty slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesparse.distillation.matching import Pair
from moesparse.models.blocks import ExpertMatrix, MoEBlock
from moesparse.models.modes import fits_grouped_mm

__all__ = ["Routed", "StudentExperts", "TeacherExperts", "expert_loss", "slot_outputs"]


@dataclass(frozen=True)
class Routed:
    """What a teacher's block was called with and what its experts gave.

    Attributes:
        hidden: [T, H], inputs of the experts.
        index: [T, K] int64, their ids; E for padding.
        outputs: [T, K, H], output of each slot's expert before the gate; zero in empty slots.
    """

    hidden: Tensor
    index: Tensor
    outputs: Tensor


def slot_outputs(block: MoEBlock, hidden: Tensor, index: Tensor) -> Tensor:
    """Output of every slot's expert before the gate, differentiable in the weights and in `hidden`.

    Args:
        block: its weights are cast to the dtype of `hidden`, so that fp32 weights can train a bf16 model.
        hidden: [T, H].
        index: [T, K].

    Returns:
        [T, K, H] in the dtype of `hidden`, zero in empty slots. One host synchronisation finds how many there are.
    """
    T, K = index.shape
    E = block.num_experts
    ids, order = index.flatten().sort(stable=True)
    counts = torch.bincount(ids.clamp(max=E), minlength=E + 1)[:E]
    R = int(counts.sum())
    order, ids = order[:R], ids[:R]
    offsets = counts.cumsum(0).int()
    up, down = block.matrices
    rows = _grouped(up, hidden.index_select(0, order // K), ids, offsets)
    rows = block.post_expert_norm(_grouped(down, block.activation(rows), ids, offsets))
    return rows.new_zeros(T * K, rows.shape[1]).index_copy(0, order, rows).view(T, K, -1)


def _grouped(matrix: ExpertMatrix, rows: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """rows [R, in] sorted by expert times each expert's matrix, plus its bias: [R, out]."""
    weight = matrix.parameter.to(rows.dtype)
    weight = weight if matrix.transposed else weight.mT
    if fits_grouped_mm(weight):
        out = F.grouped_mm(rows, weight, offs=offsets)
    else:
        counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        out = torch.cat([part @ one for part, one in zip(rows.split(counts), weight, strict=True)])
    if not matrix.experts.has_bias:
        return out
    return out + getattr(matrix.experts, f"{matrix.name}_bias").to(rows.dtype)[ids]


def combine(outputs: Tensor, gates: Tensor) -> Tensor:
    """Gated sum over a token's slots: [T, H] from [T, K, H] and [T, K], added up in float32."""
    # an einsum would be T products of a row and a matrix, at twice the time
    return (outputs.float() * gates.float()[..., None]).sum(1).to(outputs.dtype)


def expert_loss(block: MoEBlock, routed: Routed, new_ids: Tensor) -> Tensor:
    """Sum over experts of MSE(teacher expert, student expert) on the teacher's routing and tokens.

    Args:
        block: the student's.
        routed: of the teacher's block.
        new_ids: [E + 1], teacher id -> student id, see `Pair`.

    Returns:
        () float32: for each expert of the student the mean of the squared difference over its tokens and H columns,
        added up; an expert without tokens adds nothing.

    Source: Xie et al., 2024, arXiv 2410.12013, eq. 10.
    """
    E = block.num_experts
    index = new_ids.to(routed.index.device)[routed.index]
    outputs = slot_outputs(block, routed.hidden, index)
    squared = (outputs.float() - routed.outputs.float()).square().mean(-1)
    counts = torch.bincount(index.flatten(), minlength=E + 1)
    share = torch.where(counts > 0, 1.0 / counts.clamp(min=1), 0.0)
    share[E] = 0.0
    return (squared * share[index]).sum()


class TeacherExperts:
    """Experts function of a teacher's block: computes it, and keeps what the student's loss needs.

    Attributes:
        token_mask: [T] bool, False at padding, set before every call; None when there is none.
        routed: of the last call.
    """

    def __init__(self, block: MoEBlock) -> None:
        self.block = block
        self.token_mask: Tensor | None = None
        self.routed: Routed | None = None

    def aim(self, token_mask: Tensor | None, first_window: int, window_length: int) -> None:
        """Before every batch of a `LayerStream`; where it lies in the text is not asked here."""
        self.token_mask = token_mask

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        outputs = slot_outputs(self.block, hidden_states, top_k_index)
        index = top_k_index.clamp(max=self.block.num_experts)
        if self.token_mask is not None:
            index = index.masked_fill(~self.token_mask.to(index.device)[:, None], self.block.num_experts)
        self.routed = Routed(hidden_states, index, outputs)
        return combine(outputs, top_k_weights)


class StudentExperts:
    """Experts function of a student's block: its own forward, and the expert loss against `target` beside it.

    Attributes:
        target: what the teacher's block did with the same windows; None computes no loss.
        loss: () float32 of the last call.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.target: Routed | None = None
        self.loss: Tensor | None = None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        block = self.pair.student
        if self.target is not None:
            self.loss = expert_loss(block, self.target, self.pair.new_ids)
        return combine(slot_outputs(block, hidden_states, top_k_index), top_k_weights)
