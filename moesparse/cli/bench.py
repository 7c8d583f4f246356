"""`moesparse bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesparse.cli.console import console, print_json, quiet_libraries
from moesparse.cli.options import resolve_device
from moesparse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_TOKENS = {"cuda": (1, 8, 64, 256, 2048), "cpu": (1, 8, 64)}


def bench(
    shape: Annotated[
        str, typer.Option(help="Model whose expert layer is measured; --shape list names them.")
    ] = "OLMoE-1B-7B",
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in a call. Repeat.", min=1)] = None,
    routing: Annotated[str, typer.Option(help="uniform, or skewed (Zipf).")] = "uniform",
    full_size: Annotated[bool, typer.Option("--full-size", help="On a CPU: the real size, not a reduced one.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time one expert layer here: packed 2:4 weights against dense ones, ours and transformers'.

    Weights are random with 2:4 zeros. Every way to run the layer is compared with fp64 before it is timed, and a loss
    is printed like a win. On a CPU the layer is a reduced one, and its times say nothing about a GPU. Ends with 1 when
    a result is wrong.

    Examples:

      moesparse bench

      moesparse bench --shape Mixtral-8x7B --tokens 1 --tokens 64 --json
    """
    import torch

    from moesparse.benchmarking import SHAPES, bench_layer, contenders_for, environment, measure_ceilings
    from moesparse.benchmarking.layer import ROUTINGS, make_layer
    from moesparse.system.installation import kernels_in_words

    if shape == "list":
        _show_shapes(list(SHAPES.values()), as_json)
        return
    known = {name.lower(): value for name, value in SHAPES.items()}
    if shape.lower() not in known:
        raise UsageError(f"--shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if routing not in ROUTINGS:
        raise UsageError(f"--routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    target = resolve_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = known[shape.lower()]
    if target.type != "cuda" and not full_size:
        measured = measured.reduced()
        console.print(
            f"no GPU is used: this is a reduced layer ({measured.num_experts} experts, hidden {measured.hidden}, "
            f"intermediate {measured.intermediate}) on the CPU, and says nothing about a GPU",
            soft_wrap=True,
            highlight=False,
        )
    if target.type == "cpu":
        console.print(kernels_in_words(), soft_wrap=True, highlight=False)
    rows: list[dict[str, Any]] = []
    with quiet_libraries(), torch.no_grad():
        ceilings = measure_ceilings(target)
        record = environment(target) | ceilings.as_row()
        layer = make_layer(measured, torch.bfloat16, target)
        for count in tokens or DEFAULT_TOKENS.get(target.type, DEFAULT_TOKENS["cpu"]):
            rows += bench_layer(layer, count, routing, ceilings, contenders_for(target))
            if rows[-1]["status"] == "lost":
                break
        packed, dense = (
            sum(weight.nbytes for weight in weights)
            for weights in ((layer.packed_gate_up, layer.packed_down), (layer.gate_up, layer.down))
        )
    result = {"environment": record, "packed_bytes": packed, "dense_bytes": dense, "rows": rows}
    if as_json:
        print_json("bench", result)
    else:
        _show(result)
    if any(row["status"] in ("wrong", "failed", "lost") for row in rows):
        raise typer.Exit(1)


def _show_shapes(shapes: Sequence[Any], as_json: bool) -> None:
    columns = ("name", "num_experts", "top_k", "hidden", "intermediate", "activation", "bias", "source")
    if as_json:
        found = [{name: getattr(one, name) for name in columns} for one in shapes]
        print_json("bench.shapes", {"shapes": found})
        return
    # name and source in one column, so that 80 columns hold them whole
    headers = ("name\n  source", "experts", *columns[2:-1])
    table = Table(*headers, box=SIMPLE_HEAD, padding=0, show_edge=False)
    for column in table.columns:
        column.no_wrap = True
        column.vertical = "bottom"
    for one in shapes:
        values = (str(getattr(one, name)) for name in columns[1:-2])
        table.add_row(f"{one.name}\n  {one.source}", *values, "yes" if one.bias else "no")
    Console().print(table)


def _microseconds(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _show(result: dict[str, Any]) -> None:
    machine, rows = result["environment"], result["rows"]
    table = Table("tokens", "runs", "us", "20-80%", "roofline", "speed-up", box=SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "runs" else "right"
    last = None
    for row in rows:
        first = row["tokens"] != last
        if first and last is not None:
            table.add_section()
        last = row["tokens"]
        start = (str(last) if first else "", row["contender"])
        if row["status"] != "ok":
            table.add_row(*start, row["status"])
            continue
        # on a CPU the weights come out of warm caches, which no floor from memory bandwidth bounds
        share = f"{row['roofline_share']:.0%}" if "l2_bytes" in machine else ""
        table.add_row(
            *start,
            _microseconds(row["us"]),
            f"{_microseconds(row['us_20'])}-{_microseconds(row['us_80'])}",
            share,
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
        )
    out = Console()
    out.print(table)
    for reason in dict.fromkeys(
        f"{row['contender']} {row['status']}: {row['reason']}" for row in rows if row["status"] != "ok"
    ):
        out.print(reason, highlight=False, soft_wrap=True)
    out.print(
        f"{rows[0]['shape']}, {rows[0]['dtype']}, {rows[0]['routing']} routing; weights "
        f"{result['packed_bytes'] / 1e6:,.1f} MB packed, {result['dense_bytes'] / 1e6:,.1f} MB dense; "
        f"speed-up over the best dense run.\n{machine['device']}, torch {machine['torch']}, measured here: copy "
        f"{machine['copy_gb_s']:,.1f} GB/s, matmul {machine['matmul_tflop_s']:,.2f} TFLOP/s.",
        highlight=False,
        soft_wrap=True,
    )
