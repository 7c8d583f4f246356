"""Bytes copied from file to file, within the kernel where it can; and hashed beside that, in a thread."""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, Protocol

__all__ = ["FileBytes", "HashQueue", "copy_bytes", "drop_from_cache", "write_bytes"]

_BUFFER, _AT_ONCE = 2**23, 2**26
# of the bytes that are hashed: they go from the system's cache through that of a core
_HASHED = 2**19
# what may wait to be hashed: it has just been read and shall still be in the system's cache
_QUEUED_BYTES = 2**28


@dataclass(frozen=True)
class FileBytes:
    """So many bytes of a file, from one on."""

    path: Path
    start: int
    nbytes: int

    def __len__(self) -> int:
        return self.nbytes


def write_bytes(data: bytes | memoryview, new: FileIO) -> None:
    """All of it, where the file stands."""
    rest = memoryview(data)
    while rest:
        rest = rest[new.write(rest) :]


def copy_bytes(old: FileIO | BufferedReader, start: int, size: int, new: FileIO) -> None:
    """Bytes of one file to where the other one stands, within the kernel where it can; memory: a buffer of 8 MiB.

    Raises:
        OSError: a file cannot be read or written, or the first is shorter than that.
    """
    while size:
        done = _copy_in_kernel(old, start, size, new) or new.write(os.pread(old.fileno(), min(size, _BUFFER), start))
        if not done:
            raise OSError(f"{old.name} has become shorter")
        start, size = start + done, size - done


def _copy_in_kernel(old: FileIO | BufferedReader, start: int, size: int, new: FileIO) -> int:
    """How many of the bytes were copied; 0 where the system or the file system does not do it."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(old.fileno(), new.fileno(), min(size, _AT_ONCE), start)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


class _Digest(Protocol):
    def update(self, data: Any, /) -> None: ...


def drop_from_cache(file: FileIO, start: int = 0, nbytes: int = 0) -> None:
    """Have the system forget these bytes of a file that are on the disk, all of them where nbytes is 0; a hint.

    Where more bytes go by than fit in memory the system would look for room page by page, at more than a copy's cost.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


class HashQueue:
    """Hashes of files that grow, brought up to date by one thread in the order of the calls.

    Bytes of a file are read again by that thread, out of the system's cache, while the caller copies what comes next.

    Args:
        drop: bytes of a file that were hashed are not wanted in the system's cache any more.
    """

    def __init__(self, *, drop: bool = False) -> None:
        self._drop = drop
        self._thread = ThreadPoolExecutor(1, "moesparse-hash")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._queued = 0
        self._buffer = bytearray(0)

    def update(self, digest: _Digest, data: bytes | memoryview | FileBytes) -> None:
        """Go on with a hash. What lies in memory is hashed when this returns, and may change then.

        Raises:
            OSError: a file of an earlier call cannot be read, or is shorter than that.
        """
        if isinstance(data, FileBytes):
            self._waiting.append((self._thread.submit(self._read, digest, data), len(data)))
            self._queued += len(data)
            while self._queued > _QUEUED_BYTES:
                self._wait()
        else:
            self.finish()
            digest.update(data)

    def finish(self) -> None:
        """Wait for all that was queued; raises what went wrong with it."""
        while self._waiting:
            self._wait()

    def close(self) -> None:
        """End the thread; what is queued is left out."""
        self._thread.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        done, nbytes = self._waiting.popleft()
        self._queued -= nbytes
        done.result()

    def _read(self, digest: _Digest, data: FileBytes) -> None:
        self._buffer = self._buffer or bytearray(_HASHED)
        left, view = data.nbytes, memoryview(self._buffer)
        with FileIO(data.path) as file:
            file.seek(data.start)
            while left:
                got = file.readinto(view[: min(left, _HASHED)])
                if not got:
                    raise OSError(f"{data.path} has become shorter")
                digest.update(view[:got])
                left -= got
            if self._drop:
                drop_from_cache(file, data.start, data.nbytes)
