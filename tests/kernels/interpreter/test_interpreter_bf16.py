"""The interpreter's bfloat16 correction itself: casts bit for bit with torch, dots against fp64, the rest refused."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter_bf16 import bf16_to_fp32, fp32_to_bf16


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Grid (cdiv(numel, BLOCK),): out = x in out's dtype."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """Grid (1,): out (SIZE, SIZE) = a (SIZE, STEPS * SIZE) @ b (STEPS * SIZE, SIZE), accumulated in fp32."""
    offs = tl.arange(0, SIZE)
    acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for k in range(0, STEPS * SIZE, SIZE):
        a = tl.load(a_ptr + offs[:, None] * (STEPS * SIZE) + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs)[:, None] * SIZE + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + offs[:, None] * SIZE + offs[None, :], acc)


@triton.jit
def _arithmetic_kernel(x_ptr, OP: tl.constexpr):
    """Grid (1,): bf16 arithmetic without a cast, which these tests must never let through."""
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs)
    if OP == "add":
        x = x + x
    elif OP == "scale":
        x = x * 2.0
    elif OP == "negate":
        x = -x
    elif OP == "compare":
        x = tl.where(x > x, x, x)
    elif OP == "sum":
        x += tl.sum(x, 0)
    tl.store(x_ptr + offs, x)


def _hard_floats() -> torch.Tensor:
    """Ties, subnormals, overflow to infinity, both zeros, infinities, NaN, and random bit patterns."""
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x007FFFFF, 1])
    special = torch.tensor([0, -(2**31), 0x7F800000, -0x00800000, 0x7FC00000, 0x7F800001, -1, 0x3F800000])
    noise = torch.randint(-(2**31), 2**31, (1008,), generator=torch.Generator().manual_seed(0))
    return torch.cat([ties, special, noise]).to(torch.int32).view(torch.float32)


def _assert_same_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(torch.uint8), expected[~nan].view(torch.uint8))


def test_rounding_matches_torch_bit_for_bit():
    x = _hard_floats()
    actual = torch.from_numpy(fp32_to_bf16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    _assert_same_values(actual, x.bfloat16())


def test_widening_covers_every_bf16():
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    _assert_same_values(torch.from_numpy(bf16_to_fp32(bits)), expected)


# fp32 -> fp16 overflows on purpose
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_in_a_kernel(source, target):
    x = _hard_floats().to(source)
    out = torch.full_like(x, float("nan"), dtype=target)
    # one block and the whole: 1024 is the power of two that `_hard_floats` fills
    _cast_kernel[(1,)](x, out, BLOCK=1024)
    _assert_same_values(out, x.to(target))


def test_integers_to_bf16():
    x = torch.arange(-512, 512, dtype=torch.int32)
    out = torch.full((1024,), float("nan"), dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, BLOCK=1024)
    # 257 and up are not exact in bf16: the rounding shows
    assert torch.equal(out, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_exact_in_products_and_fp32_in_sums(dtype):
    # three steps: the accumulator is carried, and the loop counter is the index Triton 3.6 trips over
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in ((16, 48), (48, 16)))
    out = torch.full((16, 16), float("nan"))
    _dot_kernel[(1,)](a, b, out, STEPS=3, SIZE=16)
    exact = a.double() @ b.double()
    assert (out.double() - exact).abs().max() <= 48 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("op", ["add", "scale", "negate", "compare", "sum"])
def test_bf16_arithmetic_is_refused(op):
    with pytest.raises(Exception, match="cast to float32 first"):
        _arithmetic_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), OP=op)
