"""Tiny random models of every MoE family, and the error budget: what the tests of all rooms, and benchmarks, share.

A family is a transformers `model_type`. Its entry in `MOE_FAMILIES` holds only what its config needs beyond the common
small sizes, and every model runs one forward in a few milliseconds on a CPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.models.blocks import find_moe_blocks
from moesparse.models.opener import opener
from moesparse.weights.patterns import Pattern, mask_from_score

__all__ = [
    "MOE_FAMILIES",
    "UNSUPPORTED_FAMILIES",
    "WRAPPERS",
    "assert_within_budget",
    "has_family",
    "prune_by_magnitude",
    "tiny_model",
]

# Families name the same sizes differently; a config takes those it has. H, I and 2I are multiples of 32, so that every
# n:m pattern divides them, and all differ, so that a transposed matrix cannot pass for a plain one.
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "dense_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_expert_group": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_d_state": 8,
    "sliding_window": 16,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # The default of 0.02 leaves activations so small that no clamp is reached and silu is a straight line.
    "initializer_range": 0.2,
}
_MLA: dict[str, Any] = {"num_key_value_heads": 4}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}

MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "aria_text": {},
    "axk1": {**_MLA, "first_k_dense_replace": 1},
    "bailing_hybrid": {**_MLA, "layer_types": ["linear_attention", "full_attention"], "first_k_dense_replace": 1},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere2_moe": {},
    "deepseek_v2": {**_MLA, "first_k_dense_replace": 0},
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1},
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots1": {"first_k_dense_replace": 0},
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "per_layer_config": {},
    },
    "glm4_moe": {"first_k_dense_replace": 0},
    "glm4_moe_lite": {**_MLA, "first_k_dense_replace": 0},
    "gpt_oss": {"rope_parameters": _ROPE, "swiglu_limit": 0.5},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_chunk_size": 16,
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 32},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {
        **_MLA,
        "q_lora_rank": None,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mistral4": {
        **_MLA,
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64},
    },
    "mixtral": {},
    "muse_spark_text": {"moe_hidden_size": 64},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_vl_moe_text": {},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
}
"""Families whose experts go through ExpertsInterface -> what their tiny config needs. Not all do in every transformers
release that is supported: see `has_family`."""

# of a vision tower: an image of 16 x 16 pixels is 16 patches to it, and 4 tokens in the text
_TOWER: dict[str, Any] = {
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "initializer_range": 0.2,
}
_MROPE: dict[str, Any] = {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}}
# token ids count from the end of the vocabulary
_IDS: dict[str, int] = {"image_token_id": -4, "video_token_id": -3}
_MARKS: dict[str, int] = {"vision_start_token_id": -2, "vision_end_token_id": -1}

WRAPPERS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4": {
        "text": MOE_FAMILIES["gemma4_text"],
        "vision": {"pooling_kernel_size": 2, "position_embedding_size": 64},
        "ids": _IDS | {"audio_token_id": -5, "boi_token_id": -2, "eoi_token_id": -1},
    },
    "glm4v_moe": {
        "text": _MROPE | {"first_k_dense_replace": 1},
        "vision": {},
        "ids": _IDS | {"image_start_token_id": -2, "image_end_token_id": -1},
    },
    "qwen3_5_moe": {
        "text": _MROPE | MOE_FAMILIES["qwen3_5_moe_text"],
        "vision": {"num_position_embeddings": 16},
        "ids": _IDS | _MARKS,
    },
    "qwen3_vl_moe": {
        "text": _MROPE,
        "vision": {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        "ids": _IDS | _MARKS,
    },
}
"""Models for images and text whose text model is one of a MoE family -> what its config needs, by part."""

UNSUPPORTED_FAMILIES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "jetmoe": {"kv_channels": 8},
    "llama4_text": {"intermediate_size_mlp": 64},
    "longcat_flash": {
        "num_layers": 2,
        "num_key_value_heads": 4,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 96,
        "zero_expert_num": 2,
    },
    "nllb-moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
}
"""MoE families whose experts do not, for the tests of the refusals."""


def has_family(family: str) -> bool:
    """Whether the installed transformers has the family, with its experts behind ExpertsInterface."""
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        return False
    module = import_module(CONFIG_MAPPING[family].__module__.replace(".configuration_", ".modeling_"))
    return any(hasattr(value, "_apply_gate") for value in vars(module).values() if isinstance(value, type))


def tiny_model(family: str, seed: int = 0, **config: Any) -> nn.Module:
    """A random model of about 100,000 parameters: fp32, CPU, eval mode; the same seed gives the same bits.

    Args:
        family: a key of MOE_FAMILIES, WRAPPERS or UNSUPPORTED_FAMILIES.
        seed: of the weights; the global generator is left as it was.
        **config: config values that take precedence over the family's; of a wrapper those of its text model.

    Returns:
        The causal language model of the family, or its base model where there is none; a wrapper with its tower.
        Parameters that families start at zero (expert biases, routing corrections) are random too: at zero, leaving
        one out would change nothing.

    Raises:
        ValueError: the family is not in the lists.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    known = MOE_FAMILIES | WRAPPERS | UNSUPPORTED_FAMILIES
    if family not in known:
        raise ValueError(f"family must be one of {sorted(known)}, got {family!r}")
    model_config = _tiny_config(family, known[family], config)
    if family in WRAPPERS:
        auto = opener(model_config)
    else:
        kinds = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel)
        auto = next(kind for kind in kinds if kind is AutoModel or type(model_config) in kind._model_mapping)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(model_config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("bias") and tensor.is_floating_point() and not tensor.any():
                    tensor.normal_(std=0.1)
    return model


def _tiny_config(family: str, entry: dict[str, Any], changes: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    if family not in WRAPPERS:
        return kind(**_known(kind, _SIZES) | entry | changes)
    text, vision = (kind.sub_configs[f"{part}_config"] for part in ("text", "vision"))
    parts = {
        "text_config": _known(text, _SIZES) | entry["text"] | changes,
        "vision_config": _known(vision, _TOWER) | entry["vision"],
    }
    vocabulary = parts["text_config"]["vocab_size"]
    return kind(**parts, **{name: vocabulary + place for name, place in entry["ids"].items()})


def _known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those that a config of the kind has."""
    known = {*kind().to_dict(), *kind.attribute_map}
    return {name: value for name, value in values.items() if name in known}


@torch.no_grad()
def prune_by_magnitude(model: nn.Module, pattern: str = "2:4") -> nn.Module:
    """The model with every expert matrix masked in place: the quickest way to weights that hold an n:m pattern."""
    for block in find_moe_blocks(model):
        for matrix in block.matrices:
            matrix.weight.masked_fill_(~mask_from_score(matrix.weight.abs(), Pattern.parse(pattern)), 0)
    return model


def assert_within_budget(
    actual: Tensor, same_dtype_ref: Tensor, fp64_ref: Tensor, name: str, slack: float = 1.0
) -> None:
    """Lie no further from fp64 than plain torch does at the same dtype, plus one rounding.

    Args:
        actual: what is tested, any dtype.
        same_dtype_ref: plain torch at the dtype of `actual`, accumulated as the tested code promises.
        fp64_ref: the same in fp64, from the same (widened) inputs.
        name: for the message.
        slack: factor on the budget; with 2, code that accumulates in bf16 passes bf16 tests.
    """
    assert actual.isfinite().all(), f"{name}: non-finite values"
    eps = torch.finfo(actual.dtype).eps * fp64_ref.abs().max()
    budget = slack * ((same_dtype_ref.double() - fp64_ref).abs().max() + eps)
    error = (actual.double() - fp64_ref).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} over budget {budget:.2e}"
