"""Merge experts in the place of removing them: groups become one expert each, a weighted mean of aligned weights.

An expert computes the same in whatever order its intermediate neurons stand. So before a mean is taken, the neurons of
every expert of a group are put into the order that fits those of its first one best, a linear assignment over

    ream      distance of the neurons' activations on some tokens + distance of their weights, each scaled to norm 1
    m-smoe    inner product of their weights (weight matching, Ainsworth et al. 2023, arXiv 2209.04836)
    hc-smoe   as they stand

where the weights of a neuron are its rows of gate and up, their biases, and its column of down. What groups are is in
`moesparse.experts.grouping`, by

    ream      cosine of mean gated outputs + cosine of router logits
    m-smoe    cosine of router logits
    hc-smoe   mean outputs, and no router

over evenly spaced tokens of the calibration text, each of which every expert is run on. The weight of an expert in its
group is its share of the group's scores. REAM: Jha et al. 2026, arXiv 2604.04356; M-SMoE: Li et al. 2024, arXiv
2310.01334; HC-SMoE: Chen et al. 2025, arXiv 2410.08589.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesparse.errors import UnsupportedModelError
from moesparse.experts.assignment import linear_assignment
from moesparse.experts.grouping import cluster, cosines, nearest, pseudo_prune
from moesparse.models.blocks import MoEBlock
from moesparse.models.experts_function import experts_watched
from moesparse.models.fingerprint import router_weight
from moesparse.models.stream import LayerStream
from moesparse.system.processes import Batch

__all__ = [
    "MERGED_BY",
    "METHODS",
    "Merged",
    "Seen",
    "check_merging",
    "form_groups",
    "memory_for_merging",
    "merge_experts",
    "merging_flops",
    "observe",
]

MERGED_BY = {"ream": "reap", "m-smoe": "frequency", "hc-smoe": "frequency"}
"""How experts are merged -> the criterion by which its paper says who stays and what an expert weighs."""

METHODS = ("remove", *MERGED_BY)
"""What becomes of the experts that do not stay."""

MAX_SEEN = 4096
"""Tokens that every expert of a block is run on, evenly spaced."""


@dataclass(frozen=True)
class Merged:
    """One expert in the place of several.

    Attributes:
        experts: ids in the dense block, first the one whose place and router row it has.
        weights: of each, sum 1.
        orders: for each but the first: neuron i of the result is its neuron orders[..][i]; empty where all stand as
            they stood.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    orders: tuple[tuple[int, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return self.summary() | ({"orders": [list(order) for order in self.orders]} if self.orders else {})

    def summary(self) -> dict[str, Any]:
        """Who and how much, without the order of neurons, ready for JSON."""
        return {"experts": list(self.experts), "weights": list(self.weights)}

    @classmethod
    def from_dict(cls, entry: Any) -> Merged:
        """What `to_dict` gave, also read from JSON; a ValueError where that cannot be."""
        try:
            orders = tuple(map(tuple, entry.get("orders", ())))
            found = cls(tuple(entry["experts"]), tuple(map(float, entry["weights"])), orders)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"must be experts, weights and orders, got {entry}") from error
        count = len(found.experts)
        known = count > 1 and len(found.weights) == count and len(found.orders) in (0, count - 1)
        if not known or any(weight < 0 for weight in found.weights) or abs(sum(found.weights) - 1) > 1e-6:
            raise ValueError(f"must be two experts or more with weights of sum 1, got {entry}")
        if not all(sorted(order) == list(range(len(order))) for order in found.orders):
            raise ValueError(f"orders must hold every neuron once, got others for experts {list(found.experts)}")
        return found


@dataclass(frozen=True)
class Seen:
    """What a block was given on some tokens.

    Attributes:
        hidden: [n, H], inputs of its experts.
        logits: [n, E] float32, of its router; None where no merging asks for them.
    """

    hidden: Tensor
    logits: Tensor | None


def check_merging(blocks: Sequence[MoEBlock], method: str) -> None:
    """Refuse blocks whose routers a merging cannot read, before any work.

    Raises:
        UnsupportedModelError: names the block.
    """
    for block in blocks if method in ("ream", "m-smoe") else ():
        _logits_of(block)


def memory_for_merging(block: MoEBlock, tokens: int) -> int:
    """Bytes that merging a block takes: inputs and logits of the tokens that are seen, the activations of two experts
    on them, the weights of two in float32, and three matrices of a neuron by a neuron.
    """
    n, I, H = min(tokens, MAX_SEEN), block.intermediate_size, block.hidden_size
    return 4 * (n * (H + 2 * block.num_experts + 4 * I) + 6 * I * H + 3 * I * I)


def merging_flops(block: MoEBlock, tokens: int) -> float:
    """Multiply-adds times two of running every expert on the tokens that are seen, about."""
    weights = sum(matrix.weight.numel() for matrix in block.matrices)
    return 2.0 * min(tokens, MAX_SEEN) * weights


def observe(stream: LayerStream, position: int, block: MoEBlock, method: str) -> list[Batch]:
    """Run a layer, which is held, over the batches of this process and note the fields of `Seen` of each.

    The hidden states of the stream stay before the layer.
    """
    every = -(-stream.tokens // MAX_SEEN)
    hidden: list[Tensor] = []
    logits: list[Tensor] = []
    parts: list[Batch] = []
    handle = None
    if method != "hc-smoe":
        module, weight, bias = _logits_of(block)

        def note(_module: nn.Module, given: Any, output: Any) -> None:
            found = output if isinstance(module, nn.Linear) else _product(given[0], weight, bias)
            logits.append(found.detach().flatten(0, -2)[:, : block.num_experts].float())

        handle = module.register_forward_hook(note)
    try:
        with experts_watched(block, lambda given, *_: hidden.append(given.detach())):
            for number, _ in enumerate(stream.run(position, keep=False)):
                real = stream.token_mask(number, position)
                seen = [hidden.pop(), *logits]
                logits.clear()
                chosen = slice(None, None, every)
                keep = slice(None) if real is None else real[chosen].to(seen[0].device)
                parts.append(tuple(tensor[chosen][keep].clone() for tensor in seen))
    finally:
        if handle is not None:
            handle.remove()
    return parts


@torch.no_grad()
def form_groups(
    block: MoEBlock, seen: Seen, method: str, scores: Tensor, kept: Tensor, parts: int = 1
) -> tuple[Tensor, tuple[Merged, ...]]:
    """Which experts of a dense block become one, and how.

    Args:
        block: dense, in memory.
        seen: of the block.
        method: one of MERGED_BY.
        scores: [E] float64, by the criterion of the choice; -inf for experts without tokens.
        kept: [K] ids that the choice keeps; hc-smoe keeps as many, and those of its groups.
        parts: groups of the router.

    Returns:
        The ids that stay, ascending, and every group of more than one.
    """
    alive = scores > -torch.inf
    weights = scores.clamp_min(0.0)
    if method == "ream" and bool(alive.any()):
        # as the authors do, so that experts without tokens are not lost
        weights = torch.where(alive, weights, weights[alive].min())
    if method == "hc-smoe":
        groups = cluster(_mean_outputs(block, seen.hidden), scores, len(kept), parts)
    else:
        assert seen.logits is not None
        alike = cosines(seen.logits.T).cpu()
        if method == "ream":
            alike += cosines(_mean_outputs(block, seen.hidden, seen.logits.softmax(dim=1))).cpu()
            groups = pseudo_prune(alike, scores, kept, parts)
        else:
            groups = nearest(alike, kept, parts)
    merged = [_merged(block, group, weights, seen.hidden, method) for group in groups if len(group) > 1]
    return torch.tensor(sorted(group[0] for group in groups)), tuple(merged)


@torch.no_grad()
def merge_experts(block: MoEBlock, groups: Sequence[Merged]) -> None:
    """Write every group's merged expert into the place of its first one; the others stay, to be cut out.

    Sums are float32. Biases are merged like weights. What else is there once for every expert stays the first one's.

    Args:
        block: dense, in memory; changed in place.
        groups: of it.
    """
    rows = _rows_of_neurons(block)
    for group in groups:
        orders = [None, *group.orders] if group.orders else [None] * len(group.experts)
        experts = list(zip(group.experts, group.weights, orders, strict=True))
        for matrix in block.matrices:
            is_up = matrix.input == "hidden"
            for tensor in (matrix.weight, matrix.bias):
                if tensor is None:
                    continue
                total = torch.zeros_like(tensor[0], dtype=torch.float32)
                for expert, weight, order in experts:
                    part = tensor[expert]
                    if order is not None:
                        at = torch.tensor(order, device=part.device)
                        if is_up:
                            index = torch.empty(rows.numel(), dtype=torch.int64, device=part.device)
                            index[rows.to(part.device)] = rows.to(part.device)[at]
                            part = part[index]
                        elif part.ndim == 2:
                            part = part[:, at]
                    total.add_(part.float(), alpha=weight)
                tensor[group.experts[0]] = total.to(tensor.dtype)


def _merged(block: MoEBlock, group: list[int], weights: Tensor, hidden: Tensor, method: str) -> Merged:
    share = weights[group]
    share = share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / len(group))
    orders: list[tuple[int, ...]] = []
    if method != "hc-smoe":
        first = _neurons(block, group[0], hidden, method)
        for expert in group[1:]:
            orders.append(tuple(linear_assignment(_cost(first, _neurons(block, expert, hidden, method))).tolist()))
    return Merged(tuple(group), tuple(share.tolist()), tuple(orders))


def _neurons(block: MoEBlock, expert: int, hidden: Tensor, method: str) -> tuple[Tensor, ...]:
    """[I, n] of an expert's neurons: their weights, and for ream their activations, each row of norm 1 there."""
    up, down = block.matrices
    rows = _rows_of_neurons(block).to(up.weight.device)
    parts = [up.weight[expert][column] for column in rows.unbind(1)]
    if up.bias is not None:
        parts.append(up.bias[expert][rows])
    weights = torch.cat([*parts, down.weight[expert].T], dim=1).float()
    if method == "m-smoe":
        return (weights,)
    activations = block.activation_of(expert, hidden.to(up.weight.dtype)).float().T
    return F.normalize(activations, dim=1), F.normalize(weights, dim=1)


def _cost(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
    if len(one) == 1:
        return -(one[0] @ other[0].T)
    # distances of unit rows
    return sum((2 - 2 * a @ b.T).clamp_min(0).sqrt() for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def _rows_of_neurons(block: MoEBlock) -> Tensor:
    """[I, 2]: rows of the first matrix that are a neuron's gate and up; [I, 1] in families without a gate."""
    I = block.intermediate_size
    if not block.has_gate:
        return torch.arange(I)[:, None]
    return torch.arange(2 * I).view(2, I).T if block.is_concatenated else torch.arange(2 * I).view(I, 2)


def _mean_outputs(block: MoEBlock, hidden: Tensor, gates: Tensor | None = None) -> Tensor:
    """[E, H] float64: mean over tokens of every expert's output, times its gate [n, E] where that is given."""
    hidden = hidden.to(block.matrices[0].weight.dtype)
    found = []
    for expert in range(block.num_experts):
        output = block.output_of(expert, block.activation_of(expert, hidden)).double()
        found.append((output if gates is None else output * gates[:, expert, None]).mean(0))
    return torch.stack(found)


def _logits_of(block: MoEBlock) -> tuple[nn.Module, Tensor, Tensor | None]:
    """The module that computes the logits of a block's router, its matrix with a row for each expert, and its bias.

    Raises:
        UnsupportedModelError: there is no such module; names the block.
    """
    wanted, modules = router_weight(block), [] if block.router is None else list(block.router.modules())
    for module in modules:
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if wanted is not None and weight is not None and weight.data_ptr() == wanted.data_ptr():
            return module, weight.detach(), None if bias is None else bias.detach()
    raise UnsupportedModelError(
        f"{block.moe_name or block.layer} must have a router with a matrix of a row for each expert to merge by its "
        "logits, and none was found: expert_method='hc-smoe' needs none"
    )


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden.float(), weight.float())
    return logits if bias is None else logits + bias.float()
