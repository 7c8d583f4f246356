"""Experts whose rows are no multiple of 16 bytes, which torch's grouped_mm refuses: run one by one, same numbers."""

import pytest
import torch

import moesparse
from moesparse import evaluate
from moesparse.checkpoints.pretrained import load_model
from moesparse.distillation.experts import slot_outputs
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.modes import fits_grouped_mm, let_experts_run
from moesparse.testing import tiny_model

# the size of a row in float32 is 360 bytes; gpt_oss stores its matrices transposed
FAMILIES = {"qwen3_moe": "moe_intermediate_size", "gpt_oss": "intermediate_size"}


def odd_model(family, size=90):
    return tiny_model(family, seed=1, **{FAMILIES[family]: size})


def windows(count=4, length=16):
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(0))


def eager_logits(family):
    model = odd_model(family)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(windows()).logits


@pytest.mark.parametrize(("size", "dtype", "fits"), [(92, torch.float32, True), (90, torch.float32, False)])
def test_what_grouped_mm_takes_is_known(size, dtype, fits):
    weight, rows = torch.randn(2, 8, size, dtype=dtype), torch.randn(3, size, dtype=dtype)
    assert fits_grouped_mm(weight) == fits_grouped_mm(weight.mT) == fits
    ends = torch.tensor([1, 3], dtype=torch.int32)
    if fits:
        torch.nn.functional.grouped_mm(rows, weight.mT, offs=ends)
    else:
        # should torch learn it, nothing of this is needed any more
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            torch.nn.functional.grouped_mm(rows, weight.mT, offs=ends)


def test_other_models_keep_what_they_run():
    model = tiny_model("qwen3_moe")
    let_experts_run(model)
    assert model.config._experts_implementation == "grouped_mm"
    let_experts_run(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_door_runs_them(family, tmp_path):
    want = eager_logits(family)
    scored = torch.nn.functional.cross_entropy(want[:, :-1].double().flatten(0, 1), windows()[:, 1:].flatten())
    assert evaluate.perplexity(odd_model(family), windows()).perplexity == pytest.approx(float(scored.exp()), rel=1e-5)
    odd_model(family).save_pretrained(tmp_path / "model")
    with torch.no_grad():
        loaded = load_model(tmp_path / "model")
        assert torch.equal(loaded(windows()).logits, want)
        assert loaded.generate(windows(), max_new_tokens=2, do_sample=False).shape == (4, 18)
    sums = moesparse.calibrate(odd_model(family), windows()).blocks
    again = moesparse.calibrate_checkpoint(tmp_path / "model", tmp_path / "statistics", windows()).blocks
    for name, block in sums.items():
        torch.testing.assert_close(again[name].gated_norm_sum, block.gated_norm_sum)
        assert torch.equal(again[name].tokens, block.tokens) and int(block.tokens.sum()) == windows().numel() * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ratio_prunes_them_on_the_disk_as_in_memory(family, tmp_path):
    recipe = moesparse.Recipe(weights=0.5, saliency="wanda", update="none")
    odd_model(family).save_pretrained(tmp_path / "model")
    moesparse.prune_checkpoint(tmp_path / "model", tmp_path / "out", windows(), recipe)
    model = odd_model(family)
    moesparse.prune(model, windows(), recipe)
    state = model.state_dict()
    assert all(torch.equal(each, state[name]) for name, each in load_model(tmp_path / "out").state_dict().items())
    for block in find_moe_blocks(model):
        for matrix in block.matrices:
            # wanda's share of every row
            assert ((matrix.weight == 0).sum(-1) == matrix.weight.shape[-1] // 2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_has_the_gradients_of_a_loop(family):
    block = find_moe_blocks(odd_model(family))[0]
    hidden = torch.randn(5, block.experts.hidden_dim if hasattr(block.experts, "hidden_dim") else 32)
    index = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 1], [2, 1]])
    got = slot_outputs(block, hidden, index)
    got.square().sum().backward()
    grads = [matrix.parameter.grad.clone() for matrix in block.matrices]
    up, down = block.matrices
    for matrix in block.matrices:
        matrix.parameter.grad = None

    def one(matrix, expert, x):
        weight = matrix.parameter[expert]
        out = x @ (weight if matrix.transposed else weight.T)
        return out + getattr(matrix.experts, f"{matrix.name}_bias")[expert] if matrix.experts.has_bias else out

    want = torch.stack(
        [
            torch.stack([one(down, e, block.activation(one(up, e, hidden[t : t + 1])))[0] for e in index[t].tolist()])
            for t in range(5)
        ]
    )
    want.square().sum().backward()
    torch.testing.assert_close(got, want)
    for matrix, grad in zip(block.matrices, grads, strict=True):
        # sums of the same float32 products in another order
        atol = 64 * torch.finfo(torch.float32).eps * float(matrix.parameter.grad.abs().max())
        torch.testing.assert_close(grad, matrix.parameter.grad, rtol=0, atol=atol)
