"""The expert layer: ours, packed and dense, against torch's and transformers' at decode and at prefill.

    python -m benchmarks.speed.bench_layer decode                             # batch 1-256, every shape
    python -m benchmarks.speed.bench_layer prefill --shapes Qwen3-30B-A3B     # 512-16k tokens
    python -m benchmarks.speed.bench_layer decode --dry --results out/dry

Weights are random with 2:4 zeros, routing is uniform and skewed (Zipf, exponent 1), both seeded. Every contender is
compared with an fp64 computation of the layer and timed only when it holds; a loss is printed like a win. Rows are kept
as they come: a run that was cut off goes on where it stopped. Times, flush and ceilings: moesparse/benchmarking.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.speed.common import DEVICE_LOST, Session, end_with, parser, start
from benchmarks.speed.shapes import DECODE_TOKENS, DRY_TOKENS, PREFILL_TOKENS
from moesparse.benchmarking import Shape, bench_layer, contenders_for, print_rows
from moesparse.benchmarking.layer import ROUTINGS, Contender, ExpertLayer, make_layer

__all__ = ["main", "run"]

TOKENS = {"decode": DECODE_TOKENS, "prefill": PREFILL_TOKENS}


def run(
    session: Session,
    part: str,
    tokens: list[int] | None = None,
    dtypes: tuple[str, ...] = ("bfloat16",),
    *,
    laws: Sequence[str] = ROUTINGS,
    contenders: Callable[[Shape], list[Contender]] | None = None,
    make: Callable[[Shape, torch.dtype, torch.device], ExpertLayer] = make_layer,
) -> bool:
    """Measure one part into <part>.json and print its table; False when a contender was wrong or failed.

    Args:
        tokens: of the calls, those of the part when None.
        laws: of routing.
        contenders: who runs a shape; all that the device has when None.
        make: the layer of a shape.
    """
    results = session.file(part)
    measured = []
    for shape in session.shapes:
        running = contenders(shape) if contenders else contenders_for(session.device)
        names = [contender.name for contender in running]
        for dtype in dtypes:
            layer = None
            lost = {} if session.again else results.lost(part=part, shape=shape.name, dtype=dtype)
            for law in laws:
                for count in tokens or (DRY_TOKENS if session.dry else TOKENS)[part]:
                    key = {"part": part, "shape": shape.name, "dtype": dtype, "tokens": count, "routing": law}
                    if results.has(contenders=names, **key) and not session.again:
                        measured += [row for row in results.rows if all(row.get(k) == v for k, v in key.items())]
                        continue
                    layer = layer or make(shape, getattr(torch, dtype), session.device)
                    how = {"budget": session.budget, "lost": lost}
                    rows = bench_layer(layer, count, law, session.ceilings, running, **how)
                    results.put([{"part": part, **row} for row in rows])
                    measured += rows
                    if rows[-1]["status"] == "lost" and rows[-1]["contender"] not in lost:
                        print_rows(measured)
                        raise SystemExit(DEVICE_LOST)
            del layer
            if session.device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"{part}: {shape.name} done", file=sys.stderr, flush=True)
    print_rows(measured)
    return all(row["status"] in ("ok", "skipped") for row in measured)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=TOKENS)
    options.add_argument("--tokens", nargs="*", type=int, help="instead of the part's own")
    options.add_argument("--dtypes", nargs="*", default=["bfloat16"], choices=["bfloat16", "float16"])
    chosen = options.parse_args(arguments)
    end_with(lambda: run(start(chosen), chosen.part, chosen.tokens, tuple(chosen.dtypes)))


if __name__ == "__main__":
    main()
