"""Refitting the kept down projections: the solver against a dense solve, and the whole driver on tiny models."""

from __future__ import annotations

import pytest
import torch

from moesparse.checkpoints.output import InPlace
from moesparse.errors import CalibrationError, UnsupportedModelError, UsageError
from moesparse.experts.refit import DEFAULT_RIDGE, Calls, _Features, check_refit, memory_for_refit, refit
from moesparse.experts.surgery import plan_removal, remove_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.layers import LayersInMemory, RunOptions
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.removal import remove_and_refit
from moesparse.pruning.run import prune
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(5))
KEPT = [torch.tensor([0, 2, 3, 5, 6, 7]), torch.tensor([1, 2, 3, 4, 6, 7])]


@torch.no_grad()
def hidden_of(model, windows):
    return model(input_ids=windows, use_cache=False, output_hidden_states=True).hidden_states[-1]


def removed(model, kept, ids, mask=None, batch_size=8):
    """Remove experts and refit those that stay: the surgery's report and those of the blocks."""
    layers, options = LayersInMemory(model), RunOptions(batch_size)
    stream = layers.stream(ids, mask, options)
    return remove_and_refit(layers, InPlace(layers), stream, plan_removal(model, kept), options)


def iterate_always(monkeypatch):
    monkeypatch.setattr(
        "moesparse.experts.refit._matrix", lambda features, tokens, held: (min(features, tokens), False)
    )


# with expert biases and transposed weights: gpt_oss; few tokens: an expert has fewer than features
@pytest.mark.parametrize(
    "solver", ["factorisation", "factorisation over tokens", "conjugate gradients", "conjugate gradients, few tokens"]
)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_solvers_find_the_ridge_solution(family, solver, monkeypatch):
    if solver.startswith("conjugate"):
        iterate_always(monkeypatch)
        monkeypatch.setattr("moesparse.experts.refit._TOLERANCE", 1e-9)
    torch.manual_seed(0)
    model = tiny_model(family)
    remove_experts(model, [[0, 3, 5]] * 2)
    block = find_moe_blocks(model)[0]
    # as many features as tokens at most, or fewer tokens
    T, K = (40 if "tokens" in solver else 200), 2
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

    report = refit(block, Calls(hidden, index, gates), target, ridge=0.05)
    change = (block.matrices[-1].weight.double() - old).transpose(1, 2).reshape(3 * I, -1)
    assert (change - want).norm() < 1e-3 * want.norm()
    left = (target.double() - base - phi @ change).square().sum() / target.double().square().sum()
    assert report.after == pytest.approx(float(left), rel=1e-4)
    assert report.before == pytest.approx(
        float((target.double() - base).square().sum() / target.double().square().sum()), rel=1e-4
    )
    assert report.tokens == T
    assert (report.iterations > 0) == solver.startswith("conjugate")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_the_refitted_model_is_nearer_to_the_dense_one(family):
    dense, plain, refitted = (tiny_model(family) for _ in range(3))
    kept = KEPT[: len(find_moe_blocks(dense))]
    if family == "deepseek_v3":
        kept = [torch.tensor([0, 2, 3, 5, 6, 7])]
    remove_experts(plain, kept)
    surgery, reports = removed(refitted, kept, WINDOWS, batch_size=3)
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


@torch.no_grad()
def test_few_rounds_gain_what_the_exact_solution_gains(monkeypatch):
    """Collinear features, as trained activations are: the diagonal alone as preconditioner takes 30 rounds for this."""
    random = torch.Generator().manual_seed(0)
    T, K, E, I, H = 600, 2, 6, 96, 32
    index = torch.stack([torch.randperm(E, generator=random)[:K] for _ in range(T)])
    features = _Features.__new__(_Features)
    features.experts, features.shape, features.width = E, (T, H), I
    features.tokens = [(index == expert).any(1).nonzero()[:, 0] for expert in range(E)]
    common = torch.randn(T, I, generator=random) @ torch.diag(0.95 ** torch.arange(I)) + 0.5
    features.rows = [
        common[token] @ torch.randn(I, I, generator=random) + 0.1 * torch.randn(len(token), I, generator=random)
        for token in features.tokens
    ]
    target = features.apply(torch.randn(E, H, I, generator=random)) + torch.randn(T, H, generator=random)
    damping = DEFAULT_RIDGE * float(torch.cat(features.rows).square().mean(0).mean() * 2 * T / E)

    def missed(change):
        return float((target - features.apply(change)).square().sum() + damping * change.square().sum())

    exact, rounds = features.solve(target, DEFAULT_RIDGE)
    assert rounds == 0
    iterate_always(monkeypatch)
    change, rounds = features.solve(target, DEFAULT_RIDGE)
    nothing = float(target.square().sum())
    assert rounds <= 8
    assert missed(change) - missed(exact) < 2e-3 * (nothing - missed(exact))


@pytest.mark.parametrize("ridge", [1e-9, 1e3])
def test_any_ridge_can_be_factorised_and_what_is_not_finite_is_refused(ridge):
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    # one token over and over: all but one direction is the ridge's alone
    calls = torch.ones(64, block.hidden_size), torch.tensor([[0, 1]] * 64), torch.full((64, 2), 0.5)
    report = refit(block, Calls(*calls), torch.ones(64, block.hidden_size), ridge=ridge)
    assert report.after < report.before
    with pytest.raises(CalibrationError, match="activations must be finite"):
        refit(block, Calls(calls[0] * torch.inf, *calls[1:]), torch.ones(64, block.hidden_size))


def test_padding_does_not_steer_the_fit():
    a, b = tiny_model("mixtral"), tiny_model("mixtral")
    mask = torch.ones_like(WINDOWS)
    mask[:, 18:] = 0
    other = WINDOWS.clone()
    other[:, 18:] = 1
    removed(a, KEPT, WINDOWS, mask)
    removed(b, KEPT, other, mask)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_tokens_are_capped_evenly(monkeypatch):
    monkeypatch.setattr("moesparse.experts.refit.MAX_TOKENS", 50)
    _, reports = removed(tiny_model("mixtral"), KEPT, WINDOWS, batch_size=3)
    # 192 tokens, every 4th of each batch of 72, 72 and 48
    assert [report.tokens for report in reports] == [48, 48]


def test_what_cannot_be_refitted_changes_nothing(monkeypatch):
    model = tiny_model("mixtral")
    with pytest.raises(UsageError, match=r"ridge must be positive, .* got 0"):
        check_refit(find_moe_blocks(model), ridge=0)
    find_moe_blocks(model)[0].experts.has_post_expert_norm = True
    with pytest.raises(UnsupportedModelError, match="norms the output of each expert"):
        prune(model, WINDOWS, Recipe(weights=None, experts=0.25))
    assert model.config.num_local_experts == 8


def test_memory_is_stated_for_a_mixtral_sized_block(monkeypatch):
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    # top 2, I = 96, H = 32, 6 kept; the matrix factorised has the smaller side of features and tokens
    for tokens, factored in ((100, 100**2), (1000, (6 * 96) ** 2)):
        held = 2 * tokens * 96 + 6 * tokens * 32 + 4 * 6 * 32 * 96
        assert memory_for_refit(block, 6, tokens) == 4 * (held + factored)
    # as a whole it would take more than the features: one matrix for every expert, of I or of its rows
    monkeypatch.setattr("moesparse.experts.refit._MAX_SIDE", 0)
    for tokens, factored in ((1000, 6 * 96**2), (250, 6 * (2 * 250 // 6) ** 2)):
        held = 2 * tokens * 96 + 6 * tokens * 32 + 4 * 6 * 32 * 96
        assert memory_for_refit(block, 6, tokens) == 4 * (held + factored)
