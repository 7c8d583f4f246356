"""Remove whole experts from a model: its tensors, its router, its config, so that nothing of them is left.

Which tensors belong to experts is not guessed from names. The model is built twice without memory (on the meta
device), once from its own config and once from the config with the smaller count: whatever differs between the two,
tensor dimensions and integer attributes, depends on the number of experts. That finds fused weights, biases, router
rows, selection biases, per-expert scales and `out_features` alike, and proves beforehand that the saved folder will
load: its shapes are those that transformers builds from its config. What differs in a way this module cannot place is
refused by name, before anything is changed.

The pruned model computes what the whole one computes with the removed experts' router logits at -inf (and their
selection scores, where a router adds a bias to them).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.blocks import MoEBlock, find_moe_blocks
from moesparse.errors import UnsupportedModelError, UsageError

__all__ = [
    "BlockSurgery",
    "RemovalPlan",
    "RouterGroups",
    "SurgeryReport",
    "plan_removal",
    "remove_experts",
    "router_groups",
]

KEPT_KEY = "kept_experts"
"""In config.moesparse: {block name: ids the kept experts had in the dense model}, position = id now."""

# num_experts, num_local_experts, n_routed_experts, moe_num_experts: never num_experts_per_tok or n_shared_experts.
_COUNT_KEY = re.compile(r"(?:moe_)?(?:num|n)_(?:local_|routed_|moe_)?experts")
_GROUP_KEYS = ("n_group", "num_expert_group", "num_group")

# A table token id -> expert ids: values are experts, no dimension is.
_HASH_TABLES = ("tid2eid",)

# Routers with more rows than experts, the experts' first: inkling adds its shared experts, zaya one that skips.
_EXTRA_ROWS_LAST = ("inkling", "inkling_text", "zaya")


@dataclass(frozen=True)
class RouterGroups:
    """A router that first chooses groups of experts, then experts in them (DeepSeek-V3, arXiv 2412.19437).

    Attributes:
        count: groups; expert e of E is in group e // (E // count).
        top: groups a token may use.
        ranked_by: experts whose scores rank a group, so the fewest it may hold.
    """

    count: int
    top: int
    ranked_by: int

    def minimum(self, top_k: int) -> int:
        """The fewest experts a block may keep: every group equally many, and top_k in the groups a token uses."""
        return self.count * max(self.ranked_by, -(-top_k // self.top))


@dataclass(frozen=True)
class BlockSurgery:
    """What was done to one block.

    Attributes:
        name: of the block.
        before: experts it had.
        kept: their old ids, ascending; position = new id.
        tensors: name -> (shape before, shape after), names as in the model.
        rerouted: entries of a token -> expert table that pointed at removed experts.
    """

    name: str
    before: int
    kept: tuple[int, ...]
    tensors: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    rerouted: int = 0

    @property
    def removed(self) -> tuple[int, ...]:
        """Old ids of the removed experts, ascending."""
        kept = set(self.kept)
        return tuple(expert for expert in range(self.before) if expert not in kept)


@dataclass
class SurgeryReport:
    """What `remove_experts` did.

    Attributes:
        blocks: in forward order.
        config: "key" or "text_config.key" -> (value before, value after).
        bytes_before: of all parameters and buffers of the model.
        bytes_after: the same after the removal.
    """

    blocks: list[BlockSurgery]
    config: dict[str, tuple[Any, Any]]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "blocks": [
                {
                    "name": block.name,
                    "before": block.before,
                    "kept": list(block.kept),
                    "removed": list(block.removed),
                    "rerouted": block.rerouted,
                }
                for block in self.blocks
            ],
            "config": {key: list(change) for key, change in self.config.items()},
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class _Cut:
    """One tensor of a block and the dimensions to take the kept experts from."""

    module: str
    name: str
    dims: tuple[int, ...]

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class _Setting:
    """One attribute of a module (or of a config object) that says or follows from the number of experts."""

    owner: Any
    path: str
    before: Any
    after: Any


@dataclass
class RemovalPlan:
    """All that has to change, checked and not yet done.

    `apply` does everything. A driver that works layer by layer calls `apply_block` for each block and `finish` last;
    until `finish`, the config still says the old count.
    """

    model: nn.Module
    blocks: list[MoEBlock]
    kept: list[Tensor]
    cuts: list[list[_Cut]]
    tables: list[list[_Cut]]
    attributes: list[list[_Setting]]
    model_attributes: list[_Setting]
    config: list[_Setting]
    done: dict[int, BlockSurgery] = field(default_factory=dict)
    bytes_before: int = 0

    @torch.no_grad()
    def apply_block(self, position: int) -> BlockSurgery:
        """Remove the experts of one block. Costs one kept-size copy of its largest tensor on top of the model.

        Args:
            position: of the block among `blocks`.
        """
        block, kept = self.blocks[position], self.kept[position]
        rerouted = sum(self._rewrite_table(block, kept, table) for table in self.tables[position])
        tensors = {}
        for cut in self.cuts[position]:
            module = self.model.get_submodule(cut.module)
            old = _tensor(module, cut.name)
            new = old.detach()
            for dim in cut.dims:
                new = new.index_select(dim, _rows(kept, block.num_experts, new.shape[dim]).to(new.device))
            tensors[cut.path] = (tuple(old.shape), tuple(new.shape))
            _replace(module, cut.name, new)
        for setting in self.attributes[position]:
            _set(setting)
        done = BlockSurgery(block.name, block.num_experts, tuple(kept.tolist()), tensors, rerouted)
        self.done[position] = done
        return done

    @contextmanager
    def routing(self, position: int, kept: Tensor) -> Iterator[None]:
        """While the body runs, one block's router knows only `kept`, as many as planned; its experts are untouched.

        Args:
            position: of the block among `blocks`.
            kept: [K] ids, ascending.
        """
        block = self.blocks[position]
        cuts = [cut for cut in self.cuts[position] if not _inside(cut.path, block.name)]
        settings = [s for s in self.attributes[position] if not _inside(s.path, block.name)]
        old = [(cut, _tensor(self.model.get_submodule(cut.module), cut.name)) for cut in cuts]
        try:
            for cut, tensor in old:
                new = tensor.detach()
                for dim in cut.dims:
                    new = new.index_select(dim, _rows(kept, block.num_experts, new.shape[dim]).to(new.device))
                _replace(self.model.get_submodule(cut.module), cut.name, new)
            for setting in settings:
                _set(setting)
            yield
        finally:
            for cut, tensor in old:
                _restore(self.model.get_submodule(cut.module), cut.name, tensor)
            for setting in settings:
                setattr(setting.owner, setting.path.rpartition(".")[2], setting.before)

    def finish(self) -> SurgeryReport:
        """Set the config and the model's own attributes; every block must have been applied."""
        missing = [block.name for number, block in enumerate(self.blocks) if number not in self.done]
        assert not missing, f"not applied: {missing}"
        for setting in [*self.model_attributes, *self.config]:
            _set(setting)
        _record_kept(self.model, self.blocks, self.kept)
        changed = {setting.path: (setting.before, setting.after) for setting in self.config}
        blocks = [self.done[number] for number in range(len(self.blocks))]
        return SurgeryReport(blocks, changed, self.bytes_before, _size(self.model))

    def apply(self) -> SurgeryReport:
        """Remove the experts of every block, then set the config."""
        for position in range(len(self.blocks)):
            self.apply_block(position)
        return self.finish()

    def _rewrite_table(self, block: MoEBlock, kept: Tensor, table: _Cut) -> int:
        """Give the tokens of a removed expert to the kept one whose router row is most alike and not theirs already."""
        module = self.model.get_submodule(table.module)
        ids = _tensor(module, table.name)
        rows: Any = module.weight
        rows = torch.nn.functional.normalize(rows.detach()[: block.num_experts].double(), dim=-1)
        alike = rows @ rows.index_select(0, kept.to(rows.device)).T
        new_id = torch.full((block.num_experts,), -1, dtype=torch.int64, device=ids.device)
        new_id[kept.to(ids.device)] = torch.arange(len(kept), device=ids.device)
        new = new_id[ids.detach().long()]
        order = alike.argsort(dim=-1, descending=True, stable=True).to(ids.device)
        holes = (new < 0).nonzero()
        for row, slot in holes.tolist():
            taken = set(new[row].tolist())
            candidates = order[int(ids[row, slot])].tolist()
            new[row, slot] = next(candidate for candidate in candidates if candidate not in taken)
        _replace(module, table.name, new.to(ids.dtype))
        return len(holes)


def remove_experts(model: nn.Module, kept: Sequence[Tensor | Sequence[int]]) -> SurgeryReport:
    """Remove all experts but `kept` from a transformers model, in place.

    Fused weights, biases, the router's rows and selection biases, per-expert scales, token -> expert tables, module
    attributes and config keys follow; the kept tensors are copies, so the memory of the removed ones is free. Kept
    experts keep their order. In layers routed by a token -> expert table, the tokens of a removed expert go to the kept
    one with the most similar router row; everywhere else the result equals the whole model with the removed experts'
    router logits at -inf.

    Args:
        model: a transformers model in any floating dtype, on any device.
        kept: for each block in forward order the ids that stay, unique, [K] integers; K is the same in every block.

    Returns:
        What was done, with the bytes of the model before and after. config.moesparse["kept_experts"] maps new ids to
        old.

    Raises:
        UsageError: a count or an id that cannot be; fewer than top_k; unequal counts in a router's groups.
        UnsupportedModelError: a per-expert tensor that cannot be placed, or a config that cannot say the new count.
            Nothing is changed in either case.
    """
    return plan_removal(model, kept).apply()


def plan_removal(model: nn.Module, kept: Sequence[Tensor | Sequence[int]]) -> RemovalPlan:
    """Find and check all that `remove_experts` would change, and change nothing. Arguments and errors are its own."""
    blocks = find_moe_blocks(model)
    if len(kept) != len(blocks):
        raise UsageError(f"kept must name the experts of each of the {len(blocks)} blocks, got {len(kept)}")
    ids = [_check_kept(block, torch.as_tensor(entry)) for block, entry in zip(blocks, kept, strict=True)]
    groups = _groups_left(blocks, ids)
    counts = _new_counts(blocks, ids)
    config = _config_settings(model, counts, groups)
    cuts, attributes, model_attributes = _compare_twins(model, blocks, ids, config)
    return RemovalPlan(
        model=model,
        blocks=blocks,
        kept=ids,
        cuts=cuts,
        tables=[
            _tables(model, block) if len(entry) < block.num_experts else []
            for block, entry in zip(blocks, ids, strict=True)
        ],
        attributes=attributes,
        model_attributes=model_attributes,
        config=config,
        bytes_before=_size(model),
    )


def router_groups(block: MoEBlock) -> RouterGroups | None:
    """The groups a block's router is limited to; None when it chooses among all experts at once."""
    router = block.router
    count = next((getattr(router, key) for key in _GROUP_KEYS if isinstance(getattr(router, key, None), int)), 1)
    # DeepSeek-V2 has the numbers in its config and uses them with one of its methods only
    if count <= 1 or getattr(router, "topk_method", None) == "greedy":
        return None
    top = getattr(router, "topk_group", None)
    ranked_by = 1 if hasattr(router, "topk_method") else 2
    return RouterGroups(count, top if isinstance(top, int) else count, ranked_by)


def _check_kept(block: MoEBlock, kept: Tensor) -> Tensor:
    """The ids ascending on the CPU, or a UsageError that says what is wrong with them."""
    if kept.ndim != 1 or (len(kept) and (kept.dtype.is_floating_point or kept.dtype == torch.bool)):
        raise UsageError(
            f"kept of {block.name} must be a 1-D tensor of expert ids, got {kept.dtype} {list(kept.shape)}"
        )
    ids = kept.detach().cpu().to(torch.int64).sort().values
    if len(ids) == 0 or ids[0] < 0 or ids[-1] >= block.num_experts:
        got = "none" if len(ids) == 0 else f"{int(ids[0])} to {int(ids[-1])}"
        raise UsageError(f"kept of {block.name} must be experts from 0 to {block.num_experts - 1}, got {got}")
    if len(ids.unique()) != len(ids):
        raise UsageError(f"kept of {block.name} must name each expert once, got {kept.tolist()}")
    if block.top_k is not None and len(ids) < block.top_k:
        raise UsageError(
            f"kept of {block.name} must hold at least the {block.top_k} experts each token uses (top_k), got {len(ids)}"
        )
    return ids


def _groups_left(blocks: Sequence[MoEBlock], kept: Sequence[Tensor]) -> dict[int, int]:
    """Groups of the router before -> after; equal counts in every group that stays, or a UsageError."""
    left: dict[int, int] = {}
    for block, ids in zip(blocks, kept, strict=True):
        groups = router_groups(block)
        if groups is None or len(ids) == block.num_experts:
            continue
        counts = torch.bincount(ids // (block.num_experts // groups.count), minlength=groups.count)
        staying = counts[counts > 0]
        where = f"kept of {block.name}, whose router chooses {groups.top} of {groups.count} groups first,"
        if (staying != staying[0]).any():
            raise UsageError(f"{where} must hold equally many of each group, got {counts.tolist()}")
        if len(staying) < groups.top:
            raise UsageError(f"{where} must leave at least {groups.top} groups, got {len(staying)}")
        least = RouterGroups(len(staying), groups.top, groups.ranked_by).minimum(block.top_k or 1)
        if len(ids) < least:
            raise UsageError(f"{where} must hold at least {least} experts, got {len(ids)}")
        if left.setdefault(groups.count, len(staying)) != len(staying):
            raise UsageError(f"{where} must leave as many groups as the other blocks, got {len(staying)}")
    return {before: after for before, after in left.items() if before != after}


def _new_counts(blocks: Sequence[MoEBlock], kept: Sequence[Tensor]) -> dict[int, int]:
    """E before -> after; a transformers config has one count for all layers."""
    counts: dict[int, int] = {}
    for block, ids in zip(blocks, kept, strict=True):
        if counts.setdefault(block.num_experts, len(ids)) != len(ids):
            raise UsageError(
                f"kept must hold the same number of experts in every block, got {counts[block.num_experts]} and "
                f"{len(ids)} ({block.name}): the config of a transformers model has one count for all layers"
            )
    return {before: after for before, after in counts.items() if before != after}


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


def _config_settings(model: nn.Module, counts: dict[int, int], groups: dict[int, int]) -> list[_Setting]:
    settings = []
    for path, config in _configs(model):
        for key, value in list(vars(config).items()):
            new = value
            if _COUNT_KEY.fullmatch(key):
                new = _mapped(value, counts)
            elif key in _GROUP_KEYS:
                new = _mapped(value, groups)
            if new != value:
                settings.append(_Setting(config, f"{path}.{key}".lstrip("."), value, new))
    return settings


def _mapped(value: Any, new: dict[int, int]) -> Any:
    """A count replaced by its new value; lists hold one per layer or per kind of expert."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, new) for item in value)
    return new.get(value, value) if type(value) is int else value


def _compare_twins(
    model: nn.Module, blocks: Sequence[MoEBlock], kept: Sequence[Tensor], config: Sequence[_Setting]
) -> tuple[list[list[_Cut]], list[list[_Setting]], list[_Setting]]:
    """What depends on the number of experts: tensors and attributes of each block, and attributes outside blocks."""
    family = _family(model)
    cuts: list[list[_Cut]] = [[] for _ in blocks]
    attributes: list[list[_Setting]] = [[] for _ in blocks]
    model_attributes: list[_Setting] = []
    if all(len(ids) == block.num_experts for block, ids in zip(blocks, kept, strict=True)):
        return cuts, attributes, model_attributes
    dense = _twin(model, [])
    pruned = _twin(model, config)
    _check_same(family, model, dense)

    shapes = dict(_named_tensors(pruned))
    for path, before in _named_tensors(dense):
        after = shapes.get(path)
        if after is None or after.ndim != before.ndim:
            raise UnsupportedModelError(f"{family}: {path} has another form with fewer experts, so it cannot be cut")
        dims = tuple(d for d in range(before.ndim) if before.shape[d] != after.shape[d])
        if not dims:
            continue
        position = _owner(family, blocks, path, before.shape)
        _check_dims(family, blocks[position], len(kept[position]), path, before, after, dims)
        module, _, name = path.rpartition(".")
        cuts[position].append(_Cut(module, name, dims))

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
            setting = _Setting(modules[path], f"{path}.{key}".lstrip("."), before_value, after_value)
            inside = [n for n, block in enumerate(blocks) if _inside(path, block.moe_name)]
            (attributes[inside[0]] if inside else model_attributes).append(setting)

    for block, ids, found in zip(blocks, kept, cuts, strict=True):
        have = {cut.path for cut in found}
        for matrix in block.matrices:
            if len(ids) < block.num_experts and f"{block.name}.{matrix.name}" not in have:
                raise UnsupportedModelError(
                    f"{family}: no key of its config was found to set the number of experts of {block.name} "
                    f"({block.num_experts}); looked for names like num_local_experts, n_routed_experts"
                )
    return cuts, attributes, model_attributes


def _twin(model: nn.Module, settings: Sequence[_Setting]) -> nn.Module:
    """The model as transformers builds it from its config with `settings` changed, on the meta device."""
    build: Any = getattr(type(model), "_from_config", None)
    family = _family(model)
    if build is None:
        raise UnsupportedModelError(f"{family}: model must be a transformers model, got {type(model).__name__}")
    memo: dict[int, Any] = {}
    config = copy.deepcopy(model.config, memo)
    for setting in settings:
        # a config object that only a submodule holds is rebuilt from the model's own
        if id(setting.owner) in memo:
            setattr(memo[id(setting.owner)], setting.path.rpartition(".")[2], setting.after)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return build(config)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        changes = ", ".join(f"{s.path}={s.after}" for s in settings) or "its own config"
        raise UnsupportedModelError(
            f"{family}: transformers cannot build the model from {changes}: {reason}"
        ) from error


def _check_same(family: str, model: nn.Module, twin: nn.Module) -> None:
    mine = {name: tuple(tensor.shape) for name, tensor in _named_tensors(model)}
    built = {name: tuple(tensor.shape) for name, tensor in _named_tensors(twin)}
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
        inside = [number for number, prefix in enumerate(prefixes) if _inside(path, prefix)]
        if len(inside) == 1:
            return inside[0]
    raise UnsupportedModelError(
        f"{family}: {path} {list(shape)} depends on the number of experts and belongs to no single block"
    )


def _tables(model: nn.Module, block: MoEBlock) -> list[_Cut]:
    """Integer tensors beside the experts hold expert ids: known tables, or a refusal."""
    family = _family(model)
    scope = [(block.moe_name, block.moe, False)]
    if block.router is not None:
        scope.append((block.router_name or "", block.router, True))
    tables: dict[str, _Cut] = {}
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
            tables[path] = _Cut(owner, last, ())
    return list(tables.values())


def _rows(kept: Tensor, num_experts: int, length: int) -> Tensor:
    """Rows to keep of a dimension with one row per expert and, in a few routers, others after them."""
    return torch.cat([kept, torch.arange(num_experts, length)])


def _record_kept(model: nn.Module, blocks: Sequence[MoEBlock], kept: Sequence[Tensor]) -> None:
    """Note the kept experts' ids of the dense model in the config, through earlier removals."""
    config: Any = model.config
    entry = dict(getattr(config, "moesparse", None) or {})
    earlier = entry.get(KEPT_KEY) or {}
    entry[KEPT_KEY] = {
        block.name: [earlier[block.name][i] for i in ids.tolist()] if block.name in earlier else ids.tolist()
        for block, ids in zip(blocks, kept, strict=True)
    }
    config.moesparse = entry


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _tensor(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters.get(name)
    tensor = module._buffers[name] if parameter is None else parameter
    assert tensor is not None
    return tensor


def _replace(module: nn.Module, name: str, new: Tensor) -> None:
    old = module._parameters.get(name)
    if old is None:
        module._buffers[name] = new
    else:
        module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def _restore(module: nn.Module, name: str, old: Tensor) -> None:
    """Put the very tensor back."""
    if isinstance(old, nn.Parameter):
        module._parameters[name] = old
    else:
        module._buffers[name] = old


def _set(setting: _Setting) -> None:
    setattr(setting.owner, setting.path.rpartition(".")[2], setting.after)


def _is_count(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(type(item) is int for item in value)
    return type(value) is int


def _inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _named_tensors(model))


def _family(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
