"""The pruning ops in plain torch: the path without Triton, and what the kernels are compared with.

Same signatures as the launchers in energy.py, select.py and threshold.py, any strides. Temporaries stay near a few
million elements at a time. Symbols: T tokens, E experts, N rows, K columns, R rows in expert order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .row_order import encode_rows, pack_bits, row_blocks

__all__ = ["column_energy", "nm_prune", "nm_prune_packed", "row_topk"]


def column_energy(
    x: torch.Tensor,
    offsets: torch.Tensor,
    gates: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    both: bool = False,
) -> torch.Tensor:
    """Sum of (gate * x)^2 over the rows of each expert; arguments and result as in `energy.column_energy`.

    The product and its square are rounded to fp32, the sum is fp64.
    """
    K = x.shape[1]
    bounds = offsets.tolist()
    out = torch.zeros(2 if both else 1, len(bounds) - 1, K, dtype=torch.float64, device=x.device)
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        for block in row_blocks(stop - start, K, x.device):
            rows = slice(start + block.start, start + block.stop)
            slots = rows if order is None else order[rows]
            tokens = rows if order is None else order[rows] // top_k
            scaled = x[tokens].float()
            if both:
                out[0, e] += scaled.square().sum(0, dtype=torch.float64)
            if gates is not None:
                scaled = scaled * gates[rows if both else slots].float()[:, None]
            out[-1, e] += scaled.square().sum(0, dtype=torch.float64)
    return out


def _blocks(weight: torch.Tensor) -> Iterator[tuple[int, slice]]:
    E, N, K = weight.shape
    for e in range(E):
        for rows in row_blocks(N, K, weight.device):
            yield e, rows


def _score(weight: torch.Tensor, scale: torch.Tensor, e: int, rows: slice) -> torch.Tensor:
    """fp32 |weight| * scale of some rows of one expert.

    Raises:
        ValueError: a score is NaN; names the first expert, row and column.
    """
    score = (weight[e, rows].float() * scale[e]).abs()
    wrong = score.isnan()
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"|weight| * scale must not be NaN, got NaN in expert {e}, row {rows.start + row}, column {column}"
        )
    return score


def _nm_keep(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """bool like score (rows, K): the n largest of every m, equal scores to the lower column."""
    groups = score.unflatten(-1, (-1, m))
    rank = torch.zeros(groups.shape, dtype=torch.uint8, device=score.device)
    for j in range(m):
        other = groups[..., j : j + 1]
        # how many beat this column: an equal one does when it stands further left
        rank[..., :j] += other > groups[..., :j]
        rank[..., j + 1 :] += other >= groups[..., j + 1 :]
    return (rank < n).flatten(-2)


def nm_prune(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Weight (E, N, K) and fp32 scale (E, K) -> weight where kept, +0.0 elsewhere."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for e, rows in _blocks(weight):
        keep = _nm_keep(_score(weight, scale, e, rows), n, m)
        out[e, rows] = weight[e, rows].masked_fill(~keep, 0)
    return out


def nm_prune_packed(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (E, N, K) and fp32 scale (E, K) -> values and index in "row" order (layout.py)."""
    E, N, K = weight.shape
    values = torch.empty(E, N, K // m * n, dtype=weight.dtype, device=weight.device)
    index = torch.empty(E, N, K // 8, dtype=torch.uint8, device=weight.device)
    for e, rows in _blocks(weight):
        keep = _nm_keep(_score(weight, scale, e, rows), n, m)
        index[e, rows] = pack_bits(keep)
        encode_rows(weight[e, rows], index[e, rows], n, m, out=values[e, rows])
    return values, index


def row_topk(weight: torch.Tensor, scale: torch.Tensor, keep: int) -> torch.Tensor:
    """Weight (E, N, K) and fp32 scale (E, K) -> weight with `keep` of each row kept, +0.0 elsewhere."""
    K = weight.shape[2]
    out = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    for e, rows in _blocks(weight) if keep else ():
        score = _score(weight, scale, e, rows)
        threshold = score.kthvalue(K - keep + 1, dim=-1, keepdim=True).values
        above, level = score > threshold, score == threshold
        # of the columns on the threshold the first so many fill the row up
        room = keep - above.sum(-1, keepdim=True)
        kept = above | (level & (level.cumsum(-1) <= room))
        out[e, rows] = weight[e, rows].masked_fill(~kept, 0)
    return out
