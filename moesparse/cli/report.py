"""`moesparse report FOLDER|STATS`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesparse.cli.console import console, print_json, quiet_libraries
from moesparse.cli.evaluate import measure
from moesparse.cli.options import CHAT_HELP, check_input_file, check_output_file, model_source, option
from moesparse.errors import UsageError
from moesparse.system.sizes import format_bytes

if TYPE_CHECKING:
    from moesparse.report.page import Page

_PERPLEXITY = "Perplexity"


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A checkpoint folder, files of statistics (FILE=DOMAIN names the domain), or one folder and files.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write every figure as a PNG into this folder.")] = None,
    evaluate: Annotated[
        bool, option(_PERPLEXITY, "Measure it on the embedded texts (models with its tokenizer).", "--evaluate")
    ] = False,
    text: Annotated[list[str] | None, option(_PERPLEXITY, "Measure it on FILE or FILE=NAME. Repeat.")] = None,
    chat: Annotated[bool, option(_PERPLEXITY, CHAT_HELP, "--chat")] = False,
    dense: Annotated[str | None, option(_PERPLEXITY, "The model before pruning: measured on the same texts.")] = None,
    before: Annotated[
        Path | None, option(_PERPLEXITY, "Or: its perplexities from a file that `moesparse eval --json` gave.")
    ] = None,
    after: Annotated[Path | None, option(_PERPLEXITY, "The same of the pruned model.")] = None,
    comparison: Annotated[
        Path | None,
        typer.Option(
            help="What was lost: the file that `moesparse compare DENSE SOURCE -o FILE` wrote.", metavar="FILE"
        ),
    ] = None,
    length: Annotated[int | None, option(_PERPLEXITY, "Tokens in a window, as in moesparse eval.", min=2)] = None,
    batch_size: Annotated[int, option(_PERPLEXITY, "Windows in one forward.", min=1)] = 8,
    device: Annotated[str, option(_PERPLEXITY, "auto, cpu, cuda, cuda:1: where it is measured.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as one JSON object.")] = False,
) -> None:
    """Write one self-contained HTML page about a pruned checkpoint, about saved statistics, or about both.

    Routing by layer and expert, specialisation between domains (from one file of statistics each), what was removed and
    its scores, zeros per tensor, perplexity, bytes, recipe. What is not known is named, never guessed.

    Examples:

      moesparse report out/demo-2to4 --evaluate --dense demo -o report.html

      moesparse report out/small --comparison lost.json -o report.html

      moesparse report out/small law.stats=law medicine.stats=medicine --png figures/
    """
    from moesparse.report.figures import check_plots
    from moesparse.report.findings import Findings, read_checkpoint, read_comparison, read_results, read_routing
    from moesparse.report.sections import build

    folder, statistics = _split(sources)
    check_output_file("--output", output)
    for name, file in (("--before", before), ("--after", after), ("--comparison", comparison)):
        if file is not None:
            check_input_file(name, file)
    if png is not None and png.is_file():
        raise UsageError(f"--png must be a folder, got the file {png}")
    if (evaluate or text) and folder is None:
        raise UsageError("SOURCE must hold a checkpoint folder to measure perplexity, got statistics alone")
    if (evaluate or text) and after is not None:
        raise UsageError("perplexity must be measured or read, got --after together with --evaluate or --text")
    if dense is not None and (before is not None or not (evaluate or text)):
        raise UsageError("--dense must come with --evaluate or --text and without --before")
    findings = Findings(
        title=f"Report on {folder.name}" if folder is not None else f"Routing of {', '.join(statistics)}",
        checkpoint=None if folder is None else read_checkpoint(folder),
        routing=read_routing(statistics) if statistics else None,
        before=None if before is None else read_results(before),
        after=None if after is None else read_results(after),
        comparison=None if comparison is None else read_comparison(comparison, folder),
    )
    check_plots()
    if folder is not None and (evaluate or text):
        settings = {"chat": chat, "length": length, "batch_size": batch_size, "device": device}
        measured = measure(str(folder), text, **settings)  # type: ignore[arg-type]
        reference = findings.before if dense is None else measure(dense, text, **settings)  # type: ignore[arg-type]
        findings = replace(findings, after=measured, before=reference)
    if findings.checkpoint is not None and findings.checkpoint.run is None:
        findings = replace(findings, tensors=_describe(findings.checkpoint.folder))
    page = build(findings)
    written = _write(page, output, png)
    if as_json:
        sections = [section.title for section in page.sections]
        found = {"output": str(output), "png": written, "sections": sections, "missing": page.missing}
        print_json("report", found)
        return
    console.print(f"wrote {output}: {format_bytes(output.stat().st_size)}, one file", highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    for sentence in page.missing:
        console.print(f"left out: {sentence}", highlight=False, markup=False, soft_wrap=True)


def _write(page: Page, output: Path, png: Path | None) -> list[str]:
    """Write the page, and its figures into a folder; the files of these."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page.to_html(), encoding="utf-8")
    written = []
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for name, data in page.pngs().items():
            (png / f"{name}.png").write_bytes(data)
            written.append(str(png / f"{name}.png"))
    return written


def _split(sources: list[str]) -> tuple[Path | None, dict[str, Path]]:
    """The folder and the files of statistics by domain."""
    folders, statistics = [], {}
    for source in sources:
        path = Path(model_source(source))
        if path.is_dir():
            folders.append(path)
            continue
        name, _, domain = source.rpartition("=")
        file, domain = (Path(source), Path(source).stem) if path.is_file() or not name else (Path(name), domain)
        if not file.is_file():
            raise UsageError(f"SOURCE must be a checkpoint folder or a file of statistics, got {source!r}")
        if domain in statistics:
            raise UsageError(f"domains must differ, got {domain!r} twice: name them FILE=DOMAIN")
        statistics[domain] = file
    if len(folders) > 1:
        raise UsageError(f"SOURCE must hold at most one checkpoint folder, got {', '.join(map(str, folders))}")
    return (folders[0] if folders else None), statistics


def _describe(folder: Path) -> dict[str, object]:
    from moesparse.checkpoints.inspection import inspect_folder

    with quiet_libraries():
        return inspect_folder(folder).to_dict()
