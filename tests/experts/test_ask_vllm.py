"""Where vLLM cannot be asked, that is said; what it is asked with is small and of the model's own class.

What vLLM answers is in tests/vllm_plugin/test_results.py.
"""

import importlib.util
import json

import pytest

from moesparse.experts.ask_vllm import NOT_KNOWN, _save_small, ask_vllm, installed_vllm
from moesparse.experts.surgery import say_readers
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.opener import opener
from moesparse.testing import tiny_model


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_small_model_has_the_counts_asked_for(family, tmp_path):
    model = tiny_model(family, num_hidden_layers=3)
    for counts in ((8, 8), (8, 6)):
        folder = tmp_path / str(counts[1])
        _save_small(type(model), model.config, counts, folder)
        held = json.loads((folder / "config.json").read_text())
        assert held["num_hidden_layers"] == 2 and held["hidden_size"] == 64
        assert ("per_layer_config" in held) == (counts[1] == 6)
        read = opener(type(model.config).from_pretrained(folder)).from_pretrained(folder)
        assert type(read) is type(model)
        assert tuple(block.num_experts for block in find_moe_blocks(read)) == counts
    assert model.config.num_hidden_layers == 3


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_vllm_cannot_be_asked_that_is_said():
    model = tiny_model("mixtral")
    assert installed_vllm() == ""
    # the process that would load the model of equal counts fails, and so nothing is known of different ones
    said = ask_vllm(type(model), model.config, [8, 6])
    assert said.startswith(f"{NOT_KNOWN}its process ended with 1: ModuleNotFoundError")
    words = say_readers({"moesparse 1": "", "transformers 2": "it stops", "vllm 3": said})
    assert words.startswith("read by moesparse 1, not by transformers 2 (it stops), not known of vllm 3 (its process")
