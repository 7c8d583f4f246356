"""The pruning and packing kernels against plain torch, in GB/s and as a share of the measured copy bandwidth.

    python -m benchmarks.speed.bench_kernels                                  # gate_up_proj of every shape
    python -m benchmarks.speed.bench_kernels --shapes Mixtral-8x7B --again
    python -m benchmarks.speed.bench_kernels --dry --results out/dry

Bytes are the least an op moves: every input read once, the result written once. Experts beyond 512 MiB of dense weight
are left out of a case; the row says how many there are. What is compared with what:

    nm_prune 2:4, 4:8       |W| * scale, choice and masking in one pass     torch.topk of every group, scatter
    nm_prune 2:4 packed     the same, written packed
    row_topk 50%            exact choice in every row, no sort              torch.topk, torch.sort of every row
    column_energy           per-expert sums of (g x)^2 over 8192 tokens     square and index_add_
    column_energies         those of x^2 and (g x)^2 in one pass            the same expert by expert
    unpack                  fragment order -> dense                         NMWeight.unpack
    pack                    dense -> row order (plain torch)

Kernels are compared bit for bit with the plain-torch reference of the package, the energies with fp64; the baselines
must keep as much score as the kernels. What does not hold is not timed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.speed.common import Session, parser, start
from moesparse.benchmarking import Shape, time_call
from moesparse.benchmarking.layer import failed, make_routing
from moesparse_kernels import NMWeight, column_energies, column_energy, nm_prune, reference, row_topk
from moesparse_kernels.unpack import unpack

__all__ = ["Case", "cases", "main", "run"]

_MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Attributes:
        op: what is computed; the rows of one op compare.
        contender: who computes it.
        call: what is timed.
        check: the error of a result, 0 where it must be the same bits; raises AssertionError when it does not hold.
        moved: the least bytes the op moves.
        graph: can be captured.
    """

    op: str
    contender: str
    call: Callable[[], Any]
    check: Callable[[Any], float]
    moved: int
    graph: bool = True


def _same_bits(result: torch.Tensor, wanted: torch.Tensor) -> float:
    assert result.shape == wanted.shape and result.dtype == wanted.dtype
    assert torch.equal(result.view(torch.int16), wanted.view(torch.int16)), "differs from the reference"
    return 0.0


def _same_packed(result: NMWeight, wanted: NMWeight) -> float:
    assert result.equal(wanted), "differs from the reference"
    return 0.0


def _kept_score(result: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    """Baselines break ties their own way: as much score must stay, in as many weights."""
    scores = [(kept.float().abs() * scale[:, None]).sum(dtype=torch.float64) for kept in (result, wanted)]
    error = float((scores[0] - scores[1]).abs() / scores[1])
    # a kept weight may be zero, so the counts are compared within one in a million too
    counts = [float(kept.count_nonzero()) for kept in (result, wanted)]
    assert error < 1e-6 and abs(counts[0] - counts[1]) <= 1e-6 * counts[1], f"keeps another score, off by {error:.1e}"
    return error


def _scatter(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device).scatter_(-1, keep, True)
    return weight.masked_fill(~mask, 0)


def torch_nm_prune(weight: torch.Tensor, scale: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The baseline of nm_prune: topk of every group."""
    score = (weight.float() * scale[:, None]).abs().unflatten(-1, (-1, m))
    return _scatter(weight.unflatten(-1, (-1, m)), score.topk(n, dim=-1).indices).flatten(-2)


def torch_row_topk(weight: torch.Tensor, scale: torch.Tensor, keep: int, by_sort: bool) -> torch.Tensor:
    """The baselines of row_topk: topk, or a sort, of every row."""
    score = (weight.float() * scale[:, None]).abs()
    if by_sort:
        return _scatter(weight, score.sort(dim=-1, descending=True).indices[..., :keep])
    return _scatter(weight, score.topk(keep, dim=-1, sorted=False).indices)


def torch_column_energy(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """The baseline of column_energy: weighted squares of every slot, added to their expert's row."""
    out = torch.zeros(num_experts, x.shape[1], dtype=torch.float32, device=x.device)
    for choice in range(top_k_index.shape[1]):
        squares = (x.float() * top_k_weights[:, choice, None].float()).square_()
        out.index_add_(0, top_k_index[:, choice], squares)
    return out


def torch_column_energies(x: torch.Tensor, bounds: list[int], gates: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The baseline of column_energies, as the recorder does it on a CPU: expert by expert, with known bounds."""
    out = torch.zeros(2, len(bounds) - 1, x.shape[1], dtype=torch.float32, device=x.device)
    for expert, (first, last) in enumerate(itertools.pairwise(bounds)):
        squares = x[rows[first:last]].float().square()
        out[0, expert] = squares.sum(0)
        out[1, expert] = gates[first:last].float().square() @ squares
    return out


def _second_error(result: torch.Tensor, wanted: torch.Tensor, limit: float) -> float:
    return _energy_error(result[1], wanted, limit)


def _energy_error(result: torch.Tensor, wanted: torch.Tensor, limit: float) -> float:
    error = float((result.double() - wanted).norm() / wanted.norm())
    assert error < limit, f"relative error {error:.1e} over {limit:.0e}"
    return error


def cases(shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int = 8192) -> Iterator[Case]:
    """Every op on gate_up_proj of a shape and on the layer's input; inputs of one op live until the next."""
    H, N = shape.hidden, 2 * shape.intermediate
    experts = max(1, min(shape.num_experts, _MAX_BYTES // (N * H * dtype.itemsize)))
    random = torch.Generator(device=device).manual_seed(0)
    weight = torch.empty(experts, N, H, dtype=dtype, device=device).normal_(generator=random)
    scale = torch.rand(experts, H, generator=random, device=device) + 0.1
    pruned: torch.Tensor | None = None
    for n, m in ((4, 8), (2, 4)):
        pruned = reference.nm_prune(weight, scale, n, m)
        op, moved = f"nm_prune {n}:{m}", 2 * weight.nbytes + scale.nbytes
        same, score = partial(_same_bits, wanted=pruned), partial(_kept_score, wanted=pruned, scale=scale)
        yield Case(op, "moesparse", partial(nm_prune, weight, scale, n, m), same, moved)
        yield Case(op, "torch topk", partial(torch_nm_prune, weight, scale, n, m), score, moved)
    packed = NMWeight(*reference.nm_prune_packed(weight, scale, 2, 4), (experts, N, H), 2, 4, "row", dtype)
    moved = weight.nbytes + scale.nbytes + packed.nbytes
    yield Case(
        "nm_prune 2:4 packed",
        "moesparse",
        lambda: nm_prune(weight, scale, packed=True),
        lambda out: _same_packed(out, packed),
        moved,
    )
    assert pruned is not None
    dense = pruned
    # packing looks for the first wrong group on the host
    yield Case(
        "pack",
        "moesparse",
        lambda: NMWeight.pack(dense),
        lambda out: _same_bits(out.unpack(), dense),
        moved,
        graph=False,
    )
    on_device = packed.to_order("fragment") if device.type == "cuda" else packed
    moved = on_device.nbytes + weight.nbytes
    yield Case("unpack", "moesparse", lambda: unpack(on_device), lambda out: _same_bits(out, dense), moved)
    yield Case(
        "unpack", "NMWeight.unpack", lambda: packed.unpack(), lambda out: _same_bits(out, dense), moved, graph=False
    )
    keep = H // 2
    wanted = reference.row_topk(weight, scale, keep)
    moved = 2 * weight.nbytes + scale.nbytes
    same, score = partial(_same_bits, wanted=wanted), partial(_kept_score, wanted=wanted, scale=scale)
    yield Case("row_topk 50%", "moesparse", partial(row_topk, weight, scale, keep), same, moved)
    for by_sort, name in ((False, "torch topk"), (True, "torch sort")):
        yield Case("row_topk 50%", name, partial(torch_row_topk, weight, scale, keep, by_sort), score, moved)
    x = torch.empty(tokens, H, dtype=dtype, device=device).normal_(generator=random)
    index = make_routing(shape.num_experts, shape.top_k, tokens, "skewed").to(device)
    gates = torch.rand(index.shape, generator=random, device=device)
    energy = torch.zeros(shape.num_experts, H, dtype=torch.float64, device=device)
    for choice in range(shape.top_k):
        energy.index_add_(0, index[:, choice], (x.double() * gates[:, choice, None].double()).square_())
    moved = x.nbytes + index.nbytes + gates.nbytes + energy.nbytes
    yield Case(
        "column_energy",
        "moesparse",
        lambda: column_energy(x, index, gates, shape.num_experts),
        lambda out: _energy_error(out, energy, 1e-6),
        moved,
    )
    # atomics in fp32: a looser error, and not the same bits twice
    yield Case(
        "column_energy",
        "torch index_add_",
        lambda: torch_column_energy(x, index, gates, shape.num_experts),
        lambda out: _energy_error(out, energy, 1e-4),
        moved,
    )
    expert, order = index.flatten().sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(shape.num_experts + 1, device=device))
    rows, of_row, bounds = order // shape.top_k, gates.flatten()[order], offsets.tolist()
    for name, call, limit in (
        ("moesparse", lambda: column_energies(x, offsets, of_row, rows), 1e-6),
        ("torch, expert by expert", lambda: torch_column_energies(x, bounds, of_row, rows), 1e-4),
    ):
        check = partial(_second_error, wanted=energy, limit=limit)
        yield Case("column_energies", name, call, check, moved + energy.nbytes)


def measure(case: Case, session: Session) -> dict[str, Any]:
    """Check, then time: the fields of a row."""
    try:
        error = case.check(case.call())
        timing = time_call(case.call, session.device, graph=case.graph, budget=session.budget)
    except AssertionError as wrong:
        return {"status": "wrong", "reason": str(wrong)}
    except torch.OutOfMemoryError as full:
        return {"status": "skipped", "reason": str(full).splitlines()[0]}
    except Exception as failure:
        return failed(failure)
    rate = case.moved / timing.median
    return {
        "status": "ok",
        "error": error,
        **timing.as_row(),
        "bytes": case.moved,
        "gb_s": rate / 1e9,
        "copy_share": rate / session.ceilings.copy,
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add `speedup`, the best baseline's time over the kernel's, to the kernels' rows."""
    for row in rows:
        others = [
            other["us"]
            for other in rows
            if other["op"] == row["op"] and other["contender"] != "moesparse" and other["status"] == "ok"
        ]
        if row["contender"] == "moesparse" and row["status"] == "ok" and others:
            row["speedup"] = min(others) / row["us"]


def run(session: Session, dtypes: tuple[str, ...] = ("bfloat16",)) -> bool:
    """Measure into kernels.json and print the table; False when something was wrong."""
    results = session.file("kernels")
    measured = []
    for shape in session.shapes:
        for dtype in dtypes:
            key = {"part": "kernels", "shape": shape.name, "dtype": dtype}
            if results.has(contenders=["moesparse", "torch index_add_"], **key) and not session.again:
                measured += [row for row in results.rows if all(row.get(k) == v for k, v in key.items())]
                continue
            rows = []
            made = cases(shape, getattr(torch, dtype), session.device, tokens=64 if session.dry else 8192)
            for case in made:
                sizes = {"experts": shape.num_experts, "hidden": shape.hidden, "intermediate": shape.intermediate}
                rows.append({**key, **sizes, "op": case.op, "contender": case.contender, **measure(case, session)})
                if rows[-1]["status"] == "lost":
                    break
            _compare(rows)
            results.put(rows)
            measured += rows
            if rows[-1]["status"] == "lost":
                print_table(measured)
                return False
            if session.device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"kernels: {shape.name} done", file=sys.stderr, flush=True)
    print_table(measured)
    return all(row["status"] in ("ok", "skipped") for row in measured)


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each shape and op: the kernel and its best baseline."""
    print("gate_up_proj; us are medians; copy = share of the measured copy bandwidth; speedup = best torch / moesparse")
    print(f"{'shape':<17}{'dtype':<9}{'op':<20}{'us':>11}{'GB/s':>9}{'copy':>7}{'torch us':>12}{'speedup':>9}")
    for row in rows:
        if row["contender"] != "moesparse":
            continue
        start = f"{row['shape'][:16]:<17}{row['dtype']:<9}{row['op']:<20}"
        if row["status"] != "ok":
            print(start, row["status"], row["reason"])
            continue
        against = f"{row['us'] * row['speedup']:>12,.1f}{row['speedup']:>8.2f}x" if "speedup" in row else ""
        print(f"{start}{row['us']:>11,.1f}{row['gb_s']:>9,.1f}{row['copy_share']:>7.0%}{against}")
    for row in rows:
        if row["status"] in ("wrong", "failed", "lost") and row["contender"] != "moesparse":
            print(f"{row['shape']} {row['op']} {row['contender']}: {row['reason']}")


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--dtypes", nargs="*", default=["bfloat16"], choices=["bfloat16", "float16"])
    chosen = options.parse_args(arguments)
    if not run(start(chosen), tuple(chosen.dtypes)):
        sys.exit(1)


if __name__ == "__main__":
    main()
