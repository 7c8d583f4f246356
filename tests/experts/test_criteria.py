"""Expert scores: every criterion against a slow loop over raw activations in float64."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.criteria import (
    EXPERT_CRITERIA,
    FAMILY,
    aimer_scores,
    bootstrap_stability,
    dead_experts,
    expert_scores,
    jaccard,
    mix,
    recommend,
)
from moesparse.experts.selection import choose_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(3))


def slow_scores(model, windows):
    """Name -> [blocks, E], by one Python loop over every (token, slot) of a float64 forward."""
    model = model.double()
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    blocks = find_moe_blocks(model)
    sums = [defaultdict(lambda: [0.0] * 8) for _ in blocks]
    seen = {}

    def note(key, value):
        seen[key] = value.detach()

    hooks = []
    for number, block in enumerate(blocks):
        layer = model.get_submodule(block.layer)
        hooks += [
            block.experts.register_forward_pre_hook(lambda _m, args, n=number: seen.__setitem__(("call", n), args)),
            block.moe.register_forward_hook(lambda _m, _i, out, n=number: note(("moe", n), out)),
            layer.register_forward_hook(lambda _m, _i, out, n=number: note(("layer", n), out)),
        ]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    for number, block in enumerate(blocks):
        x, index, gates = seen["call", number]
        residual = (seen["layer", number] - seen["moe", number]).flatten(0, 1)
        up, down = (matrix.weight.detach() for matrix in block.matrices)
        for t in range(len(x)):
            slots = []
            for k in range(index.shape[1]):
                j = int(index[t, k])
                f = down[j] @ block.activation((up[j] @ x[t])[None])[0].detach()
                slots.append((j, float(gates[t, k]), f))
            r = sum(g * f for _, g, f in slots)
            h = residual[t]
            s = max(0.0, 1 - float(torch.nn.functional.cosine_similarity(h, h + r, dim=0)))
            for j, g, f in slots:
                norm = float(f.norm())
                for name, value in {
                    "N": 1.0,
                    "frequency": 1.0,
                    "gate-sum": g,
                    "ean": norm,
                    "reap": g * norm,
                    "man": norm,
                    "msan": norm**2,
                    "gated-norm": g * norm,
                    "gated-energy": (g * norm) ** 2,
                    "easy-ep": g * norm * s,
                }.items():
                    sums[number][name][j] += value
    scores = {}
    for name in sums[0]:
        rows = []
        for total in sums:
            mean = name in ("reap", "man", "msan")
            rows.append(
                [
                    -torch.inf if n == 0 else value / n if mean else value
                    for value, n in zip(total[name], total["N"], strict=True)
                ]
            )
        scores[name] = torch.tensor(rows, dtype=torch.float64)
    return scores


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_every_criterion_equals_a_slow_loop(family):
    model = tiny_model(family, num_hidden_layers=3)
    statistics = calibrate(model, WINDOWS, batch_size=4)
    slow = slow_scores(model, WINDOWS)
    for name in (*FAMILY, "easy-ep"):
        torch.testing.assert_close(expert_scores(statistics, name), slow[name], rtol=2e-5, atol=0, msg=name)
    b_two = expert_scores(statistics, (2, 1, 1))
    torch.testing.assert_close(b_two, slow["gated-norm"] / slow["N"] ** 2, rtol=2e-5, atol=0)


def test_padding_counts_in_no_criterion():
    model = tiny_model("mixtral")
    mask = torch.ones_like(WINDOWS)
    mask[:, 15:] = 0
    padded = calibrate(model, (WINDOWS, mask))
    cut = calibrate(model, WINDOWS[:, :15])
    for name in (*FAMILY, "easy-ep"):
        torch.testing.assert_close(expert_scores(padded, name), expert_scores(cut, name), rtol=1e-5, atol=0, msg=name)


def test_scores_from_a_file_are_the_live_ones(tmp_path):
    statistics = calibrate(tiny_model("olmoe"), WINDOWS)
    statistics.save(tmp_path / "s.safetensors")
    loaded = ModelStatistics.load(tmp_path / "s.safetensors")
    for name in EXPERT_CRITERIA:
        assert torch.equal(expert_scores(loaded, name), expert_scores(statistics, name)), name


def test_dead_experts_come_last_and_are_no_nan():
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        find_moe_blocks(model)[1].router.bias[4] = -1e4
    statistics = calibrate(model, WINDOWS)
    assert dead_experts(statistics)[1] == [4]
    for name in EXPERT_CRITERIA:
        scores = expert_scores(statistics, name)
        assert not scores.isnan().any()
        assert scores[1].argmin() == 4


# granitemoe scales what the experts add, afmoe norms it, muse_spark's experts work in a narrower space, gemma4's layer
# is its own MoE module
@pytest.mark.parametrize("family", ["granitemoe", "afmoe", "gemma4_text", "muse_spark_text"])
def test_easy_ep_is_refused_where_the_residual_cannot_be_found(family):
    settings = {"residual_multiplier": 0.5} if family == "granitemoe" else {}
    statistics = calibrate(tiny_model(family, **settings), WINDOWS)
    assert expert_scores(statistics, "gated-norm").isfinite().any()
    with pytest.raises(CalibrationError, match=r"easy-ep needs the angle .* choose gated-norm"):
        expert_scores(statistics, "easy-ep")


def test_random_is_seeded():
    statistics = calibrate(tiny_model("mixtral"), WINDOWS)
    assert torch.equal(expert_scores(statistics, "random", seed=1), expert_scores(statistics, "random", seed=1))
    assert not torch.equal(expert_scores(statistics, "random", seed=1), expert_scores(statistics, "random", seed=2))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("reep", r"criterion must be one of frequency, gate-sum, .*, easy-ep, random, aimer, got 'reep'"),
        ((0, 3, 1), r"\(a, B\) among \(0, 0\), \(1, 0\), \(0, 1\), \(0, 2\), \(1, 1\), \(2, 2\), got \(0, 3, 1\)"),
        ((0, 1), r"criterion \(b, a, B\) must have"),
        (
            "aimer",
            r"criterion must be one that reads the sums of a text, .* 'aimer', which reads the weights alone",
        ),
    ],
)
def test_unknown_criteria_list_the_known(criterion, message):
    statistics = calibrate(tiny_model("mixtral"), WINDOWS[:1])
    with pytest.raises(UsageError, match=message):
        expert_scores(statistics, criterion)


def test_recommendations():
    assert recommend() == "man"
    assert recommend("task-specific") == "gated-norm"
    assert recommend("task-agnostic", "measured") == "reap"
    assert recommend("task-specific", evidence="measured") == "gated-energy"
    with pytest.raises(UsageError, match="objective must be one of task-agnostic, task-specific, got 'speed'"):
        recommend("speed")
    with pytest.raises(UsageError, match="evidence must be one of paper, measured, got 'hearsay'"):
        recommend(evidence="hearsay")


# gate and up in halves; alternating, transposed and with biases, which do not count; no gate
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_aimer_equals_a_slow_loop(family):
    model = tiny_model(family)
    for block in find_moe_blocks(model):
        if block.has_bias:
            block.experts.down_proj_bias.data.fill_(1e3)
        for expert in range(block.num_experts):
            weights = [block.experts.get_parameter(matrix.name)[expert] for matrix in block.matrices]
            flat = [float(value) for weight in weights for value in weight.detach().flatten().double()]
            aimer = sum(map(abs, flat)) / len(flat) / math.sqrt(sum(value * value for value in flat) / len(flat))
            assert float(aimer_scores(block)[expert]) == pytest.approx(1 / aimer, rel=1e-6)


def test_aimer_goes_by_the_shape_of_the_weights_and_not_their_size():
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    before = aimer_scores(block)
    with torch.no_grad():
        for matrix in block.matrices:
            matrix.weight[2] *= 1000
            # even: the first to go; one weight alone: the last; nothing: before the first
            matrix.weight[3] = 0.5 * matrix.weight[3].sign()
            matrix.weight[4] = matrix.weight[5] = 0
        block.matrices[1].weight[4, 7, 3] = -2
    after, n = aimer_scores(block), sum(matrix.weight[0].numel() for matrix in block.matrices)
    torch.testing.assert_close(after[:3], before[:3], rtol=1e-6, atol=0)
    assert after[3:6].tolist() == pytest.approx([1, math.sqrt(n), 0])
    assert after.argsort()[[0, 1, -1]].tolist() == [5, 3, 4]


def test_overlap_of_choices():
    a = [torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])]
    b = [torch.tensor([0, 1, 2]), torch.tensor([2, 3, 4])]
    assert jaccard(a, b).tolist() == [1.0, 0.2]
    with pytest.raises(UsageError, match="same blocks, got 2 and 1"):
        jaccard(a, b[:1])


def test_mixing_weighs_domains_alike_whatever_their_scale():
    law = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf]])
    code = 1e6 * torch.tensor([[1.0, 1.0, 2.0, -torch.inf]])
    mixed = mix({"law": law, "code": code})
    assert mixed.tolist() == [[0.5, 0.25, 0.25, -torch.inf]]
    assert mix({"law": law, "code": code}, {"law": 3, "code": 1}).tolist() == [[0.625, 0.25, 0.125, -torch.inf]]
    with pytest.raises(UsageError, match="one for each of law, code"):
        mix({"law": law, "code": code}, {"law": 1})
    with pytest.raises(UsageError, match="at least one domain"):
        mix({})


def test_a_bootstrap_over_demonstrations_tells_a_firm_choice_from_a_loose_one():
    model = tiny_model("mixtral")
    demonstrations = [calibrate(model, window[None]) for window in WINDOWS]

    def choose(scores):
        return choose_experts(scores, keep=4, top_k=2)

    same = bootstrap_stability([demonstrations[0]] * 5, "gated-norm", choose, samples=20)
    assert same.overlap.tolist() == [1.0, 1.0]
    assert set(same.kept.round(decimals=9).flatten().tolist()) == {0.0, 1.0}
    loose = bootstrap_stability(demonstrations, "gated-norm", choose, samples=50)
    assert (loose.overlap < 1).all()
    assert torch.allclose(loose.kept.sum(1), torch.tensor([4.0, 4.0], dtype=torch.float64))
    assert "resampling the 6 demonstrations keeps" in loose.describe()
    again = bootstrap_stability(demonstrations, "gated-norm", choose, samples=50)
    assert torch.equal(again.kept, loose.kept)
    with pytest.raises(UsageError, match="at least 2 to be drawn again, got 1"):
        bootstrap_stability(demonstrations[:1], "gated-norm", choose)
