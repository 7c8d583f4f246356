"""Layers that have another number of experts each, as `per_layer_config` in config.json says it.

That key is transformers' own (its docs/source/en/heterogeneous_configurations.md, written with NVIDIA): layer number ->
the settings that differ there, {"3": {"num_local_experts": 6}}; the setting itself is that of all other layers. Its
configs read the key, and its models do not: they ask for the one number, and the config raises an error. `register`
has a model's layers built from their own numbers. It takes in two methods of PreTrainedModel, its `__init__` and
`post_init`, and leaves models whose layers have equal numbers as they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.models.blocks import MoEBlock

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "COUNT_KEY",
    "PER_LAYER",
    "by_layer",
    "check_built_once",
    "check_equal_counts",
    "has_layer_counts",
    "overrides",
    "register",
    "unregistered",
]

# num_experts, num_local_experts, n_routed_experts, moe_num_experts: never num_experts_per_tok or n_shared_experts.
COUNT_KEY = re.compile(r"(?:moe_)?(?:num|n)_(?:local_|routed_|moe_)?experts")

PER_LAYER = "per_layer_config"

_ASKS = re.compile(rf"\bself\.config\.{COUNT_KEY.pattern}\b")

# how the classes of transformers call the number of the layer that they are built for
_LAYER = "layer_idx"
_REGISTERED = "_moesparse_layer_counts"
_OPENED = "_moesparse_opened"
_off: list[bool] = []


def overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> what `per_layer_config` says of it; {} where a config has none."""
    spec = getattr(config, "__dict__", {}).get("_heterogeneity_spec")
    return {} if spec is None else copy.deepcopy(spec.per_layer_overrides)


def has_layer_counts(config: Any) -> bool:
    """Whether a config gives some layer a number of experts of its own."""
    return any(COUNT_KEY.fullmatch(key) for own in overrides(config).values() for key in own)


def by_layer(config: Any, key: str, counts: Mapping[int, int], others: int) -> dict[int, dict[str, Any]] | None:
    """The `per_layer_config` of a config whose layers get other numbers of experts.

    Args:
        config: what else it says of layers stays.
        key: that has the number.
        counts: layer -> experts.
        others: what `key` itself says.

    Returns:
        Layer -> settings, of the layers that have any; None where there are none.
    """
    found = {
        layer: {name: value for name, value in own.items() if name != key} for layer, own in overrides(config).items()
    }
    for layer, count in counts.items():
        if count != others:
            found.setdefault(layer, {})[key] = count
    return {layer: own for layer, own in sorted(found.items()) if own} or None


def check_equal_counts(blocks: Sequence[MoEBlock]) -> None:
    """Refuse a model whose layers differ where experts are to be removed: how many would stay has one number before.

    Raises:
        UsageError: names the numbers.
    """
    counts = sorted({block.num_experts for block in blocks})
    if len(counts) > 1:
        raise UsageError(
            "model must have the same number of experts in every layer for some to be removed, got "
            f"{', '.join(map(str, counts))}: remove them from the model it was made of"
        )


def check_built_once(blocks: Sequence[MoEBlock]) -> None:
    """Refuse a model that asks its config for the number of experts while it runs, which layers of several cannot have.

    Raises:
        UnsupportedModelError: names the module.
    """
    for block in blocks:
        for module in block.moe.modules():
            with contextlib.suppress(OSError, TypeError):
                found = _ASKS.search(inspect.getsource(type(module).forward))
                if found:
                    raise UnsupportedModelError(
                        f"{block.name} must have its number of experts from when it was built for layers to keep "
                        f"different ones, got {type(module).__name__}, which asks for {found[0]} whenever it runs"
                    )


def register() -> None:
    """Have transformers build models by the numbers of their layers, from now on."""
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel, _REGISTERED):
        return
    build, end = PreTrainedModel.__init__, PreTrainedModel.post_init

    @functools.wraps(build)
    def made(self: Any, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        opened = [] if _off else _open(config)
        build(self, config, *inputs, **kwargs)
        if opened:
            vars(self)[_OPENED] = opened
        if not _off and has_layer_counts(config):
            _wrap_layers(type(self).__module__)

    @functools.wraps(end)
    def ended(self: Any) -> None:
        end(self)
        for spec, keys in vars(self).pop(_OPENED, ()):
            spec.per_layer_attributes |= keys

    PreTrainedModel.__init__ = made  # type: ignore[method-assign]
    PreTrainedModel.post_init = ended  # type: ignore[method-assign]
    setattr(PreTrainedModel, _REGISTERED, True)


@contextlib.contextmanager
def unregistered() -> Iterator[None]:
    """For the body, transformers builds models as it does without `register`."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()


def _open(config: Any) -> list[tuple[Any, set[str]]]:
    """Let a model that is built ask a config for the one number of experts; what `post_init` takes back again."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    opened = []
    for part in parts:
        spec = getattr(part, "__dict__", {}).get("_heterogeneity_spec")
        attributes: set[str] = set() if spec is None else spec.per_layer_attributes
        keys = {key for key in attributes if COUNT_KEY.fullmatch(key)}
        if spec is not None and keys:
            spec.per_layer_attributes -= keys
            opened.append((spec, keys))
    return opened


def _wrap_layers(module: str) -> None:
    """Have the classes of a file that are built for a layer take the config of that layer, once."""
    for kind in list(vars(sys.modules[module]).values()):
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module:
            build = vars(kind).get("__init__")
            if build is None or hasattr(build, _REGISTERED):
                continue
            if {"config", _LAYER} <= inspect.signature(build).parameters.keys():
                setattr(kind, "__init__", _of_layer(build))  # noqa: B010


def _of_layer(build: Any) -> Any:
    signature = inspect.signature(build)

    @functools.wraps(build)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        config, layer = given.arguments["config"], given.arguments.get(_LAYER)
        if _off or layer is None or not has_layer_counts(config):
            build(self, *args, **kwargs)
            return
        own = given.arguments["config"] = _layer_config(config, layer)
        build(*given.args, **given.kwargs)
        # what is set on the model's config later, such as how experts are run, holds for every layer
        for module in self.modules():
            if vars(module).get("config") is own:
                module.config = config

    setattr(made, _REGISTERED, True)
    return made


def _layer_config(config: Any, layer: int) -> Any:
    """The config of one layer; what else may differ by layer stays as the model's config says it."""
    own, all_of_them = copy.copy(config), overrides(config)
    rest = {
        number: {key: value for key, value in said.items() if not COUNT_KEY.fullmatch(key)}
        for number, said in all_of_them.items()
    }
    own.per_layer_config = {number: said for number, said in rest.items() if said} or None
    for key, value in all_of_them.get(layer, {}).items():
        if COUNT_KEY.fullmatch(key):
            setattr(own, key, value)
    return own
