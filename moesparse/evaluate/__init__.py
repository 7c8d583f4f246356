"""How good a model is: perplexity, bits per byte and generation on text, lm-eval's tasks, and what pruning lost.

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesparse.evaluate.compared import Comparison
    from moesparse.evaluate.comparison import compare
    from moesparse.evaluate.on_tasks import PAPER_TASKS, TaskResult, TaskSet, TasksReport, load_tasks, tasks
    from moesparse.evaluate.on_text import (
        FilesPerplexity,
        Perplexity,
        Protocol,
        generate,
        perplexity,
        perplexity_of_files,
    )
    from moesparse.models.meta import context_length

_HOMES = {
    "Comparison": "evaluate.compared",
    "compare": "evaluate.comparison",
    **dict.fromkeys(
        ("PAPER_TASKS", "TaskResult", "TaskSet", "TasksReport", "load_tasks", "tasks"), "evaluate.on_tasks"
    ),
    **dict.fromkeys(("FilesPerplexity", "Perplexity", "Protocol"), "evaluate.on_text"),
    **dict.fromkeys(("generate", "perplexity", "perplexity_of_files"), "evaluate.on_text"),
    "context_length": "models.meta",
}

__all__ = [
    "PAPER_TASKS",
    "Comparison",
    "FilesPerplexity",
    "Perplexity",
    "Protocol",
    "TaskResult",
    "TaskSet",
    "TasksReport",
    "compare",
    "context_length",
    "generate",
    "load_tasks",
    "perplexity",
    "perplexity_of_files",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"moesparse.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moesparse.evaluate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
