"""Have one block's experts run by a function of ours, or watched; its siblings and the shared config are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moesparse.errors import UsageError
from moesparse.models.blocks import MoEBlock

__all__ = ["ExpertsFunction", "experts_run_by", "experts_watched"]

_IMPLEMENTATION = "moesparse_function"
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")

ExpertsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]; ids of E and above mark empty slots."""


@contextmanager
def experts_run_by(block: MoEBlock, function: ExpertsFunction) -> Iterator[None]:
    """While the body runs, calls of the block's experts are calls of `function`.

    Leaving the context, also by an exception, leaves nothing behind.

    Args:
        block: its experts module is dispatched by transformers' ExpertsInterface.
        function: what computes the experts.

    Raises:
        UsageError: another function has the block already.
    """
    experts: Any = block.experts
    config = experts.config
    if isinstance(config, _Substitute):
        raise UsageError(f"a block must have one recorder at a time, got a second one for {block.name}")
    _register()
    experts.config = _Substitute(config, function)
    try:
        yield
    finally:
        experts.config = config


@contextmanager
def experts_watched(block: MoEBlock, note: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """While the body runs, `note` is told of every run of the block's experts, which compute as they always do.

    Args:
        block: to watch.
        note: called with hidden states [T, H], ids [T, K], gates [T, K] and the output [T, H].
    """

    def told(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        values = [*args, *(kwargs[name] for name in _ARGUMENTS[len(args) :])]
        note(values[0], values[1], values[2], output)

    handle = block.experts.register_forward_hook(told, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Substitute:
    """Stands in for the config of one experts module, so that it alone is dispatched to our function.

    The real config is shared by all blocks, so naming our function there would send every block to it.
    """

    _experts_implementation = _IMPLEMENTATION

    def __init__(self, config: Any, function: ExpertsFunction) -> None:
        self._original = config
        self.function = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _register() -> None:
    """Make the dispatching function known to transformers; it finds the block's own in the module's config."""
    from transformers.integrations.moe import ExpertsInterface

    if _IMPLEMENTATION not in ExpertsInterface._global_mapping:
        ExpertsInterface.register(_IMPLEMENTATION, _call)


def _call(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return self.config.function(hidden_states, top_k_index, top_k_weights)
