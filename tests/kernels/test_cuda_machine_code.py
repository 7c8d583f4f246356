"""Machine code of the CUDA kernel, compiled as a user's process does: sparse products and wide copies, nothing spilled.

Needs NVRTC, which `make test-cuda` fetches, and Triton's cuobjdump.
"""

import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

from moesparse_kernels.cuda import nvrtc, plan

if nvrtc.find() is None:
    pytest.skip("needs NVRTC: make test-cuda", allow_module_level=True)

BF16, FP16 = torch.bfloat16, torch.float16
# Instructions of a thread in one step, 32 groups of four weights. sm_90a: what a model of the issue slots was made
# with, under which memory is the limit. Before, a barrier is some fifteen instructions: as measured. The next compiler
# may make a few more.
CEILINGS = {"sm_90a": {8: 46, 16: 69, 32: 92, 64: 140}, "older": {8: 70, 16: 81, 32: 97, 64: 153}}
SLACK = 1.15
# one block of six warps on a multiprocessor may have 255 of them
REGISTERS = {8: 96, 16: 96, 32: 160, 64: 255}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("cubins"), {}

    def cubin(arch, dtype):
        if (arch, dtype) not in made:
            file = folder / f"{arch}-{dtype}.cubin"
            file.write_bytes(nvrtc.find().compile(plan.SOURCE.read_text(), "kernel.cu", arch, plan.KERNELS[dtype]))
            made[arch, dtype] = _functions(file)
        return made[arch, dtype]

    return cubin


def _cuobjdump(flag, file):
    command = [knobs.nvidia.cuobjdump.path, flag, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _functions(file):
    """(registers, stack, local, lines of code) by the number of tokens."""
    usage = {}
    for name, line in re.findall(r"Function (\w+):\s*\n\s*(.*)", _cuobjdump("-res-usage", file)):
        usage[name] = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
    functions = {}
    for text in re.split(r"Function : ", _cuobjdump("-sass", file))[1:]:
        name = text.split()[0]
        lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE)
        functions[int(name.rpartition("_")[2])] = (usage[name], [(int(a, 16), line) for a, line in lines])
    return functions


def _loop(lines):
    """The shortest loop with products in it."""
    place = {address: i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, line) in enumerate(lines):
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if back and int(back[1], 16) < address:
            loop = [text for _, text in lines[place[int(back[1], 16)] : i + 1]]
            if any("HMMA.SP" in text for text in loop):
                loops.append(loop)
    return min(loops, key=len)


def _count(pattern, lines):
    return sum(bool(re.search(pattern, line)) for line in lines)


@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", BF16), ("sm_89", BF16), ("sm_90a", BF16), ("sm_90a", FP16)])
def test_sparse_products_and_nothing_in_local_memory(arch, dtype, cubins):
    functions = cubins(arch, dtype)
    assert sorted(functions) == sorted(plan.TOKENS)
    for tokens, (usage, lines) in functions.items():
        text, loop = [line for _, line in lines], _loop(lines)
        what = f"{tokens} tokens on {arch}: {len(loop)} instructions in the loop, {usage['REG']} registers"
        assert usage["STACK"] == usage["LOCAL"] == 0 and _count(r"\b(LDL|STL)\b", text) == 0, what
        # six warps of a block alone on a multiprocessor
        assert usage["REG"] <= REGISTERS[tokens] and usage["REG"] * plan.THREADS <= 65536, what
        products = tokens // 8 * 4 * 2
        kind = r"HMMA\.SP\.16832\.F32" + (r"\.BF16" if dtype == BF16 else "")
        assert _count(kind, loop) == _count(r"HMMA", loop) == products, what
        assert _count(r"LDSM\.16\.M88\.4", loop) == tokens // 8 * 4 and _count(r"LDS\.128", loop) == 8, what
        assert _count(r"\b(LDG|STS|SHFL|LDGSTS)\b", loop) == 0, what
        assert len(loop) <= CEILINGS.get(arch, CEILINGS["older"])[tokens] * SLACK, what
        # both units' values and index: four bulk copies, or 36 of 16 bytes a lane
        bulk = 4 if arch == "sm_90a" else 0
        assert _count(r"UBLKCP", text) == bulk, what
        assert _count(r"LDGSTS\.E\.BYPASS.*\.128", text) == tokens // 2 + (0 if bulk else 36), what
        print(what)


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_newer_devices_compile(arch, cubins):
    # no more is known of them: mma.sp is there, how fast it is and what its loop costs is not
    for usage, lines in cubins(arch, BF16).values():
        assert usage["STACK"] == usage["LOCAL"] == 0
        assert _count(r"HMMA\.SP", [line for _, line in lines]) > 0


def test_the_compiler_speaks():
    with pytest.raises(RuntimeError, match=r"must compile wrong.cu for sm_90a, got: wrong.cu\(1\): error"):
        nvrtc.find().compile("int x = ;", "wrong.cu", "sm_90a")
