"""Global mode: the whole student trains on CE or the teacher's logits, and on the expert loss of all layers at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesparse.distillation.distributed import TrainingProcesses
from moesparse.distillation.experts import Routed, StudentExperts
from moesparse.distillation.log import TrainingLog
from moesparse.distillation.matching import Pair
from moesparse.distillation.settings import Settings
from moesparse.distillation.state import StateFile
from moesparse.distillation.teacher import CachedTeacher, LiveTeacher, TrainingWindows
from moesparse.distillation.training import Trainer, expert_parameters, windows_of_step
from moesparse.errors import MoESparseError
from moesparse.models.blocks import decoder_layers
from moesparse.models.experts_function import experts_run_by
from moesparse.models.inputs import forward_inputs
from moesparse.models.modes import evaluating, replaced_forwards
from moesparse.system.cpu_products import fast_products

__all__ = ["train_whole"]

_Source = Callable[[Tensor], list[Routed]]
"""What the teacher's blocks did with the windows of these numbers."""


def train_whole(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Sequence[Pair],
    windows: TrainingWindows,
    settings: Settings,
    processes: TrainingProcesses,
    *,
    log: TrainingLog,
    file: StateFile | None,
    save_every: int,
    device: torch.device,
    checkpointing: bool,
    cache: str | os.PathLike[str] | None,
    key: Mapping[str, Any],
) -> float:
    """Train the student as a whole; both models are at work on the device.

    Args:
        student: whose weights change; a copy of it is sharded where processes share the work.
        teacher: of its family; not changed.
        pairs: their blocks.
        windows: to train on.
        settings: what trains and how; n must hold a batch.
        processes: that share the windows.
        log: told of every step; its rows are saved with the state.
        file: of the states, with that of an earlier run to go on from; None saves none.
        save_every: steps between two states; the last step has one too.
        device: where to train.
        checkpointing: recompute each layer in the backward.
        cache: folder of the teacher's outputs; None asks the teacher in every step.
        key: "teacher" and "windows": what the outputs in the cache are of.

    Returns:
        lambda, the weight of the expert loss, as it was used.

    Raises:
        MoESparseError: a loss that is not finite; a student that gives what the teacher gives.
    """
    ids, resumed = windows[0], file.state if file is not None else None
    cached = None if cache is None else _opened(cache, pairs, key, len(ids), processes)
    with ExitStack() as stack:
        model, at_work, trained = stack.enter_context(processes.student(student, pairs, device, settings.train))
        for network in (model, teacher):
            stack.enter_context(evaluating(network))
        # the teacher's weights tell: the student's are float32 while they train
        stack.enter_context(fast_products(teacher))
        alive = processes.teacher(teacher, pairs, windows, device, settings.logit_share > 0)
        source: _Source
        if cached is None:
            source = stack.enter_context(alive)
        else:
            if cached.missing(len(ids)):
                with alive as live:
                    cached.fill(live, len(ids), settings.batch_size, log.tell)
            source = cached
        functions = [StudentExperts(pair) for pair in at_work]
        for function in functions:
            stack.enter_context(experts_run_by(function.pair.student, function))
        if checkpointing:
            stack.enter_context(_checkpointed(decoder_layers(model, [pair.student for pair in at_work])[0]))
        losses = _Losses(model, functions, source, windows, device, settings)
        masked = {} if settings.train == "routers" else expert_parameters([pair.student for pair in at_work])
        trainer = Trainer(trained, settings, settings.steps(len(ids)), masked)
        if resumed is not None:
            trainer.load(resumed["trainer"], processes.shard)
            weight = float(resumed["expert_weight"])
        else:
            weight = _balance(losses, settings, len(ids), processes)
        losses.on_experts = weight != 0
        last = settings.steps(len(ids))
        while trainer.step_number < last:
            row = _step(trainer, losses, weight, settings, len(ids), processes)
            log.add(row, tokens=settings.batch_size * ids.shape[1])
            log.check(0, last)
            # the last one too: writing the checkpoint can still fail
            if file is not None and (trainer.step_number % save_every == 0 or trainer.step_number == last):
                state = trainer.state(processes.whole)
                if processes.first:
                    file.save({"rows": log.rows, "expert_weight": weight, "trainer": state})
        if lost := trainer.lost_zeros():
            raise AssertionError(f"zeros were lost in training: {lost}")
    return weight


def _opened(
    cache: str | os.PathLike[str],
    pairs: Sequence[Pair],
    key: Mapping[str, Any],
    windows: int,
    processes: TrainingProcesses,
) -> CachedTeacher:
    """The teacher's outputs in a folder, which must be there where several processes train."""
    cached = CachedTeacher(cache, len(pairs), {name: key[name] for name in ("teacher", "windows")})
    processes.check_cache(len(cached.missing(windows)))
    return cached


def _step(
    trainer: Trainer, losses: _Losses, weight: float, settings: Settings, windows: int, processes: TrainingProcesses
) -> dict[str, Any]:
    """One step of the optimizer over a batch, in as many forwards as it takes: the row that the log keeps."""
    step, rate = trainer.step_number, trainer.learning_rate
    forwards = processes.share(windows_of_step(step, windows, settings).split(settings.micro_batch))
    sums = torch.zeros(len(losses.parts), dtype=torch.float64)
    for numbers in forwards:
        parts = losses(numbers)
        (losses.total(parts, weight) / len(forwards)).backward()
        sums += parts.detach().double().cpu() / len(forwards)
    losses.release()
    means = processes.mean(sums)
    row = {"step": step, **dict(zip(losses.parts, means.tolist(), strict=True))}
    return row | {"loss": float(losses.total(means, weight)), "learning_rate": rate, "grad_norm": trainer.step()}


class _Losses:
    """The parts of the loss of one forward, whose graph is kept until the backward.

    Attributes:
        parts: their names: "ce", "experts", and "kl" where the teacher's logits count.
        on_experts: that of the experts is computed; it is 0 where not.
    """

    def __init__(
        self,
        model: nn.Module,
        functions: Sequence[StudentExperts],
        source: _Source,
        windows: TrainingWindows,
        device: torch.device,
        settings: Settings,
    ) -> None:
        self._share = settings.logit_share
        self.on_experts = settings.expert_weight != 0 and settings.train != "routers"
        self.parts = ("ce", "experts", "kl")[: 3 if self._share else 2]
        self._model, self._functions, self._source = model, functions, source
        self._ids, self._mask, self._seen = windows
        self._device = device

    def __call__(self, numbers: Tensor) -> Tensor:
        """[parts] float32, for the windows `numbers` [m]."""
        if self.on_experts or self._share:
            found = self._source(numbers)
        if self.on_experts:
            for function, routed in zip(self._functions, found, strict=True):
                function.target = Routed(*(tensor.to(self._device) for tensor in vars(routed).values()))
        ids = self._ids[numbers].to(self._device)
        mask = None if self._mask is None else self._mask[numbers].to(self._device)
        attention = None if mask is None else mask.long()
        inputs = None if self._seen is None else self._seen.inputs
        logits = self._model(**forward_inputs(self._model, ids, attention, inputs, numbers.tolist())).logits
        # a token is predicted where it and the one before it are text
        targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
        if self._seen is not None:
            targets = targets.masked_fill(self._seen.stands_in[numbers, 1:].to(self._device), -100)
        counted = targets.flatten() != -100
        logs = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        ce = F.nll_loss(logs, targets.flatten(), reduction="sum") / counted.sum().clamp(min=1)
        losses = [function.loss for function in self._functions if function.loss is not None]
        parts = [ce, torch.stack(losses).sum() if losses else torch.zeros_like(ce)]
        if self._share:
            assert isinstance(self._source, LiveTeacher) and self._source.logits is not None
            wanted = self._source.logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            apart = F.kl_div(logs, wanted, reduction="none", log_target=True).sum(-1)
            parts.append((apart * counted).sum() / counted.sum().clamp(min=1))
        if not all(part.isfinite() for part in parts):
            divergence = f" and KL {float(parts[2])}" if self._share else ""
            raise MoESparseError(
                f"the loss must be finite, got CE {float(ce)} and experts {float(parts[1])}{divergence} for windows "
                f"{numbers.tolist()}; lower the learning rate, or look for non-finite weights"
            )
        return torch.stack(parts)

    def total(self, parts: Tensor, expert_weight: float) -> Tensor:
        """() the loss: (1 - s) * CE + s * KL + lambda * experts."""
        return self.text(parts) + expert_weight * parts[1]

    def text(self, parts: Tensor) -> Tensor:
        """() what lambda is balanced against: CE and KL by their shares."""
        return torch.lerp(parts[0], parts[2], self._share) if self._share else parts[0]

    @property
    def experts_are_gone(self) -> bool:
        """Whether the teacher has experts that the student has no longer."""
        pairs = [function.pair for function in self._functions]
        return any(pair.student.num_experts < pair.teacher.num_experts for pair in pairs)

    def release(self) -> None:
        """Drop what the last forward held; checkpointed layers need it until their backward is done."""
        for function in self._functions:
            function.target = function.loss = None


@torch.no_grad()
def _balance(losses: _Losses, settings: Settings, windows: int, processes: TrainingProcesses) -> float:
    """lambda: as asked for, or what makes both parts of the loss equal at step 0.

    It is 0 where the experts that a removal left give what the teacher's give: the text alone tells what is missing.
    """
    if settings.train == "routers":
        return 0.0
    if settings.expert_weight is not None:
        return settings.expert_weight
    forwards = processes.share(windows_of_step(0, windows, settings).split(settings.micro_batch))
    parts = torch.stack([losses(numbers).double().cpu() for numbers in forwards]).mean(0)
    losses.release()
    means = processes.mean(parts)
    experts = float(means[1])
    if experts > 0:
        return float(losses.text(means)) / experts
    if losses.experts_are_gone:
        return 0.0
    raise MoESparseError(
        "student must differ from the teacher, got experts that give the same outputs: there is nothing to win back"
    )


def _checkpointed(layers: nn.ModuleList) -> AbstractContextManager[None]:
    """For the body a layer keeps its input only and is run again in the backward."""

    def wrapped(position: int) -> Callable[..., Any]:
        forward = layers[position].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            return (
                checkpoint(forward, *args, use_reentrant=False, **kwargs)
                if torch.is_grad_enabled()
                else forward(*args, **kwargs)
            )

        return run

    return replaced_forwards(list(layers), wrapped)
