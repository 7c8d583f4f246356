"""What of a config.json has changed: compared as transformers reads it, written as the file has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moesparse.models.layer_counts import PER_LAYER

__all__ = ["CONFIG_KEY", "QUANTIZATION", "at", "deepest", "differences", "dtype_changes", "renamed", "spellings"]

CONFIG_KEY = "moesparse"
"""Where a checkpoint's config.json says how it was pruned: {"version": ..., "recipe": {...}}."""

QUANTIZATION = "quantization_config"

_DTYPES = ("dtype", "torch_dtype")

# said by the loading of a model, not by its checkpoint
_NOT_OF_THE_FOLDER = {
    CONFIG_KEY,
    "_name_or_path",
    "architectures",
    "model_type",
    QUANTIZATION,
    "transformers_version",
    *_DTYPES,
}


def renamed(noted: Any, names: Mapping[str, str]) -> Any:
    """JSON in which objects have other keys."""
    if not isinstance(noted, Mapping):
        return noted
    return {names.get(key, key): renamed(value, names) for key, value in noted.items()}


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and new value of what differs between two configs, but for what loading a model sets.

    What a config says of its layers is one value: a folder may say it otherwise, and is then given all of it.
    """
    for key, value in after.items():
        if key in _NOT_OF_THE_FOLDER:
            continue
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and key != PER_LAYER:
            yield from differences(old, value, (*path, key))
        elif key not in before or value != old:
            yield (*path, key), value


def deepest(held: Mapping[str, Any], path: tuple[str, ...]) -> tuple[str, ...]:
    """As far along a path as there are objects: a config may be flat that transformers makes nested."""
    at: Any = held
    for depth, key in enumerate(path):
        at = at.get(key)
        if not isinstance(at, dict):
            return path[:depth]
    return path


def at(held: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    for key in path:
        held = held[key]
    return held


def spellings(config: Any, path: tuple[str, ...]) -> list[str]:
    """The names by which a setting may be written: transformers' own, and those that it reads as the same."""
    for key in path[:-1]:
        config = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    aliases = getattr(config, "attribute_map", None) or {}
    return [path[-1], *(alias for alias, name in aliases.items() if name == path[-1])]


def dtype_changes(held: Mapping[str, Any], now: str) -> dict[tuple[str, ...], Any]:
    """Path and new value of every dtype of a model that a config.json names.

    Args:
        held: the config.json.
        now: the dtype of its weights.
    """
    places = ((), *((key,) for key, value in held.items() if key.endswith("_config") and isinstance(value, dict)))
    return {
        (*where, key): now
        for where in places
        if where != (QUANTIZATION,)
        for key in _DTYPES
        if isinstance(at(held, where).get(key), str)
    }
