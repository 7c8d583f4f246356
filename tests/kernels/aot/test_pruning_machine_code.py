"""The pruning kernels' machine code: no local memory, wide loads and stores, and a ceiling on the instructions.

What the ceilings guard: 3 TB/s on an H100 leave 137 instructions per group of four for the dense result, 107 for the
packed one.
"""

import pytest
from aot_harness import TARGETS, assert_at_most, assert_no_local_memory, compile_kernel, row

from moesparse_kernels.energy import CHUNK, _chunk_energy_kernel
from moesparse_kernels.select import _nm_prune_kernel, _nm_prune_octet_kernel
from moesparse_kernels.threshold import _row_topk_kernel

NVIDIA = ("sm_80", "sm_90")
ALL = (*NVIDIA, "gfx942")
WIDE_LOAD = {"sm_80": r"LDG\.E\.128", "sm_90": r"LDG\.E\.128", "gfx942": r"(global|buffer)_load_dwordx4"}
WIDE_STORE = {"sm_80": r"STG\.E\.128", "sm_90": r"STG\.E\.128", "gfx942": r"(global|buffer)_store_dwordx4"}
SHARED = r"LDS|STS|SHFL|BAR|ds_"

PRUNE = {
    "weight_ptr": "*bf16:16",
    "scale_ptr": "*fp32:16",
    "out_ptr": "*bf16:16",
    "index_ptr": "*u8:16",
    "N": "i32:16",
    "K": "i32:16",
}


def _lanes(target: str) -> int:
    return TARGETS[target].warp_size


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize(
    ("n", "m", "packed", "measured"), [(2, 4, False, 60.5), (2, 4, True, 70.5), (4, 8, False, 76.5), (4, 8, True, 96.0)]
)
def test_nm_prune(n, m, packed, measured, target, machine_code_rows):
    constants = {"GROUP_N": n, "GROUP_M": m, "PACKED": packed, "BLOCK_N": 16, "BLOCK_K": 512}
    code = compile_kernel(_nm_prune_octet_kernel, PRUNE, constants, target, num_warps=512 // (8 * _lanes(target)))
    assert_no_local_memory(code)
    # the weight's first row, its next row, and two for the scale
    assert code.count(WIDE_LOAD[target]) >= 3
    # eight columns become eight bytes of values, or sixteen of dense weight
    narrow = {"gfx942": r"(global|buffer)_store_dwordx2"}.get(target, r"STG\.E\.64")
    assert code.count(narrow if packed else WIDE_STORE[target]) >= 1
    # a thread ranks two groups of four in a turn of the loop
    loop = code.loop()
    machine_code_rows.append(row(code, f"{n}:{m}{' packed' if packed else ''}", loop, units=2, unit="group of 4"))
    # no byte leaves the thread that loaded it: only the scale, outside the loop, may be rearranged
    if target in NVIDIA:
        assert loop.count(SHARED) == 0
        assert loop.count(r"LDG") == loop.count(WIDE_LOAD[target]) == 1
        assert_at_most(loop.total / 2, measured, f"{n}:{m} instructions per group of four on {target}")


@pytest.mark.parametrize("target", ALL)
def test_nm_prune_any_pattern(target, machine_code_rows):
    constants = {"GROUP_N": 8, "GROUP_M": 16, "PACKED": True, "BLOCK_G": 64}
    code = compile_kernel(_nm_prune_kernel, PRUNE, constants, target, num_warps=4)
    assert_no_local_memory(code)
    groups = 64 * 16 / 4 / 4 / _lanes(target)
    machine_code_rows.append(row(code, "8:16 packed", units=groups, unit="group of 4"))


# a row in one warp, and the widest row that is promised
@pytest.mark.parametrize(("columns", "warps", "measured"), [(2048, 1, 3.5), (16384, 16, 4.2)])
@pytest.mark.parametrize("target", ALL)
def test_row_topk(columns, warps, measured, target, machine_code_rows):
    arguments = {name: kind for name, kind in PRUNE.items() if name != "index_ptr"} | {"keep": "i32"}
    code = compile_kernel(_row_topk_kernel, arguments, {"BLOCK_K": columns}, target, num_warps=warps)
    assert_no_local_memory(code)
    assert code.count(WIDE_LOAD[target]) >= 1 and code.count(WIDE_STORE[target]) >= 1
    elements = columns / warps / _lanes(target)
    # one turn counts: a comparison and an addition for each column, and the reduction
    loop = code.loop()
    machine_code_rows.append(row(code, f"{columns} columns", loop, units=elements, unit="column, turn"))
    if target in NVIDIA:
        assert_at_most(loop.total / elements, measured, f"instructions per column and turn on {target}")


# one sum; both, for the second of which no element is loaded again
@pytest.mark.parametrize(("both", "measured"), [(False, 7.9), (True, 8.6)])
@pytest.mark.parametrize("target", ALL)
def test_column_energy(target, both, measured, machine_code_rows):
    arguments = {
        "x_ptr": "*bf16:16",
        "order_ptr": "*i64:16",
        "gates_ptr": "*fp32:16",
        "offsets_ptr": "*i64:16",
        "chunks_ptr": "*i32:16",
        "expert_ptr": "*i32:16",
        "partial_ptr": "*fp32:16",
        "K": "i32:16",
        "num_experts": "i32",
        "stride_xt": "i32:16",
    }
    # both: as the recorder calls it, one row of x for each row
    constants = {"TOP_K": 1 if both else 8, "ROUTED": True, "GATED": True, "BOTH": both}
    constants |= {"CHUNK": CHUNK, "BLOCK_R": 16, "BLOCK_K": 512}
    warps = 512 // (8 * _lanes(target))
    code = compile_kernel(_chunk_energy_kernel, arguments, constants, target, num_warps=warps)
    assert_no_local_memory(code)
    # a thread has 16 rows of the same eight columns, each a 16-byte load, and adds them without its neighbours
    assert code.count(WIDE_LOAD[target]) >= 16
    loop = code.loop()
    machine_code_rows.append(row(code, "bf16, both" if both else "bf16, gated", loop, units=128, unit="element"))
    if target in NVIDIA:
        assert loop.count(SHARED) == 0
        assert_at_most(loop.total / 128, measured, f"instructions per element on {target}")
