"""`moesparse inspect FOLDER`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesparse.cli.console import format_bytes, print_json, progress_bar, quiet_libraries
from moesparse.cli.options import model_source

if TYPE_CHECKING:
    from moesparse.checkpoints.inspection import Inspection


def inspect(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also check hashes, bitmasks, and that the tensors are the model's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the expert matrices of a checkpoint, dense or packed: shapes, zeros, n:m patterns, bytes, recipe.

    The zeros of dense experts are counted in the weights themselves; of packed ones the headers are read. --verify
    reads everything: the sha256 of each shard against moesparse_manifest.json, n bits in every group of m of every
    bitmask, and names and shapes of all tensors. One expert's matrix is in memory at a time. Ends with 1, naming what
    is off, when something is, or when the config claims a pattern that does not hold.

    Examples:

      moesparse inspect out/demo-2to4 --json

      moesparse inspect out/demo-packed --verify
    """
    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.inspection import inspect_folder

    with quiet_libraries(), progress_bar() as progress:
        result = inspect_folder(local_folder(model_source(model)), verify=verify, progress=progress)
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)
    for problem in result.problems:
        typer.echo(f"error: {problem}", err=True)
    if result.problems:
        raise typer.Exit(1)


def _show(result: Inspection) -> None:
    # a block and its tensors in one column, as of `moesparse prune`: 80 columns hold the names whole
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("block\n  tensor", no_wrap=True)
    for column in ("shape", "zeros", "pattern", "bytes"):
        justify: Literal["left", "right"] = "left" if column == "pattern" else "right"
        table.add_column(column, justify=justify, no_wrap=True, vertical="bottom")
    for block in result.blocks:
        table.add_row(block.name, f"{block.experts} experts")
        for tensor in block.tensors:
            table.add_row(
                f"  {tensor.name}",
                "x".join(map(str, tensor.shape)),
                f"{100 * tensor.sparsity:.2f}%",
                f"{tensor.pattern} packed" if tensor.packed else tensor.pattern,
                format_bytes(tensor.bytes),
            )
    out = Console()
    out.print(table)
    share = result.expert_bytes / result.dense_expert_bytes
    out.print(
        f"expert parameters {result.expert_parameters:,}, others {result.other_parameters:,}\n"
        f"expert bytes {format_bytes(result.expert_bytes)} ({share:.1%} of dense), "
        f"others {format_bytes(result.other_bytes)}",
        soft_wrap=True,
    )
    if result.recipe is not None:
        out.print("pruned by " + ", ".join(f"{key}={value}" for key, value in result.recipe.items()), soft_wrap=True)
    if result.verified is not None:
        verdict = "looked at, and not all of it holds" if result.problems else "verified"
        out.print(
            f"{verdict}: " + ", ".join(f"{key} {value}" for key, value in result.verified.items()), soft_wrap=True
        )
