"""Whether a kernel on the sparse tensor cores could pay: one expert's gate_up_proj, tokens already in fragment order.

    make gpu PART=sparse_mma                    # into sparse_mma.json, and a table
    python -m benchmarks.speed.bench_sparse_mma --shapes Mixtral-8x7B --tokens 512 4096
    python -m benchmarks.speed.bench_sparse_mma --dry --results out/dry     # the operands, read by plain torch

What is compared, every product with float64 before it is timed:

    dense              torch.mm
    semi_structured    torch's sparse GEMM (cuSPARSELt or CUTLASS) with the algorithm that it finds fastest
    sparse_mma         mma.sp from Gluon, once for each tile: a bound, see benchmarks/speed/sparse_mma.py

`wrong` rows of sparse_mma say that the hardware reads the operands in another order. A grouped kernel of this kind is
worth writing where `speedup`, the best other time over that of sparse_mma, is over 1.05.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.speed.common import Session, parser, start
from moesparse.benchmarking import Shape, time_call
from moesparse.benchmarking.layer import failed
from moesparse_kernels import NMWeight, reference
from moesparse_kernels.semi_structured import compressed_experts, linear, reason_unavailable

__all__ = ["main", "run"]

TOKENS = (128, 512, 2048, 8192)
# bf16 of a sum whose terms are exact: half a unit in the last place of each result, and fp32 sums
LIMIT = 3e-3


def contenders(weight: NMWeight, x: torch.Tensor, dry: bool) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Name and product (T, N) of each; the product raises ValueError where it does not take the sizes."""
    from benchmarks.speed.sparse_mma import Tile, pack_tokens, pack_weight, sparse_matmul, sparse_matmul_torch

    dense = weight.unpack_expert(0)
    yield "dense", partial(torch.mm, x, dense.T)
    if reason_unavailable(weight) is None:
        yield "semi_structured", lambda: linear(x, compressed_experts(weight)[0], None)
    tiles = [Tile(2, 2, 2)] if dry else [Tile(2, 8, 4), Tile(2, 8, 4, 4), Tile(4, 8, 4), Tile(4, 8, 8)]
    multiply = sparse_matmul_torch if dry else sparse_matmul
    for tile in tiles:
        name = f"sparse_mma {tile.rows}x{tile.tokens} {tile.warps} warps {tile.stages} stages"
        try:
            operands = (*pack_weight(weight, tile), pack_tokens(x, tile), tile)
        except ValueError as refusal:
            yield name, partial(_refuse, refusal)
        else:
            yield name, partial(multiply, *operands)


def _refuse(refusal: ValueError) -> torch.Tensor:
    raise refusal


def measure(call: Callable[[], torch.Tensor], wanted: torch.Tensor, session: Session) -> dict[str, Any]:
    """Check, then time: the fields of a row."""
    try:
        error = float((call().double() - wanted).norm() / wanted.norm())
        if not error < LIMIT:
            return {"status": "wrong", "reason": f"relative error {error:.1e} over {LIMIT:.0e}", "error": error}
        timing = time_call(call, session.device, budget=session.budget)
    except ValueError as refusal:
        return {"status": "skipped", "reason": str(refusal)}
    except Exception as failure:
        return failed(failure)
    return {"status": "ok", "error": error, **timing.as_row()}


def measure_shape(shape: Shape, tokens: int, session: Session) -> list[dict[str, Any]]:
    """Rows of all contenders for one expert of a shape."""
    N, K = 2 * shape.intermediate, shape.hidden
    random = torch.Generator(device=session.device).manual_seed(0)
    draw = partial(torch.randn, generator=random, device=session.device)
    score = torch.ones(1, K, device=session.device)
    weight = NMWeight.pack(reference.nm_prune(draw(1, N, K).bfloat16(), score, 2, 4))
    x = draw(tokens, K).bfloat16()
    wanted = x.double() @ weight.unpack_expert(0).double().T
    rows: list[dict[str, Any]] = []
    for name, call in contenders(weight, x, session.dry):
        row = {"hidden": K, "rows": N, "contender": name, **measure(call, wanted, session)}
        if row["status"] == "ok":
            row["dense_tflop_s"] = 2e-6 * tokens * N * K / row["us"]
        rows.append(row)
        if row["status"] == "lost":
            break
    ours = [row for row in rows if row["contender"].startswith("sparse_mma") and row["status"] == "ok"]
    others = [row["us"] for row in rows if row not in ours and row["status"] == "ok"]
    for row in ours if others else []:
        row["speedup"] = min(others) / row["us"]
    return rows


def run(session: Session, tokens: tuple[int, ...]) -> bool:
    """Measure into sparse_mma.json and print the table; False when something was wrong."""
    results = session.file("sparse_mma")
    measured = []
    for shape in session.shapes:
        for count in tokens:
            key = {"part": "sparse_mma", "shape": shape.name, "dtype": "bfloat16", "tokens": count}
            if results.has(contenders=["dense"], **key) and not session.again:
                measured += [row for row in results.rows if all(row.get(k) == v for k, v in key.items())]
                continue
            rows = [key | row for row in measure_shape(shape, count, session)]
            results.put(rows)
            measured += rows
            if rows[-1]["status"] == "lost":
                print_table(measured)
                return False
        print(f"sparse_mma: {shape.name} done", file=sys.stderr, flush=True)
    print_table(measured)
    return all(row["status"] in ("ok", "skipped") for row in measured)


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each contender."""
    print("gate_up_proj of one expert, bf16; TFLOP/s count the dense product; speedup = best other / sparse_mma")
    print(f"{'shape':<17}{'tokens':>7}  {'contender':<37}{'us':>10}{'TFLOP/s':>10}{'speedup':>9}")
    for row in rows:
        start = f"{row['shape'][:16]:<17}{row['tokens']:>7}  {row['contender']:<37}"
        if row["status"] != "ok":
            print(start, row["status"], row["reason"])
            continue
        against = f"{row['speedup']:>8.2f}x" if "speedup" in row else ""
        print(f"{start}{row['us']:>10,.1f}{row['dense_tflop_s']:>10,.1f}{against}")


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", nargs="*", type=int, help=f"rows of the product ({' '.join(map(str, TOKENS))})")
    chosen = options.parse_args(arguments)
    if not run(start(chosen), tuple(chosen.tokens or ((16,) if chosen.dry else TOKENS))):
        sys.exit(1)


if __name__ == "__main__":
    main()
