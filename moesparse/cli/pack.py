"""`moesparse pack IN OUT` and `moesparse unpack IN OUT`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesparse.cli.console import console, print_json, quiet_libraries
from moesparse.cli.options import PushToHub, model_source
from moesparse.cli.push import check_push, pushed
from moesparse.cli.voice import shown_progress
from moesparse.system.sizes import format_bytes

if TYPE_CHECKING:
    from moesparse.checkpoints.repack import FolderReport

_SHARD_HELP = "Largest safetensors file, in GB (10^9 bytes)."
_JSON_HELP = "Print one JSON object."
_OUT_HELP = "New or empty folder."


def pack(
    model: Annotated[
        str, typer.Argument(metavar="IN", help="A pruned checkpoint with zeros: a local folder or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=_OUT_HELP)],
    shard_size: Annotated[float, typer.Option(help=_SHARD_HELP, min=0.000001)] = 5.0,
    push_to_hub: PushToHub = "",
    as_json: Annotated[bool, typer.Option("--json", help=_JSON_HELP)] = False,
) -> None:
    """Pack the n:m sparse experts of a checkpoint: 9/16 of their bytes at 2:4 in bf16, the same results.

    Works on files, one expert's matrix in memory at a time. Patterns are read from the weights; a block that holds none
    stays dense and is named. OUT appears whole or not at all. transformers loads it after `import moesparse`; the
    format is described in docs/packed-format.md.

    Example:

      moesparse pack olmoe-2to4 olmoe-packed
    """
    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.repack import pack_folder
    from moesparse.system.folders import check_output_folder

    check_push(push_to_hub)
    check_output_folder(out)
    with quiet_libraries(), shown_progress() as progress:
        folder = local_folder(model_source(model))
        report = pack_folder(folder, out, max_shard_bytes=int(shard_size * 1e9), progress=progress)
    _show(report, out, "packed", as_json, pushed(out, push_to_hub))


def unpack(
    model: Annotated[str, typer.Argument(metavar="IN", help="A packed checkpoint: a local folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=_OUT_HELP)],
    shard_size: Annotated[float, typer.Option(help=_SHARD_HELP, min=0.000001)] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help=_JSON_HELP)] = False,
) -> None:
    """Make a packed checkpoint dense with zeros again, the tensors that were packed bit for bit: any program loads it.

    Example:

      moesparse unpack olmoe-packed olmoe-dense
    """
    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.repack import unpack_folder
    from moesparse.system.folders import check_output_folder

    check_output_folder(out)
    with quiet_libraries(), shown_progress() as progress:
        folder = local_folder(model_source(model))
        report = unpack_folder(folder, out, max_shard_bytes=int(shard_size * 1e9), progress=progress)
    _show(report, out, "unpacked", as_json, {})


def _show(report: FolderReport, out: Path, done: str, as_json: bool, more: dict[str, str]) -> None:
    from moesparse.checkpoints.edit import say_surplus

    if as_json:
        print_json("pack", asdict(report) | {"output": str(out), **more})
        return
    for sentence in say_surplus({"formats": report.formats} if report.formats else {}):
        console.print(sentence, highlight=False, soft_wrap=True)
    for name, reason in report.dense.items():
        console.print(f"[yellow]stays dense:[/] {name}: {reason}", highlight=False, soft_wrap=True)
    if report.negative_zeros:
        console.print(f"{report.negative_zeros:,} pruned weights were -0.0 and are +0.0 now", highlight=False)
    share = report.bytes_after / report.bytes_before
    console.print(
        f"wrote {out}: {len(report.packed)} blocks {done}, expert bytes {format_bytes(report.bytes_before)} > "
        f"{format_bytes(report.bytes_after)} ({share:.1%})",
        highlight=False,
        soft_wrap=True,
    )
