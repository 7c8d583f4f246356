"""The formats of a folder are found from its config and its tensors; what contradicts itself is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.models.formats.expert_names import check_expert_names, with_kept_experts
from moesparse.models.formats.said import formats_of
from moesparse.models.formats.stored import StoredWeights

BF16 = torch.bfloat16
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32]}


def group(form, **weights):
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


INT4 = group("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

fp8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu


def z(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def block(**more):
    return {"x.weight": z(24, 64, dtype=fp8), "x.weight_scale_inv": z(2, 2)} | more


def int4(**more):
    return {
        "x.weight_packed": z(24, 8, dtype=torch.int32),
        "x.weight_scale": z(24, 2, dtype=BF16),
        "x.weight_shape": torch.tensor([24, 64]),
    } | more


def gptq(**more):
    return {
        "x.qweight": z(8, 24, dtype=torch.int32),
        "x.qzeros": z(2, 3, dtype=torch.int32),
        "x.scales": z(2, 24, dtype=torch.float16),
    } | more


def folder_of(path, said, tensors, side=None):
    path.mkdir(exist_ok=True)
    config = {"model_type": "qwen3_moe"} | ({} if said is None else {"quantization_config": said})
    (path / "config.json").write_text(json.dumps(config))
    if side is not None:
        (path / "hf_quant_config.json").write_text(json.dumps(side))
    save_file(tensors, path / "model.safetensors")
    return path


def found(path, said, tensors, side=None):
    return StoredWeights.of_folder(folder_of(path, said, tensors, side), BF16)


MODELOPT = {
    "x.weight": z(24, 32, dtype=torch.uint8),
    "x.weight_scale": z(24, 4, dtype=fp8),
    "x.weight_scale_2": z(),
    "x.input_scale": z(),
}
FOUND = {
    "fp8_block": (FP8, block()),
    "fp8_block activations": (FP8 | {"activation_scheme": "static"}, block(**{"x.activation_scale": z()})),
    "fp8_block of a matrix": (
        {"quant_method": "fp8"},
        {"x.weight": z(24, 64, dtype=fp8), "x.weight_scale_inv": z()},
    ),
    "fp8_block of DeepSeek-V4": (FP8, {"x.weight": z(24, 64, dtype=fp8), "x.scale": z(2, 2, dtype=E8M0)}),
    "fp8_block of compressed-tensors": (
        group("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
        {"x.weight": z(24, 64, dtype=fp8), "x.weight_scale": z(2, 2)},
    ),
    "fp4_deepseek": (FP8, {"x.weight": z(24, 32, dtype=torch.int8), "x.scale": z(24, 2, dtype=E8M0)}),
    "fp8_channel": (
        group("float-quantized", num_bits=8, type="float", strategy="channel"),
        {"x.weight": z(24, 64, dtype=fp8), "x.weight_scale": z(24, 1)},
    ),
    "mxfp4_packed": (
        group("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        {"x.weight_packed": z(24, 32, dtype=torch.uint8), "x.weight_scale": z(24, 2, dtype=torch.uint8)},
    ),
    "nvfp4": (
        group("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        {
            "x.weight_packed": z(24, 32, dtype=torch.uint8),
            "x.weight_scale": z(24, 4, dtype=fp8),
            "x.weight_global_scale": z(1),
            "x.input_global_scale": z(1),
        },
    ),
    "nvfp4 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, MODELOPT),
    "nvfp4 beside fp8": (FP8 | {"moe_quant_algo": "NVFP4"}, MODELOPT),
    "int4_packed": (INT4, int4()),
    "awq": (
        AWQ,
        {
            "x.qweight": z(64, 3, dtype=torch.int32),
            "x.qzeros": z(2, 3, dtype=torch.int32),
            "x.scales": z(2, 24, dtype=torch.float16),
        },
    ),
    "gptq": (GPTQ, gptq()),
    "gptq ordered": (GPTQ | {"desc_act": True}, gptq(**{"x.g_idx": z(64, dtype=torch.int32)})),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_weight_is_found_under_its_own_key(tmp_path, case):
    said, tensors = FOUND[case]
    weights = found(tmp_path, said, tensors | {"norm.weight": z(64, dtype=BF16)})
    assert weights.stored["x.weight"].format.name == case.split()[0]
    assert weights.tensors.keys() == {"x.weight", "norm.weight"}
    assert weights.tensors["x.weight"].shape == (24, 64)
    assert sorted(weights.names_of("x.weight")) == sorted(tensors)
    assert weights.names_of("norm.weight") == ("norm.weight",)
    assert all(weights.owner_of(name) == "x.weight" for name in tensors)
    read = weights.read("x.weight")
    assert read.shape == (24, 64) and read.dtype == BF16
    assert weights.read("norm.weight").equal(z(64, dtype=BF16))


def test_a_stack_of_experts_is_read_one_at_a_time(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a.gate_up_proj_blocks": torch.randint(256, (3, 24, 2, 16), dtype=torch.uint8),
        "a.gate_up_proj_scales": torch.randint(120, 130, (3, 24, 2), dtype=torch.uint8),
    }
    weights = found(tmp_path, {"quant_method": "mxfp4"}, tensors)
    assert weights.tensors["a.gate_up_proj"].shape == (3, 64, 24)
    whole, out = weights.read("a.gate_up_proj"), torch.full((3, 64, 24), torch.nan)
    weights.copy_to("a.gate_up_proj", out)
    assert out.equal(whole.float())
    assert weights.read("a.gate_up_proj", 1).equal(whole[1])


def test_what_modelopt_says_beside_the_config_counts(tmp_path):
    side = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    weights = found(tmp_path, None, MODELOPT, side)
    assert weights.stored["x.weight"].format.name == "nvfp4"
    said = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    with pytest.raises(CheckpointError, match="must name one quant_algo, got 'W4A16_NVFP4' and 'NVFP4'"):
        found(tmp_path, said, MODELOPT, side)


def without(tensors, name):
    return {key: each for key, each in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("said", "tensors", "match"),
    [
        # its quantization_config was deleted
        (None, block(), "must say in quantization_config of config.json how x.weight is stored, got F8_E4M3"),
        (None, int4(), "must say in quantization_config .* how x.weight_packed is stored, got I32"),
        # the config is of another method than the tensors
        (FP8, gptq(), "how x.qweight is stored"),
        (FP8, {"x.weight": z(24, 64, dtype=BF16)}, "must hold tensors of fp8_block, fp4_deepseek, as its"),
        # one of the tensors is missing
        (
            FP8,
            without(block(), "x.weight_scale_inv") | {"y.weight": z(2, dtype=BF16)},
            "as its .* says, got plain ones alone",
        ),
        (FP8, without(block(), "x.weight"), "x.weight_scale_inv must come with x.weight to be fp8_block, got none"),
        (INT4, without(int4(), "x.weight_scale"), "x.weight_packed must come with x.weight_scale to be int4_packed"),
        (GPTQ | {"desc_act": True}, gptq(), "x.qweight must come with x.g_idx to be gptq, got none"),
        # shapes and dtypes that do not fit
        (FP8, block(**{"x.weight_scale_inv": z(2, 3)}), r"x.weight_scale_inv must be \[2, 2\] to fit its weight, got"),
        (FP8, block(**{"x.weight_scale_inv": z(24, 64)}), r"must be \[2, 2\] to fit its weight, got \[24, 64\]"),
        (FP8, block(**{"x.weight": z(24, 64, dtype=BF16)}), "x.weight must be F8_E4M3, got BF16"),
        (FP8, block(**{"x.weight": z(64, dtype=fp8)}), r"x.weight must have 2 or 3 dims, got \[64\]"),
        (INT4, int4(**{"x.weight_scale": z(24, 1)}), r"x.weight_scale must be \[24, 2\]"),
        (GPTQ | {"group_size": 24}, gptq(), "x.qweight must hold groups of 24 inputs, got 64"),
        # a weight twice
        (INT4, int4(**{"x.weight": z(24, 64, dtype=BF16)}), "must hold x.weight once, got it plain and as int4_packed"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, said, tensors, match):
    def opened():
        weights = found(tmp_path, said, tensors)
        weights.check_plain(weights.tensors)

    with pytest.raises(CheckpointError, match=match):
        opened()


def test_a_shape_that_the_words_do_not_have_is_refused_when_it_is_read(tmp_path):
    weights = found(tmp_path, INT4, int4(**{"x.weight_shape": torch.tensor([24, 60])}))
    with pytest.raises(
        CheckpointError, match=r"x.weight of .* must be \[24, 64\], as the words have it, got \[24, 60\]"
    ):
        weights.read("x.weight")


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method of quantization_config must be 'fp8' or .*got 'bitsandbytes'"),
        ({}, "quant_method .* got None"),
        (FP8 | {"fmt": "e5m2"}, "fmt .* got 'e5m2'"),
        (FP8 | {"weight_block_size": 128}, "weight_block_size .* must be two sizes, got 128"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo .* got 'NVFP4_AWQ'"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "FP8"}},
            },
            "quantized_layers.a .* got 'FP8'",
        ),
        (AWQ | {"version": "gemv"}, "version .* got 'gemv'"),
        (GPTQ | {"bits": 3}, "bits .* must be 4 or 8, got 3"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format .* got 'marlin'"),
        (GPTQ | {"dynamic": {"-:x": {}}}, "dynamic .* must be empty"),
        (GPTQ | {"group_size": 0}, "group_size .* must be a positive size, got 0"),
        (group("int-quantized", num_bits=8, type="int", strategy="channel"), "format .of group_0. .* got 'int-quant"),
        (group("pack-quantized", num_bits=5, strategy="channel"), "num_bits .* got 5"),
        (
            group("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"),
            "actorder .* got 'group'",
        ),
        (INT4 | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config .* must be empty"),
    ],
)
def test_what_is_not_known_is_refused_by_name(said, match):
    with pytest.raises(UnsupportedModelError, match=match):
        formats_of(said)


def test_names_of_experts_follow_a_removal():
    kept = {3: [0, 2, 5], 4: [1, 2, 3]}
    said = {
        "ignore": [
            "lm_head",
            "model.layers.3.mlp.experts.2.up_proj",
            "model.layers.3.mlp.experts.1.up_proj",
            "re:.*gate",
        ],
        "modules_to_not_convert": [
            "model.layers.4.mlp.experts",
            "model.layers.2.mlp.experts.7",
            "layers.4.ffn.experts.3.w1",
        ],
        "quantized_layers": {
            "model.layers.3.mlp.experts.5.down_proj": {"quant_algo": "NVFP4"},
            "model.layers.3.mlp.experts.4.down_proj": {"quant_algo": "NVFP4"},
        },
        "bits": 4,
    }
    check_expert_names(said, "quantization_config")
    assert with_kept_experts(said, kept) == {
        "ignore": ["lm_head", "model.layers.3.mlp.experts.1.up_proj", "re:.*gate"],
        "modules_to_not_convert": [
            "model.layers.4.mlp.experts",
            "model.layers.2.mlp.experts.7",
            "layers.4.ffn.experts.2.w1",
        ],
        "quantized_layers": {"model.layers.3.mlp.experts.2.down_proj": {"quant_algo": "NVFP4"}},
        "bits": 4,
    }
    assert with_kept_experts(said, {}) == said


@pytest.mark.parametrize(
    "pattern", ["re:model.*experts\\.3\\..*", "model.layers.*.mlp.experts.3.up_proj", "re:.*experts.(1|2).*"]
)
def test_a_pattern_that_names_an_expert_is_refused(pattern):
    with pytest.raises(UnsupportedModelError, match="ignore must name experts one by one, or all of a layer"):
        check_expert_names([pattern], "ignore")
