"""Words for a person, results for a program: the console and JSON."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

__all__ = ["SCHEMAS", "console", "errors", "paragraphs", "print_json", "quiet_libraries", "with_schema"]

console = Console(stderr=True)
"""Words for a person: progress, tables of a run; nothing with --quiet."""

errors = Console(stderr=True)
"""Why a command ends without what was wanted."""

SCHEMAS = {
    "bench": 1,
    "bench.shapes": 1,
    "budget": 1,
    "calibrate": 1,
    "compare": 1,
    "compare.several": 1,
    "demo": 1,
    "distill": 1,
    "eval": 1,
    "eval.tasks": 1,
    "info": 1,
    "inspect": 1,
    "inspect.gguf": 1,
    "inspect.unfinished": 1,
    "pack": 1,
    "plan": 1,
    "prune": 1,
    "prune.gguf": 1,
    "report": 1,
}
"""Objects of --json and the versions of their keys: a key that goes or changes its meaning makes another version."""


def paragraphs(text: str | None) -> str:
    """A help text whose lines are joined to paragraphs, to be folded where the terminal ends."""
    return re.sub(r"(\S)\n(?=\S)", r"\1 ", inspect.cleandoc(text or ""))


def with_schema(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the name and version of its keys, which docs/json.md lists."""
    return {"schema": f"moesparse.{kind}/{SCHEMAS[kind]}", **value}


def print_json(kind: str, value: Mapping[str, Any]) -> None:
    """The one result of a --json run, alone on standard output.

    Args:
        kind: of SCHEMAS.
        value: the object.
    """
    print(json.dumps(with_schema(kind, value), indent=2))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' own bars and warnings out of our output."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
