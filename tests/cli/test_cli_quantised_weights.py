"""What cannot be done with checkpoints that others have quantised is refused before any work; bf16 copies are dense."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_text import make_tokenizer
from typer.testing import CliRunner

from moesparse.cli import app
from moesparse.errors import MoESparseError
from moesparse.models.stream import LayerStream
from moesparse.pruning import weights
from moesparse.testing import tiny_model

SMALL = ("--samples", "4", "--length", "32")
QUICK = ("--saliency", "wanda", "--update", "none")
WAYS = {
    "by layer": QUICK,
    "whole": (*QUICK, "--whole"),
    "to a size": (*QUICK, "--target-bytes", "0.7"),
    "magnitude": ("--saliency", "magnitude", "--update", "none"),
    "experts": ("--experts", "0.25", "--update", "none"),
}
INT4 = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}


def checkpoint(folder: Path, family: str) -> dict[str, torch.Tensor]:
    tiny_model(family, vocab_size=320).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def finish(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    save_file({key: each.contiguous() for key, each in tensors.items()}, folder / "model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def fp8(folder: Path, **config) -> Path:
    """As DeepSeek publishes: fp8 matrices with a scale for each block of 128 by 128."""
    tensors = {}
    for key, each in checkpoint(folder, "deepseek_v3").items():
        if each.ndim == 2 and "_proj" in key:
            scale = each.abs().max().float() / 448
            tensors[key] = (each.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = scale.reshape(1, 1)
        else:
            tensors[key] = each
    return finish(folder, tensors, **config)


def fp8_named(folder: Path) -> Path:
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return fp8(folder, quantization_config=method)


def mxfp4(folder: Path) -> Path:
    """As gpt-oss is published: 4-bit blocks of 32 along the inputs, and the exponent of each."""
    tensors = {}
    for key, each in checkpoint(folder, "gpt_oss").items():
        if "experts" in key and key.endswith("proj"):
            experts, inputs, outputs = each.shape
            tensors[f"{key}_blocks"] = torch.randint(0, 255, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            tensors[f"{key}_scales"] = torch.randint(120, 130, (experts, outputs, inputs // 32), dtype=torch.uint8)
        else:
            tensors[key] = each
    return finish(folder, tensors, quantization_config={"quant_method": "mxfp4"})


def int4(folder: Path) -> Path:
    """A config of Kimi-K2, over tensors that are none."""
    groups = {"group_0": {"input_activations": None, "targets": ["Linear"], "weights": INT4}}
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return finish(folder, checkpoint(folder, "deepseek_v3"), quantization_config=method)


def awq(folder: Path) -> Path:
    method = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    return finish(folder, checkpoint(folder, "qwen3_moe"), quantization_config=method)


NAMED = {
    fp8_named: "fp8",
    fp8: "must say in quantization_config of config.json how .*_proj.weight is stored, got F8_E4M3",
    mxfp4: "mxfp4",
    int4: "compressed-tensors|must hold tensors of int4_packed, as its quantization_config says, got plain ones alone",
    awq: "awq|must hold tensors of awq, as its quantization_config says, got plain ones alone",
}


def command(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("the quick brown fox over the lazy dog while owls sleep in old trees\n" * 100)
    return file


@pytest.mark.parametrize(
    ("make", "way"),
    [
        # two that fit their config: layer by layer they are pruned
        *((make, way) for make in (fp8_named, mxfp4) for way in ("whole", "to a size")),
        *((make, way) for make in (fp8, int4, awq) for way in WAYS if way != "experts"),
    ],
)
def test_quantised_weights_are_refused_before_any_work(make, way, tmp_path, monkeypatch):
    """No run ends in a defect, and none begins that cannot end."""
    begun = []
    monkeypatch.setattr(LayerStream, "run", lambda *_, **__: begun.append("a layer was run"))
    monkeypatch.setattr(weights, "prune_block", lambda *_, **__: begun.append("a block was pruned"))
    source, out = make(tmp_path / "in"), tmp_path / "out"
    calibration = () if way == "magnitude" else ("--calibration", text(tmp_path), *SMALL)
    result = command("prune", source, out, *WAYS[way], *calibration)
    assert result.exit_code == 1 and isinstance(result.exception, MoESparseError), result.output
    assert re.search(NAMED[make], str(result.exception)), result.exception
    assert not begun and not out.exists()


@pytest.mark.parametrize("arguments", [("prune", "OUT", "--dry-run"), ("inspect",)], ids=lambda given: given[0])
def test_weights_that_nothing_explains_are_named_by_plans_and_by_inspect(arguments, tmp_path):
    source = fp8(tmp_path / "in")
    name, *rest = (str(tmp_path / "out") if each == "OUT" else each for each in arguments)
    result = command(name, source, *rest, *(SMALL if name == "prune" else ()))
    assert result.exit_code == 1 and isinstance(result.exception, MoESparseError), result.output
    assert re.search(NAMED[fp8], str(result.exception)), result.exception


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rounded_to_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """In blocks of 32 along the inputs [.., in, out], by the OCP specification; values and signs of zeros as bf16."""
    blocks = weight.float().transpose(-1, -2).unflatten(-1, (-1, 32))
    scale = torch.exp2(blocks.abs().amax(-1, keepdim=True).clamp_min(1e-20).log2().floor() - 2)
    codes = (blocks / scale).clamp(-6, 6)
    near = E2M1[(codes.abs()[..., None] - E2M1).abs().argmin(-1)] * codes.sign()
    return (near * scale).flatten(-2).transpose(-1, -2).to(torch.bfloat16)


def rounded_to_int4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return ((blocks / scale).round().clamp(-8, 7) * scale).flatten(-2).to(torch.bfloat16)


@pytest.mark.parametrize("way", ["by layer", "whole", "experts"])
@pytest.mark.parametrize(
    ("family", "rounded", "matrix"),
    [
        ("gpt_oss", rounded_to_mxfp4, re.compile(r"experts\.(gate_up|down)_proj$")),
        ("deepseek_v3", rounded_to_int4, re.compile(r"mlp\.experts\.\d+\.\w+\.weight$")),
    ],
    ids=["mxfp4", "int4"],
)
def test_bf16_copies_of_4_bit_weights_are_dense(family, rounded, matrix, way, tmp_path):
    """Their zeros are what rounding leaves: pruned without --allow-pruned."""
    source, out = tmp_path / "in", tmp_path / "out"
    tensors = checkpoint(source, family)
    experts = [key for key in tensors if matrix.search(key)]
    tensors |= {key: rounded(tensors[key]) for key in experts}
    finish(source, tensors)
    zeros = sum(int((tensors[key] == 0).sum()) for key in experts) / sum(tensors[key].numel() for key in experts)
    assert 0.05 < zeros < 0.15
    result = command("prune", source, out, *WAYS[way], "--calibration", text(tmp_path), *SMALL)
    assert result.exit_code == 0, result.output
    assert command("inspect", out, "--against", source).exit_code == 0
    if way != "experts":
        after = {key: each for file in out.glob("*.safetensors") for key, each in load_file(file).items()}
        for key in experts:
            kept = after[key] != 0
            assert kept.any() and after[key][kept].equal(tensors[key][kept])
