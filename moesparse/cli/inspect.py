"""`moesparse inspect FOLDER`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesparse.cli.console import print_json, quiet_libraries
from moesparse.cli.gguf import inspect_gguf
from moesparse.cli.options import model_source
from moesparse.cli.unfinished import tell_unfinished
from moesparse.cli.voice import shown_progress
from moesparse.errors import UsageError
from moesparse.system.sizes import format_bytes

if TYPE_CHECKING:
    from moesparse.checkpoints.against import Comparison
    from moesparse.checkpoints.inspection import Inspection

_NAMES_SHOWN = 2


def inspect(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also check hashes, bitmasks, and that the tensors are the model's.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Also explain every difference from the checkpoint it was made of."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the expert matrices of a checkpoint, dense or packed: shapes, zeros, n:m patterns, bytes, recipe.

    The zeros of dense experts are counted in the weights themselves; of packed ones the headers are read. --verify
    reads everything: the sha256 of each shard against moesparse_manifest.json, n bits in every group of m of every
    bitmask, and names and shapes of all tensors. --against compares every byte with those of SOURCE: what is equal,
    what was pruned, updated, cut, removed or dropped, and what nothing explains. One expert's matrix is in memory at a
    time. Ends with 1, naming what is off, when something is, or when the config claims a pattern that does not hold.

    Examples:

      moesparse inspect out/demo-2to4 --json

      moesparse inspect out/demo-packed --verify

      moesparse inspect out/demo-2to4 --against demo

    Of a folder that a run has not finished it is said how far the run is and how it goes on, and the end is 1.

    Of a GGUF file the layers with experts are listed, what they are quantised to, and what was noted of a removal.
    """
    from moesparse.checkpoints.gguf import is_gguf

    if is_gguf(model):
        if verify or against is not None:
            raise UsageError("--verify and --against must be left out for a GGUF file")
        inspect_gguf(model, as_json=as_json)
        return
    if tell_unfinished(model, as_json=as_json):
        raise typer.Exit(1)
    from moesparse.checkpoints.against import compare_folders
    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.inspection import inspect_folder

    with quiet_libraries(), shown_progress() as progress:
        folder = local_folder(model_source(model))
        result = inspect_folder(folder, verify=verify, progress=progress)
        compared = None
        if against is not None:
            compared = compare_folders(folder, local_folder(model_source(against)), progress=progress)
            result.problems += compared.problems
    if as_json:
        print_json("inspect", result.to_dict() | ({} if compared is None else {"against": compared.to_dict()}))
    else:
        _show(result)
        if compared is not None:
            _show_compared(compared)
    for problem in result.problems:
        typer.echo(f"error: {problem}", err=True)
    if result.problems:
        raise typer.Exit(1)


def _show(result: Inspection) -> None:
    from moesparse.checkpoints.recipe_words import recipe_in_words

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
    # words of a folder, which may hold what rich would take for markup; folded where a person reads them
    plain: dict[str, Any] = {"soft_wrap": not out.is_terminal, "markup": False, "highlight": False}
    if result.recipe is not None:
        out.print(recipe_in_words(result.recipe), **plain)
    for number, recipe in enumerate(result.earlier, start=1):
        out.print(f"step {number} before: {recipe_in_words(recipe)}", **plain)
    if result.verified is not None:
        verdict = "looked at, and not all of it holds" if result.problems else "verified"
        out.print(
            f"{verdict}: " + ", ".join(f"{key} {value}" for key, value in result.verified.items()), soft_wrap=True
        )


def _show_compared(found: Comparison) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("against the source", no_wrap=True)
    table.add_column("number", justify="right", no_wrap=True)
    table.add_column("names")
    for kind, groups in (("tensors", found.tensors), ("files", found.files)):
        for what, names in groups.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            shown = "" if what == "equal" else ", ".join(names[:_NAMES_SHOWN]) + more
            table.add_row(f"{kind} {what}", str(len(names)), shown)
    table.add_row("config.json, other values", str(len(found.config)), ", ".join(found.config))
    Console().print(table)
