"""The harness itself: it must see a spill, a narrow load and a loop where there is one."""

import pytest
import triton
import triton.language as tl
from aot_harness import assert_at_most, assert_no_local_memory, compile_kernel, print_table

TARGETS = ("sm_80", "sm_90", "gfx942")


@triton.jit
def _scale_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Grid (1,): out = 2 x, BLOCK at a time; UNROLL > 1 keeps that many sorted blocks alive at once."""
    for start in range(0, size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs).to(tl.float32) * 2.0
        if UNROLL > 1:
            x += tl.sum(tl.load(x_ptr + offs[:, None] * UNROLL + tl.arange(0, UNROLL)[None, :]).to(tl.float32), 1)
        tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty))


ALIGNED = {"x_ptr": "*bf16:16", "out_ptr": "*bf16:16", "size": "i32:16"}
UNALIGNED = {"x_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32"}
WIDE_LOAD = {"sm_80": r"LDG\.E\.128", "sm_90": r"LDG\.E\.128", "gfx942": r"(global|buffer)_load_dwordx4"}


@pytest.mark.parametrize("target", TARGETS)
def test_reads_registers_loads_and_the_loop(target):
    # 8 bf16 per thread are 16 bytes: one wide load when the addresses are known to be aligned
    block = 8 * (256 if target == "gfx942" else 128)
    code = compile_kernel(_scale_kernel, ALIGNED, {"BLOCK": block, "UNROLL": 1}, target, num_warps=4)
    assert_no_local_memory(code)
    assert 0 < code.registers < 64
    assert code.loop().count(WIDE_LOAD[target]) >= 1
    assert 0 < code.loop().total < code.total
    assert code.loop().histogram().total() == code.loop().total


def test_unaligned_loads_are_not_wide():
    code = compile_kernel(_scale_kernel, UNALIGNED, {"BLOCK": 1024, "UNROLL": 1}, "sm_90", num_warps=4)
    assert code.count(WIDE_LOAD["sm_90"]) == 0
    assert code.count(r"LDG\.E\.U16") >= 8


@pytest.mark.parametrize(("target", "limit"), [("sm_80", {"maxnreg": 32}), ("gfx942", {"waves_per_eu": 8})])
def test_a_spill_is_seen(target, limit):
    # one warp with 8K values needs 128 or more registers per thread, and may not have them
    code = compile_kernel(_scale_kernel, ALIGNED, {"BLOCK": 512, "UNROLL": 16}, target, num_warps=1, **limit)
    assert code.spills > 0 and code.stack > 0
    with pytest.raises(AssertionError, match=rf"_scale_kernel on {target}: \d+ spills"):
        assert_no_local_memory(code)


def test_straight_line_code_has_no_loop():
    code = compile_kernel(_scale_kernel, ALIGNED, {"size": 1024, "BLOCK": 1024, "UNROLL": 1}, "sm_80")
    with pytest.raises(ValueError, match="_scale_kernel must have a loop on sm_80"):
        code.loop()


def test_ceiling_and_table(capsys):
    assert_at_most(11.5, 10.0, "instructions")
    with pytest.raises(AssertionError, match=r"instructions: 11\.60, over 10\.0 by more than 15%"):
        assert_at_most(11.6, 10.0, "instructions")
    print_table([{"kernel": "a", "n": 1.0}, {"kernel": "longer", "n": 2}])
    assert capsys.readouterr().out.splitlines() == ["kernel     n", "------  ----", "a       1.00", "longer     2"]
