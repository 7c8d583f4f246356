"""How a model is put for a while: on a device, in evaluation mode, with other forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moesparse.errors import UsageError

__all__ = ["evaluating", "placed", "replaced_forwards"]


@contextmanager
def placed(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Have the model on `device` for the body; yields where its inputs belong."""
    home = next(model.parameters()).device
    if device is None or torch.device(device) == home:
        yield home
        return
    if len(getattr(model, "hf_device_map", {})) > 1:
        raise UsageError(f"device must be None for a model spread over several devices, got {device}")
    try:
        model.to(device)
        yield torch.device(device)
    finally:
        model.to(home)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the body; every module's own flag comes back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """The forward of the module at each position is `make(position)` for the body.

    What it was before comes back, also a function that somebody else had put in its place.
    """
    with ExitStack() as restore:
        for position, module in enumerate(modules):
            own = vars(module).get("forward")
            module.forward = make(position)
            restore.callback(_restore_forward, module, own)
        yield


def _restore_forward(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own
