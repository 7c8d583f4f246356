"""From a score per weight to what stays: unstructured and n:m masks, and the check that they hold.

A mask is a bool tensor of the weight's shape `[..., out_features, in_features]`, True where the weight stays. Two kinds
of pattern, both along `in_features` (the contraction axis) and both exact, ties and all-equal rows included:

- unstructured: every output row keeps `round(in_features * (1 - ratio))` weights;
- n:m: every group of `m` neighbours keeps `n` (n is what stays, as in "2:4").

Equal scores are resolved in favour of the lower column, so a mask is a function of the score alone: the same on every
device, whatever the chunking. `-0.0` equals `0.0`, `inf` is the best score and `-inf` the worst; NaN is an error.
Nothing is sorted: n:m counts for each weight how many of its group beat it, unstructured selects the row's k-th value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesparse.errors import MoESparseError, UsageError

GROUP_SIZES = (4, 8, 16, 32)

# rows are worked off in chunks that stay in a core's cache; a GPU wants one large launch instead
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 27


@dataclass(frozen=True)
class Pattern:
    """How many weights stay and where: `Pattern(n=2, m=4)` or `Pattern(ratio=0.5)`.

    Args:
        ratio: unstructured; share of every output row that is REMOVED, 0 < ratio < 1.
        n: weights KEPT in each group, 0 < n < m.
        m: group length along in_features, one of `GROUP_SIZES`.

    Raises:
        UsageError: the numbers are out of range, or neither or both kinds are given.
    """

    ratio: float | None = None
    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.group is None) or (self.n is None) != (self.m is None):
            raise UsageError(f"pattern must have either ratio or both n and m, got {self!r}")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError(f"pattern ratio must be between 0 and 1 (the share removed), got {self.ratio:g}")
        if self.group:
            n, m = self.group
            if m not in GROUP_SIZES:
                raise UsageError(f"pattern n:m must have m in {', '.join(map(str, GROUP_SIZES))}, got {n}:{m}")
            if not 0 < n < m:
                raise UsageError(f"pattern n:m must keep 0 < n < m weights, got {n}:{m}")

    @classmethod
    def parse(cls, text: str | float | Pattern) -> Pattern:
        """Read "2:4", 0.5, "0.5" or a Pattern; `Pattern.parse(str(pattern)) == pattern`.

        Raises:
            UsageError: it is none of these, or out of range.
        """
        if isinstance(text, cls):
            return text
        if isinstance(text, str) and (found := re.fullmatch(r"\s*(\d+):(\d+)\s*", text)):
            return cls(n=int(found[1]), m=int(found[2]))
        try:
            # a bool is an int to Python, never a ratio to a user
            ratio = float(text) if not isinstance(text, bool) else None  # type: ignore[arg-type]
        except (TypeError, ValueError):
            ratio = None
        if ratio is None:
            raise UsageError(f'pattern must be n:m such as "2:4" or a ratio such as 0.5, got {text!r}')
        return cls(ratio=ratio)

    @property
    def kind(self) -> str:
        """ "unstructured" or "n:m"."""
        return "unstructured" if self.ratio is not None else "n:m"

    @property
    def group(self) -> tuple[int, int] | None:
        """(n, m), or None when unstructured."""
        return (self.n, self.m) if self.n is not None and self.m is not None else None

    @property
    def density(self) -> float:
        """Share of the weights that stays."""
        if self.group:
            return self.group[0] / self.group[1]
        return 1 - (self.ratio or 0.0)

    def __str__(self) -> str:
        return repr(self.ratio) if self.ratio is not None else f"{self.n}:{self.m}"

    def kept(self, in_features: int) -> int:
        """Weights that stay in one row of `in_features`."""
        return round(in_features * self.density)

    def packed_bytes(self, numel: int, element_size: int) -> int:
        """Bytes of `numel` weights in the packed format: the kept values and one bit per weight that says where.

        An unstructured pattern has no packed format: its weights count as dense.
        """
        if self.group is None:
            return numel * element_size
        n, m = self.group
        return numel * n // m * element_size + numel // 8

    def check_matrix(self, name: str, in_features: int) -> None:
        """Refuse a matrix this pattern does not fit.

        Raises:
            UsageError: in_features is no multiple of m, or the ratio would empty every row; names the tensor.
        """
        if self.m is not None and in_features % self.m:
            raise UsageError(
                f"{name}: in_features must be a multiple of m={self.m} for pattern {self}, got {in_features}; "
                "choose another m, or a ratio"
            )
        if not self.kept(in_features):
            raise UsageError(f"{name}: pattern {self} must keep a weight in every row, keeps 0 of {in_features}")


def mask_from_score(score: Tensor, pattern: Pattern, *, name: str = "score") -> Tensor:
    """Keep the best-scored weights of every row or group.

    Args:
        score: [..., out_features, in_features], any float dtype; larger means keep.
        pattern: how many stay.
        name: of the tensor, for errors.

    Returns:
        bool, the shape of `score`, True where the weight stays; every row or group has exactly what the pattern keeps.
        Of equal scores the lower column stays.

    Raises:
        UsageError: the pattern does not fit in_features.
        MoESparseError: a score is NaN.
    """
    in_features = score.shape[-1]
    pattern.check_matrix(name, in_features)
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    if not mask.numel():
        return mask
    # leading dims are walked, not flattened: a transposed view stays a view
    for scores, masks in _matrices(score, mask):
        for rows in _row_parts(scores):
            part, out = scores[rows], masks[rows]
            if part.isnan().any():
                raise MoESparseError(f"{name}: scores must be numbers, got NaN; the weights or the statistics hold NaN")
            if pattern.group:
                n, m = pattern.group
                columns = part.reshape(-1, m).t().contiguous()
                out.copy_(keep_in_groups(columns, n).t().reshape(part.shape))
            else:
                out.copy_(keep_in_rows(part, pattern.kept(in_features)))
    return mask


def _matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The 2-D matrices of equally shaped [..., out, in] tensors, side by side, as views."""
    if tensors[0].dim() == 2:
        yield tensors
    else:
        for group in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
            yield from _matrices(*group)


def matrix_parts(weight: Tensor) -> Iterator[tuple[int, slice]]:
    """Parts (expert, rows) of a weight [E, out, in]; on a CPU such that one stays in a core's cache."""
    for expert in range(len(weight)):
        for rows in _row_parts(weight[expert]):
            yield expert, rows


def _row_parts(matrix: Tensor) -> Iterator[slice]:
    size = max(1, (_GPU_CHUNK if matrix.is_cuda else _CPU_CHUNK) // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), size):
        yield slice(start, start + size)


def all_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinity anywhere; one pass, and nothing of the tensor's size is allocated."""
    if not tensor.numel():
        return True
    # a NaN becomes both the least and the greatest
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def keep_in_groups(columns: Tensor, n: int) -> Tensor:
    """Exactly n of m per group, groups laid out as [m, ...]: bool of the same shape.

    A weight stays when fewer than n of its group beat it; each comparison of a column with the later ones is one pass.
    """
    m = len(columns)
    if (n, m) == (2, 4) and columns.is_cpu:
        keep = columns >= _second_of_four(columns)
        # more stay where two are equal at the bar
        if keep.sum() * m == keep.numel() * n:
            return keep
    beaten_by = torch.zeros(columns.shape, dtype=torch.int8, device=columns.device)
    for i in range(m - 1):
        # >=: of two equal scores the lower column wins
        wins = columns[i] >= columns[i + 1 :]
        beaten_by[i + 1 :] += wins
        beaten_by[i] += (m - 1 - i) - wins.sum(0, dtype=torch.int8)
    return beaten_by < n


def _second_of_four(columns: Tensor) -> Tensor:
    """The second largest of four columns: five passes, where counting takes fifteen."""
    a, b, c, d = columns
    better = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    return torch.maximum(better, torch.maximum(torch.minimum(a, b), torch.minimum(c, d)))


def keep_in_rows(score: Tensor, kept: int) -> Tensor:
    """Exactly `kept` per row of [R, K]: everything above the row's k-th value, then equals from the left."""
    if not kept:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.topk(kept, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    mask = score >= threshold
    tied = (mask.sum(-1) > kept).nonzero().squeeze(-1)
    if len(tied):
        rows, bar = score[tied], threshold[tied]
        above, equal = rows > bar, rows == bar
        room = kept - above.sum(-1, keepdim=True)
        mask[tied] = above | (equal & (equal.cumsum(-1) <= room))
    return mask


@dataclass(frozen=True)
class MaskCheck:
    """What `check_mask` found.

    `holds`: no row or group has more non-zeros than the pattern keeps (what sparse tensor cores and packing ask).
    `exact`: each has exactly that many. `violations`: rows or groups with too many. `sparsity`: zeros / numel.
    """

    pattern: Pattern
    holds: bool
    exact: bool
    violations: int
    zeros: int
    numel: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0


def check_mask(weight: Tensor, pattern: Pattern, *, name: str = "weight") -> MaskCheck:
    """Check a weight or a mask [..., out_features, in_features] against a pattern; -0.0 counts as a zero.

    Raises:
        UsageError: in_features does not fit the pattern; names the tensor.
    """
    pattern.check_matrix(name, weight.shape[-1])
    in_features = weight.shape[-1]
    kept, size = pattern.group or (pattern.kept(in_features), in_features)
    violations, zeros, exact = 0, 0, True
    for (matrix,) in _matrices(weight):
        counts = _counts(matrix, size)
        violations += int((counts > kept).sum())
        exact = exact and bool((counts == kept).all())
        zeros += matrix.numel() - int(counts.sum())
    return MaskCheck(pattern, violations == 0, exact, violations, zeros, weight.numel())


class PatternFinder:
    """Finds the n:m patterns of a weight that is shown to it part by part, and counts its zeros.

    Attributes:
        zeros: weights that are +0.0 or -0.0 so far.
        numel: weights so far.
    """

    def __init__(self) -> None:
        self.zeros = 0
        self.numel = 0
        self._most: dict[int, int] = {}

    def add(self, part: Tensor) -> None:
        """Look at a part [..., out, in] with all its inputs."""
        if not part.numel():
            return
        for (matrix,) in _matrices(part):
            counts = _counts(matrix, 1 if matrix.shape[-1] % GROUP_SIZES[0] else GROUP_SIZES[0])
            self.numel += matrix.numel()
            self.zeros += matrix.numel() - int(counts.sum())
            for m in GROUP_SIZES:
                if matrix.shape[-1] % m:
                    break
                if m > GROUP_SIZES[0]:
                    counts = counts.unflatten(-1, (-1, 2)).sum(-1, dtype=torch.int32)
                self._most[m] = max(self._most.get(m, 1), int(counts.max()))

    def patterns(self) -> tuple[Pattern, ...]:
        """Those that hold in all parts, sparsest first, then the smaller group; see `detect_patterns`."""
        found = [Pattern(n=n, m=m) for m, n in self._most.items() if n < m]
        return tuple(sorted(found, key=lambda pattern: (pattern.density, pattern.m)))


def detect_patterns(weight: Tensor) -> tuple[Pattern, ...]:
    """The n:m patterns that hold in a weight [..., out_features, in_features], sparsest first, then the smaller group.

    For each group size that divides in_features, n is the most non-zeros found in a group (at least 1); a size whose
    n reaches m says nothing and is left out. A dense or an unstructured weight gives ().
    """
    finder = PatternFinder()
    finder.add(weight)
    return finder.patterns()


def _counts(matrix: Tensor, size: int) -> Tensor:
    """Non-zeros in each run of `size` columns of [R, K]: int32 [R, K / size]."""
    kept = matrix != 0
    if size % 4 == 0:
        # four bytes of 0 or 1 are a word, whose multiple has their sum in its highest byte
        fours = (kept.contiguous().view(torch.int32) * 0x01010101) >> 24
        return fours if size == 4 else fours.unflatten(-1, (-1, size // 4)).sum(-1, dtype=torch.int32)
    return kept.unflatten(-1, (-1, size)).sum(-1, dtype=torch.int32)
