"""Machine code of the kernels that run the experts: no spills, packed weights stay in registers, copies are wide."""

import pytest
from aot_harness import assert_at_most, assert_no_local_memory, compile_kernel, row

from benchmarks.speed.model import BEFORE, INSTRUCTIONS
from moesparse_kernels.epilogue import _activate_kernel, _combine_kernel
from moesparse_kernels.grouped_dense import _grouped_dense_kernel
from moesparse_kernels.grouped_nm import _grouped_nm_kernel
from moesparse_kernels.routing import _histogram_kernel, _sort_kernel
from moesparse_kernels.unpack_fragment import _unpack_kernel

ARGUMENTS = {
    **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16:16"),
    **dict.fromkeys(("values_ptr", "index_ptr", "slot_of_ptr", "offsets_ptr"), "*i32:16"),
    # these start anywhere inside the buffer of `route`
    **dict.fromkeys(("block_expert_ptr", "block_row_ptr"), "*i32"),
    **dict.fromkeys(("N", "K", "N_OUT", "stride_xm", "stride_wn"), "i32:16"),
    "stride_we": "i64:16",
    **dict.fromkeys(("R", "E", "tiles", "k_steps", "num_blocks", "split_k", "group_m"), "i32"),
}


def constants(block_m, gated, stages, **more):
    return {
        "TOP_K": 8,
        "GATHER": gated,
        "GATED": gated,
        "ACTIVATION": "silu" if gated else "none",
        "HAS_BIAS": False,
        "EVEN_K": True,
        "BLOCK_M": block_m,
        "STAGES": stages,
        "OWN": False,
        "EXPERTS": 0,
        "FIRST": False,
        "EARLY": False,
        **more,
    }


KERNELS = (
    _grouped_nm_kernel,
    _grouped_dense_kernel,
    _histogram_kernel,
    _sort_kernel,
    _activate_kernel,
    _combine_kernel,
    _unpack_kernel,
)
# sizes that differ between calls or layers, and what starts anywhere inside the buffer of `route`
SIZES = {"R", "E", "tiles", "k_steps", "num_blocks", "chunks", "chunk_size", "split_k", "group_m", "block_m"}
PARTS_OF_A_BUFFER = {"row_of_ptr", "offsets_ptr", "num_rows_ptr", "block_expert_ptr", "block_row_ptr"}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_new_batch_size_is_no_new_kernel(kernel):
    # Triton compiles a size that is 1, or a multiple of 16, and a pointer that is one, as another kernel
    for parameter in kernel.params:
        assert parameter.do_not_specialize or parameter.name not in SIZES, parameter.name
        assert parameter.do_not_specialize_on_alignment or parameter.name not in PARTS_OF_A_BUFFER, parameter.name


def case(gated, block_m, swap=False):
    return f"{'gate/up' if gated else 'down'} {block_m} rows{' swapped' if swap else ''}"


# target, block_m, swap, gated, instructions measured per group of four weights
PACKED = [
    ("sm_80", 16, False, True, 13.9),
    ("sm_90", 16, False, True, INSTRUCTIONS[16, 128]),
    ("sm_90", 16, False, False, 13.7),
    ("sm_90", 32, True, True, INSTRUCTIONS[32, 128]),
    ("sm_90", 64, True, True, INSTRUCTIONS[64, 128]),
]


@pytest.mark.parametrize(("target", "block_m", "swap", "gated", "measured"), PACKED)
def test_packed_nvidia(target, block_m, swap, gated, measured, machine_code_rows):
    code = compile_kernel(
        _grouped_nm_kernel, ARGUMENTS, constants(block_m, gated, 3, SWAP=swap, ROWS=128), target, num_warps=4
    )
    loop = code.loop()
    # a thread decodes 128 x 128 / 4 / 128 groups in a step
    machine_code_rows.append(row(code, case(gated, block_m, swap), loop, units=32, unit="group of 4"))
    assert_no_local_memory(code)
    # two programs on a multiprocessor, of whose shared memory each costs 1 KB more than it asks for
    assert code.registers * 128 * 2 <= 65536 and (code.shared + 1024) * 2 <= 227 << 10
    assert code.count(r"SHFL") == 0
    # x is the only thing that swapped products write to shared memory, 8 rows of 128 columns in a store of the warp
    assert loop.count(r"STS") == (block_m // 8 if swap else 0), "the weight went through shared memory"
    if swap:
        assert loop.count(r"HGMMA") == 16
    else:
        assert loop.count(r"HMMA") == 2 * block_m
    # 16-byte copies: 8 for values, block_m / 8 for x, 1 for the index (or 2 of 8 bytes, of two half tiles)
    assert loop.count(r"LDGSTS\..*128") == 8 + block_m // 8 + (0 if gated else 1)
    assert loop.count(r"LDGSTS\..*64") == (2 if gated else 0)
    assert loop.count(r"LDG\.") == 0
    assert_at_most(loop.total / 32, measured, f"{case(gated, block_m, swap)} on {target}: instructions per group")


# the launches of a layer of few slots: one token's up, half a tile in a program, and down, which begins early, of more
# slots than experts; instructions measured per group, and of the program before its first copy
@pytest.mark.parametrize(
    ("gated", "rows", "experts", "measured", "before"),
    [(True, 64, 0, INSTRUCTIONS[16, 64], 505), (False, 128, 8, 13.7, BEFORE[True])],
)
def test_packed_without_a_routing(gated, rows, experts, measured, before, machine_code_rows):
    how = {"SWAP": False, "ROWS": rows, "OWN": True, "EXPERTS": experts, "FIRST": gated, "EARLY": not gated}
    arguments = ARGUMENTS | {"slot_of_ptr": "*i64:16"}
    code = compile_kernel(_grouped_nm_kernel, arguments, constants(16, gated, 3, **how), "sm_90", num_warps=4)
    loop = code.loop()
    name = f"{case(gated, 16)}, own slots, {rows} weight rows"
    machine_code_rows.append(row(code, name, loop, units=rows // 4, unit="group of 4"))
    assert_no_local_memory(code)
    assert loop.count(r"HMMA") == 32 * rows // 128
    assert loop.count(r"STS|LDG\.|SHFL") == 0, "the weight went through shared memory"
    assert loop.count(r"LDGSTS\..*128") == 8 * rows // 128 + 2 + (0 if gated else 1)
    assert_at_most(loop.total / (rows // 4), measured, f"{name}: instructions per group")
    first_copy = next(i for i, opcode in enumerate(code.opcodes) if opcode.startswith("LDGSTS"))
    assert_at_most(first_copy, before, f"{name}: instructions before the first copy")
    assert ("griddepcontrol.wait" in code.asm["ptx"]) == (not gated)
    assert "griddepcontrol.launch_dependents" in code.asm["ptx"]
    # of the first two steps, all 128 lines of a step by 128 threads
    assert code.asm["ptx"].count("prefetch.global.L2") == (0 if gated else 2)


def test_packed_amd(machine_code_rows):
    code = compile_kernel(
        _grouped_nm_kernel, ARGUMENTS, constants(16, True, 2, SWAP=False, ROWS=128), "gfx942", num_warps=4
    )
    machine_code_rows.append(row(code, case(True, 16), code.loop(), units=16, unit="group of 4"))
    assert_no_local_memory(code)
    assert code.count(r"v_mfma") >= 16
    assert code.count(r"(global|buffer)_load_dwordx4") >= 4


# target, block_m, block_n, block_k, warps, stages, instructions measured per step, tensor-core ones among them
DENSE = [
    ("sm_80", 16, 128, 128, 4, 3, 173, 32),
    ("sm_90", 16, 128, 128, 4, 3, 168, 32),
    ("sm_90", 128, 128, 64, 8, 3, 128, 8),
]


@pytest.mark.parametrize(("target", "block_m", "block_n", "block_k", "warps", "stages", "measured", "mma"), DENSE)
def test_dense_nvidia(target, block_m, block_n, block_k, warps, stages, measured, mma, machine_code_rows):
    sizes = constants(block_m, True, stages, SWAP=False, BLOCK_N=block_n, BLOCK_K=block_k)
    code = compile_kernel(_grouped_dense_kernel, ARGUMENTS, sizes, target, num_warps=warps)
    loop = code.loop()
    groups = block_n * block_k // 4 // (32 * warps)
    machine_code_rows.append(row(code, case(True, block_m), loop, units=groups, unit="group of 4"))
    assert_no_local_memory(code)
    assert loop.count(r"HG?MMA") == mma
    assert loop.count(r"STS|LDG\.") == 0
    assert loop.count(r"LDGSTS\..*128") == (block_n + block_m) * block_k // 8 // (32 * warps)
    assert_at_most(loop.total, measured, f"dense {case(True, block_m)} on {target}: instructions per step")


def test_dense_amd(machine_code_rows):
    sizes = constants(16, True, 2, SWAP=False, BLOCK_N=128, BLOCK_K=64)
    code = compile_kernel(_grouped_dense_kernel, ARGUMENTS, sizes, "gfx942", num_warps=4)
    machine_code_rows.append(row(code, case(True, 16), code.loop(), units=8, unit="group of 4"))
    assert_no_local_memory(code)
    assert code.count(r"v_mfma") >= 8 and code.count(r"(global|buffer)_load_dwordx4") >= 4


@pytest.mark.parametrize(("experts", "sub"), [(64, 64), (128, 64), (512, 32)])
def test_route_spills_nothing(experts, sub, machine_code_rows):
    arguments = {
        "top_k_index_ptr": "*i64:16",
        **dict.fromkeys(("counts_ptr", "slot_of_ptr"), "*i32:16"),
        **dict.fromkeys(("row_of_ptr", "offsets_ptr", "block_expert_ptr", "block_row_ptr"), "*i32"),
        **dict.fromkeys(("R", "E", "num_blocks", "chunks", "chunk_size", "block_m"), "i32"),
    }
    sizes = {"SUB": sub, "BLOCK_E": experts}
    code = compile_kernel(_sort_kernel, arguments, sizes, "sm_90", num_warps=8)
    machine_code_rows.append(row(code, f"{experts} experts"))
    assert_no_local_memory(code)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_epilogues_and_unpack(target, machine_code_rows):
    wide = {"sm_90": r"LDG\.E(\.\w+)*\.128", "gfx942": r"(global|buffer)_load_dwordx4"}[target]
    pointers = {
        **dict.fromkeys(("rows_ptr", "partial_ptr"), "*fp32:16"),
        **dict.fromkeys(("bias_ptr", "out_ptr"), "*bf16:16"),
        "top_k_index_ptr": "*i64:16",
        "top_k_weights_ptr": "*fp32:16",
        **dict.fromkeys(("row_of_ptr", "slot_of_ptr", "num_rows_ptr"), "*i32"),
        **dict.fromkeys(("values_ptr", "index_ptr"), "*i32:16"),
        **dict.fromkeys(("H", "N", "N_OUT", "K"), "i32:16"),
        **dict.fromkeys(("R", "E", "tiles", "k_steps"), "i32"),
    }
    kernels = {
        _combine_kernel: {
            "TOP_K": 8,
            "SPLIT_K": 2,
            "HAS_BIAS": True,
            "SORTED": False,
            "EARLY": target == "sm_90",
            "BLOCK_H": 1024,
        },
        _activate_kernel: {"SPLIT_K": 2, "ACTIVATION": "silu", "GATED": True, "HAS_BIAS": True, "BLOCK_N": 1024},
        _unpack_kernel: {},
    }
    for kernel, sizes in kernels.items():
        arguments = {name: pointers[name] for name in kernel.arg_names if name not in sizes}
        code = compile_kernel(kernel, arguments, sizes, target, num_warps=4)
        machine_code_rows.append(row(code, ""))
        assert_no_local_memory(code)
        assert code.count(wide) >= 2
