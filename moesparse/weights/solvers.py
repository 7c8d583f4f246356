"""The layer error and its solvers: what is left of W once a mask is on it, for all experts and rows at once.

The error of pruned weights V for the inputs x_t of one expert's matrix is

    sum_t g_t^2 |(W - V) x_t|^2 = tr((W - V) M (W - V)^T),    M = sum_t g_t^2 x_t x_t^T    (g = 1: the plain moment)

so M is all that is needed of the data, and every output row is a problem of its own with the same M. Solvers work on
H = M / mean(diag M) + damping I: the scale cancels, and one damping fits every expert.

Shapes: `weight` [E, out, in] float32, `hessian` [E, in, in] float64. Factorisations are float64, matrix products
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moesparse.errors import CalibrationError
from moesparse.weights.patterns import Pattern, keep_in_groups, keep_in_rows, mask_from_score

DAMPING = 0.01
_MAX_DAMPING = 1.0
_OBS_BLOCK = 128
_ADMM_RHO = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)

# buffers beside the moments; large matrices are worked off in slices of rows
_CPU_BYTES = 1 << 30
_GPU_BYTES = 1 << 33


def layer_hessian(moment: Tensor, damping: float = DAMPING, *, name: str = "moment") -> Tensor:
    """H = M / mean(diag M) + damping I, float64 [E, in, in]; an expert without tokens (M = 0) gets the identity.

    Raises:
        CalibrationError: the moment is not finite.
    """
    hessian = moment.to(torch.float64, copy=True)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    if not mean.isfinite().all():
        raise CalibrationError(f"{name}: second moments must be finite, got inf or NaN; calibrate again")
    seen = mean > 0
    hessian /= torch.where(seen, mean, 1.0)[:, None, None]
    diagonal += torch.where(seen, damping, 1.0)[:, None]
    return hessian


def factorise(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, list[float]]:
    """Upper triangular R with H = R R^T, float32, and the damping that each expert needed.

    R^-1 is the upper Cholesky factor of H^-1 that SparseGPT works with: one factorisation and no inverse. An H that is
    not positive definite (a rounded or merged moment) gets ten times the damping until it is.

    Raises:
        CalibrationError: it is not even with a damping of the whole mean diagonal.
    """
    factors, dampings = [], []
    for matrix in hessian:
        used = damping
        while True:
            # H = R R^T with R upper is the Cholesky factorisation seen from the last column
            lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
            if not info:
                break
            if used * 10 > _MAX_DAMPING:
                raise CalibrationError(f"second moments must be positive semi-definite, got none at damping {used:g}")
            matrix = matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * (used * 9)
            used *= 10
        factors.append(lower.flip(0, 1).float())
        dampings.append(used)
    return torch.stack(factors), dampings


Settle = Callable[[int, slice, Tensor], Tensor]
"""(column, rows, its best values [E, rows]) -> the values that it gets."""


def obs(weight: Tensor, factor: Tensor, choice: Pattern | Tensor) -> tuple[Tensor, Tensor]:
    """SparseGPT: walk the columns, prune, and let the columns to the right make up for the error.

    With e = W - V the error is |e R|^2, and column k of e R holds e_j of j <= k only. So once the columns before k are
    settled the best value of column k, whatever comes later, is w_k + (sum_{j<k} e_j R_jk) / R_kk: this is the OBS
    update of Frantar & Alistarh (2023, arXiv 2301.00774) without an inverse. To prune it costs value^2 R_kk^2, the
    score.

    Args:
        weight: [E, out, in].
        factor: [E, in, in], from `factorise`.
        choice: a mask to hold, bool [E, out, in], or a pattern, chosen on the way: n:m at each group's first column, a
            ratio within each 128-column block and row, the row's count shared out evenly over the blocks (published
            code compares over all rows of a block, which leaves rows of unequal count).

    Returns:
        (mask, the updated weights, zero where pruned).
    """
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    updated = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows in row_slices(weight):
        part = choice if isinstance(choice, Pattern) else choice[:, rows]
        mask[:, rows], updated[:, rows], _ = _obs_rows(weight[:, rows], factor, part)
    return mask, updated


def obs_rounded(weight: Tensor, factor: Tensor, mask: Tensor, settle: Settle) -> tuple[Tensor, Tensor]:
    """GPTQ (Frantar et al., 2022, arXiv 2210.17323): the walk of `obs` with every column rounded when it is settled.

    Args:
        weight: [E, out, in].
        factor: [E, in, in], from `factorise`.
        mask: bool [E, out, in]; what is pruned and was zero before takes no error.
        settle: rounds the values of a column.

    Returns:
        (the rounded weights, zero where pruned; diag(e H e^T) [E, out] float64, the damped layer error of each row).
    """
    updated = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    error = torch.empty(weight.shape[:2], dtype=torch.float64, device=weight.device)
    for rows in row_slices(weight):
        found = _obs_rows(weight[:, rows], factor, mask[:, rows], settle, rows)
        _, updated[:, rows], error[:, rows] = found
    return updated, error


def _obs_rows(
    weight: Tensor,
    factor: Tensor,
    choice: Pattern | Tensor,
    settle: Settle | None = None,
    rows_at: slice | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    in_features = weight.shape[-1]
    pattern = choice if isinstance(choice, Pattern) else None
    # columns are rows here, so that each step runs over contiguous memory
    dense = weight.mT.contiguous()
    error = torch.empty_like(dense)
    keep = choice.mT.contiguous() if isinstance(choice, Tensor) else torch.empty_like(dense, dtype=torch.bool)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    cost = torch.zeros(dense[:, 0].shape, dtype=torch.float64, device=weight.device)
    kept = 0 if pattern is None else pattern.kept(in_features)
    n, m = (pattern.group if pattern else None) or (0, 1)
    for start in range(0, in_features, _OBS_BLOCK):
        stop = min(start + _OBS_BLOCK, in_features)
        block = slice(start, stop)
        # push[k] = sum over settled columns j of e_j R_jk
        push = factor[:, :start, block].mT @ error[:, :start]
        if pattern is not None and pattern.group is None:
            share = round(kept * stop / in_features) - round(kept * start / in_features)
            score = _pruning_cost(dense[:, block], push, factor[:, block, block])
            rows = keep_in_rows(score.mT.reshape(-1, stop - start), share)
            keep[:, block] = rows.view(len(weight), -1, stop - start).mT
        for k in range(start, stop):
            i = k - start
            if n and k % m == 0:
                group = slice(k, k + m)
                score = _pruning_cost(dense[:, group], push[:, i : i + m], factor[:, group, group])
                keep[:, group] = keep_in_groups(score.transpose(0, 1), n).transpose(0, 1)
            # a kept column moves by push / R_kk, a pruned one loses its weight
            step = push[:, i] / -diagonal[:, k, None]
            if settle is not None and rows_at is not None:
                step = dense[:, k] - settle(k, rows_at, dense[:, k] - step)
            step = torch.where(keep[:, k], step, dense[:, k])
            error[:, k] = step
            if settle is not None:
                cost += torch.addcmul(push[:, i], step, diagonal[:, k, None]).square_()
            push[:, i + 1 :].baddbmm_(factor[:, k, k + 1 : stop, None], step[:, None])
    return keep.mT, (dense - error).masked_fill_(~keep, 0.0).mT, cost


def _pruning_cost(dense: Tensor, push: Tensor, factor: Tensor) -> Tensor:
    """Error of pruning each column alone, the settled ones given: [E, columns, out]."""
    value = dense + torch.linalg.solve_triangular(factor.mT, push, upper=False)
    return (value * factor.diagonal(dim1=-2, dim2=-1)[..., None]).square_()


def admm(weight: Tensor, hessian: Tensor, pattern: Pattern, *, iterations: int = 7, name: str = "weight") -> Tensor:
    """A mask by ADMM on the layer error: W free, D of the pattern, and W = D enforced ever harder.

    Source: ALPS (Meng et al., 2024, arXiv 2406.07831) and Boža (2024, arXiv 2401.02938). The inputs are scaled to a
    unit diagonal of H first. The penalty rho doubles from stage to stage, which finds better masks than any one rho;
    a stage inverts H + rho once, and each of its iterations is one product with that inverse.

    Args:
        weight: [E, out, in].
        hessian: [E, in, in], positive definite.
        pattern: of the mask.
        iterations: in each of the six stages.
        name: of the tensor, for errors.

    Returns:
        bool [E, out, in]: the pattern's mask of the last W + U.
    """
    scale = hessian.diagonal(dim1=-2, dim2=-1).sqrt()
    scaled = hessian / scale[:, :, None] / scale[:, None, :]
    target = weight * scale[:, None].float()
    # what ADMM carries between iterations: W + U, U the scaled dual
    point = target.clone()
    previous = 0.0
    for rho in _ADMM_RHO:
        scaled.diagonal(dim1=-2, dim2=-1).add_(rho - previous)
        previous = rho
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled)).float()
        for rows in row_slices(weight):
            part, goal = point[:, rows], target[:, rows]
            for _ in range(iterations):
                held = part * mask_from_score(part.abs(), pattern, name=name)
                dual = part - held
                # (goal H + rho (D - U)) (H + rho)^-1 = goal + rho (D - U - goal) (H + rho)^-1: no product with H
                part.copy_(torch.baddbmm(goal + dual, held - dual - goal, inverse, alpha=rho))
    return mask_from_score(point.abs(), pattern, name=name)


def least_squares(
    weight: Tensor, mask: Tensor, hessian: Tensor, *, iterations: int = 15, tolerance: float = 1e-3
) -> Tensor:
    """The kept weights of least layer error, mask held: masked conjugate gradients, preconditioned by the diagonal.

    Every row is its own problem with its own step lengths; an iteration is one product of all rows with H. A row's
    damped error falls from iterate to iterate, so the last is the best; and as the start has the least damping term of
    all weights on the mask, the error over the data itself is never above the start's, wherever the iteration stops.

    Args:
        weight: [E, out, in]; the start is `weight` under the mask.
        mask: bool [E, out, in].
        hessian: [E, in, in].
        iterations: at most.
        tolerance: a row is done when its preconditioned gradient has shrunk by this factor.

    Returns:
        [E, out, in] float32, zero where pruned.
    """
    matrix = hessian.float()
    solution = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows in row_slices(weight):
        solution[:, rows] = _least_squares_rows(weight[:, rows], mask[:, rows], matrix, iterations, tolerance)
    return solution


def _least_squares_rows(weight: Tensor, mask: Tensor, matrix: Tensor, iterations: int, tolerance: float) -> Tensor:
    inverse_diagonal = matrix.diagonal(dim1=-2, dim2=-1).reciprocal()[:, None]
    solution = weight.masked_fill(~mask, 0.0)
    residual = ((weight - solution) @ matrix) * mask
    direction = residual * inverse_diagonal
    norm = (residual * direction).sum(-1, keepdim=True)
    goal = norm * tolerance**2
    for _ in range(iterations):
        image = (direction @ matrix) * mask
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where((norm > goal) & (curvature > 0), norm / curvature, 0.0)
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        preconditioned = residual * inverse_diagonal
        previous, norm = norm, (residual * preconditioned).sum(-1, keepdim=True)
        # a row that is done stands still, so that it does not matter which rows share a slice
        if (norm <= goal).all():
            break
        direction = preconditioned.addcmul_(torch.where(previous > 0, norm / previous, 0.0), direction)
    return solution


def factor_error(difference: Tensor, factor: Tensor) -> Tensor:
    """diag(D H D^T) = |D R|^2 of each row, [E, out] float64, from the triangular factor: half of `row_error`."""
    size = difference.shape[-1]
    found = torch.zeros(difference.shape[:2], dtype=torch.float64, device=difference.device)
    for rows in row_slices(difference):
        for start in range(0, size, 8 * _OBS_BLOCK):
            stop = min(start + 8 * _OBS_BLOCK, size)
            part = difference[:, rows, :stop] @ factor[:, :stop, start:stop]
            found[:, rows] += part.square_().sum(-1, dtype=torch.float64)
    return found


def row_error(difference: Tensor, moment: Tensor) -> Tensor:
    """diag(D M D^T): the layer error of each row, [E, out] float64."""
    return ((difference @ moment.to(difference.dtype)) * difference).sum(-1, dtype=torch.float64)


def expert_slices(weight: Tensor) -> Iterator[slice]:
    """Slices of the experts of [E, out, in], as many at once as the working set allows, at least one."""
    experts, out_features, in_features = weight.shape
    # three float64 squares (moment, factor, scratch) and a handful of float32 buffers of the weight's shape
    each = 24 * in_features**2 + 40 * out_features * in_features
    return _slices(experts, _working_bytes(weight) // max(each, 1))


def row_slices(weight: Tensor) -> Iterator[slice]:
    """Slices of the output rows of [E, out, in] whose buffers fit in the working set: rows are independent problems."""
    experts, out_features, in_features = weight.shape
    return _slices(out_features, _working_bytes(weight) // max(40 * experts * in_features, 1))


def memory_for_solver(experts: int, out_features: int, in_features: int, kept: int, *, on_gpu: bool = False) -> int:
    """Bytes that a mask rule with second moments and a weight rule hold at their peak.

    Of the slice of experts at hand these are three squares and five float32 copies, and of a slice of its rows as many
    as ADMM holds, the most of all: twelve.

    Args:
        experts, out_features, in_features: of a matrix [E, out, in].
        kept: bytes a weight of what is held for all experts: the mask, and what is solved for.
        on_gpu: where slices are larger.
    """
    room = _GPU_BYTES if on_gpu else _CPU_BYTES
    square, row = 24 * in_features**2, 4 * in_features
    at_once = min(max(room // (square + 10 * row * out_features), 1), experts)
    rows = min(max(room // (10 * row * at_once), 1), out_features)
    return kept * experts * out_features * in_features + at_once * (square + (5 * out_features + 12 * rows) * row)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, max(size, 1)):
        yield slice(start, min(start + max(size, 1), length))


def _working_bytes(tensor: Tensor) -> int:
    return _GPU_BYTES if tensor.is_cuda else _CPU_BYTES
