"""Kept weights trained, expert by expert, for what the expert gives: the step behind a closed-form weight rule.

Least squares solves each matrix for itself, on moments: gate and up answer for their own outputs, although the error
that counts is behind the activation and the down projection. Here all kept weights of an expert learn together, by Adam
on the tokens routed to it, masks held:

    min over V of sum_t g_t^2 |f(x_t) - f_V(x_t)|^2,    f the dense expert, x_t what the pruned layers before it give.

One expert is at work at a time: its weights in float32 with gradient and Adam's two moments, and its tokens. Every 16th
token is held back; an expert that does not come nearer to the dense one on those keeps the weights it had.

Source: ours. Reconstruction of a pruned block by gradient is known (Guo et al. 2024, EBFT, arXiv 2402.12419; of rounded
weights Li et al. 2021, BRECQ, arXiv 2102.05426); here it starts from least squares, which leaves few steps to go,
weighs tokens by the router's gate, and runs within the layer by layer pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moesparse.experts.refit import Calls
from moesparse.models.blocks import MoEBlock
from moesparse.system.cpu_products import fast_products

__all__ = ["EPOCHS", "HELD_BACK", "ROWS_IN_A_STEP", "Tuned", "memory_for_tuning", "tune_experts", "tuning_flops"]

EPOCHS = 2
ROWS_IN_A_STEP = 512
HELD_BACK = 16
RATE = 0.02
"""Of Adam's steps at the start, a share of the mean size of a matrix's kept weights; falls to zero along a cosine."""

Tuned = tuple[float, float] | None
"""|f - f_V| / |f| over an expert's held-back tokens, weighed by the gate, before and after; None where it was left."""


@torch.no_grad()
def tune_experts(
    block: MoEBlock,
    dense: Sequence[Tensor],
    calls: Calls,
    experts: Iterable[int] | None = None,
    *,
    trained: Sequence[bool] = (True, True),
    epochs: int = EPOCHS,
    seed: int = 0,
) -> list[Tuned]:
    """Train the kept weights of a pruned block in place, zeros held.

    Args:
        block: after its masks and weight rule.
        dense: its matrices [E, out, in] before them; of the gradient nothing reaches these.
        calls: of its experts, in any dtype, on the CPU or the block's device; ids of E and above are left out.
        experts: which of them train; all when None.
        trained: of each matrix, whether it does; the other's weights stay as they are.
        epochs: times every token is seen.
        seed: of the order of tokens.

    Returns:
        Of each of them the relative errors; an expert with fewer than 2 * HELD_BACK tokens is left as it was.
    """
    chosen = range(block.num_experts) if experts is None else experts
    return [_tune(block, dense, calls, expert, trained, epochs, seed) for expert in chosen]


def _tune(
    block: MoEBlock,
    dense: Sequence[Tensor],
    calls: Calls,
    expert: int,
    trained: Sequence[bool],
    epochs: int,
    seed: int,
) -> Tuned:
    token, slot = (calls.index == expert).nonzero(as_tuple=True)
    if len(token) < 2 * HELD_BACK:
        return None
    device = block.matrices[0].weight.device
    x, gates = calls.hidden[token].to(device), calls.gates[token, slot].to(device).float()
    masters = [matrix.weight[expert].float() for matrix in block.matrices]
    masks = [(weight != 0) & learns for weight, learns in zip(masters, trained, strict=True)]
    with fast_products(block.experts):
        goal = torch.cat([_output(block, expert, rows, [each[expert] for each in dense]) for rows in x.split(4096)])
    x, goal = x.float(), goal.float() * gates[:, None]
    held = torch.arange(len(x), device=device) % HELD_BACK == HELD_BACK // 2
    learnt = (~held).nonzero().flatten()
    size = goal[held].square().sum()
    if not size > 0:
        return None
    before = _error(block, expert, x[held], gates[held], goal[held], masters)
    weights = [weight.clone() for weight in masters]
    _train(block, expert, weights, masks, (x[learnt], gates[learnt], goal[learnt]), epochs, seed)
    after = _error(block, expert, x[held], gates[held], goal[held], weights)
    # of the weights as they are stored: rounding to bfloat16 is part of the result
    if not after < before:
        return None
    for matrix, weight in zip(block.matrices, weights, strict=True):
        matrix.weight[expert] = weight.to(matrix.weight.dtype)
    return math.sqrt(before / float(size)), math.sqrt(after / float(size))


def _train(
    block: MoEBlock,
    expert: int,
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    rows: tuple[Tensor, Tensor, Tensor],
    epochs: int,
    seed: int,
) -> None:
    """Adam on `weights` in place, over rows (inputs [n, H], gates [n], gated goals [n, H])."""
    x, gates, goal = rows
    # a pruned weight, and one of a matrix that does not train, has no gradient: Adam leaves it where it is
    rates = [
        RATE * float(weight.abs().sum() / mask.sum().clamp(1)) for weight, mask in zip(weights, masks, strict=True)
    ]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    steps = epochs * math.ceil(len(x) / ROWS_IN_A_STEP)
    scale = len(x) / float(goal.square().sum())
    generator = torch.Generator().manual_seed(seed * 100_003 + expert)
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in order.split(ROWS_IN_A_STEP):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / steps))
            with torch.enable_grad():
                leaves = [weight.detach().requires_grad_() for weight in weights]
                given = _output(block, expert, x[chosen], leaves) * gates[chosen, None]
                loss = (given - goal[chosen]).square().sum() * (scale / len(chosen))
                gradients = torch.autograd.grad(loss, leaves)
            for weight, gradient, mask in zip(weights, gradients, masks, strict=True):
                weight.grad = gradient.mul_(mask)
            optimizer.step()
            done += 1


def _output(block: MoEBlock, expert: int, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[n, H] before the gate, of an expert with other weights ([2I, H] or [I, H], and [H, I]) and its own biases."""
    up, down = block.matrices
    rows = block.activation(_project(up.bias, expert, x, weights[0]))
    return block.post_expert_norm(_project(down.bias, expert, rows, weights[1]))


def _project(bias: Tensor | None, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    out = F.linear(x, weight)
    return out if bias is None else out + bias[expert].to(out.dtype)


def _error(block: MoEBlock, expert: int, x: Tensor, gates: Tensor, goal: Tensor, weights: Sequence[Tensor]) -> float:
    """Squared, summed, with the weights as they will be stored."""
    stored = [each.to(matrix.weight.dtype).float() for each, matrix in zip(weights, block.matrices, strict=True)]
    return float((_output(block, expert, x, stored) * gates[:, None] - goal).double().square().sum())


def memory_for_tuning(block: MoEBlock, tokens: int) -> int:
    """Bytes held at the peak: the dense matrices, the block's calls twice (batch by batch, and joined), and of one
    expert its float32 weights five times with all tokens that it may get, in and out.

    Args:
        block: any.
        tokens: calibration tokens of the block, those that are kept.
    """
    sizes = [matrix.weight.numel() * matrix.weight.element_size() for matrix in block.matrices]
    one = sum(matrix.weight[0].numel() for matrix in block.matrices)
    element = block.matrices[0].weight.element_size()
    kept = tokens * (block.hidden_size * element + 12 * (block.top_k or 1))
    rows = min(tokens, 4 * tokens * (block.top_k or 1) // block.num_experts)
    return sum(sizes) + 2 * kept + 20 * one + 20 * rows * block.hidden_size


def tuning_flops(block: MoEBlock, tokens: int, epochs: int = EPOCHS) -> float:
    """Multiply-adds times two: forward and backward of every routed row in every epoch, and three forwards more."""
    one = sum(matrix.weight[0].numel() for matrix in block.matrices)
    return 2.0 * one * tokens * (block.top_k or 1) * (3 * epochs + 1.2)
