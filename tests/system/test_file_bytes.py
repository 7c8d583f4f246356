"""Bytes from file to file against the bytes themselves, and hashes beside that against hashlib."""

import hashlib
import os
from io import FileIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesparse.system import file_bytes
from moesparse.system.file_bytes import FileBytes, HashQueue, copy_bytes, write_bytes


@given(
    data=st.binary(max_size=100),
    cut=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    kernel=st.booleans(),
    buffer=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_a_part_is_copied_to_where_the_file_stands(data, cut, kernel, buffer, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / "old").write_bytes(data)
    start, stop = sorted(min(each, len(data)) for each in cut)
    with pytest.MonkeyPatch.context() as patch, FileIO(folder / "old") as old, FileIO(folder / "new", "wb") as new:
        patch.setattr(file_bytes, "_BUFFER", buffer)
        patch.setattr(file_bytes, "_AT_ONCE", buffer)
        if not kernel:
            patch.delattr(os, "copy_file_range", raising=False)
        write_bytes(b"before", new)
        copy_bytes(old, start, stop - start, new)
        write_bytes(memoryview(b"behind"), new)
    assert (folder / "new").read_bytes() == b"before" + data[start:stop] + b"behind"


def test_a_file_that_has_become_shorter_is_an_error(tmp_path):
    (tmp_path / "old").write_bytes(b"abc")
    shorter = pytest.raises(OSError, match="old has become shorter")
    with FileIO(tmp_path / "old") as old, FileIO(tmp_path / "new", "xb") as new, shorter:
        copy_bytes(old, 1, 3, new)


@given(
    parts=st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=50)), max_size=12),
    buffer=st.integers(1, 20),
    queued=st.integers(1, 100),
)
@settings(max_examples=60, deadline=None)
def test_hashes_are_those_of_the_bytes_in_their_order(parts, buffer, queued, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "data"
    file.write_bytes(b"".join(data for _, data in parts))
    digests, queue, at = [hashlib.sha256(), hashlib.sha256()], HashQueue(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_bytes, "_HASHED", buffer)
        patch.setattr(file_bytes, "_QUEUED_BYTES", queued)
        for number, (lies_in_file, data) in enumerate(parts):
            changing = bytearray(data)
            said = FileBytes(file, at, len(data)) if lies_in_file else memoryview(changing)
            queue.update(digests[number % 2], said)
            # what was given in memory may change once it was taken
            changing[:] = bytes(len(data))
            at += len(data)
        queue.finish()
        queue.close()
    for place, digest in enumerate(digests):
        assert digest.digest() == hashlib.sha256(b"".join(data for _, data in parts[place::2])).digest()


def test_what_went_wrong_in_the_thread_is_raised(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    for name, message in (("short", "short has become shorter"), ("missing", "No such file")):
        queue = HashQueue()
        queue.update(hashlib.sha256(), FileBytes(tmp_path / name, 1, 3))
        with pytest.raises(OSError, match=message):
            queue.update(hashlib.sha256(), b"later")
        queue.close()
