"""Remove whole experts from a model: its tensors, its router, its config, so that nothing of them is left.

Which tensors belong to experts is not guessed from names. The model is built twice without memory (on the meta
device), once from its own config and once from the config with the smaller count: whatever differs between the two,
tensor dimensions and integer attributes, depends on the number of experts (`moesparse.experts.twins`). That finds fused
weights, biases, router rows, selection biases, per-expert scales and `out_features` alike, and proves beforehand that
the saved folder will load: its shapes are those that transformers builds from its config. What differs in a way this
module cannot place is refused by name, before anything is changed.

The pruned model computes what the whole one computes with the removed experts' router logits at -inf (and their
selection scores, where a router adds a bias to them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moesparse._version import __version__
from moesparse.errors import UsageError
from moesparse.experts.ask_vllm import NOT_KNOWN, ask_vllm, installed_vllm
from moesparse.experts.merging import Merged
from moesparse.experts.router_groups import groups_left
from moesparse.experts.twins import (
    Cut,
    Setting,
    compare_twins,
    config_settings,
    expert_tables,
    inside,
    named_tensors,
    said_without_us,
)
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.models.layer_counts import check_built_once, check_equal_counts
from moesparse.models.next_token import attached

__all__ = [
    "BlockSurgery",
    "RemovalPlan",
    "SurgeryReport",
    "plan_removal",
    "remove_experts",
    "say_readers",
]

KEPT_KEY = "kept_experts"
"""In config.moesparse: {block name: ids the kept experts had in the dense model}, position = id now."""


@dataclass(frozen=True)
class BlockSurgery:
    """What was done to one block.

    Attributes:
        name: of the block.
        before: experts it had.
        kept: their old ids, ascending; position = new id.
        tensors: name -> (shape before, shape after), names as in the model.
        rerouted: entries of a token -> expert table that pointed at removed experts.
        merged: of the kept, those that stand for several.
        rounding: what quantising the merged ones has cost, `moesparse.models.formats.rounding.Rounding` as JSON; None
            where they are stored as they are, or a refit says it.
    """

    name: str
    before: int
    kept: tuple[int, ...]
    tensors: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    rerouted: int = 0
    merged: tuple[Merged, ...] = ()
    rounding: dict[str, float] | None = None

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
        readers: where layers keep different numbers of experts, who builds them so: `RemovalPlan.readers`.
    """

    blocks: list[BlockSurgery]
    config: dict[str, tuple[Any, Any]]
    bytes_before: int
    bytes_after: int
    readers: dict[str, str] = field(default_factory=dict)

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
                    **({"merged": [each.summary() for each in block.merged]} if block.merged else {}),
                    **({"rounding": block.rounding} if block.rounding else {}),
                }
                for block in self.blocks
            ],
            "config": {key: list(change) for key, change in self.config.items()},
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            **({"readers": self.readers} if self.readers else {}),
        }


@dataclass
class RemovalPlan:
    """All that has to change, checked and not yet done.

    `apply` does everything. A driver that works layer by layer calls `apply_block` for each block and `finish` last;
    until `finish`, the config still says the old count.
    """

    model: nn.Module
    blocks: list[MoEBlock]
    kept: list[Tensor]
    cuts: list[list[Cut]]
    tables: list[list[Cut]]
    attributes: list[list[Setting]]
    model_attributes: list[Setting]
    config: list[Setting]
    done: dict[int, BlockSurgery] = field(default_factory=dict)
    bytes_before: int = 0
    merged: dict[int, tuple[Merged, ...]] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Experts that stay in each block."""
        return [len(ids) for ids in self.kept]

    def readers(self) -> dict[str, str]:
        """Who builds layers of different counts: name and version -> "", or what keeps it from that.

        Asked of what is installed here, and read from no table; {} where every layer keeps equally many. vLLM, where it
        is installed, is asked once and takes a minute; where it could not be asked, the reason begins with NOT_KNOWN.
        """
        if len(set(self.counts)) == 1:
            return {}
        import transformers

        said = said_without_us(self.model, self.config, self.counts)
        found = {f"moesparse {__version__}": "", f"transformers {transformers.__version__}": said}
        engine = installed_vllm()
        return found | ({engine: ask_vllm(type(self.model), self.model.config, self.counts)} if engine else {})

    def merge(self, position: int, kept: Tensor, groups: tuple[Merged, ...]) -> None:
        """Note that experts of a block, which is not applied yet, were merged into those that stay.

        Args:
            position: of the block among `blocks`.
            kept: [K] ids that stay, ascending, as many as planned.
            groups: merged experts, each in the place of its first one.
        """
        assert len(kept) == len(self.kept[position])
        self.kept[position], self.merged[position] = kept, groups

    @torch.no_grad()
    def apply_block(self, position: int) -> BlockSurgery:
        """Remove the experts of one block. Costs one kept-size copy of its largest tensor on top of the model.

        Args:
            position: of the block among `blocks`.
        """
        block, kept = self.blocks[position], self.kept[position]
        merged_into = {old: group.experts[0] for group in self.merged.get(position, ()) for old in group.experts}
        rerouted = sum(self._rewrite_table(block, kept, table, merged_into) for table in self.tables[position])
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
        merged = self.merged.get(position, ())
        done = BlockSurgery(block.name, block.num_experts, tuple(kept.tolist()), tensors, rerouted, merged)
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
        cuts = [cut for cut in self.cuts[position] if not inside(cut.path, block.name)]
        settings = [s for s in self.attributes[position] if not inside(s.path, block.name)]
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
        readers = self.readers()
        for setting in [*self.model_attributes, *self.config]:
            _set(setting)
        _record_kept(self.model, self.blocks, self.kept)
        changed = {setting.path: (setting.before, setting.after) for setting in self.config}
        blocks = [self.done[number] for number in range(len(self.blocks))]
        return SurgeryReport(blocks, changed, self.bytes_before, _size(self.model), readers)

    def apply(self) -> SurgeryReport:
        """Remove the experts of every block, then set the config."""
        for position in range(len(self.blocks)):
            self.apply_block(position)
        return self.finish()

    def _rewrite_table(self, block: MoEBlock, kept: Tensor, table: Cut, merged_into: Mapping[int, int]) -> int:
        """Give the tokens of a removed expert to a kept one that is not theirs already.

        That is the one that it was merged into, or that whose router row is most alike.
        """
        module = self.model.get_submodule(table.module)
        ids = _tensor(module, table.name)
        rows: Any = module.weight
        rows = torch.nn.functional.normalize(rows.detach()[: block.num_experts].double(), dim=-1)
        alike = rows @ rows.index_select(0, kept.to(rows.device)).T
        for old, stays in merged_into.items():
            alike[old, kept.tolist().index(stays)] = torch.inf
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


def remove_experts(
    model: nn.Module, kept: Sequence[Tensor | Sequence[int]], *, allow_non_uniform: bool = False
) -> SurgeryReport:
    """Remove all experts but `kept` from a transformers model, in place.

    Fused weights, biases, the router's rows and selection biases, per-expert scales, token -> expert tables, module
    attributes and config keys follow; the kept tensors are copies, so the memory of the removed ones is free. Kept
    experts keep their order. In layers routed by a token -> expert table, the tokens of a removed expert go to the kept
    one with the most similar router row; everywhere else the result equals the whole model with the removed experts'
    router logits at -inf.

    Args:
        model: a transformers model in any floating dtype, on any device.
        kept: for each block in forward order the ids that stay, unique, [K] integers; K is the same in every block.
        allow_non_uniform: K may differ by block: the config says it as `per_layer_config`, which moesparse reads.

    Returns:
        What was done, with the bytes of the model before and after. config.moesparse["kept_experts"] maps new ids to
        old.

    Raises:
        UsageError: a count or an id that cannot be; fewer than top_k; unequal counts in a router's groups.
        UnsupportedModelError: a per-expert tensor that cannot be placed, or a config that cannot say the new count.
            Nothing is changed in either case.
    """
    return plan_removal(model, kept, allow_non_uniform=allow_non_uniform).apply()


def plan_removal(
    model: nn.Module, kept: Sequence[Tensor | Sequence[int]], *, allow_non_uniform: bool = False
) -> RemovalPlan:
    """Find and check all that `remove_experts` would change, and change nothing. Arguments and errors are its own."""
    blocks = find_moe_blocks(model)
    if len(kept) != len(blocks):
        raise UsageError(f"kept must name the experts of each of the {len(blocks)} blocks, got {len(kept)}")
    ids = [_check_kept(block, torch.as_tensor(entry)) for block, entry in zip(blocks, kept, strict=True)]
    groups = groups_left(blocks, ids)
    layers = _uneven_layers(model, blocks, ids, allow_non_uniform)
    counts = _new_counts(blocks, ids) if layers is None else {blocks[0].num_experts: max(layers.values())}
    config = config_settings(model, counts, groups, layers)
    cuts, attributes, model_attributes = compare_twins(model, blocks, ids, config)
    return RemovalPlan(
        model=model,
        blocks=blocks,
        kept=ids,
        cuts=cuts,
        tables=[
            expert_tables(model, block) if len(entry) < block.num_experts else []
            for block, entry in zip(blocks, ids, strict=True)
        ],
        attributes=attributes,
        model_attributes=model_attributes,
        config=config,
        bytes_before=_size(model),
    )


def say_readers(readers: Mapping[str, str]) -> str:
    """`RemovalPlan.readers` in words, for the end of a sentence."""
    read = [name for name, why in readers.items() if not why]
    words = [f"read by {' and '.join(read)}"]
    for name, why in readers.items():
        if why.startswith(NOT_KNOWN):
            words.append(f"not known of {name} ({why.removeprefix(NOT_KNOWN)})")
        elif why:
            words.append(f"not by {name} ({why})")
    return ", ".join(words)


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


def _new_counts(blocks: Sequence[MoEBlock], kept: Sequence[Tensor]) -> dict[int, int]:
    """E before -> after, the same in every block."""
    counts = {block.num_experts: len(ids) for block, ids in zip(blocks, kept, strict=True)}
    return {before: after for before, after in counts.items() if before != after}


def _uneven_layers(
    model: nn.Module, blocks: Sequence[MoEBlock], kept: Sequence[Tensor], allowed: bool
) -> dict[int, int] | None:
    """Decoder layer -> experts that stay in it, where they are not equally many; None where they are."""
    if all(len(ids) == block.num_experts for block, ids in zip(blocks, kept, strict=True)):
        return None
    check_equal_counts(blocks)
    counts = {int(block.layer.rpartition(".")[2]): len(ids) for block, ids in zip(blocks, kept, strict=True)}
    if len(set(counts.values())) == 1:
        return None
    if not allowed:
        raise UsageError(
            "kept must hold the same number of experts in every block unless allow_non_uniform=True, got "
            f"{min(counts.values())} to {max(counts.values())}"
        )
    check_built_once(blocks)
    if attached(model) is not None:
        raise UsageError(
            "mtp must be keep or drop where layers keep different numbers of experts, got prune: config.json says them "
            "for decoder layers alone, and not for those that predict further tokens"
        )
    return counts


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


def _set(setting: Setting) -> None:
    setattr(setting.owner, setting.path.rpartition(".")[2], setting.after)


def _size(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(model))
