"""Every format's matrices are, bit for bit, those of the library that wrote the format; its zeros are exact.

compressed-tensors and transformers are asked where they read a format. AWQ and GPTQ are read by a slow loop over the
published layouts: the order of AutoAWQ's gemm version, and AutoGPTQ's rows of words.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.models.formats.awq import Awq
from moesparse.models.formats.base import CODES, SCALE
from moesparse.models.formats.fp4_deepseek import Fp4DeepSeek
from moesparse.models.formats.fp8_block import Fp8Block
from moesparse.models.formats.fp8_channel import Fp8Channel
from moesparse.models.formats.gptq import Gptq
from moesparse.models.formats.int4_packed import Int4Packed
from moesparse.models.formats.mxfp4 import Mxfp4
from moesparse.models.formats.mxfp4_packed import Mxfp4Packed
from moesparse.models.formats.nvfp4 import Nvfp4, Nvfp4ModelOpt
from moesparse.models.formats.packed_nm import PackedNm
from moesparse.weights.patterns import Pattern, mask_from_score
from moesparse_kernels import NMWeight

BF16, F32 = torch.bfloat16, torch.float32
WORD = 2**32


def fp8(*shape, seed=0):
    """Every finite code of E4M3, in random order."""
    torch.manual_seed(seed)
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    return codes[torch.randint(len(codes), shape)].view(torch.float8_e4m3fn)


def data(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8)


def words(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randint(-WORD // 2, WORD // 2, shape, dtype=torch.int64).to(torch.int32)


def scales(*shape, dtype=F32, seed=1):
    torch.manual_seed(seed)
    return (torch.rand(shape) * 0.02 + 1e-4).to(dtype)


def powers(*shape, seed=1):
    """E8M0 bytes of scales from 2 ** -20 to 2 ** 10."""
    torch.manual_seed(seed)
    return torch.randint(107, 138, shape, dtype=torch.uint8)


def same_bits(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape
    ints = {2: torch.int16, 4: torch.int32}[one.element_size()]
    assert torch.equal(one.contiguous().view(ints), other.contiguous().view(ints))


def decompressed(name, parts, weights, form=None):
    """By compressed-tensors, in the dtype of its own choice."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return BaseCompressor.get_value_from_registry(name).decompress(parts, scheme)["weight"]


class _Dequantize:
    """transformers' own, of FP8 and of DeepSeek's FP4."""

    def __call__(self, codes, scale, dtype):
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        return Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=dtype)


by_transformers = _Dequantize()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("scale", "block"),
    [
        (scales(2, 3), (16, 32)),
        # Qwen3's
        (scales(2, 3, dtype=BF16), (16, 32)),
        # scale_fmt "ue8m0", as bytes and as a dtype
        (powers(2, 3), (16, 32)),
        (powers(2, 3).view(torch.float8_e8m0fnu), (16, 32)),
        # a single block of all
        (scales(1, 1), (32, 96)),
        # no weight_block_size
        (scales(), None),
        (scales(1), None),
    ],
)
def test_fp8_block_is_what_transformers_reads(scale, block, dtype):
    codes = fp8(32, 96)
    grid = scale if block else scale.reshape(1, 1)
    same_bits(Fp8Block(block).decode({CODES: codes, SCALE: scale}, dtype), by_transformers(codes, grid, dtype))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 33), st.integers(1, 33))
def test_fp8_blocks_may_be_cut_off_by_the_end_of_the_matrix(rows, columns, high, wide):
    # DeepSeek-V3's README: matrices that are no multiple of 128 are padded for their scales; transformers refuses them
    codes, scale = fp8(rows, columns), scales(-(-rows // high), -(-columns // wide))
    got = Fp8Block((high, wide)).decode({CODES: codes, SCALE: scale}, F32)
    for row, column in {(0, 0), (rows - 1, columns - 1), (rows // 2, columns - 1), (rows - 1, columns // 3)}:
        want = np.float32(codes.float()[row, column]) * np.float32(scale[row // high, column // wide])
        assert got[row, column].item() == want


def test_fp8_blocks_of_a_stack_are_those_of_its_experts():
    codes, scale = fp8(3, 32, 64), scales(3, 2, 2)
    format = Fp8Block((16, 32))
    whole = format.decode({CODES: codes, SCALE: scale}, F32)
    for expert in range(3):
        assert torch.equal(whole[expert], format.decode({CODES: codes[expert], SCALE: scale[expert]}, F32))


@pytest.mark.parametrize(("scale", "strategy"), [(scales(24, 1), "channel"), (scales(1), "tensor")])
def test_fp8_channel_is_what_compressed_tensors_reads(scale, strategy):
    for dtype in (F32, BF16):
        parts = {"weight": fp8(24, 64), "weight_scale": scale.to(dtype)}
        weights = {"num_bits": 8, "type": "float", "strategy": strategy}
        want = decompressed("float-quantized", parts, weights)
        same_bits(Fp8Channel().decode({CODES: parts["weight"], SCALE: parts["weight_scale"]}, dtype), want)


def test_fp8_blocks_of_compressed_tensors_are_what_it_reads():
    parts = {"weight": fp8(40, 72), "weight_scale": scales(3, 3)}
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}
    want = decompressed("float-quantized", parts, weights)
    format = Fp8Block((16, 32), ".weight", ".weight_scale")
    same_bits(format.decode({CODES: parts["weight"], SCALE: parts["weight_scale"]}, F32), want)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_mxfp4_is_what_transformers_reads(dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # all scales that keep bf16 normal, and the smallest of all
    blocks, scale = data(3, 24, 2, 16), powers(3, 24, 2)
    scale[0, 0] = torch.tensor([1, 8])
    want = convert_moe_packed_tensors(blocks, scale, dtype=dtype)
    assert want.shape == (3, 64, 24)
    same_bits(Mxfp4().decode({CODES: blocks, SCALE: scale}, dtype), want)
    one = Mxfp4().decode({CODES: blocks[1], SCALE: scale[1]}, dtype)
    same_bits(one, want[1])


def test_mxfp4_packed_is_what_compressed_tensors_reads():
    parts = {"weight_packed": data(24, 32), "weight_scale": powers(24, 2)}
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    want = decompressed("mxfp4-pack-quantized", parts, weights)
    same_bits(Mxfp4Packed().decode({CODES: parts["weight_packed"], SCALE: parts["weight_scale"]}, BF16), want)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_fp4_of_deepseek_is_what_transformers_reads(dtype):
    codes, scale = data(24, 32).view(torch.int8), powers(24, 2).view(torch.float8_e8m0fnu)
    want = by_transformers(codes, scale, dtype)
    same_bits(Fp4DeepSeek().decode({CODES: codes, SCALE: scale}, dtype), want)


def nvfp4_parts():
    torch.manual_seed(3)
    scale = torch.randint(1, 120, (24, 4), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return data(24, 32), scale


def test_nvfp4_is_what_compressed_tensors_reads():
    codes, scale = nvfp4_parts()
    whole = torch.tensor([731.5])
    parts = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": whole}
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    want = decompressed("nvfp4-pack-quantized", parts, weights)
    same_bits(Nvfp4().decode({CODES: codes, SCALE: scale, "whole": whole}, BF16), want)


def test_nvfp4_of_modelopt_is_its_formula():
    # qtensor/nvfp4_tensor.py of ModelOpt: the two scales are multiplied first, in float32; its code 8 is a plain zero
    codes, scale = nvfp4_parts()
    whole = torch.tensor(0.0013)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    want = np.empty((24, 64), np.float32)
    for row in range(24):
        for column in range(64):
            code = int(codes[row, column // 2]) >> 4 * (column % 2) & 15
            both = np.float32(scale.float()[row, column // 16]) * np.float32(whole)
            want[row, column] = numbers[code] * both
    got = Nvfp4ModelOpt().decode({CODES: codes, SCALE: scale, "whole": whole}, F32)
    assert torch.equal(got, torch.from_numpy(want))


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_int4_packed_is_what_compressed_tensors_reads(bits, symmetric, group, dtype):
    rows, columns = 20, 64
    groups = 1 if group is None else columns // group
    parts = {
        "weight_packed": words(rows, columns * bits // 32),
        "weight_scale": scales(rows, groups, dtype=dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }
    names = {CODES: "weight_packed", SCALE: "weight_scale", "shape": "weight_shape"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    if not symmetric:
        # 20 rows: the last word of a column is half empty
        parts["weight_zero_point"] = words(-(-rows * bits // 32), groups, seed=5)
        names["zero"] = "weight_zero_point"
    want = decompressed("pack-quantized", parts, weights)
    got = Int4Packed(bits, group, symmetric).decode({what: parts[name] for what, name in names.items()}, dtype)
    same_bits(got, want)


def nibble(word, place):
    return (int(word) % WORD) >> 4 * place & 15


def awq_by_loop(qweight, qzeros, scale, group):
    """AutoAWQ's pack: the outputs 0 2 4 6 1 3 5 7 of eight lie in a word from the lowest nibble on."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
    found = torch.empty(outputs, inputs, dtype=torch.float64)
    for i in range(inputs):
        for o in range(outputs):
            place = order.index(o % 8)
            zero = 8 if qzeros is None else nibble(qzeros[i // group, o // 8], place)
            found[o, i] = (nibble(qweight[i, o // 8], place) - zero) * scale[i // group, o].double()
    return found


@pytest.mark.parametrize("has_zeros", [True, False])
def test_awq_is_the_published_order(has_zeros):
    qweight, scale = words(32, 3), scales(2, 24, dtype=torch.float16)
    qzeros = words(2, 3, seed=7) if has_zeros else None
    parts = {CODES: qweight, SCALE: scale} | ({"zero": qzeros} if has_zeros else {})
    want = awq_by_loop(qweight, qzeros, scale, 16)
    same_bits(Awq(16, has_zeros).decode(parts, torch.float16), want.half())
    assert torch.equal(Awq(16, has_zeros).decode(parts, F32).double(), want)


def test_awq_is_what_compressed_tensors_makes_of_it():
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert.converters").AutoAWQConverter
    qweight, qzeros, scale = words(32, 4), words(2, 4, seed=7), scales(2, 32, dtype=torch.float16)
    tensors = {"x.qweight": qweight, "x.qzeros": qzeros, "x.scales": scale}
    parts = {name.removeprefix("x."): each for name, each in convert(group_size=16).process(tensors).items()}
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
    want = decompressed("pack-quantized", parts, weights)
    same_bits(Awq(16).decode({CODES: qweight, SCALE: scale, "zero": qzeros}, torch.float16), want)


def gptq_by_loop(qweight, qzeros, scale, g_idx, bits, version):
    """AutoGPTQ: along the inputs in words, zero points along the outputs, less one in version 1."""
    in_word = 32 // bits
    inputs, outputs = qweight.shape[0] * in_word, qweight.shape[1]
    found = torch.empty(outputs, inputs, dtype=torch.float64)
    for i in range(inputs):
        for o in range(outputs):
            group = int(g_idx[i])
            code = (int(qweight[i // in_word, o]) % WORD) >> bits * (i % in_word) & 2**bits - 1
            zero = (int(qzeros[group, o // in_word]) % WORD) >> bits * (o % in_word) & 2**bits - 1
            found[o, i] = (code - zero - (version == 1)) * scale[group, o].double()
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_is_the_published_layout(bits, version, ordered):
    in_word = 32 // bits
    qweight, scale = words(32 // in_word, 16), scales(2, 16, dtype=torch.float16)
    # no stored zero point of only ones
    qzeros = words(2, 16 // in_word, seed=7) & (0x6E6E6E6E if bits == 4 else 0x7F7F7F7F)
    g_idx = torch.arange(32, dtype=torch.int32) // 16
    if ordered:
        g_idx = g_idx[torch.randperm(32)]
    want = gptq_by_loop(qweight, qzeros, scale, g_idx, bits, version)
    format = Gptq(bits, 16, ordered, version)
    parts = {CODES: qweight, SCALE: scale, "zero": qzeros}
    with_groups = format.decode({**parts, "groups": g_idx}, torch.float16)
    same_bits(with_groups, want.half())
    if not ordered:
        same_bits(format.decode(parts, torch.float16), with_groups)
        whole = format.decode({**parts, SCALE: scale[:1], "zero": qzeros[:1]} | {"groups": g_idx * 0}, torch.float16)
        alone = {**parts, SCALE: scale[:1], "zero": qzeros[:1]}
        same_bits(Gptq(bits, -1, False, version).decode(alone, torch.float16), whole)


def test_a_gptq_zero_point_that_readers_read_in_two_ways_is_refused():
    parts = {CODES: words(2, 8), SCALE: scales(1, 8, dtype=torch.float16), "zero": torch.tensor([[0xF]]).int()}
    with pytest.raises(UnsupportedModelError, match="below 15 in format gptq, got 15"):
        Gptq(4, -1, False).decode(parts, F32)
    assert Gptq(4, -1, False, 2).decode(parts, F32).isfinite().all()


def packed_weight(n, m):
    torch.manual_seed(0)
    weight = torch.randn(3, 16, 32, dtype=BF16)
    return NMWeight.pack(weight, mask_from_score(weight.abs(), Pattern.parse(f"{n}:{m}")), n, m)


@pytest.mark.parametrize("pattern", [(2, 4), (3, 8), (1, 4)])
def test_packed_nm_is_what_the_kernels_unpack(pattern):
    packed = packed_weight(*pattern)
    got = PackedNm().decode({CODES: packed.values, "mask": packed.index}, BF16)
    same_bits(got, packed.unpack())


# every format with all its tensors; none of the scales and zero points takes zero away
EXAMPLES = {
    "fp8_block": (Fp8Block((16, 32)), {CODES: fp8(24, 64), SCALE: scales(2, 2)}),
    "fp8_block ue8m0": (Fp8Block((16, 32)), {CODES: fp8(24, 64), SCALE: powers(2, 2)}),
    "fp8_channel": (Fp8Channel(), {CODES: fp8(24, 64), SCALE: scales(24, 1, dtype=BF16)}),
    "mxfp4": (Mxfp4(), {CODES: data(2, 24, 2, 16), SCALE: powers(2, 24, 2)}),
    "mxfp4_packed": (Mxfp4Packed(), {CODES: data(24, 32), SCALE: powers(24, 2)}),
    "fp4_deepseek": (
        Fp4DeepSeek(),
        {CODES: data(24, 32).view(torch.int8), SCALE: powers(24, 2).view(torch.float8_e8m0fnu)},
    ),
    "nvfp4": (Nvfp4(), {CODES: nvfp4_parts()[0], SCALE: nvfp4_parts()[1], "whole": torch.tensor([731.5])}),
    "nvfp4 modelopt": (
        Nvfp4ModelOpt(),
        {CODES: nvfp4_parts()[0], SCALE: nvfp4_parts()[1], "whole": torch.tensor(0.0013)},
    ),
    "int4_packed": (
        Int4Packed(4, 32, True),
        {CODES: words(24, 8), SCALE: scales(24, 2, dtype=BF16), "shape": torch.tensor([24, 64])},
    ),
    "int4_packed zeros": (
        Int4Packed(4, 32, False),
        {
            CODES: words(24, 8),
            SCALE: scales(24, 2, dtype=BF16),
            "shape": torch.tensor([24, 64]),
            "zero": words(3, 2, seed=7),
        },
    ),
    "awq": (Awq(32), {CODES: words(64, 3), SCALE: scales(2, 24, dtype=torch.float16), "zero": words(2, 3, seed=7)}),
    "gptq": (
        Gptq(4, 32, False),
        {CODES: words(8, 24), SCALE: scales(2, 24, dtype=torch.float16), "zero": words(2, 3, seed=7) & 0x6E6E6E6E},
    ),
}


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", EXAMPLES)
def test_zero_is_exact_and_the_other_codes_keep_their_bits(name, dtype):
    format, parts = EXAMPLES[name]
    weight = format.decode(parts, dtype)
    for what, tensor in format.encode(weight, parts).items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), parts[what].reshape(-1).view(torch.uint8)), what
    torch.manual_seed(9)
    keep = torch.rand(weight.shape) < 0.5
    pruned = torch.where(keep, weight, torch.zeros((), dtype=dtype))
    written = format.encode(pruned, parts)
    assert written[CODES].dtype == parts[CODES].dtype and written[CODES].shape == parts[CODES].shape
    again = format.decode(written, F32)
    assert not again[~keep].any()
    codes = format.codes(parts).mT if format.transposed else format.codes(parts)
    codes_again = format.codes(written).mT if format.transposed else format.codes(written)
    assert torch.equal(codes[keep], codes_again[keep])
    assert all(written[what] is parts[what] for what in parts if what != CODES)


def test_codes_under_a_scale_of_zero_keep_their_bits():
    parts = {CODES: fp8(16, 32), SCALE: torch.zeros(1, 1)}
    written = Fp8Block((16, 32)).encode(torch.zeros(16, 32, dtype=BF16), parts)
    assert torch.equal(written[CODES].view(torch.uint8), parts[CODES].view(torch.uint8))


def test_a_zero_is_zero_where_the_value_was_too_small_for_bf16():
    # 448 * 2 ** -143 is less than half of 2 ** -133, the smallest number of bf16
    parts = {CODES: fp8(16, 32), SCALE: torch.full((1, 1), 2.0**-143)}
    weight = Fp8Block((16, 32)).decode(parts, BF16)
    assert not weight.any() and Fp8Block((16, 32)).decode(parts, F32).any()
    assert not Fp8Block((16, 32)).decode(Fp8Block((16, 32)).encode(weight, parts), F32).any()


@pytest.mark.parametrize("name", EXAMPLES)
def test_other_values_get_the_nearest_code(name):
    format, parts = EXAMPLES[name]
    weight = format.decode(parts, F32)
    torch.manual_seed(4)
    wanted = weight * (1 + 0.3 * torch.randn(weight.shape)).clamp(0.4, 1.6)
    rounded = format.decode(format.encode(wanted, parts), F32)
    error = (rounded - wanted).abs()
    # against every code there is, under the scale and zero point of each weight
    matrix = wanted.mT if format.transposed else wanted
    best = torch.full(matrix.shape, torch.inf)
    some = range(256) if name.startswith("fp8") else range(16)
    for code in (code for code in some if not (name.startswith("fp8") and code & 127 == 127)):
        values = format.values(torch.full(matrix.shape, code, dtype=torch.uint8), parts)
        best = torch.minimum(best, (values - matrix).abs())
    best = best.mT if format.transposed else best
    # of two that are equally near, rounding in float32 may take the one that is a unit in the last place further
    assert (error <= best + wanted.abs() * 2**-22).all()


def test_packed_nm_keeps_its_zeros_and_takes_new_values():
    packed = packed_weight(2, 4)
    parts = {CODES: packed.values, "mask": packed.index}
    weight = PackedNm().decode(parts, BF16)
    assert torch.equal(PackedNm().encode(weight * 2, parts)[CODES], packed.values * 2)
    with pytest.raises(CheckpointError, match="zero where its mask keeps none"):
        PackedNm().encode(weight + 1, parts)
