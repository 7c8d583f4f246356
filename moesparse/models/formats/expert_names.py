"""Names of experts in quantization_config and in the side file of ModelOpt, once experts were removed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moesparse.errors import UnsupportedModelError

__all__ = ["SIDE_FILE", "check_expert_names", "with_kept_experts"]

SIDE_FILE = "hf_quant_config.json"
"""Where ModelOpt writes what it also writes into config.json."""

_EXPERT = re.compile(r"(?P<front>(?:^|.*\.)layers\.(?P<layer>\d+)\..*?\bexperts\.)(?P<expert>\d+)(?P<back>(?:\..*)?)")

# a number behind "experts" in a glob or a regular expression
_NUMBERED = re.compile(r"experts(?:\\?\.|\[\.\])[(\[]?\d")


def check_expert_names(said: Any, where: str) -> None:
    """Refuse patterns that name single experts: after a removal their numbers mean others, and a pattern is not cut.

    Args:
        said: JSON.
        where: it stands.

    Raises:
        UnsupportedModelError: names the first.
    """
    for text in _strings(said):
        if _NUMBERED.search(text) and not _EXPERT.fullmatch(text):
            raise UnsupportedModelError(
                f"{where} must name experts one by one, or all of a layer, for some to be removed, got the pattern "
                f"{text!r}"
            )


def with_kept_experts(said: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """The same JSON, its names of experts by their new numbers and without those that were removed.

    Args:
        said: JSON: names in lists, and as keys.
        kept: layer -> old number of each expert that is left.
    """

    def renamed(text: str) -> str | None:
        found = _EXPERT.fullmatch(text)
        if found is None or int(found["layer"]) not in kept:
            return text
        ids, expert = list(kept[int(found["layer"])]), int(found["expert"])
        return f"{found['front']}{ids.index(expert)}{found['back']}" if expert in ids else None

    return _renamed(said, renamed)


def _renamed(said: Any, rename: Callable[[str], str | None]) -> Any:
    if isinstance(said, dict):
        named = {rename(key): _renamed(value, rename) for key, value in said.items()}
        return {key: value for key, value in named.items() if key is not None}
    if isinstance(said, list):
        named_in = [rename(each) if isinstance(each, str) else _renamed(each, rename) for each in said]
        return [each for each in named_in if each is not None]
    return said


def _strings(said: Any) -> Iterator[str]:
    if isinstance(said, str):
        yield said
    elif isinstance(said, dict):
        for key, value in said.items():
            yield key
            yield from _strings(value)
    elif isinstance(said, list):
        for each in said:
            yield from _strings(each)
