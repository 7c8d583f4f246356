"""docs/quickstart.md, read and run: in the environment of the tests, and in one that its own install line makes.

python tests/quickstart.py FOLDER (`make quickstart`) clones this repository into FOLDER, makes an environment there by
exactly the page's install line, with an empty home, and runs every block of the page in it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quickstart.md"
PORT = 8177


@dataclass
class Told:
    """What the blocks of the page printed.

    Attributes:
        installed: the install lines.
        commands: output of every command of the shell but the server, errors too.
        programs: standard output of every block of Python.
        served: exit code of the server, once it was interrupted.
    """

    installed: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    served: int | None = None

    def check(self) -> None:
        """What the page promises."""
        output = "\n".join(self.commands)
        assert "50.0% of the expert weights are zero" in output
        assert "verified" in output
        assert re.search(r"demo_continuation .*0\.\d{4}", output)
        assert re.search(r"wrote out/report.html: .* one file", output)
        loaded, answered = self.programs
        assert loaded == answered
        assert loaded.startswith("It is a truth universally acknowledged, that")
        assert self.served == 0


def blocks(page: Path = PAGE) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def steps(page: Path = PAGE) -> Iterator[tuple[str, str]]:
    """(kind, text) of what a reader does, in order: "install", "serve" and "shell" lines, and blocks of "python"."""
    for language, text in blocks(page):
        assert language in ("sh", "python"), f"{page.name} has a block of {language}, which nobody runs"
        if language == "python":
            yield "python", text
            continue
        for line in text.splitlines():
            kinds = {"pip install": "install", "moesparse serve": "serve"}
            yield next((kind for start, kind in kinds.items() if line.startswith(start)), "shell"), line


class Way(Protocol):
    """How what a reader does is carried out."""

    def install(self, line: str) -> None: ...

    def shell(self, line: str) -> str:
        """Output of a line of the shell, errors too."""

    def program(self, text: str) -> str:
        """Standard output of a block of Python."""

    def serve(self, line: str) -> Callable[[], int]:
        """Start a server and wait for it; what is returned interrupts it and gives its exit code."""


def run_page(way: Way) -> Told:
    """Run the page; a server is interrupted at the end."""
    told, stop = Told(), None
    try:
        for kind, text in steps():
            if kind == "install":
                told.installed.append(text)
                way.install(text)
            elif kind == "serve":
                stop = way.serve(text)
            elif kind == "python":
                told.programs.append(way.program(text))
            else:
                told.commands.append(way.shell(text))
    finally:
        if stop is not None:
            told.served = stop()
    return told


@dataclass
class Reader:
    """New processes, as a reader starts them.

    Attributes:
        place: an empty folder.
        environment: `moesparse` is a command in it.
        python: for the blocks of Python.
        install: carries out an install line.
    """

    place: Path
    environment: Mapping[str, str]
    python: str
    install: Callable[[str], None] = lambda _line: None

    def shell(self, line: str) -> str:
        done = run(line, self.place, self.environment)
        return done.stdout + done.stderr

    def program(self, text: str) -> str:
        return run([self.python, "-c", text], self.place, self.environment).stdout

    def serve(self, line: str) -> Callable[[], int]:
        log = self.place / "server.log"
        with log.open("w") as file:
            # exec: the signal is for the server, not for a shell before it
            server = subprocess.Popen(
                f"exec {line}",
                shell=True,
                cwd=self.place,
                env=self.environment,
                stdout=file,
                stderr=file,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

        def stop() -> int:
            server.send_signal(signal.SIGINT)
            return server.wait(timeout=30)

        until = time.monotonic() + 120
        while "startup complete" not in log.read_text():
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        return stop


def run(words: str | list[str], place: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A command line, or a program with its arguments, that must end well."""
    done = subprocess.run(
        words, cwd=place, env=environment, shell=isinstance(words, str), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def first_hour(folder: Path) -> None:
    """The page in an environment of its own, with an empty home, from a clone of the last commit."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("home", "work"):
        (folder / name).mkdir(parents=True)
    source, binaries = folder / "source", folder / "venv" / "bin"
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    of_this_one = ("PYTHON", "HF_", "VIRTUAL_ENV", "XDG_CACHE", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_this_one)}
    environment = kept | {
        "HOME": str(folder / "home"),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(source / ".ci" / "constraints.txt"),
        # the page says that nothing is downloaded
        "HF_HUB_OFFLINE": "1",
    }
    say(f"git clone {ROOT}")
    run(["git", "clone", "--quiet", str(ROOT), str(source)], folder, kept)
    say("python -m venv")
    run([sys.executable, "-m", "venv", str(folder / "venv")], folder, environment)
    # the torch of the other targets, before the line asks for any
    say("pip install torch")
    run("pip install --quiet torch", source, environment)

    def install(line: str) -> None:
        say(line)
        run(line, source, environment)

    told = run_page(Reader(folder / "work", environment, str(binaries / "python"), install))
    told.check()
    for text in told.commands:
        print(text.rstrip())
    print(told.programs[0].rstrip())
    say(f"{len(told.commands)} commands, {len(told.programs)} programs and a server did what the page says")


if __name__ == "__main__":
    first_hour(Path(sys.argv[1]).resolve())
