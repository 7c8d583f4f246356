"""Swapping experts: never worse on its tokens, the error is the real one, and the model is left alone."""

from __future__ import annotations

import copy

import pytest
import torch

from moesparse.errors import UnsupportedModelError
from moesparse.experts.surgery import remove_experts
from moesparse.experts.swaps import refine_choice
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(5))


def first_block(model, windows):
    """Output of the first block's experts: [T, H]."""
    seen = []
    handle = find_moe_blocks(model)[0].experts.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    handle.remove()
    return seen[0].double()


def test_a_forward_that_was_replaced_before_stays_replaced():
    # hooks of other libraries put a function of their own into the module
    model = tiny_model("mixtral")
    experts = find_moe_blocks(model)[0].experts
    called, inside = [], experts.forward

    def watched(*args, **kwargs):
        called.append(1)
        return inside(*args, **kwargs)

    experts.forward = watched
    refine_choice(model, [torch.tensor([0, 1, 4, 5])] * 2, WINDOWS, tokens=48)
    assert experts.forward is watched
    called.clear()
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    assert called == [1]


# softmax; sigmoid, selection bias beside the router, shared experts; groups; biases and transposed experts
@pytest.mark.parametrize("family", ["mixtral", "hy_v3", "deepseek_v3", "gpt_oss"])
def test_swaps_lower_the_error_that_removal_really_has(family):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    kept = [torch.tensor([0, 1, 4, 5])] * len(find_moe_blocks(model))
    refined, reports = refine_choice(model, kept, WINDOWS, tokens=192)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert any(report.swaps for report in reports)
    dense = first_block(model, WINDOWS)
    for ids, want in ((kept, reports[0].before), (refined, reports[0].after)):
        pruned = copy.deepcopy(model)
        remove_experts(pruned, ids)
        error = (first_block(pruned, WINDOWS) - dense).square().sum() / dense.square().sum()
        assert float(error) == pytest.approx(want, rel=1e-4)
    for report in reports:
        assert report.after <= report.before
        # 4 x 4 pairs a round, and with router groups only 2 x 2 in each; the last round finds nothing
        assert report.tried == (8 if family == "deepseek_v3" else 16) * (len(report.swaps) + 1)


def test_protected_experts_are_not_swapped_and_the_number_of_swaps_is_bounded():
    model = tiny_model("mixtral")
    kept = [torch.tensor([0, 1, 4, 5])] * 2
    free, reports = refine_choice(model, kept, WINDOWS)
    gone = sorted({0, 1, 4, 5} - set(free[0].tolist()))
    assert gone
    held, _ = refine_choice(model, kept, WINDOWS, protect=[(0, expert) for expert in gone])
    assert set(gone) <= set(held[0].tolist())
    _, bounded = refine_choice(model, kept, WINDOWS, max_swaps=1)
    assert all(len(report.swaps) <= 1 for report in bounded)
    assert bounded[0].after >= reports[0].after


def test_tables_of_tokens_are_refused():
    with pytest.raises(UnsupportedModelError, match="swaps need a router that can be run by itself"):
        refine_choice(tiny_model("deepseek_v4"), [torch.arange(4)] * 2, WINDOWS)
