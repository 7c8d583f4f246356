"""How much a command says while it works: --quiet, --log-file, and what MOESPARSE_LOG asks for."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moesparse._version import __version__
from moesparse.cli.console import console
from moesparse.cli.job import job
from moesparse.cli.options import RUN, check_output_file, option
from moesparse.progress import Progress, reporting, stamped

__all__ = ["shown_progress", "speaking", "voice"]

_QUIET_HELP = "Say nothing on standard error but warnings and errors."
_LOG_HELP = (
    "Add to this file when the run began, a line for every layer (time, tokens/s, time left, peak memory), and how it "
    "ended. Default: MOESPARSE_LOG, where that names a file."
)
_OPTIONS = {
    "quiet": (Annotated[bool, option(RUN, _QUIET_HELP, "--quiet")], False),
    "log_file": (Annotated[Path | None, option(RUN, _LOG_HELP, metavar="FILE")], None),
}


@dataclass
class Voice:
    """Of the command that runs.

    Attributes:
        quiet: nothing is said but warnings and errors.
        log_file: of the lines.
        planned: seconds of the plan, where one was made.
    """

    quiet: bool = False
    log_file: Path | None = None
    planned: float | None = None


voice = Voice()


def shown_progress() -> AbstractContextManager[Progress]:
    """What a long command calls with its events: a bar on a terminal, else a line for every layer; and the log file."""
    kind = "none" if voice.quiet else "auto"
    return reporting(kind, console=console, patience=0.0, log_file=voice.log_file, planned=voice.planned)


def speaking(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options --quiet and --log-file beside its own."""
    own = inspect.signature(command, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in _OPTIONS.items()
    ]

    @functools.wraps(command)
    def run(*, quiet: bool, log_file: Path | None, **asked: Any) -> None:
        if log_file is not None:
            check_output_file("--log-file", log_file)
        voice.quiet, voice.log_file, voice.planned = quiet, None if job.rank else log_file, None
        console.quiet = quiet
        try:
            with _noted(voice.log_file):
                command(**asked)
        finally:
            console.quiet, voice.quiet, voice.log_file, voice.planned = False, False, None, None

    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def _noted(path: Path | None) -> Iterator[None]:
    """Note in a file what was run, and how it ended."""
    if path is None:
        yield
        return

    def note(text: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            print(stamped(text), file=file)

    path.parent.mkdir(parents=True, exist_ok=True)
    note(f"moesparse {__version__}: moesparse {shlex.join(sys.argv[1:])}")
    try:
        yield
    except (typer.Exit, SystemExit) as stop:
        note(f"ended with exit code {stop.code if isinstance(stop, SystemExit) else stop.exit_code}")
        raise
    except BaseException as error:
        note(f"ended by {type(error).__name__}: {error}")
        raise
    note("done")
