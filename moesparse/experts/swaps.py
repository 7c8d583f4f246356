"""Swap experts after the first choice while the block's output on calibration tokens gets nearer to the dense one.

A criterion scores experts one by one; whether two of them can stand in for each other it cannot see. Here the error is
that of the whole block: for each swap of a kept expert for a removed one the router is run as it would be after the
removal, and the outputs of the experts it then chooses, computed once for all experts, are added up. The best swap is
taken until none helps. So the error on these tokens is never above that of the first choice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.experts.router_groups import router_groups
from moesparse.experts.surgery import RemovalPlan, plan_removal
from moesparse.models.blocks import MoEBlock
from moesparse.models.experts_function import experts_watched
from moesparse.models.modes import replaced_forwards
from moesparse.progress import ProgressEvent, ProgressLike, reporting

__all__ = ["RefineReport", "refine_choice"]


@dataclass(frozen=True)
class RefineReport:
    """One block.

    Attributes:
        name: of the block.
        before: squared error of its output with the first choice, relative to the dense output, on the tokens used.
        after: the same with the swaps.
        swaps: (expert that went, expert that stays instead), in the order taken.
        tried: swaps evaluated, each one run of the router over the tokens.
        seconds: wall time.
    """

    name: str
    before: float
    after: float
    swaps: tuple[tuple[int, int], ...]
    tried: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@torch.no_grad()
def refine_choice(
    model: nn.Module,
    kept: Sequence[Tensor],
    windows: Tensor,
    *,
    tokens: int = 2048,
    max_swaps: int | None = None,
    protect: Sequence[tuple[int, int]] = (),
    progress: ProgressLike = "auto",
) -> tuple[list[Tensor], list[RefineReport]]:
    """Improve a choice of experts by swapping pairs; the model is left as it was.

    Every block is judged on the dense model's inputs. Holds the outputs of all experts of one block for the tokens,
    4 * E * tokens * H bytes, and costs K * (E - K) router runs per swap taken.

    Args:
        model: the dense model.
        kept: per block the first choice, as from `choose_experts`.
        windows: [n, t] token ids without padding; the first ones that hold `tokens` are used.
        tokens: calibration tokens.
        max_swaps: per block; None goes on until no swap helps.
        protect: (block, expert) pairs that must stay.
        progress: as in `moesparse.prune`; a function is called before every block.

    Returns:
        The new choice and what it gained in each block.

    Raises:
        UnsupportedModelError: the router is not a module of its own, or picks experts from a table of tokens.
    """
    if tokens < 1:
        raise UsageError(f"tokens must be at least 1, got {tokens}")
    plan = plan_removal(model, kept, allow_non_uniform=True)
    for position, block in enumerate(plan.blocks):
        if block.router is None or plan.tables[position] or block.moe_name == block.layer:
            raise UnsupportedModelError(
                f"{block.name}: swaps need a router that can be run by itself on other experts, and here is none; "
                "keep the first choice"
            )
    count = -(-tokens // windows.shape[1])
    calls = _capture(model, plan.blocks, windows[:count])
    refined, reports = [], []
    with reporting(progress) as told:
        for position, block in enumerate(plan.blocks):
            told(ProgressEvent("refine", position, len(plan.blocks), "block", name=block.name))
            fixed = {expert for where, expert in protect if where == position}
            choice, report = _refine(plan, position, calls[position], fixed, max_swaps)
            refined.append(choice)
            reports.append(report)
    return refined, reports


@dataclass
class _Call:
    """What the MoE module and its experts were called with, and what the experts gave."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    hidden: Tensor | None = None
    output: Tensor | None = None


def _refine(
    plan: RemovalPlan, position: int, call: _Call, fixed: set[int], max_swaps: int | None
) -> tuple[Tensor, RefineReport]:
    started = time.perf_counter()
    block = plan.blocks[position]
    assert call.hidden is not None and call.output is not None
    outputs = _all_outputs(block, call.hidden)
    target = call.output.float()
    energy = float(target.double().square().sum()) or 1.0

    def error(ids: Tensor) -> float:
        index, gates = _route(plan, position, ids, call)
        token = torch.arange(len(target), device=target.device)[:, None]
        y = (outputs[ids.to(index.device)[index], token] * gates[..., None].float()).sum(1)
        return float((target - y).double().square().sum()) / energy

    groups = router_groups(block)
    size = block.num_experts // (1 if groups is None else groups.count)
    choice = plan.kept[position]
    first = best = error(choice)
    swaps: list[tuple[int, int]] = []
    tried = 0
    while max_swaps is None or len(swaps) < max_swaps:
        inside = set(choice.tolist())
        found = None
        for out in sorted(inside - fixed):
            for new in sorted(set(range(block.num_experts)) - inside):
                if out // size != new // size:
                    continue
                candidate = torch.tensor(sorted(inside - {out} | {new}))
                tried += 1
                value = error(candidate)
                if value < best:
                    best, found = value, (out, new, candidate)
        if found is None:
            break
        swaps.append(found[:2])
        choice = found[2]
    return choice, RefineReport(block.name, first, best, tuple(swaps), tried, time.perf_counter() - started)


def _all_outputs(block: MoEBlock, hidden: Tensor) -> Tensor:
    """[E, T, H] float32: what every expert gives for every token, before the gate."""
    x = hidden.to(block.matrices[0].weight.dtype)
    outputs = [block.output_of(expert, block.activation_of(expert, x)) for expert in range(block.num_experts)]
    return torch.stack([output.float() for output in outputs])


def _route(plan: RemovalPlan, position: int, ids: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Choices [T, K], in new ids, and gates of the block's router with only `ids` left."""
    block = plan.blocks[position]
    routed: list[tuple[Tensor, Tensor]] = []

    def stub(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routed.append((top_k_index, top_k_weights))
        return torch.zeros_like(hidden_states)

    with plan.routing(position, ids), replaced_forwards([block.experts], lambda _: stub):
        block.moe(*call.args, **(call.kwargs or {}))
    return routed[0]


def _capture(model: nn.Module, blocks: Sequence[MoEBlock], windows: Tensor) -> list[_Call]:
    """One dense pass over the windows at once."""
    calls = [_Call() for _ in blocks]
    with ExitStack() as stack:
        for block, call in zip(blocks, calls, strict=True):
            stack.enter_context(_noted(block, call))
        device = next(model.parameters()).device
        getattr(model, "base_model", model)(input_ids=windows.to(device), use_cache=False)
    return calls


@contextmanager
def _noted(block: MoEBlock, call: _Call) -> Iterator[None]:
    def moe_called(_module: nn.Module, args: Any, kwargs: Any) -> None:
        call.args, call.kwargs = args, kwargs

    def experts_ran(hidden: Tensor, _index: Tensor, _gates: Tensor, output: Tensor) -> None:
        call.hidden, call.output = hidden, output

    handle = block.moe.register_forward_pre_hook(moe_called, with_kwargs=True)
    try:
        with experts_watched(block, experts_ran):
            yield
    finally:
        handle.remove()
