"""Kernels of a cubin loaded and launched through the C interface of NVIDIA's driver.

The calls act on the context that is current in the thread. There is one: what calls this has launched a Triton kernel
on the same device before.
"""

from __future__ import annotations

import ctypes
from functools import cache

__all__ = ["Module", "driver_version", "shared_memory"]

_OPTIN_SHARED_OF_A_BLOCK = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name} must succeed, got error {status}: {(text.value or b'unknown').decode()}")


def driver_version() -> int:
    """Such as 13000 for a driver of CUDA 13.0."""
    version = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(version))
    return version.value


def shared_memory() -> int:
    """Bytes that a block of threads may have on the device of the current context."""
    device, size = ctypes.c_int(), ctypes.c_int()
    _call("cuCtxGetDevice", ctypes.byref(device))
    _call("cuDeviceGetAttribute", ctypes.byref(size), _OPTIN_SHARED_OF_A_BLOCK, device)
    return size.value


class Module:
    """The kernels of a cubin in the current context."""

    def __init__(self, cubin: bytes) -> None:
        self._module = ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(self._module), cubin)
        self._kernels: dict[tuple[str, int], ctypes.c_void_p] = {}

    def _kernel(self, name: str, shared: int) -> ctypes.c_void_p:
        """A kernel that may have so much dynamic shared memory."""
        if (name, shared) not in self._kernels:
            kernel = ctypes.c_void_p()
            _call("cuModuleGetFunction", ctypes.byref(kernel), self._module, name.encode())
            _call("cuFuncSetAttribute", kernel, _MAX_DYNAMIC_SHARED, shared)
            self._kernels[name, shared] = kernel
        return self._kernels[name, shared]

    def launch(self, name: str, grid: int, threads: int, shared: int, stream: int, arguments: ctypes.Structure) -> None:
        """Start a kernel whose one parameter is a structure.

        Raises:
            RuntimeError: the driver's words.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        one, null = ctypes.c_uint(1), None
        size = (ctypes.c_uint(grid), one, one, ctypes.c_uint(threads), one, one, ctypes.c_uint(shared))
        _call("cuLaunchKernel", self._kernel(name, shared), *size, ctypes.c_void_p(stream), pointers, null)
