"""Domains of the calibration text: sums by window, mixing, overlap, and how firm a choice is."""

from __future__ import annotations

import pytest
import torch

from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.choice import choose_rule
from moesparse.experts.criteria import EXPERT_CRITERIA, expert_scores, score_sums, stack_sums, sums_needed
from moesparse.experts.domains import mixed_scores, split_windows, survey
from moesparse.models.blocks import find_moe_blocks
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.testing import tiny_model

LAW = torch.randint(3, 20, (5, 20), generator=torch.Generator().manual_seed(1))
CODE = torch.randint(40, 60, (3, 20), generator=torch.Generator().manual_seed(2))
WINDOWS = torch.cat((LAW, CODE))
NAMES = ["law"] * 5 + ["code"] * 3
REMOVE = {"weights": None, "keep_experts": 4, "update": "none"}


@pytest.fixture(scope="module")
def model():
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def by_window(model):
    """Sums of every window. Batches of 3: one holds both domains, the last is not full."""
    sums = {}
    calibrate(model, WINDOWS, batch_size=3, by_window=sums)
    return sums


@pytest.mark.parametrize("criterion", EXPERT_CRITERIA)
def test_sums_by_window_are_those_of_the_window_alone(model, by_window, criterion):
    for number in (0, 4, 7):
        alone = stack_sums(calibrate(model, WINDOWS[number : number + 1]), criterion)
        for name in sums_needed(criterion):
            torch.testing.assert_close(by_window[name][number], alone[name], rtol=1e-5, atol=1e-9)
    total = {name: by_window[name].sum(0) for name in sums_needed(criterion)}
    whole = expert_scores(calibrate(model, WINDOWS), criterion)
    torch.testing.assert_close(score_sums(total, criterion), whole, rtol=1e-5, atol=1e-9)


def test_padding_is_in_no_window(model):
    mask = torch.ones_like(LAW, dtype=torch.bool)
    mask[2, 7:] = False
    sums = {}
    calibrate(model, (LAW, mask), batch_size=2, by_window=sums)
    assert sums["tokens"].sum((1, 2)).tolist() == [80, 80, 28, 80, 80]  # tokens * top-2 * 2 blocks


def test_pooled_weighs_tokens_and_equal_weighs_domains():
    sums = {
        "long": {"tokens": torch.tensor([[8.0, 2.0, 0.0]], dtype=torch.float64)},
        "short": {"tokens": torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)},
    }
    assert mixed_scores(sums, "frequency", "pooled").tolist() == [[8, 3, -torch.inf]]
    assert mixed_scores(sums, "frequency", "equal").tolist() == [[0.4, 0.6, -torch.inf]]


def test_a_choice_that_hangs_on_one_window_is_called_unstable(model, by_window):
    choose = choose_rule(find_moe_blocks(model), keep=4)
    firm = {name: value[:1].repeat(6, 1, 1) for name, value in by_window.items()}
    report = survey({"all": firm}, "reap", choose)
    assert report.stability is not None
    assert report.stability.stable
    assert report.stability.describe().startswith("resampling the 6 demonstrations keeps 100%")
    loose = survey(split_windows(by_window, NAMES), "reap", choose)
    assert loose.stability is not None
    assert loose.stability.demonstrations == 8
    assert not loose.stability.stable
    assert loose.stability.describe().startswith("the choice is unstable, give more text: resampling the 8")


def test_both_domains_enter_the_choice(model):
    def keeps(windows, mix="pooled", domains=None):
        recipe = Recipe(expert_saliency="gated-norm", expert_mix=mix, **REMOVE)
        report = prune(tiny_model("mixtral"), windows, recipe, domains=domains).experts
        return [set(block["kept"]) for block in report["blocks"]], report["domains"]

    alone = {name: keeps(text)[0] for name, text in (("law", LAW), ("code", CODE))}
    _, found = keeps(WINDOWS, domains=NAMES, mix="equal")
    assert {name: [set(ids) for ids in kept] for name, kept in found["kept"].items()} == alone
    assert found["windows"] == {"code": 3, "law": 5}
    by_domain = {"law": calibrate(model, LAW), "code": calibrate(model, CODE)}
    saved, _ = keeps(by_domain, mix="equal")
    assert saved == keeps(WINDOWS, domains=NAMES, mix="equal")[0]


def test_what_cannot_be(model, by_window):
    choose = choose_rule(find_moe_blocks(model), keep=4)
    with pytest.raises(UsageError, match="mix must be one of pooled, equal, got 'sum'"):
        Recipe(expert_mix="sum", **REMOVE)
    with pytest.raises(UsageError, match="domain of each of the 8 windows, got 1"):
        split_windows(by_window, ["law"])
    silent = {name: torch.zeros_like(value[:2]) for name, value in by_window.items()}
    with pytest.raises(CalibrationError, match="domain 'law' must hold text, got no token"):
        survey({"law": silent}, "reap", choose)
    with pytest.raises(UsageError, match="at least one domain, got none"):
        prune(model, {}, Recipe(**REMOVE))
    other = calibrate(tiny_model("mixtral", seed=1), CODE)
    with pytest.raises(CalibrationError, match="domain 'code': statistics must come from this model"):
        prune(model, {"law": calibrate(model, LAW), "code": other}, Recipe(**REMOVE))
