"""After experts are gone: re-solve the down projections of those that stay, all of a block together.

A token that loses an expert is routed to others, whose outputs were never meant for it. With the pruned routing fixed
the block's output is linear in the kept down projections: y_t = sum over its experts j of W_j (g_jt h_jt) + biases,
with h_jt the activation and g_jt the gate the pruned router gives. So the W_j side by side are one least-squares
problem with the dense block's output Y as the target,

    min over W of sum_t |Y_t - y_t|^2 + ridge * mean diagonal * |W - W_dense|^2,

solved for the change of W. Where the (E * I)^2 Gram matrix is small it is formed, block by block from the tokens that
two experts share, and factorised; where the tokens are fewer, the T^2 matrix of their inner products is, which gives
the same change; else neither is formed, and conjugate gradients with the diagonal as preconditioner apply the features
and their transpose, expert by expert.

This needs no training and no gradient. Ours; the ridge keeps experts with few tokens near what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.layerwise import LayerStream
from moesparse.processes import Batch
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.surgery import RemovalPlan, SurgeryReport, plan_removal

__all__ = [
    "DEFAULT_RIDGE",
    "RefitReport",
    "check_refit",
    "memory_for_refit",
    "refit_block",
    "refit_flops",
    "remove_and_refit",
    "remove_and_refit_block",
]

DEFAULT_RIDGE = 0.03
"""Of the mean diagonal of the features' Gram matrix; 1% to 10% differ little."""

MAX_TOKENS = 65536
"""Calibration tokens a block is fitted on, evenly spaced; more cost memory and change little."""

_TOLERANCE = 1e-4
_MAX_ITERATIONS = 100
# for the forecast of the time
_USUAL_ITERATIONS = 30
# E * I or T up to which a matrix of that side is formed: 128 MiB in float64, and a factorisation of a second
_MAX_GRAM = 4096


@dataclass(frozen=True)
class RefitReport:
    """One block.

    Attributes:
        name: of the block.
        before: squared error of the block's output after the removal, relative to the dense output, on the calibration
            tokens.
        after: the same with the new down projections, as stored in the model's dtype.
        tokens: fitted on.
        iterations: of conjugate gradients; 0 where a matrix was factorised.
    """

    name: str
    before: float
    after: float
    tokens: int
    iterations: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Calls:
    """What a block was called with and gave, over all batches: inputs [T, H], ids and gates [T, K], outputs [T, H]."""

    hidden: Tensor
    index: Tensor
    gates: Tensor
    output: Tensor


def memory_for_refit(block: MoEBlock, kept: int, tokens: int) -> int:
    """Bytes a refit holds at its peak: float32 features and outputs of the tokens, five kept down projections, and the
    matrix that is factorised with its factor.

    Args:
        block: the block, whole.
        kept: experts that stay.
        tokens: calibration tokens, at most MAX_TOKENS are used.
    """
    tokens = min(tokens, MAX_TOKENS)
    rows = tokens * (block.top_k or 1)
    width = kept * block.intermediate_size
    features = 4 * (rows * block.intermediate_size + 4 * tokens * block.hidden_size)
    side = min(width, tokens)
    return features + 4 * 5 * width * block.hidden_size + (2 * 8 * side**2 if side <= _MAX_GRAM else 0)


def refit_flops(block: MoEBlock, kept: int, tokens: int) -> float:
    """Multiply-adds times two of a refit, about: arguments as for `memory_for_refit`."""
    tokens = min(tokens, MAX_TOKENS)
    rows = tokens * (block.top_k or 1)
    width = kept * block.intermediate_size
    if width <= min(tokens, _MAX_GRAM):
        return 2.0 * rows * (block.top_k or 1) * block.intermediate_size**2 + width**3 / 3
    if tokens <= _MAX_GRAM:
        return 2.0 * rows**2 / kept * block.intermediate_size + 2.0 * tokens**2 * block.hidden_size + tokens**3 / 3
    return _USUAL_ITERATIONS * 4.0 * rows * block.intermediate_size * block.hidden_size


def check_refit(blocks: Sequence[MoEBlock], ridge: float) -> None:
    """Refuse what cannot be refitted before anything is changed."""
    if not 0 < ridge < float("inf"):
        raise UsageError(f"ridge must be positive, a share of the mean diagonal like 0.03, got {ridge}")
    for block in blocks:
        if block.has_post_expert_norm:
            raise UnsupportedModelError(
                f"{block.name} norms the output of each expert, so its output is not linear in the down projections: "
                "remove experts without refit (update='none')"
            )


def remove_and_refit(
    model: nn.Module,
    kept: Sequence[Tensor | Sequence[int]],
    windows: Tensor | tuple[Tensor, Tensor | None],
    *,
    ridge: float = DEFAULT_RIDGE,
    batch_size: int = 8,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> tuple[SurgeryReport, list[RefitReport]]:
    """Remove experts block by block and refit each block before the next one sees its output.

    The target of each block is what the dense block gives for the inputs it gets behind the blocks already pruned.

    Args:
        model: a transformers causal language model; changed in place.
        kept: as in `remove_experts`.
        windows: LongTensor [n, t], or (ids, attention mask); padding is left out of the fit.
        ridge: pull towards the dense weights, a share of the mean diagonal.
        batch_size: windows in one forward.
        device: where the layer at work goes; None leaves it.
        progress: called before every block.

    Returns:
        The surgery's report and one RefitReport per block.

    Raises:
        UsageError, UnsupportedModelError: as `remove_experts`; experts whose output is normed. Nothing is changed then.
    """
    blocks = find_moe_blocks(model)
    check_refit(blocks, ridge)
    plan = plan_removal(model, kept)
    layers, prefix = decoder_layers(model, blocks)
    ids, mask = windows if isinstance(windows, tuple) else (windows, None)
    stream = LayerStream(model, layers, ids, mask, batch_size, device)
    reports = []
    for position in range(len(stream.layers)):
        here = [n for n, block in enumerate(plan.blocks) if block.layer == f"{prefix}.{position}"]
        with stream.on_device(position):
            for number in here:
                progress(ProgressEvent("refit", number, len(blocks), "block", name=blocks[number].name))
                reports.append(remove_and_refit_block(stream, position, plan, number, ridge))
            for _ in stream.run(position, keep=True):
                pass
    progress(ProgressEvent("refit", len(blocks), len(blocks), "block"))
    return plan.finish(), reports


def remove_and_refit_block(
    stream: LayerStream, position: int, plan: RemovalPlan, number: int, ridge: float = DEFAULT_RIDGE
) -> RefitReport:
    """Remove the experts of one block and refit those that stay; the stream stays before the layer.

    Where processes share the stream the first one solves, for the tokens of all.

    Args:
        stream: at the input of the layer, which is in memory.
        position: of the layer.
        plan: of the removal.
        number: of the block in the plan.
        ridge: as in `remove_and_refit`.
    """
    block, processes = plan.blocks[number], stream.processes
    dense = processes.to_first([calls[-1:] for calls in _capture(stream, position, block)])
    plan.apply_block(number)
    pruned = processes.to_first(_capture(stream, position, block))

    def solve() -> RefitReport:
        calls = _Calls(*(torch.cat(tensors) for tensors in zip(*pruned, strict=True)))
        return _refit(block, calls, torch.cat([output for (output,) in dense]), ridge)

    report = processes.from_first(solve)
    processes.spread(block.matrices[-1].parameter.detach())
    return report


def refit_block(
    block: MoEBlock, hidden: Tensor, index: Tensor, gates: Tensor, target: Tensor, *, ridge: float = DEFAULT_RIDGE
) -> RefitReport:
    """Write the down projections that bring a pruned block's output nearest to a target.

    Args:
        block: the block after the removal; its biases, up projections and router stay.
        hidden: [T, H], inputs of its experts.
        index: [T, K], the pruned router's choices, in new ids.
        gates: [T, K], its weights.
        target: [T, H], what the dense block gave for these tokens.
        ridge: share of the mean diagonal.
    """
    check_refit([block], ridge)
    return _refit(block, _Calls(hidden, index, gates, target), target, ridge)


@torch.no_grad()
def _refit(block: MoEBlock, calls: _Calls, target: Tensor, ridge: float) -> RefitReport:
    down = block.matrices[-1]
    weight = down.weight
    features = _Features(block, calls)
    target = target.float()
    residual = target - features.output(weight, down.bias)
    energy = float(target.double().square().sum()) or 1.0
    change, iterations = features.solve(residual, ridge)
    new = (weight.float() + change).to(weight.dtype)
    left = residual - features.apply(new.float() - weight.float())
    before, after = (float(r.double().square().sum()) / energy for r in (residual, left))
    if after < before:
        weight.copy_(new)
    else:
        after = before
    return RefitReport(block.name, before, after, len(target), iterations)


class _Features:
    """The block's features Phi, one slice per expert: rows g_jt h_jt of the tokens routed to it."""

    def __init__(self, block: MoEBlock, calls: _Calls) -> None:
        up = block.matrices[0]
        self.experts = up.weight.shape[0]
        self.shape = (len(calls.hidden), block.matrices[-1].weight.shape[1])
        self.tokens: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.rows: list[Tensor] = []
        for expert in range(self.experts):
            token, slot = (calls.index == expert).nonzero(as_tuple=True)
            x = calls.hidden[token].to(up.weight.dtype)
            out = x @ up.weight[expert].T
            activation = block.activation(out if up.bias is None else out + up.bias[expert])
            gate = calls.gates[token, slot].float()
            self.tokens.append(token)
            self.gates.append(gate)
            self.rows.append(gate[:, None] * activation.float())

    def apply(self, weight: Tensor) -> Tensor:
        """Phi W: [T, H] float32 from W [E, H, I]."""
        out = torch.zeros(self.shape, device=weight.device)
        for token, rows, matrix in zip(self.tokens, self.rows, weight, strict=True):
            out.index_add_(0, token, rows @ matrix.T.float())
        return out

    def transpose(self, error: Tensor) -> Tensor:
        """Phi^T R: [E, H, I] float32 from R [T, H]."""
        return torch.stack([error[token].T @ rows for token, rows in zip(self.tokens, self.rows, strict=True)])

    def output(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[T, H] float32: the block's output with these down projections."""
        out = self.apply(weight)
        if bias is not None:
            for token, gate, row in zip(self.tokens, self.gates, bias.float(), strict=True):
                out.index_add_(0, token, gate[:, None] * row)
        return out

    def solve(self, residual: Tensor, ridge: float) -> tuple[Tensor, int]:
        """The change D of W that minimises |R - Phi D|^2 + ridge * mean diagonal * |D|^2, [E, H, I], and iterations.

        The rows of D (one per output) share the matrix and are solved at once, each with its own step length.
        """
        diagonal = torch.stack([rows.square().sum(0) for rows in self.rows])
        damping = ridge * float(diagonal.mean())
        if damping == 0:
            return torch.zeros(self.experts, self.shape[1], diagonal.shape[1], device=residual.device), 0
        if diagonal.numel() <= min(self.shape[0], _MAX_GRAM):
            return self._factorise(residual, damping), 0
        if self.shape[0] <= _MAX_GRAM:
            return self._factorise_tokens(residual, damping), 0
        return self._iterate(residual, diagonal, damping)

    def _factorise(self, residual: Tensor, damping: float) -> Tensor:
        """By a Cholesky factorisation of Phi^T Phi + damping, float64 [E * I, E * I]."""
        T, H = self.shape
        E, I = self.experts, self.rows[0].shape[1]
        gram = torch.zeros(E, I, E, I, dtype=torch.float64, device=residual.device)
        place = torch.full((E, T), -1, device=residual.device)
        for expert, token in enumerate(self.tokens):
            place[expert, token] = torch.arange(len(token), device=residual.device)
        for one in range(E):
            for other in range(one, E):
                row = place[other, self.tokens[one]]
                shared = row >= 0
                block = (self.rows[one][shared].T @ self.rows[other][row[shared]]).double()
                gram[one, :, other] = block
                gram[other, :, one] = block.T
        matrix = gram.view(E * I, E * I)
        matrix.diagonal().add_(damping)
        right = self.transpose(residual).transpose(1, 2).reshape(E * I, H).double()
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
        return solution.view(E, I, H).transpose(1, 2).float()

    def _factorise_tokens(self, residual: Tensor, damping: float) -> Tensor:
        """By one of Phi Phi^T + damping, float64 [T, T]: D = Phi^T (Phi Phi^T + damping)^-1 R."""
        T = self.shape[0]
        gram = torch.zeros(T, T, dtype=torch.float64, device=residual.device)
        for token, rows in zip(self.tokens, self.rows, strict=True):
            # a token is at most once with an expert, so that no entry is written twice
            gram[token[:, None], token] += (rows @ rows.T).double()
        gram.diagonal().add_(damping)
        return self.transpose(torch.cholesky_solve(residual.double(), torch.linalg.cholesky(gram)).float())

    def _iterate(self, residual: Tensor, diagonal: Tensor, damping: float) -> tuple[Tensor, int]:
        """By conjugate gradients, from no change; each row of D until its residual is _TOLERANCE of the first."""
        solution = torch.zeros(self.experts, self.shape[1], diagonal.shape[1], device=residual.device)
        inverse = 1 / (diagonal + damping)[:, None, :]
        left = self.transpose(residual)
        scaled = inverse * left
        direction = scaled.clone()
        product = (left * scaled).sum((0, 2))
        goal = _TOLERANCE**2 * product
        for iteration in range(_MAX_ITERATIONS):
            if (product <= goal).all():
                return solution, iteration
            image = self.transpose(self.apply(direction)).add_(direction, alpha=damping)
            curvature = (direction * image).sum((0, 2))
            step = torch.where(curvature > 0, product / curvature.clamp_min(1e-38), 0)[:, None]
            solution += step * direction
            left -= step * image
            scaled = inverse * left
            new = (left * scaled).sum((0, 2))
            direction = scaled + torch.where(product > 0, new / product.clamp_min(1e-38), 0)[:, None] * direction
            product = new
        return solution, _MAX_ITERATIONS


def _capture(stream: LayerStream, position: int, block: MoEBlock) -> list[Batch]:
    """Run one layer over all batches and note the fields of `_Calls` of each, for at most MAX_TOKENS evenly spaced."""
    every = -(-stream.tokens // MAX_TOKENS)
    parts: list[Batch] = []
    with _watched(block, parts):
        for number, _ in enumerate(stream.run(position, keep=False)):
            chosen = slice(None, None, every)
            real = stream.token_masks[number]
            # masked tokens are computed by the model and must not steer the fit
            keep = slice(None) if real is None else real[chosen].to(parts[-1][0].device)
            parts[-1] = tuple(tensor[chosen][keep].clone() for tensor in parts[-1])
    return parts


@contextmanager
def _watched(block: MoEBlock, parts: list[Batch]) -> Iterator[None]:
    def note(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        values = [*args, *(kwargs[name] for name in names[len(args) :])]
        parts.append((*(value.detach() for value in values), output.detach()))

    handle = block.experts.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
