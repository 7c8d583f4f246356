"""Packed models by the compiled CPU kernels: what a user's model does with them, and without."""

import pytest
import torch

import moesparse
from moesparse import demo
from moesparse.models.blocks import find_moe_blocks
from moesparse.packed.experts import SparseExperts
from moesparse.testing import prune_by_magnitude, tiny_model
from moesparse_kernels import NMWeight, native_library
from moesparse_kernels.moe_native import NATIVE_ACTIVATIONS

pytestmark = pytest.mark.skipif(native_library.library() is None, reason=str(native_library.reason_without()))


@pytest.fixture
def calls(monkeypatch):
    """(stage, activation) of the calls of the compiled layer."""
    made = []
    run = native_library.Native.run_layer
    names = {code: name for name, code in NATIVE_ACTIVATIONS.items()}

    def noted(self, layer):
        made.append((layer.stage, names[layer.activation]))
        run(self, layer)

    monkeypatch.setattr(native_library.Native, "run_layer", noted)
    return made


def test_the_embedded_model_goes_on_as_by_the_reference(calls):
    model, tokenizer = demo.load()
    moesparse.prune(model, None, moesparse.Recipe(saliency="magnitude", update="none"))
    blocks = len(find_moe_blocks(model))
    moesparse.pack(model)
    ids = torch.tensor([tokenizer.encode(demo.text("heldout", "novel")[:400])])
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    with torch.no_grad():
        here = model.generate(ids, **told)
        assert calls == [(0, "silu")] * (200 * blocks)
        with native_library.turned_off():
            wanted = model.generate(ids, **told)
    assert len(calls) == 200 * blocks
    assert torch.equal(here, wanted)


@pytest.mark.parametrize(("limit", "stages"), [(7.0, [(0, "swigluoai")]), (0.5, [(1, "none"), (2, "none")])])
def test_gpt_oss_is_one_call_with_the_limit_it_was_trained_with(calls, limit, stages):
    (block, *_) = find_moe_blocks(prune_by_magnitude(tiny_model("gpt_oss")))
    block.experts.limit = limit
    weights = {matrix.name: NMWeight.pack(matrix.weight) for matrix in block.matrices}
    sparse = SparseExperts(block, weights)
    random = torch.Generator().manual_seed(0)
    # large enough to be clamped by either limit
    x = 30 * torch.randn(11, block.hidden_size, generator=random)
    index = torch.rand(11, block.num_experts, generator=random).topk(2, dim=-1).indices
    gates = torch.rand(11, 2, generator=random)
    with torch.no_grad():
        out = sparse(x, index, gates)
        assert calls == stages
        block.experts.config._experts_implementation = "eager"
        wanted = block.experts(x, index, gates)
        exact = block.experts.double()(x.double(), index, gates.double())
    budget = 2 * (wanted - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (out - exact).abs().max() <= budget
