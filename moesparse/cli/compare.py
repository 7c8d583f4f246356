"""`moesparse compare DENSE PRUNED`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesparse.cli import options
from moesparse.cli.console import console, print_json, quiet_libraries, with_schema
from moesparse.cli.job import refuse_several, saying_what_is_left
from moesparse.cli.options import RESULT, RUN, SCORED, check_output_file, option, resolve_device
from moesparse.cli.show_comparison import show_comparison
from moesparse.cli.text import EMBEDDED_LENGTH, held_out_texts, tell_embedded, tell_read
from moesparse.cli.voice import shown_progress
from moesparse.errors import UsageError
from moesparse.system.sizes import format_bytes

if TYPE_CHECKING:
    from moesparse.evaluate.continuations import Prompts
    from moesparse.models.on_disk import LayersOnDisk
    from moesparse.text import TextSource

_WRITE = "Continuations"
_PROMPTS, _PROMPT_TOKENS = 24, 32


def compare(
    dense: Annotated[str, typer.Argument(help="The model before pruning: a local folder, a hub id, or 'demo'.")],
    pruned: Annotated[list[str], typer.Argument(metavar="PRUNED...", help="Pruned models of it, one or several.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE.txt, .jsonl or .parquet (field 'text'), in gzip too, or a datasets name. FILE=DOMAIN names its "
            "domain. Repeat."
        ),
    ] = None,
    chat: options.ScoredChat = False,
    length: options.ScoredLength = None,
    languages: Annotated[
        bool,
        option(
            SCORED,
            "Also compare on the beginning of the Universal Declaration of Human Rights in twenty languages, which are "
            "reported by themselves (the default).",
            "--languages/--no-languages",
        ),
    ] = True,
    generate: Annotated[
        int | None,
        option(
            _WRITE,
            f"Prompts of the text that all models continue, greedily and drawn; {_PROMPTS} if left out and every model "
            "fits in memory, which takes one whole. 0 for none.",
            min=0,
            metavar="N",
        ),
    ] = None,
    new_tokens: Annotated[
        int, option(_WRITE, "Tokens written after a prompt at most; bounded by the context.", min=64)
    ] = 256,
    temperature: Annotated[float, option(_WRITE, "Of the drawn continuations.")] = 0.7,
    batch_size: Annotated[int, option(RUN, "Windows, or prompts, in one forward.", min=1)] = 8,
    device: options.Device = "auto",
    max_memory: options.MaxMemory = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Also write the result as JSON here; until then FILE.unfinished keeps what is done."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run that was left beside --output.")
    ] = False,
    as_json: Annotated[bool, option(RESULT, "Print the result as one JSON object.", "--json")] = False,
) -> None:
    """Say what pruning lost: how far the pruned model's next-token distributions lie from the dense model's.

    KL divergence, agreement and perplexity by domain and position, agreement of the routers by layer, the tokens that
    changed most, and loops in what both write. Both models are read layer by layer and need not fit in memory, but for
    the continuations; the dense one is read once for several PRUNED. What a reader should not miss is said at the end.

    Examples:

      moesparse compare demo out/small

      moesparse compare olmoe/ out/reap-25 out/reap-50 --text code.jsonl=code --text zh.jsonl=chinese -o lost.json
    """
    refuse_several("moesparse compare")
    if output is not None:
        check_output_file("--output", output)
    if resume and output is None:
        raise UsageError("--resume must come with --output, beside which the unfinished run lies, got none")
    writing = {"count": generate, "new_tokens": new_tokens, "temperature": temperature, "batch_size": batch_size}
    reading = {"length": length, "chat": chat}
    run: dict[str, Any] = {"batch_size": batch_size, "device": resolve_device(device), "resume": resume}
    run["max_memory"] = options.parse_limit(max_memory)
    results = _measure([dense, *pruned], text, reading, writing, languages, output, run)
    kind = "compare" if len(results) == 1 else "compare.several"
    values = results[0] if len(results) == 1 else {"dense": dense, "models": results}
    # shown first: a file that cannot be written after all does not lose what was measured
    if as_json:
        print_json(kind, values)
    else:
        for each in results:
            show_comparison(each)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(with_schema(kind, values), indent=2) + "\n")


def _measure(
    names: Sequence[str],
    text: list[str] | None,
    reading: dict[str, Any],
    writing: dict[str, Any],
    languages: bool,
    output: Path | None,
    run: dict[str, Any],
) -> list[dict[str, Any]]:
    """What each pruned model has lost.

    Args:
        names: of the dense model and the pruned ones.
        text, reading: options of the text.
        writing: options of the continuations.
        languages: compare on texts of twenty languages too.
        output: beside which the run keeps what is done, or None.
        run: further arguments of `moesparse.evaluate.compare`.
    """
    from moesparse.calibration.checkpoint import unfinished_folder
    from moesparse.evaluate.comparison import compare as compare_models
    from moesparse.system.unfinished import what_is_kept

    source = options.model_source(names[0])
    sources = held_out_texts(text, source)
    if not text:
        tell_embedded("--text", source)
        reading = reading | {"length": reading["length"] or EMBEDDED_LENGTH}
    work = None if output is None else unfinished_folder(output)
    with (
        quiet_libraries(),
        saying_what_is_left(lambda: "" if work is None else what_is_kept(work)),
        shown_progress() as progress,
    ):
        models = [_opened(name) for name in names]
        cut = _read(models[0], sources, **reading)
        prompts = _prompts(cut, models, run["max_memory"], **writing)
        windows, domains, named = cut.with_languages() if languages else (cut.windows, cut.domains, ())
        more: dict[str, Any] = {"tokenizer": cut.tokenizer, "prompts": prompts, "load": _load, "work": work}
        more["languages"] = named
        found = compare_models(models[0], models[1:], windows, domains, progress=progress, **more, **run)
    return [each.as_dict() | {"dense": names[0], "pruned": name} for each, name in zip(found, names[1:], strict=True)]


class _Cut:
    """Text as windows, with the tokenizer that cut them."""

    def __init__(self, tokenizer: Any, windows: Any, domains: list[str], context: int) -> None:
        self.tokenizer, self.windows, self.domains, self.context = tokenizer, windows, domains, context

    def with_languages(self) -> tuple[Any, list[str], list[str]]:
        """Windows and mask with those of twenty languages behind them, the domain of each, and which are languages.

        Raises:
            UsageError: a domain has the name of a language.
        """
        import torch

        from moesparse.evaluate.languages import language_windows

        ids, mask, names = language_windows(self.tokenizer, self.windows.shape[1])
        if both := sorted(set(names) & set(self.domains)):
            raise UsageError(f"--no-languages must be given with a domain called {both[0]}, or it another name")
        real = torch.ones_like(self.windows, dtype=torch.bool)
        return (torch.cat((self.windows, ids)), torch.cat((real, mask))), [*self.domains, *names], names


def _opened(name: str) -> LayersOnDisk:
    from moesparse.checkpoints.hub import local_folder
    from moesparse.models.on_disk import LayersOnDisk

    return LayersOnDisk(local_folder(options.model_source(name)))


def _load(folder: Path) -> Any:
    from moesparse.checkpoints.pretrained import load_model

    return load_model(folder)


def _read(dense: LayersOnDisk, sources: Sequence[TextSource], length: int | None, *, chat: bool) -> _Cut:
    """The windows of all texts and the domain of each."""
    import torch

    from moesparse.evaluate.on_text import read_files
    from moesparse.models.meta import context_length
    from moesparse.models.tokenizer import load_tokenizer
    from moesparse.text import DEFAULT_LENGTH

    tokenizer = load_tokenizer(dense.folder)
    context = min(context_length(dense.model), tokenizer.model_max_length)
    length = min(length or DEFAULT_LENGTH, context)
    cut, found = read_files([one.path for one in sources], tokenizer, length, length, chat=chat)
    if chat:
        tell_read(found)
    windows = [cut[os.fspath(one.path)][0] for one in sources]
    domains = [one.domain for one, rows in zip(sources, windows, strict=True) for _ in rows]
    return _Cut(tokenizer, torch.cat(windows), domains, context)


def _prompts(
    cut: _Cut, models: Sequence[LayersOnDisk], limit: int | None, *, count: int | None, **how: Any
) -> Prompts | None:
    """What all models continue; None for nothing, which is said where nobody asked for that."""
    from moesparse.evaluate.continuations import LOOP_TOKENS, make_prompts

    if count == 0:
        return None
    if count is None:
        why = _too_large(models, limit)
        if cut.context - min(_PROMPT_TOKENS, cut.windows.shape[1] // 2) < LOOP_TOKENS:
            why = f"a context of {cut.context} tokens leaves no room for a loop of {LOOP_TOKENS}"
        if why:
            console.print(f"[yellow]no continuations, and no loops counted:[/] {why}", highlight=False, soft_wrap=True)
            return None
    wanted = {"count": count or _PROMPTS, "length": _PROMPT_TOKENS, "context": cut.context}
    return make_prompts(cut.windows, cut.domains, **wanted, **how)


def _too_large(models: Sequence[LayersOnDisk], limit: int | None) -> str:
    """Why the largest model is not loaded whole unless that is asked for; "" where it fits."""
    from moesparse.system.memory import available_memory

    room = limit or available_memory()
    size, folder = max(
        (sum(tensor.nbytes for tensor in each.model.state_dict().values()), each.folder) for each in models
    )
    if room is None or size < room:
        return ""
    return (
        f"they take a whole model in memory, {folder} needs {format_bytes(size)} and {format_bytes(room)} are free; "
        "--generate N makes them all the same"
    )
