"""How a model is put for a while: on a device, in evaluation mode, with other forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moesparse.errors import UsageError

__all__ = ["evaluating", "fits_grouped_mm", "let_experts_run", "placed", "replaced_forwards"]

# torch's grouped_mm takes rows that lie this many bytes apart, or a multiple of it
_GROUPED_MM_BYTES = 16
_EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


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


def fits_grouped_mm(weight: torch.Tensor) -> bool:
    """Whether torch's grouped_mm takes a stack of matrices [E, a, b], and rows of a and of b numbers."""
    return all(size * weight.dtype.itemsize % _GROUPED_MM_BYTES == 0 for size in weight.shape[1:])


def let_experts_run(model: nn.Module) -> None:
    """Have a transformers model run its experts one by one, if its sizes are none that grouped_mm takes.

    With the default it could not run at all; it stays so set, and nothing of it is saved with the model.
    """
    of_experts: Any = getattr(model, "get_experts_implementation", None)
    if of_experts is None or "grouped_mm" not in of_experts().values():
        return
    matrices = (tensor for name, tensor in model.named_parameters() if name.rpartition(".")[2] in _EXPERT_MATRICES)
    if not all(fits_grouped_mm(matrix) for matrix in matrices if matrix.dim() == 3):
        model.set_experts_implementation("eager")  # type: ignore[operator]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the body; every module's own flag comes back. Experts of any size run."""
    let_experts_run(model)
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
