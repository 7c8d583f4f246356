"""saliency/weights.py: every mask rule against its formula, computed slowly in float64 from the routed tokens."""

from itertools import combinations

import pytest
import torch
from expert_data import Sums, random_weight, routed

from moesparse.errors import CalibrationError, MoESparseError, UsageError
from moesparse.weights import mask_rules as weights
from moesparse.weights import solvers
from moesparse.weights.mask_rules import MASK_RULES, choose_masks, moments_needed, obs_gate, prune_in_place
from moesparse.weights.patterns import Pattern, check_mask, mask_from_score
from moesparse.weights.weight_rules import UPDATE_RULES, update_weights

TWO_FOUR = Pattern(n=2, m=4)
PATTERNS = [TWO_FOUR, Pattern(n=3, m=8), Pattern(ratio=0.6)]


def layer_error(weight, mask, x, g):
    """sum_t g^2 |(W - V) x|^2 with V the best weights on the mask, row by row by lstsq, undamped: float64."""
    inputs = x * g[:, None]
    total = 0.0
    for row, keep in zip(weight.double(), mask, strict=True):
        best = torch.linalg.lstsq(inputs[:, keep], inputs @ row).solution
        total += float(((inputs @ row - inputs[:, keep] @ best) ** 2).sum())
    return total


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("order", ["token", "slot"])
def test_wanda_and_moe_pruner_are_their_formulas_in_either_order(pattern, order):
    data, weight = routed(), random_weight()
    sums = data.sums(order)
    for rule in ("wanda", "moe-pruner"):
        mask = choose_masks(weight, rule, pattern, sums, "hidden").mask
        for j in range(len(weight)):
            x, g = data.of(j)
            norm = (x * g[:, None] if rule == "moe-pruner" else x).norm(dim=0)
            assert torch.equal(mask[j], mask_from_score(weight[j].double().abs() * norm, pattern)), (rule, j)


def test_gates_paired_with_the_wrong_tokens_show():
    data, weight = routed(), random_weight()
    right = choose_masks(weight, "moe-pruner", TWO_FOUR, data.sums("slot"), "hidden").mask
    wrong = choose_masks(weight, "moe-pruner", TWO_FOUR, data.sums("slot", pairing="wrong"), "hidden").mask
    assert not torch.equal(right, wrong)


def test_the_gate_is_inside_the_norm():
    data, weight = routed(), random_weight()
    sums = data.sums()
    mask = choose_masks(weight, "moe-pruner", TWO_FOUR, sums, "hidden").mask
    outside = torch.stack(
        [
            mask_from_score(weight[j].abs() * (x.norm(dim=0) * g.norm()), TWO_FOUR)
            for j in range(4)
            for x, g in [data.of(j)]
        ]
    )
    # the gate outside is a scalar per expert: wanda under another name
    assert torch.equal(outside, choose_masks(weight, "wanda", TWO_FOUR, sums, "hidden").mask)
    assert not torch.equal(mask, outside)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_compares_within_the_output_row(pattern):
    weight = random_weight()
    weight[:, 0] *= 100
    mask = choose_masks(weight, "magnitude", pattern, routed().sums(), "hidden").mask
    assert torch.equal(mask, mask_from_score(weight.abs(), pattern))
    assert check_mask(mask, pattern).exact


def textbook_sparsegpt(weight, moment, pattern, damping=0.01, block=128):
    """Frantar & Alistarh's algorithm 1 as published, one row and one column at a time, with the inverse; float64."""
    columns = len(moment)
    hessian = moment + damping * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight = weight.double().clone()
    mask = torch.ones(weight.shape, dtype=torch.bool)
    total = round(columns * pattern.density)
    for row in range(len(weight)):
        w = weight[row]
        for k in range(columns):
            if pattern.m and k % pattern.m == 0:
                cost = w[k : k + pattern.m] ** 2 / inverse.diagonal()[k : k + pattern.m] ** 2
                mask[row, k : k + pattern.m] = False
                mask[row, k + cost.topk(pattern.n).indices] = True
            elif not pattern.m and k % block == 0:
                end = min(k + block, columns)
                cost = w[k:end] ** 2 / inverse.diagonal()[k:end] ** 2
                mask[row, k:end] = False
                share = round(total * end / columns) - round(total * k / columns)
                mask[row, k + cost.topk(share).indices] = True
            error = (0.0 if mask[row, k] else w[k].item()) / inverse[k, k].item()
            w[k:] -= error * inverse[k, k:]
        w[~mask[row]] = 0
    return mask, weight


# 32: less than one block of 128 columns; 300: two and a part, and no power of two
@pytest.mark.parametrize("in_features", [32, 300])
@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(ratio=0.6)], ids=str)
def test_sparsegpt_is_the_textbook_algorithm(in_features, pattern):
    data, weight = routed(in_features, experts=2, tokens=500, top_k=1), random_weight(2, 5, in_features)
    sums = data.sums()
    for rule in ("sparsegpt", "gated-sparsegpt"):
        choice = choose_masks(weight, rule, pattern, sums, "hidden")
        assert choice.damping == (0.01, 0.01)
        assert check_mask(choice.mask, pattern).exact
        for j in range(2):
            x, g = data.of(j)
            if rule == "gated-sparsegpt":
                x = x * g[:, None]
            expected, _ = textbook_sparsegpt(weight[j], x.T @ x, pattern)
            assert torch.equal(choice.mask[j], expected), (rule, j)


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(n=1, m=4)], ids=str)
def test_admm_masks_leave_less_error_than_moe_pruners(pattern):
    data, weight = routed(), random_weight()
    # inputs of very unequal size: ADMM has to scale them first
    data.x *= torch.logspace(-1, 1, 32, dtype=torch.float64)[
        torch.randperm(32, generator=torch.Generator().manual_seed(0))
    ]
    sums = data.sums()
    masks = {rule: choose_masks(weight, rule, pattern, sums, "hidden").mask for rule in ("moe-pruner", "gated-admm")}
    errors = {rule: sum(layer_error(weight[j], mask[j], *data.of(j)) for j in range(4)) for rule, mask in masks.items()}
    assert errors["gated-admm"] < 0.75 * errors["moe-pruner"]


def test_admm_finds_nearly_the_best_of_all_masks():
    # 2:4 on 8 columns: 36 masks a row, all tried
    data, weight = routed(8, experts=2, top_k=1), random_weight(2, 24, 8)
    mask = choose_masks(weight, "gated-admm", TWO_FOUR, data.sums(), "hidden").mask
    halves = [torch.tensor([i in pair for i in range(4)]) for pair in combinations(range(4), 2)]
    every = torch.stack([torch.cat([left, right]) for left in halves for right in halves])
    for j in range(2):
        x, g = data.of(j)
        for row in range(24):
            errors = torch.tensor([layer_error(weight[j, row, None], keep[None], x, g) for keep in every])
            found = layer_error(weight[j, row, None], mask[j, row, None], x, g)
            assert found <= errors.sort().values[9]


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    # with a diagonal moment wanda's mask is the best there is: sparsegpt finds it, admm comes within two percent
    weight = random_weight()
    energy = torch.logspace(0, 1, 32, dtype=torch.float64).expand(4, 32)
    moment = torch.diag_embed(energy)
    both, squares = {"hidden": energy}, {"hidden": moment}
    sums = Sums(torch.ones(4, dtype=torch.int64), both, both, squares, squares)
    for pattern in PATTERNS:
        wanda = choose_masks(weight, "wanda", pattern, sums, "hidden").mask
        for rule in ("moe-pruner", "sparsegpt", "gated-sparsegpt"):
            found = choose_masks(weight, rule, pattern, sums, "hidden", damping=1e-9).mask
            assert torch.equal(found, wanda), (rule, pattern)
        cost = weight.double() ** 2 * energy[:, None]
        found = choose_masks(weight, "gated-admm", pattern, sums, "hidden").mask
        assert cost[~wanda].sum() <= cost[~found].sum() <= 1.02 * cost[~wanda].sum()


@pytest.mark.parametrize("rule", [rule for rule in MASK_RULES if rule not in ("magnitude", "random")])
def test_an_expert_without_tokens_falls_back_to_magnitude_and_is_listed(rule):
    weight = random_weight()
    sums = routed(unseen=(2,)).sums()
    sums.energy["hidden"][1], sums.moment["hidden"][1], sums.gated_moment["hidden"][1] = 0, 0, 0
    choice = choose_masks(weight, rule, TWO_FOUR, sums, "hidden")
    # expert 1 saw only zeros
    assert choice.fallback == (1, 2)
    assert torch.equal(choice.mask[1:3], mask_from_score(weight[1:3].abs(), TWO_FOUR))
    assert check_mask(choice.mask, TWO_FOUR).exact


@pytest.mark.parametrize("rule", MASK_RULES)
def test_slices_strides_and_dtypes_do_not_show(rule, monkeypatch):
    # 136 = 128 + 8 columns, and transposed storage
    weight = random_weight(3, 20, 136).to(torch.bfloat16)
    sums = routed(136, experts=3, tokens=400).sums()
    for pattern in (TWO_FOUR, Pattern(ratio=0.5)):
        whole = choose_masks(weight.float(), rule, pattern, sums, "hidden").mask
        stored = weight.mT.contiguous().mT
        before = stored.clone()
        assert torch.equal(choose_masks(stored, rule, pattern, sums, "hidden").mask, whole)
        assert torch.equal(stored, before)
        # one expert and three rows of it at a time
        with monkeypatch.context() as patched:
            patched.setattr(solvers, "_CPU_BYTES", 3 * 40 * 136)
            assert torch.equal(choose_masks(weight, rule, pattern, sums, "hidden").mask, whole)
        assert torch.equal(choose_masks(weight, rule, pattern, sums, "hidden").mask, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rule", weights.COLUMN_RULES)
def test_pruning_in_place_leaves_what_the_mask_leaves(rule, pattern, dtype, monkeypatch):
    # an expert without tokens, transposed storage, and parts of two rows
    weight = random_weight(4, 20, 32).to(dtype)
    sums = routed(32, experts=4, tokens=60, unseen=(2,)).sums()
    choice = choose_masks(weight, rule, pattern, sums, "hidden")
    want = weight.masked_fill(~choice.mask, 0.0)
    stored = weight.mT.contiguous().mT
    monkeypatch.setattr("moesparse.weights.patterns._CPU_CHUNK", 2 * 32)
    assert prune_in_place(stored, rule, pattern, sums, "hidden") == choice.fallback
    assert torch.equal(stored, want)
    # what a GPU does, with the kernels' torch reference in the place of the kernels
    monkeypatch.setattr(weights, "_prune_in_parts", weights._prune_on_gpu)
    monkeypatch.setattr(solvers, "_CPU_BYTES", 2 * 100 * 20 * 32)
    stored = weight.mT.contiguous().mT
    prune_in_place(stored, rule, pattern, sums, "hidden")
    assert torch.equal(stored, want)


def test_pruning_in_place_refuses_and_leaves_the_weight():
    weight, sums = random_weight(), routed().sums()
    before = weight.clone()
    with pytest.raises(UsageError, match="saliency must be one of magnitude, wanda, moe-pruner to prune in place"):
        prune_in_place(weight, "gated-admm", TWO_FOUR, sums, "hidden")
    sums.gated_energy["hidden"][1, 3] = torch.nan
    with pytest.raises(MoESparseError, match=r"block\.up: the statistics must be finite"):
        prune_in_place(weight, "moe-pruner", TWO_FOUR, sums, "hidden", name="block.up")
    assert torch.equal(weight, before)
    weight[1, 0, 0] = torch.inf
    with pytest.raises(MoESparseError, match="weights must be finite"):
        prune_in_place(weight, "magnitude", TWO_FOUR, sums, "hidden")


@pytest.mark.parametrize("rule", MASK_RULES)
def test_one_token_is_enough(rule):
    # a moment of rank one
    choice = choose_masks(random_weight(1), rule, TWO_FOUR, routed(experts=1, tokens=1, top_k=1).sums(), "hidden")
    assert check_mask(choice.mask, TWO_FOUR).exact


def test_random_is_seeded_and_differs_between_matrices():
    weight, sums = random_weight(), routed().sums()
    draw = lambda seed, name: choose_masks(weight, "random", TWO_FOUR, sums, "hidden", seed=seed, name=name).mask  # noqa: E731
    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))
    assert not torch.equal(draw(0, "a")[0], draw(0, "a")[1])


@pytest.mark.parametrize("rule", ["sparsegpt", "gated-admm"])
def test_moments_that_are_not_positive_definite_get_more_damping(rule):
    sums = routed().sums()
    for moment in (sums.moment, sums.gated_moment):
        m = moment["hidden"][1]
        # rounding gone wrong: one direction of negative energy, twice the damping
        values, vectors = torch.linalg.eigh(m)
        values[0] = -0.02 * m.diagonal().mean()
        moment["hidden"][1] = vectors * values @ vectors.T
    choice = choose_masks(random_weight(), rule, TWO_FOUR, sums, "hidden")
    assert choice.damping == pytest.approx((0.01, 0.1, 0.01, 0.01))
    sums.moment["hidden"][1] *= -1
    sums.moment["hidden"][1].diagonal().abs_()
    sums.gated_moment["hidden"] = sums.moment["hidden"]
    with pytest.raises(CalibrationError, match="second moments must be positive semi-definite"):
        choose_masks(random_weight(), rule, TWO_FOUR, sums, "hidden")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rule", ["sparsegpt", "gated-sparsegpt"])
def test_what_sparsegpt_solves_on_the_way_is_the_obs_update_to_the_bit(rule, pattern):
    sums, weight = routed().sums(), random_weight()
    # an expert without tokens, whose mask is by magnitude and whose weights stay
    sums.tokens[2] = 0
    for group in (sums.energy, sums.gated_energy, sums.moment, sums.gated_moment):
        group["hidden"][2] = 0
    choice = choose_masks(weight, rule, pattern, sums, "hidden", keep_solved=True)
    options = {"gate": obs_gate(rule)}
    want = update_weights(weight, choice.mask, "obs", sums, "hidden", **options)
    got = update_weights(weight, choice.mask, "obs", sums, "hidden", solved=choice.solved, **options)
    assert choice.solved is not None
    assert torch.equal(got.weight, want.weight)
    assert torch.equal(got.error_after, want.error_after)
    assert choose_masks(weight, rule, pattern, sums, "hidden").solved is None


def test_what_is_wrong_is_said():
    weight, sums = random_weight(), routed().sums()
    with pytest.raises(UsageError, match=r"saliency must be one of magnitude, wanda, .*, got 'wonda'"):
        choose_masks(weight, "wonda", TWO_FOUR, sums, "hidden")
    with pytest.raises(UsageError, match=r"w: in_features must be a multiple of m=8 .*, got 12"):
        choose_masks(weight[..., :12], "wanda", Pattern(n=4, m=8), sums, "hidden", name="w")
    with pytest.raises(MoESparseError, match="w: weights must be finite"):
        choose_masks(weight.where(weight < 2, torch.nan), "magnitude", TWO_FOUR, sums, "hidden", name="w")
    with pytest.raises(CalibrationError, match=r'w: .* plain second moments of \'hidden\'.*moments="plain"'):
        choose_masks(weight, "sparsegpt", TWO_FOUR, Sums(sums.tokens, sums.energy), "hidden", name="w")
    sums.gated_moment["hidden"][0, 0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="w: second moments must be finite"):
        choose_masks(weight, "gated-admm", TWO_FOUR, sums, "hidden", name="w")
    sums.gated_energy["hidden"][0, 0] = torch.nan
    with pytest.raises(MoESparseError, match="w: scores must be numbers, got NaN"):
        choose_masks(weight, "moe-pruner", TWO_FOUR, sums, "hidden", name="w")


def test_moments_needed():
    needed = {
        (saliency, update): moments_needed(saliency, update) for saliency in MASK_RULES for update in UPDATE_RULES
    }
    assert needed["moe-pruner", "none"] == needed["wanda", "rescale"] == needed["magnitude", "none"] == "none"
    assert needed["moe-pruner", "least-squares"] == needed["gated-sparsegpt", "obs"] == "gated"
    assert needed["sparsegpt", "obs"] == needed["wanda", "obs+rescale"] == needed["admm", "none"] == "plain"
    assert needed["sparsegpt", "least-squares"] == needed["admm", "least-squares+rescale"] == "both"
    with pytest.raises(UsageError, match=r"update must be one of none, .*, got 'obs\+least-squares'"):
        moments_needed("wanda", "obs+least-squares")
    with pytest.raises(UsageError, match="saliency must be one of"):
        moments_needed("wonda", "none")
