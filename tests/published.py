"""Checkpoints as they are published, by their headers alone: the files are sparse and hold no byte of a weight.

Sizes of the configs: deepseek-ai/DeepSeek-V3.2, moonshotai/Kimi-K2-Thinking and zai-org/GLM-4.7 (those of GLM-4.6) as
copies of their config.json in public repositories have them; openai/gpt-oss-120b by the same and by the defaults of
transformers' GptOssConfig; Qwen/Qwen3-235B-A22B by the arguments of its training scripts in public repositories. How
weights are quantised is what the table of docs/formats.md says. From memory are: which parts of the indexer of V3.2 are
in FP8, the dtype of GLM's scales, and how tensors are shared out to files; none of them matters here.
"""

import json
from pathlib import Path
from typing import Any

Specs = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> dtype as safetensors names it, shape."""

_BYTES = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "I32": 4, "F32": 4}

_DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def _compressed(form: str, weights: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}

CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3.2": _DEEPSEEK | {"quantization_config": _BLOCKS | {"scale_fmt": "ue8m0"}},
    "Kimi-K2-Thinking": {key: value for key, value in _DEEPSEEK.items() if not key.startswith("index_")}
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        # code of the repository, which is never run
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 163840,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 262144,
        "quantization_config": _compressed(
            "pack-quantized",
            _INT4,
            ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up)_proj"],
        ),
    },
    "GLM-4.6-FP8": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 92,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "vocab_size": 151552,
        "n_routed_experts": 160,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 202752,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": _compressed("float-quantized", _CHANNEL, ["lm_head", "re:.*mlp.gate$"]),
    },
    "Qwen3-235B-A22B-FP8": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": _BLOCKS
        | {"modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(94))]},
    },
    "gpt-oss-120b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "vocab_size": 201088,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    },
}


def _plain(name: str, out: int, into: int) -> Specs:
    return {f"{name}.weight": ("BF16", (out, into))}


def _fp8_blocks(name: str, out: int, into: int, scale: str = "F32") -> Specs:
    grid = (-(-out // 128), -(-into // 128))
    return {f"{name}.weight": ("F8_E4M3", (out, into)), f"{name}.weight_scale_inv": (scale, grid)}


def _fp8_channels(name: str, out: int, into: int) -> Specs:
    return {f"{name}.weight": ("F8_E4M3", (out, into)), f"{name}.weight_scale": ("BF16", (out, 1))}


def _int4(name: str, out: int, into: int) -> Specs:
    return {
        f"{name}.weight_packed": ("I32", (out, into // 8)),
        f"{name}.weight_scale": ("BF16", (out, into // 32)),
        f"{name}.weight_shape": ("I32", (2,)),
    }


def _norms(layer: str, hidden: int) -> Specs:
    return {f"{layer}.{name}_layernorm.weight": ("BF16", (hidden,)) for name in ("input", "post_attention")}


def _mlp(name: str, hidden: int, width: int, matrix: Any) -> Specs:
    return (
        matrix(f"{name}.gate_proj", width, hidden)
        | matrix(f"{name}.up_proj", width, hidden)
        | matrix(f"{name}.down_proj", hidden, width)
    )


def _moe(layer: str, config: dict[str, Any], matrix: Any, shared: Any) -> Specs:
    """Of the families with a correction bias and a shared expert."""
    H, I, E = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    found: Specs = {
        f"{layer}.mlp.gate.weight": ("BF16", (E, H)),
        f"{layer}.mlp.gate.e_score_correction_bias": ("F32", (E,)),
    }
    found |= _mlp(f"{layer}.mlp.shared_experts", H, I, shared)
    for expert in range(E):
        found |= _mlp(f"{layer}.mlp.experts.{expert}", H, I, matrix)
    return found


def _latent_attention(layer: str, config: dict[str, Any], matrix: Any) -> Specs:
    H, heads, rope = config["hidden_size"], config["num_attention_heads"], config["qk_rope_head_dim"]
    q, kv, nope, v = (config[key] for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"))
    name = f"{layer}.self_attn"
    found = matrix(f"{name}.q_a_proj", q, H) | matrix(f"{name}.q_b_proj", heads * (nope + rope), q)
    found |= matrix(f"{name}.kv_a_proj_with_mqa", kv + rope, H) | matrix(f"{name}.kv_b_proj", heads * (nope + v), kv)
    found |= matrix(f"{name}.o_proj", H, heads * v)
    found |= {f"{name}.q_a_layernorm.weight": ("BF16", (q,)), f"{name}.kv_a_layernorm.weight": ("BF16", (kv,))}
    if "index_n_heads" in config:
        wide, width = config["index_n_heads"], config["index_head_dim"]
        found |= matrix(f"{name}.indexer.wq_b", wide * width, q) | matrix(f"{name}.indexer.wk", width, H)
        found |= _plain(f"{name}.indexer.weights_proj", wide, H)
        found |= {f"{name}.indexer.k_norm.{end}": ("F32", (width,)) for end in ("weight", "bias")}
    return found


def _grouped_attention(layer: str, config: dict[str, Any], matrix: Any, norms: bool, biases: str) -> Specs:
    H, width = config["hidden_size"], config["head_dim"]
    outer, kv = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    name, found = f"{layer}.self_attn", Specs()
    for which, out, into in (("q", outer, H), ("k", kv, H), ("v", kv, H), ("o", H, outer)):
        found |= matrix(f"{name}.{which}_proj", out, into)
        found |= {f"{name}.{which}_proj.bias": ("BF16", (out,))} if which in biases else {}
    return found | ({f"{name}.{each}_norm.weight": ("BF16", (width,)) for each in "qk"} if norms else {})


def _layer(model: str, number: int, config: dict[str, Any]) -> Specs:
    layer, H = f"model.layers.{number}", config["hidden_size"]
    found = _norms(layer, H)
    if model in ("DeepSeek-V3.2", "Kimi-K2-Thinking"):
        around, experts = (_fp8_blocks, _fp8_blocks) if model == "DeepSeek-V3.2" else (_plain, _int4)
        found |= _latent_attention(layer, config, around)
    elif model == "GLM-4.6-FP8":
        around = experts = _fp8_channels
        found |= _grouped_attention(layer, config, around, norms=True, biases="qkv")
    elif model == "Qwen3-235B-A22B-FP8":
        matrix = lambda *sizes: _fp8_blocks(*sizes, scale="BF16")  # noqa: E731
        found |= _grouped_attention(layer, config, matrix, norms=True, biases="")
        found[f"{layer}.mlp.gate.weight"] = ("BF16", (config["num_experts"], H))
        for expert in range(config["num_experts"]):
            found |= _mlp(f"{layer}.mlp.experts.{expert}", H, config["moe_intermediate_size"], matrix)
        return found
    else:
        return found | _gpt_oss_layer(layer, config)
    if number < config["first_k_dense_replace"]:
        return found | _mlp(f"{layer}.mlp", H, config["intermediate_size"], around)
    found |= _moe(layer, config, experts, around)
    if number >= config["num_hidden_layers"]:
        found |= _plain(f"{layer}.eh_proj", H, 2 * H)
        found |= {f"{layer}.{name}.weight": ("BF16", (H,)) for name in ("enorm", "hnorm", "shared_head.norm")}
    return found


def _gpt_oss_layer(layer: str, config: dict[str, Any]) -> Specs:
    E, H, I = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    found = _grouped_attention(layer, config, _plain, norms=False, biases="qkvo")
    found[f"{layer}.self_attn.sinks"] = ("BF16", (config["num_attention_heads"],))
    found |= {f"{layer}.mlp.router.weight": ("BF16", (E, H)), f"{layer}.mlp.router.bias": ("BF16", (E,))}
    for name, out, into in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        found[f"{layer}.mlp.experts.{name}_blocks"] = ("U8", (E, out, into // 32, 16))
        found[f"{layer}.mlp.experts.{name}_scales"] = ("U8", (E, out, into // 32))
        found[f"{layer}.mlp.experts.{name}_bias"] = ("BF16", (E, out))
    return found


def write_published(folder: Path, model: str, **changes: Any) -> int:
    """Write one of CONFIGS: config.json, the index, and a sparse file for each layer.

    Args:
        folder: new.
        model: a key of CONFIGS.
        **changes: of its config; None leaves a key out.

    Returns:
        The bytes of its tensors.
    """
    config = {key: value for key, value in (CONFIGS[model] | changes).items() if value is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    layers = config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0)
    H, vocabulary = config["hidden_size"], config["vocab_size"]
    outside = _plain("model.embed_tokens", vocabulary, H) | _plain("lm_head", vocabulary, H)
    parts = [outside | {"model.norm.weight": ("BF16", (H,))}, *(_layer(model, each, config) for each in range(layers))]
    weight_map, total = {}, 0
    for number, specs in enumerate(parts, start=1):
        file = folder / f"model-{number:05d}-of-{len(parts):06d}.safetensors"
        total += _write_header(file, specs)
        weight_map |= dict.fromkeys(specs, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_header(file: Path, specs: Specs) -> int:
    entries, at = {}, 0
    for name, (dtype, shape) in specs.items():
        size = _BYTES[dtype]
        for each in shape:
            size *= each
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    with file.open("wb") as data:
        data.write(len(header).to_bytes(8, "little") + header)
        data.truncate(8 + len(header) + at)
    return at
