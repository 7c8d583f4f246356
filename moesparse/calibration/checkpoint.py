"""Statistics of a checkpoint that need not fit in memory: one decoder layer at a time, resumable.

Every layer's statistics are a part of the run (moesparse.system.run_folder) once the calibration set has gone through
it. A run that was stopped sends the windows through the finished layers again, for what they feed the next one, and
records from there on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesparse._version import __version__
from moesparse.calibration.data import text_of
from moesparse.calibration.given_text import Text, tokenised
from moesparse.calibration.layers import BY_WINDOW, from_shards, named_sums, read_sums, record_layers
from moesparse.calibration.plan import plan_pass, spills
from moesparse.calibration.statistics import ModelStatistics, check_moments
from moesparse.calibration.windows import Windows
from moesparse.errors import CheckpointError, UsageError
from moesparse.models.layers import RunOptions
from moesparse.models.look import Look
from moesparse.models.on_disk import LayersOnDisk
from moesparse.progress import ProgressLike, reporting
from moesparse.system.folders import check_writable
from moesparse.system.processes import device_at_work
from moesparse.system.run_folder import RunFolder
from moesparse.system.shard_writer import MAX_SHARD_BYTES, ShardWriter
from moesparse.system.shards import SINGLE_FILE, Shards, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["calibrate_checkpoint", "check_statistics_file", "unfinished_folder"]


def calibrate_checkpoint(
    source: str | os.PathLike[str] | LayersOnDisk,
    path: str | os.PathLike[str],
    windows: Windows | Text,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    moments: str = "none",
    batch_size: int = 8,
    device: torch.device | str | None = None,
    seed: int = 0,
    by_window: dict[str, Tensor] | None = None,
    routers: dict[str, Tensor] | None = None,
    resume: bool = False,
    allow_pruned: bool = False,
    max_memory: int | None = None,
    progress: ProgressLike = "auto",
) -> ModelStatistics:
    """Statistics of a checkpoint, layer by layer, into a file: the one that `calibrate` and `save` give.

    Holds what lies outside of the decoder layers, one layer with its sums and the hidden states of the calibration set;
    of the other layers a few numbers per expert and window. Reads the source twice. Processes of torch.distributed's
    default group share the work, as in `prune_checkpoint`.

    Args:
        source: a folder with safetensors under the names that transformers saves, or what was made of one.
        path: the new file. Until it is there, a folder of this name with ".unfinished" behind it holds what is done.
        windows: (n, t) int64 windows, (windows, attention mask), or `ImageWindows`; or text, see `calibrate`.
        tokenizer: for text; None takes that of the source.
        moments: second moments to collect as well: "none", "plain", "gated" or "both".
        batch_size: windows in one forward.
        device: where the layer at work goes; None takes the GPU when there is one.
        seed: the seed the windows were drawn with, kept in the file.
        by_window, routers: dicts to fill with `window_sums`, and with the `router_sketch` of every block.
        resume: go on with an unfinished run for this file; all arguments above must be the same.
        allow_pruned: accept a model that carries pruned experts.
        max_memory: bytes of RAM to stay within, as in `prune_checkpoint`.
        progress: as in `moesparse.prune`.

    Returns:
        The statistics without what they hold of every column (energies and moments): that is in the file.

    Raises:
        UsageError: a `max_memory` below what the run needs.
        CheckpointError: `path` is there already; the source cannot be read; nothing can be written; or there is another
            run for this file, finished in part or at work.
        UnsupportedModelError: the model cannot be handled layer by layer; named.
        CalibrationError: the windows do not fit the model, it was pruned before, or an activation is not finite.
    """
    path = Path(path)
    check_moments(moments)
    check_statistics_file(path)
    layers = LayersOnDisk.of(source)
    text = text_of(tokenised(windows, layers.model, tokenizer, "windows", layers.folder), layers.model)
    processes = layers.processes
    options = RunOptions(batch_size, device_at_work(device), allow_pruned, resume, max_memory)
    n, length = text.size
    sizes = {"windows": n, "length": length, "batch_size": batch_size, "processes": processes.count}
    spill = spills(plan_pass(layers.model, layers.blocks, moments, **sizes), options, processes)
    inputs = {
        "work": "calibrate",
        "source": layers.signature(),
        "windows": text.identity,
        "seed": seed,
        "moments": moments,
        "batch size": batch_size,
        "release": __version__,
    }
    folder = unfinished_folder(path)
    run_folder = RunFolder.open(folder, inputs, resume=resume, layers=len(layers), processes=processes)
    with reporting(progress) as told, run_folder as run:
        options = replace(options, progress=told)
        look = Look(layers, options)
        stream = text.stream(layers, options, look, run.path if spill else None)
        for position, recorders in record_layers(layers, stream, told, start=len(run.aside), moments=moments):
            sums = named_sums(recorders, by_column=True)
            run.write(f"statistics-{position:05d}", sums, None, max_shard_bytes=MAX_SHARD_BYTES, aside=True)
        blocks, of_windows = read_sums((from_shards(run.read(part)) for part in run.aside), n)
        if by_window is not None:
            by_window |= of_windows
        if routers is not None:
            routers |= look.routers
        tokens = text.ids.numel() if text.mask is None else int(text.mask.sum())
        found = ModelStatistics(blocks, look.fingerprint, text.text_hash, seed, tokens)
        run.hand_over(lambda: _write_file(run, found), path)
    with contextlib.suppress(OSError):
        folder.rmdir()
    return found


def unfinished_folder(path: Path) -> Path:
    """Where the run for a file of statistics keeps what is finished."""
    return path.with_name(f"{path.name}.unfinished")


def check_statistics_file(path: Path) -> None:
    """Refuse a file that is there: whether it is of this model, text and seed is not for a program to guess.

    Raises:
        UsageError: it is a folder. CheckpointError: it is there, or cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"STATISTICS must be a file to write, got the folder {path}")
    if path.exists():
        raise CheckpointError(
            f"STATISTICS must be a new file, got {path}, which is there: old statistics are neither used again nor "
            "written over. Remove it or name another"
        )
    check_writable("STATISTICS", path)


def _write_file(run: RunFolder, statistics: ModelStatistics) -> Path:
    """All parts as one file of `ModelStatistics.save`, tensor by tensor."""
    places: dict[str, Shards] = {}
    for part in run.aside:
        shards = run.read(part)
        for key in shards.tensors:
            name, _, block = key.partition("/")
            lone = name.startswith("extra.") and name.removeprefix("extra.") not in statistics.blocks[block].extra
            if not name.startswith(BY_WINDOW) and not lone:
                places[key] = shards
    specs = [TensorSpec(key, shards.tensors[key].dtype, shards.tensors[key].shape) for key, shards in places.items()]
    work = run.path / "file.partial"
    work.mkdir()
    with ShardWriter(work, specs, sys.maxsize, statistics.metadata()) as writer:
        for key, shards in places.items():
            writer.copy(key, shards.parts(key))
    return work / SINGLE_FILE
