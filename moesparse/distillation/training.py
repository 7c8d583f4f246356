"""AdamW on weights whose zeros stay: masters in float32, a cosine, masks held at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moesparse.distillation.settings import Settings
from moesparse.errors import MoESparseError, UnsupportedModelError
from moesparse.models.blocks import MoEBlock

__all__ = ["Trainer", "expert_parameters", "local", "master_weights", "router_parameters", "windows_of_step"]

_OTHERS = 0.1


def expert_parameters(blocks: Sequence[MoEBlock]) -> dict[str, nn.Parameter]:
    """The expert matrices of some blocks, by their names in the model."""
    return {f"{block.name}.{matrix.name}": matrix.parameter for block in blocks for matrix in block.matrices}


def router_parameters(blocks: Sequence[MoEBlock]) -> dict[str, nn.Parameter]:
    """The parameters of the routers of some blocks, by their names in the model.

    A correction that is only added to choose experts gets no gradient, and stays.

    Raises:
        UnsupportedModelError: a block whose router cannot be told apart; names it.
    """
    found: dict[str, nn.Parameter] = {}
    for block in blocks:
        if block.router is None:
            raise UnsupportedModelError(f"{block.name} must have a router that can be told apart to train it, got none")
        named = block.router.named_parameters()
        found |= {f"{block.router_name}.{name}": each for name, each in named if each.is_floating_point()}
    return found


def windows_of_step(step: int, windows: int, settings: Settings) -> Tensor:
    """Numbers of the windows of one step, [batch_size]; an epoch's last step is filled up from its beginning.

    Drawn from the seed and the epoch alone, so that a run can be resumed at any step.
    """
    steps = math.ceil(windows / settings.batch_size)
    epoch, position = divmod(step, steps)
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    order = torch.randperm(windows, generator=generator)
    wanted = torch.arange(position * settings.batch_size, (position + 1) * settings.batch_size)
    return order[wanted % windows]


@contextmanager
def master_weights(
    model: nn.Module, trained: Mapping[str, nn.Parameter], held: Collection[str] | None = None
) -> Iterator[None]:
    """While the body runs, `trained` are float32 and take gradients, and no other parameter of the model does.

    Args:
        model: that has them.
        trained: by name.
        held: names of expert matrices, which are cast where they are used; all when None. To its modules the model's
            other parameters look as they did: float32 ones are cast whenever a module reads them.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    dtypes = {name: parameter.dtype for name, parameter in trained.items()}
    others = {id(parameter) for name, parameter in trained.items() if held is not None and name not in held}
    cast = [
        (module, name, parameter.dtype)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in others and parameter.dtype != torch.float32
    ]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for module, name, dtype in cast:
        # unsafe: torch holds a change of dtype to be a mistake
        parametrize.register_parametrization(module, name, _Cast(dtype), unsafe=True)
    try:
        yield
    finally:
        for module, name, _ in cast:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for name, parameter in trained.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Cast(nn.Module):
    """A float32 parameter in the dtype that its module computes in; gradients come back in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype)


class Trainer:
    """Steps of AdamW on some parameters; what is zero at the start is zero after every step.

    Holds, beside parameters and gradients, two float32 moments of their size and bool masks.

    Args:
        parameters: by name, float32, whole or sharded (DTensor).
        settings: rates and limits.
        steps: in all; the learning rate falls to zero over them.
        held: names of those whose zeros stay; all when None. The others train at a tenth of the rate beside them:
            nothing was cut from them, and a rate for what was cut moves them too far. Alone they train at the rate.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Settings,
        steps: int,
        held: Collection[str] | None = None,
    ) -> None:
        names = list(parameters if held is None else held)
        others = [name for name in parameters if name not in names]
        self._parameters = {name: parameters[name] for name in names + others}
        self._settings = settings
        self._steps = steps
        self.step_number = 0
        self.masks = {name: local(parameters[name]) != 0 for name in names}
        groups = [
            {"params": [parameters[name] for name in group], "share": share}
            for group, share in ((names, 1.0), (others, _OTHERS if names else 1.0))
            if group
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step_number / self._steps))

    @torch.no_grad()
    def step(self) -> float:
        """One step with the gradients that are there; they are cleared.

        Returns:
            Norm of the gradient over the weights that are not masked, before it is clipped.

        Raises:
            MoESparseError: the gradient is not finite; no weight has changed.
        """
        for name, mask in self.masks.items():
            # a pruned weight's gradient must neither count in the norm nor gather momentum
            local(self._parameters[name].grad).mul_(mask)
        norm: Any = nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise MoESparseError(
                f"the gradient must be finite, got {norm} at step {self.step_number}; lower the learning rate"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * group["share"]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for name, mask in self.masks.items():
            local(self._parameters[name]).mul_(mask)
        self.step_number += 1
        return norm

    def lost_zeros(self) -> dict[str, int]:
        """Weights that were zero at the start and are not now, by parameter; empty when the masks were held."""
        counts = {
            name: int((local(self._parameters[name].detach()) != 0)[~mask].sum()) for name, mask in self.masks.items()
        }
        return {name: count for name, count in counts.items() if count}

    def state(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Any]:
        """Weights, moments and step, on the CPU.

        Args:
            whole: makes a sharded tensor whole; every process must call.
        """
        names = list(self._parameters)
        held = self._optimizer.state_dict()["state"]
        return {
            "step": self.step_number,
            "weights": {name: whole(p.detach()).cpu().clone() for name, p in self._parameters.items()},
            "moments": {
                names[number]: {key: whole(value).cpu().clone() for key, value in entry.items()}
                for number, entry in held.items()
            },
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any], shard: Callable[[Tensor, nn.Parameter], Tensor] | None = None) -> None:
        """Go on from a `state`; `shard` cuts a whole tensor to fit a parameter."""

        def fitted(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
            if tensor.ndim == 0:
                return tensor
            return tensor.to(parameter.device) if shard is None else shard(tensor, parameter)

        self.step_number = state["step"]
        for name, parameter in self._parameters.items():
            parameter.copy_(fitted(state["weights"][name], parameter))
        entries = {
            number: {key: fitted(value, parameter) for key, value in state["moments"][name].items()}
            for number, (name, parameter) in enumerate(self._parameters.items())
            if name in state["moments"]
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor; the tensor itself when it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
