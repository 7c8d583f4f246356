"""Pruning ops against their plain-torch references, on any device: what the kernels of a GPU must give bit for bit.

The interpreter runs the same on a CPU, so that a card is the only new thing where it runs there.
"""

from __future__ import annotations

import pruning_oracle as oracle
import torch

from moesparse_kernels import (
    NMWeight,
    column_energies,
    column_energy,
    column_energy_sorted,
    nm_prune,
    reference,
    row_topk,
)

EPS = torch.finfo(torch.float32).eps


def hard_case(E: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a scale with ties, zeros of both signs and subnormals, on the CPU."""
    return oracle.hard_weight(E, N, K, dtype), oracle.column_scale(E, K)


def assert_nm_prune(shape: tuple[int, int, int], n: int, m: int, dtype: torch.dtype, device: str) -> None:
    """Dense and packed results are the reference's, bit for bit."""
    weight, scale = hard_case(*shape, dtype)
    wanted = reference.nm_prune(weight, scale, n, m)
    got = nm_prune(weight.to(device), scale.to(device), n, m)
    assert got.device.type == torch.device(device).type
    assert oracle.same_bits(got.cpu(), wanted), (n, m, dtype)
    values, index = reference.nm_prune_packed(weight, scale, n, m)
    packed = nm_prune(weight.to(device), scale.to(device), n, m, packed=True)
    assert packed.validate().to("cpu").equal(NMWeight(values, index, shape, n, m, "row", dtype)), (n, m, dtype)


def assert_row_topk(shape: tuple[int, int, int], keep: int, dtype: torch.dtype, device: str) -> None:
    weight, scale = hard_case(*shape, dtype)
    wanted = reference.row_topk(weight, scale, keep)
    got = row_topk(weight.to(device), scale.to(device), keep)
    assert oracle.same_bits(got.cpu(), wanted), (keep, dtype)


def assert_column_energy(tokens: int, experts: int, top_k: int, columns: int, dtype: torch.dtype, device: str) -> None:
    """Every way to sum gives the same bits, on any device the same in every run, and lies beside the fp64 sums."""
    random = torch.Generator().manual_seed(tokens)
    # powers of two: each product, square and sum is exact, so any order of adding gives the same bits
    x = torch.randint(-3, 4, (tokens, columns), generator=random).to(dtype)
    index = torch.rand(tokens, experts, generator=random).topk(top_k).indices
    gates = 2.0 ** torch.randint(-2, 2, (tokens, top_k), generator=random)
    # a slot of no expert
    index[0, 0] = experts
    on_device = [tensor.to(device) for tensor in (x, index, gates)]
    for weights in (gates, None):
        wanted = by_expert(x, index, weights, experts)
        got = column_energy(on_device[0], on_device[1], None if weights is None else on_device[2], experts)
        assert torch.equal(got.cpu(), wanted)
    slots = index.reshape(-1)
    order = slots.sort(stable=True).indices[: int((slots < experts).sum())]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), slots.bincount(minlength=experts + 1)[:experts].cumsum(0)])
    rows, of_rows = x[order // top_k].to(device), gates.reshape(-1)[order].to(device)
    plain, gated = column_energies(on_device[0], offsets.to(device), of_rows, (order // top_k).to(device))
    assert torch.equal(plain, column_energy_sorted(rows, offsets.to(device)))
    assert torch.equal(gated.cpu(), by_expert(x, index, gates, experts))
    # sums of anything else: rounded, but the same twice
    y = torch.randn(tokens, columns, generator=random).to(dtype)
    got = column_energy(y.to(device), *on_device[1:], experts)
    assert torch.equal(got, column_energy(y.to(device), *on_device[1:], experts))
    exact = by_expert(y, index, gates, experts)
    # the product and the square round once each, and 16 terms are added before the compensation starts
    assert bool(((got.cpu() - exact).abs() <= (2 + 16 / 2) * EPS / 2 * exact).all())


def by_expert(x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor | None, experts: int) -> torch.Tensor:
    """(E, K) fp64: the sums of (g * x)^2, an expert at a time."""
    energy = torch.zeros(experts, x.shape[1], dtype=torch.float64)
    for e in range(experts):
        token, choice = (index == e).nonzero(as_tuple=True)
        weighted = x[token].double() if gates is None else x[token].double() * gates[token, choice, None].double()
        energy[e] = weighted.square().sum(0)
    return energy
