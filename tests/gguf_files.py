"""Small GGUF models as llama.cpp stores them, written by the gguf package, and what llama.cpp makes of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf, xllamacpp = pytest.importorskip("gguf"), pytest.importorskip("xllamacpp")
Type = gguf.GGMLQuantizationType

VOCABULARY, HIDDEN, EXPERTS, USED, LAYERS = 64, 256, 16, 4, 2
"""Blocks of the K types are 256 long. 12 of 16 experts stay in most tests: llama.cpp multiplies by routers in tiles of
four rows, and where the last tile is not full its sums come in another order."""

WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0")
RANDOM = {
    "Q2_K": ((80, 82), 5e-3),
    "Q3_K": ((108,), 1e-3),
    "Q4_K": ((0, 2), 3e-4),
    "Q5_K": ((0, 2), 3e-4),
    "Q6_K": ((208,), 5e-5),
    "IQ4_NL": ((0,), 1e-3),
    "IQ4_XS": ((0,), 3e-5),
    "IQ2_XXS": ((0,), 1e-3),
    "IQ3_S": ((0,), 1e-3),
}
"""Types that the package reads and does not write -> where in a block float16 scales are, and what they are set to: the
rest of it is drawn at random."""


@functools.cache
def values(kind: str, shape: tuple[int, ...], seed: int, scale: float = 0.1) -> np.ndarray:
    """A tensor of a type: quantised normal values, or blocks of random codes with small scales."""
    drawn = np.random.default_rng([seed, *shape])
    quantisation = Type[kind]
    if kind not in RANDOM:
        return gguf.quants.quantize(drawn.standard_normal(shape, np.float32) * np.float32(scale), quantisation)
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    codes = drawn.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    places, scale = RANDOM[kind]
    for place in places:
        codes[:, place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    return codes.reshape(*shape[:-1], -1)


class Writer(gguf.GGUFWriter):
    """Writes empty arrays too, as other programs do."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            return self._pack("I", vtype) + self._pack("I", gguf.GGUFValueType.INT32) + self._pack("Q", 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def start(path: Path, family: str, *, layers: int = LAYERS, hidden: int = HIDDEN, split: int = 0, **more: int) -> Any:
    """A writer with the metadata that every family has; the vocabulary has 64 words."""
    writer = Writer(path, family, split_max_tensors=split)
    sizes: dict[str, Any] = {
        "block_count": layers,
        "context_length": 256,
        "embedding_length": hidden,
        "feed_forward_length": HIDDEN,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
        "expert_feed_forward_length": HIDDEN,
        "vocab_size": VOCABULARY,
    }
    for key, value in (sizes | {key.replace("__", "."): value for key, value in more.items()}).items():
        writer.add_uint32(f"{family}.{key}", value)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<eos>", *(f"t{number}" for number in range(1, VOCABULARY))])
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    return writer


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def minimax(
    path: Path, kind: str = "F32", *, router: str = "F32", masked: Any = (), seed: int = 0, split: int = 0, **more: int
) -> Path:
    """A model of minimax-m2, whose selection bias can keep an expert from ever being chosen.

    Args:
        path: of the file.
        kind: type of the experts.
        router: type of the routers.
        masked: for each layer the experts whose selection bias is -1e9.
        seed: of the values.
        split: tensors of a file.
        more: metadata of the family.
    """
    writer = start(path, "minimax-m2", split=split, **more)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)

    def add(name: str, *shape: int, kind: str = "F32", scale: float = 0.1, one: bool = False) -> None:
        found = values(kind, shape, seed + len(name), scale)
        writer.add_tensor(name, found + np.float32(1) if one else found, raw_dtype=Type[kind])

    add("token_embd.weight", VOCABULARY, HIDDEN, scale=1.0)
    add("output_norm.weight", HIDDEN, one=True)
    add("output.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", 128), ("attn_k_norm", 64)):
            add(f"{at}{name}.weight", size, one=True)
        for name, shape in (("q", (128, HIDDEN)), ("k", (64, HIDDEN)), ("v", (64, HIDDEN)), ("output", (HIDDEN, 128))):
            add(f"{at}attn_{name}.weight", *shape)
        writer.add_tensor(
            f"{at}ffn_gate_inp.weight", values(router, (EXPERTS, HIDDEN), seed + layer, 0.3), raw_dtype=Type[router]
        )
        for name in ("gate", "up", "down"):
            add(f"{at}ffn_{name}_exps.weight", EXPERTS, HIDDEN, HIDDEN, kind=kind)
        bias = values("F32", (EXPERTS,), seed + layer).copy()
        if masked:
            bias[masked[layer]] = -1e9
        writer.add_tensor(f"{at}exp_probs_b.bias", bias)
    finish(writer)
    return path


def read(path: Path) -> tuple[dict[str, bytes], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Metadata key -> the bytes of its record; tensor -> type, shape with the slowest dimension first, bytes."""
    reader = gguf.GGUFReader(path)
    records = {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    tensors = {
        each.name: (each.tensor_type.name, tuple(each.shape.tolist()[::-1]), each.data.tobytes())
        for each in reader.tensors
    }
    return records, tensors


def log_probabilities(path: Path, prompts: list[list[int]]) -> np.ndarray:
    """[prompts, words] of the word behind each prompt, as llama.cpp computes them; keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 128, 1, 1
    params.warmup, params.verbosity = False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    rows = []
    for prompt in prompts:
        asked = {"max_tokens": 1, "temperature": 0, "logprobs": VOCABULARY, "n_probs": VOCABULARY}
        said = server.handle_completions({"prompt": prompt, "cache_prompt": False, **asked})
        said = said if isinstance(said, dict) else json.loads(said)
        row = np.full(VOCABULARY, np.nan)
        for word in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[word["id"]] = word["logprob"]
        rows.append(row)
    found = np.array(rows)
    assert not np.isnan(found).any()
    return found
