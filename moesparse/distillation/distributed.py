"""One process, or several under torchrun with FSDP2: who computes which forward, and where weights live.

With several processes student and teacher are copied, the copies sharded (every decoder layer and every block's experts
a group of its own), and the trained expert matrices gathered back into the student of every process. The forwards of a
step are dealt out, so losses are those of one process with the same settings, to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.distillation.matching import Pair
from moesparse.distillation.settings import Settings
from moesparse.distillation.teacher import LiveTeacher, TrainingWindows
from moesparse.distillation.training import expert_parameters, master_weights, router_parameters
from moesparse.errors import UsageError
from moesparse.models.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.models.modes import placed
from moesparse.models.opener import in_towers
from moesparse.system.processes import Processes

__all__ = ["TrainingProcesses"]

AtWork = tuple[nn.Module, list[Pair], dict[str, nn.Parameter]]
"""The model that trains, the pairs with its blocks, and its trained parameters by name."""


class TrainingProcesses(Processes):
    """The processes of a training run."""

    def check(self, mode: str, settings: Settings) -> None:
        """UsageError where several processes cannot share the work."""
        if self.count == 1:
            return
        if mode != "global":
            raise UsageError(f"mode must be 'global' with {self.count} processes, got {mode!r}: run it in one")
        if settings.batch_size // settings.micro_batch % self.count:
            most, rest = divmod(settings.batch_size, self.count)
            cure = f"take micro_batch {most}, or one that divides it" if not rest else "take another batch_size"
            raise UsageError(
                f"batch_size / micro_batch must be a multiple of the {self.count} processes, got "
                f"{settings.batch_size} / {settings.micro_batch}: {cure}"
            )

    def check_cache(self, missing: int) -> None:
        if self.count > 1 and missing:
            raise UsageError(
                f"cache must be complete with {self.count} processes, got {missing} windows without outputs: fill it "
                "in one process first"
            )

    def whole(self, tensor: Tensor) -> Tensor:
        """A sharded tensor made whole; every process must call."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]

    def shard(self, tensor: Tensor, like: nn.Parameter) -> Tensor:
        """A whole tensor on the device of `like`, cut as `like` is."""
        mesh = getattr(like, "device_mesh", None)
        if mesh is None:
            return tensor.to(like.device)
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]

    @contextmanager
    def student(self, student: nn.Module, pairs: Sequence[Pair], device: torch.device, train: str) -> Iterator[AtWork]:
        """The model to train, on the device, what trains in float32; the student has the result afterwards.

        What trains is `Settings.train`: "all" is all but for the towers of a wrapper.
        """
        matrices = list(expert_parameters([pair.student for pair in pairs]))
        everything = train == "all"
        _, layers = decoder_layers(student, [pair.student for pair in pairs])
        wanted = set(matrices)
        if train == "routers":
            wanted = set(router_parameters([pair.student for pair in pairs]))
        if everything:
            wanted = {name for name, _ in student.named_parameters() if not in_towers(student, name, layers)}
        if self.count == 1:
            trained = _parameters(student, wanted)
            with placed(student, device), master_weights(student, trained, matrices):
                yield student, list(pairs), trained
            return
        model = copy.deepcopy(student)
        blocks = find_moe_blocks(model)
        dtype = blocks[0].matrices[0].parameter.dtype
        # routers are cast as whole layers are, for they lie there
        everything = everything or train == "routers"
        trained = _parameters(model, wanted)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        self._shard(model.to(device), model, blocks, device, dtype, everything)
        at_work = [replace(pair, student=block) for pair, block in zip(pairs, blocks, strict=True)]
        trained = _parameters(model, trained)
        yield model, at_work, trained
        for name, parameter in _parameters(student, trained).items():
            parameter.data.copy_(self.whole(trained[name].detach()))

    @contextmanager
    def teacher(
        self,
        teacher: nn.Module,
        pairs: Sequence[Pair],
        windows: TrainingWindows,
        device: torch.device,
        head: bool,
    ) -> Iterator[LiveTeacher]:
        """The teacher on the device, its blocks ready to tell what they gave; with its head, or without."""
        if self.count == 1:
            with placed(teacher, device), LiveTeacher(teacher, pairs, windows, head).installed() as live:
                yield live
            return
        model = copy.deepcopy(teacher).requires_grad_(False)
        blocks = find_moe_blocks(model)
        root = model if head else getattr(model, "base_model", model)
        self._shard(model.to(device), root, blocks, device, None)
        at_work = [replace(pair, teacher=block) for pair, block in zip(pairs, blocks, strict=True)]
        with LiveTeacher(model, at_work, windows, head).installed() as live:
            yield live

    def _shard(
        self,
        model: nn.Module,
        root: nn.Module,
        blocks: list[MoEBlock],
        device: torch.device,
        dtype: Any,
        everything: bool = False,
    ) -> None:
        """`dtype` is what float32 parameters compute in: those of the experts, or with `everything` all."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.count,))
        # gates are float32 whatever the weights are: inputs stay as they come
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        plain = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block.experts, mesh=mesh, mp_policy=policy if dtype is not None else plain)
        for layer in decoder_layers(model, blocks)[0]:
            fully_shard(layer, mesh=mesh, mp_policy=policy if everything else plain)
        fully_shard(root, mesh=mesh, mp_policy=policy if everything else plain)


def _parameters(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Those of these names."""
    return {name: each for name, each in model.named_parameters() if name in names}
