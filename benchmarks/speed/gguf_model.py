"""Random models in the shape of Qwen3, dense or MoE, and the same weights as a bf16 GGUF file for llama.cpp.

Names in the file are those that the package gguf has for transformers' names; experts, which transformers keep as gate
over up in one tensor, are three tensors there. Norms and routers are float32, as llama.cpp's converters write them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["random_qwen3", "write_gguf"]


def random_qwen3(layers: int, vocabulary: int, **sizes: int) -> Any:
    """A transformers model with random bf16 weights on the CPU.

    Args:
        layers: of the decoder.
        vocabulary: words.
        sizes: of a Qwen3MoeConfig where num_experts is among them, else of a Qwen3Config.
    """
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    torch.manual_seed(0)
    # llama.cpp's qwen3moe always divides the gates by their sum
    family, more = (Qwen3MoeConfig, {"norm_topk_prob": True}) if "num_experts" in sizes else (Qwen3Config, {})
    config = family(
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        **more,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _bf16(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def _tensors(model: Any, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name for gguf's table, tensor) of all but the layers that are left out."""
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= layers:
            continue
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        else:
            yield name if name.endswith(".weight") else f"{name}.weight", tensor


def write_gguf(model: Any, path: Path, layers: int | None = None) -> Path:
    """Write a model of `random_qwen3` for llama.cpp.

    Args:
        model: bf16, on the CPU.
        path: of the file, written anew.
        layers: how many of the first ones; all when left out.
    """
    import gguf

    layers = layers or model.config.num_hidden_layers
    family = "qwen3moe" if hasattr(model.config, "num_experts") else "qwen3"
    writer = gguf.GGUFWriter(path, family)
    _say_sizes(writer, model.config, layers)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    names = gguf.get_tensor_name_map(arch, layers)
    held = []
    for name, tensor in _tensors(model, layers):
        there = names.get_name(name, try_suffixes=(".weight",))
        assert there is not None, f"gguf knows no {name}"
        exact = tensor.ndim == 1 or "ffn_gate_inp" in there
        data = tensor.float().numpy() if exact else _bf16(tensor)
        kind = gguf.GGMLQuantizationType.F32 if exact else gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(there, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
        held.append((tensor, exact))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # again one by one: all at once would be the model a second time
    for tensor, exact in held:
        writer.write_tensor_data(tensor.float().numpy() if exact else _bf16(tensor))
    writer.close()
    return path


def _say_sizes(writer: Any, config: Any, layers: int) -> None:
    import gguf

    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # a vocabulary of names without a meaning: token ids are what is given
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<eos>", *(f"t{number}" for number in range(1, config.vocab_size))])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (config.vocab_size - 1))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
