"""The GGUF files of the benchmarks: llama.cpp makes of them what transformers makes of the model."""

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from gguf_files import VOCABULARY, log_probabilities, read

from benchmarks.speed.gguf_model import random_qwen3, write_gguf

ATTENTION = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
DENSE = {"intermediate_size": 96}
PROMPTS = ([3, 9, 27], [5], [60, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(("sizes", "layers", "tensors"), [(EXPERTS, 2, 12), (EXPERTS, 1, 12), (DENSE, 2, 11)])
def test_llama_cpp_runs_the_model_that_was_written(sizes, layers, tensors, tmp_path):
    model = random_qwen3(2, VOCABULARY, **ATTENTION, **sizes)
    with torch.no_grad():
        # larger weights, so that a tensor in the place of another is seen
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            else:
                parameter.uniform_(0.5, 1.5)
    path = write_gguf(model, tmp_path / "model.gguf", layers)
    model = model.float()
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    with torch.no_grad():
        wanted = torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in PROMPTS])
    found = torch.from_numpy(log_probabilities(path, list(PROMPTS))).float()
    # llama.cpp rounds what goes into a bf16 matrix to bf16
    assert (found - wanted).abs().max() < 0.05 * wanted.std()
    _, held = read(path)
    assert sum(name.startswith(f"blk.{layers - 1}.") for name in held) == tensors
    assert not any(name.startswith(f"blk.{layers}.") for name in held)
