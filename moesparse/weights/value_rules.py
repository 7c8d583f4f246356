"""Value rules: under which scales the weights that are left are rounded, and to which codes.

| rule | what | source |
|---|---|---|
| rtn | the nearest code, under scales that reach to the largest weight | |
| rtn-mse | the nearest code, under scales of least squared error, every input weighed by its gated energy | |
| gptq | columns rounded one by one, those to come making up for the error | Frantar et al., 2022, arXiv 2210.17323 |
| gated-gptq | the same with the gate inside the second moment | ours |

GPTQ starts from the scales of rtn-mse, weighed by the diagonal of its moment, and walks the columns from the largest
energy to the smallest. In the end the scales of integers are solved for again, one after the other by least squares.

Weights are rounded after they are pruned: what is zero stays zero, in whatever pattern, and takes no error of others.
Of an expert without tokens all inputs count the same, and it is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesparse.errors import MoESparseError, UsageError
from moesparse.weights import solvers
from moesparse.weights.codes import reduced
from moesparse.weights.mask_rules import unseen_experts
from moesparse.weights.patterns import all_finite, matrix_parts
from moesparse.weights.value_formats import Quantised, Scales, ValueFormat
from moesparse.weights.weight_rules import Gate, Statistics, moments_of

__all__ = ["ORDERS", "VALUE_RULES", "ValueChoice", "choose_values", "value_moment"]

_MOMENTS: dict[str, Gate | None] = {"rtn": None, "rtn-mse": None, "gptq": "plain", "gated-gptq": "gated"}
VALUE_RULES = tuple(_MOMENTS)
ORDERS = ("energy", "columns")
"""In which GPTQ walks the columns: those of the largest energy first (Frantar et al., "act-order"), or as they are."""

# the first is rtn's, so that the search is never worse
_REACHES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35)
_POWERS = (1.0, 2.0, 0.5)


@dataclass(frozen=True, eq=False)
class ValueChoice:
    """Rounded weights, and how far they are from what they were.

    Attributes:
        quantised: codes and scales of [E, out, in].
        error: [E] float64 on the CPU: |W - V| / |W|.
        output_error: the same of the outputs on the calibration tokens, |(W - V) X| / |W X| over the moment of the
            rule; None for rules without one. Of an expert without tokens it is that of the weights.
        fallback: experts without tokens, rounded with all inputs alike.
        damping: what each expert's factorisation needed, a share of the mean diagonal; None without one.
    """

    quantised: Quantised
    error: Tensor
    output_error: Tensor | None = None
    fallback: tuple[int, ...] = ()
    damping: tuple[float, ...] | None = None


def value_moment(rule: str) -> Gate | None:
    """The second moment that a rule reads; None where it reads none.

    Raises:
        UsageError: no rule.
    """
    if rule not in _MOMENTS:
        raise UsageError(f"value_rule must be one of {', '.join(VALUE_RULES)}, got {rule!r}")
    return _MOMENTS[rule]


def choose_values(
    weight: Tensor,
    rule: str,
    format: ValueFormat,
    stats: Statistics | None,
    input: str,
    *,
    order: str = "energy",
    resolve: bool = True,
    damping: float = solvers.DAMPING,
    name: str = "weight",
) -> ValueChoice:
    """Round every expert's matrix.

    Besides the result GPTQ holds what the other solvers do for as many experts as fit (`solvers.memory_for_solver`).

    Args:
        weight: [E, out, in], any float dtype, any strides; not modified. Its zeros stay.
        rule: one of `VALUE_RULES`.
        format: of the values.
        stats: sums over the calibration tokens; None weighs all inputs alike, which rtn and rtn-mse can do with.
        input: what the matrix multiplies, "hidden" or "activation".
        order: of GPTQ, one of `ORDERS`.
        resolve: solve for GPTQ's scales again in the end.
        damping: of the second moments, as a share of their mean diagonal.
        name: of the tensor, for errors.

    Raises:
        UsageError: an unknown rule, or rows that are no whole groups.
        CalibrationError: the moments that the rule needs were not collected.
        MoESparseError: weights hold NaN or infinity.
    """
    gate = value_moment(rule)
    if order not in ORDERS:
        raise UsageError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    format.check_matrix(name, weight.shape[-1])
    if not all_finite(weight):
        raise MoESparseError(f"{name}: weights must be finite, got inf or NaN")
    if rule == "rtn":
        quantised = format.quantise(weight)
        return ValueChoice(quantised, _relative(weight, quantised))
    fallback = () if stats is None else unseen_experts(stats, input)
    if gate is None:
        importance = _importance(weight, stats, input, damping)
        scales = search_scales(weight, format, importance)
        quantised = Quantised(format, format.nearest(weight.float(), scales), scales)
        return ValueChoice(quantised, _relative(weight, quantised), fallback=fallback)
    assert stats is not None
    moments, parts, errors, dampings = moments_of(stats, input, gate, name), [], [], []
    for experts in solvers.expert_slices(weight):
        moment = moments[experts].to(weight.device)
        seen = moment.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        hessian = solvers.layer_hessian(moment, damping, name=name)
        part, error, used = _gptq(weight[experts].float(), format, hessian, seen, damping, order, resolve)
        parts.append(part)
        errors.append(error)
        dampings += used
    quantised = _joined(parts)
    return ValueChoice(quantised, _relative(weight, quantised), torch.cat(errors), fallback, tuple(dampings))


def search_scales(weight: Tensor, format: ValueFormat, importance: Tensor) -> Scales | None:
    """Of some 15 shares of the largest weight that a scale may reach to, those of least squared error.

    Of symmetric integers both signs are tried: their codes reach further down than up.

    Args:
        weight: [E, out, in], any float dtype.
        format: of the values.
        importance: [E, in] float32, what squared errors are weighed by.
    """
    if format.kind == "bf16":
        return None
    reaches: tuple[float, ...] = _POWERS if format.kind == "mxfp4" else _REACHES
    if format.kind == "int" and not format.zero_point:
        reaches = tuple(reach * sign for reach in reaches for sign in (1, -1))
    whole = format.whole(weight)
    found = [
        _search_part(weight[expert, rows].float(), format, importance[expert], reaches, _of(whole, expert))
        for expert, rows in _parts(weight, format.rows)
    ]
    experts = len(weight)

    def stacked(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).view(experts, -1, parts[0].shape[-1])

    # float8 has no torch.where or torch.cat on every device: parts were kept as float32, which is exact
    stored = stacked([stored for stored, _ in found]).to(format.scale_dtype)
    zeros = [zero for _, zero in found if zero is not None]
    return Scales(stored, stacked(zeros) if zeros else None, whole)


def _of(whole: Tensor | None, expert: int) -> Tensor | None:
    return None if whole is None else whole[expert]


def _parts(weight: Tensor, block: int) -> Iterator[tuple[int, slice]]:
    """`matrix_parts` of whole blocks of rows."""
    if block == 1:
        yield from matrix_parts(weight)
        return
    for expert in range(len(weight)):
        for start in range(0, weight.shape[1], block):
            yield expert, slice(start, start + block)


def _search_part(
    weight: Tensor, format: ValueFormat, importance: Tensor, reaches: tuple[float, ...], whole: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of [rows, in]: (stored scales as float32, zero points) [row blocks, column blocks]."""
    low, high = format.extent(weight)
    importance = importance.expand(weight.shape)
    size = format.rows, format.columns or weight.shape[-1]
    if format.rows == 1:
        # groups side by side, so that a scale is spread without a copy
        weight, importance = (each.unflatten(-1, (-1, size[1])) for each in (weight, importance))
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    for reach in reaches:
        scales = format.scales(low, high, reach, whole)
        assert scales is not None
        if format.rows == 1:
            scale, zero = scales.values[..., None], format.zeros(scales)
            zero = zero if zero.ndim == 0 else zero[..., None]
        else:
            scale, zero = format.spread(scales, weight.shape)
        off = format.rounded_(weight * scale.reciprocal(), zero).mul_(scale).sub_(weight)
        off = off.square_().mul_(importance)
        error = off.sum(-1) if format.rows == 1 else reduced(off, size, "sum")
        stored = scales.stored.float()
        if best is None:
            best = error, stored, scales.zero
            continue
        better = error < best[0]
        kept = None if scales.zero is None or best[2] is None else torch.where(better, scales.zero, best[2])
        best = torch.where(better, error, best[0]), torch.where(better, stored, best[1]), kept
    assert best is not None
    return best[1:]


def _importance(weight: Tensor, stats: Statistics | None, input: str, damping: float) -> Tensor:
    """[E, in] float32: the diagonal of the gated layer Hessian, without the rest of it."""
    if stats is None:
        return torch.ones(len(weight), weight.shape[-1], device=weight.device)
    energy = stats.gated_energy[input].to(weight.device).double()
    mean = energy.mean(-1, keepdim=True)
    return torch.where(mean > 0, energy / torch.where(mean > 0, mean, 1.0) + damping, 1.0).float()


def _gptq(
    weight: Tensor, format: ValueFormat, hessian: Tensor, seen: Tensor, damping: float, order: str, resolve: bool
) -> tuple[Quantised, Tensor, list[float]]:
    """Round float32 [E, out, in] for the Hessian [E, in, in] float64: also `output_error` and `damping`."""
    energy = hessian.diagonal(dim1=-2, dim2=-1)
    scales = search_scales(weight, format, energy.float())
    places = None
    if order == "columns":
        factor, used = solvers.factorise(hessian, damping)
    else:
        places = energy.argsort(dim=-1, descending=True, stable=True)
        found = [
            # one at a time: a reordered Hessian is as large as the first
            solvers.factorise(matrix[place].index_select(1, place)[None], damping)
            for matrix, place in zip(hessian, places, strict=True)
        ]
        factor, used = torch.cat([each for each, _ in found]), [each for _, (each,) in found]
    walked = weight if places is None else _taken(weight, places)
    settle = _Settled(format, scales, weight.shape, places)
    updated, error = solvers.obs_rounded(walked, factor, walked != 0, settle)
    whole = solvers.factor_error(walked, factor).sum(-1)
    del walked, factor
    if places is not None:
        updated = torch.empty_like(updated).scatter_(-1, places[:, None].expand(updated.shape), updated)
    result = Quantised(format, format.nearest(updated, scales), scales)
    # errors are those of the data: the damping comes off again
    added = torch.where(seen, energy.new_tensor(used), 0.0)
    sizes = [torch.stack(each) for each in zip(*map(_squares, weight, _each(result)), strict=True)]
    off, whole = error.sum(-1) - added * sizes[0], whole - added * sizes[1]
    if resolve and scales is not None and format.kind == "int":
        result, fall = resolve_scales(weight, result, hessian)
        changed = torch.stack([_squares(dense, each)[0] for dense, each in zip(weight, _each(result), strict=True)])
        off -= fall + torch.where(seen, damping, 0.0) * (changed - sizes[0])
    return result, _root(off, whole), used


def _taken(matrix: Tensor, places: Tensor) -> Tensor:
    return matrix.gather(-1, places[:, None].expand(matrix.shape))


class _Settled:
    """Rounds a column of [E, out, in] under the scales of its groups: `solvers.Settle`.

    Args:
        format: of the values.
        scales: of the matrix.
        shape: of it.
        places: int64 [E, in], which column each step of the walk is; None is one after the other.
    """

    def __init__(self, format: ValueFormat, scales: Scales | None, shape: torch.Size, places: Tensor | None) -> None:
        self.format, self.scale, self.zero = format, None, None
        if scales is None:
            return
        E, out, size = shape
        groups = torch.arange(size, device=scales.stored.device) // (format.columns or size)
        self.groups = groups.expand(E, size) if places is None else groups[places]
        self.experts = torch.arange(E, device=groups.device)
        # a group of all rows lies side by side
        self.scale = format.by_rows(scales.values, out).mT.contiguous()
        zero = format.zeros(scales)
        self.zero = zero if zero.ndim == 0 else format.by_rows(zero, out).mT.contiguous()

    def __call__(self, column: int, rows: slice, values: Tensor) -> Tensor:
        if self.scale is None or self.zero is None:
            return values.bfloat16().float()
        at = self.experts, self.groups[:, column]
        scale = self.scale[at][:, rows]
        zero = self.zero if self.zero.ndim == 0 else self.zero[at][:, rows]
        return self.format.rounded_(values / scale, zero).mul_(scale)


def resolve_scales(weight: Tensor, rounded: Quantised, hessian: Tensor) -> tuple[Quantised, Tensor]:
    """Scales of less layer error for given codes, one after the other by least squares, the others held.

    With U the codes of a group and d what is off, the error d H d^T of a row is least where the scale changes by
    (U H d^T) / (U H U^T). It is rounded as it is stored, and taken where the error falls. One sweep is one product of
    what is off with H.

    Args:
        weight: [E, out, in] float32, what was rounded.
        rounded: to integers.
        hessian: [E, in, in] float64.

    Returns:
        (the same codes under other scales, [E] float64: by how much the damped layer error falls).
    """
    format, scales, matrix = rounded.format, rounded.scales, hessian.float()
    assert scales is not None
    width = format.columns or weight.shape[-1]
    stored, falls = scales.stored.clone(), torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for rows in solvers.row_slices(weight):
        codes = rounded.codes[:, rows]
        part = Scales(scales.stored[:, rows], None if scales.zero is None else scales.zero[:, rows])
        scale, zero = format.spread(part, codes.shape)
        units = format.units(codes, zero)
        off = weight[:, rows] - units * scale
        for group in range(stored.shape[-1]):
            at = slice(group * width, (group + 1) * width)
            own, held = units[..., at], part.values[..., group].double()
            agrees = (own * (off @ matrix[..., at])).sum(-1, dtype=torch.float64)
            bends = (own * (own @ matrix[:, at, at])).sum(-1, dtype=torch.float64)
            new = (held + torch.where(bends > 0, agrees / bends, 0.0)).to(stored.dtype)
            moved = new.double() - held
            fall = moved * (2 * agrees - moved * bends)
            moved.masked_fill_(~(fall > 0), 0.0)
            stored[:, rows, group] = torch.where(fall > 0, new, part.stored[..., group])
            off[..., at].addcmul_(own, moved.float()[..., None], value=-1)
            falls += fall.clamp(min=0).sum(-1)
    return Quantised(format, rounded.codes, replace(scales, stored=stored)), falls


def _each(quantised: Quantised) -> Iterator[Quantised]:
    return (quantised[expert] for expert in range(len(quantised.codes)))


def _joined(parts: list[Quantised]) -> Quantised:
    """Experts one after the other."""
    first = parts[0]
    codes = torch.cat([part.codes for part in parts])
    known = [part.scales for part in parts if part.scales is not None]
    if not known:
        return Quantised(first.format, codes, None)
    dtype = known[0].stored.dtype
    zeros = [each.zero for each in known if each.zero is not None]
    wholes = [each.whole for each in known if each.whole is not None]
    stored = torch.cat([each.stored.float() for each in known]).to(dtype)
    scales = Scales(stored, torch.cat(zeros) if zeros else None, torch.cat(wholes) if wholes else None)
    return Quantised(first.format, codes, scales)


def _relative(weight: Tensor, quantised: Quantised) -> Tensor:
    """[E] float64 on the CPU: |W - V| / |W|."""
    return _root(*(torch.stack(each) for each in zip(*map(_squares, weight, _each(quantised)), strict=True)))


def _squares(dense: Tensor, quantised: Quantised) -> tuple[Tensor, Tensor]:
    off = quantised.dequantise().sub_(dense)
    return off.square_().sum(dtype=torch.float64), dense.float().square().sum(dtype=torch.float64)


def _root(off: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, off.clamp(min=0) / torch.where(whole > 0, whole, 1.0), 0.0).sqrt().cpu()
