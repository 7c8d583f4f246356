"""What transformers makes of the keys of a checkpoint: which tensors become which parameter, and in which shape.

transformers' converters merge the experts of a layer into one parameter. Here they get twins for the bitmasks of packed
experts, and `plan_loading` runs them on shapes alone, so that everything about a checkpoint is known, and refused when
it does not fit, before a byte of it is read.

The converters are not public API of transformers; tests/packed/test_quantizer.py is the contract.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from moesparse.errors import UnsupportedModelError
from moesparse.packed.experts import META_SUFFIX

if TYPE_CHECKING:
    # at run time it would import the module that imports this one (moesparse/_register.py)
    from transformers import PreTrainedModel

__all__ = [
    "LoadPlan",
    "Patterns",
    "Target",
    "conversions_of",
    "packed_conversions",
    "plan_loading",
]

# an end of name that transformers takes off again where a pattern becomes a name, as it does with any lookahead
_END = r"(?!\w)"

_EXPERT = re.compile(r"\bexperts\.(\d+)\.")

Patterns = Mapping[str, Mapping[str, str]]
"""Block name -> parameter name -> "n:m"."""


def packed_conversions(conversions: Sequence[WeightTransform], blocks: Patterns) -> list[WeightTransform]:
    """Converters that load and save the bitmasks beside the values.

    A converter that merges the experts of a packed matrix gets a twin for `_meta`, and both are anchored at the end of
    the name, so that neither takes the other's keys.

    Raises:
        UnsupportedModelError: the family's checkpoints store these matrices in a way that packed ones cannot follow
            (transposed or renamed on loading).
    """
    names = [f"{block}.{matrix}" for block, matrices in blocks.items() for matrix in matrices]
    result: list[WeightTransform] = []
    for transform in conversions:
        targets = [pattern.removesuffix(_END) for pattern in transform._original_target_patterns]
        sources = [pattern.removesuffix(_END) for pattern in transform._original_source_patterns]
        if not isinstance(transform, WeightConverter) or not _makes(targets, names):
            result.append(transform)
            continue
        if not all(map(_joins_rows, transform.operations)):
            raise UnsupportedModelError(
                f"{names[0]}: this family's checkpoints must store experts as [out, in] matrices to be packed, got "
                f"{' and '.join(type(operation).__name__ for operation in transform.operations)} on loading"
            )
        for suffix in ("", META_SUFFIX):
            twin = WeightConverter(
                [f"{source}{suffix}{_END}" for source in sources],
                [f"{target}{suffix}{_END}" for target in targets],
                operations=list(transform.operations),
                force_cpu=transform.force_cpu,
            )
            twin.scope_prefix, twin.base_model_prefix = transform.scope_prefix, transform.base_model_prefix
            result.append(twin)
    _check_renamings(result, names)
    return result


def _joins_rows(operation: ConversionOps) -> bool:
    """Whether an operation only stacks matrices [out, in] or joins their rows, which it does to packed ones too.

    One that transposes what lies the other way round leaves them as they are: packed ones never do.
    """
    if getattr(operation, "check_dims", False):
        return True
    return isinstance(operation, MergeModulelist | Concatenate) and operation.dim in (0, 1)


def _makes(targets: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one of the target patterns is the end of one of the parameter names."""
    return any(re.search(f"{target}$", name) for target in targets for name in names)


def _check_renamings(conversions: Sequence[WeightTransform], names: Sequence[str]) -> None:
    """A packed matrix keeps its own name on disk, so that the bitmask's is the weight's with `_meta` behind it."""
    renamings = [t.reverse_transform() for t in conversions if isinstance(t, WeightRenaming)]
    for name in names:
        stored = name
        for renaming in renamings:
            stored = renaming.rename_source_key(stored)[0]
        if stored.rpartition(".")[2] != name.rpartition(".")[2]:
            raise UnsupportedModelError(
                f"{name}: this family's checkpoints call it {stored}, a name that cannot be given to a packed matrix"
            )


def conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """The model's converters: those it was loaded with, else its family's."""
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        return list(loaded)
    # a prefix is only ever taken off while loading
    family = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in family if not isinstance(transform, PrefixChange)]


@dataclass(frozen=True)
class Target:
    """One tensor of the model's state dict and what it is made from.

    Attributes:
        keys: of the checkpoint, in the order of experts, then of parts (gate before up).
        wanted: the shape that the model has.
        got: the shape that the keys make; None when they cannot be joined.
        operations: of transformers, that join them; none where a tensor is taken as it is.
        problem: why the keys do not make the tensor; None when they do.
    """

    keys: tuple[str, ...]
    wanted: tuple[int, ...]
    got: tuple[int, ...] | None
    operations: tuple[ConversionOps, ...]
    problem: str | None


@dataclass(frozen=True)
class LoadPlan:
    """What loading a checkpoint into a model comes to.

    Attributes:
        targets: name in the state dict -> what it is made from, in the model's order.
        missing: names that no key gives, tied ones aside.
        unexpected: keys that the model has no place for.
    """

    targets: dict[str, Target]
    missing: list[str]
    unexpected: list[str]

    @property
    def would_not_load(self) -> list[str]:
        """One sentence for each tensor of the model that the checkpoint does not give."""
        unfit = [f"{name}: {target.problem}" for name, target in self.targets.items() if target.problem]
        return unfit + [f"{name} is missing" for name in self.missing]

    @property
    def problems(self) -> list[str]:
        """The same, and one for each tensor of the checkpoint that the model does not take."""
        return self.would_not_load + [f"{key} has no place in the model" for key in self.unexpected]


@dataclass
class _Collected:
    """The keys of one converter's or renaming's target, by source pattern."""

    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)


def plan_loading(
    model: PreTrainedModel, conversions: Sequence[WeightTransform], shapes: Mapping[str, tuple[int, ...]]
) -> LoadPlan:
    """Go through transformers' own loading of a checkpoint with shapes in the place of tensors.

    Args:
        model: on any device, "meta" too; it is left as it is.
        conversions: those that the checkpoint will be loaded with.
        shapes: key of the checkpoint -> shape.
    """
    state = model.state_dict()
    renamings = [transform for transform in conversions if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in conversions if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, _Collected] = {}
    unexpected: list[str] = []
    prefix = model.base_model_prefix
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unexpected.append(key)
            continue
        entry = collected.setdefault(name, _Collected(by_pattern.get(pattern or "")))
        entry.keys.setdefault(pattern or key, []).append(key)
    targets: dict[str, Target] = {}
    for name, entry in collected.items():
        targets |= _targets(model, name, entry, shapes)
    for name in [name for name in targets if name not in state]:
        unexpected += targets.pop(name).keys
    tied = getattr(model, "all_tied_weights_keys", {})
    ties = tied | {source: target for target, source in tied.items()}
    found = SimpleNamespace(
        missing_keys={name for name in state if name not in targets and ties.get(name) not in targets},
        unexpected_keys=set(unexpected),
    )
    model._adjust_missing_and_unexpected_keys(found)  # type: ignore[arg-type]
    return LoadPlan(
        targets={name: targets[name] for name in state if name in targets},
        missing=[name for name in state if name in found.missing_keys],
        unexpected=sorted(found.unexpected_keys),
    )


def _targets(
    model: PreTrainedModel, name: str, entry: _Collected, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Target]:
    """What one converter makes of its keys: usually one tensor, several where it splits."""
    state = model.state_dict()
    keys = tuple(key for group in entry.keys.values() for key in group)
    if entry.converter is None:
        made: dict[str, tuple[int, ...] | None] = {name: shapes[keys[0]]}
        problem = f"comes from {len(keys)} tensors, {', '.join(keys[:3])}" if len(keys) > 1 else None
    else:
        problem = _gap(entry.keys)
        try:
            made = _convert(model, name, entry.converter, {p: [shapes[k] for k in ks] for p, ks in entry.keys.items()})
        except Exception as error:  # whatever transformers or torch say to shapes that do not fit
            made = {name: None}
            reason = str(error).strip().splitlines()
            problem = problem or f"cannot be made from {keys[0]} and its like: {reason[0] if reason else error!r}"
    operations = () if entry.converter is None else tuple(entry.converter.operations)
    result = {}
    for target, got in made.items():
        wanted = tuple(state[target].shape) if target in state else ()
        wrong = problem
        if got is not None and got != wanted:
            wrong = problem or f"must be {list(wanted)} as config.json has it, got {list(got)} from {keys[0]}"
        result[target] = Target(keys, wanted, got, operations, wrong)
    return result


def _convert(
    model: PreTrainedModel, name: str, converter: WeightConverter, groups: Mapping[str, Sequence[tuple[int, ...]]]
) -> dict[str, tuple[int, ...] | None]:
    converter = copy.deepcopy(converter)
    for pattern, group in groups.items():
        for shape in group:
            # a byte each: only shapes count, and transformers needs tensors to work on
            converter.collected_tensors[pattern].append(torch.empty(shape, dtype=torch.uint8, device="meta"))  # type: ignore[arg-type]
    realized = converter.convert(name, model=model, config=model.config)
    first = {key: value[0] if isinstance(value, list) else value for key, value in realized.items()}
    return {key: tuple(value.shape) for key, value in first.items()}


def _gap(groups: Mapping[str, Sequence[str]]) -> str | None:
    """Say so when the experts of a merged tensor are not numbered 0, 1, 2, ...: joined they would change places."""
    for keys in groups.values():
        numbers = [_EXPERT.search(key) for key in keys]
        for wanted, (key, found) in enumerate(zip(keys, numbers, strict=True)):
            if found and len(keys) > 1 and int(found[1]) != wanted:
                return f"must be made from the experts 0 to {len(keys) - 1}, got {key} in the place of expert {wanted}"
    return None
