"""Compile a Triton kernel for a GPU that is not there and read its machine code.

    code = compile_kernel(
        _my_kernel,
        {"x_ptr": "*bf16:16", "K": "i32:16", "scale": "fp32"},
        {"BLOCK_K": 128},
        target="sm_90",
        num_warps=4,
    )
    assert_no_local_memory(code)
    assert code.count(r"HMMA") == 32
    assert code.loop().total <= 500

`MachineCode` answers for the whole kernel; `loop()` gives its longest loop, which is where the work of a GEMM or a
reduction is. Counts are of instructions in the program text, per thread. Works for NVIDIA (ptxas and cuobjdump come
with Triton) and AMD (LLVM, likewise); a compilation takes half a second to a few seconds. Needs a process without
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

# the next ptxas will schedule the same kernel a little differently
SLACK = 1.15


@dataclass(frozen=True)
class Block:
    """A run of instructions: `opcodes` in order, `text` the line of each."""

    opcodes: tuple[str, ...]
    text: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.opcodes)

    def count(self, pattern: str) -> int:
        """How many opcodes match the regular expression from their first character on."""
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)

    def histogram(self) -> collections.Counter[str]:
        return collections.Counter(self.opcodes)


@dataclass(frozen=True)
class MachineCode(Block):
    """A compiled kernel.

    Attributes:
        name: the kernel's name.
        target: a key of `TARGETS`.
        registers: vector registers per thread.
        stack: bytes of stack (NVIDIA) or scratch (AMD) per thread.
        spills: local-memory instructions LDL and STL (NVIDIA) or spilled vector registers (AMD).
        shared: bytes of shared memory per program.
        jumps: (from, to) positions in `opcodes` of every backward branch.
        asm: Triton's intermediate forms ("ttir", "ttgir", "llir", "ptx" or "amdgcn") by name.
    """

    name: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    jumps: tuple[tuple[int, int], ...]
    asm: Mapping[str, Any]

    def loop(self) -> Block:
        """The longest innermost loop: from a place that is branched back to, to the last branch that does so."""
        # several branches back to one place are one loop with a `continue` in it
        loops = {start: max(end for end, s in self.jumps if s == start) for _, start in self.jumps}
        innermost = [
            (start, end)
            for start, end in loops.items()
            if not any(start <= s and e <= end and s != start for s, e in loops.items())
        ]
        if not innermost:
            raise ValueError(f"{self.name} must have a loop on {self.target}, got straight-line code")
        start, end = max(innermost, key=lambda span: span[1] - span[0])
        return Block(self.opcodes[start : end + 1], self.text[start : end + 1])


def _source(kernel: triton.JITFunction, arguments: Mapping[str, str], constants: Mapping[str, Any]) -> ASTSource:
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name], _, divisor = arguments[name].partition(":")
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return source(kernel, signature, constexprs, attributes)


def compile_kernel(
    kernel: triton.JITFunction,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str = "sm_90",
    **options: Any,
) -> MachineCode:
    """Compile and disassemble.

    Args:
        kernel: a `@triton.jit` or `@gluon.jit` function.
        arguments: Triton type of each runtime argument: "*bf16", "i32", "fp32", ... A suffix ":16" says that the
            pointer or integer is divisible by 16, as a launch would find out; without it there are no 16-byte loads.
        constants: the `tl.constexpr` arguments, and any other that a launch would turn into a constant (1 or None).
        target: a key of `TARGETS`.
        options: compile options, such as num_warps and num_stages.
    """
    compiled = triton.compile(_source(kernel, arguments, constants), target=TARGETS[target], options=options)
    read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
    return read(compiled, kernel.__name__, target)


def _read_nvidia(compiled: Any, name: str, target: str) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, flag, str(cubin)], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    # "        /*0070*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.MULTILINE)
    position = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    text = tuple(line for _, line in lines)
    opcodes = tuple(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in text)
    jumps = []
    for i, line in enumerate(text):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        # the branch to itself is the padding after the end of every kernel
        if branch and position[int(branch[1], 16)] < i:
            jumps.append((i, position[int(branch[1], 16)]))
    usage_of = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return MachineCode(
        opcodes=opcodes,
        text=text,
        name=name,
        target=target,
        registers=usage_of["REG"],
        stack=usage_of["STACK"],
        spills=sum(bool(re.match(r"LDL|STL", opcode)) for opcode in opcodes),
        shared=compiled.metadata.shared,
        jumps=tuple(jumps),
        asm=compiled.asm,
    )


def _read_amd(compiled: Any, name: str, target: str) -> MachineCode:
    assembly = compiled.asm["amdgcn"]
    text: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    # not up to the first s_endpgm: a block of a loop may lie behind it
    for line in assembly[: assembly.index(".Lfunc_end0")].splitlines():
        line = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\.L\w+):", line):
            labels[label[1]] = len(text)
        elif re.match(r"(?:v|s|ds|global|buffer|flat|scratch)_\w+", line):
            if branch := re.match(r"s_c?branch\w*\s+(\.L\w+)", line):
                branches.append((len(text), branch[1]))
            text.append(line)

    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, f"no {key} in the metadata of {name}"
        return int(found[1])

    opcodes = tuple(line.split()[0] for line in text)
    # a branch back across the end of the program leaves a loop, it does not make one
    jumps = [
        (i, labels[label])
        for i, label in branches
        if labels.get(label, i + 1) <= i and "s_endpgm" not in opcodes[labels[label] : i]
    ]
    return MachineCode(
        opcodes=opcodes,
        text=tuple(text),
        name=name,
        target=target,
        registers=metadata("vgpr_count"),
        stack=metadata("private_segment_fixed_size"),
        spills=metadata("vgpr_spill_count"),
        shared=compiled.metadata.shared,
        jumps=tuple(jumps),
        asm=compiled.asm,
    )


def assert_no_local_memory(code: MachineCode) -> None:
    """No register spills and nothing else in local memory either."""
    assert (code.spills, code.stack) == (0, 0), (
        f"{code.name} on {code.target}: {code.spills} spills, {code.stack} bytes of stack, {code.registers} registers"
    )


def assert_at_most(count: float, measured: float, what: str) -> None:
    """`count` stays under `measured`, the most that any supported Triton made of it, with the slack of `SLACK`."""
    assert count <= measured * SLACK, f"{what}: {count:.2f}, over {measured} by more than {SLACK - 1:.0%}"


def row(
    code: MachineCode, case: str, loop: Block | None = None, *, units: float = 1, unit: str = "program"
) -> dict[str, object]:
    """A line of the table.

    Args:
        code: the compiled kernel.
        case: what tells launches of one kernel apart.
        loop: the part of the code that does the work, the whole kernel if None.
        units: how many `unit` a thread handles in that part.
        unit: what the last column is per.
    """
    return {
        "kernel": code.name.strip("_").removesuffix("_kernel"),
        "case": case,
        "target": code.target,
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "instructions": code.total,
        "in the loop": "-" if loop is None else loop.total,
        "per": unit,
        "instructions per": (loop or code).total / units,
    }


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows with the same keys as a table, numbers to the right, floats to two decimals."""
    header = list(rows[0])
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    right = [any(not isinstance(row[name], str) for row in rows) for name in header]
    for line in [header, ["-" * width for width in widths], *cells]:
        aligned = zip(line, widths, right, strict=True)
        print("  ".join(cell.rjust(width) if last else cell.ljust(width) for cell, width, last in aligned).rstrip())
