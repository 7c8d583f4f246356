"""Refitting the kept down projections: the solver against a dense solve, and the whole driver on tiny models."""

from __future__ import annotations

import pytest
import torch

from moesparse.blocks import find_moe_blocks
from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.refit import memory_for_refit, refit_block, remove_and_refit
from moesparse.surgery import remove_experts
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(5))
KEPT = [torch.tensor([0, 2, 3, 5, 6, 7]), torch.tensor([1, 2, 3, 4, 6, 7])]


@torch.no_grad()
def hidden_of(model, windows):
    return model(input_ids=windows, use_cache=False, output_hidden_states=True).hidden_states[-1]


# with expert biases and transposed weights: gpt_oss
@pytest.mark.parametrize("solver", ["factorisation", "factorisation over tokens", "conjugate gradients"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_solvers_find_the_ridge_solution(family, solver, monkeypatch):
    if solver == "conjugate gradients":
        monkeypatch.setattr("moesparse.refit._MAX_GRAM", 0)
    torch.manual_seed(0)
    model = tiny_model(family)
    remove_experts(model, [[0, 3, 5]] * 2)
    block = find_moe_blocks(model)[0]
    # as many features as tokens at most, or fewer tokens
    T, K = (40 if solver == "factorisation over tokens" else 200), 2
    hidden = torch.randn(T, block.hidden_size)
    index = torch.stack([torch.randperm(3)[:K] for _ in range(T)])
    gates = torch.rand(T, K)
    target = torch.randn(T, block.hidden_size)

    up, down = block.matrices
    old = down.weight.double().clone()
    I = block.intermediate_size
    phi = torch.zeros(T, 3 * I, dtype=torch.float64)
    base = torch.zeros(T, block.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        for t in range(T):
            for k in range(K):
                j, g = int(index[t, k]), gates[t, k].double()
                out = up.weight[j] @ hidden[t]
                h = block.activation((out if up.bias is None else out + up.bias[j])[None])[0].double()
                phi[t, j * I : (j + 1) * I] += g * h
                base[t] += g * (old[j] @ h + (0 if down.bias is None else down.bias[j].double()))
    gram = phi.T @ phi
    gram += 0.05 * gram.diagonal().mean() * torch.eye(3 * I, dtype=torch.float64)
    want = torch.linalg.solve(gram, phi.T @ (target.double() - base))  # [E * I, H]

    report = refit_block(block, hidden, index, gates, target, ridge=0.05)
    change = (block.matrices[-1].weight.double() - old).transpose(1, 2).reshape(3 * I, -1)
    assert (change - want).norm() < 1e-3 * want.norm()
    left = (target.double() - base - phi @ change).square().sum() / target.double().square().sum()
    assert report.after == pytest.approx(float(left), rel=1e-4)
    assert report.before == pytest.approx(
        float((target.double() - base).square().sum() / target.double().square().sum()), rel=1e-4
    )
    assert report.tokens == T
    assert (report.iterations > 0) == (solver == "conjugate gradients")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_the_refitted_model_is_nearer_to_the_dense_one(family):
    dense, plain, refitted = (tiny_model(family) for _ in range(3))
    kept = KEPT[: len(find_moe_blocks(dense))]
    if family == "deepseek_v3":
        kept = [torch.tensor([0, 2, 3, 5, 6, 7])]
    remove_experts(plain, kept)
    surgery, reports = remove_and_refit(refitted, kept, WINDOWS, batch_size=3)
    assert refitted.config.to_dict() == plain.config.to_dict()
    assert [block.kept for block in surgery.blocks] == [tuple(ids.tolist()) for ids in kept]
    for report in reports:
        assert 0 < report.after < 0.9 * report.before
    want = hidden_of(dense, WINDOWS)
    error = [(hidden_of(model, WINDOWS) - want).norm() / want.norm() for model in (plain, refitted)]
    assert error[1] < error[0]
    # only the down projections differ from plain removal
    for (name, a), b in zip(plain.named_parameters(), refitted.parameters(), strict=True):
        assert torch.equal(a, b) != name.endswith("down_proj"), name


def test_padding_does_not_steer_the_fit():
    a, b = tiny_model("mixtral"), tiny_model("mixtral")
    mask = torch.ones_like(WINDOWS)
    mask[:, 18:] = 0
    other = WINDOWS.clone()
    other[:, 18:] = 1
    remove_and_refit(a, KEPT, (WINDOWS, mask))
    remove_and_refit(b, KEPT, (other, mask))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_tokens_are_capped_evenly(monkeypatch):
    monkeypatch.setattr("moesparse.refit.MAX_TOKENS", 50)
    _, reports = remove_and_refit(tiny_model("mixtral"), KEPT, WINDOWS, batch_size=3)
    # 192 tokens, every 4th of each batch of 72, 72 and 48
    assert [report.tokens for report in reports] == [48, 48]


def test_what_cannot_be_refitted_changes_nothing(monkeypatch):
    model = tiny_model("mixtral")
    with pytest.raises(UsageError, match=r"ridge must be positive, .* got 0"):
        remove_and_refit(model, KEPT, WINDOWS, ridge=0)
    find_moe_blocks(model)[0].experts.has_post_expert_norm = True
    with pytest.raises(UnsupportedModelError, match="norms the output of each expert"):
        remove_and_refit(model, KEPT, WINDOWS)
    assert model.config.num_local_experts == 8


def test_memory_is_stated_for_a_mixtral_sized_block():
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    # top 2, I = 96, H = 32, 6 kept; the matrix factorised has the smaller side of features and tokens
    for tokens, side in ((100, 100), (1000, 6 * 96)):
        features = 4 * (2 * tokens * 96 + 4 * tokens * 32)
        assert memory_for_refit(block, 6, tokens) == features + 20 * 6 * 32 * 96 + 16 * side**2
