"""What pruning has lost: a dense model and pruned ones, folder to folder, on the same text.

Both go over the text layer by layer, so that neither need fit in memory: moesparse.evaluate.final_states. Norm and head
then make the logits of a slice of tokens of both at a time (divergence), and the choices of the routers are compared
layer by layer (routing). What both write after the same prompts takes a model in memory, one after the other
(continuations).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesparse._version import __version__
from moesparse.calibration.windows import Windows, ordered_hash
from moesparse.errors import UsageError
from moesparse.evaluate.compare_job import ComparedText, Job
from moesparse.evaluate.compared import Comparison
from moesparse.evaluate.continuations import Prompts
from moesparse.evaluate.warning_signs import warning_signs
from moesparse.models.layers import RunOptions
from moesparse.models.meta import vocabulary_size
from moesparse.models.on_disk import LayersOnDisk
from moesparse.models.tokenizer import find_tokenizer
from moesparse.progress import ProgressLike, reporting
from moesparse.system.processes import device_at_work
from moesparse.system.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["compare"]

Source = str | os.PathLike[str] | LayersOnDisk
"""A folder, or what was made of one."""


def compare(
    dense: Source,
    pruned: Source | Sequence[Source],
    windows: Windows,
    domains: Sequence[str] | None = None,
    *,
    languages: Collection[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Prompts | None = None,
    load: Callable[[Path], Any] | None = None,
    work: str | os.PathLike[str] | None = None,
    resume: bool = False,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    max_memory: int | None = None,
    progress: ProgressLike = "auto",
) -> list[Comparison]:
    """Say what pruned models have lost beside the dense one, on the same windows.

    Folder to folder: each model is read layer by layer, the dense one once for all. Holds what lies outside of the
    layers of two models, one layer, the hidden states of the windows as far as memory allows, and logits of a slice of
    tokens; on the disk the final hidden states of two models, and the experts that the dense one chose. Continuations
    of `prompts` take one whole model in memory at a time.

    Args:
        dense, pruned: folders with safetensors under the names that transformers saves, quantised and packed ones too,
            or "demo"; of one tokenizer.
        windows: [n, t] int64, or (windows, attention mask); padding is neither scored nor a context.
        domains: of each window; None is one domain, "all".
        languages: those of `domains` that are reported by themselves and have no part in the overall figures.
        tokenizer: to show text and to tell scripts; None takes that of the dense folder, where it has one.
        prompts: to be continued by all models; None leaves generation out.
        load: how a folder becomes a model in memory, for `prompts`; the model of `moesparse.load_pretrained`.
        work: a folder, new or of an unfinished run, that keeps what is done until all is; None is a temporary one.
        resume: go on with the unfinished run that is there; all arguments above must be the same.
        batch_size: windows in one forward.
        device: where the layer at work goes; None takes the GPU when there is one.
        max_memory: bytes of RAM to stay within, as in `moesparse.prune_checkpoint`.
        progress: as in `moesparse.prune`.

    Returns:
        One for each pruned model, in their order.

    Raises:
        UsageError: windows of another form, domains of another count, no token to score, vocabularies that differ,
            `prompts` without `load`, `max_memory` below what the run needs, or several processes.
        CheckpointError: a folder cannot be read, nothing can be written, or `work` holds another run.
        UnsupportedModelError: a model cannot be run layer by layer; named.
        MoESparseError: logits that are not finite.
    """
    folders = [pruned] if isinstance(pruned, str | os.PathLike | LayersOnDisk) else list(pruned)
    if not folders:
        raise UsageError("pruned must name at least one folder, got none")
    if prompts is not None and load is None:
        raise UsageError("load must say how a folder becomes a model to continue prompts with, got None")
    first = LayersOnDisk.of(dense)
    if first.processes.count > 1:
        raise UsageError(f"compare must run in one process, got {first.processes.count}")
    text = ComparedText.of(windows, domains, languages, vocabulary_size(first.model))
    options = RunOptions(batch_size, device_at_work(device), resume=resume, max_memory=max_memory)
    others = [LayersOnDisk.of(folder) for folder in folders]
    inputs = {
        "work": "compare",
        "dense": first.signature(),
        "pruned": [each.signature() for each in others],
        "windows": ordered_hash(text.ids, text.mask),
        "domains": text.domains,
        "languages": sorted(languages),
        "prompts": None if prompts is None else prompts.describe() | {"ids": ordered_hash(prompts.ids)},
        "batch size": batch_size,
        "release": __version__,
    }
    tokenizer = tokenizer or find_tokenizer(first.folder)
    for each in others:
        _check_tokenizer(tokenizer, each.folder)
    with reporting(progress) as told, _work_folder(work, inputs, resume) as run:
        job = Job(run, text, replace(options, progress=told), tokenizer, keeps_layers=work is not None)
        found = job.run(first, others)
        if prompts is not None:
            assert load is not None
            written = [job.written(name, each, prompts, load) for name, each in job.named(first, others)]
            ends = _end_tokens(first.model)
            found = [
                replace(each, generation=job.generation(prompts, written[0], theirs, ends))
                for each, theirs in zip(found, written[1:], strict=True)
            ]
        run.clear()
    return [replace(each, warnings=warning_signs(each)) for each in found]


@contextmanager
def _work_folder(work: str | os.PathLike[str] | None, inputs: dict[str, Any], resume: bool) -> Iterator[RunFolder]:
    """The folder of the run; gone once all is done."""
    if work is None:
        with (
            tempfile.TemporaryDirectory(prefix="moesparse-compare-") as folder,
            RunFolder.open(Path(folder) / "run", inputs, resume=False) as run,
        ):
            yield run
        return
    with RunFolder.open(work, inputs, resume=resume) as run:
        yield run
    with suppress(OSError):
        Path(work).rmdir()


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Refuse a model whose own tokenizer means other text by the ids."""
    theirs = None if tokenizer is None else find_tokenizer(folder)
    if tokenizer is not None and theirs is not None and theirs.get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"pruned must have the tokenizer of dense, got another vocabulary in {folder}")


def _end_tokens(model: Any) -> list[int]:
    """Ids at which `generate` stops."""
    found = getattr(model.generation_config, "eos_token_id", None) if model.can_generate() else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)
