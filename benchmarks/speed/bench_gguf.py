"""Experts removed from a large GGUF file by a plan, beside a copy of the very bytes that stay.

    python -m benchmarks.speed.bench_gguf                   # 8 GB read, 6 GB written five times; 14 GB of disk
    python -m benchmarks.speed.bench_gguf --gigabytes 1     # to look at
    python -m benchmarks.speed.bench_gguf --show            # what the result file holds

A file is made with the names and shapes that llama.cpp gives Qwen3-30B-A3B, in Q4_0, and as many layers as fill the
bytes asked for; its blocks are random bytes. How it is measured is what benchmarks/speed/bench_removal.py says. Python
and the packages gguf, numpy and torch are in the command's time, and in its memory: files are mapped, so what of the
source lies in the page cache counts as mapped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.files import by_turns, pruned, random_bytes, run_benchmark
from moesparse.checkpoints.gguf import GGUFFiles
from moesparse.experts.plan_file import ExpertPlan
from moesparse.pruning.gguf import GGUFModel

# of Qwen3-30B-A3B
H, I, E, TOP, VOCABULARY = 2048, 768, 128, 8, 1024
TURNS = 2


def shapes_of(layers: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Tensor -> shape with the slowest dimension first, and whether it is quantised."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {"token_embd.weight": ((VOCABULARY, H), True)}
    for number in range(layers):
        layer = f"blk.{number}"
        for name, out, into in (("q", 4096, H), ("k", 512, H), ("v", 512, H), ("output", H, 4096)):
            found[f"{layer}.attn_{name}.weight"] = (out, into), True
        found[f"{layer}.ffn_gate_inp.weight"] = (E, H), False
        for name, out, into in (("gate", I, H), ("up", I, H), ("down", H, I)):
            found[f"{layer}.ffn_{name}_exps.weight"] = (E, out, into), True
    return found


def nbytes(shape: tuple[int, ...], quantised: bool) -> int:
    """Q4_0 has 18 bytes for 32 weights, F32 4 for each."""
    count = int(np.prod(shape))
    return count * 18 // 32 if quantised else 4 * count


def make_file(path: Path, layers: int) -> None:
    """Write one of random blocks, a tensor at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer, shapes = GGUFWriter(path, "qwen3moe"), shapes_of(layers)
    writer.add_block_count(layers)
    writer.add_expert_count(E)
    writer.add_expert_used_count(TOP)
    for name, (shape, quantised) in shapes.items():
        stored = (*shape[:-1], shape[-1] * 18 // 32) if quantised else shape
        kind = GGMLQuantizationType.Q4_0 if quantised else GGMLQuantizationType.F32
        dtype = np.dtype(np.uint8 if quantised else np.float32)
        writer.add_tensor_info(name, stored, dtype, nbytes(shape, quantised), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pool: list[bytes] = []
    for number, (shape, quantised) in enumerate(shapes.values()):
        data = np.frombuffer(b"".join(random_bytes(nbytes(shape, quantised), number, pool)), np.uint8)
        writer.write_tensor_data(data if quantised else np.random.default_rng(number).random(shape, np.float32))
    writer.close()


def make_plan(path: Path, out: Path) -> ExpertPlan:
    """Three quarters of the experts of each layer, drawn at random."""
    model, random = GGUFModel(GGUFFiles(path)), torch.Generator().manual_seed(1)
    kept = [torch.randperm(E, generator=random)[: E * 3 // 4].sort().values for _ in model.layers]
    plan = ExpertPlan.of(model.origin(model.layers), kept, "drawn at random")
    plan.save(out)
    return plan


def staying(path: Path, plan: ExpertPlan) -> list[tuple[Path, int, int]]:
    """The bytes that stay, in a run for each expert."""
    runs = []
    for name, tensor in GGUFFiles(path).tensors.items():
        start, rows = int(tensor.data_offset), E if "_exps." in name or "_gate_inp." in name else 1
        size = int(tensor.n_bytes) // rows
        ids = plan.kept[int(name.split(".")[1])] if rows > 1 else (0,)
        runs += [(path, start + each * size, start + (each + 1) * size) for each in ids]
    return runs


def check(source: Path, out: Path, plan: ExpertPlan) -> None:
    """Compare every tensor of the result with the source."""
    before, after = GGUFFiles(source).tensors, GGUFFiles(out).tensors
    assert before.keys() == after.keys(), "the result holds other tensors"
    for name, tensor in before.items():
        cut = "_exps." in name or "_gate_inp." in name
        rows = plan.kept[int(name.split(".")[1])] if cut else range(len(tensor.data))
        assert len(after[name].data) == len(rows), name
        assert all(np.array_equal(after[name].data[new], tensor.data[old]) for new, old in enumerate(rows)), name


def measure(work: Path, gigabytes: float) -> dict[str, Any]:
    """One row."""
    layer = sum(nbytes(*each) for name, each in shapes_of(1).items() if name.startswith("blk."))
    layers, source, out = max(2, round(gigabytes * 1e9 / layer)), work / "source.gguf", work / "out.gguf"
    make_file(source, layers)
    plan, sizes = make_plan(source, work / "plan.json"), list[int]()

    def checked() -> None:
        check(source, out, plan)
        sizes.append(out.stat().st_size)
        out.unlink()

    make_file(work / "tiny.gguf", 1)
    make_plan(work / "tiny.gguf", work / "tiny.json")
    bare = pruned(work / "tiny.gguf", work / "out-tiny.gguf", work / "tiny.json")
    found = by_turns(staying(source, plan), work, lambda: pruned(source, out, work / "plan.json"), checked, TURNS)
    return {
        "layers": layers,
        "layer_bytes": layer,
        "tensors": len(shapes_of(layers)),
        "bytes_before": source.stat().st_size,
        "bytes_after": sizes[0],
        **found,
        "bare": bare,
    }


def main(arguments: list[str] | None = None) -> None:
    run_benchmark("bench_gguf", __doc__, measure, 8.0, arguments)


if __name__ == "__main__":
    main()
