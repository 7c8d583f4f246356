"""Experts removed from a large FP8 checkpoint by a plan, beside a copy of the very bytes that stay.

    python -m benchmarks.speed.bench_removal                  # 20 GB read, 15 GB written five times; 35 GB of disk
    python -m benchmarks.speed.bench_removal --gigabytes 1    # to look at
    python -m benchmarks.speed.bench_removal --show           # what the result file holds

A checkpoint is made with the names, shapes and dtypes of Qwen3-30B-A3B-FP8 and as many layers as fill the bytes asked
for; its values are random bytes. A plan keeps three quarters of the experts of each layer, drawn at random. Then the
bytes that stay are copied and flushed (within the kernel, neighbours as one run), and `moesparse prune SOURCE OUT
--plan FILE` runs in a process of its own, by turns; the ratio is its quickest turn over the quickest copy, and every
turn is in the result with the load of the machine. Before each of them the source is dropped from the page cache. The
command's time is all of it: Python, imports, the copy, hashes, flushing, the check of the result. A result is compared
with the plan afterwards, byte for byte.

Memory is what the process had at most; beside it that of the same command on a tiny checkpoint, which is Python, torch
and transformers. What is mapped from files are their libraries.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.files import by_turns, pruned, random_bytes, run_benchmark
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.models.fingerprint import router_sketch
from moesparse.system.shard_writer import ShardWriter
from moesparse.system.shards import Shards, TensorSpec

# of Qwen/Qwen3-30B-A3B-FP8; the embedding is small, so that what is measured are layers
SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 1024,
}
TINY = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
BLOCK = 128
SHARD_BYTES = 4 * 10**9
TURNS = 2


def specs_of(layers: int, sizes: dict[str, Any]) -> list[TensorSpec]:
    """The tensors of a checkpoint, in the order of its layers."""
    H, I, heads = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["head_dim"]
    outer, kv = heads * sizes["num_attention_heads"], heads * sizes["num_key_value_heads"]
    found = [TensorSpec("model.embed_tokens.weight", "BF16", (sizes["vocab_size"], H))]

    def matrix(name: str, out: int, into: int) -> None:
        scales = (-(-out // BLOCK), -(-into // BLOCK))
        found.append(TensorSpec(f"{name}.weight", "F8_E4M3", (out, into)))
        found.append(TensorSpec(f"{name}.weight_scale_inv", "BF16", scales))

    for number in range(layers):
        layer = f"model.layers.{number}"
        for name, out, into in (("q", outer, H), ("k", kv, H), ("v", kv, H), ("o", H, outer)):
            matrix(f"{layer}.self_attn.{name}_proj", out, into)
        found += [TensorSpec(f"{layer}.self_attn.{name}_norm.weight", "BF16", (heads,)) for name in "qk"]
        found += [TensorSpec(f"{layer}.{name}_layernorm.weight", "BF16", (H,)) for name in ("input", "post_attention")]
        found.append(TensorSpec(f"{layer}.mlp.gate.weight", "BF16", (sizes["num_experts"], H)))
        for expert in range(sizes["num_experts"]):
            for name, out, into in (("gate", I, H), ("up", I, H), ("down", H, I)):
                matrix(f"{layer}.mlp.experts.{expert}.{name}_proj", out, into)
    found.append(TensorSpec("model.norm.weight", "BF16", (H,)))
    return [*found, TensorSpec("lm_head.weight", "BF16", (sizes["vocab_size"], H))]


def make_checkpoint(folder: Path, layers: int, sizes: dict[str, Any]) -> None:
    """Write one of random bytes; routers, norms and embeddings are numbers."""
    folder.mkdir()
    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **sizes,
        "quantization_config": said,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random, pool = torch.Generator().manual_seed(0), list[bytes]()
    specs = specs_of(layers, sizes)
    with ShardWriter(folder, specs, SHARD_BYTES) as writer:
        for number, spec in enumerate(specs):
            if ".experts." in spec.name or spec.dtype != "BF16":
                writer.copy(spec.name, random_bytes(spec.nbytes, number, pool))
            else:
                writer.write(spec.name, torch.randn(spec.shape, generator=random).bfloat16())
    writer.write_index()


def make_plan(shards: Shards, layers: int, sizes: dict[str, Any]) -> ExpertPlan:
    """Three quarters of the experts of each layer, drawn at random."""
    random, E = torch.Generator().manual_seed(1), sizes["num_experts"]
    routers = [router_sketch(shards.read(f"model.layers.{number}.mlp.gate.weight")) for number in range(layers)]
    sketches = tuple(tuple(each.tolist()) for each in routers)
    origin = Origin(
        tuple(range(layers)), E, sizes["hidden_size"], sizes["moe_intermediate_size"], sketches, "qwen3_moe"
    )
    kept = [torch.randperm(E, generator=random)[: E * 3 // 4].sort().values for _ in range(layers)]
    return ExpertPlan.of(origin, kept, "drawn at random")


def staying(shards: Shards, plan: ExpertPlan) -> dict[str, str]:
    """Name in the source -> name in the result, of tensors that stay; routers too, which are cut."""
    found = {}
    for name in shards.tensors:
        parts = name.split(".")
        if ".experts." in name:
            ids = plan.kept[int(parts[2])]
            if int(parts[5]) not in ids:
                continue
            parts[5] = str(ids.index(int(parts[5])))
        found[name] = ".".join(parts)
    return found


def check(source: Shards, out: Path, plan: ExpertPlan) -> int:
    """Compare every tensor of the result with the source; how many bytes were equal."""
    result, names = Shards.open(out), staying(source, plan)
    assert result.tensors.keys() == set(names.values()), "the result holds other tensors"
    for name, new in names.items():
        if name.endswith("mlp.gate.weight"):
            rows = source.read(name)[list(plan.kept[int(name.split(".")[2])])]
            assert rows.equal(result.read(new)), f"{new} has other rows"
        else:
            assert all(a == b for a, b in zip(source.chunks(name), result.chunks(new), strict=True)), f"{new} differs"
    return result.nbytes


def measure(work: Path, gigabytes: float) -> dict[str, Any]:
    """One row."""
    layer = sum(spec.nbytes for spec in specs_of(1, SIZES)[1:-2])
    layers, source = max(2, round(gigabytes * 1e9 / layer)), work / "source"
    make_checkpoint(source, layers, SIZES)
    make_checkpoint(work / "tiny", 2, SIZES | TINY)
    shards = Shards.open(source)
    plan, plan_file = make_plan(shards, layers, SIZES), work / "plan.json"
    plan.save(plan_file)
    make_plan(Shards.open(work / "tiny"), 2, SIZES | TINY).save(work / "tiny.json")
    infos = [shards.tensors[name] for name in staying(shards, plan)]
    runs = [(info.file, info.offset, info.offset + info.nbytes) for info in infos]
    sizes: list[int] = []

    def checked() -> None:
        sizes.append(check(shards, work / "out", plan))
        shutil.rmtree(work / "out")

    bare = pruned(work / "tiny", work / "out-tiny", work / "tiny.json")
    found = by_turns(runs, work, lambda: pruned(source, work / "out", plan_file), checked, TURNS)
    return {
        "layers": layers,
        "layer_bytes": layer,
        "tensors": len(shards.tensors),
        "bytes_before": shards.nbytes,
        "bytes_after": sizes[0],
        **found,
        "bare": bare,
    }


def main(arguments: list[str] | None = None) -> None:
    run_benchmark("bench_removal", __doc__, measure, 20.0, arguments)


if __name__ == "__main__":
    main()
