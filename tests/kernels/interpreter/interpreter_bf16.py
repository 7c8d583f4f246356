"""Makes Triton's interpreter right about bfloat16.

The interpreter holds bf16 as uint16 and then computes with the bit patterns: `tl.dot` multiplies
them as integers, + - * and comparisons act on them, and the cast from fp32 truncates where the hardware rounds to
nearest even. Nothing raises, the numbers are wrong.

`install` corrects casts and `tl.dot`. Every other bf16 operation raises: kernels here cast to fp32 before any
arithmetic other than a dot, and this is where that rule is kept.
"""

from __future__ import annotations

import os

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns -> the float32 of the same value; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns, to nearest even; NaN stays NaN (quiet)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet_nan, rounded)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def install() -> None:
    """Correct the interpreter of this process. Call once, before the first kernel runs."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "the correction is for the interpreter only"
    if getattr(InterpreterBuilder, "_bf16_corrected", False):
        return
    InterpreterBuilder._bf16_corrected = True
    cast_impl, create_fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    create_dot = InterpreterBuilder.create_dot

    def cast(self, src, dst_type):
        target = dst_type.scalar
        if _is_bf16(src) and target == tl.bfloat16:
            return src
        if _is_bf16(src):
            wide = _widened(src)
            return wide if target == tl.float32 else cast_impl(self, wide, dst_type)
        if target == tl.bfloat16:
            return TensorHandle(fp32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    def dot(self, a, b, d, *args):
        return create_dot(self, _widened(a), _widened(b), d, *args)

    def refuse_bf16(name):
        original = getattr(InterpreterBuilder, name)

        def guarded(self, *args):
            if any(isinstance(arg, TensorHandle) and _is_bf16(arg) for arg in args):
                raise NotImplementedError(f"bf16 arithmetic in the interpreter ({name}): cast to float32 first")
            return original(self, *args)

        setattr(InterpreterBuilder, name, guarded)

    for name in ("binary_op", "unary_op"):
        refuse_bf16(name)
    _refuse_bf16_reductions()
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast, fp_to_fp
    InterpreterBuilder.create_dot = dot
    if not hasattr(InterpreterBuilder, "get_bf16"):
        # Triton 3.6 has no bf16 constants
        InterpreterBuilder.get_bf16 = lambda self, value: self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)
    _index_by_item()


def _refuse_bf16_reductions() -> None:
    check_tensor = interpreter.ReduceScanOpInterface.check_tensor

    def checked(self, input):
        if any(_is_bf16(tensor.handle) for tensor in input):
            raise NotImplementedError("bf16 reduction or scan in the interpreter: cast to float32 first")
        return check_tensor(self, input)

    interpreter.ReduceScanOpInterface.check_tensor = checked


def _index_by_item() -> None:
    """`range(0, K, BLOCK)` in a kernel: Triton 3.6 with numpy 2.4 calls int() on a one-element array, which raises."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patched
