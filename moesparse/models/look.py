"""The one look at every layer of a model before any work: finite, dense, and sampled for the fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moesparse.errors import CalibrationError, MoESparseError
from moesparse.models.blocks import MoEBlock
from moesparse.models.fingerprint import (
    fingerprint_sample,
    model_fingerprint,
    room_for_samples,
    router_sketch,
    router_weight,
)
from moesparse.models.layers import Layers, RunOptions
from moesparse.models.next_token import attached
from moesparse.progress import ProgressEvent
from moesparse.weights.patterns import all_finite

__all__ = ["Look", "check_dense", "check_finite", "sketches"]

# Exact zeros in a trained weight are rare (bf16 underflow), but a bf16 copy of 4-bit weights has 8 to 14% of them, more
# in one row than in another. A pruned expert has a quarter of them or more, or in every row the same number.
_FEW_ZEROS, _MANY_ZEROS = 0.01, 0.2

_SAMPLE_PER_EXPERT = 2**16


class Look:
    """Looks at every layer of a model once, while it is in memory, before any work.

    Args:
        layers: of the model.
        options: `allow_pruned`, and `progress`, called with every layer.
        dense: refuse experts that were pruned before; what reads no text may go on from there.
        values: of all weights are wanted; else those of quantised experts, which are only to be copied, are not read.
        score: gives the scores of a block's experts, [E], from its weights; None scores none.

    Attributes:
        weight_scores: block name -> its scores, once it was seen.
        samples: `fingerprint_sample` of every tensor that waits on the disk, once it was seen.
        routers: block name -> `router_sketch` of its router, once it was seen; none where no matrix is its router's.
        complete: no weight was left unread, so that there is a `fingerprint`.
    """

    def __init__(
        self,
        layers: Layers,
        options: RunOptions,
        *,
        dense: bool = True,
        values: bool = True,
        score: Callable[[MoEBlock], Tensor] | None = None,
    ) -> None:
        self._layers, self._progress = layers, options.progress
        self._dense = dense and not options.allow_pruned
        self._values, self.complete = values, True
        self.samples = room_for_samples(layers.waiting())
        self.routers: dict[str, Tensor] = {}
        self._score = score
        self.weight_scores: dict[str, Tensor] = {}

    def __call__(self, position: int) -> None:
        """Look at one, which is held.

        Raises:
            MoESparseError: a weight of an expert is not finite. CalibrationError: experts were pruned before.
        """
        self._progress(ProgressEvent("check", position, len(self._layers), "layer"))
        here = self._layers.blocks_at(position)
        check_finite(here)
        if self._dense:
            check_dense(here)
        self.routers |= sketches(here)
        if self._score is not None:
            self.weight_scores |= {block.name: self._score(block) for block in here}
        for name, tensor in self._layers.state(position).items():
            if tensor.is_meta:
                self.complete = False
            else:
                self.samples[name].copy_(fingerprint_sample(tensor))

    def at_all(self) -> None:
        """Look at every layer, where nothing else holds them one after the other."""
        for position in range(len(self._layers)):
            with self._layers.hold(position) if self._values else self._layers.hold_to_cut(position):
                self(position)

    @property
    def fingerprint(self) -> str:
        """`model_fingerprint`, once every layer was seen; of the model that transformers loads."""
        assert self.complete
        found = attached(self._layers.model)
        beside = () if found is None else tuple(f"{layer.name}." for layer in found.layers)
        return model_fingerprint(self._layers.model, self.samples, beside)


def sketches(blocks: Sequence[MoEBlock]) -> dict[str, Tensor]:
    """Block name -> `router_sketch` of its router, where a matrix is its router's."""
    found = {block.name: router_weight(block) for block in blocks}
    return {name: router_sketch(weight) for name, weight in found.items() if weight is not None}


def check_finite(blocks: Sequence[MoEBlock]) -> None:
    """Refuse experts with a NaN or an infinity, of those that are in memory.

    Raises:
        MoESparseError: names the matrix.
    """
    for block in blocks:
        for matrix in block.matrices:
            if not matrix.parameter.is_meta and not all_finite(matrix.parameter):
                raise MoESparseError(f"{block.name}.{matrix.name} must hold finite weights, got NaN or infinity")


def check_dense(blocks: Sequence[MoEBlock]) -> None:
    """Refuse a model that was pruned before: its sums would describe the pruned experts, and its zeros would come back.

    Looks at about 65,536 weights of every expert, and at the router's tensors of E entries.

    Raises:
        CalibrationError: names the block with an expert of zeros, with those that a pruning leaves, or a masked router.
    """
    cure = "Calibrate the dense model, or go on from this one with allow_pruned=True."
    for block in blocks:
        for matrix in block.matrices:
            weight = matrix.weight
            if weight.is_meta:
                continue
            rows_apart = max(1, weight[0].numel() // _SAMPLE_PER_EXPERT)
            sample = weight[:, ::rows_apart]
            in_rows = 1 - torch.count_nonzero(sample, dim=2) / sample.shape[2]
            zeros = in_rows.mean(dim=1)
            alike = (in_rows == in_rows[:, :1]).all(dim=1) if sample.shape[1] > 1 else zeros >= 0
            pruned = (zeros > _MANY_ZEROS) | ((zeros > _FEW_ZEROS) & alike)
            expert = int(torch.where(pruned, zeros, -1).argmax())
            share = float(zeros[expert])
            if pruned[expert]:
                amount = "nothing but zeros" if share == 1 else f"{share:.0%} zeros"
                raise CalibrationError(
                    f"the model must be dense, got {amount} in {block.name}.{matrix.name}, expert {expert}. {cure}"
                )
        for name, tensor in _router_tensors(block):
            lowest = torch.finfo(tensor.dtype).min
            if (tensor <= lowest).any():
                raise CalibrationError(
                    f"the model must use all its experts, got a masked one in {block.moe_name}.{name}. {cure}"
                )


def _router_tensors(block: MoEBlock) -> Iterator[tuple[str, Tensor]]:
    """Weights, biases and corrections beside the experts that have one entry or row per expert."""
    own = {id(tensor) for tensor in [*block.experts.parameters(), *block.experts.buffers()]}
    for name, tensor in [*block.moe.named_parameters(), *block.moe.named_buffers()]:
        per_expert = tensor.ndim in (1, 2) and block.num_experts in tensor.shape
        if per_expert and tensor.is_floating_point() and not tensor.is_meta and id(tensor) not in own:
            yield name, tensor.detach()
