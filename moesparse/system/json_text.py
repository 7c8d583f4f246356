"""Change values in the text of a JSON object and leave every other byte of it as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["json_with", "json_without"]

_SPACE = re.compile(r"[ \t\n\r]*")


def json_with(text: str, changes: Mapping[tuple[str, ...], Any]) -> str:
    """The text with other values.

    Args:
        text: of a JSON object.
        changes: path of keys from the outermost object -> JSON value. Objects on the way must be there; a key that its
            object lacks is added behind the others.

    Raises:
        KeyError: an object on the way is not there.
    """
    for path, value in changes.items():
        start, end, new = _edit(text, path, value)
        text = text[:start] + new + text[end:]
    return text


def json_without(text: str, key: str) -> str:
    """The text without a key of the outermost object, and without the comma and the space that go with it."""
    members = list(_members(text, _skip(text, 0)))
    for number, (name, start, _, stop) in enumerate(members):
        if name == key and number:
            return text[: members[number - 1][3]] + text[stop:]
        if name == key:
            return text[:start] + text[members[1][1] if len(members) > 1 else stop :]
    return text


def _edit(text: str, path: tuple[str, ...], value: Any) -> tuple[int, int, str]:
    """Where the text of a value starts and ends, and what is to stand there."""
    at, depth = _skip(text, 0), 0
    while True:
        members = list(_members(text, at))
        found = {key: (start, end) for key, _, start, end in members}
        depth += 1
        if depth == len(path):
            break
        at = found[path[depth - 1]][0]
        if text[at] != "{":
            raise KeyError(path[depth - 1])
    if path[-1] in found:
        start, end = found[path[-1]]
        return start, end, _shown(text, members[0][1], value)
    if not members:
        return at + 1, at + 1, f"{json.dumps(path[-1])}: {json.dumps(value)}"
    behind = members[-1][3]
    # as far in as the first key, on a line of its own where that is
    before = _before(text, members[0][1]) or " "
    return behind, behind, f",{before}{json.dumps(path[-1])}: {_shown(text, members[0][1], value)}"


def _before(text: str, key: int) -> str:
    """The space in front of a key."""
    start = key
    while text[start - 1] in " \t\n\r":
        start -= 1
    return text[start:key]


def _shown(text: str, key: int, value: Any) -> str:
    """A value as it may stand behind a key: over several lines where its object is."""
    space = _before(text, key)
    if "\n" not in space or not isinstance(value, dict | list):
        return json.dumps(value)
    end = "\r\n" if "\r\n" in space else "\n"
    return json.dumps(value, indent=2).replace("\n", end + space.rpartition("\n")[2])


def _members(text: str, at: int) -> Iterator[tuple[str, int, int, int]]:
    """Key, where it starts, and where its value starts and ends, of the object at a place."""
    decoder = json.JSONDecoder()
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, end = decoder.raw_decode(text, at)
        # behind the colon
        start = _skip(text, _skip(text, end) + 1)
        _, stop = decoder.raw_decode(text, start)
        yield key, at, start, stop
        at = _skip(text, stop)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
