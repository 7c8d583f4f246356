"""Which formats a checkpoint says it has: quantization_config of config.json, and the side file of ModelOpt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.models.formats.awq import Awq
from moesparse.models.formats.base import Format
from moesparse.models.formats.expert_names import SIDE_FILE
from moesparse.models.formats.fp4_deepseek import Fp4DeepSeek
from moesparse.models.formats.fp8_block import Fp8Block
from moesparse.models.formats.fp8_channel import Fp8Channel
from moesparse.models.formats.gptq import Gptq
from moesparse.models.formats.int4_packed import Int4Packed
from moesparse.models.formats.mxfp4 import Mxfp4
from moesparse.models.formats.mxfp4_packed import Mxfp4Packed
from moesparse.models.formats.nvfp4 import Nvfp4, Nvfp4ModelOpt
from moesparse.models.formats.packed_nm import PackedNm
from moesparse.system.shards import read_json

__all__ = ["PACKED", "formats_of", "said_of"]

PACKED = "moesparse"
"""quant_method of a checkpoint with packed n:m weights."""

Said = Mapping[str, Any]


def said_of(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its formats, as quantization_config has it; None where it says nothing.

    Raises:
        CheckpointError: there is no config.json, or it and the side file say different things.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"MODEL must be a folder with a config.json, got {folder} without one")
    said = read_json(folder / "config.json").get("quantization_config")
    beside = read_json(folder / SIDE_FILE).get("quantization") if (folder / SIDE_FILE).is_file() else None
    if said is not None and not isinstance(said, dict):
        raise CheckpointError(f"quantization_config of {folder / 'config.json'} must be an object, got {said!r}")
    if not isinstance(beside, dict):
        return said
    if said is None:
        return {"quant_method": "modelopt", **beside}
    algorithms = said.get("quant_algo", said.get("moe_quant_algo")), beside.get("quant_algo")
    if None not in algorithms and algorithms[0] != algorithms[1]:
        raise CheckpointError(
            f"config.json and {SIDE_FILE} of {folder} must name one quant_algo, got {algorithms[0]!r} and "
            f"{algorithms[1]!r}"
        )
    return said


def formats_of(said: Said | None) -> tuple[Format, ...]:
    """The formats in which the weights of a checkpoint may be stored, besides plain ones.

    Args:
        said: quantization_config, or None for a checkpoint of plain tensors.

    Raises:
        UnsupportedModelError: a method, or a setting of one, that is not known here; names it.
    """
    if said is None:
        return ()
    method = said.get("quant_method")
    if method not in _METHODS:
        raise _unknown("quant_method", method, tuple(_METHODS))
    return tuple(_METHODS[method](said))


def _unknown(setting: str, got: Any, known: Sequence[Any]) -> UnsupportedModelError:
    some = " or ".join(repr(each) for each in known)
    return UnsupportedModelError(f"{setting} of quantization_config must be {some}, got {got!r}")


def _one_of(said: Said, setting: str, known: Sequence[Any], default: Any = None) -> Any:
    value = said.get(setting, default)
    if value not in known:
        raise _unknown(setting, value, known)
    return value


def _size(said: Said, setting: str, default: int | None = None) -> int:
    value = said.get(setting, default)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModelError(f"{setting} of quantization_config must be a positive size, got {value!r}")
    return value


def _block(value: Any, setting: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, int) and each > 0 for each in value):
        raise UnsupportedModelError(f"{setting} of quantization_config must be two sizes, got {value!r}")
    return value[0], value[1]


def _fp8(said: Said) -> Iterator[Format]:
    _one_of(said, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    sizes = said.get("weight_block_size")
    block = None if sizes is None else _block(sizes, "weight_block_size")
    if said.get("moe_quant_algo") is not None:
        _one_of(said, "moe_quant_algo", ("NVFP4",))
        yield Nvfp4ModelOpt()
    for own, scale in (("", "_scale_inv"), (".weight", ".scale")):
        yield Fp8Block(block, own, scale)
        yield Fp4DeepSeek(own, scale)


def _mxfp4(_said: Said) -> Iterator[Format]:
    yield Mxfp4()


def _modelopt(said: Said) -> Iterator[Format]:
    known = ("NVFP4", "W4A16_NVFP4")
    if _one_of(said, "quant_algo", (*known, "MIXED_PRECISION")) == "MIXED_PRECISION":
        layers = said.get("quantized_layers")
        for name, layer in layers.items() if isinstance(layers, dict) else ():
            algorithm = layer.get("quant_algo") if isinstance(layer, dict) else layer
            if algorithm not in known:
                raise _unknown(f"quantized_layers.{name}", algorithm, known)
    _one_of(said, "group_size", (16,), 16)
    yield Nvfp4ModelOpt()


def _compressed_tensors(said: Said) -> Iterator[Format]:
    for setting in ("transform_config", "sparsity_config"):
        if said.get(setting):
            raise UnsupportedModelError(f"{setting} of quantization_config must be empty, got {said[setting]!r}")
    groups = said.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        known = tuple(_COMPRESSED)
        form = group.get("format") or said.get("format")
        if form not in known:
            raise _unknown(f"format (of {name})", form, known)
        yield _COMPRESSED[form](weights)


def _float_quantized(weights: Said) -> Format:
    _one_of(weights, "type", ("float",))
    _one_of(weights, "num_bits", (8,))
    if _one_of(weights, "strategy", ("channel", "tensor", "block")) == "block":
        return Fp8Block(_block(weights.get("block_structure"), "block_structure"), ".weight", ".weight_scale")
    return Fp8Channel()


def _pack_quantized(weights: Said) -> Format:
    _one_of(weights, "type", ("int",), "int")
    _one_of(weights, "actorder", (None, False, "static", "weight"))
    grouped = _one_of(weights, "strategy", ("group", "channel")) == "group"
    bits = _one_of(weights, "num_bits", (2, 3, 4, 8))
    return Int4Packed(bits, _size(weights, "group_size") if grouped else None, bool(weights.get("symmetric", True)))


def _fp4_packed(weights: Said, group: int, make: Callable[[], Format]) -> Format:
    _one_of(weights, "group_size", (group,))
    _one_of(weights, "symmetric", (True,), True)
    return make()


_COMPRESSED: Mapping[str, Callable[[Said], Format]] = {
    "float-quantized": _float_quantized,
    "pack-quantized": _pack_quantized,
    "mxfp4-pack-quantized": lambda weights: _fp4_packed(weights, 32, Mxfp4Packed),
    "nvfp4-pack-quantized": lambda weights: _fp4_packed(weights, 16, Nvfp4),
}


def _awq(said: Said) -> Iterator[Format]:
    _one_of(said, "version", ("gemm", "GEMM"), "gemm")
    _one_of(said, "bits", (4,), 4)
    yield Awq(_size(said, "group_size", 128), bool(said.get("zero_point", True)))


def _gptq(said: Said) -> Iterator[Format]:
    if said.get("dynamic"):
        raise UnsupportedModelError(f"dynamic of quantization_config must be empty, got {said['dynamic']!r}")
    _one_of(said, "pack_dtype", ("int32",), "int32")
    version = _one_of(said, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    bits, group = _one_of(said, "bits", (4, 8)), said.get("group_size", 128)
    size = group if group == -1 else _size(said, "group_size", 128)
    yield Gptq(
        bits, size, bool(said.get("desc_act", False)), 1 if version == "gptq" else 2, bool(said.get("sym", True))
    )


def _moesparse(_said: Said) -> Iterator[Format]:
    yield PackedNm()


_METHODS: Mapping[Any, Callable[[Said], Iterator[Format]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
    PACKED: _moesparse,
}
