"""Tiny checkpoints in the formats that the hub ships, under their published names, for tests of quantised folders.

The codes are those that the formats' own libraries would choose, or random where the values do not matter.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesparse.models.on_disk import LayersOnDisk
from moesparse.testing import tiny_model

Tensors = dict[str, Tensor]

BLOCK = [8, 8]
# where transformers reads the format on a CPU, alone or with compressed-tensors; of NVFP4 it drops the global scale
BY_TRANSFORMERS = ["fp8 deepseek", "fp8 qwen", "mxfp4", "fp4 deepseek"]
BY_COMPRESSED_TENSORS = ["int4", "fp8 channel", "mxfp4 packed"]
# names of the families' published checkpoints; the routers and what lies outside of the layers are never quantised
_PLAIN = ("embed_tokens", "head.weight", "mlp.gate.", "ffn.gate.", "norm", "indexer")

_CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
_MX = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
_NV = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
}


def _compressed(form: str, weights: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    group = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": form}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _blocks(weight: Tensor, block: list[int]) -> Tensor:
    """The largest absolute value of every block."""
    rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    room = torch.zeros(rows * block[0], columns * block[1])
    room[: weight.shape[0], : weight.shape[1]] = weight.float().abs()
    return room.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).amax(dim=(1, 3))


def fp8_blocks(name: str, weight: Tensor, block: list[int] = BLOCK) -> Tensors:
    scale = _blocks(weight, block) / 448
    whole = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    whole = whole[: weight.shape[0], : weight.shape[1]]
    return {name: (weight.float() / whole).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def fp8_channels(name: str, weight: Tensor) -> Tensors:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.bfloat16()}


def int4_groups(name: str, weight: Tensor) -> Tensors:
    groups = weight.float().unflatten(1, (-1, 32))
    scale = (groups.abs().amax(2) / 7).bfloat16()
    codes = (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7).flatten(1).long() + 8
    words = (codes.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {
        f"{name}_packed": words,
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def _random_bytes(name: str, *shape: int, low: int = 0, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def mxfp4_packed(name: str, weight: Tensor) -> Tensors:
    out, size = weight.shape
    return {
        f"{name}_packed": _random_bytes(name, out, size // 2),
        f"{name}_scale": _random_bytes(name, out, size // 32, low=121, high=125),
    }


def nvfp4_modelopt(name: str, weight: Tensor) -> Tensors:
    out, size = weight.shape
    return {
        name: _random_bytes(name, out, size // 2),
        f"{name}_scale": _random_bytes(name, out, size // 16, low=60, high=80).view(torch.float8_e4m3fn),
        f"{name}_scale_2": torch.tensor(0.0125),
        name.removesuffix("weight") + "input_scale": torch.tensor(0.5),
    }


def nvfp4(name: str, weight: Tensor) -> Tensors:
    codes, scale, whole, _ = nvfp4_modelopt(name, weight).values()
    return {f"{name}_packed": codes, f"{name}_scale": scale, f"{name}_global_scale": 1 / whole.reshape(1)}


def _words(name: str, *shape: int) -> Tensor:
    return _random_bytes(name, *shape[:-1], shape[-1] * 4).view(torch.int32)


def awq(name: str, weight: Tensor) -> Tensors:
    out, size = weight.shape
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": _words(name, size, out // 8),
        f"{stem}qzeros": _words(f"{name}.", size // 32, out // 8),
        f"{stem}scales": (weight.float().T.unflatten(0, (-1, 32)).abs().amax(1) / 15).half(),
    }


def gptq(name: str, weight: Tensor) -> Tensors:
    out, size = weight.shape
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": _words(name, size // 8, out),
        # 7 everywhere, that is 8: symmetric
        f"{stem}qzeros": torch.full((size // 32, out // 8), 0x77777777, dtype=torch.int32),
        f"{stem}scales": (weight.float().T.unflatten(0, (-1, 32)).abs().amax(1) / 8).half(),
        f"{stem}g_idx": torch.arange(size, dtype=torch.int32) // 32,
    }


def fp4_deepseek(name: str, weight: Tensor) -> Tensors:
    """Experts in FP4; all else in FP8 blocks of the same names."""
    stem = name.removesuffix("weight")
    if ".experts." not in name:
        codes, scale = fp8_blocks(name, weight).values()
        return {name: codes, f"{stem}scale": (2.0 ** scale.log2().ceil()).to(torch.float8_e8m0fnu)}
    codes, scale = mxfp4_packed(name, weight).values()
    return {name: codes.view(torch.int8), f"{stem}scale": scale.view(torch.float8_e8m0fnu)}


def mxfp4(name: str, weight: Tensor) -> Tensors:
    """Of experts [E, in, out]."""
    E, size, out = weight.shape
    return {
        f"{name}_blocks": _random_bytes(name, E, out, size // 32, 16),
        f"{name}_scales": _random_bytes(name, E, out, size // 32, low=121, high=125),
    }


def _linear(key: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and key.endswith(".weight") and not any(part in key for part in _PLAIN)


def _of_an_expert(key: str, tensor: Tensor) -> bool:
    return _linear(key, tensor) and ".experts." in key


# case -> family, what is quantised, by what, quantization_config
CASES: dict[str, tuple[str, Callable[[str, Tensor], bool], Callable[[str, Tensor], Tensors], dict[str, Any]]] = {
    "fp8 deepseek": (
        "deepseek_v3",
        _linear,
        fp8_blocks,
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": BLOCK},
    ),
    "fp8 qwen": (
        "qwen3_moe",
        _linear,
        fp8_blocks,
        {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
            "quant_method": "fp8",
            "weight_block_size": BLOCK,
        },
    ),
    "mxfp4": (
        "gpt_oss",
        lambda key, tensor: key.endswith(("gate_up_proj", "down_proj")),
        mxfp4,
        {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
            "quant_method": "mxfp4",
        },
    ),
    "int4": (
        "deepseek_v3",
        _of_an_expert,
        int4_groups,
        _compressed("pack-quantized", _GROUPS, ["re:.*\\.experts\\..*"]),
    ),
    "fp8 channel": ("glm4_moe", _linear, fp8_channels, _compressed("float-quantized", _CHANNELS, ["Linear"])),
    "mxfp4 packed": (
        "deepseek_v3",
        _of_an_expert,
        mxfp4_packed,
        _compressed("mxfp4-pack-quantized", _MX, ["re:.*\\.experts\\..*"]),
    ),
    "nvfp4": (
        "qwen3_moe",
        _of_an_expert,
        nvfp4,
        _compressed("nvfp4-pack-quantized", _NV, ["re:.*\\.experts\\..*"]),
    ),
    "nvfp4 modelopt": (
        "qwen3_moe",
        _of_an_expert,
        nvfp4_modelopt,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
    ),
    "fp4 deepseek": (
        "deepseek_v4",
        _linear,
        fp4_deepseek,
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": BLOCK,
            "expert_dtype": "fp4",
        },
    ),
    "awq": (
        "qwen3_moe",
        _of_an_expert,
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ),
    "gptq": (
        "mixtral",
        _of_an_expert,
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    ),
}


def write_quantised(folder: Path, case: str, *, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """A checkpoint of a tiny model in one of the CASES.

    Args:
        folder: to write to.
        case: a key of CASES.
        dtype: of what stays plain.
        **config: of the model.
    """
    family, is_quantised, quantise, said = CASES[case]
    tiny_model(family, **config).to(dtype).save_pretrained(folder)
    quantise_folder(folder, is_quantised, quantise, said)
    return folder


def quantise_folder(
    folder: Path,
    is_quantised: Callable[[str, Tensor], bool],
    quantise: Callable[[str, Tensor], Tensors],
    said: dict[str, Any],
) -> None:
    """Replace tensors of a checkpoint, and say so in its config."""
    found: Tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        found |= quantise(key, tensor) if is_quantised(key, tensor) else {key: tensor}
    found = {key: tensor.contiguous() for key, tensor in found.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}, indent=2))


def raw(folder):
    """Name -> (dtype, shape, bytes) of every tensor, by safetensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                flat = tensor.contiguous().reshape(-1).view(torch.uint8)
                found[name] = (tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes())
    return found


def whole_model(folder):
    """A folder's weights, dequantised, in a model of plain ones."""
    layers = LayersOnDisk(folder).open()
    state = {name: layers.model.state_dict()[name] for name in layers.outside}
    for position in range(len(layers)):
        with layers.hold(position):
            state |= {name: tensor.clone() for name, tensor in layers.state(position).items()}
    model = AutoModelForCausalLM.from_config(layers.model.config, dtype=torch.bfloat16).eval()
    # also what stays in float32 there
    model.load_state_dict(state, assign=True)
    return model


def dequantised(folder):
    """As transformers loads it."""
    from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

    kinds = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config, "compressed-tensors": CompressedTensorsConfig}
    said = LayersOnDisk(folder).said
    wanted = kinds[said["quant_method"]](dequantize=True)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=wanted, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    return model.eval()
