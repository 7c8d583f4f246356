"""Value formats: scales, codes, values and bytes against compressed-tensors, and nearest against all there is."""

import itertools

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from moesparse.errors import UsageError
from moesparse.models.formats.base import CODES, SCALE
from moesparse.models.formats.fp8_block import Fp8Block
from moesparse.models.formats.fp8_channel import Fp8Channel
from moesparse.models.formats.int4_packed import Int4Packed
from moesparse.models.formats.integers import ZERO
from moesparse.models.formats.mxfp4_packed import Mxfp4Packed
from moesparse.models.formats.nvfp4 import Nvfp4
from moesparse.weights.codes import pack_nibbles, pack_words
from moesparse.weights.patterns import Pattern
from moesparse.weights.value_formats import GROUPS, ValueFormat

GROUPED = [f"int{bits}:{group}" for bits in (8, 4, 3, 2) for group in GROUPS]
NAMES = ["bf16", "fp8", "fp8:128x128", "int8", "mxfp4", "nvfp4", *GROUPED]
NAMES += [f"{name}:zero" for name in GROUPED if not name.startswith("int8")]


def drawn(*shape, seed=0):
    """Weights of the sizes of a trained matrix: rows and single weights that are much larger than the others."""
    torch.manual_seed(seed)
    return torch.randn(shape) * 0.02 * torch.logspace(-1, 1, shape[-2])[:, None] * (1 + 9 * (torch.rand(shape) > 0.99))


def arguments(format, **more):
    """What compressed-tensors calls it."""
    kind = {"int": "int"}.get(format.kind, "float")
    found = {"num_bits": format.bits, "type": kind, "symmetric": not format.zero_point, **more}
    if format.rows > 1:
        return QuantizationArgs(**found, strategy="block", block_structure=[format.rows, format.columns])
    if format.kind == "nvfp4":
        return QuantizationArgs(**found, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
    if format.kind == "mxfp4":
        return QuantizationArgs(**found, strategy="group", group_size=32, scale_dtype=torch.uint8)
    if format.columns is None:
        return QuantizationArgs(**found, strategy="channel")
    return QuantizationArgs(**found, strategy="group", group_size=format.columns)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bf16"])
def test_scales_codes_and_values_are_those_of_compressed_tensors(name):
    format = ValueFormat.parse(name)
    # two blocks of rows, the second cut off where the format cuts; whole groups of all sizes
    weight = drawn(160, 256) if format.rows > 1 else drawn(24, 256)
    theirs = arguments(format)
    low, high = format.extent(weight)
    whole = None
    if format.kind == "nvfp4":
        whole = generate_gparam(weight.min(), weight.max())
        assert torch.equal(format.whole(weight).flatten(), whole)
    scale, zero = calculate_qparams(low, high, theirs, global_scale=whole)
    found = format.quantise(weight)
    stored = found.scales.stored
    # theirs are of the dtype of the weights, here float32; stored they are bfloat16, one rounding away
    assert torch.allclose(stored.float(), scale.float(), rtol=2**-8, atol=0)
    if format.kind in ("mxfp4", "nvfp4"):
        assert torch.equal(stored.float(), scale.float())
    scale, zero = stored.float(), None if found.scales.zero is None else found.scales.zero.float()
    shift = 2 ** (format.bits - 1)
    if zero is not None:
        zero = (zero - shift).to(torch.int8)
    weight_of = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % format.rows))
    codes = quantize(weight_of, scale, zero, theirs, global_scale=whole)[: len(weight)]
    ours, zeros = found.codes, format.spread(found.scales, weight.shape)[1]
    units = ours.float() - shift if format.kind == "int" else format.units(ours, zeros)
    # under a float32 scale for the matrix theirs multiplies in another order: some codes lie on the other side
    same = (codes.float() == units).float().mean()
    assert same == 1 if format.kind != "nvfp4" else same > 0.999
    values = dequantize(codes, scale, zero, theirs, global_scale=whole, dtype=torch.float32)[: len(weight)]
    assert torch.allclose(values[codes == units], found.dequantise()[codes == units], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["int4:32", "int4:64:zero", "int3:32", "int3:64:zero", "int2:128", "int8", "fp8", "mxfp4"]
)
def test_bytes_are_those_that_compressed_tensors_stores(name):
    format = ValueFormat.parse(name)
    weight = drawn(64, 256).bfloat16()
    found = format.quantise(weight)
    form = {"int": "pack-quantized", "fp8": "naive-quantized", "mxfp4": "mxfp4-pack-quantized"}[format.kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments(format))
    state = {"weight": weight, "weight_scale": found.scales.stored}
    if format.kind == "mxfp4":
        state["weight_scale"] = found.scales.values
    if format.zero_point:
        state["weight_zero_point"] = (found.scales.zero.int() - 2 ** (format.bits - 1)).to(torch.int8)
    stored = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    # the shape of the matrix is said in the header, too
    size = sum(tensor.nbytes for name, tensor in stored.items() if name != "weight_shape")
    assert format.bytes_of(weight.shape) == size
    # every expert of a stack has its own
    assert format.bytes_of((3, *weight.shape)) == 3 * size


def test_bytes_under_a_mask():
    # 2 of 4 values of 4 bits, a bit for each place, a scale of 16 bits for 64 columns
    shape, two_four = (4, 96, 128), Pattern(n=2, m=4)
    assert ValueFormat.parse("int4:64").bits_of(shape, two_four) == 0.5 * 4 + 1 + 16 / 64
    assert ValueFormat.parse("int8").bits_of(shape, two_four) == 0.5 * 8 + 1 + 16 / 128
    assert ValueFormat.parse("bf16").bytes_of(shape, two_four) == two_four.packed_bytes(4 * 96 * 128, 2)
    assert ValueFormat.parse("int3:64:zero").bits_of(shape) == 3 + 19 / 64
    assert ValueFormat.parse("nvfp4").bytes_of(shape) == 4 * 96 * 128 * 4.5 / 8 + 4 * 4
    # blocks that the end cuts off have a scale like the others
    assert ValueFormat.parse("fp8:128x128").bytes_of((130, 200)) == 130 * 200 + 2 * 2 * 2
    # a ratio is not packed
    assert ValueFormat.parse("int4:64").bits_of(shape, Pattern(ratio=0.5)) == 4.25


def all_values(format, scales, shape):
    """[codes, ...]: what each code stands for, at every place."""
    count = 2**format.bits
    codes = torch.arange(count, dtype=torch.uint8)
    if format.kind == "fp8":
        codes = codes[(codes & 127) != 127]
    return torch.stack([format.values(torch.full(shape, int(code), dtype=torch.uint8), scales) for code in codes])


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from([name for name in NAMES if name != "bf16"]),
    outer=st.sampled_from([(), (1,), (3,)]),
    rows=st.integers(1, 5),
    magnitude=st.integers(-20, 20),
    share=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_a_weight_becomes_the_nearest_value_and_a_zero_stays_one(name, outer, rows, magnitude, share, dtype, seed):
    format = ValueFormat.parse(name)
    generator = torch.Generator().manual_seed(seed)
    shape = (*outer, rows, 128)
    weight = torch.randn(shape, generator=generator) * 2.0**magnitude
    weight = weight.masked_fill(torch.rand(shape, generator=generator) < share, 0.0)
    weight = weight.clamp(-6e4, 6e4).to(dtype)
    found = format.quantise(weight)
    values = found.dequantise()
    assert values.isfinite().all()
    assert not values[weight == 0].any()
    off = (values.double() - weight.double()).abs()
    best = (all_values(format, found.scales, shape).double() - weight.double()).abs().amin(0)
    # a quotient is rounded once in float32 before it is compared with the middle of two codes
    assert (off <= best + weight.double().abs() * 2**-23).all()
    # what is a value already keeps it, whatever the model's dtype makes of it in between
    again = format.quantise(values, found.scales).dequantise()
    assert torch.equal(again, values)


@pytest.mark.parametrize(
    "name", ["int4:64", "int4:32:zero", "int8", "int8:128", "fp8", "fp8:128x128", "mxfp4", "nvfp4"]
)
def test_the_readers_of_checkpoints_read_the_same_values(name):
    format = ValueFormat.parse(name)
    weight = drawn(32, 256)
    found = format.quantise(weight)
    parts = {SCALE: found.scales.stored}
    if format.kind == "int":
        reader = Int4Packed(format.bits, format.columns, not format.zero_point)
        parts |= {CODES: pack_words(found.codes, format.bits), "shape": torch.tensor(weight.shape)}
        if format.zero_point:
            parts[ZERO] = pack_words(found.scales.zero.mT.contiguous(), 4).mT.contiguous()
    elif format.kind == "fp8":
        reader = Fp8Channel() if format.columns is None else Fp8Block((128, 128))
        parts[CODES] = found.codes.view(torch.float8_e4m3fn)
    else:
        reader = Mxfp4Packed() if format.kind == "mxfp4" else Nvfp4()
        parts[CODES] = pack_nibbles(found.codes)
        parts |= {"whole": found.scales.whole.flatten()} if format.kind == "nvfp4" else {}
    assert torch.equal(reader.decode(parts, torch.float32), found.dequantise())
    # and write them back from what a checkpoint in bfloat16 holds of them
    rounded = found.dequantise().bfloat16()
    again = reader.encode(rounded, parts)
    assert torch.equal(reader.decode(again, torch.bfloat16), rounded)


def test_a_smaller_reach_and_a_negative_one():
    format, weight = ValueFormat.parse("int4:32"), torch.linspace(-1, 1, 32)[None]
    low, high = format.extent(weight)
    half = format.quantise(weight, format.scales(low, high, 0.5)).dequantise()
    assert half.amax() == 7 * half.unique()[half.unique() > 0].min()
    assert float(half.amax()) == pytest.approx(7 / 15, rel=2**-8)
    turned = format.scales(low, high, -0.5)
    assert float(turned.stored) < 0
    values = format.quantise(weight, turned).dequantise()
    # eight steps upwards, seven downwards
    assert float(values.max() / -values.min()) == pytest.approx(8 / 7)
    power = ValueFormat.parse("mxfp4")
    assert float(power.scales(low, high, 2.0).stored.float()) == 2 * float(power.scales(low, high).stored.float())


def test_bf16_rounds_and_nothing_else():
    weight = drawn(4, 32)
    found = ValueFormat.parse("bf16").quantise(weight)
    assert found.scales is None
    assert torch.equal(found.dequantise(), weight.bfloat16().float())


def test_names():
    for name in NAMES:
        assert str(ValueFormat.parse(name)) == name
        assert ValueFormat.parse(ValueFormat.parse(name)).name == name
    for wrong in ("int4", "int5:64", "int4:48", "int8:32:zero", "fp8:64x64", "int4:64:zeros", "", 4, None):
        with pytest.raises(UsageError, match=r"values must be bf16, fp8, .*int4:GROUP.* got "):
            ValueFormat.parse(wrong)


@pytest.mark.parametrize(("name", "columns"), [("int4:128", 128), ("mxfp4", 32), ("nvfp4", 16)])
def test_rows_that_are_no_whole_groups_are_refused(name, columns):
    format = ValueFormat.parse(name)
    match = f"down: in_features must be a multiple of {columns} for values {name}, got 200"
    with pytest.raises(UsageError, match=match):
        format.check_matrix("down", 200)
    with pytest.raises(UsageError, match="multiple of"):
        format.quantise(torch.ones(2, 200))
    # rows and blocks take any length
    for other in ("int8", "fp8", "fp8:128x128", "bf16"):
        ValueFormat.parse(other).check_matrix("down", 201)
        assert ValueFormat.parse(other).quantise(torch.ones(2, 201)).dequantise().shape == (2, 201)


def test_groups_do_not_see_each_other():
    """A scale is of its own block alone: changing one block leaves the codes of all others."""
    for name, where in itertools.product(("int4:32", "fp8:128x128", "mxfp4", "int2:32:zero"), ((0, 0), (-1, -1))):
        format, weight = ValueFormat.parse(name), drawn(130, 160)
        other = weight.clone()
        other[where] = 5.0
        one, two = format.quantise(weight), format.quantise(other)
        changed = (one.codes != two.codes).nonzero()
        size = format.rows, format.columns
        assert {tuple(int(i) // n for i, n in zip(each, size, strict=True)) for each in changed} == {
            tuple((n % length) // block for n, length, block in zip(where, weight.shape, size, strict=True))
        }
