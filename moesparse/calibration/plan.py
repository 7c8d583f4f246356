"""What a pass of text through a checkpoint will take, known before a weight is read: memory, bytes and time.

The plan of one pass that records the experts is here; moesparse.pruning.plan adds what pruning does beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moesparse.calibration.statistics import MOMENT_KINDS, input_sizes, memory_needed
from moesparse.errors import UsageError
from moesparse.models.blocks import MoEBlock, decoder_layers
from moesparse.models.layers import RunOptions
from moesparse.system.memory import available_memory
from moesparse.system.processes import Processes

__all__ = ["Plan", "file_flops", "head_size", "plan_pass", "spills"]

# a byte of the checkpoint is read and copied into its layer, or hashed and written, as operations that a product does
# in that time: from magnitude, which does little else, in bench_cost
_READ_FLOPS = 115
_WRITE_FLOPS = 130
# compiled products and buffers that torch's CPU libraries keep, see moesparse.system.memory
_KEPT_BY_LIBRARIES = 64 * 2**20
# of every expert in float64: its sums and its maximum over all text, and those of a window
_SUMS_OF_TEXT = 8
_SUMS_OF_WINDOW = 7


@dataclass(frozen=True)
class Plan:
    """Bytes unless said otherwise.

    Attributes:
        layers: decoder layers; `blocks` of them hold experts.
        experts: of a block.
        tokens: of the calibration set.
        parameters: of the model; `active_parameters` work on one token.
        weights: the model's, in its dtype.
        output: the expert matrices of the result, packed (`packed`) and dense.
        outside: what lies outside of the decoder layers, in memory all the time.
        layer: the largest decoder layer.
        moments: second moments of the largest block, with the cross moment of the asymmetric rule.
        workspace: the largest matrix while it is pruned, or block while it is refitted: fp32 copies and factors; none
            where it is done in place.
        activations: of one batch in the widest part.
        hidden_states: of the calibration set between two layers, as far as one process holds them.
        flops: multiply-adds times two: forward passes, second moments, solvers; masks and files as much as takes the
            same time.
        keep: experts of a block that stay, on average where layers differ; None for all.
        sums: of all experts and windows, to choose by, in memory all the time.
        processes: that share the work; what is in memory is in that of each.
        formats: in which a checkpoint stores quantised weights; `weights` and `packed` are those of the dequantised.
        stored: of the tensors of a quantised checkpoint, on the disk.
        stored_after: the same of the result.
    """

    layers: int
    blocks: int
    experts: int
    tokens: int
    parameters: int
    active_parameters: int
    weights: int
    packed: int
    outside: int
    layer: int
    moments: int
    workspace: int
    activations: int
    hidden_states: int
    flops: dict[str, float]
    keep: int | None = None
    sums: int = 0
    processes: int = 1
    formats: tuple[str, ...] = ()
    stored: int = 0
    stored_after: int = 0

    @property
    def peak(self) -> int:
        """Bytes in memory at most with the hidden states in a file: but for `sums` it does not grow with the layers."""
        held = _KEPT_BY_LIBRARIES + self.outside + self.sums + self.layer + self.moments
        return held + max(self.workspace, self.activations)

    @property
    def peak_in_memory(self) -> int:
        """The same with the hidden states in memory."""
        return self.peak + self.hidden_states

    def seconds(self, flops_per_second: float, forward: float | None = None) -> float:
        """An estimate, good to a factor of two or three; `moesparse.system.speed` gives the rates, of one process.

        Args:
            flops_per_second: of float32.
            forward: of the model's dtype, in which it is run; None where that is the same.
        """
        others = sum(flops for name, flops in self.flops.items() if name != "forward")
        seconds = self.flops["forward"] / (forward or flops_per_second) + others / flops_per_second
        return seconds / self.processes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "peak_in_memory": self.peak_in_memory}


def plan_pass(
    model: nn.Module,
    blocks: Sequence[MoEBlock],
    moments: str,
    *,
    windows: int,
    length: int,
    batch_size: int,
    processes: int = 1,
) -> Plan:
    """Plan one pass that records every expert, from shapes alone.

    Args:
        model: its tensors may all be on the meta device.
        blocks: its MoE blocks.
        moments: second moments to collect.
        windows: of the calibration set, of `length` tokens.
        length: tokens of a window.
        batch_size: windows in one forward.
        processes: that share the work.
    """
    layers, _ = decoder_layers(model, list(blocks))
    sizes = [_bytes(layer) for layer in layers]
    whole, tokens = _bytes(model), windows * length
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(matrix.weight.numel() for block in blocks for matrix in block.matrices)
    routed = sum(matrix.weight[0].numel() * _routed(block) for block in blocks for matrix in block.matrices)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    active = parameters - experts + routed - embedding.weight.numel()
    hidden, item = embedding.weight.shape[1], embedding.weight.element_size()
    held = min(windows, math.ceil(windows / batch_size / processes) * batch_size)
    widest = max(max(input_sizes(block).values()) * (block.top_k or 1) for block in blocks)
    squares = sum(_routed(block) * size**2 for block in blocks for size in input_sizes(block).values())
    return Plan(
        layers=len(layers),
        blocks=len(blocks),
        experts=max(block.num_experts for block in blocks),
        tokens=tokens,
        parameters=parameters,
        active_parameters=active,
        weights=whole,
        packed=0,
        outside=whole - sum(sizes),
        layer=max(sizes),
        moments=max(memory_needed([block], moments) for block in blocks),
        workspace=0,
        activations=batch_size * length * (6 * hidden + 4 * widest) * max(item, 4),
        hidden_states=held * length * hidden * item,
        flops={
            "forward": 2.0 * tokens * (active - head_size(model)),
            "moments": 2.0 * MOMENT_KINDS[moments] * tokens * squares,
            "solvers": 0.0,
            "masks": 0.0,
            "training": 0.0,
            "files": file_flops(2 * whole, 0),
        },
        sums=sum(8 * block.num_experts * (_SUMS_OF_TEXT + _SUMS_OF_WINDOW * windows) for block in blocks),
        processes=processes,
    )


def spills(plan: Plan, options: RunOptions, processes: Processes) -> bool:
    """Whether the hidden states go to a file.

    Args:
        plan: of one process.
        options: `max_memory`, the RAM of one process, None its part of what this machine has free; and the device.
        processes: that share the work.

    Raises:
        UsageError: what cannot go there takes more than `max_memory`.
    """
    free, max_memory = available_memory(), options.max_memory
    room = max_memory if max_memory is not None or free is None else free // processes.here
    # on a GPU the layer at work, its sums and its factors lie there; it is written from RAM
    on_gpu = options.device is not None and options.device.type != "cpu"
    needed = plan.outside + plan.layer if on_gpu else plan.peak
    if max_memory is not None and needed > max_memory:
        raise UsageError(
            f"max_memory must be at least {needed:,} bytes for this run ({plan.outside:,} outside of the layers, "
            f"{plan.layer:,} for a layer, {plan.moments:,} for second moments, {plan.workspace:,} to prune a matrix or "
            f"refit a block), got {max_memory:,}. A saliency and update without second moments, or a smaller "
            "batch_size, needs less"
        )
    return room is not None and needed + plan.hidden_states > room


def file_flops(read: float, written: float) -> float:
    """What reading and writing so many bytes takes, as operations."""
    return _READ_FLOPS * read + _WRITE_FLOPS * written


def head_size(model: nn.Module) -> int:
    """Parameters of a head of its own: calibration computes no logits."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return 0 if head is None or head.weight is embedding.weight else head.weight.numel()


def _routed(block: MoEBlock) -> int:
    """Experts that work on a token."""
    return block.top_k or block.num_experts


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())
