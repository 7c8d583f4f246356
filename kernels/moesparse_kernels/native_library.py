"""The compiled CPU kernels: found beside this package, checked, and called by way of ctypes.

The sources are in native/, and native/moesparse_native.h says what the calls do; this file mirrors its structures. The
build puts `_native.so` here (setup.py). Without it, or on a CPU that has none of its instruction paths, everything runs
in plain torch as before. Work is shared by torch's own threads, through two functions of torch's stable C interface.

Environment, read when the library is first wanted:

    MOESPARSE_NATIVE=0         plain torch, whatever is there
    MOESPARSE_NATIVE_PATH=avx2 an instruction path other than the CPU's best
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .native_sources import source_digest

__all__ = [
    "ABI",
    "DTYPES",
    "LIBRARY",
    "Gemm",
    "Layer",
    "Native",
    "Unpack",
    "Weight",
    "library",
    "matrices",
    "native_path",
    "reason_without",
    "turned_off",
    "unpack_rows",
]

# MOESPARSE_ABI of moesparse_native.h
ABI = 3

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""enum moesparse_dtype."""

LIBRARY = Path(__file__).with_name("_native.so")

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Weight(ctypes.Structure):
    """moesparse_weight."""

    _fields_ = (
        ("values", _POINTER),
        ("index", _POINTER),
        ("scales", _POINTER),
        ("rows", _I64),
        ("columns", _I64),
        ("value_row", _I64),
        ("value_expert", _I64),
        ("index_row", _I64),
        ("index_expert", _I64),
        ("scales_row", _I64),
        ("scales_expert", _I64),
        ("n", _I32),
        ("m", _I32),
        ("bits", _I32),
        ("group", _I32),
        ("scales_dtype", _I32),
    )


class Layer(ctypes.Structure):
    """moesparse_layer."""

    _fields_ = (
        ("stage", _I32),
        ("dtype", _I32),
        ("y_dtype", _I32),
        ("activation", _I32),
        ("gated", _I32),
        ("x_bits", _I32),
        ("experts", _I64),
        ("tokens", _I64),
        ("top_k", _I64),
        ("up", Weight),
        ("down", Weight),
        ("up_bias", _POINTER),
        ("down_bias", _POINTER),
        ("x", _POINTER),
        ("ids", _POINTER),
        ("gates", _POINTER),
        ("ids_bytes", _I32),
        ("gates_dtype", _I32),
        ("rows", _POINTER),
        ("y", _POINTER),
    )


class Gemm(ctypes.Structure):
    """moesparse_gemm."""

    _fields_ = (
        ("weight", Weight),
        ("bias", _POINTER),
        ("x", _POINTER),
        ("y", _POINTER),
        ("tokens", _I64),
        ("dtype", _I32),
        ("x_bits", _I32),
    )


class Unpack(ctypes.Structure):
    """moesparse_unpack."""

    _fields_ = (("weight", Weight), ("out", _POINTER), ("value_bytes", _I32))


class Native:
    """The loaded library.

    Attributes:
        file: where it lies.
        sources: digest of the sources it was built from.
        paths: the instruction paths this CPU has, best first.
        path: the one in use.
        threads: whether torch's threads share the work; else one does all.
    """

    def __init__(self, file: Path) -> None:
        """Load a library and see that it is the one of these sources.

        Raises:
            OSError: it cannot be loaded.
            ValueError: it was built from other sources.
        """
        self.file = file
        self._library = ctypes.CDLL(str(file))
        self.sources = self._check_version(file)
        for name, argument in (("layer", Layer), ("gemm", Gemm), ("unpack", Unpack)):
            function = getattr(self._library, f"moesparse_run_{name}")
            function.argtypes, function.restype = (ctypes.POINTER(argument),), _I32
        self._library.moesparse_path.argtypes = (_I32,)
        self._library.moesparse_path.restype = ctypes.c_char_p
        self._library.moesparse_force_path.argtypes = (ctypes.c_char_p,)
        self._library.moesparse_read.argtypes = (_POINTER, _I64)
        self._library.moesparse_read.restype = ctypes.c_uint64
        self.paths = self._find_paths()
        self.path = self.paths[0] if self.paths else None
        self.threads = self._use_torch_threads()

    def _check_version(self, file: Path) -> str:
        try:
            abi = int(self._library.moesparse_abi())
            self._library.moesparse_sources.restype = ctypes.c_char_p
            sources = self._library.moesparse_sources().decode()
        except AttributeError:
            raise ValueError(f"{file} must be the library of this package, got one without its functions") from None
        wanted = source_digest()
        if abi != ABI or (wanted is not None and sources != wanted):
            raise ValueError(
                f"{file} must be built from the sources of this package (interface {ABI}, sources {wanted}), "
                f"got interface {abi}, sources {sources}; install the package again, or in a clone run make native"
            )
        return sources

    def _find_paths(self) -> tuple[str, ...]:
        names, index = [], 0
        while (name := self._library.moesparse_path(index)) is not None:
            names.append(name.decode())
            index += 1
        return tuple(names)

    def _use_torch_threads(self) -> bool:
        suffix = "dylib" if sys.platform == "darwin" else "so"
        file = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
        try:
            # the copy that torch has loaded, never a second one
            torch_cpu = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            functions = [ctypes.cast(torch_cpu[name], _POINTER) for name in _TORCH_FUNCTIONS]
        except (OSError, AttributeError):
            return False
        self._library.moesparse_set_threads(*functions)
        return True

    def force_path(self, name: str | None) -> None:
        """Take another instruction path from now on, None the best one.

        Raises:
            ValueError: this CPU does not have it.
        """
        if not self._library.moesparse_force_path(None if name is None else name.encode()):
            raise ValueError(f"path must be one this CPU has, {', '.join(self.paths) or 'none'}, got {name!r}")
        self.path = name or self.paths[0]

    @functools.cached_property
    def _better(self) -> frozenset[torch.dtype]:
        return frozenset(dtype for dtype, code in DTYPES.items() if self._library.moesparse_better_elsewhere(code))

    def torch_has_better(self, dtype: torch.dtype) -> bool:
        """Whether the CPU multiplies matrices of a dtype by instructions that torch uses and these kernels do not."""
        return dtype in self._better

    def run_layer(self, layer: Layer) -> None:
        _check_status(self._library.moesparse_run_layer(layer))

    def run_gemm(self, gemm: Gemm) -> None:
        _check_status(self._library.moesparse_run_gemm(gemm))

    def run_unpack(self, unpack: Unpack) -> None:
        _check_status(self._library.moesparse_run_unpack(unpack))

    def read(self, tensor: torch.Tensor) -> None:
        """Read the whole pages of a contiguous tensor: how fast memory is, for benchmarks."""
        self._library.moesparse_read(tensor.data_ptr(), tensor.nbytes)


_TORCH_FUNCTIONS = ("torch_parallel_for", "torch_get_num_threads")


def _check_status(status: int) -> None:
    # enum moesparse_status
    if status == 1:
        raise MemoryError("no memory for the packed tokens of an expert layer")
    assert status == 0, "the library runs only where it has an instruction path"


def _load(file: Path) -> tuple[Native | None, str | None]:
    """The library, or None and why there is none."""
    asked = os.environ.get("MOESPARSE_NATIVE") or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"MOESPARSE_NATIVE must be 0 or 1, got {asked!r}; MOESPARSE_NATIVE_PATH names a path")
    if asked == "0":
        return None, "MOESPARSE_NATIVE=0 turns it off"
    if not file.is_file():
        return None, f"{file.name} is not beside the package: it was installed without its compiled part"
    try:
        native = Native(file)
    except (OSError, ValueError) as error:
        # somebody built it, and would wonder why nothing is faster
        warnings.warn(f"the compiled CPU kernels are not used: {error}", stacklevel=3)
        return None, str(error)
    if not native.paths:
        return None, "this CPU has none of its instruction paths"
    wanted = os.environ.get("MOESPARSE_NATIVE_PATH")
    if wanted:
        try:
            native.force_path(wanted)
        except ValueError as error:
            raise ValueError(f"MOESPARSE_NATIVE_PATH: {error}") from None
    return native, None


@functools.cache
def _load_once() -> tuple[Native | None, str | None]:
    return _load(LIBRARY)


_turned_off = False


def _loaded() -> tuple[Native | None, str | None]:
    return (None, "turned_off() turns it off") if _turned_off else _load_once()


@contextlib.contextmanager
def turned_off() -> Iterator[None]:
    """Plain torch inside, as without the library: for comparisons, in one thread."""
    global _turned_off
    before, _turned_off = _turned_off, True
    try:
        yield
    finally:
        _turned_off = before


def library() -> Native | None:
    """The compiled kernels, None where they cannot be used."""
    return _loaded()[0]


def reason_without() -> str | None:
    """Why there are no compiled kernels, None where there are."""
    return _loaded()[1]


def native_path() -> str | None:
    """The instruction path in use: "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon"; None without."""
    native = library()
    return None if native is None else native.path


def matrices(values: torch.Tensor, index: torch.Tensor | None, rows: int, columns: int, n: int, m: int) -> Weight:
    """Matrices (E, rows, columns), packed in "row" order or dense; the tensors must outlive the call."""
    size = values.element_size()
    strides: Sequence[int] = values.stride()
    index_strides = (0, 0) if index is None else index.stride()
    return Weight(
        values=values.data_ptr(),
        index=None if index is None else index.data_ptr(),
        rows=rows,
        columns=columns,
        value_row=strides[1] * size,
        value_expert=strides[0] * size,
        index_row=index_strides[1],
        index_expert=index_strides[0],
        n=n,
        m=m,
    )


def unpack_rows(values: torch.Tensor, index: torch.Tensor, n: int, m: int, out: torch.Tensor) -> bool:
    """Write the dense rows of one packed matrix, bit for bit; False, and nothing written, where that is not for here.

    Args:
        values: (N, K * n / m), last dim contiguous.
        index: (N, K / 8) uint8, last dim contiguous.
        n: weights kept in each group.
        m: columns in a group.
        out: contiguous (N, K), dtype of values.
    """
    # a fake tensor has no memory
    real = all(type(tensor) is torch.Tensor for tensor in (values, index, out))
    native = library() if real and out.device.type == "cpu" else None
    if native is None:
        return False
    N, K = out.shape
    weight = matrices(values.unsqueeze(0), index.unsqueeze(0), N, K, n, m)
    native.run_unpack(Unpack(weight, out.data_ptr(), out.element_size()))
    return True
