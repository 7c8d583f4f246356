"""Blockwise mode: every block's experts by themselves, one block of each model on the device at a time.

A block learns from what the teacher's block is given and gives; nothing of the student but its experts runs, and there
is no CE. So it needs neither model whole in the device's memory, and each block could train on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.distillation.experts import Routed, TeacherExperts, expert_loss, slot_outputs
from moesparse.distillation.log import Journal
from moesparse.distillation.matching import Pair
from moesparse.distillation.settings import Settings
from moesparse.distillation.state import StateFile
from moesparse.distillation.training import Trainer, expert_parameters, master_weights, windows_of_step
from moesparse.models.blocks import decoder_layers
from moesparse.models.experts_function import experts_run_by
from moesparse.models.modes import placed
from moesparse.models.stream import LayerStream
from moesparse.system.cpu_products import fast_products

__all__ = ["BlockInputs", "run_layer", "train_block", "train_blockwise"]


@dataclass(frozen=True)
class BlockInputs:
    """What a block was called with for all windows, on the CPU: hidden [n, t, H], ids [n, t, K] (E at padding)."""

    hidden: Tensor
    index: Tensor


def train_blockwise(
    teacher: nn.Module,
    pairs: Sequence[Pair],
    ids: Tensor,
    mask: Tensor | None,
    settings: Settings,
    *,
    journal: Journal,
    file: StateFile | None,
    save_every: int,
    device: torch.device,
) -> None:
    """Arguments as `distill` has checked them."""
    resumed = file.state if file is not None else None
    done: dict[str, Tensor] = dict(resumed["done"]) if resumed is not None else {}
    layers, prefix = decoder_layers(teacher, [pair.teacher for pair in pairs])
    home = next(layers.parameters()).device
    stream = LayerStream(teacher, layers, ids, mask, settings.batch_size, device if device != home else None)
    last = pairs[-1].teacher.layer
    for position in range(len(stream.layers)):
        here = [pair for pair in pairs if pair.teacher.layer == f"{prefix}.{position}"]
        with stream.on_device(position):
            inputs = run_layer(stream, position, here)
            for pair, given in zip(here, inputs, strict=True):
                names = [f"{pair.student.name}.{matrix.name}" for matrix in pair.student.matrices]
                if all(name in done for name in names):
                    for name, matrix in zip(names, pair.student.matrices, strict=True):
                        matrix.parameter.data.copy_(done[name])
                    continue
                at_work = resumed["trainer"] if resumed is not None and resumed["block"] == pair.student.name else None

                def save(trainer: Trainer, name: str = pair.student.name) -> None:
                    if file is not None and trainer.step_number % save_every == 0:
                        file.save({"rows": journal.rows, "done": done, "block": name, "trainer": trainer.state()})

                train_block(pair, given, settings, journal, device, at_work, save)
                for name, matrix in zip(names, pair.student.matrices, strict=True):
                    done[name] = matrix.parameter.detach().cpu().clone() if file is not None else torch.empty(0)
                if file is not None:
                    file.save({"rows": journal.rows, "done": done, "block": None, "trainer": None})
        if f"{prefix}.{position}" == last:
            return


def train_block(
    pair: Pair,
    inputs: BlockInputs,
    settings: Settings,
    journal: Journal,
    device: torch.device,
    resumed: dict[str, Any] | None = None,
    after_step: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Train the expert matrices of one block; the teacher's must be on the device.

    Args:
        pair: the student's block is moved to the device and back.
        inputs: of the teacher's block.
        settings: its learning rate falls to zero over this block's steps.
        journal: told of every step.
        device: where to train.
        resumed: `Trainer.state` to go on from.
        after_step: called after every step.
    """
    windows = len(inputs.hidden)
    steps = settings.steps(windows)
    experts = pair.student.experts
    trained = expert_parameters([pair.student])
    with placed(experts, device), master_weights(experts, trained), fast_products(pair.teacher.experts):
        trainer = Trainer(trained, settings, steps)
        if resumed is not None:
            trainer.load(resumed)
        first = len(journal.rows) - trainer.step_number
        while trainer.step_number < steps:
            step, rate = trainer.step_number, trainer.learning_rate
            forwards = windows_of_step(step, windows, settings).split(settings.micro_batch)
            total = 0.0
            for numbers in forwards:
                hidden = inputs.hidden[numbers].flatten(0, 1).to(device)
                index = inputs.index[numbers].flatten(0, 1).to(device)
                with torch.no_grad():
                    outputs = slot_outputs(pair.teacher, hidden, index)
                loss = expert_loss(pair.student, Routed(hidden, index, outputs), pair.new_ids) / len(forwards)
                loss.backward()
                total += float(loss.detach())
            norm = trainer.step()
            row = {"step": step, "block": pair.student.name, "experts": total, "learning_rate": rate}
            journal.add(row | {"grad_norm": norm}, tokens=settings.batch_size * inputs.hidden.shape[1])
            journal.check(first, steps)
            after_step(trainer)
        lost = trainer.lost_zeros()
        if lost:
            raise AssertionError(f"zeros were lost in training: {lost}")


def run_layer(stream: LayerStream, position: int, pairs: Sequence[Pair]) -> list[BlockInputs]:
    """Run a layer of the teacher over all windows and note what its blocks are called with."""
    functions = [TeacherExperts(pair.teacher) for pair in pairs]
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in pairs]

    def aim(number: int) -> None:
        for function in functions:
            function.token_mask = stream.token_masks[number]

    with ExitStack() as stack:
        for function in functions:
            stack.enter_context(experts_run_by(function.block, function))
        for _ in stream.run(position, keep=True, before=aim):
            for function, part in zip(functions, parts, strict=True):
                assert function.routed is not None
                part.append((function.routed.hidden.cpu(), function.routed.index.cpu()))
    joined = [tuple(torch.cat(tensors) for tensors in zip(*part, strict=True)) for part in parts]
    return [BlockInputs(*(tensor.unflatten(0, (-1, stream.length)) for tensor in both)) for both in joined]
