"""Kept weights trained expert by expert: against a plain loop, held masks, held-back tokens, refusals."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.refit import Calls
from moesparse.models.blocks import find_moe_blocks
from moesparse.pruning import tuning
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune, prune_checkpoint
from moesparse.testing import tiny_model
from moesparse.weights.patterns import Pattern, mask_from_score

FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "gemma4_text"]


def windows(n=64, length=32, seed=0):
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(seed))


def calls_of(block, tokens=4096, seed=0):
    """Smooth inputs, every token's experts and gates drawn."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(12, block.hidden_size, generator=generator)
    hidden = torch.randn(tokens, 12, generator=generator) @ basis
    order = torch.rand(tokens, block.num_experts, generator=generator).argsort(1)[:, :2]
    gates = torch.rand(tokens, 2, generator=generator)
    return Calls(hidden / hidden.std(), order, gates / gates.sum(1, keepdim=True))


def pruned(family):
    model = tiny_model(family)
    block = find_moe_blocks(model)[0]
    dense = [matrix.weight.clone() for matrix in block.matrices]
    for matrix in block.matrices:
        matrix.weight.mul_(mask_from_score(matrix.weight.abs(), Pattern.parse("2:4")))
    return block, dense


def expert_output(block, expert, x, weights):
    """Plainly, in float64."""
    up, down = block.matrices
    rows = F.linear(x.double(), weights[0][expert].double())
    rows = rows if up.bias is None else rows + up.bias[expert].double()
    rows = F.linear(block.activation(rows), weights[1][expert].double())
    rows = rows if down.bias is None else rows + down.bias[expert].double()
    return block.post_expert_norm(rows.float()).double() if block.has_post_expert_norm else rows


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_come_nearer_on_tokens_they_did_not_learn_from(family):
    block, dense = pruned(family)
    masks = [matrix.weight != 0 for matrix in block.matrices]
    before = [matrix.weight.clone() for matrix in block.matrices]
    calls = calls_of(block)
    other = calls_of(block, tokens=8192)
    fresh = Calls(other.hidden[4096:], other.index[4096:], other.gates[4096:])
    found = tuning.tune_experts(block, dense, calls, epochs=4)
    for matrix, mask in zip(block.matrices, masks, strict=True):
        assert torch.equal(matrix.weight != 0, mask), "a mask did not hold"
    for expert, errors in enumerate(found):
        assert errors is not None and errors[1] < errors[0]
        token, slot = (fresh.index == expert).nonzero(as_tuple=True)
        x, gates = fresh.hidden[token], fresh.gates[token, slot, None].double()
        want = expert_output(block, expert, x, dense) * gates
        after = [matrix.weight for matrix in block.matrices]
        first, last = (
            float((expert_output(block, expert, x, each) * gates - want).norm() / want.norm())
            for each in (before, after)
        )
        assert last < 0.95 * first
        # what is reported is that of other tokens of the same kind
        assert last == pytest.approx(errors[1], rel=0.2) and first == pytest.approx(errors[0], rel=0.2)


def test_the_reported_errors_are_those_of_the_held_back_tokens():
    block, dense = pruned("mixtral")
    before = [matrix.weight.clone() for matrix in block.matrices]
    calls = calls_of(block, tokens=600)
    found = tuning.tune_experts(block, dense, calls)
    for expert, errors in enumerate(found):
        token, slot = (calls.index == expert).nonzero(as_tuple=True)
        held = [row for row in range(len(token)) if row % 16 == 8]
        x, gates = calls.hidden[token][held], calls.gates[token, slot][held, None].double()
        want = expert_output(block, expert, x, dense) * gates
        after = [matrix.weight for matrix in block.matrices]
        for weights, error in zip((before, after), errors, strict=True):
            got = expert_output(block, expert, x, weights) * gates
            assert error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)


def test_one_step_is_adams():
    """A single step over all learnt rows, the gradient by autograd of the whole written down anew."""
    block, dense = pruned("mixtral")
    before = [matrix.weight.clone() for matrix in block.matrices]
    calls = calls_of(block, tokens=500)
    tuning.tune_experts(block, dense, calls, epochs=1)
    token, slot = (calls.index == 0).nonzero(as_tuple=True)
    learnt = torch.tensor([row for row in range(len(token)) if row % 16 != 8])
    assert len(learnt) < tuning.ROWS_IN_A_STEP
    x, gates = calls.hidden[token][learnt], calls.gates[token, slot][learnt, None].double()
    leaves = [weight[0].double().requires_grad_() for weight in before]
    want = expert_output(block, 0, x, dense) * gates
    got = expert_output(block, 0, x, [leaf[None] for leaf in leaves]) * gates
    (got - want).square().sum().backward()
    for leaf, weight, matrix in zip(leaves, before, block.matrices, strict=True):
        mask = weight[0] != 0
        rate = tuning.RATE * float(weight[0][mask].abs().mean())
        # Adam's first step is the sign of the gradient times the rate
        expected = torch.where(mask, weight[0] - rate * leaf.grad.sign().float(), 0.0)
        clear = leaf.grad.abs() > 1e-4 * leaf.grad.abs().max()
        assert torch.allclose(matrix.weight[0][clear], expected[clear], rtol=1e-3, atol=rate * 1e-2)


def test_what_does_not_help_is_not_kept(monkeypatch):
    block, dense = pruned("mixtral")
    before = [matrix.weight.clone() for matrix in block.matrices]
    monkeypatch.setattr(tuning, "RATE", 5.0)
    assert tuning.tune_experts(block, dense, calls_of(block)) == [None] * block.num_experts
    for matrix, weight in zip(block.matrices, before, strict=True):
        assert torch.equal(matrix.weight, weight)


def test_experts_with_few_tokens_are_left(monkeypatch):
    block, dense = pruned("mixtral")
    before = [matrix.weight.clone() for matrix in block.matrices]
    calls = calls_of(block, tokens=400)
    index = calls.index.clone()
    index[calls.index == 1] = block.num_experts
    index[:31][calls.index[:31] == 0] = 1
    found = tuning.tune_experts(block, dense, Calls(calls.hidden, index, calls.gates))
    assert found[1] is None and found[0] is not None
    for matrix, weight in zip(block.matrices, before, strict=True):
        assert torch.equal(matrix.weight[1], weight[1]) and not torch.equal(matrix.weight[0], weight[0])


def test_a_seed_orders_the_tokens():
    def weights(seed):
        block, dense = pruned("mixtral")
        tuning.tune_experts(block, dense, calls_of(block), seed=seed)
        return block.matrices[1].weight.clone()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("update", ["obs", "least-squares", "asymmetric"])
def test_the_rule_trains_behind_its_solver(update):
    ids, losses = windows(256), {}
    dense = tiny_model("mixtral")
    for rule in (update, f"{update}+tune"):
        model = copy.deepcopy(dense)
        report = prune(model, ids, Recipe(saliency="gated-sparsegpt", update=rule))
        assert all(tensor.holds for block in report.blocks for tensor in block.tensors)
        block, pruned_block = find_moe_blocks(dense)[0], find_moe_blocks(model)[0]
        x = torch.randn(256, block.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.5
        losses[rule] = [
            float(
                (
                    expert_output(block, e, x, [m.weight for m in block.matrices])
                    - expert_output(pruned_block, e, x, [m.weight for m in pruned_block.matrices])
                ).norm()
            )
            for e in range(block.num_experts)
        ]
        found = [block.tuned for block in report.blocks]
        assert (found == [None] * len(found)) == (rule == update)
        if rule != update:
            kept = [each for block in found for each in block if each]
            assert len(kept) > 4 and all(math.isfinite(a) and b < a for a, b in kept)
            assert type(report.blocks[0]).from_dict(report.blocks[0].to_dict()) == report.blocks[0]
    assert losses[update] != losses[f"{update}+tune"]


def test_layer_by_layer_gives_the_same_bits(tmp_path):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "dense")
    recipe = Recipe(saliency="moe-pruner", update="asymmetric+tune")
    prune_checkpoint(tmp_path / "dense", tmp_path / "out", windows(), recipe, batch_size=8)
    prune(model, windows(), recipe, batch_size=8)
    again = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_saved_sums_do_not_do():
    model = tiny_model("mixtral")
    statistics = calibrate(model, windows(6, 16), moments="gated")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"update='least-squares\+tune' needs the tokens once more"):
        prune(model, statistics, Recipe(saliency="moe-pruner", update="least-squares+tune"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(UsageError, match="update must be one of"):
        Recipe(update="none+tune")


def test_a_matrix_that_stays_dense_stays_as_it_is():
    dense, model = tiny_model("mixtral"), tiny_model("mixtral")
    names = [block.name for block in find_moe_blocks(model)]
    patterns = {names[0]: {"gate_up_proj": "2:4", "down_proj": "dense"}}
    patterns |= {name: {"gate_up_proj": "dense", "down_proj": "dense"} for name in names[1:]}
    stages = []
    report = prune(
        model,
        windows(256),
        Recipe(patterns=patterns, saliency="moe-pruner", update="least-squares+tune"),
        progress=lambda event: stages.append(event.stage),
    )
    for number, (before, after) in enumerate(zip(find_moe_blocks(dense), find_moe_blocks(model), strict=True)):
        up, down = (torch.equal(a.weight, b.weight) for a, b in zip(before.matrices, after.matrices, strict=True))
        assert down and up == (number > 0)
        assert (report.blocks[number].tuned is None) == (number > 0)
    assert any(report.blocks[0].tuned)
    # a step that may take minutes is announced
    assert f"tune {names[0]}" in stages
