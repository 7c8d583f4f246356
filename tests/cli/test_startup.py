"""--help and --version are said at once: nothing heavy is imported before a command has work to do."""

import json
import subprocess
import sys

import pytest

from moesparse.cli import app

HEAVY = ("datasets", "jinja2", "matplotlib", "numpy", "safetensors", "torch", "transformers", "triton")
# the options of transformers' server are a part of its help
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)

SAY_AND_LIST = """
import contextlib, io, json, sys
from moesparse.cli import main
said = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
    main()
print(json.dumps([len(said.getvalue()), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("asked", ["--version", "--help", *(f"{name} --help" for name in COMMANDS if name != "serve")])
def test_help_imports_nothing_heavy(asked):
    done = subprocess.run(
        [sys.executable, "-c", SAY_AND_LIST, *asked.split()], capture_output=True, text=True, check=True
    )
    length, modules = json.loads(done.stdout.splitlines()[-1])
    assert length > 10
    assert not {*HEAVY} & {*modules}
