"""Collects one row per compiled kernel and prints them as a table after the run."""

from __future__ import annotations

import pytest
from aot_harness import print_table

_ROWS: list[dict[str, object]] = []

TITLE = "machine code"


@pytest.fixture
def machine_code_rows() -> list[dict[str, object]]:
    """Append `row(code, ...)` of aot_harness for every kernel a test compiles."""
    return _ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ROWS:
        terminalreporter.section(TITLE)
        print_table(_ROWS)
