"""Mask rules: which weights stay.

| rule | keeps, in each row or n:m group, the largest | source |
|---|---|---|
| magnitude | abs(W) | Han et al., 2015, arXiv 1506.02626 (there over the matrix, here within the row) |
| wanda | abs(W) sqrt(sum_t x_t^2) over the expert's own tokens | Sun et al., 2023, arXiv 2306.11695 |
| moe-pruner | abs(W) sqrt(sum_t (g_t x_t)^2): the gate inside the norm | Xie et al., 2024, arXiv 2410.12013 |
| sparsegpt | error of pruning it, columns to the right making up | Frantar & Alistarh, 2023, arXiv 2301.00774 |
| admm | support of an ADMM solution of the layer error | ALPS: Meng et al., 2024, arXiv 2406.07831 |
| gated-sparsegpt, gated-admm | the same with the gate inside the second moment | ours |
| random | anything: the control that every rule must beat | |

The rules give masks only; weight_rules.py gives the weights, and each rule here goes with each one there.
Rules that score a weight by |W| times a scale of its column can also prune in place, without a mask: `prune_in_place`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moesparse.errors import MoESparseError, UsageError
from moesparse.weights import solvers
from moesparse.weights.patterns import Pattern, all_finite, keep_in_groups, mask_from_score, matrix_parts
from moesparse.weights.weight_rules import Gate, Statistics, moments_of, parse_update
from moesparse_kernels import nm_prune, row_topk


@dataclass(frozen=True, eq=False)
class MaskChoice:
    """A mask and how it came about.

    Attributes:
        mask: bool [E, out, in], True where the weight stays.
        fallback: experts that saw no token (or only zeros) and were scored by magnitude.
        damping: what each expert's factorisation needed, a share of the mean diagonal; None without one.
        solved: [E, out, in] float32, the weights that a sparsegpt rule has found on the way, when asked to keep them:
            those of the "obs" update for this mask.
    """

    mask: Tensor
    fallback: tuple[int, ...] = ()
    damping: tuple[float, ...] | None = None
    solved: Tensor | None = None


class _Request(NamedTuple):
    """Arguments of `choose_masks` as the rules see them."""

    weight: Tensor
    pattern: Pattern
    stats: Statistics
    input: str
    seed: int
    damping: float
    keep_solved: bool
    name: str
    first: int


def choose_masks(
    weight: Tensor,
    rule: str,
    pattern: Pattern,
    stats: Statistics,
    input: str,
    *,
    seed: int = 0,
    damping: float = solvers.DAMPING,
    keep_solved: bool = False,
    name: str = "weight",
    first: int = 0,
) -> MaskChoice:
    """Choose what stays of every expert's matrix.

    Args:
        weight: [E, out, in], any float dtype, any strides; not modified.
        rule: one of `MASK_RULES`.
        pattern: unstructured or n:m; see `moesparse.weights.patterns`.
        stats: sums over the calibration tokens; what it must hold is `moments_needed(rule, "none")`.
        input: what the matrix multiplies, "hidden" or "activation".
        seed: of "random"; no other rule draws numbers.
        damping: of the second moments, as a share of their mean diagonal; raised per expert where it does not suffice.
        keep_solved: keep what is `MaskChoice.solved`; 4 bytes for each weight.
        name: of the tensor, for errors.
        first: number of the first expert where `weight` is a part of a matrix: "random" draws as for the whole.

    Returns:
        exactly the pattern's count in every row or group.

    Raises:
        UsageError: unknown rule, or a pattern that does not fit the matrix.
        CalibrationError: statistics that the rule needs were not collected.
        MoESparseError: weights or statistics hold NaN.
    """
    if rule not in _RULES:
        raise UsageError(f"saliency must be one of {', '.join(MASK_RULES)}, got {rule!r}")
    pattern.check_matrix(name, weight.shape[-1])
    if not all_finite(weight):
        raise MoESparseError(f"{name}: weights must be finite, got inf or NaN")
    choice = _RULES[rule].choose(_Request(weight, pattern, stats, input, seed, damping, keep_solved, name, first))
    if rule in ("magnitude", "random"):
        return choice
    fallback = unseen_experts(stats, input)
    for expert in fallback:
        choice.mask[expert] = mask_from_score(weight[expert].abs(), pattern, name=name)
        if choice.solved is not None:
            # nothing is known of its inputs: the update leaves what stays as it is
            choice.solved[expert] = weight[expert].masked_fill(~choice.mask[expert], 0.0)
    return MaskChoice(choice.mask, fallback, choice.damping, choice.solved)


def prune_in_place(
    weight: Tensor, rule: str, pattern: Pattern, stats: Statistics, input: str, *, name: str = "weight"
) -> tuple[int, ...]:
    """Make `weight` what `choose_masks` leaves of it, without ever holding a mask.

    A GPU scores and chooses in one kernel (moesparse_kernels.nm_prune, row_topk); a CPU works on parts that stay in its
    cache.

    Args:
        weight: [E, out, in], any float dtype, any strides; +0.0 where pruned afterwards.
        rule: one of `COLUMN_RULES`.
        pattern: unstructured or n:m.
        stats: sums over the calibration tokens.
        input: what the matrix multiplies, "hidden" or "activation".
        name: of the tensor, for errors.

    Returns:
        the experts that were scored by magnitude, as `MaskChoice.fallback`.

    Raises:
        UsageError: another rule, or a pattern that does not fit the matrix.
        MoESparseError: weights or statistics hold NaN; the weight is as it was.
    """
    if rule not in COLUMN_RULES:
        raise UsageError(f"saliency must be one of {', '.join(COLUMN_RULES)} to prune in place, got {rule!r}")
    pattern.check_matrix(name, weight.shape[-1])
    if not all_finite(weight):
        raise MoESparseError(f"{name}: weights must be finite, got inf or NaN")
    fallback: tuple[int, ...] = ()
    scale = None
    if rule != "magnitude":
        scale, fallback = _column_norm(rule, stats, input).to(weight.device), unseen_experts(stats, input)
        if not all_finite(scale):
            raise MoESparseError(f"{name}: the statistics must be finite, got inf or NaN")
        scale[list(fallback)] = 1.0
    (_prune_on_gpu if weight.is_cuda else _prune_in_parts)(weight, scale, pattern)
    return fallback


def _prune_on_gpu(weight: Tensor, scale: Tensor | None, pattern: Pattern) -> None:
    if scale is None:
        scale = torch.ones(len(weight), weight.shape[-1], device=weight.device)
    for experts in solvers.expert_slices(weight):
        if pattern.group:
            kept = nm_prune(weight[experts], scale[experts], *pattern.group)
        else:
            kept = row_topk(weight[experts], scale[experts], pattern.kept(weight.shape[-1]))
        weight[experts] = kept


def _prune_in_parts(weight: Tensor, scale: Tensor | None, pattern: Pattern) -> None:
    for expert, rows in matrix_parts(weight):
        part, factor = weight[expert, rows], None if scale is None else scale[expert]
        if pattern.group:
            _prune_groups(part, factor, *pattern.group)
        else:
            score = part.abs() if factor is None else part.abs().float() * factor
            part.masked_fill_(~mask_from_score(score, pattern), 0.0)


def _prune_groups(part: Tensor, factor: Tensor | None, n: int, m: int) -> None:
    """Prune [out, in] by |W| times a factor of each column, all of them finite, in the layout of `keep_in_groups`."""
    groups = part.unflatten(-1, (-1, m))
    columns = groups.permute(2, 0, 1).contiguous()
    score = columns.abs()
    if factor is not None:
        score = score.float().mul_(factor.view(-1, m).t().contiguous()[:, None])
    groups.copy_(columns.masked_fill_(~keep_in_groups(score, n), 0.0).permute(1, 2, 0))


def check_rules(saliency: str, update: str) -> None:
    """Refuse a mask rule or a weight rule that there is none of; UsageError names those there are."""
    moments_needed(saliency, update)


def moments_needed(saliency: str, update: str) -> str:
    """Second moments to calibrate for: "none", "plain", "gated" or "both".

    "rescale" by itself asks for none: a driver measures the output energies, see `updates.rescale_factor`.

    Raises:
        UsageError: an unknown rule.
    """
    if saliency not in _RULES:
        raise UsageError(f"saliency must be one of {', '.join(MASK_RULES)}, got {saliency!r}")
    solver, _ = parse_update(update)
    needed = {_RULES[saliency].moment}
    if solver in ("least-squares", "asymmetric"):
        needed.add("gated")
    elif solver == "obs":
        needed.add(obs_gate(saliency))
    needed.discard(None)
    return "both" if len(needed) == 2 else next(iter(needed), None) or "none"


def obs_gate(saliency: str) -> Gate:
    """The moment of the obs update that goes with a mask rule: gated where the rule is, else published SparseGPT's."""
    return "gated" if saliency == "moe-pruner" or saliency.startswith("gated-") else "plain"


def _magnitude(request: _Request) -> MaskChoice:
    return _by_score(request, lambda experts: request.weight[experts].abs())


def _random(request: _Request) -> MaskChoice:
    # the name makes matrices of one model differ; the draw is on the CPU, so that devices agree
    generator = torch.Generator().manual_seed(request.seed ^ zlib.crc32(request.name.encode()))
    for _ in range(request.first):
        torch.rand(request.weight.shape[1:], generator=generator)
    masks = [
        mask_from_score(torch.rand(expert.shape, generator=generator), request.pattern, name=request.name)
        for expert in request.weight
    ]
    return MaskChoice(torch.stack(masks).to(request.weight.device))


def _by_column(rule: str) -> Callable[[_Request], MaskChoice]:
    def choose(request: _Request) -> MaskChoice:
        norm = _column_norm(rule, request.stats, request.input).to(request.weight.device)[:, None]
        return _by_score(request, lambda experts: request.weight[experts].abs().float() * norm[experts])

    return choose


def _column_norm(rule: str, stats: Statistics, input: str) -> Tensor:
    """[E, in] float32: norm of every input over the expert's tokens, with the gate inside for moe-pruner."""
    energy = stats.gated_energy if rule == "moe-pruner" else stats.energy
    return energy[input].sqrt().float()


def unseen_experts(stats: Statistics, input: str) -> tuple[int, ...]:
    """Experts without tokens, or with zeros only: all their scores are equal, which would prune by index order."""
    unseen = (stats.tokens.cpu() == 0) | (stats.energy[input].cpu().sum(-1) == 0)
    return tuple(unseen.nonzero().flatten().tolist())


def _by_score(request: _Request, score: Callable[[slice], Tensor]) -> MaskChoice:
    """The mask of `score(experts)`, as many experts at once as memory allows."""
    weight = request.weight
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for experts in solvers.expert_slices(weight):
        mask[experts] = mask_from_score(score(experts), request.pattern, name=request.name)
    return MaskChoice(mask)


def _sparsegpt(gate: Gate) -> Callable[[_Request], MaskChoice]:
    def choose(request: _Request) -> MaskChoice:
        def solve(weight: Tensor, hessian: Tensor) -> _Solution:
            factor, used = solvers.factorise(hessian, request.damping)
            return *solvers.obs(weight, factor, request.pattern), used

        return _by_moment(request, gate, solve)

    return choose


def _admm(gate: Gate) -> Callable[[_Request], MaskChoice]:
    def choose(request: _Request) -> MaskChoice:
        def solve(weight: Tensor, hessian: Tensor) -> _Solution:
            _, used = solvers.factorise(hessian, request.damping)
            more = torch.tensor(used, dtype=hessian.dtype, device=hessian.device) - request.damping
            hessian.diagonal(dim1=-2, dim2=-1).add_(more[:, None])
            return solvers.admm(weight, hessian, request.pattern, name=request.name), None, used

        return _by_moment(request, gate, solve)

    return choose


_Solution = tuple[Tensor, Tensor | None, list[float]]
"""A mask, the weights found with it, and the dampings."""


def _by_moment(request: _Request, gate: Gate, solve: Callable[[Tensor, Tensor], _Solution]) -> MaskChoice:
    """Run `solve(weight, hessian)` over the experts, as many at once as memory allows."""
    weight = request.weight
    moments = moments_of(request.stats, request.input, gate, request.name)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    solved = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if request.keep_solved else None
    damping: list[float] = []
    for experts in solvers.expert_slices(weight):
        moment = moments[experts].to(weight.device)
        hessian = solvers.layer_hessian(moment, request.damping, name=request.name)
        mask[experts], found, used = solve(weight[experts].float(), hessian)
        if solved is not None and found is not None:
            solved[experts] = found
        else:
            solved = None
        damping += used
    return MaskChoice(mask, damping=tuple(damping) or None, solved=solved)


class _Rule(NamedTuple):
    choose: Callable[[_Request], MaskChoice]
    moment: Gate | None = None


_RULES: dict[str, _Rule] = {
    "magnitude": _Rule(_magnitude),
    "wanda": _Rule(_by_column("wanda")),
    "moe-pruner": _Rule(_by_column("moe-pruner")),
    "sparsegpt": _Rule(_sparsegpt("plain"), "plain"),
    "gated-sparsegpt": _Rule(_sparsegpt("gated"), "gated"),
    "admm": _Rule(_admm("plain"), "plain"),
    "gated-admm": _Rule(_admm("gated"), "gated"),
    "random": _Rule(_random),
}
MASK_RULES = tuple(_RULES)
COLUMN_RULES = ("magnitude", "wanda", "moe-pruner")
"""Those that score a weight by |W| times a scale of its column."""
