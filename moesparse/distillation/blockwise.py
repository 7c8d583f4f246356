"""Blockwise mode: every block's experts by themselves, one block of each model on the device at a time.

A block learns from what the teacher's block is given and gives; nothing of the student but its experts runs, and there
is no CE. So neither model need be whole in memory: with `prune_checkpoint` before it, a model is pruned and recovered
on a machine that could never load it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.checkpoints.output import Output
from moesparse.distillation.experts import Routed, TeacherExperts, expert_loss, slot_outputs
from moesparse.distillation.log import TrainingLog
from moesparse.distillation.matching import Pair, check_pattern, stated_pattern
from moesparse.distillation.report import count_zeros
from moesparse.distillation.settings import Settings
from moesparse.distillation.state import StateFile
from moesparse.distillation.training import (
    Trainer,
    expert_parameters,
    master_weights,
    router_parameters,
    windows_of_step,
)
from moesparse.models.experts_function import experts_run_by
from moesparse.models.layers import Layers
from moesparse.models.modes import evaluating, placed
from moesparse.models.stream import LayerStream
from moesparse.system.cpu_products import fast_products

__all__ = ["BlockInputs", "BlockOutputs", "BlockStates", "run_layer", "train_block", "train_blockwise", "train_router"]


@dataclass(frozen=True)
class BlockInputs:
    """What a block was called with for all windows, on the CPU: hidden [n, t, H], ids [n, t, K] (E at padding)."""

    hidden: Tensor
    index: Tensor


@dataclass(frozen=True)
class BlockOutputs:
    """What a MoE module was given and gave for all windows, [n, t, H] on the CPU; real: [n, t], False at padding."""

    hidden: Tensor
    output: Tensor
    real: Tensor


def train_blockwise(
    student: Layers,
    teacher: Layers,
    pairs: Sequence[Pair],
    stream: LayerStream,
    output: Output,
    settings: Settings,
    log: TrainingLog,
    device: torch.device,
    state: BlockStates | None = None,
) -> list[tuple[int, int]]:
    """Train what is not finished yet, layer by layer; one of each model is held at a time.

    Args:
        student: whose experts are trained.
        teacher: the model that `stream` runs.
        pairs: all blocks of both.
        stream: at the input of the teacher's first layer.
        output: takes the student's layers, each with the rows of its steps and its zeros, and knows the finished ones.
        settings: `Settings`; the learning rate falls to zero over each block's steps.
        log: told of every step.
        device: where to train.
        state: what else of an earlier run is done, block by block, and told of every step.

    Returns:
        Zeros of the student's expert matrices before and after, layer by layer.

    Raises:
        MoESparseError: a loss that is not finite; zeros that break the pattern which the student's config states.
    """
    # positions are those of all decoder layers, in both models
    student.in_order()
    done = len(output.notes)
    zeros = [note["zeros"] for note in output.notes]
    by_name = {pair.teacher.name: pair for pair in pairs}
    at = [[by_name[block.name] for block in teacher.blocks_at(position)] for position in range(len(teacher))]
    last = max(position for position, here in enumerate(at) if here)
    for position in range(min(done, last)):
        with stream.on_device(position):
            for _ in stream.run(position, keep=True):
                pass
    for position in range(done, len(teacher)):
        with student.hold(position):
            first, before = len(log.rows), count_zeros(at[position])
            if position <= last:
                with stream.on_device(position):
                    train, run = train_block, run_layer
                    if settings.train == "routers":
                        train, run = train_router, run_layer_of_blocks  # type: ignore[assignment]
                    for pair, given in zip(at[position], run(stream, position, at[position]), strict=True):
                        if state is None:
                            train(pair, given, settings, log, device)
                        elif not state.restore(pair):
                            train(pair, given, settings, log, device, state.at_work(pair), state.told_of(pair))
                            state.finish(pair)
                        check_pattern(pair.student, stated_pattern(student.model))
            zeros.append((before, count_zeros(at[position])))
            output.keep(position, {"rows": log.rows[first:], "zeros": zeros[-1]})
    return zeros


class BlockStates:
    """What of a blockwise training in memory a killed run goes on from: finished blocks, and the trainer at work.

    Args:
        file: that holds it.
        log: whose rows are saved with it.
        save_every: steps between two states.
        routers: they are what trains, and not expert matrices.
    """

    def __init__(self, file: StateFile, log: TrainingLog, save_every: int, *, routers: bool = False) -> None:
        self._file, self._log, self._save_every, self._routers = file, log, save_every, routers
        self._resumed = file.state or {"done": {}, "block": None, "trainer": None}
        self._done: dict[str, Tensor] = dict(self._resumed["done"])

    def restore(self, pair: Pair) -> bool:
        """Give the block what it had learnt in the end, where it is done."""
        trained = self._trained(pair)
        if not trained.keys() <= self._done.keys():
            return False
        for name, parameter in trained.items():
            parameter.data.copy_(self._done[name])
        return True

    def at_work(self, pair: Pair) -> dict[str, Any] | None:
        """`Trainer.state` of the block that was at work."""
        return self._resumed["trainer"] if self._resumed["block"] == pair.student.name else None

    def told_of(self, pair: Pair) -> Callable[[Trainer], None]:
        """To be called after every step of the block."""

        def save(trainer: Trainer) -> None:
            if trainer.step_number % self._save_every == 0:
                self._save(pair.student.name, trainer.state())

        return save

    def finish(self, pair: Pair) -> None:
        """The block is done."""
        for name, parameter in self._trained(pair).items():
            self._done[name] = parameter.detach().cpu().clone()
        self._save(None, None)

    def _save(self, block: str | None, trainer: dict[str, Any] | None) -> None:
        self._file.save({"rows": self._log.rows, "done": self._done, "block": block, "trainer": trainer})

    def _trained(self, pair: Pair) -> dict[str, nn.Parameter]:
        return (router_parameters if self._routers else expert_parameters)([pair.student])


def train_block(
    pair: Pair,
    inputs: BlockInputs,
    settings: Settings,
    log: TrainingLog,
    device: torch.device,
    resumed: dict[str, Any] | None = None,
    after_step: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Train the expert matrices of one block; the teacher's must be on the device.

    Args:
        pair: the student's block is moved to the device and back.
        inputs: of the teacher's block.
        settings: its learning rate falls to zero over this block's steps.
        log: told of every step.
        device: where to train.
        resumed: `Trainer.state` to go on from.
        after_step: called after every step.
    """

    def loss(numbers: Tensor) -> Tensor:
        hidden = inputs.hidden[numbers].flatten(0, 1).to(device)
        index = inputs.index[numbers].flatten(0, 1).to(device)
        with torch.no_grad():
            outputs = slot_outputs(pair.teacher, hidden, index)
        return expert_loss(pair.student, Routed(hidden, index, outputs), pair.new_ids)

    experts = pair.student.experts
    trained = expert_parameters([pair.student])
    with placed(experts, device), master_weights(experts, trained), fast_products(pair.teacher.experts):
        _descend(pair, trained, trained, loss, inputs.hidden, settings, log, resumed, after_step)


def train_router(
    pair: Pair,
    inputs: BlockOutputs,
    settings: Settings,
    log: TrainingLog,
    device: torch.device,
    resumed: dict[str, Any] | None = None,
    after_step: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Train the router of one block towards the output of the teacher's, experts and all else held.

    The loss is the squared error of the student's MoE module relative to the teacher's output, on the inputs of the
    teacher's. Arguments are those of `train_block`.
    """
    moe, wanted = pair.student.moe, router_parameters([pair.student])
    energy = float(inputs.output.double().square().sum(-1)[inputs.real].mean()) or 1.0

    def loss(numbers: Tensor) -> Tensor:
        found = moe(inputs.hidden[numbers].to(device))
        found = found[0] if isinstance(found, tuple) else found
        error = (found.float() - inputs.output[numbers].to(device).float()).square().sum(-1)
        real = inputs.real[numbers].to(device)
        return (error * real).sum() / real.sum().clamp(min=1) / energy

    with placed(moe, device), evaluating(moe), master_weights(moe, wanted, []), fast_products(pair.teacher.experts):
        _descend(pair, wanted, {}, loss, inputs.hidden, settings, log, resumed, after_step)


def _descend(
    pair: Pair,
    trained: Mapping[str, nn.Parameter],
    held: Collection[str],
    loss: Callable[[Tensor], Tensor],
    hidden: Tensor,
    settings: Settings,
    log: TrainingLog,
    resumed: dict[str, Any] | None,
    after_step: Callable[[Trainer], None],
) -> None:
    """All steps of one block: `loss` is that of some windows, by their numbers."""
    steps = settings.steps(len(hidden))
    trainer = Trainer(trained, settings, steps, held)
    if resumed is not None:
        trainer.load(resumed)
    first = len(log.rows) - trainer.step_number
    while trainer.step_number < steps:
        step, rate = trainer.step_number, trainer.learning_rate
        forwards = windows_of_step(step, len(hidden), settings).split(settings.micro_batch)
        total = 0.0
        for numbers in forwards:
            part = loss(numbers) / len(forwards)
            part.backward()
            total += float(part.detach())
        norm = trainer.step()
        row = {"step": step, "block": pair.student.name, "experts": total, "learning_rate": rate}
        log.add(row | {"grad_norm": norm}, tokens=settings.batch_size * hidden.shape[1])
        log.check(first, steps)
        after_step(trainer)
    lost = trainer.lost_zeros()
    if lost:
        raise AssertionError(f"zeros were lost in training: {lost}")


def run_layer(stream: LayerStream, position: int, pairs: Sequence[Pair]) -> list[BlockInputs]:
    """Run a layer of the teacher over all windows and note what its blocks are called with."""
    functions = [TeacherExperts(pair.teacher) for pair in pairs]
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pairs]
    with ExitStack() as stack:
        for function in functions:
            stack.enter_context(experts_run_by(function.block, function))
        for _ in stream.run(position, keep=True, recorders=functions):
            for function, part in zip(functions, parts, strict=True):
                assert function.routed is not None
                part.append((function.routed.hidden.cpu(), function.routed.index.cpu()))
    joined = [tuple(torch.cat(tensors) for tensors in zip(*part, strict=True)) for part in parts]
    return [BlockInputs(*(tensor.unflatten(0, (-1, stream.length)) for tensor in both)) for both in joined]


def run_layer_of_blocks(stream: LayerStream, position: int, pairs: Sequence[Pair]) -> list[BlockOutputs]:
    """Run a layer of the teacher over all windows and note what its MoE modules are given and give."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pairs]
    masks: list[Tensor] = []
    with ExitStack() as stack:
        for pair, part in zip(pairs, parts, strict=True):

            def note(_module: nn.Module, given: Any, found: Any, part: Any = part) -> None:
                output = found[0] if isinstance(found, tuple) else found
                part.append((given[0].detach().cpu(), output.detach().cpu()))

            stack.callback(pair.teacher.moe.register_forward_hook(note).remove)
        for number, _ in enumerate(stream.run(position, keep=True)):
            real = stream.token_mask(number, position)
            for part in parts[:1]:
                shape = part[-1][0].shape[:2]
                masks.append(torch.ones(shape, dtype=torch.bool) if real is None else real.view(shape).cpu())
    joined = [tuple(torch.cat(tensors) for tensors in zip(*part, strict=True)) for part in parts]
    return [BlockOutputs(hidden, output, torch.cat(masks)) for hidden, output in joined]
