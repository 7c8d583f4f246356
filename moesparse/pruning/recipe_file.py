"""Recipes as YAML files: fields by their names, and the recipes that ship with the package."""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from moesparse.errors import CheckpointError, MissingFileError, UsageError

__all__ = ["PUBLISHED", "find_recipe", "read_fields", "write_fields"]

_FOLDER = Path(__file__).parents[1] / "recipes"

PUBLISHED = tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
"""Names of the recipes that ship with the package."""

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Sequence: "a list",
    Mapping: "a mapping",
    types.NoneType: "null",
}


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 2:4 is a pattern, not two minutes and four seconds, and no key comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in pairs if tag not in (_INT, _FLOAT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=e))(e[-+]?\d+)?$", re.IGNORECASE), list("-+.0123456789")
)


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The file of a recipe: one that is there, or a published one by its name.

    Raises:
        MissingFileError: neither.
    """
    path, published = Path(name), _FOLDER / f"{os.fspath(name)}.yaml"
    if path.is_file():
        return path
    if os.fspath(name) in PUBLISHED:
        return published
    raise MissingFileError(
        f"recipe must be a YAML file, or one of {', '.join(PUBLISHED)}, got {os.fspath(name)!r}: there is no such file"
    )


def read_fields(file: Path, kinds: Mapping[str, Any], beside: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that a file holds, each of a kind that it may be.

    Args:
        file: YAML.
        kinds: field -> its type.
        beside: fields that are given beside the file.

    Raises:
        UsageError: no YAML, no mapping, an unknown field, which is named with the nearest known one, or a value of
            another kind. CheckpointError: it cannot be read.
    """
    try:
        held = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} must be YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(held, dict) or not held:
        raise UsageError(f"{file} must hold fields of a recipe, such as saliency: wanda, got {held!r}")
    for name, value in held.items():
        if name in beside:
            raise UsageError(f"{name} must be left out of {file}: it is a file of its own, given beside the recipe")
        if name not in kinds:
            (nearest,) = difflib.get_close_matches(str(name), list(kinds), n=1, cutoff=0.0)
            raise UsageError(f"{file} must hold fields of a recipe, got {name!r}; the nearest is {nearest!r}")
        wanted = _kinds(kinds[name])
        if not any(_fits(value, kind) for kind in wanted):
            words = " or ".join(_WORDS[kind] for kind in wanted)
            raise UsageError(f"'{name}' in {file} must be {words}, got {value!r}")
    return held


def write_fields(file: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write what `read_fields` reads.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        Path(file).write_text(yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {os.fspath(file)}: {error.strerror or error}") from error


def _kinds(hint: Any) -> list[type]:
    """What a field may be."""
    parts = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [get_origin(part) or part for part in parts]


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, list if kind is Sequence else kind)
