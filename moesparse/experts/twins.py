"""What in a model depends on its number of experts, found by comparing it with twins built without memory.

The model is built twice on the meta device, from its own config and from the config with the smaller count: whatever
differs between the two depends on the number of experts. `moesparse.experts.surgery` cuts what is found here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.errors import UnsupportedModelError, reason_of
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.models.layer_counts import COUNT_KEY, PER_LAYER, by_layer, overrides, unregistered
from moesparse.models.next_token import attach, attached

__all__ = [
    "GROUP_KEYS",
    "Cut",
    "Setting",
    "compare_twins",
    "config_settings",
    "expert_tables",
    "inside",
    "named_tensors",
    "said_without_us",
]

GROUP_KEYS = ("n_group", "num_expert_group", "num_group")

# A table token id -> expert ids: values are experts, no dimension is.
_HASH_TABLES = ("tid2eid",)

# Routers with more rows than experts, the experts' first: inkling adds its shared experts, zaya one that skips.
_EXTRA_ROWS_LAST = ("inkling", "inkling_text", "zaya")


@dataclass(frozen=True)
class Cut:
    """One tensor of a block and the dimensions to take the kept experts from."""

    module: str
    name: str
    dims: tuple[int, ...]

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Setting:
    """One attribute of a module (or of a config object) that says or follows from the number of experts."""

    owner: Any
    path: str
    before: Any
    after: Any


def _configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every config object the model reads, with its path from model.config ("" for itself); each once."""
    seen: set[int] = set()

    def walk(path: str, config: Any) -> Iterator[tuple[str, Any]]:
        if id(config) in seen or not hasattr(config, "to_diff_dict"):
            return
        seen.add(id(config))
        yield path, config
        for name, value in list(vars(config).items()):
            yield from walk(f"{path}.{name}".lstrip("."), value)

    yield from walk("", getattr(model, "config", None))
    for name, module in model.named_modules():
        # a copy that a submodule was built with: its settings must follow too
        yield from walk(f"{name}.config", vars(module).get("config"))


def config_settings(
    model: nn.Module, counts: dict[int, int], groups: dict[int, int], layers: Mapping[int, int] | None = None
) -> list[Setting]:
    """What of the model's configs changes.

    Args:
        model: as it is.
        counts: experts of a block before -> after; with `layers` the most that stay in one.
        groups: of the router before -> after.
        layers: decoder layer -> experts after, where they are not equally many; None where they are.
    """
    settings = []
    for path, config in _configs(model):
        for key, value in list(vars(config).items()):
            new, where = value, f"{path}.{key}".lstrip(".")
            if COUNT_KEY.fullmatch(key):
                new = _mapped(value, counts)
            elif key in GROUP_KEYS:
                new = _mapped(value, groups)
            if new != value:
                settings.append(Setting(config, where, value, new))
            if layers is not None and COUNT_KEY.fullmatch(key) and type(value) is int and value in counts:
                said = by_layer(config, key, layers, new)
                place = f"{path}.{PER_LAYER}".lstrip(".")
                # behind the count of all others: transformers leaves out what equals that
                settings.append(Setting(config, place, overrides(config) or None, said))
    return settings


def _mapped(value: Any, new: dict[int, int]) -> Any:
    """A count replaced by its new value; lists hold one per layer or per kind of expert."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, new) for item in value)
    return new.get(value, value) if type(value) is int else value


def compare_twins(
    model: nn.Module, blocks: Sequence[MoEBlock], kept: Sequence[Tensor], config: Sequence[Setting]
) -> tuple[list[list[Cut]], list[list[Setting]], list[Setting]]:
    """What depends on the number of experts: tensors and attributes of each block, and attributes outside blocks."""
    family = _family(model)
    cuts: list[list[Cut]] = [[] for _ in blocks]
    attributes: list[list[Setting]] = [[] for _ in blocks]
    model_attributes: list[Setting] = []
    if all(len(ids) == block.num_experts for block, ids in zip(blocks, kept, strict=True)):
        return cuts, attributes, model_attributes
    dense = _twin(model, [])
    pruned = _twin(model, config)
    _check_same(family, model, dense)

    shapes = dict(named_tensors(pruned))
    for path, before in named_tensors(dense):
        after = shapes.get(path)
        if after is None or after.ndim != before.ndim:
            raise UnsupportedModelError(f"{family}: {path} has another form with fewer experts, so it cannot be cut")
        dims = tuple(d for d in range(before.ndim) if before.shape[d] != after.shape[d])
        if not dims:
            continue
        position = _owner(family, blocks, path, before.shape)
        _check_dims(family, blocks[position], len(kept[position]), path, before, after, dims)
        module, _, name = path.rpartition(".")
        cuts[position].append(Cut(module, name, dims))

    modules = dict(model.named_modules())
    twins = dict(pruned.named_modules())
    for path, module in dense.named_modules():
        for key, before_value in vars(module).items():
            after_value = vars(twins[path]).get(key)
            if not _is_count(before_value) or before_value == after_value:
                continue
            actual = vars(modules[path]).get(key)
            if actual != before_value:
                raise UnsupportedModelError(
                    f"{family}: {path}.{key} must be {before_value} as its config says, got {actual}"
                )
            setting = Setting(modules[path], f"{path}.{key}".lstrip("."), before_value, after_value)
            within = [n for n, block in enumerate(blocks) if inside(path, block.moe_name)]
            (attributes[within[0]] if within else model_attributes).append(setting)

    for block, ids, found in zip(blocks, kept, cuts, strict=True):
        have = {cut.path for cut in found}
        for matrix in block.matrices:
            if len(ids) < block.num_experts and f"{block.name}.{matrix.name}" not in have:
                raise UnsupportedModelError(
                    f"{family}: no key of its config was found to set the number of experts of {block.name} "
                    f"({block.num_experts}); looked for names like num_local_experts, n_routed_experts"
                )
    return cuts, attributes, model_attributes


def _twin(model: nn.Module, settings: Sequence[Setting]) -> nn.Module:
    """The model as transformers builds it from its config with `settings` changed, on the meta device."""
    build: Any = getattr(type(model), "_from_config", None)
    family = _family(model)
    if build is None:
        raise UnsupportedModelError(f"{family}: model must be a transformers model, got {type(model).__name__}")
    memo: dict[int, Any] = {}
    config = copy.deepcopy(model.config, memo)
    try:
        for setting in settings:
            # a config object that only a submodule holds is rebuilt from the model's own
            if id(setting.owner) in memo:
                setattr(memo[id(setting.owner)], setting.path.rpartition(".")[2], setting.after)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            twin = build(config)
            if (further := attached(model)) is not None:
                attach(twin, further)
            return twin
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        changes = ", ".join(f"{s.path}={s.after}" for s in settings) or "its own config"
        raise UnsupportedModelError(
            f"{family}: transformers cannot build the model from {changes}: {reason}"
        ) from error


def said_without_us(model: nn.Module, config: Sequence[Setting], counts: Sequence[int]) -> str:
    """What keeps the installed transformers, by itself, from building a model as it will be; "" where nothing does.

    Args:
        model: as it is; it is built from its config on the meta device, and not loaded.
        config: what changes of its config.
        counts: experts that stay in each block.
    """
    try:
        with unregistered():
            built = [block.num_experts for block in find_moe_blocks(_twin(model, config))]
    except UnsupportedModelError as error:
        cause = error.__cause__ or error
        # transformers says in further sentences what code might do
        return f"{type(cause).__name__}: {reason_of(cause).partition('. ')[0]}"
    return "" if built == list(counts) else f"it builds layers of {', '.join(map(str, built))} experts"


def _check_same(family: str, model: nn.Module, twin: nn.Module) -> None:
    mine = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    built = {name: tuple(tensor.shape) for name, tensor in named_tensors(twin)}
    # a head that a checkpoint holds beside tied embeddings, and that differs from them, is a tensor of its own
    for name in getattr(twin, "all_tied_weights_keys", None) or {}:
        if name in mine and name not in built:
            built[name] = tuple(twin.get_parameter(name).shape)
    for name in [*mine, *built]:
        if mine.get(name) != built.get(name):
            raise UnsupportedModelError(
                f"{family}: {name} must be {built.get(name, 'absent')} as built from the config, got "
                f"{mine.get(name, 'none')}; merge adapters and undo changes to the model first"
            )


def _check_dims(
    family: str, block: MoEBlock, count: int, path: str, before: Tensor, after: Tensor, dims: Sequence[int]
) -> None:
    for dim in dims:
        exact = (before.shape[dim], after.shape[dim]) == (block.num_experts, count)
        extra = before.shape[dim] - block.num_experts
        known = family in _EXTRA_ROWS_LAST and extra > 0 and after.shape[dim] == count + extra
        if not exact and not known:
            raise UnsupportedModelError(
                f"{family}: {path} {list(before.shape)} becomes {list(after.shape)} with {count} of "
                f"{block.num_experts} experts, so which of its rows belong to which expert is not known"
            )


def _owner(family: str, blocks: Sequence[MoEBlock], path: str, shape: torch.Size) -> int:
    """Position of the block a per-expert tensor belongs to: by its MoE module, else by its layer."""
    for prefixes in ([block.moe_name for block in blocks], [block.layer for block in blocks]):
        within = [number for number, prefix in enumerate(prefixes) if inside(path, prefix)]
        if len(within) == 1:
            return within[0]
    raise UnsupportedModelError(
        f"{family}: {path} {list(shape)} depends on the number of experts and belongs to no single block"
    )


def expert_tables(model: nn.Module, block: MoEBlock) -> list[Cut]:
    """Integer tensors beside the experts hold expert ids: known tables, or a refusal."""
    family = _family(model)
    scope = [(block.moe_name, block.moe, False)]
    if block.router is not None:
        scope.append((block.router_name or "", block.router, True))
    tables: dict[str, Cut] = {}
    for prefix, module, recurse in scope:
        for name, tensor in [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]:
            if tensor.dtype.is_floating_point or tensor.numel() < 2:
                continue
            path = f"{prefix}.{name}".lstrip(".")
            owner, _, last = path.rpartition(".")
            if last not in _HASH_TABLES or tensor.ndim != 2 or not hasattr(model.get_submodule(owner), "weight"):
                raise UnsupportedModelError(
                    f"{family}: {path} holds {str(tensor.dtype).removeprefix('torch.')} values beside the experts; "
                    f"whether they are expert ids is not known (a table must be called {' or '.join(_HASH_TABLES)})"
                )
            tables[path] = Cut(owner, last, ())
    return list(tables.values())


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _is_count(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(type(item) is int for item in value)
    return type(value) is int


def inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


def _family(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
