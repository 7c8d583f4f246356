"""Prune a checkpoint that need not fit in memory: folder in, folder out, one decoder layer at a time, resumable.

A layer is read, calibrated, pruned, run again for the next one, written and dropped; the hidden states of the
calibration set wait in between. Where a recipe looks at weights alone, nothing is run. The result has the bits that
`prune` and `save_pretrained` give for the model as a whole. A run that is stopped, by whatever, goes on at the layer it
had not finished: the finished ones are read back and only run.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesparse._version import __version__
from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.windows import Windows, check_windows, ordered_hash
from moesparse.checkpoints.pretrained import note_recipe, write_companions
from moesparse.errors import UsageError
from moesparse.models.look import Inspection, blocks_of
from moesparse.models.on_disk import StreamedModel
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.pruning.block import prune_block, prune_layerwise
from moesparse.pruning.plan import Plan, plan_pruning
from moesparse.pruning.recipe import Recipe, check_needs_no_data
from moesparse.pruning.report import BlockReport, Report, TensorReport, describe_calibration, expert_sizes
from moesparse.system.memory import available_memory
from moesparse.system.processes import Processes, default_device
from moesparse.system.run_folder import RunFolder
from moesparse.system.shards import MAX_SHARD_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["prune_checkpoint"]


def prune_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Windows | ModelStatistics | Mapping[str, ModelStatistics] | None,
    recipe: Recipe | None = None,
    *,
    domains: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: Callable[[Report], str] | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    resume: bool = False,
    allow_pruned: bool = False,
    max_memory: int | None = None,
    progress: Progress = silent,
    complete: Callable[[Report], Report] = lambda report: report,
) -> Report:
    """Prune the experts of a checkpoint into a new checkpoint, dense with zeros.

    Holds what lies outside of the decoder layers, one layer with its sums (see `moesparse.prune`) and the hidden
    states of the calibration set; nothing that grows with the number of layers. Reads the source twice.

    Where torch.distributed's default group is there, its processes share the work: all must call with the same
    arguments, and see `source` and `out`. Each runs its own batches and prunes its own experts; the first one writes.
    A process that ends is a ProcessError in the others.

    Args:
        source: a folder with safetensors under the names that transformers saves.
        out: a new or empty folder, or with `resume` one that holds an unfinished run.
        calibration: (n, t) int64 windows, or (windows, attention mask), or None where the recipe looks at weights alone
            (magnitude, no update). To remove experts without a refit also saved statistics, see
            `moesparse.pruning.streamed_experts`.
        recipe: what to do: weights of one pattern, the removal of experts, or both.
        domains: of each window, for the choice of experts; None is one domain.
        tokenizer: saved beside the weights.
        card: gives the text of README.md.
        batch_size: windows in one forward.
        device: where the layer at work goes; None takes the GPU when there is one.
        resume: go on with the run in `out`; its source, windows, recipe and batch size must be the same.
        allow_pruned: accept a model that already carries pruned experts.
        max_memory: bytes of RAM to stay within; None is what is available now. The hidden states go to a file in `out`
            when they would not fit beside the rest.
        progress: called with every step.
        complete: what the report is to be, given what this run alone would report.

    Returns:
        The report; the seconds are those of this run, peak memory and seconds of a block those of the run that did it.

    Raises:
        UsageError: a recipe that needs the whole model, a pattern that does not divide a matrix, or a `max_memory`
            below what the run needs, which is named.
        CheckpointError: the source cannot be read, `out` cannot be written, is in use, or holds another run.
        UnsupportedModelError: the model cannot be handled layer by layer; named.
        CalibrationError: the windows do not fit the model, or it was pruned before.
    """
    recipe = recipe or Recipe()
    if calibration is None:
        check_needs_no_data(recipe)
    elif recipe.removes_experts:
        from moesparse.pruning.streamed_experts import remove_experts_of_checkpoint

        return remove_experts_of_checkpoint(
            source,
            out,
            calibration,
            recipe,
            domains=domains,
            tokenizer=tokenizer,
            card=card,
            batch_size=batch_size,
            device=device,
            resume=resume,
            allow_pruned=allow_pruned,
            max_memory=max_memory,
            progress=progress,
        )
    if recipe.weights is None or isinstance(calibration, ModelStatistics | Mapping):
        raise UsageError(
            "recipe must remove experts, or have one pattern for all weights and windows to calibrate on, to run layer "
            f"by layer, got {recipe.to_dict()} and {type(calibration).__name__}"
        )
    started = time.perf_counter()
    processes = Processes.current()
    streamed = StreamedModel(source)
    model, blocks = streamed.model, streamed.blocks
    for block in blocks:
        for matrix in block.matrices:
            recipe.pattern.check_matrix(f"{block.name}.{matrix.name}", matrix.weight.shape[-1])
    ids = mask = None
    if calibration is not None:
        embedding: Any = model.get_input_embeddings()
        ids, mask = check_windows(calibration, embedding.weight.shape[0])
    windows, length = (0, 1) if ids is None else ids.shape
    home = torch.device(device) if device is not None else default_device()
    plan = plan_pruning(
        model,
        blocks,
        recipe,
        windows=windows,
        length=length,
        batch_size=batch_size,
        processes=processes.count,
    )
    spill = spills(plan, max_memory, processes, on_gpu=home is not None and home.type != "cpu")
    inputs = {
        "source": streamed.signature(),
        "windows": None if ids is None else ordered_hash(ids, mask),
        "recipe": recipe.to_dict(),
        "batch size": batch_size,
        "release": __version__,
    }
    with RunFolder.open(out, inputs, resume=resume, processes=processes) as run:
        if run.redone:
            progress(ProgressEvent(f"redo {run.redone[0]} and what follows: it was damaged", 0, 1, "layer"))
        inspection = Inspection(streamed, allow_pruned or ids is None, progress)
        stream = None
        if ids is None:
            inspection.look_at_all()
        else:
            spill_to = run.path if spill else None
            stream = streamed.stream(
                ids, mask, batch_size, home, inspect=inspection, spill=spill_to, processes=processes
            )
        before = expert_sizes(model, blocks)

        def finish(position: int, reports: list[BlockReport]) -> None:
            write_layer(run, streamed, position, [dataclasses.asdict(report) for report in reports])

        done = len(run.parts)
        last = max(streamed.position(block.layer) for block in blocks)
        if stream is not None and done <= last:
            for position, part in enumerate(run.parts):
                # what the interrupted run went on with: the pruned layer, or the dense one
                progress(ProgressEvent("run finished layers", position, done, "layer"))
                with streamed.hold(position, home, run.read(part) if recipe.propagate else None):
                    for _ in stream.run(position, keep=True):
                        pass
            prune_layerwise(stream, model, blocks, recipe, progress, start=done, finish=finish)
            done = last + 1
        for position in range(done, len(streamed.layers)):
            with streamed.hold(position):
                here = blocks_of(streamed, position)
                for block in here:
                    progress(ProgressEvent(f"prune {block.name}", position, len(streamed.layers), "layer"))
                finish(position, [prune_block(block, None, recipe, "none", processes=processes) for block in here])
        if len(run.parts) == len(streamed.layers):
            write_outside(run, streamed)
        report = complete(
            Report(
                recipe=recipe.to_dict(),
                version=__version__,
                blocks=[_block_report(entry) for part in run.parts for entry in part.note],
                calibration=describe_calibration(ids),
                seconds=time.perf_counter() - started,
                fingerprint=inspection.fingerprint,
                sizes={"before": before, "after": expert_sizes(model, blocks, recipe)},
            )
        )
        text = None if card is None else card(report)
        assemble_checkpoint(run, streamed, report.recipe, tokenizer=tokenizer, card=text, report=report.to_dict())
    return report


def spills(plan: Plan, max_memory: int | None, processes: Processes, *, on_gpu: bool) -> bool:
    """Whether the hidden states go to a file.

    Args:
        plan: of one process.
        max_memory: bytes of RAM for one process; None is its part of what this machine has free.
        processes: that share the work.
        on_gpu: the layer at work lies on a GPU.

    Raises:
        UsageError: what cannot go there takes more than `max_memory`.
    """
    free = available_memory()
    room = max_memory if max_memory is not None or free is None else free // processes.here
    # on a GPU the layer at work, its sums and its factors lie there; it is written from RAM
    needed = plan.outside + plan.layer if on_gpu else plan.peak
    if max_memory is not None and needed > max_memory:
        raise UsageError(
            f"max_memory must be at least {needed:,} bytes for this run ({plan.outside:,} outside of the layers, "
            f"{plan.layer:,} for a layer, {plan.moments:,} for second moments, {plan.workspace:,} to prune a matrix or "
            f"refit a block), got {max_memory:,}. A saliency and update without second moments, or a smaller "
            "batch_size, needs less"
        )
    return room is not None and needed + plan.hidden_states > room


def write_layer(run: RunFolder, streamed: StreamedModel, position: int, note: Any) -> None:
    """Finish the part of one layer, which is held, with a note for the run."""
    run.write(f"layer-{position:05d}", streamed.checkpoint_tensors(position), note, max_shard_bytes=MAX_SHARD_BYTES)


def write_outside(run: RunFolder, streamed: StreamedModel) -> None:
    """Finish the part of what lies outside of the layers, the last one."""
    run.write("outside", streamed.checkpoint_tensors(None), [], max_shard_bytes=MAX_SHARD_BYTES)


def assemble_checkpoint(
    run: RunFolder,
    streamed: StreamedModel,
    recipe: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    card: str | None,
    report: dict[str, Any] | None,
) -> None:
    """Make a run with all its parts a checkpoint of the streamed model.

    Args:
        run: the folder.
        streamed: its folder's other small files are copied.
        recipe: noted in config.json.
        tokenizer: saved beside the weights.
        card: text of README.md.
        report: written as moesparse_report.json.
    """

    def write_others(folder: Path) -> None:
        note_recipe(streamed.model, recipe)
        # config and generation config as transformers writes them; the weights are there already
        streamed.model.save_pretrained(folder, state_dict={})
        for file in folder.glob("*.safetensors"):
            file.unlink()
        write_companions(folder, tokenizer=tokenizer, source=streamed.folder, card=card, report=report)

    run.assemble(write_others)


def _block_report(entry: dict[str, Any]) -> BlockReport:
    """A block's report as a part's note holds it."""
    tensors = [TensorReport(**{**each, "shape": tuple(each["shape"])}) for each in entry["tensors"]]
    return BlockReport(**{**entry, "tensors": tensors})
