"""--help and --version are said at once: nothing heavy is imported before a command has work to do."""

import json
import os
import subprocess
import sys

import pytest

from moesparse.cli import app

HEAVY = ("datasets", "jinja2", "matplotlib", "numpy", "openai", "safetensors", "starlette", "torch", "transformers")
HEAVY += ("triton", "uvicorn")
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)

SAY_AND_LIST = """
import contextlib, io, json, sys
from moesparse.cli import main
def say_and_list(*words):
    sys.argv[1:] = words
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        main()
    print(json.dumps([len(said.getvalue()), sorted({name.partition(".")[0] for name in sys.modules})]), flush=True)
    return said.getvalue()
"""


def test_help_imports_nothing_heavy():
    asked = ["--version", "--help", *(f"{name} --help" for name in COMMANDS)]
    program = f"{SAY_AND_LIST}for each in sys.argv[1:]: say_and_list(*each.split())"
    done = subprocess.run([sys.executable, "-c", program, *asked], capture_output=True, text=True, check=True)
    # one after another in one process: the first that fails is the one that imports it
    for each, line in zip(asked, done.stdout.splitlines(), strict=True):
        length, modules = json.loads(line)
        assert length > 10, each
        assert not {*HEAVY} & {*modules}, each


def said_lightly(*arguments, **environment):
    """What a command of this name prints, which must import nothing heavy on the way."""
    program = f"import sys; sys.argv[0] = 'moesparse'\n{SAY_AND_LIST}print(say_and_list(*sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    listed, _, said = done.stdout.partition("\n")
    assert not {*HEAVY} & {*json.loads(listed)[1]}
    return said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_given_a_script_that_asks_for_completions(shell):
    # the shell around a test is not one that can be told
    script = said_lightly("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"complete_{shell}" in script and "_MOESPARSE_COMPLETE" in script


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("moesparse pr", ["prune"]),
        ("moesparse prune --sal", ["--saliency"]),
        ("moesparse prune demo out --keep", ["--keep-experts"]),
    ],
)
def test_words_are_completed_without_anything_heavy(typed, words):
    asked = {"_MOESPARSE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert said_lightly(**asked).split() == words
