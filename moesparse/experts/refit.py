"""After experts are gone: re-solve the down projections of those that stay, all of a block together.

A token that loses an expert is routed to others, whose outputs were never meant for it. With the pruned routing fixed
the block's output is linear in the kept down projections: y_t = sum over its experts j of W_j (g_jt h_jt) + biases,
with h_jt the activation and g_jt the gate the pruned router gives. So the W_j side by side are one least-squares
problem with the dense block's output Y as the target,

    min over W of sum_t |Y_t - y_t|^2 + ridge * mean diagonal * |W - W_dense|^2,

solved for the change of W. All rows of W share the matrix. It is factorised as a whole where it fits: the (E * I)^2
Gram matrix, formed block by block from the tokens that two experts share, or where the tokens are fewer the T^2 matrix
of their inner products, which gives the same change. Else conjugate gradients apply the features and their transpose,
expert by expert, preconditioned by the exact solution of every expert for itself (block Jacobi): experts meet only in
the tokens they share, so a few rounds do.

This needs no training and no gradient. Ours; the ridge keeps experts with few tokens near what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moesparse.errors import CalibrationError, UnsupportedModelError, UsageError
from moesparse.experts.surgery import RemovalPlan
from moesparse.models.blocks import MoEBlock
from moesparse.models.experts_function import experts_watched
from moesparse.models.stream import LayerStream
from moesparse.system.cpu_products import fast_products
from moesparse.system.processes import Batch

__all__ = [
    "DEFAULT_RIDGE",
    "Calls",
    "RefitReport",
    "calls_noted",
    "check_refit",
    "memory_for_refit",
    "refit",
    "refit_flops",
    "remove_and_refit_block",
]

DEFAULT_RIDGE = 0.03
"""Of the mean diagonal of the features' Gram matrix; 1% to 10% differ little."""

MAX_TOKENS = 65536
"""Calibration tokens a block is fitted on, evenly spaced; more cost memory and change little."""

# share of all that is gained; the rest is far below what perplexity shows
_TOLERANCE = 1e-3
_MAX_ROUNDS = 100
# for the forecast of the time
_USUAL_ROUNDS = 6
# a matrix of this side is formed however few the features are: 256 MiB
_MAX_SIDE = 8192
# rows of it at once
_SLAB = 1024


@dataclass(frozen=True)
class RefitReport:
    """One block.

    Attributes:
        name: of the block.
        before: squared error of the block's output after the removal, relative to the dense output, on the calibration
            tokens.
        after: the same with the new down projections, as stored in the model's dtype.
        tokens: fitted on.
        iterations: of conjugate gradients; 0 where the whole matrix was factorised.
        rounding: what quantising the new down projections has cost, `moesparse.models.formats.rounding.Rounding` as
            JSON; None where they are stored as they were solved for.
    """

    name: str
    before: float
    after: float
    tokens: int
    iterations: int
    rounding: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Calls:
    """What a block's experts were called with, over all batches: inputs [T, H], ids and gates [T, K]."""

    hidden: Tensor
    index: Tensor
    gates: Tensor


def memory_for_refit(block: MoEBlock, kept: int, tokens: int) -> int:
    """Bytes a refit holds at its peak: float32 features of the tokens, what goes in and out of them, four kept down
    projections, and what is factorised, which takes no more than the features or 256 MiB.

    Args:
        block: the block, whole.
        kept: experts that stay.
        tokens: calibration tokens, at most MAX_TOKENS are used.
    """
    tokens = min(tokens, MAX_TOKENS)
    I, H = block.intermediate_size, block.hidden_size
    rows = tokens * (block.top_k or 1)
    side, formed = _matrix(kept * I, tokens, rows * I)
    factored = side**2 if formed else kept * min(rows // kept, I) ** 2
    return 4 * (rows * I + 6 * tokens * H + 4 * kept * I * H + factored)


def refit_flops(block: MoEBlock, kept: int, tokens: int) -> float:
    """Multiply-adds times two of a refit, about: arguments as for `memory_for_refit`."""
    tokens = min(tokens, MAX_TOKENS)
    I, H, K = block.intermediate_size, block.hidden_size, block.top_k or 1
    rows = tokens * K
    side, formed = _matrix(kept * I, tokens, rows * I)
    apply = 2.0 * rows * I * H
    # the features; the output before and after, and the right sides
    once = 2.0 * rows * H * block.matrices[0].weight.shape[1] + 3 * apply
    if formed:
        shared = rows * K * I if side < tokens else rows * rows / kept
        return once + shared * I + side**3 / 3 + 2.0 * side**2 * H
    each = min(rows / kept, I)
    solve = 2.0 * kept * each**2 * H + (2 * apply if each < I else 0)
    return once + 2.0 * rows * I * each + kept * each**3 / 3 + _USUAL_ROUNDS * (2 * apply + solve)


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


def remove_and_refit_block(
    stream: LayerStream,
    position: int,
    plan: RemovalPlan,
    number: int,
    ridge: float = DEFAULT_RIDGE,
    merge: Callable[[], None] = lambda: None,
) -> RefitReport:
    """Remove the experts of one block and refit those that stay; the stream stays before the layer.

    The target is what the dense block gives for the inputs it gets behind the blocks already pruned.

    Where processes share the stream the first one solves, for the tokens of all.

    Args:
        stream: at the input of the layer, which is in memory.
        position: of the layer.
        plan: of the removal.
        number: of the block in the plan.
        ridge: as in `refit`.
        merge: called before the removal, to write into those that stay what the others were.
    """
    block, processes = plan.blocks[number], stream.processes
    dense = processes.to_first([calls[-1:] for calls in _capture(stream, position, block)])
    merge()
    plan.apply_block(number)
    pruned = processes.to_first([calls[:-1] for calls in _capture(stream, position, block)])

    def solve() -> RefitReport:
        calls = Calls(*(torch.cat(tensors) for tensors in zip(*pruned, strict=True)))
        return refit(block, calls, torch.cat([output for (output,) in dense]), ridge)

    report = processes.from_first(solve)
    processes.spread(block.matrices[-1].parameter.detach())
    return report


@torch.no_grad()
def refit(block: MoEBlock, calls: Calls, target: Tensor, ridge: float = DEFAULT_RIDGE) -> RefitReport:
    """Write the down projections that bring a pruned block's output nearest to a target.

    Args:
        block: after the removal; its biases, up projections and router stay.
        calls: of its experts, with the pruned router's choices in new ids.
        target: [T, H], what the dense block gave for these tokens.
        ridge: pull towards the dense weights, a share of the mean diagonal.
    """
    down = block.matrices[-1]
    weight = down.weight
    with fast_products(block.experts):
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

    def __init__(self, block: MoEBlock, calls: Calls) -> None:
        up = block.matrices[0]
        self.experts = up.weight.shape[0]
        self.shape = (len(calls.hidden), block.matrices[-1].weight.shape[1])
        self.width = block.intermediate_size
        self.tokens: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.rows: list[Tensor] = []
        for expert in range(self.experts):
            token, slot = (calls.index == expert).nonzero(as_tuple=True)
            x = calls.hidden[token].to(up.weight.dtype)
            activation = block.activation_of(expert, x)
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
        out = error.new_empty(self.experts, self.shape[1], self.width)
        for token, rows, part in zip(self.tokens, self.rows, out, strict=True):
            torch.mm(error[token].T, rows, out=part)
        return out

    def output(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[T, H] float32: the block's output with these down projections."""
        out = self.apply(weight)
        if bias is not None:
            for token, gate, row in zip(self.tokens, self.gates, bias.float(), strict=True):
                out.index_add_(0, token, gate[:, None] * row)
        return out

    def solve(self, residual: Tensor, ridge: float) -> tuple[Tensor, int]:
        """The change D of W that minimises |R - Phi D|^2 + ridge * mean diagonal * |D|^2, [E, H, I], and rounds.

        All outputs share the matrix: they are solved at once.
        """
        energy = sum(float(rows.square().sum()) for rows in self.rows)
        damping = ridge * energy / (self.experts * self.width)
        if damping == 0:
            return torch.zeros(self.experts, self.shape[1], self.width, device=residual.device), 0
        side, formed = _matrix(self.experts * self.width, self.shape[0], sum(map(len, self.rows)) * self.width)
        if not formed:
            return self._iterate(residual, damping)
        return (self._factorise if side < self.shape[0] else self._factorise_tokens)(residual, damping), 0

    def _factorise(self, residual: Tensor, damping: float) -> Tensor:
        """By a Cholesky factorisation of Phi^T Phi + damping, [E * I, E * I], whose upper half is formed."""
        T, H = self.shape
        E, I = self.experts, self.width
        gram = torch.zeros(E, I, E, I, device=residual.device)
        place = torch.full((E, T), -1, device=residual.device)
        for expert, token in enumerate(self.tokens):
            place[expert, token] = torch.arange(len(token), device=residual.device)
        for one in range(E):
            for other in range(one, E):
                row = place[other, self.tokens[one]]
                shared = row >= 0
                gram[one, :, other] = self.rows[one][shared].T @ self.rows[other][row[shared]]
        right = self.transpose(residual).transpose(1, 2).reshape(E * I, H)
        solution = _solve(_cholesky(gram.view(E * I, E * I), damping), right)
        return solution.view(E, I, H).transpose(1, 2)

    def _factorise_tokens(self, residual: Tensor, damping: float) -> Tensor:
        """By one of Phi Phi^T + damping, [T, T]: D = Phi^T (Phi Phi^T + damping)^-1 R."""
        T = self.shape[0]
        gram = torch.zeros(T, T, device=residual.device)
        for token, rows in zip(self.tokens, self.rows, strict=True):
            # a token is at most once with an expert, so that no entry is written twice
            for start in range(0, len(rows), _SLAB):
                slab = slice(start, start + _SLAB)
                gram[token[slab, None], token[start:]] += rows[slab] @ rows[start:].T
        return self.transpose(_solve(_cholesky(gram, damping), residual))

    def _iterate(self, residual: Tensor, damping: float) -> tuple[Tensor, int]:
        """By conjugate gradients, from no change, until a round's fall of what is minimised is _TOLERANCE of all."""
        factors = [_cholesky(rows.T @ rows if self._is_long(rows) else rows @ rows.T, damping) for rows in self.rows]
        left = self.transpose(residual)
        solution = torch.zeros_like(left)
        scaled = self._precondition(left, factors, damping)
        direction, product = scaled.clone(), _dot(left, scaled)
        rounds, fallen = 0, 0.0
        while rounds < _MAX_ROUNDS and product > 0:
            image = self.transpose(self.apply(direction)).add_(direction, alpha=damping)
            step = product / _dot(direction, image)
            solution.add_(direction, alpha=step)
            left.sub_(image, alpha=step)
            rounds, fallen = rounds + 1, fallen + step * product
            if step * product <= _TOLERANCE * fallen:
                break
            del image
            scaled = self._precondition(left, factors, damping)
            before, product = product, _dot(left, scaled)
            direction.mul_(product / before).add_(scaled)
        return solution, rounds

    def _precondition(self, error: Tensor, factors: list[Tensor], damping: float) -> Tensor:
        """(Phi_j^T Phi_j + damping)^-1 of every expert for itself, of [E, H, I]."""
        out = torch.empty_like(error)
        for rows, factor, part, result in zip(self.rows, factors, error, out, strict=True):
            if self._is_long(rows):
                result.copy_(_solve(factor, part.T).T)
            else:
                torch.sub(part, _solve(factor, rows @ part.T).T @ rows, out=result).div_(damping)
        return out

    def _is_long(self, rows: Tensor) -> bool:
        return len(rows) >= self.width


def _matrix(features: int, tokens: int, held: int) -> tuple[int, bool]:
    """Side of the smaller of the two matrices, and whether it is formed as a whole.

    Args:
        features: E * I.
        tokens: T.
        held: numbers that the features of all tokens are.
    """
    side = min(features, tokens)
    return side, side**2 <= max(_MAX_SIDE**2, held)


def _cholesky(gram: Tensor, damping: float) -> Tensor:
    """The lower factor of a matrix of which the upper half is given, plus damping, in its place."""
    # what float32 cannot tell from none would end the factorisation
    gram.diagonal().add_(max(damping, 1e-7 * float(gram.diagonal().sum())))
    factor, info = gram.mT, torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info):
        raise CalibrationError("activations must be finite, and the ridge large enough, to refit experts, got others")
    return factor


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _dot(a: Tensor, b: Tensor) -> float:
    return sum(float(torch.dot(x.flatten(), y.flatten())) for x, y in zip(a, b, strict=True))


def _capture(stream: LayerStream, position: int, block: MoEBlock) -> list[Batch]:
    """Run one layer over all batches and note its calls, see `calls_noted`."""
    with calls_noted(stream, position, block) as parts:
        for _ in stream.run(position, keep=False):
            pass
    return parts


@contextmanager
def calls_noted(stream: LayerStream, position: int, block: MoEBlock, *, outputs: bool = True) -> Iterator[list[Batch]]:
    """While the body runs a layer once over all batches: of each the fields of `Calls` and, with `outputs`, the output
    [T, H], for at most MAX_TOKENS evenly spaced; padding is left out: it is computed, and must not steer a fit.
    """
    every = -(-stream.tokens // MAX_TOKENS)
    parts: list[Batch] = []

    def note(*call: Tensor) -> None:
        chosen = slice(None, None, every)
        real = stream.token_mask(len(parts), position)
        keep = slice(None) if real is None else real[chosen].to(call[0].device)
        wanted = call if outputs else call[:-1]
        parts.append(tuple(tensor.detach()[chosen][keep].clone() for tensor in wanted))

    with experts_watched(block, note):
        yield parts
