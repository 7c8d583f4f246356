"""What the commands share: where words and results go, progress bars, calibration text."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from moesparse.cli.processes import job
from moesparse.errors import CalibrationError, ProcessError, UsageError
from moesparse.progress import Progress, ProgressEvent, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

console = Console(stderr=True)
"""Words for a person: progress, tables of a run, errors."""

EMBEDDED = "demo"
"""MODEL by this name is the small model inside the package."""


def print_json(value: Any) -> None:
    """The one result of a --json run, alone on standard output."""
    print(json.dumps(value, indent=2))


def model_source(name: str) -> str:
    """Folder or hub id of MODEL."""
    from moesparse import demo

    return str(demo.model_path()) if name == EMBEDDED and not Path(name).exists() else name


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """A progress bar with the step's name, tokens/s and time left, on standard error."""
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None, speed="")
        started = time.perf_counter()
        told = False

        def show(event: ProgressEvent) -> None:
            nonlocal told
            if event.memory and not told:
                bars.console.print(f"second moments of the experts take {format_bytes(event.memory)} at a time")
                told = True
            rate = event.tokens / max(time.perf_counter() - started, 1e-9)
            bars.update(
                task,
                description=event.stage,
                completed=event.done,
                total=event.total,
                speed=f"{rate:,.0f} tokens/s" if event.tokens else "",
            )

        yield show


@contextlib.contextmanager
def saying_what_is_left(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run with exit code 1 and one line, and so does the end of a process that shares it.

    Args:
        kept: says what is finished and where; "" when nothing is.
    """

    def stop(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, ProcessError) as error:
        # torchrun stops all processes when one has ended, and that may come while it is being told
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if job.claim():
            found = kept()
            console.print(
                f"[bold red]stopped:[/] {_why(error)}"
                + (f"{found}; the same command with --resume goes on" if found else "nothing was finished or written"),
                highlight=False,
                soft_wrap=True,
            )
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _why(error: BaseException) -> str:
    """Which process has ended, where one has: the beginning of a sentence."""
    unreached = isinstance(error, ProcessError)
    gone = job.lost(seconds=2.0 if unreached else 0.0)
    if gone:
        return f"the process of rank {', '.join(map(str, gone))} of {len(job.peers)} has ended; "
    return "another process has ended or cannot be reached; " if unreached else ""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' own bars and warnings out of our output."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


CALIBRATION_HELP = (
    "Text: FILE.txt, .jsonl or .parquet (field 'text'), or a datasets name. FILE=DOMAIN names its domain. Repeat."
)
FROM_MODEL_HELP = (
    "Give the last N tokens of each window to the model: it continues the text before them itself, and is calibrated "
    "on both (EASY-EP)."
)
TEMPERATURE_HELP = "Of what the model writes: 0 takes the likeliest token, above 0 tokens are drawn by --seed."
MIX_HELP = (
    "Several domains become one choice of experts by the sums of all text (pooled), or by the mean of their scores, "
    "each normalised to sum 1 in every block (equal)."
)
WHOLE_HELP = (
    "Load the whole model at once instead of layer by layer: for a checkpoint whose tensors transformers renames when "
    "it loads them. Not with --resume, --dry-run and --max-memory."
)
RESUME_HELP = "Go on with the unfinished run that was left there."
DRY_RUN_HELP = "Only print the plan: memory, bytes, time. config.json is enough."
MAX_MEMORY_HELP = (
    "RAM to stay within, such as 24GiB, beside what Python and torch take; refused when it cannot be. Under torchrun "
    "of each process."
)
PROTECT_HELP = "Keep super-experts, those with extreme outputs (arXiv 2507.23279), whatever their score."


@dataclass(frozen=True)
class CalibrationText:
    """Windows to calibrate on, [n, t] ids and a mask or None, and the domain of each."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    domains: list[str]

    @property
    def windows(self) -> Any:
        """What everything that takes windows takes."""
        return self.ids if self.mask is None else (self.ids, self.mask)


@dataclass(frozen=True)
class TextOptions:
    """What the options of a command say of its calibration text."""

    sources: Sequence[str]
    samples: int
    length: int
    seed: int
    from_model: int | None = None
    temperature: float = 0.0
    batch_size: int = 8
    device: Any = None

    def __post_init__(self) -> None:
        if self.temperature and self.from_model is None:
            raise UsageError(
                f"--temperature must come with --demonstrations-from-model, got {self.temperature} without it"
            )

    def read(
        self, tokenizer: PreTrainedTokenizerBase | None, source: str, network: Any, progress: Progress = silent
    ) -> CalibrationText:
        """The windows of a run; with `from_model` the model writes that many tokens of each itself."""
        from moesparse.calibration.demonstrations import check_new_tokens, continue_prompts
        from moesparse.models.meta import context_length

        context = context_length(network)
        wanted: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "context": context}
        if self.from_model is None:
            ids, domains = calibration_windows(self.sources, tokenizer, source, length=self.length, **wanted)
            return CalibrationText(ids, None, domains)
        length = min(self.length, context or self.length)
        check_new_tokens(self.from_model, length, self.temperature)
        prompts, domains = calibration_windows(
            self.sources, tokenizer, source, length=length - self.from_model, **wanted
        )
        ids, mask = continue_prompts(
            network,
            prompts,
            self.from_model,
            temperature=self.temperature,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
            progress=progress,
        )
        return CalibrationText(ids, mask, domains)


def show_domains(found: Mapping[str, Any], criterion: Any) -> None:
    """What each domain would keep, how far they agree, and how firm the choice is."""
    names = list(found["kept"])
    table = Table(title=f"domains by {criterion}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("domain", no_wrap=True)
    table.add_column("windows", justify="right", no_wrap=True)
    if len(names) > 1:
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        pairs = {frozenset(each["domains"]): each["blocks"] for each in found["overlap"]}
        for name in names:
            cells = ["" if name == other else _span(pairs[frozenset((name, other))]) for other in names]
            windows = found["windows"][name]
            table.add_row(name, "" if windows is None else str(windows), *cells)
        console.print(table)
        console.print(
            "between domains: Jaccard overlap of the kept experts, mean over blocks (lowest)", highlight=False
        )
    if found["stability"] is not None:
        colour = "green" if found["stability"]["stable"] else "yellow"
        console.print(f"[{colour}]{found['stability']['summary']}[/]", highlight=False, soft_wrap=True)


def _span(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}\n({min(values):.2f})"


def calibration_windows(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    context: int | None,
) -> tuple[torch.Tensor, list[str]]:
    """Calibration windows and their domains: the given texts, or the embedded text for the embedded model."""
    from moesparse import text

    if tokenizer is None:
        raise CalibrationError(
            f"MODEL must hold a tokenizer that transformers can load, to read text, got {source} without one"
        )
    if not sources:
        sources = embedded_texts("calibration", source)
        if not sources:
            raise CalibrationError(
                "--calibration must name text for this model (.txt, .jsonl, .parquet or a datasets name), got none; "
                "only the embedded model brings its own. Example: --calibration c4.jsonl --samples 128 --length 2048"
            )
    named = [text.parse_source(argument) for argument in sources]
    return text.domain_windows(named, tokenizer, samples=samples, length=length, seed=seed, max_length=context)


def check_output_file(option: str, path: Path) -> None:
    """Refuse a place that no file can be written to, before the work whose result goes there.

    Raises:
        UsageError: it is a folder. CheckpointError: it lies in none that can be written.
    """
    from moesparse.system.folders import check_writable

    if path.is_dir():
        raise UsageError(f"{option} must be a file to write, got the folder {path}")
    check_writable(option, path)


def format_bytes(count: int) -> str:
    """12.3 GiB, 4.0 MiB: three digits and a binary unit."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def embedded_texts(split: str, source: str) -> list[str]:
    """Paths of the text that ships with the package, when `source` is the embedded model or made from it."""
    from moesparse import demo

    tokenizer = Path(source) / "tokenizer.json"
    own = demo.model_path() / "tokenizer.json"
    if not tokenizer.is_file() or tokenizer.read_bytes() != own.read_bytes():
        return []
    return [f"{demo.text_path(split, domain)}={domain}" for domain in demo.DOMAINS]


def resolve_device(name: str) -> Any:
    """torch device of --device; None for auto: the GPU when there is one."""
    import torch

    if name == "auto":
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise UsageError(f"--device must be one this machine has, got {name!r} and torch sees {found}")
    return device
