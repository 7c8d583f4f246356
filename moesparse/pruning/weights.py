"""Prune the weights of all blocks of a model, and round what stays, layer by layer.

Where text goes through the model each decoder layer in turn is run over all of it, its experts' sums are kept, masks
are chosen, the kept weights solved for and written in place, and the layer is run again so that the next one sees what
the pruned model will feed it. One layer's sums are held at a time. Saved sums, and rules that look at weights alone,
run nothing.

Source: one-shot block-wise pruning as in SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) and MoE-Pruner (Xie et
al. 2024, arXiv 2410.12013).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from moesparse.calibration.data import Calibration, Saved
from moesparse.calibration.recorder import CrossMoment, Recorder, record
from moesparse.calibration.statistics import ExpertStatistics, memory_needed
from moesparse.checkpoints.output import Output
from moesparse.experts.refit import Calls, calls_noted
from moesparse.models.blocks import MoEBlock
from moesparse.models.hidden_states import HiddenStates
from moesparse.models.layers import Layers, RunOptions
from moesparse.models.stream import LayerStream
from moesparse.progress import Progress, ProgressEvent
from moesparse.pruning.block import Recorded, prune_block
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.report import BlockReport
from moesparse.pruning.tuning import Tuned, tune_experts
from moesparse.pruning.values import quantise_block
from moesparse.system.memory import peak_memory, reset_gpu_peak
from moesparse.system.pieces import Pieces
from moesparse.system.processes import Batch
from moesparse.weights.weight_rules import parse_update, rescale_factor, tunes

__all__ = ["prune_weights"]


def prune_weights(
    layers: Layers,
    output: Output,
    stream: LayerStream | None,
    calibration: Calibration,
    recipe: Recipe,
    options: RunOptions,
) -> list[BlockReport]:
    """Prune what is not finished yet.

    Processes that share the work add up their sums and prune the experts of a block between them; every one of them
    has the whole pruned layer in the end, and the reports.

    Args:
        layers: of the model.
        output: takes every layer with the reports of its blocks; knows those of an earlier run.
        stream: at the input of the first layer; None where no text goes through the model.
        calibration: saved sums, where there is no stream and the rules need some.
        recipe: of the weights.
        options: the device of finished layers that are run again, and `progress`.

    Returns:
        The reports of all blocks, in forward order.
    """
    done = len(output.notes)
    reports = [BlockReport.from_dict(entry) for note in output.notes for entry in note]
    if stream is not None:
        last = max(position for position in range(len(layers)) if layers.blocks_at(position))
        if done <= last:
            for position in range(done):
                # what the interrupted run went on with: the pruned layer, or the dense one
                options.progress(ProgressEvent("run finished layers", position, done, "layer"))
                source = output if recipe.propagate else layers
                with source.hold(position, options.device):
                    for _ in stream.run(position, keep=True):
                        pass
            reports += _LayerPass(layers, stream, recipe, options.progress, done, last).run(output)
            done = last + 1
    sums = calibration.only.blocks if isinstance(calibration, Saved) else {}
    for position in range(done, len(layers)):
        with layers.hold(position):
            measured = []
            for block in layers.blocks_at(position):
                stage, count = f"prune {block.name}", len(layers)
                options.progress(
                    ProgressEvent(stage, position, count, "layer", work="prune", layer=position, layers=count)
                )
                found = sums.get(block.name)
                measured.append(prune_block(block, found, recipe, recipe.update, processes=layers.processes))
                scales = quantise_block(block, found, recipe, measured[-1], layers.processes)
                output.take_scales(block, scales)
            _round(output, position, layers.blocks_at(position), measured)
            output.keep(position, [report.to_dict() for report in measured])
        reports += measured
    return reports


class _LayerPass:
    """Text on its way through the layers from `start` to `last`, which are pruned one after the other."""

    def __init__(
        self, layers: Layers, stream: LayerStream, recipe: Recipe, progress: Progress, start: int, last: int
    ) -> None:
        self.layers, self.stream, self.recipe, self.progress = layers, stream, recipe, progress
        self.positions = range(start, last + 1)
        # the factor is measured by running the pruned experts, which sees the loss in gate and up as well
        update = recipe.update if recipe.prunes_weights else "none"
        self.solver, self.rescales = parse_update(update)
        self.matches, self.tunes = self.solver == "asymmetric", tunes(update)
        self.moments = recipe.moments
        # of a block whose gate and up are pruned: what values are rounded by
        self.again: dict[str, ExpertStatistics] = {}
        blocks = [layers.blocks_at(position) for position in self.positions]
        passes = sum(1 + self.matches * len(here) + self.rescales + recipe.propagate if here else 1 for here in blocks)
        self.total, self.done, self.tokens = passes * len(stream), 0, 0
        memory = max(memory_needed(here, self.moments) for here in blocks if here)
        first = next(here[0] for here in blocks if here)
        self._tell(f"calibrate {first.name}", start, memory=memory)

    def run(self, output: Output) -> list[BlockReport]:
        """Prune all of them and keep each with the reports of its blocks."""
        reports = []
        for position in self.positions:
            with self.stream.on_device(position):
                measured = self._layer(position, self.layers.blocks_at(position), output)
                output.keep(position, [report.to_dict() for report in measured])
            self._tell(f"layer {position} is finished", position + 1)
            reports += measured
        return reports

    def _layer(self, position: int, blocks: Sequence[MoEBlock], output: Output) -> list[BlockReport]:
        if not blocks:
            self._send(position, f"layer {position}", keep=True)
            return []
        started, name = time.perf_counter(), blocks[0].name
        reset_gpu_peak()
        # the dense layer's outputs are there only now; its inputs are needed again for rescaling
        outputs = None if self.recipe.propagate else self.stream.hidden.fresh()
        # of the last block's output nothing is kept, unless one of these wants it
        read = self.rescales or outputs is not None or len(blocks) > 1
        with record(blocks, self.moments, outputs=read) as recorders, self._noted(position, blocks) as calls:
            self._send(position, f"calibrate {name}", recorders, outputs=outputs)
        before = [[matrix.weight.clone() for matrix in block.matrices] for block in blocks] if self.tunes else []
        dense = [recorder.statistics for recorder in recorders]
        own = [statistics.combine(self.stream.processes) for statistics in dense]
        # what needs no second moments is done again sooner than it is written
        with output.pieces(position) if self.moments != "none" else Pieces(None) as pieces:
            measured = [
                prune_block(
                    block,
                    sums,
                    self.recipe,
                    self.solver,
                    self._match(position) if self.matches else None,
                    self.stream.processes,
                    pieces,
                )
                for block, sums in zip(blocks, own, strict=True)
            ]
        if self.rescales:
            with record(blocks) as recorders:
                self._send(position, f"rescale {name}", recorders)
            for block, report, sums, recorder in zip(blocks, measured, dense, recorders, strict=True):
                recorder.statistics.combine(self.stream.processes)
                report.rescale = _rescale(block, sums, recorder.statistics)
        for block, report, weights, parts in zip(blocks, measured, before, calls, strict=False):
            self._tell(f"tune {block.name}", position)
            report.tuned = self._tune(block, weights, parts)
        self._quantise(position, blocks, own, measured, output)
        _round(output, position, blocks, measured)
        if outputs is not None:
            self.stream.hidden = outputs
        elif position < self.positions[-1]:
            self._send(position, f"propagate {name}", keep=True)
        else:
            # nothing after the last block needs its output
            self.done += len(self.stream)
        for report in measured:
            report.seconds = (time.perf_counter() - started) / len(blocks)
            report.peak_bytes = peak_memory()
        return measured

    def _quantise(
        self,
        position: int,
        blocks: Sequence[MoEBlock],
        own: Sequence[ExpertStatistics],
        reports: Sequence[BlockReport],
        output: Output,
    ) -> None:
        """Round what the weights have become, by the sums that they were solved with."""
        if self.recipe.values is None:
            return
        with output.pieces(position) if self.moments != "none" else Pieces(None) as pieces:
            for block, sums, report in zip(blocks, own, reports, strict=True):
                self._tell(f"round {block.name}", position)
                found = self.again.pop(block.name, sums)
                scales = quantise_block(block, found, self.recipe, report, self.stream.processes, pieces)
                output.take_scales(block, scales)

    def _tune(self, block: MoEBlock, dense: Sequence[torch.Tensor], parts: Sequence[Batch]) -> list[Tuned] | None:
        """Train the kept weights of matrices that are pruned; None where none is.

        Processes take experts of their own, each on the tokens of all.
        """
        trained = [self.recipe.pattern_of(block.name, matrix.name) is not None for matrix in block.matrices]
        if not any(trained):
            return None
        processes = self.stream.processes
        calls = Calls(*(torch.cat(each) for each in zip(*processes.to_all(parts), strict=True)))
        mine = processes.own(block.num_experts)
        experts = range(mine.start, mine.stop)
        found = tune_experts(block, dense, calls, experts, trained=trained, seed=self.recipe.seed)
        for matrix in block.matrices:
            processes.collect(matrix.parameter.detach())
        return [each for part in processes.gather(found) for each in part]

    @contextmanager
    def _noted(self, position: int, blocks: Sequence[MoEBlock]) -> Iterator[list[list[Batch]]]:
        """What the blocks are called with while the body runs the layer; nothing where nothing trains on it."""
        with ExitStack() as stack:
            wanted = blocks if self.tunes else ()
            yield [stack.enter_context(calls_noted(self.stream, position, block, outputs=False)) for block in wanted]

    def _match(self, position: int) -> Callable[[MoEBlock, torch.Tensor], Recorded]:
        """Records a block of the layer with its pruned gate and up, given what they were before."""

        def look_again(block: MoEBlock, up_before: torch.Tensor) -> Recorded:
            cross = CrossMoment(block, up_before)
            with record([block], self.moments, outputs=False) as (recorder,):
                recorder.row_observer = cross
                self._send(position, f"match {block.name}", [recorder])
            processes = self.stream.processes
            sums = recorder.statistics.combine(processes)
            if self.recipe.values is not None:
                self.again[block.name] = sums
            return sums, processes.reduce(cross.total)

        return look_again

    def _send(
        self,
        position: int,
        stage: str,
        recorders: Sequence[Recorder] = (),
        *,
        keep: bool = False,
        outputs: HiddenStates | None = None,
    ) -> None:
        """Run one layer over all batches; the arguments are those of `LayerStream.run`."""
        for count in self.stream.run(position, keep=keep, outputs=outputs, recorders=recorders):
            self.done, self.tokens = self.done + 1, self.tokens + count
            self._tell(stage, position)

    def _tell(self, stage: str, finished: int, memory: int = 0) -> None:
        """Of the pass, whose layers before `finished` are."""
        self.progress(
            ProgressEvent(
                stage,
                self.done,
                self.total,
                tokens=self.tokens,
                memory=memory,
                work="prune",
                layer=finished,
                layers=self.positions.stop,
            )
        )


@torch.no_grad()
def _rescale(block: MoEBlock, dense: ExpertStatistics, pruned: ExpertStatistics) -> list[float]:
    factor = rescale_factor(dense.gated_norm_sq_sum, pruned.gated_norm_sq_sum)
    down = block.matrices[-1]
    down.weight.mul_(factor.to(down.weight).view(-1, 1, 1))
    return factor.tolist()


def _round(output: Output, position: int, blocks: Sequence[MoEBlock], reports: Sequence[BlockReport]) -> None:
    """Have a layer hold what will be stored of it; rounding a weight to zero is one more zero in the reports."""
    rounding = output.round(position)
    if rounding is None:
        return
    for block, report in zip(blocks, reports, strict=True):
        report.rounding = rounding
        for matrix, tensor in zip(block.matrices, report.tensors, strict=True):
            tensor.sparsity = 1 - int(matrix.weight.count_nonzero()) / max(matrix.weight.numel(), 1)
