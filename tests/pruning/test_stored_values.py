"""Rounded values in a checkpoint: codes and scales under published names, to the bit what was rounded."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_folders import raw, whole_model
from transformers import AutoModelForCausalLM

import moesparse
from moesparse import Recipe
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.errors import UnsupportedModelError
from moesparse.models.formats.written import format_of, said_of_values, written
from moesparse.pruning.run import prune, prune_checkpoint
from moesparse.testing import tiny_model
from moesparse.weights.value_formats import Quantised, ValueFormat

IDS = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(0))
# blocks of 128 rows are cut by the end of what w2 has, and by nothing else
SIZES = {
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_experts": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
}
SIZES["gpt_oss"] = SIZES["mixtral"] | {"intermediate_size": 64}
INTEGERS = ("int8", "int8:64", "int4:64", "int3:32", "int2:64", "int4:32:zero")
# what transformers 5.23 with compressed-tensors 0.20.1 makes of experts by itself, on a CPU
BY_TRANSFORMERS = ("int8", "int8:64", "int4:64", "int3:32", "int2:64", "fp8", "fp8:128x128", "mxfp4")
REFUSED_BY_TRANSFORMERS, WRONG_IN_TRANSFORMERS = ("int4:32:zero",), ("nvfp4",)
OURS = REFUSED_BY_TRANSFORMERS + WRONG_IN_TRANSFORMERS
FORMATS = BY_TRANSFORMERS + OURS


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    found = {}
    for family, sizes in SIZES.items():
        found[family] = tmp_path_factory.mktemp(family)
        tiny_model(family, **sizes).to(torch.bfloat16).save_pretrained(found[family])
    return found


def rounded(source, out, values, **more):
    """A folder whose experts are rounded, and the same in memory."""
    recipe = Recipe(weights=None, values=values, value_rule="rtn", **more)
    prune_checkpoint(source, out, None, recipe, progress=None)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    prune(model, None, recipe, progress=None)
    return out, model


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("values", FORMATS)
def test_a_folder_is_the_rounded_model_and_others_read_it(values, sources, tmp_path):
    out, model = rounded(sources["mixtral"], tmp_path / "out", values)
    read = moesparse.load_pretrained(out)[0] if values in (*OURS, "int4:64") else whole_model(out)
    assert same(read, model)
    config = json.loads((out / "config.json").read_text())
    names = config["quantization_config"].get("ignore") or config["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} < set(names) and not any(".experts." in n for n in names)
    if values in REFUSED_BY_TRANSFORMERS:
        with pytest.raises(RuntimeError, match="issues during automatic conversion"):
            AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        return
    theirs, loading = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        equal = theirs.eval()(IDS).logits.equal(model.eval()(IDS).logits)
    assert equal != (values in WRONG_IN_TRANSFORMERS)


def test_mxfp4_of_gpt_oss_is_what_it_is_published_in(sources, tmp_path):
    out, model = rounded(sources["gpt_oss"], tmp_path / "out", "mxfp4")
    found = raw(out)
    assert found["model.layers.0.mlp.experts.gate_up_proj_blocks"][:2] == (torch.uint8, (2, 128, 2, 16))
    assert found["model.layers.0.mlp.experts.down_proj_scales"][:2] == (torch.uint8, (2, 64, 2))
    assert same(whole_model(out), model)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    with torch.no_grad():
        assert theirs(IDS).logits.equal(model.eval()(IDS).logits)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def test_the_bytes_are_those_that_the_format_counts(sources, tmp_path):
    """But for what compressed-tensors writes beside codes: two numbers of 64 bits, the shape, of every matrix."""
    for values in ("int3:32", "fp8", "nvfp4"):
        report = prune_checkpoint(
            sources["mixtral"],
            tmp_path / values,
            None,
            Recipe(weights=None, values=values, value_rule="rtn"),
            progress=None,
        )
        found = {name: len(data) for name, (_, _, data) in raw(tmp_path / values).items() if ".experts." in name}
        shapes = sum(size for name, size in found.items() if name.endswith("_shape"))
        # gate and up of nvfp4 each have the one scale of both
        twice = 4 * 2 * (values == "nvfp4")
        assert shapes == (16 * 6 if values == "int3:32" else 0)
        assert sum(found.values()) - shapes - twice == report.sizes["after"]["packed"]
        assert report.sizes["after"]["packed"] == sum(
            ValueFormat.parse(values).bytes_of(shape) for shape in ((2, 256, 64), (2, 64, 128))
        )


PRESETS = {
    "int8": ("W8A16", {"strategy": "channel", "group_size": None}),
    "int4:64": ("W4A16", {"group_size": 64}),
    "int3:32": ("W3A16", {"group_size": 32}),
    "int4:32:zero": ("W4A16_ASYM", {"group_size": 32}),
    "fp8": ("FP8_DYNAMIC", {}),
    "mxfp4": ("MXFP4A16", {}),
    "nvfp4": ("NVFP4A16", {}),
}


@pytest.mark.parametrize("values", PRESETS)
def test_the_config_is_that_of_the_published_scheme(values):
    name, more = PRESETS[values]
    said = QuantizationConfig.model_validate(said_of_values(ValueFormat.parse(values), ["lm_head"]))
    (group,) = said.config_groups.values()
    preset = preset_name_to_scheme(name, ["Linear"])
    fields = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic")
    wanted = {field: getattr(preset.weights, field) for field in fields} | more
    assert {field: getattr(group.weights, field) for field in fields} == wanted
    assert group.targets == ["Linear"] and said.ignore == ["lm_head"]
    inputs = [None if each is None else (each.num_bits, each.strategy, each.dynamic) for each in
              (group.input_activations, preset.input_activations)]  # fmt: skip
    assert inputs[0] == inputs[1]


@settings(max_examples=40, deadline=None)
@given(
    values=st.sampled_from((*INTEGERS, "fp8", "mxfp4", "nvfp4")),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    size=st.sampled_from([1e-7, 1e-3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_what_is_written_decompresses_to_the_weights(values, dtype, rows, groups, size, seed):
    """By compressed-tensors; scales that float16 cannot say are float32."""
    form = ValueFormat.parse(values)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * 64, generator=generator) * size
    weight[weight.abs() < size / 3] = 0
    quantised = form.quantise(weight)
    stored = quantised.dequantise().to(dtype)
    parts = written(stored, quantised.scales, form)
    name = format_of(form).tensors
    state = {name[what].removeprefix("."): part for what, part in parts.items()}
    (group,) = QuantizationConfig.model_validate(said_of_values(form, [])).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(group.format)
    if form.kind == "fp8":
        found = state["weight"].float() * state["weight_scale"].float()
    else:
        found = compressor.decompress(state, group)["weight"]
    if form.kind == "mxfp4" or (form.kind == "nvfp4" and dtype is not torch.bfloat16):
        # which decompresses these in bfloat16; the least step of the dtype is all that values near zero have
        step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        assert torch.allclose(found.to(dtype).float(), stored.float(), rtol=2**-7, atol=step)
    else:
        assert found.to(dtype).equal(stored)
    again = form.scales_from(quantised.scales.to_bytes(), weight.shape)
    assert Quantised(form, quantised.codes, again).dequantise().equal(quantised.dequantise())


def test_under_a_mask_zeros_are_zeros_and_a_second_command_reads_codes(sources, tmp_path):
    recipe = Recipe(weights="2:4", saliency="magnitude", update="none", values="int8", value_rule="rtn")
    prune_checkpoint(sources["mixtral"], tmp_path / "out", None, recipe, progress=None)
    found = inspect_folder(tmp_path / "out", verify=True, progress=None)
    assert found.format == "int4_packed" and not found.problems
    assert {tensor.pattern for block in found.blocks for tensor in block.tensors} == {"2:4"}
    against = compare_folders(tmp_path / "out", sources["mixtral"], progress=None)
    assert len(against.tensors["rounded"]) == 6 and not against.problems
    # what says otherwise than the recipe is named
    bad = tmp_path / "bad"
    shutil.copytree(tmp_path / "out", bad)
    config = json.loads((bad / "config.json").read_text())
    config["moesparse"]["recipe"]["values"] = "int4:32"
    (bad / "config.json").write_text(json.dumps(config))
    assert any(
        "quantization_config" in each for each in compare_folders(bad, sources["mixtral"], progress=None).problems
    )
    # experts go, codes stay
    removal = Recipe(weights=None, keep_experts=1, expert_saliency="aimer", update="none")
    prune_checkpoint(tmp_path / "out", tmp_path / "fewer", None, removal, allow_pruned=True, progress=None)
    codes = {data for name, (_, _, data) in raw(tmp_path / "out").items() if name.endswith("w1.weight_packed")}
    (kept,) = (data for name, (_, _, data) in raw(tmp_path / "fewer").items() if name.endswith("w1.weight_packed"))
    assert kept in codes


def test_fake_quantised_is_a_plain_checkpoint(sources, tmp_path):
    out, model = rounded(sources["mixtral"], tmp_path / "out", "int4:64", fake_quantised=True)
    assert raw(out).keys() == raw(sources["mixtral"]).keys()
    assert same(AutoModelForCausalLM.from_pretrained(out, dtype="auto"), model)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["moesparse"]["recipe"]["fake_quantised"]


def test_a_quantised_source_is_made_plain_and_rounded_anew(sources, tmp_path):
    out, _ = rounded(sources["mixtral"], tmp_path / "int8", "int8")
    recipe = Recipe(weights=None, values="int4:64", value_rule="rtn", output_dtype="bfloat16")
    prune_checkpoint(out, tmp_path / "int4", None, recipe, allow_pruned=True, progress=None)
    model = whole_model(out)
    prune(model, None, Recipe(weights=None, values="int4:64", value_rule="rtn"), allow_pruned=True, progress=None)
    assert same(whole_model(tmp_path / "int4"), model)
    assert not compare_folders(tmp_path / "int4", out, progress=None).problems


def test_what_no_loader_would_find_is_refused(sources, tmp_path):
    def refused(family, values, match, **sizes):
        folder = sources[family]
        if sizes:
            folder = tmp_path / "odd"
            tiny_model(family, **SIZES[family] | sizes).to(torch.bfloat16).save_pretrained(folder)
        recipe = Recipe(weights=None, values=values, value_rule="rtn")
        with pytest.raises(UnsupportedModelError, match=match):
            prune_checkpoint(folder, tmp_path / "out", None, recipe, progress=None)
        assert not (tmp_path / "out").exists()

    refused("gpt_oss", "int4:64", r"values must be mxfp4 .* of gpt_oss, .* got int4:64: fake_quantised=True stores")
    refused("mixtral", "fp8:128x128", r"w3.weight must start at a whole block .* got row 64", intermediate_size=64)
    refused("mixtral", "int8", r"w2.weight must have rows of a multiple of 4 .* got 66", intermediate_size=66)
