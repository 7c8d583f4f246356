"""The pages of docs/ hold: the quick start runs as written, quoted messages and figures are what they were."""

import ast
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
import tomllib
from pathlib import Path

import pytest
import quickstart
from processes import Started, moesparse_command

import moesparse
import moesparse_kernels
from moesparse import demo

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def reader(tmp_path):
    """In an empty folder, with `moesparse` as a command, also where only the source tree is there."""
    commands, place = tmp_path / "bin", tmp_path / "work"
    for folder in (commands, place):
        folder.mkdir()
    (commands / "moesparse").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moesparse "$@"\n')
    (commands / "moesparse").chmod(0o755)
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    others = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return quickstart.Reader(place, os.environ | paths | others, sys.executable)


def briefly(texts, arguments):
    """A command that measures perplexity on the held-out texts in a folder; questions are taken from the whole ones."""
    path = demo.text_path
    demo.text_path = lambda split, domain: texts / f"{domain}.txt" if split == "heldout" else path(split, domain)
    demo.text = lambda split, domain: path(split, domain).read_text(encoding="utf-8")
    moesparse_command(arguments)


def execute(text):
    exec(compile(text, "a block of the page", "exec"), {"__name__": "__main__"})


class Hurried:
    """What a reader does, by processes that have the slow imports behind them, with little text to measure on."""

    def __init__(self, folder):
        self.texts, self.where = folder, {"place": folder, "environment": {"COLUMNS": "100"}}
        for domain in demo.DOMAINS:
            (folder / f"{domain}.txt").write_text(demo.text("heldout", domain)[:15_000])

    def install(self, line):
        """Is there."""

    def started(self, line):
        name, *words = shlex.split(line)
        assert name == "moesparse"
        return Started(briefly, self.texts, words, **self.where)

    def shell(self, line):
        done = self.started(line).ended_well()
        return done.stdout + done.stderr

    def program(self, text):
        return Started(execute, text, **self.where).ended_well().stdout

    def serve(self, line):
        server = self.started(line)

        def stop():
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)
            return server.returncode

        until = time.monotonic() + 120
        while "startup complete" not in "".join(server.said()):
            assert server.poll() is None and time.monotonic() < until, server.said()
            time.sleep(0.05)
        return stop


def check_the_quick_start(way):
    for library in ("openai", "lm_eval", "matplotlib"):
        pytest.importorskip(library)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", quickstart.PORT))
        except OSError:
            pytest.skip(f"port {quickstart.PORT}, which the page names, is taken here")
    quickstart.run_page(way).check()


def test_every_line_of_the_quick_start_runs(tmp_path):
    check_the_quick_start(Hurried(tmp_path))


@pytest.mark.long
def test_the_quick_start_runs_as_it_is_written(reader):
    check_the_quick_start(reader)


def test_the_quick_start_is_read_whole(tmp_path):
    page = quickstart.PAGE.read_text()
    found = list(quickstart.steps())
    kinds = [kind for kind, _ in found]
    assert len(quickstart.blocks()) == page.count("\n```\n") == (page.count("```")) / 2
    assert kinds.index("install") == 0 and kinds.count("install") == kinds.count("serve") == 1
    assert kinds.index("serve") < len(kinds) - 1 - kinds[::-1].index("python")
    # every command of a fence, and none in passing that no fence holds
    shown = set(re.findall(r"moesparse (\w+)", "\n".join(text for kind, text in found if kind in ("shell", "serve"))))
    assert shown == {"prune", "inspect", "report", "eval", "pack", "serve"}
    assert str(quickstart.PORT) in next(text for kind, text in found if kind == "serve")
    (tmp_path / "page.md").write_text("```console\nls\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md has a block of console, which nobody runs"):
        list(quickstart.steps(tmp_path / "page.md"))


def test_the_install_line_brings_what_the_page_uses():
    (line,) = (text for kind, text in quickstart.steps() if kind == "install")
    named = set(re.fullmatch(r"pip install '\.\[([\w,]+)\]'", line)[1].split(","))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {"openai": "serve", "uvicorn": "serve", "lm-eval": "eval", "matplotlib": "plots"}
    for package, extra in needed.items():
        assert any(each.startswith(package) for each in extras[extra]), package
    assert named == set(needed.values())
    assert line in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/serving.md", "docs/troubleshooting.md"])
def test_the_commands_on_a_page_exist(page):
    from moesparse.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = set(re.findall(r"(?:`|^    )moesparse (\w+)", (ROOT / page).read_text(), re.MULTILINE))
    assert used <= commands
    assert used


def messages():
    """Every string of the packages as its constant parts in order, f-strings and joined ones too."""
    found = []
    folders = [Path(package.__file__).parent for package in (moesparse, moesparse_kernels)]
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append([part.value for part in node.values if isinstance(part, ast.Constant)])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append([node.value])
    return ["\0".join(parts) for parts in found]


def test_every_quoted_message_is_in_the_code():
    from typer.main import get_command

    from moesparse.cli import app
    from moesparse.cli.language import in_options, options_of

    quoted = re.findall(r"^> `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    ours = [message for message in quoted if not message.startswith("RuntimeError")]
    assert len(ours) > 25
    options = options_of(get_command(app).commands, None)
    texts = [form for text in messages() for form in (text, in_options(text, options))]
    for message in ours:
        parts = [re.escape(part.strip(" ,;:")) for part in message.split("...") if part.strip(" ,;:()")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_links_between_the_pages_lead_somewhere():
    for page in (*DOCS.glob("*.md"), ROOT / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links {target}"


def test_the_cpu_cost_in_the_readme_is_that_of_the_result_files():
    ratios = []
    for name in ("bench_layer_olmoe", "bench_layer_mixtral"):
        rows = json.loads((ROOT / "benchmarks" / "results" / "cpu" / f"{name}.json").read_text())["rows"]
        for tokens in {row["tokens"] for row in rows}:
            us = {row["contender"]: row["us"] for row in rows if row["tokens"] == tokens}
            ratios.append(us["moe_nm reference"] / min(us.values()))
    stated = re.search(r"took ([\d.]+) to ([\d.]+) times", " ".join((ROOT / "README.md").read_text().split()))
    assert [float(value) for value in stated.groups()] == [round(min(ratios), 1), round(max(ratios), 1)]


def test_tables_are_what_their_commands_print(capsys):
    from benchmarks.speed import bench_savings
    from benchmarks.studies import recovery_text as study_recovery_text

    bench_savings.show(ROOT / "benchmarks/results/cpu/savings.json")
    for row in capsys.readouterr().out.splitlines():
        assert row in (DOCS / "performance.md").read_text().splitlines()
    study_recovery_text.show(json.loads((study_recovery_text.RESULTS / "study_recovery_text.json").read_text()))
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert len(rows) > 8
    for row in rows:
        assert row in (DOCS / "recovery.md").read_text().splitlines()
