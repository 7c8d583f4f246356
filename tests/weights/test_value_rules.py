"""Value rules: GPTQ against a slow loop in float64, scales against a direct search and a direct solution."""

import dataclasses

import numpy as np
import pytest
import torch
from expert_data import Sums, random_weight, routed

from moesparse.errors import CalibrationError, MoESparseError, UsageError
from moesparse.weights import solvers, value_rules
from moesparse.weights.mask_rules import choose_masks
from moesparse.weights.patterns import Pattern, check_mask
from moesparse.weights.value_formats import Scales, ValueFormat
from moesparse.weights.value_rules import VALUE_RULES, choose_values, resolve_scales, search_scales, value_moment
from moesparse.weights.weight_rules import update_weights

TWO_FOUR = Pattern(n=2, m=4)
# of each kind: groups with and without zero points, rows, blocks, powers of two, a scale for the matrix
FORMATS = ["int4:32", "int3:32:zero", "int2:32", "int8", "fp8", "fp8:128x128", "mxfp4", "nvfp4", "bf16"]


def damped(moment, damping=solvers.DAMPING):
    """H of one expert in float64, as the solvers have it."""
    matrix = moment.double().numpy()
    return matrix / np.diag(matrix).mean() + damping * np.eye(len(matrix))


def textbook_gptq(weight, hessian, order, round_to):
    """Rows [out, in] in float64: every column gets the nearest value to what is best now, all later ones free.

    `round_to(column, values)` rounds. A pruned weight stays zero.
    """
    result = weight.copy()
    for row in range(len(weight)):
        for step, column in enumerate(order):
            done, left = order[:step], order[step:]
            error = (weight - result)[row, done]
            # of the columns that are left the errors that make up best for those that are settled
            best = np.linalg.solve(hessian[np.ix_(left, left)], -hessian[np.ix_(left, done)] @ error)
            if weight[row, column] != 0:
                result[row, column] = round_to(row, column, weight[row, column] - best[0])
    return result


@pytest.mark.parametrize("order", ["energy", "columns"])
@pytest.mark.parametrize(("name", "pruned"), [(name, name in ("int4:32", "int2:32", "nvfp4")) for name in FORMATS])
def test_gptq_is_the_textbook(name, pruned, order):
    data = routed(in_features=64, experts=2, tokens=150)
    sums, format = data.sums(), ValueFormat.parse(name)
    weight = random_weight(experts=2, out_features=3, in_features=64)
    if pruned:
        mask = choose_masks(weight, "gated-sparsegpt", TWO_FOUR, sums, "hidden").mask
        weight = update_weights(weight, mask, "least-squares", sums, "hidden").weight
    for rule, moments in (("gptq", sums.moment), ("gated-gptq", sums.gated_moment)):
        choice = choose_values(weight, rule, format, sums, "hidden", order=order, resolve=False)
        values = choice.quantised.dequantise()
        for expert in range(2):
            hessian = damped(moments["hidden"][expert])
            walk = np.argsort(-np.diag(hessian), kind="stable") if order == "energy" else np.arange(64)
            scales = choice.quantised[expert].scales

            def round_to(row, column, value, scales=scales):
                there = torch.zeros(3, 64)
                there[row, column] = float(value)
                return float(format.values(format.nearest(there, scales), scales)[row, column])

            expected = textbook_gptq(weight[expert].double().numpy(), hessian, list(walk), round_to)
            np.testing.assert_allclose(values[expert].numpy(), expected, rtol=1e-6, atol=1e-7)
            off = weight[expert].double().numpy() - expected
            undamped = hessian - solvers.DAMPING * np.eye(64)
            dense = weight[expert].double().numpy()
            relative = np.sqrt(np.trace(off @ undamped @ off.T) / np.trace(dense @ undamped @ dense.T))
            assert float(choice.output_error[expert]) == pytest.approx(relative, rel=1e-4)
            assert float(choice.error[expert]) == pytest.approx(np.linalg.norm(off) / np.linalg.norm(dense), rel=1e-5)


@pytest.mark.parametrize("rule", VALUE_RULES)
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_and_an_unseen_expert_is_named(rule, name):
    data, format = routed(unseen=(3,)), ValueFormat.parse(name)
    sums, weight = data.sums(), random_weight().bfloat16()
    mask = choose_masks(weight, "wanda", TWO_FOUR, sums, "activation").mask
    pruned = weight.masked_fill(~mask, 0.0)
    before = pruned.clone()
    choice = choose_values(pruned, rule, format, sums, "activation")
    values = choice.quantised.dequantise()
    assert torch.equal(pruned, before)
    assert not values[~mask].any()
    assert check_mask(values, TWO_FOUR).holds
    assert choice.fallback == (() if rule == "rtn" else (3,))
    assert not values[values == 0].signbit().any()
    # nothing is known of its inputs: the least squared error of the weights alone, but that scales are solved for
    alone = choose_values(pruned, "rtn" if rule == "rtn" else "rtn-mse", format, None, "activation")
    nearest = choose_values(pruned, rule, format, sums, "activation", resolve=False).quantised[3]
    assert torch.equal(nearest.dequantise(), alone.quantised[3].dequantise())
    assert choice.error[3] <= alone.error[3]
    assert (choice.output_error is None) == (rule in ("rtn", "rtn-mse"))
    if choice.output_error is not None:
        assert float(choice.output_error[3]) == pytest.approx(float(choice.error[3]), rel=1e-5)
    # what is rounded already stays, as every value of it has its code
    if rule == "rtn" and name not in ("int2:32", "int3:32:zero"):
        again = format.quantise(values, choice.quantised.scales).dequantise()
        assert torch.equal(again, values)


@pytest.mark.parametrize("name", ["int4:32", "int3:32:zero", "int2:32", "int8", "fp8", "fp8:128x128", "mxfp4", "nvfp4"])
def test_searched_scales_are_the_best_of_all_shares(name):
    format, data = ValueFormat.parse(name), routed(in_features=64, experts=2)
    sums = data.sums()
    weight = random_weight(experts=2, out_features=130 if format.rows > 1 else 5, in_features=64)
    weight[1, :, 5] *= 20
    energy = sums.gated_energy["hidden"].double()
    importance = (energy / energy.mean(-1, keepdim=True) + solvers.DAMPING).float()
    found = search_scales(weight, format, importance)
    got = _block_errors(weight, format, found, importance)
    low, high = format.extent(weight)
    shares = (1.0, 2.0, 0.5) if name == "mxfp4" else value_rules._REACHES
    signs = (1, -1) if format.kind == "int" and not format.zero_point else (1,)
    every = [
        _block_errors(weight, format, format.scales(low, high, share * sign, format.whole(weight)), importance)
        for share in shares
        for sign in signs
    ]
    torch.testing.assert_close(got, torch.stack(every).amin(0), rtol=1e-5, atol=0)
    assert found.stored.dtype == format.scale_dtype
    # and the rule takes these
    choice = choose_values(weight, "rtn-mse", format, sums, "hidden")
    assert torch.equal(choice.quantised.dequantise(), format.values(format.nearest(weight, found), found))


def _block_errors(weight, format, scales, importance):
    """Weighed squared error of each block in float64, block by block."""
    off = format.values(format.nearest(weight, scales), scales).double() - weight.double()
    off = off.square() * importance[:, None].double()
    columns = format.columns or weight.shape[-1]
    blocks = [
        torch.stack([part.sum((-2, -1)) for part in rows.split(columns, -1)], -1) for rows in off.split(format.rows, -2)
    ]
    return torch.stack(blocks, -2)


@pytest.mark.parametrize("name", ["int4:32", "int2:32", "int3:32:zero", "int8"])
def test_scales_are_solved_for(name):
    """Against numpy's least squares on the inputs themselves, a scale after the other; never worse than before."""
    format, data = ValueFormat.parse(name), routed(in_features=64, experts=2, tokens=150)
    weight = random_weight(experts=2, out_features=7, in_features=64)
    # a group of zeros, and a row
    weight[0, 0, :32] = 0
    weight[1, 2] = 0
    x, g = data.of(0)
    inputs = (x * g[:, None]).numpy()
    moment = torch.stack([torch.from_numpy(inputs.T @ inputs), torch.eye(64, dtype=torch.float64)])
    hessian = solvers.layer_hessian(moment)
    coarse = format.quantise(weight)
    zeros = format.spread(coarse.scales, weight.shape)[1]
    units, width = format.units(coarse.codes, zeros).double().numpy(), format.columns or 64
    # float32 scales show the solution itself, bfloat16 what is kept of it
    for dtype in (torch.float32, torch.bfloat16):
        scales = dataclasses.replace(coarse.scales, stored=coarse.scales.stored.to(dtype))
        rounded, fall = resolve_scales(weight, dataclasses.replace(coarse, scales=scales), hessian)
        assert torch.equal(rounded.codes, coarse.codes)
        assert rounded.scales.stored.dtype == dtype
        for expert in range(2):
            root = np.linalg.cholesky(hessian[expert].numpy()).T
            dense, errors = weight[expert].double().numpy(), [0.0, 0.0]
            for row in range(7):
                expected = scales.stored[expert, row].double().numpy()
                spread = lambda each: np.repeat(each, width)  # noqa: E731
                errors[0] += np.sum((root @ (dense[row] - units[expert, row] * spread(expected))) ** 2)
                for group in range(64 // width):
                    own = units[expert, row] * (np.arange(64) // width == group)
                    if own.any():
                        rest = dense[row] - units[expert, row] * spread(expected) + own * expected[group]
                        (best,), *_ = np.linalg.lstsq((root @ own)[:, None], root @ rest, rcond=None)
                        options = [expected[group], float(torch.tensor(best, dtype=dtype))]
                        costs = [np.sum((root @ (rest - own * option)) ** 2) for option in options]
                        expected[group] = options[int(costs[1] < costs[0])]
                stored = rounded.scales.stored[expert, row].double().numpy()
                np.testing.assert_allclose(stored, expected, rtol=1e-5 if dtype == torch.float32 else 2**-7)
                errors[1] += np.sum((root @ (dense[row] - units[expert, row] * spread(stored))) ** 2)
            assert errors[1] <= errors[0]
            assert float(fall[expert]) == pytest.approx(errors[0] - errors[1], rel=1e-3, abs=1e-6 * errors[0])


def test_an_own_moment_and_an_own_order_matter():
    """Gated and plain differ, and so do the orders; GPTQ beats rounding to the nearest on what it minimises."""
    data, format = routed(in_features=64, tokens=400), ValueFormat.parse("int3:32")
    sums, weight = data.sums(), random_weight(in_features=64)
    found = {rule: choose_values(weight, rule, format, sums, "hidden") for rule in VALUE_RULES}
    columns = choose_values(weight, "gated-gptq", format, sums, "hidden", order="columns")

    def loss(choice):
        off = weight - choice.quantised.dequantise()
        return solvers.row_error(off, sums.gated_moment["hidden"]).sum()

    losses = {rule: float(loss(choice)) for rule, choice in found.items()}
    assert losses["gated-gptq"] < losses["gptq"] < losses["rtn-mse"] < losses["rtn"]
    assert losses["gated-gptq"] != float(loss(columns))
    unsolved = choose_values(weight, "gated-gptq", format, sums, "hidden", resolve=False)
    assert losses["gated-gptq"] < float(loss(unsolved))
    # experts one at a time give the same bits
    for expert in range(4):
        some = Sums(
            *(
                {key: each[expert : expert + 1] for key, each in held.items()}
                if isinstance(held, dict)
                else held[expert : expert + 1]
                for held in vars(sums).values()
            )
        )
        one = choose_values(weight[expert : expert + 1], "gated-gptq", format, some, "hidden")
        torch.testing.assert_close(one.quantised.dequantise()[0], found["gated-gptq"].quantised.dequantise()[expert])


def test_what_is_refused():
    weight, sums, format = random_weight(), routed().sums(), ValueFormat.parse("int4:32")
    with pytest.raises(UsageError, match="value_rule must be one of rtn, rtn-mse, gptq, gated-gptq, got 'awq'"):
        value_moment("awq")
    with pytest.raises(UsageError, match="order must be one of energy, columns, got 'rows'"):
        choose_values(weight, "gptq", format, sums, "hidden", order="rows")
    with pytest.raises(UsageError, match="up: in_features must be a multiple of 64"):
        choose_values(weight, "rtn", ValueFormat.parse("int4:64"), None, "hidden", name="up")
    with pytest.raises(MoESparseError, match="up: weights must be finite"):
        choose_values(weight / 0, "rtn", format, None, "hidden", name="up")
    sums.gated_moment.clear()
    with pytest.raises(CalibrationError, match="needs the gated second moments"):
        choose_values(weight, "gated-gptq", format, sums, "hidden")


def test_moments():
    assert [value_moment(rule) for rule in VALUE_RULES] == [None, None, "plain", "gated"]
    assert Scales(torch.ones(1)).values.dtype == torch.float32
