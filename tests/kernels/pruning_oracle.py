"""Slow, independent answers for the pruning ops: Python loops, one weight at a time, fp64 sums."""

from __future__ import annotations

import torch


def keep_mask(weight: torch.Tensor, scale: torch.Tensor, count: int, group: int) -> torch.Tensor:
    """bool like weight (E, N, K): the `count` largest |weight| * scale of every `group` columns, lower column first.

    The product is rounded to fp32 once, from its exact fp64 value, which is what an fp32 multiplication does.
    """
    E, N, K = weight.shape
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for e in range(E):
        scales = scale[e].double().tolist()
        for n in range(N):
            row = weight[e, n].double().abs().tolist()
            product = torch.tensor([w * s for w, s in zip(row, scales, strict=True)], dtype=torch.float64)
            score = product.float().tolist()
            for first in range(0, K, group):
                columns = sorted(range(first, min(first + group, K)), key=lambda k: (-score[k], k))
                mask[e, n, columns[:count]] = True
    return mask


def masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, weight, torch.zeros_like(weight))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bit patterns: -0.0 differs from 0.0, NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def column_energy(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor | None, num_experts: int
) -> torch.Tensor:
    """(E, K) fp64: the sum of (g * x)^2, slot by slot."""
    energy = torch.zeros(num_experts, x.shape[1], dtype=torch.float64)
    for token in range(x.shape[0]):
        for slot, expert in enumerate(top_k_index[token].tolist()):
            if 0 <= expert < num_experts:
                gate = 1.0 if top_k_weights is None else top_k_weights[token, slot].double()
                energy[expert] += (gate * x[token].double()) ** 2
    return energy


def hard_weight(E: int, N: int, K: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random weights with, row by row: equal magnitudes, zeros of both signs, subnormals, few distinct values."""
    weight = torch.randn(E, N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[:, 0] = torch.tensor([1.0, -1.0]).to(dtype).repeat(K // 2)
    weight[:, 1 % N, : K // 2] = 0.0
    weight[:, 1 % N, 1 : K // 2 : 3] = -0.0
    tiny = torch.finfo(dtype).smallest_normal
    weight[:, 2 % N, ::2] = (weight[:, 2 % N, ::2].float() * tiny / 4).to(dtype)
    weight[:, 3 % N] = (weight[:, 3 % N].float() * 2).round().to(dtype)
    return weight


def column_scale(E: int, K: int, seed: int = 1) -> torch.Tensor:
    """fp32 (E, K), positive, with a dead column and a run of ones that leaves ties alone."""
    scale = torch.rand(E, K, generator=torch.Generator().manual_seed(seed)) + 0.1
    scale[:, : K // 3] = 1.0
    scale[:, K // 2] = 0.0
    return scale
