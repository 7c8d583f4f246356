"""Statistics of a model layer by layer: what `calibrate` gives, with one layer on the device at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from moesparse.calibration.angles import measure_angles
from moesparse.calibration.recorder import Recorder, record, window_sums
from moesparse.calibration.statistics import ANGLED_NORM_SUM, ExpertStatistics
from moesparse.models.layers import Layers
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, ProgressEvent
from moesparse.system.shards import Shards

__all__ = ["BY_WINDOW", "Stored", "drop_lone_angles", "from_shards", "named_sums", "read_sums", "record_layers"]

BY_WINDOW = "by_window."
"""What the name of a sum begins with that holds every window by itself."""

# of every column, or of every pair of them: what a choice of experts does not read
_BY_COLUMN = ("energy.", "gated_energy.", "moment.", "gated_moment.")

Stored = Iterable[tuple[str, Callable[[], Tensor]]]
"""What is kept of one layer: "<sum>/<block>" and how to read it."""


def record_layers(
    layers: Layers,
    stream: LayerStream,
    progress: Progress,
    *,
    start: int = 0,
    moments: str = "none",
    by_window: bool = True,
) -> Iterator[tuple[int, list[Recorder]]]:
    """Run all layers up to the last block over the windows and record the blocks; the stream is used up.

    Holds one layer, its sums and those of its windows.

    Args:
        layers: of the model.
        stream: at the input of the first layer.
        progress: called before every layer and behind the last.
        start: recorders of the layers before it are not wanted again; nothing runs where all are there.
        moments: second moments to collect.
        by_window: fill `Recorder.window_sums`.

    Yields:
        Position and recorders of each layer from `start` on, while it is held and with `stream.hidden` behind it.
    """
    count = 1 + max(position for position in range(len(layers)) if layers.blocks_at(position))
    stage, tokens = "score experts", 0
    for position in range(count if start < count else 0):
        progress(ProgressEvent(stage, position, count, "layer", tokens, layer=position, layers=count))
        wanted = position >= start
        with stream.on_device(position):
            # the finished ones are recorded again: a recorder adds up in the order of the model's own loop, and the
            # layers behind must see the same bits
            what = moments if wanted else "none"
            recorders, seen = _record(layers, stream, position, what, by_window and wanted)
            tokens += seen
            if wanted:
                yield position, recorders
            for recorder in recorders:
                # the next layer's second moments take their room
                recorder.statistics.moment.clear()
                recorder.statistics.gated_moment.clear()
    if start < count:
        progress(ProgressEvent(stage, count, count, "layer", tokens, layer=count, layers=count))


def _record(
    layers: Layers, stream: LayerStream, position: int, moments: str, by_window: bool
) -> tuple[list[Recorder], int]:
    """Run one layer, which is held, over all batches; the hidden states move on behind it.

    Processes that share the stream add up what they record; second moments in the first one alone.

    Returns:
        The recorders, and tokens that this process ran.
    """
    with ExitStack() as stack:
        recorders = stack.enter_context(record(layers.blocks_at(position), moments))
        if by_window:
            for recorder in recorders:
                recorder.window_sums = {}
        stack.enter_context(measure_angles(layers.model, recorders))
        tokens = sum(stream.run(position, keep=True, recorders=recorders))
    for recorder in recorders:
        recorder.statistics = recorder.statistics.combine(stream.processes, to_first=True)
        recorder.combine(stream.processes, stream.windows)
    return recorders, tokens


def named_sums(recorders: Sequence[Recorder], *, by_column: bool) -> dict[str, Tensor]:
    """What recorders hold as "<sum>/<block>" -> tensor, to be kept until all layers are done.

    Args:
        recorders: of one layer.
        by_column: with energies and moments, which a choice of experts does not read.
    """
    found = {}
    for recorder in recorders:
        statistics = recorder.statistics
        by_window = {f"{BY_WINDOW}{name}": tensor for name, tensor in (recorder.window_sums or {}).items()}
        named = statistics.named_tensors() | statistics.named_maxima() | by_window
        for name, tensor in named.items():
            if by_column or not name.startswith(_BY_COLUMN):
                found[f"{name}/{recorder.block.name}"] = tensor
    return found


def from_shards(shards: Shards) -> Stored:
    """`named_sums` that lie in a file."""
    return ((key, partial(shards.read, key)) for key in shards.tensors)


def read_sums(parts: Iterable[Stored], windows: int) -> tuple[dict[str, ExpertStatistics], dict[str, Tensor]]:
    """All `named_sums` together, but for what there is of every column.

    Args:
        parts: of every layer that has blocks, in order.
        windows: of the calibration set.

    Returns:
        block -> its sums, in forward order, and name of a sum -> [windows, blocks, E] float64.
    """
    found: dict[str, dict[str, Tensor]] = {}
    held: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for key, read in part:
            name, _, block = key.partition("/")
            if name.startswith(BY_WINDOW):
                held.setdefault(block, {})[name.removeprefix(BY_WINDOW)] = read()
            elif not name.startswith(_BY_COLUMN):
                found.setdefault(block, {})[name] = read()
    statistics = {block: ExpertStatistics.from_named(named, by_column=False) for block, named in found.items()}
    drop_lone_angles(statistics)
    return statistics, window_sums(list(held.values()), windows)


def drop_lone_angles(found: Mapping[str, ExpertStatistics]) -> None:
    """Take the sum of easy-ep from all blocks where one has none: a criterion compares the blocks alike."""
    if not all(ANGLED_NORM_SUM in statistics.extra for statistics in found.values()):
        for statistics in found.values():
            statistics.extra.pop(ANGLED_NORM_SUM, None)
