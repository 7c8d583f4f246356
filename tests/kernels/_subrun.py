"""Run one folder of tests with pytest in a process of its own and show what it printed when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_folder(name: str, environment: dict[str, str | None], *arguments: str) -> str:
    """Run pytest on tests/kernels/<name>; return its output, or raise AssertionError with it.

    Args:
        name: folder beside this file.
        environment: variables to set, or to remove where the value is None.
        arguments: more arguments for pytest.
    """
    env = {**os.environ, **{key: value for key, value in environment.items() if value is not None}}
    for key in [key for key, value in environment.items() if value is None] + ["PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"]:
        env.pop(key, None)
    paths = [str(ROOT / "kernels"), str(ROOT), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "pytest", str(HERE / name), "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    # 5: pytest collected nothing, which would pass silently
    assert done.returncode == 0, f"the tests of {name} failed (exit {done.returncode}):\n{done.stdout[-20000:]}"
    return done.stdout
