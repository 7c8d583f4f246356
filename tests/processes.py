"""Processes for the price of a fork: they come from a server that has the slow imports behind it.

A new interpreter imports torch and transformers for some seconds of a CPU before it does anything. What a test says of
exit codes, signals, files and several processes needs a process, and not its imports; what it says of imports takes
`subprocess`. A fork of this process will not do either: autograd cannot be forked.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

server = multiprocessing.get_context("forkserver")
# pytest, because a child imports the main module of its parent first
server.set_forkserver_preload(
    [
        "pytest",
        "moesparse.cli",
        "moesparse.pruning.run",
        "moesparse.distillation",
        "moesparse.checkpoints.repack",
        "moesparse.evaluate.compare_job",
        "moesparse.testing",
        "transformers.models.mixtral.modeling_mixtral",
        "transformers.generation.utils",
        "transformers.models.auto.tokenization_auto",
    ]
)


def _child(streams, place, environment, work, arguments):
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(place)
    os.environ.update(environment)
    # of the server, which may have had another TMPDIR
    tempfile.tempdir = None
    # a test run in the background inherits it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    work(*arguments)


def moesparse_command(arguments):
    """The command line with these arguments, in a process that has been started."""
    from moesparse.cli import console, main

    sys.argv = ["moesparse", *arguments]
    # a console asks for its width when it is made, which the server has done
    for each in (console.console, console.errors):
        each.__init__(stderr=True)
    main()


class Started:
    """A process that does `work(*arguments)`; what it prints is read as of a `subprocess.Popen`.

    Args:
        place: its folder.
        environment: variables to set.
    """

    def __init__(self, work, *arguments, place=".", environment=None):
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("out", "err")]
        for stream in self._streams:
            stream.touch()
        given = ([*map(str, self._streams)], str(place), {**(environment or {})}, work, arguments)
        self._process = server.Process(target=_child, args=given)
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def said(self):
        """(standard output, standard error) until now."""
        return tuple(stream.read_text() for stream in self._streams)

    def send_signal(self, number):
        # it may have ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def communicate(self, timeout=600):
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise AssertionError(f"a process hangs; printed: {self.said()}")
        self.stdout, self.stderr = self.said()
        return self.stdout, self.stderr

    def ended_well(self):
        """Wait for its end, with exit code 0; then `stdout` and `stderr` are what it printed."""
        self.communicate()
        assert self.returncode == 0, self.stderr
        return self


def start_command(*arguments, **options):
    """`moesparse` with its arguments, as a process of its own."""
    return Started(moesparse_command, [*map(str, arguments)], **options)


def command(*arguments, **options):
    """The same, to its end: `returncode`, `stdout` and `stderr` are what they were in the end."""
    started = start_command(*arguments, **options)
    started.communicate()
    return started
