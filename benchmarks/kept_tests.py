"""A pytest plugin that keeps what each test said, in tests.json, and leaves out what this commit has passed already.

MOESPARSE_TEST_ROWS=out/gpu-short python -m pytest -p benchmarks.kept_tests tests/kernels -m gpu
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_cache import use_carried
from benchmarks.results import ResultFile, device_folder
from moesparse.benchmarking import environment

__all__ = ["pytest_collection_modifyitems", "pytest_configure", "pytest_runtest_logreport"]

_FILE = pytest.StashKey[ResultFile]()
_KEPT: list[ResultFile] = []


def pytest_configure(config: pytest.Config) -> None:
    use_carried()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    path = device_folder(Path(os.environ["MOESPARSE_TEST_ROWS"]), device) / "tests.json"
    config.stash[_FILE] = ResultFile(path, environment(device))
    if not hasattr(config, "workerinput"):
        # workers of pytest-xdist report to the process that started them
        _KEPT[:] = [config.stash[_FILE]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.stash[_FILE]
    passed = [item for item in items if file.passed(part="tests", contender=item.nodeid)]
    if passed:
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if item not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not _KEPT or (report.when != "call" and report.passed):
        return
    row = {"part": "tests", "contender": report.nodeid, "seconds": round(report.duration, 2)}
    row["status"] = {"passed": "ok"}.get(report.outcome, report.outcome)
    if not report.passed:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        row["reason"] = reason[-500:]
    _KEPT[0].put([row])
