"""The kernel of grouped_mma_sp.cu on a CPU: compiled by g++ with cuda_emulator.cpp, called by the launcher itself."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from moesparse_kernels.cuda import grouped
from moesparse_kernels.cuda.plan import KERNELS, SOURCE
from moesparse_kernels.moe_reference import activate_torch

HERE = Path(__file__).parent


class Array(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_longlong))


class Report(ctypes.Structure):
    _fields_ = (
        *((name, Array) for name in ("values", "index", "x", "out")),
        ("ints", Array * 4),
        *((name, ctypes.c_void_p) for name in ("values_copied", "index_copied", "stored")),
        *((name, ctypes.c_longlong) for name in ("element_bytes", "shared_bytes", "copies", "seed")),
        ("message", ctypes.c_char * 256),
    )


@dataclass
class Launch:
    """What one launch did: how often each 16 bytes of the weight were copied and each element of out stored."""

    values: np.ndarray
    index: np.ndarray
    stored: np.ndarray


@dataclass
class Emulator:
    """A compiled kernel file, for sm_80 to sm_89 or for newer ones."""

    library: ctypes.CDLL
    multiprocessors: int = 132
    shared_memory: int = 232448
    seed: int = 0
    launches: list[Launch] = field(default_factory=list)

    @contextlib.contextmanager
    def in_place_of_a_gpu(self) -> Iterator[None]:
        """`grouped_mma_sp` of CPU tensors runs here."""
        kept, arguments_of = (grouped.launch, grouped._limits, grouped.activate_rows), grouped.arguments_of
        tensors: list[tuple] = []

        def remember(*of):
            tensors.append(of)
            return arguments_of(*of)

        grouped.arguments_of = remember
        grouped.launch = lambda device, dtype, chosen, arguments: self._launch(chosen, arguments, *tensors.pop())
        grouped._limits = lambda device: (self.multiprocessors, self.shared_memory)
        grouped.activate_rows = _activate_rows
        try:
            yield
        finally:
            grouped.launch, grouped._limits, grouped.activate_rows = kept
            grouped.arguments_of = arguments_of

    def _launch(self, chosen, arguments, x, weight, bias, out, routing, *_) -> None:
        copied = (np.zeros(weight.values.numel() // 4, np.uint16), np.zeros(weight.index.numel() // 4, np.uint16))
        stored = np.zeros(out.shape, np.uint16)
        out.view(torch.int16).fill_(-1)
        report = Report(
            *(_array(tensor) for tensor in (weight.values, weight.index, x, out)),
            (Array * 4)(*(_array(getattr(routing, n)) for n in ("slot_of", "offsets", "block_expert", "block_row"))),
            *(counts.ctypes.data for counts in (*copied, stored)),
            out.element_size(),
            chosen.shared,
            0,
            self.seed,
        )
        call = (chosen.kernel.encode(), chosen.grid, ctypes.byref(arguments), ctypes.byref(report))
        if self.library.emulate(*call):
            raise RuntimeError(report.message.decode())
        self.launches.append(Launch(*copied, stored))


def _array(tensor: torch.Tensor) -> Array:
    return Array(tensor.data_ptr(), tensor.nbytes)


def _activate_rows(partial, bias, top_k_index, slot_of, offsets, activation, gated, dtype):
    """`epilogue.activate_rows` in plain torch."""
    total = partial.float().sum(0)
    if bias is not None:
        total += bias.float()[top_k_index.reshape(-1)[slot_of.long()].clamp(0, bias.shape[0] - 1)]
    return activate_torch(total, activation, gated).to(dtype)


def build(folder: Path, arch: int, dtype: torch.dtype, replace: dict[str, str] | None = None) -> Emulator:
    """Compile the kernels of a dtype, after replacements in their text, each of which must be found once."""
    text = SOURCE.read_text()
    for old, new in (replace or {}).items():
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "kernels.cu", folder / "emulator.so"
    source.write_text(text)
    compiler = shutil.which("g++")
    assert compiler is not None, "tests ask before"
    defined = (*KERNELS[dtype], f"__CUDA_ARCH__={arch}", f'KERNELS="{source}"')
    command = [compiler, "-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", *(f"-D{macro}" for macro in defined)]
    command += ["-shared", "-fPIC", "-o", str(library), str(HERE / "cuda_emulator.cpp")]
    subprocess.run(command, check=True)
    return Emulator(ctypes.CDLL(str(library)))
