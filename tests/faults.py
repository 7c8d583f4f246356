"""Runs that die, and disks that fail, at a place with a name.

What a run does to a disk, and what it reports, becomes one line of text at a time: "write layer-00001.partial/...",
"flush ...", "rename layer-00001", "renamed layer-00001", "remove moesparse_journal.json", "call choose_masks",
"progress calibrate model.layers.1.mlp.experts". A test says what happens at such a line.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moesparse.system.shard_writer import ShardWriter

ENOSPC = OSError(28, "No space left on device")


class Watch:
    """Tells `note` every line; installed by patching what every write goes through."""

    def __init__(self, patch, note, calls=()):
        self.note = note
        put, replace, fsync, unlink = ShardWriter._put, os.replace, os.fsync, os.unlink
        text, data_of = Path.write_text, Path.write_bytes

        def write_shard(writer, info, at, data):
            note(f"write {short(info.file)}")
            put(writer, info, at, data)

        def write_text(path, *args, **options):
            note(f"write {short(path)}")
            return text(path, *args, **options)

        def write_bytes(path, data):
            note(f"write {short(path)}")
            return data_of(path, data)

        def rename(source, target, **options):
            note(f"rename {short(target)}")
            replace(source, target, **options)
            note(f"renamed {short(target)}")

        def flush(descriptor):
            note(f"flush {short(os.readlink(f'/proc/self/fd/{descriptor}'))}")
            fsync(descriptor)

        def remove(path, **options):
            note(f"remove {short(path)}")
            unlink(path, **options)

        patch.setattr(ShardWriter, "_put", write_shard)
        patch.setattr(Path, "write_text", write_text)
        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(os, "replace", rename)
        patch.setattr(os, "fsync", flush)
        patch.setattr(os, "unlink", remove)
        for name in calls:
            self._watch(patch, name)

    def progress(self, event):
        self.note(f"progress {event.stage}")

    def _watch(self, patch, name):
        """A function of the package, wherever it was imported to."""
        owners = [
            module for key, module in sys.modules.items() if key.startswith("moesparse.") and name in vars(module)
        ]
        assert owners, name
        function = getattr(owners[0], name)

        def call(*args, **options):
            self.note(f"call {name}")
            return function(*args, **options)

        for module in owners:
            patch.setattr(module, name, call)


def short(path):
    """The last folder of a path with the name, without what the test's own folder is called."""
    path = Path(os.fspath(path))
    return f"{path.parent.name}/{path.name}"


def at(place, do, count=1):
    """A note that calls `do` at the `count`-th line that matches."""
    seen = 0

    def note(line):
        nonlocal seen
        if re.search(place, line):
            seen += 1
            if seen == count:
                do()

    return note


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error=ENOSPC):
    def do():
        raise error

    return do


def killed(work, note, calls=()):
    """Do `work(progress)` in a child process that `note` kills by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's threads did not come along
            with pytest.MonkeyPatch.context() as patch:
                work(Watch(patch, note, calls).progress)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the run ended before that"


def lines(work, calls=()):
    """Every line of an undisturbed run."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        work(Watch(patch, found.append, calls).progress)
    return found


def tensors_of(folder):
    """Every weight by key, and the config."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found, json.loads((folder / "config.json").read_text())


def assert_same(one, other):
    tensors, config = tensors_of(one)
    others, other_config = tensors_of(other)
    assert config == other_config
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)


class SmallDisk:
    """A disk of a size of one's own choice, which can be remounted with another one; needs root."""

    def __init__(self, path, size):
        path.mkdir()
        self.path = path
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", str(self.path)], check=True)
