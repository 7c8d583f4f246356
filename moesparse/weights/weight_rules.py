"""Weight rules: what the weights become once the mask is chosen.

`none` keeps the dense values (the papers' pruning), `obs` is SparseGPT's update for the mask at hand, `least-squares`
solves for the kept weights of least layer error, `asymmetric` is least squares whose down matrix answers for gate and
up as well, and `rescale` is one scalar per expert on its down matrix: the control that the others must beat. It
composes with them: "least-squares+rescale". With "+tune" all kept weights of an expert are then trained together for
what the expert gives, see moesparse.pruning.tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moesparse.errors import CalibrationError, UsageError
from moesparse.weights.solvers import DAMPING, expert_slices, factorise, layer_hessian, least_squares, obs, row_error

Gate = Literal["plain", "gated"]

UPDATE_RULES = (
    "none",
    "rescale",
    "obs",
    "least-squares",
    "asymmetric",
    "obs+rescale",
    "least-squares+rescale",
    "asymmetric+rescale",
    "obs+tune",
    "least-squares+tune",
    "asymmetric+tune",
)


class Statistics(Protocol):
    """What the rules read of `ExpertStatistics`; dictionaries are keyed by the matrix's input."""

    tokens: Tensor
    """[E] int64, tokens routed to each expert."""
    energy: dict[str, Tensor]
    """[E, in]: sum_t x_t^2, and the same of g_t x_t below."""
    gated_energy: dict[str, Tensor]
    moment: dict[str, Tensor]
    """[E, in, in]: sum_t x_t x_t^T, and the same of g_t x_t below; empty when not collected."""
    gated_moment: dict[str, Tensor]


def parse_update(rule: str) -> tuple[str, bool]:
    """ "least-squares+rescale" -> ("least-squares", True): the solver, and whether to rescale; see also `tunes`.

    Raises:
        UsageError: not one of `UPDATE_RULES`; lists them.
    """
    if rule not in UPDATE_RULES:
        raise UsageError(f"update must be one of {', '.join(UPDATE_RULES)}, got {rule!r}")
    solver, _, then = rule.partition("+")
    return ("none", True) if solver == "rescale" else (solver, then == "rescale")


def tunes(rule: str) -> bool:
    """Whether a rule ends by training the kept weights of an expert together."""
    return rule.endswith("+tune")


@dataclass(frozen=True, eq=False)
class Update:
    """Pruned weights, and how far their outputs are from the dense ones.

    Attributes:
        weight: [E, out, in], dtype of the input, exactly zero where pruned.
        error_before: [E] float64 on the CPU: |(W - V) X| / |W X| of the masked dense weights, over the moment used;
            None when no moment was needed.
        error_after: the same of the updated weights, before they are rounded to the weight's dtype.
        damping: what each expert's factorisation needed, a share of the mean diagonal; None without one.
        scale: [E] float64 on the CPU, the factors of `rescale`; None without.
    """

    weight: Tensor
    error_before: Tensor | None = None
    error_after: Tensor | None = None
    damping: tuple[float, ...] | None = None
    scale: Tensor | None = None


def update_weights(
    weight: Tensor,
    mask: Tensor,
    rule: str,
    stats: Statistics,
    input: str,
    *,
    gate: Gate = "gated",
    solved: Tensor | None = None,
    damping: float = DAMPING,
    iterations: int = 15,
    name: str = "weight",
) -> Update:
    """Prune `weight` to `mask` and adjust what stays.

    Args:
        weight: [E, out, in], any float dtype, any strides; not modified.
        mask: bool [E, out, in], True where the weight stays.
        rule: one of `UPDATE_RULES`. "rescale" scales the matrix of the "activation" input only, by the ratio of output
            energies over the gated moment of the DENSE activation. A driver that can run the pruned expert once more
            should pass the solver alone and use `rescale_factor` with what it measures, which also sees the loss in
            gate and up.
        stats: `gated_moment[input]` (or `moment[input]`) is needed by every rule but "none".
        input: what the matrix multiplies, "hidden" or "activation".
        gate: moment of obs: "gated", or "plain" for published SparseGPT. least-squares and rescale take the gated one.
        solved: `MaskChoice.solved` of this mask with this moment and damping, which obs then takes as it is.
        damping: added to the moment's diagonal, as a share of its mean.
        iterations: of least-squares, at most.
        name: of the tensor, for errors.

    Returns:
        the masked, adjusted weights; an expert without tokens keeps its masked dense values, and its errors are of the
        weights alone. No row of least-squares is worse than its masked dense values: see `solvers.least_squares`.

    Raises:
        UsageError: unknown rule, or shapes that do not fit.
        CalibrationError: the moments that the rule needs were not collected, or a rule that needs the tokens.
    """
    solver, rescale = parse_update(rule)
    if solver == "asymmetric" or tunes(rule):
        raise CalibrationError(
            f"{name}: update={rule!r} needs the tokens once more after gate and up are pruned; give prune windows "
            "instead of statistics, or take least-squares"
        )
    if mask.shape != weight.shape:
        raise UsageError(f"{name}: mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    rescale = rescale and input == "activation"
    if solver == "none" and not rescale:
        return Update(weight.masked_fill(~mask, 0.0))
    moments = moments_of(stats, input, "plain" if solver == "obs" and gate == "plain" else "gated", name)
    updated = torch.empty_like(weight)
    before, after = (torch.empty(len(weight), dtype=torch.float64) for _ in range(2))
    dampings: list[float] = []
    scales = []
    for experts in expert_slices(weight):
        dense, keep = weight[experts].float(), mask[experts]
        masked = dense.masked_fill(~keep, 0.0)
        moment = moments[experts].to(dense.device)
        hessian = layer_hessian(moment, damping, name=name)
        new = masked
        if solver == "obs" and solved is not None:
            new = solved[experts]
        elif solver == "obs":
            factor, used = factorise(hessian, damping)
            dampings += used
            new = obs(dense, factor, keep)[1]
        elif solver == "least-squares":
            new = least_squares(dense, keep, hessian, iterations=iterations)
        # errors are those of the data: the damping comes off again
        seen = moment.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        hessian.diagonal(dim1=-2, dim2=-1).sub_(torch.where(seen, damping, 0.0)[:, None])
        undamped = hessian.float()
        errors = [row_error(dense - masked, undamped), row_error(dense - new, undamped)]
        total = row_error(dense, undamped).sum(-1)
        for result, error in zip((before, after), errors, strict=True):
            result[experts] = torch.where(total > 0, error.sum(-1) / total, 0.0).sqrt().cpu()
        if rescale:
            # an expert without tokens is left alone: nothing is known of its outputs
            factor_of = rescale_factor(total * seen, row_error(new, undamped).sum(-1))
            scales.append(factor_of.cpu())
            new = new * factor_of[:, None, None].float()
        updated[experts] = new.to(weight.dtype)
    return Update(updated, before, after, tuple(dampings) or None, torch.cat(scales) if scales else None)


@dataclass(frozen=True, eq=False)
class PrunedInputs:
    """What a down matrix reads once gate and up are pruned (h'), set against what it read before (h).

    Attributes:
        stats: sums over h'; the gated moment of "activation" is needed.
        cross: [E, I, I] float64, sum_t g_t^2 h_t h'_t^T.
        energy: [E] float64, sum_t g_t^2 |W h_t|^2, of the dense outputs.
    """

    stats: Statistics
    cross: Tensor
    energy: Tensor


def asymmetric_target(
    weight: Tensor, inputs: PrunedInputs, *, damping: float = DAMPING, name: str = "weight"
) -> Tensor:
    """The down matrix that brings pruned activations nearest to the dense outputs, before any mask is on it.

    W~ minimises sum_t g_t^2 |W h_t - W~ h'_t|^2 + lambda |W~ - W|^2, so W~ = (W C + lambda W) (M' + lambda)^-1 with M'
    the gated moment of h' and C the cross moment; and the error of any V on h' is that of W~ plus
    (W~ - V) (M' + lambda) (W~ - V)^T: masks and solvers that know only M' work on W~ as they would on W.

    Args:
        weight: [E, out, in], the dense down matrix; not modified.
        inputs: sums over both activations.
        damping: lambda, as a share of the mean diagonal of M'.
        name: of the tensor, for errors.

    Returns:
        [E, out, in] float32; the weights themselves for an expert without tokens.

    Source: ours for a mask; the dense output as the target of a compressed layer's inputs is GPTAQ's asymmetric
    calibration (Li et al., 2025, arXiv 2504.02692).
    """
    moments = moments_of(inputs.stats, "activation", "gated", name)
    target = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for experts in expert_slices(weight):
        dense, moment = weight[experts].float(), moments[experts].to(weight.device)
        hessian = layer_hessian(moment, damping, name=name)
        mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        excess = (inputs.cross[experts].to(moment) - moment) / torch.where(mean > 0, mean, 1.0)[:, None, None]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        # W~ - W = W (C - M') (M' + lambda)^-1: what is rounded is the small change
        target[experts] = torch.baddbmm(dense, dense @ excess.float(), inverse.float())
    return target


def match_output(
    weight: Tensor,
    target: Tensor,
    mask: Tensor,
    inputs: PrunedInputs,
    *,
    damping: float = DAMPING,
    iterations: int = 15,
    name: str = "weight",
) -> Update:
    """Prune a down matrix so that pruned activations give the dense outputs: least squares on `asymmetric_target`.

    Args:
        weight: [E, out, in], dense; not modified.
        target: [E, out, in] float32, of `asymmetric_target`.
        mask: bool [E, out, in], True where the weight stays.
        inputs: sums over both activations.
        damping: as for `target`.
        iterations: of the solver, at most.
        name: of the tensor, for errors.

    Returns:
        the weights; its errors |W h - V h'| / |W h| are those of the whole expert, which gate and up are part of, for
        the masked dense weights before and the solution after.
    """
    moments = moments_of(inputs.stats, "activation", "gated", name)
    updated = torch.empty_like(weight)
    before, after = (torch.empty(len(weight), dtype=torch.float64) for _ in range(2))
    for experts in expert_slices(weight):
        dense, keep = weight[experts].float(), mask[experts]
        moment = moments[experts].to(dense.device)
        solved = least_squares(target[experts], keep, layer_hessian(moment, damping, name=name), iterations=iterations)
        cross, energy = inputs.cross[experts].to(moment), inputs.energy[experts].to(moment.device)
        image = dense.double() @ cross
        for result, kept in ((before, dense.masked_fill(~keep, 0.0)), (after, solved)):
            agreement = (image * kept).sum((-2, -1))
            error = energy - 2 * agreement + row_error(kept.double(), moment).sum(-1)
            result[experts] = torch.where(energy > 0, error.clamp_min(0) / energy, 0.0).sqrt().cpu()
        updated[experts] = solved.to(weight.dtype)
    return Update(updated, before, after)


def rescale_factor(dense_energy: Tensor, pruned_energy: Tensor) -> Tensor:
    """sqrt(dense / pruned), [E] float64: what brings each expert's output back to its dense size.

    A mask takes energy out of an expert's output whatever it keeps; one scalar per expert, on the down matrix, puts it
    back. Ours; the control that every update has to beat.

    Args:
        dense_energy: [E], sum_t g_t^2 |f_t|^2 of the dense expert (`ExpertStatistics.gated_norm_sq_sum`), no bias.
        pruned_energy: [E], the same of the pruned expert over the same tokens.

    Returns:
        [E] float64; 1 where either energy is not positive (no tokens, or an output pruned to nothing).
    """
    dense, pruned = dense_energy.double(), pruned_energy.double()
    known = (dense > 0) & (pruned > 0)
    return torch.where(known, dense / torch.where(known, pruned, 1.0), 1.0).sqrt()


def output_energy(weight: Tensor, moment: Tensor) -> Tensor:
    """sum_t |W g_t h_t|^2 = tr(W M W^T), [E] float64, from weights [E, out, in] and the gated moment [E, in, in] of h.

    The dense down matrix with the moment of dense activations and the pruned one with the moment of pruned activations
    give both sides of `rescale_factor`.
    """
    energies = [row_error(w[None].float(), m[None]).sum() for w, m in zip(weight, moment, strict=True)]
    return torch.stack(energies)


def moments_of(stats: Statistics, input: str, gate: Gate, name: str) -> Tensor:
    """The second moments [E, in, in] that a rule asks for.

    Raises:
        CalibrationError: they were not collected.
    """
    moments: Callable = (stats.gated_moment if gate == "gated" else stats.moment).get
    found = moments(input)
    if found is None:
        raise CalibrationError(
            f"{name}: the rule needs the {gate} second moments of {input!r}, which were not collected; "
            f'calibrate with moments="{gate}"'
        )
    return found
