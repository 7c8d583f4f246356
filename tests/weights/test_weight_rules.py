"""saliency/updates.py: every weight rule against its definition, computed slowly in float64 from the routed tokens."""

import dataclasses

import pytest
import torch
from expert_data import Sums, random_weight, routed
from test_mask_rules import textbook_sparsegpt

from moesparse.errors import CalibrationError, UsageError
from moesparse.weights import solvers
from moesparse.weights.mask_rules import MASK_RULES, choose_masks, obs_gate
from moesparse.weights.patterns import Pattern, check_mask
from moesparse.weights.weight_rules import (
    UPDATE_RULES,
    PrunedInputs,
    asymmetric_target,
    match_output,
    output_energy,
    rescale_factor,
    tunes,
    update_weights,
)

TWO_FOUR = Pattern(n=2, m=4)


def relative_error(weight, updated, x, g):
    """|g (W - V) x| / |g W x| over the tokens, float64."""
    gx = x * g[:, None]
    return float((gx @ (weight - updated).double().T).norm() / (gx @ weight.double().T).norm())


def output_norm(weight, x, g):
    """|g W x| over the tokens, one by one, float64."""
    return sum(float(((g_t * (weight.double() @ x_t)) ** 2).sum()) for x_t, g_t in zip(x, g, strict=True)) ** 0.5


@pytest.mark.parametrize("saliency", MASK_RULES)
@pytest.mark.parametrize("update", [r for r in UPDATE_RULES if not r.startswith("asymmetric") and not tunes(r)])
def test_every_mask_rule_goes_with_every_weight_rule(saliency, update):
    data, weight = routed(unseen=(3,)), random_weight().to(torch.bfloat16)
    sums, dense = data.sums(), weight.clone()
    for pattern in (TWO_FOUR, Pattern(ratio=0.5)):
        mask = choose_masks(weight, saliency, pattern, sums, "activation").mask
        found = update_weights(weight, mask, update, sums, "activation", gate=obs_gate(saliency))
        assert found.weight.dtype == weight.dtype
        assert torch.equal(weight, dense)
        assert not found.weight[~mask].any()
        assert not found.weight[~mask].signbit().any()
        assert check_mask(found.weight, pattern).holds
        # the expert without tokens is left as the mask found it
        assert torch.equal(found.weight[3], weight[3].masked_fill(~mask[3], 0.0))


def test_none_is_the_paper():
    weight, sums = random_weight(), Sums(torch.ones(4))
    mask = weight > 0
    found = update_weights(weight, mask, "none", sums, "hidden")
    assert torch.equal(found.weight, torch.where(mask, weight, 0.0))
    assert found.error_before is found.error_after is found.scale is found.damping is None


# rows of 2:4 and of unequal count; 300 columns are more than two obs blocks
@pytest.mark.parametrize(("in_features", "tokens"), [(32, 120), (300, 500)])
def test_least_squares_is_lstsq_on_the_support(in_features, tokens):
    data, weight = routed(in_features, experts=2, tokens=tokens, top_k=1), random_weight(2, 5, in_features)
    mask = choose_masks(weight, "moe-pruner", TWO_FOUR, data.sums(), "hidden").mask
    mask[:, 0], mask[:, 1] = True, weight[:, 1] > 1
    hessian = solvers.layer_hessian(data.sums().gated_moment["hidden"])
    found = solvers.least_squares(weight, mask, hessian, iterations=400, tolerance=1e-7)
    for j in range(2):
        x, g = data.of(j)
        gx = x * g[:, None]
        # damping is a row per column: sqrt(1% mean diagonal) times the identity
        ridge = (0.01 * (gx**2).sum(0).mean()).sqrt() * torch.eye(in_features, dtype=torch.float64)
        inputs = torch.cat([gx, ridge])
        for row in range(5):
            keep = mask[j, row]
            expected = torch.linalg.lstsq(inputs[:, keep], inputs @ weight[j, row].double()).solution
            torch.testing.assert_close(found[j, row, keep].double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[:, 0], weight[:, 0])


def test_least_squares_reports_the_error_over_the_tokens():
    data, weight = routed(), random_weight()
    mask = choose_masks(weight, "moe-pruner", TWO_FOUR, data.sums(), "hidden").mask
    found = update_weights(weight, mask, "least-squares", data.sums(), "hidden")
    for j in range(4):
        before = relative_error(weight[j], weight[j] * mask[j], *data.of(j))
        after = relative_error(weight[j], found.weight[j], *data.of(j))
        assert float(found.error_before[j]) == pytest.approx(before, rel=1e-4)
        assert float(found.error_after[j]) == pytest.approx(after, rel=1e-4)
        assert after < 0.7 * before


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iterations", [0, 1, 15])
def test_least_squares_never_leaves_a_row_worse_than_its_mask(seed, iterations):
    # two tokens in 32 columns, damping of ten mean diagonals: the damped solution is far from the error's minimum
    data, weight = routed(experts=1, tokens=2, top_k=1, seed=seed), random_weight(1, 64, seed=seed)
    mask = choose_masks(weight, "random", TWO_FOUR, data.sums(), "hidden", seed=seed).mask
    found = update_weights(
        weight, mask, "least-squares", data.sums(), "hidden", iterations=iterations, damping=10.0
    ).weight
    x, g = data.of(0)
    for row in range(64):
        before = relative_error(weight[0, row, None], (weight * mask)[0, row, None], x, g)
        assert relative_error(weight[0, row, None], found[0, row, None], x, g) <= before * (1 + 1e-5)


def test_fifteen_iterations_are_enough():
    data, weight = routed(256, experts=1, tokens=600, top_k=1), random_weight(1, 64, 256)
    # inputs of very unequal size: what the preconditioner is for
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    data.x *= torch.logspace(-1, 1, 256, dtype=torch.float64)[order]
    mask = choose_masks(weight, "moe-pruner", TWO_FOUR, data.sums(), "hidden").mask
    few, many = (
        update_weights(weight, mask, "least-squares", data.sums(), "hidden", iterations=n).error_after
        for n in (15, 300)
    )
    assert few[0] < 1.02 * many[0]


def pruned_inputs(data, weight, seed=0):
    """Activations that a pruned gate and up would leave: correlated with the dense ones; and the sums over both."""
    noise = torch.randn(data.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pruned = dataclasses.replace(data, x=0.6 * data.x + 0.4 * noise)
    cross, energy = [], []
    for j in range(len(weight)):
        (h, g), (h2, _) = data.of(j), pruned.of(j)
        cross.append(sum((torch.outer(a, b) * g_t**2 for a, b, g_t in zip(h, h2, g, strict=True)), torch.zeros(32, 32)))
        energy.append(output_norm(weight[j], h, g) ** 2)
    sums = pruned.sums()
    return pruned, PrunedInputs(sums, torch.stack(cross).double(), torch.tensor(energy, dtype=torch.float64))


def test_the_asymmetric_rule_is_lstsq_for_the_dense_output_on_pruned_activations():
    data, weight = routed(unseen=(3,)), random_weight()
    pruned, inputs = pruned_inputs(data, weight)
    target = asymmetric_target(weight, inputs)
    mask = choose_masks(target, "moe-pruner", TWO_FOUR, inputs.stats, "activation").mask
    found = match_output(weight, target, mask, inputs, iterations=400)
    for j in range(3):
        (h, g), (h2, _) = data.of(j), pruned.of(j)
        gh, gh2 = h * g[:, None], h2 * g[:, None]
        damping = 0.01 * (gh2**2).sum(0).mean()
        ridge = damping.sqrt() * torch.eye(32, dtype=torch.float64)
        inputs_of, wanted = torch.cat([gh2, ridge]), torch.cat([gh, ridge]) @ weight[j].double().T
        free = torch.linalg.lstsq(inputs_of, wanted).solution.T
        torch.testing.assert_close(target[j].double(), free, rtol=1e-4, atol=1e-4)
        for row in range(len(weight[j])):
            keep = mask[j, row]
            expected = torch.linalg.lstsq(inputs_of[:, keep], wanted[:, row]).solution
            # conjugate gradients stop at a thousandth of the first gradient
            torch.testing.assert_close(found.weight[j, row, keep].double(), expected, rtol=1e-2, atol=1e-2)

        def error(v, gh=gh, gh2=gh2, j=j):
            dense = gh @ weight[j].double().T
            return float((dense - gh2 @ v.double().T).norm() / dense.norm())

        assert float(found.error_before[j]) == pytest.approx(error(weight[j] * mask[j]), rel=1e-5)
        assert float(found.error_after[j]) == pytest.approx(error(found.weight[j]), rel=1e-5)
        plain = update_weights(weight, mask, "least-squares", inputs.stats, "activation", iterations=400)
        assert error(found.weight[j]) < error(plain.weight[j])
    assert not found.weight[~mask].any()
    # nothing is known of an expert without tokens
    assert torch.equal(found.weight[3], weight[3] * mask[3])
    assert found.error_after[3] == 0


@pytest.mark.parametrize("in_features", [32, 300])
@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(ratio=0.6)], ids=str)
def test_obs_after_sparsegpt_is_the_textbook_algorithm(in_features, pattern):
    data, weight = routed(in_features, experts=2, tokens=500, top_k=1), random_weight(2, 5, in_features)
    sums = data.sums()
    for rule in ("sparsegpt", "gated-sparsegpt"):
        mask = choose_masks(weight, rule, pattern, sums, "hidden").mask
        found = update_weights(weight, mask, "obs", sums, "hidden", gate=obs_gate(rule))
        assert found.damping == (0.01, 0.01)
        for j in range(2):
            x, g = data.of(j)
            if rule == "gated-sparsegpt":
                x = x * g[:, None]
            _, expected = textbook_sparsegpt(weight[j], x.T @ x, pattern)
            torch.testing.assert_close(found.weight[j].double(), expected, rtol=1e-4, atol=1e-4)


def test_obs_lies_between_none_and_least_squares():
    data, weight = routed(), random_weight()
    mask = choose_masks(weight, "moe-pruner", TWO_FOUR, data.sums(), "hidden").mask
    obs, best = (
        update_weights(weight, mask, rule, data.sums(), "hidden", iterations=200) for rule in ("obs", "least-squares")
    )
    assert (best.error_after < obs.error_after).all()
    assert (obs.error_after < obs.error_before).all()


@pytest.mark.parametrize("update", ["rescale", "obs+rescale", "least-squares+rescale"])
def test_rescale_restores_the_size_of_the_gated_output(update):
    data, weight = routed(), random_weight()
    sums = data.sums()
    mask = choose_masks(weight, "moe-pruner", TWO_FOUR, sums, "activation").mask
    plain = update_weights(weight, mask, update.replace("rescale", "none").removesuffix("+none"), sums, "activation")
    found = update_weights(weight, mask, update, sums, "activation")
    for j in range(4):
        x, g = data.of(j)
        scale = output_norm(weight[j], x, g) / output_norm(plain.weight[j], x, g)
        assert float(found.scale[j]) == pytest.approx(scale, rel=1e-5)
        torch.testing.assert_close(found.weight[j], plain.weight[j] * scale, rtol=1e-5, atol=1e-6)
    # gate and up are not scaled: the nonlinearity is behind them
    other = update_weights(weight, mask, update, sums, "hidden")
    assert other.scale is None
    torch.testing.assert_close(other.weight, plain.weight)


def test_rescale_from_energies_of_dense_and_pruned_activations():
    # the pruned expert's own activations on both sides of the ratio, token by token
    dense, pruned = routed(seed=0), routed(seed=0)
    pruned.x = pruned.x * torch.linspace(0.5, 1, 32, dtype=torch.float64)
    weight = random_weight()
    small = weight * (weight.abs() > 0.5)
    factor = rescale_factor(
        output_energy(weight, dense.sums().gated_moment["activation"]),
        output_energy(small, pruned.sums().gated_moment["activation"]),
    )
    for j in range(4):
        expected = output_norm(weight[j], *dense.of(j)) / output_norm(small[j], *pruned.of(j))
        assert float(factor[j]) == pytest.approx(expected, rel=1e-5)


def test_rescale_leaves_what_it_cannot_measure():
    energies = torch.tensor([4.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert rescale_factor(*energies).tolist() == [2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("update", ["obs", "least-squares", "least-squares+rescale"])
def test_slices_of_experts_and_rows_do_not_show(update, monkeypatch):
    data, weight = routed(136, experts=3, tokens=400), random_weight(3, 20, 136)
    sums = data.sums()
    mask = choose_masks(weight, "wanda", TWO_FOUR, sums, "activation").mask
    whole = update_weights(weight, mask, update, sums, "activation")
    monkeypatch.setattr(solvers, "_CPU_BYTES", 3 * 40 * 136)
    parts = update_weights(weight, mask, update, sums, "activation")
    # not bit for bit: products of other shapes add up in another order, and a row may be done an iteration earlier
    torch.testing.assert_close(parts.weight, whole.weight, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(parts.error_after, whole.error_after, rtol=1e-4, atol=1e-6)


def test_the_same_call_gives_the_same_bits():
    data, weight = routed(), random_weight()
    runs = []
    for _ in range(2):
        mask = choose_masks(weight, "gated-admm", TWO_FOUR, data.sums(), "activation").mask
        runs.append(update_weights(weight, mask, "least-squares+rescale", data.sums(), "activation").weight)
    assert torch.equal(*runs)


def test_what_is_wrong_is_said():
    weight, sums = random_weight(), Sums(torch.ones(4))
    mask = weight > 0
    for rule in ("obs+least-squares", "none+rescale", "rescale+rescale", "lsq"):
        with pytest.raises(
            UsageError, match=r"update must be one of none, rescale, obs, least-squares, asymmetric, obs\+"
        ):
            update_weights(weight, mask, rule, sums, "hidden")
    with pytest.raises(UsageError, match=r"w: mask must have the weight's shape \(4, 12, 32\), got \(4, 12, 16\)"):
        update_weights(weight, mask[..., :16], "none", sums, "hidden", name="w")
    with pytest.raises(CalibrationError, match=r'w: .* gated second moments of \'hidden\'.*moments="gated"'):
        update_weights(weight, mask, "least-squares", sums, "hidden", name="w")
    with pytest.raises(CalibrationError, match=r"needs the tokens once more .* give prune windows instead of stat"):
        update_weights(weight, mask, "asymmetric", sums, "activation", name="w")
    with pytest.raises(CalibrationError, match="plain second moments"):
        update_weights(weight, mask, "obs", sums, "hidden", gate="plain")
