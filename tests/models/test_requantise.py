"""Weights quantised again: scales by a slow loop in float64, codes by compressed-tensors under the same scales."""

import numpy as np
import pytest
import torch
from test_formats import EXAMPLES, F32, words

from moesparse.models.formats.awq import Awq
from moesparse.models.formats.base import CODES, SCALE
from moesparse.models.formats.fp8_block import Fp8Block
from moesparse.models.formats.gptq import Gptq
from moesparse.models.formats.int4_packed import Int4Packed
from moesparse.weights.codes import FP4_VALUES, scales_of

E4M3 = torch.arange(256, dtype=torch.uint8)[torch.arange(256) & 127 != 127].view(torch.float8_e4m3fn).float().tolist()

CASES = dict(EXAMPLES)
# blocks that the end of the matrix cuts off, one scale for a matrix, an order of groups, zero points of another version
CASES["fp8_block cut off"] = (
    Fp8Block((16, 24)),
    {CODES: EXAMPLES["fp8_block"][1][CODES], SCALE: torch.rand(2, 3).bfloat16() * 0.02},
)
CASES["fp8_block of a matrix"] = (
    Fp8Block(None),
    {CODES: EXAMPLES["fp8_block"][1][CODES], SCALE: torch.tensor(0.01)},
)
CASES["int4_packed rows of 8 bits"] = (
    Int4Packed(8, None, True),
    {CODES: words(24, 16), SCALE: torch.rand(24, 1) * 0.01, "shape": torch.tensor([24, 64])},
)
CASES["awq without zero points"] = (
    Awq(32, False),
    {name: each for name, each in EXAMPLES["awq"][1].items() if name != "zero"},
)
for version in (1, 2):
    CASES[f"gptq ordered, zero points of version {version}"] = (
        Gptq(4, 32, True, version, symmetric=False),
        EXAMPLES["gptq"][1] | {"groups": torch.randperm(64).int() // 32},
    )


def members(name, format, parts):
    """Index of the scale of a weight, by its row and column; () where there is one for all."""
    if name.startswith("fp8_block"):
        return lambda row, column: () if format.block is None else (row // format.block[0], column // format.block[1])
    if name == "fp8_channel" or "rows" in name:
        return lambda row, column: (row, 0)
    if "groups" in parts:
        return lambda row, column: (int(parts["groups"][column]), row)
    if name.startswith(("awq", "gptq")):
        return lambda row, column: (column // format.group, row)
    return lambda row, column: (row, column // format.group)


def stored(wanted, like):
    """What may be stored for a scale, and what that is: two neighbouring powers of two, or the nearest number."""
    if like.dtype in (torch.uint8, torch.float8_e8m0fnu):
        power = int(np.floor(np.log2(wanted)))
        return [2.0**power, 2.0 ** (power + 1)]
    return [float(torch.tensor(wanted, dtype=torch.float32).to(like.dtype))]


def error(weights, scale, numbers):
    """Of the nearest codes, in float64."""
    values = np.array(numbers) * scale
    return float((np.abs(values[None] - weights[:, None]).min(1) ** 2).sum())


def expected(name, format, parts, weights, held, held_zero):
    """The scale and zero point for weights that share one, and their error."""
    whole = float(parts["whole"]) if "whole" in parts else 1.0
    whole = 1 / whole if name == "nvfp4" else whole
    if name.startswith("fp8"):
        numbers, reach = E4M3, 448
    elif held_zero is None:
        numbers, reach = FP4_VALUES, 6
    else:
        top = 2**format.bits - 1
        best = (error(weights, held, np.arange(top + 1) - held_zero), held, held_zero)
        low, high = min(weights.min(), 0), max(weights.max(), 0)
        wanted = 2 * max(-low, high) / top if format.symmetric else (high - low) / top
        for scale in stored(wanted, parts[SCALE]):
            zero = held_zero if format.symmetric else float(np.clip(np.round(-low / scale), format.lowest_zero, top))
            best = min(best, (error(weights, scale, np.arange(top + 1) - zero), scale, zero), key=lambda each: each[0])
        return best
    best = (error(weights, held * whole, numbers), held, None)
    for scale in stored(np.abs(weights).max() / reach / whole, parts[SCALE]):
        best = min(best, (error(weights, scale * whole, numbers), scale, None), key=lambda each: each[0])
    return best


@pytest.mark.parametrize("name", CASES)
def test_scales_are_the_better_of_two_for_every_weight_that_shares_one(name):
    format, parts = CASES[name]
    if name == "mxfp4":
        # one expert of the stack
        parts = {what: each[0] for what, each in parts.items()}
    old = format.values(format.codes(parts), parts)
    torch.manual_seed(11)
    where = members(name, format, parts)
    groups = {}
    for row in range(old.shape[0]):
        for column in range(old.shape[1]):
            groups.setdefault(where(row, column), []).append((row, column))
    kind = dict(zip(groups, torch.randint(3, (len(groups),)).tolist(), strict=True))
    wanted = torch.where(torch.rand(old.shape) < 0.5, old, torch.zeros(()))
    for group, places in groups.items():
        for row, column in places:
            # as they were but for zeros; a little different; four times as large with one that is larger still
            noise = 1 + 0.2 * float(torch.randn(()))
            wanted[row, column] *= (1.0, noise, 4 * noise)[kind[group]]
    # as a model holds it: a scale that is not needed must not be chosen for how it rounds bf16
    wanted = torch.where(wanted == 0, 0, wanted.bfloat16())
    weight = wanted.mT if format.transposed else wanted
    found = format.requantise(weight, parts)
    assert all(found[what] is parts[what] for what in parts if what not in (CODES, SCALE, "zero"))
    assert all(found[what].dtype == each.dtype and found[what].shape == each.shape for what, each in parts.items())
    values, codes = format.values(format.codes(found), found), format.codes(found)
    assert not values[wanted == 0].any()
    held, now = scales_of(parts[SCALE]), scales_of(found[SCALE])
    integers = hasattr(format, "zeros")
    zeros = (format.zeros(each).expand(held.shape) for each in (parts, found)) if integers else (None, None)
    zero_held, zero_now = zeros
    remade = 0
    for group, places in groups.items():
        rows, columns = map(list, zip(*places, strict=True))
        if kind[group] == 0:
            kept = wanted[rows, columns] != 0
            assert now[group] == held[group]
            assert codes[rows, columns][kept].equal(format.codes(parts)[rows, columns][kept])
            continue
        weights = wanted[rows, columns].double().numpy()
        zero = None if zero_held is None else float(zero_held[group])
        best, scale, zero = expected(name, format, parts, weights, float(held[group]), zero)
        got = float((values[rows, columns].double() - torch.from_numpy(weights)).square().sum())
        assert got == pytest.approx(best, rel=1e-4), group
        assert float(now[group]) == pytest.approx(scale, rel=1e-7)
        assert zero is None or float(zero_now[group]) == zero
        remade += scale != float(held[group])
    assert remade or name == "fp8_block of a matrix"


COMPRESSED = {
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
    "int4_packed": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4_packed zeros": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "mxfp4_packed": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_codes_are_those_that_compressed_tensors_takes_under_the_same_scales(name):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (format, parts), (registered, weights) = EXAMPLES[name], COMPRESSED[name]
    torch.manual_seed(2)
    old = format.decode(parts, F32)
    wanted = torch.where(torch.rand(old.shape) < 0.5, old * (1 + 0.2 * torch.randn(old.shape)), torch.zeros(()))
    found = format.requantise(wanted, parts)
    given = {"weight": wanted, "weight_scale": scales_of(found[SCALE])}
    if name == "int4_packed zeros":
        given["weight_zero_point"] = (format.zeros(found) - 8).to(torch.int8)
    if "whole" in parts:
        given["weight_global_scale"] = parts["whole"]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = BaseCompressor.get_value_from_registry(registered).compress(given, scheme)
    codes = format.codes({**found, CODES: theirs.get("weight_packed", theirs.get("weight"))})
    # a zero that was the negative one stays it
    same = (codes == format.codes(found)) | ((old == 0) & (wanted == 0))
    assert same.all() and (codes != 0).any()


def test_a_scale_of_nvfp4_ends_where_its_dtype_does():
    format, parts = EXAMPLES["nvfp4"]
    largest = 448 * 6 / float(parts["whole"])
    wanted = torch.full((24, 64), 2 * largest)
    found = format.requantise(wanted, parts)
    assert (found[SCALE].float() == 448).all() and format.decode(found, F32).allclose(wanted / 2)
