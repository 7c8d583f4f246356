"""Statistics of a model layer by layer: what `calibrate` gives, with one layer on the device at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from moesparse.calibration.angles import measure_angles
from moesparse.calibration.recorder import Recorder, record, window_sums
from moesparse.calibration.statistics import ANGLED_NORM_SUM, ExpertStatistics, ModelStatistics
from moesparse.calibration.windows import windows_hash
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.models.fingerprint import model_fingerprint
from moesparse.models.look import blocks_of
from moesparse.models.on_disk import StreamedModel
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, ProgressEvent, silent
from moesparse.system.run_folder import RunFolder
from moesparse.system.shards import MAX_SHARD_BYTES

__all__ = ["drop_lone_angles", "layerwise_statistics", "read_sums", "record_layer", "record_layers"]

_BY_WINDOW = "by_window."

# of every column, or of every pair of them: what a choice of experts does not read
_BY_COLUMN = ("energy.", "gated_energy.", "moment.", "gated_moment.")


def layerwise_statistics(
    model: nn.Module,
    stream: LayerStream,
    windows: Tensor,
    mask: Tensor | None,
    progress: Progress = silent,
    by_window: dict[str, Tensor] | None = None,
    *,
    moments: str = "none",
    visit: Callable[[MoEBlock, ExpertStatistics, Sequence[Tensor]], None] | None = None,
) -> ModelStatistics:
    """What `calibrate` gives, one layer on the device at a time; the stream is used up.

    Args:
        model: the model the stream was made from.
        stream: over `windows`.
        windows: [n, t] token ids.
        mask: [n, t], 0 where there is padding, or None.
        progress: called after every layer.
        by_window: a dict to fill with the expert sums of every window, as in `calibrate`.
        moments: second moments to collect for `visit`; they are gone from the result.
        visit: called with each block, its statistics and the hidden states behind its layer, batch by batch, while the
            layer is on the device.
    """
    blocks = find_moe_blocks(model)
    positions = {id(layer): position for position, layer in enumerate(stream.layers)}
    at = [positions[id(model.get_submodule(block.layer))] for block in blocks]
    found: dict[str, ExpertStatistics] = {}
    done: list[Recorder] = []
    for position in range(max(at) + 1):
        progress(ProgressEvent("score experts", position, max(at) + 1, "layer"))
        here = [block for block, where in zip(blocks, at, strict=True) if where == position]
        with stream.on_device(position):
            recorders = record_layer(model, stream, position, here, moments=moments, by_window=by_window is not None)
            for recorder in recorders:
                if visit is not None:
                    visit(recorder.block, recorder.statistics, stream.hidden)
                recorder.statistics.moment.clear()
                recorder.statistics.gated_moment.clear()
        found |= {recorder.block.name: recorder.statistics.to("cpu") for recorder in recorders}
        done += recorders
    drop_lone_angles(found)
    if by_window is not None:
        by_window |= window_sums([recorder.window_sums or {} for recorder in done], len(windows))
    tokens = windows.numel() if mask is None else int(mask.sum())
    return ModelStatistics(found, model_fingerprint(model), windows_hash(windows, mask), None, tokens)


def record_layer(
    model: nn.Module,
    stream: LayerStream,
    position: int,
    blocks: Sequence[MoEBlock],
    *,
    moments: str = "none",
    by_window: bool = False,
) -> list[Recorder]:
    """Run one layer, which is in memory, over all batches and record its blocks; the hidden states move on behind it.

    Args:
        model: the model the stream was made from.
        stream: at the input of the layer.
        position: of the layer.
        blocks: those inside of it, none in a dense layer.
        moments: second moments to collect.
        by_window: fill `Recorder.window_sums`.

    Processes that share the stream add up what they record; second moments in the first one alone.
    """
    with ExitStack() as stack:
        recorders = stack.enter_context(record(blocks, moments))
        if by_window:
            for recorder in recorders:
                recorder.window_sums = {}
        stack.enter_context(measure_angles(model, recorders))

        def aim(number: int) -> None:
            for recorder in recorders:
                recorder.token_mask = stream.token_masks[number]
                recorder.first_window, recorder.window_length = stream.first_window[number], stream.length

        for _ in stream.run(position, keep=True, before=aim):
            pass
    for recorder in recorders:
        recorder.statistics = recorder.statistics.combine(stream.processes, to_first=True)
        recorder.combine(stream.processes, stream.windows)
    return recorders


def drop_lone_angles(found: Mapping[str, ExpertStatistics]) -> None:
    """Take the sum of easy-ep from all blocks where one has none: a criterion compares the blocks alike."""
    if not all(ANGLED_NORM_SUM in statistics.extra for statistics in found.values()):
        for statistics in found.values():
            statistics.extra.pop(ANGLED_NORM_SUM, None)


def record_layers(
    run: RunFolder, streamed: StreamedModel, stream: LayerStream, progress: Progress, *, moments: str = "none"
) -> None:
    """Have the statistics of every layer as parts of the run, aside; the stream is used up where one was missing.

    Holds one layer, its sums and those of its windows.
    """
    done = len(run.aside)
    count = 1 + max(streamed.position(block.layer) for block in streamed.blocks)
    if done == count:
        return
    for position in range(count):
        progress(ProgressEvent("score experts", position, count, "layer"))
        missing = position >= done
        with stream.on_device(position):
            # the finished ones are recorded again: a recorder adds up in the order of the model's own loop, and the
            # layers behind must see the same bits
            recorders = record_layer(
                streamed.model,
                stream,
                position,
                blocks_of(streamed, position),
                moments=moments if missing else "none",
                by_window=missing,
            )
        if missing:
            tensors = {key: tensor for recorder in recorders for key, tensor in _tensors(recorder).items()}
            run.write(f"statistics-{position:05d}", tensors, None, max_shard_bytes=MAX_SHARD_BYTES, aside=True)


def _tensors(recorder: Recorder) -> dict[str, Tensor]:
    statistics = recorder.statistics
    by_window = {f"{_BY_WINDOW}{name}": tensor for name, tensor in (recorder.window_sums or {}).items()}
    named = statistics.named_tensors() | statistics.named_maxima() | by_window
    return {f"{name}/{recorder.block.name}": tensor for name, tensor in named.items()}


def read_sums(run: RunFolder, windows: int) -> tuple[dict[str, ExpertStatistics], dict[str, Tensor]]:
    """What `record_layers` has left, but for what there is of every column.

    Args:
        run: with the statistics of every layer.
        windows: of the calibration set.

    Returns:
        block -> its sums, in forward order, and name of a sum -> [windows, blocks, E] float64.
    """
    found: dict[str, dict[str, Tensor]] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for part in run.aside:
        shards = run.read(part)
        for key in shards.tensors:
            name, _, block = key.partition("/")
            if name.startswith(_BY_WINDOW):
                held.setdefault(block, {})[name.removeprefix(_BY_WINDOW)] = shards.read(key)
            elif not name.startswith(_BY_COLUMN):
                found.setdefault(block, {})[name] = shards.read(key)
    statistics = {block: ExpertStatistics.from_named(named, by_column=False) for block, named in found.items()}
    drop_lone_angles(statistics)
    return statistics, window_sums(list(held.values()), windows)
