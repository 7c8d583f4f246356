"""Machine code of the sparse tensor-core experiment: the instruction is there, with wide copies only."""

import pytest
from aot_harness import assert_at_most, assert_no_local_memory, compile_kernel, row

from benchmarks.speed.sparse_mma import Tile, _sparse_matmul_kernel

ARGUMENTS = {
    **dict.fromkeys(("values_ptr", "metadata_ptr", "tokens_ptr"), "*i32:16"),
    "out_ptr": "*bf16:16",
    "N": "i32:16",
    "k_steps": "i32",
}


# instructions measured per mma.sp
@pytest.mark.parametrize(("target", "tile", "measured"), [("sm_80", Tile(2, 8, 4, 4), 3.3), ("sm_90", Tile(), 2.5)])
def test_sparse_mma(target, tile, measured, machine_code_rows):
    code = compile_kernel(_sparse_matmul_kernel, ARGUMENTS, tile.constants(), target, num_warps=tile.warps)
    loop = code.loop()
    products = 2 * tile.row_fragments * tile.token_fragments
    case = f"{tile.rows} rows, {tile.tokens} tokens"
    machine_code_rows.append(row(code, case, loop, units=products, unit="mma.sp"))
    assert_no_local_memory(code)
    assert loop.count(r"HMMA\.SP\.16832") == products
    # every operand leaves shared memory once, 16 bytes for a lane; no register moves between lanes
    assert loop.count(r"LDS\.128") <= 2 * (tile.row_fragments + tile.token_fragments) + 1
    assert code.count(r"SHFL") == 0
    assert loop.count(r"STS|LDG\.") == 0
    assert_at_most(loop.total / products, measured, f"{case} on {target}: instructions per mma.sp")
