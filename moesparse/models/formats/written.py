"""How rounded values are stored: compressed-tensors, DeepSeek's FP8 by blocks, and the MXFP4 of gpt-oss.

| values | quant_method, format | tensors of a weight |
|---|---|---|
| int8, and integers in groups | compressed-tensors, pack-quantized | weight_packed, _scale, _shape, _zero_point |
| fp8 | compressed-tensors, float-quantized | weight, weight_scale |
| fp8:128x128 | fp8 | weight, weight_scale_inv |
| mxfp4 | compressed-tensors, mxfp4-pack-quantized; of gpt-oss mxfp4 | weight_packed, _scale; _blocks, _scales |
| nvfp4 | compressed-tensors, nvfp4-pack-quantized | weight_packed, _scale, _global_scale |

What is written is read back by the classes beside this one, and must be the weights to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesparse.models.formats.base import CODES, SCALE, Coded
from moesparse.models.formats.fp8_block import Fp8Block
from moesparse.models.formats.fp8_channel import Fp8Channel
from moesparse.models.formats.int4_packed import SHAPE, Int4Packed
from moesparse.models.formats.integers import ZERO
from moesparse.models.formats.mxfp4 import Mxfp4
from moesparse.models.formats.mxfp4_packed import Mxfp4Packed
from moesparse.models.formats.nvfp4 import WHOLE, Nvfp4
from moesparse.weights.codes import pack_words
from moesparse.weights.value_formats import Scales, ValueFormat

__all__ = ["format_of", "said_of_values", "written"]

_PACKED = {"int": "pack-quantized", "fp8": "float-quantized"}
# inputs are rounded too by who multiplies in 8 bits, as in the checkpoints that are published so
_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
_GPT_OSS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def format_of(values: ValueFormat, *, stacked: bool = False) -> Coded:
    """In which values are stored.

    Args:
        values: any format but bf16, which is plain.
        stacked: all experts of a layer in one tensor, as gpt-oss has them: mxfp4 alone.
    """
    if values.kind == "int":
        return Int4Packed(values.bits, values.columns, not values.zero_point)
    if values.kind == "fp8":
        return Fp8Channel() if values.columns is None else Fp8Block((values.rows, values.columns))
    if values.kind == "mxfp4":
        return Mxfp4() if stacked else Mxfp4Packed()
    assert values.kind == "nvfp4"
    return Nvfp4()


def said_of_values(values: ValueFormat, plain: Sequence[str], *, stacked: bool = False) -> dict[str, Any]:
    """What quantization_config says of them.

    Args:
        values: of all experts.
        plain: names of the modules whose matrices are not quantised.
        stacked: as for `format_of`.
    """
    if stacked:
        return {"quant_method": "mxfp4", "modules_to_not_convert": _GPT_OSS}
    if values.rows > 1:
        said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return {**said, "weight_block_size": [values.rows, values.columns], "modules_to_not_convert": list(plain)}
    form = _PACKED.get(values.kind, f"{values.kind}-pack-quantized")
    strategy = "channel" if values.columns is None else "tensor_group" if values.kind == "nvfp4" else "group"
    weights = {
        "num_bits": values.bits,
        "type": "int" if values.kind == "int" else "float",
        "strategy": strategy,
        "group_size": values.columns,
        "symmetric": not values.zero_point,
        "dynamic": False,
    }
    inputs = _TOKENS if values.kind == "fp8" else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": form}},
        "ignore": list(plain),
        "kv_cache_scheme": None,
    }


def written(weight: Tensor, scales: Scales, values: ValueFormat, *, stacked: bool = False) -> dict[str, Tensor]:
    """The tensors of a rounded matrix, by what they are for.

    Scales of integers and of FP8 by rows are in the dtype of the weight, or in float32 where that cannot say one of
    them; those of FP8 by blocks are float32.

    Args:
        weight: [out, in], values of `ValueFormat.values` in the model's dtype.
        scales: under which they were rounded.
        values: their format.
        stacked: as for `format_of`.

    Raises:
        AssertionError: what would be written is not the weights.
    """
    format, shape = format_of(values, stacked=stacked), weight.shape
    parts = _scales_as_stored(scales, values, weight)
    # of the codes the formats ask for dtype and shape
    place = torch.empty(0, dtype=torch.uint8, device="meta")
    if stacked:
        place = torch.empty((*shape[:-1], shape[-1] // 32, 16), dtype=torch.uint8, device="meta")
    codes = format.nearest(weight.float() + 0.0, {**parts, CODES: place})
    found = {**parts, CODES: format.packed(codes, {**parts, CODES: place})}
    if not format.values(format.codes(found), found).to(weight.dtype).equal(weight):
        raise AssertionError(f"codes of {values} must stand for the weights that were rounded, got others")
    return found


def _scales_as_stored(scales: Scales, values: ValueFormat, weight: Tensor) -> Mapping[str, Tensor]:
    if values.kind == "mxfp4":
        return {SCALE: scales.stored.view(torch.uint8)}
    if values.kind == "nvfp4":
        assert scales.whole is not None
        return {SCALE: scales.stored, WHOLE: scales.whole.flatten()}
    exact = weight.dtype if scales.stored.to(weight.dtype).equal(scales.stored) else torch.float32
    parts = {SCALE: scales.stored.to(torch.float32 if values.rows > 1 else exact)}
    if values.kind == "int":
        parts[SHAPE] = torch.tensor(weight.shape, device=weight.device)
    if scales.zero is not None:
        parts[ZERO] = pack_words(scales.zero.mT, values.bits).mT.contiguous()
    return parts
