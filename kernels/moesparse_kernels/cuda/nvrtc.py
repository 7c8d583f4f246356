"""CUDA C++ compiled by NVRTC, NVIDIA's library for that, through its C interface, and kept on disk.

The library is torch's own, or a CUDA toolkit's. A compiled file is found again by its source, architecture and version
of NVRTC in $MOESPARSE_CUDA_CACHE, or else in $XDG_CACHE_HOME/moesparse or ~/.cache/moesparse. Where that folder cannot
be written, every process compiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

__all__ = ["Nvrtc", "architecture", "cache_folder", "compiled", "find", "keep"]

_OPTIONS = ("-std=c++17",)


def cache_folder() -> Path:
    """Where compiled kernels and the verdicts on them lie."""
    named = os.environ.get("MOESPARSE_CUDA_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesparse"


def keep(file: Path, content: bytes) -> None:
    """Write a file of the cache whole or not at all; nothing where the folder cannot be written."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(content)
        os.replace(part.name, file)


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability."""
    major, minor = capability
    # sm_90a has the instructions that Hopper alone has
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def _candidates() -> list[str]:
    """Files that may be the library: of the packages that torch installs, of a toolkit, of the system."""
    spec = importlib.util.find_spec("nvidia")
    folders = [f"{place}/*/lib" for place in (spec.submodule_search_locations or ())] if spec else []
    folders += [f"{root}/lib64" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    found = [file for folder in folders for file in sorted(glob.glob(f"{folder}/libnvrtc.so.[0-9]*"))]
    major = (torch.version.cuda or "").partition(".")[0]
    # the one of torch's CUDA first: what a newer one compiles, an older driver may not load
    found.sort(key=lambda file: f".so.{major}" not in file)
    return [*found, *([f"libnvrtc.so.{major}"] if major else [])]


@cache
def find() -> Nvrtc | None:
    """The library, None where there is none."""
    for file in _candidates():
        with contextlib.suppress(OSError):
            return Nvrtc(file)
    return None


class Nvrtc:
    """The loaded library.

    Attributes:
        version: (major, minor).
    """

    def __init__(self, file: str) -> None:
        self._library = ctypes.CDLL(file)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def _call(self, name: str, *arguments: object) -> int:
        return getattr(self._library, name)(*arguments)

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(max(size.value, 1))
        self._call(f"nvrtcGet{what}", program, content)
        return content.raw[: size.value]

    def compile(self, source: str, name: str, arch: str, defined: Sequence[str] = ()) -> bytes:
        """A cubin, with the macros of `defined`.

        Raises:
            RuntimeError: the compiler's words.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            options = [f"--gpu-architecture={arch}", *_OPTIONS, *(f"-D{macro}" for macro in defined)]
            texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._call("nvrtcCompileProgram", program, len(options), texts):
                words = self._text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
                version = ".".join(map(str, self.version))
                raise RuntimeError(f"NVRTC {version} must compile {name} for {arch}, got: {words}")
            return self._text(program, "CUBIN")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))


def compiled(nvrtc: Nvrtc, source: Path, arch: str, defined: Sequence[str] = ()) -> bytes:
    """A cubin from the cache, or compiled and put there.

    Raises:
        RuntimeError: the compiler's words.
    """
    text = source.read_text()
    key = hashlib.sha256(repr((text, arch, tuple(defined), nvrtc.version, _OPTIONS)).encode()).hexdigest()[:32]
    file = cache_folder() / f"{source.stem}-{arch}-{key}.cubin"
    if file.is_file():
        return file.read_bytes()
    cubin = nvrtc.compile(text, source.name, arch, defined)
    keep(file, cubin)
    return cubin
