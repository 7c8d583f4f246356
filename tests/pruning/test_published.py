"""`--dry-run` on models as they are published: config.json, the index and the headers, without a byte of a weight."""

import json
import sys

import pytest
from published import CONFIGS, write_published

from moesparse.cli import main
from moesparse.models.formats.stored import StoredWeights
from moesparse.models.on_disk import LayersOnDisk

# of the cards: parameters in billions, without layers that predict further tokens; bytes of the folders, where known
CARDS = {
    "DeepSeek-V3.2": (671, None),
    "Kimi-K2-Thinking": (1026, 594e9),
    "GLM-4.6-FP8": (353, None),
    "Qwen3-235B-A22B-FP8": (235, None),
    "gpt-oss-120b": (116.8, 60.8 * 2**30),
}

# bytes of one expert: codes, scales, shapes or biases
_DEEPSEEK = 3 * (7168 * 2048 + 56 * 16 * 4)
_KIMI = 3 * (7168 * 2048 // 2 + 7168 * 2048 // 32 * 2 + 2 * 4)
_GLM = 3 * 5120 * 1536 + (1536 + 1536 + 5120) * 2
_QWEN = 3 * (4096 * 1536 + 32 * 12 * 2)
_GPT_OSS = 3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 2

# format, layers, those with experts, experts, how many are left, bytes of one expert
PLANS = {
    "DeepSeek-V3.2": ("fp8_block", 61, 58, 256, 192, _DEEPSEEK),
    "Kimi-K2-Thinking": ("int4_packed", 61, 60, 384, 288, _KIMI),
    "GLM-4.6-FP8": ("fp8_channel", 92, 89, 160, 120, _GLM),
    "Qwen3-235B-A22B-FP8": ("fp8_block", 94, 94, 128, 96, _QWEN),
    "gpt-oss-120b": ("mxfp4", 36, 36, 128, 96, _GPT_OSS),
}


@pytest.mark.parametrize("model", CONFIGS)
def test_a_quarter_of_the_experts_of(model, tmp_path, monkeypatch, capsys):
    total = write_published(tmp_path / model, model)
    command = ["prune", str(tmp_path / model), str(tmp_path / "out"), "--experts", "0.25", "--dry-run", "--json"]
    monkeypatch.setattr(sys, "argv", ["moesparse", *command])
    with pytest.raises(SystemExit, match="0"):
        main()
    plan = json.loads(capsys.readouterr().out)
    form, layers, blocks, experts, keep, expert = PLANS[model]
    parameters, published = CARDS[model]
    assert plan["formats"] == [form]
    assert (plan["layers"], plan["blocks"], plan["experts"], plan["keep"]) == (layers, blocks, experts, keep)
    assert plan["parameters"] == pytest.approx(parameters * 1e9, rel=2e-3)
    assert plan["stored"] == total
    if published is not None:
        assert total == pytest.approx(published, rel=2e-3)
    # the experts that go, the router's rows aside; with all that a layer which predicts further tokens has
    gone = blocks * (experts - keep) * expert
    further = further_bytes(tmp_path / model, layers)
    assert plan["stored"] - plan["stored_after"] == gone + further
    # a layer is dequantised while text runs through it, in bf16; attention and the like are a small part of it
    config = CONFIGS[model]
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    dense = experts * 3 * config["hidden_size"] * width * 2
    assert dense < plan["layer"] < 1.1 * dense
    assert plan["outside"] + plan["layer"] < plan["peak"] < plan["outside"] + plan["layer"] + 20e9
    assert 60 < plan["seconds"] < 1e9
    assert not (tmp_path / "out").exists()


def further_bytes(folder, layers):
    files = sorted(folder.glob("*.safetensors"))[1 + layers :]
    # sparse: all but the header is data
    return sum(file.stat().st_size - 8 - int.from_bytes(file.open("rb").read(8), "little") for file in files)


@pytest.mark.parametrize("model", CONFIGS)
def test_the_names_are_those_that_the_model_of_transformers_has(model, tmp_path):
    # the first ones, dense and with experts, and behind them what predicts further tokens
    write_published(tmp_path / model, model, num_hidden_layers=4, layer_types=None)
    layers = LayersOnDisk(tmp_path / model)
    # refuses a tensor that is missing, has another shape, or that the model has no place for and does not ignore
    layers._check_keys(StoredWeights.of_folder(layers.folder, layers.model.dtype))
    assert all(name.startswith("model.layers.4.") for name in layers.surplus)
