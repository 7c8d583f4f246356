"""The command line: `moesparse COMMAND --help` says what each command does.

Results go to standard output (one JSON object with --json), everything else to standard error. Exit codes: 0 done,
1 the work failed or a check did not hold, 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import typer
import typer.main
from rich.markup import escape

from moesparse._version import __version__
from moesparse.cli.bench import bench
from moesparse.cli.calibrate import HELP as CALIBRATE_HELP
from moesparse.cli.calibrate import calibrate
from moesparse.cli.compare import compare
from moesparse.cli.console import errors, paragraphs
from moesparse.cli.demo import demo
from moesparse.cli.distill import HELP as DISTILL_HELP
from moesparse.cli.distill import distill
from moesparse.cli.evaluate import evaluate
from moesparse.cli.info import info
from moesparse.cli.inspect import inspect
from moesparse.cli.job import job, one_voice
from moesparse.cli.language import in_options, options_of
from moesparse.cli.pack import pack, unpack
from moesparse.cli.prune import HELP as PRUNE_HELP
from moesparse.cli.prune import prune
from moesparse.cli.report import report
from moesparse.cli.serve import serve
from moesparse.cli.voice import speaking
from moesparse.errors import MoESparseError, UsageError, reason_of
from moesparse.system.memory import bound_compiled_products

_INTERRUPTED = 130
"""What typer makes of Ctrl-C."""

app = typer.Typer(
    name="moesparse",
    help="Prune Mixture-of-Experts language models and keep what they know.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command(help=paragraphs(demo.__doc__))(speaking(demo))
app.command(help=paragraphs(PRUNE_HELP))(speaking(prune))
app.command(help=paragraphs(DISTILL_HELP))(speaking(distill))
app.command(help=paragraphs(CALIBRATE_HELP))(speaking(calibrate))
app.command(help=paragraphs(evaluate.__doc__), name="eval")(speaking(evaluate))
app.command(help=paragraphs(compare.__doc__))(speaking(compare))
app.command(help=paragraphs(pack.__doc__))(speaking(pack))
app.command(help=paragraphs(unpack.__doc__))(speaking(unpack))
app.command(help=paragraphs(inspect.__doc__))(speaking(inspect))
app.command(help=paragraphs(report.__doc__))(speaking(report))
app.command(help=paragraphs(bench.__doc__))(bench)
app.command(help=paragraphs(info.__doc__))(info)
app.command(help=paragraphs(serve.__doc__))(serve)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moesparse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake is one line and an exit code, never a traceback."""
    bound_compiled_products()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_in_options(str(message))}\n"
    with one_voice():
        try:
            app()
        except MoESparseError as error:
            job.claim()
            told = escape(_in_options(str(error)))
            errors.print(f"[bold red]error:[/] {job.name}{told}", highlight=False, soft_wrap=True)
            sys.exit(2 if isinstance(error, UsageError) else 1)
        except SystemExit as stop:
            if stop.code == _INTERRUPTED:
                errors.print("[bold red]interrupted:[/] nothing is left half written", soft_wrap=True)
                sys.exit(1)
            raise
        except BrokenPipeError:
            # the reader of our output went away (| head): no message, and no second error while flushing
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            job.claim()
            if os.environ.get("MOESPARSE_TRACEBACK"):
                traceback.print_exc()
            if isinstance(error, OSError) and error.filename is not None:
                # a full disk, a folder that went away: the system names the file and the reason
                text = f"[bold red]error:[/] {job.name}{escape(f'{error.filename}: {error.strerror}')}"
            else:
                kind = f"[bold red]unexpected {type(error).__name__}:[/] {job.name}"
                text = f"{kind}{escape(_unexpected(error))}; MOESPARSE_TRACEBACK=1 shows where it happened."
            errors.print(text, highlight=False, soft_wrap=True)
            sys.exit(1)


def _in_options(text: str) -> str:
    """What the library says, with the options of the command that runs in the place of its parameters."""
    commands: Any = getattr(typer.main.get_command(app), "commands", {})
    return in_options(text, options_of(commands, next((word for word in sys.argv[1:] if word in commands), None)))


def _unexpected(error: Exception) -> str:
    """What happened, and whose fault it may be: the innermost of our and of transformers' functions tells."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parts = Path(frame.filename).parts
        if "transformers" in parts:
            where = f"{frame.name} of transformers' {Path(frame.filename).name}"
            return (
                f"{reason_of(error)}\nIt was raised in {where}: a config.json whose values contradict each other, "
                "or a defect of transformers or moesparse"
            )
        if "moesparse" in parts:
            break
    return f"{error}\nThis is a defect of moesparse"
