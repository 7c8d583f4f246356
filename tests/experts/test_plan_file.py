"""Plans and scores as files: read as they were written, known by the routers of their model, damaged ones refused."""

import hashlib
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, UsageError
from moesparse.experts.criteria import FAMILY, expert_scores
from moesparse.experts.origin import ROUTER_TOLERANCE, Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.experts.scores_file import ExpertScores
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.fingerprint import router_sketch
from moesparse.models.look import sketches
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(3))


def origin_of(model):
    blocks = find_moe_blocks(model)
    return Origin.of(model, blocks, sketches(blocks))


@pytest.fixture(scope="module")
def model():
    # a dense layer first: layers with experts are counted from 1
    return tiny_model("deepseek_v3", num_hidden_layers=3)


@pytest.fixture(scope="module")
def plan(model):
    return ExpertPlan(origin_of(model), ((0, 2, 5, 7), (1, 2, 4, 6)), "reap", "a hash")


def test_a_sketch_is_the_sum_that_its_formula_says():
    # a width that fills no byte
    weight = torch.randn(3, 13, generator=torch.Generator().manual_seed(0))
    drawn = hashlib.shake_256(b"moesparse router sketch 13").digest(2)
    for row, got in zip(weight.double(), router_sketch(weight), strict=True):
        total = sum((-1 if drawn[at // 8] >> (at % 8) & 1 else 1) * float(value) for at, value in enumerate(row))
        assert float(got) == pytest.approx(total / math.sqrt(sum(float(value) ** 2 for value in row)), abs=1e-12)
    assert router_sketch(torch.zeros(2, 8)).tolist() == [0, 0]


@pytest.mark.parametrize("copy", [torch.float32, torch.float16, torch.bfloat16, "bfloat16, then float16"])
def test_copies_in_other_dtypes_lie_within_the_tolerance(copy):
    # 2^-8 on 7168 values of a router as wide as DeepSeek-V3's, some too small for float16
    weight = torch.randn(256, 7168, generator=torch.Generator().manual_seed(1)) * 0.02
    stored = weight.bfloat16().half() if isinstance(copy, str) else weight.to(copy)
    if isinstance(copy, str):
        # which is why no hash of the rounded values does
        assert (stored.bfloat16() != weight.bfloat16()).any()
    far = (router_sketch(stored) - router_sketch(weight)).abs().max()
    assert far < ROUTER_TOLERANCE / 3
    other = torch.randn(256, 7168, generator=torch.Generator().manual_seed(2))
    assert (router_sketch(other) - router_sketch(weight)).abs().median() > 0.5


def test_a_plan_is_read_as_it_was_written(plan, tmp_path):
    plan.save(tmp_path / "folder" / "plan.json")
    assert ExpertPlan.load(tmp_path / "folder" / "plan.json") == plan
    held = json.loads((tmp_path / "folder" / "plan.json").read_text())
    assert [(layer["layer"], layer["kept"]) for layer in held["layers"]] == [(1, [0, 2, 5, 7]), (2, [1, 2, 4, 6])]
    assert held["model"] == {"model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 96, "experts": 8}
    assert (held["criterion"], held["statistics"]) == ("reap", "a hash")
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda held: held.update(format="moesparse-scores"),
            'must be a file with "format": "moesparse-plan", got \'moe',
        ),
        (lambda held: held.update(format_version=3), "must have format_version 1 or 2, got 3"),
        (lambda held: held.update(layers={}), 'must hold "layers", a list of objects'),
        (lambda held: held.update(layers=[]), "must hold layers by ascending number, got"),
        (lambda held: held.update(model=3), 'must hold "model" with experts and sizes'),
        (lambda held: held["model"].update(experts=-8), 'must hold "model" with experts and sizes'),
        (lambda held: held["model"].update(hidden_size="32"), 'must hold "model" with experts and sizes'),
        (lambda held: held["layers"].reverse(), r"must hold layers by ascending number, got \[2, 1\]"),
        (lambda held: held["layers"][0].update(layer="1"), "must hold layers by ascending number"),
        (lambda held: held["layers"][0].pop("kept"), 'must hold "kept", a list of ids, for each layer'),
        (lambda held: held["layers"][0].update(kept=[]), r"ascending ids below 8 in layer 1, got \[\]"),
        (lambda held: held["layers"][0].update(kept=[1, 0]), r"ascending ids below 8 in layer 1, got \[1, 0\]"),
        (lambda held: held["layers"][1].update(kept=[1, 1]), "ascending ids below 8 in layer 2"),
        (lambda held: held["layers"][0].update(kept=[0, 8]), r"below 8 in layer 1, got \[0, 8\]"),
        (lambda held: held["layers"][0].update(kept=[0, True]), "ascending ids below 8 in layer 1"),
        (lambda held: held["layers"][0]["router"].pop(), 'in each "router" one number for each of 8 experts'),
        (lambda held: held["layers"][0]["router"].__setitem__(0, math.nan), 'in each "router" one number'),
    ],
)
def test_a_damaged_plan_is_refused_by_name(plan, change, message, tmp_path):
    plan.save(tmp_path / "plan.json")
    held = json.loads((tmp_path / "plan.json").read_text())
    change(held)
    (tmp_path / "plan.json").write_text(json.dumps(held))
    with pytest.raises(CalibrationError, match=f"plan.json.*{message}"):
        ExpertPlan.load(tmp_path / "plan.json")


def test_what_is_no_plan_at_all(tmp_path):
    (tmp_path / "text").write_text("not JSON")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("text", "list", "bytes", "absent"):
        with pytest.raises(CalibrationError, match=name):
            ExpertPlan.load(tmp_path / name)


def test_models_that_a_plan_is_not_of(model, plan):
    plan.check(origin_of(tiny_model("deepseek_v3", num_hidden_layers=3).half()))
    other = tiny_model("mixtral", hidden_size=64, intermediate_size=128, num_experts=16, num_local_experts=16)
    message = (
        r"plan must be of this model, got one of another \(deepseek_v3\): the number of experts is 8 there and 16 "
        "here; layers with experts is 1-2 there and 0-1 here; the hidden size is 32 there and 64 here; the width of an "
        "expert is 96 there and 128 here"
    )
    with pytest.raises(CalibrationError, match=message):
        plan.check(origin_of(other))
    # two experts have changed their places in one layer
    router = find_moe_blocks(model)[1].router.weight
    with torch.no_grad():
        router[[0, 1]] = router[[1, 0]]
    try:
        with pytest.raises(
            CalibrationError, match=r"the routers of layers 2 differ, by up to .* differ by less than 0.03"
        ):
            plan.check(origin_of(model))
    finally:
        with torch.no_grad():
            router[[0, 1]] = router[[1, 0]]
    # a plan without routers, from another program, is compared by sizes
    bare = Origin(plan.origin.layers, 8, None, None, (None, None))
    ExpertPlan(bare, plan.kept, "mine").check(origin_of(model))


def test_scores_are_those_of_the_statistics(model, tmp_path):
    statistics = calibrate(model, WINDOWS)
    statistics.blocks["model.layers.1.mlp.experts"].tokens[3] = 0
    ExpertScores.of(origin_of(model), statistics).save(tmp_path / "scores.json")
    found = ExpertScores.load(tmp_path / "scores.json")
    assert list(found.criteria) == [*FAMILY, "easy-ep"]
    for name, table in found.criteria.items():
        assert torch.equal(table, expert_scores(statistics, name)), name
    assert found.by("reap")[0, 3] == -math.inf
    assert (found.statistics, found.tokens) == (statistics.text_hash, WINDOWS.numel())
    assert found.origin == origin_of(model)
    with pytest.raises(
        UsageError, match=r"criterion must be one that the scores hold, frequency, .*easy-ep, got aimer"
    ):
        found.by("aimer")


@given(row=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_scores_keep_every_bit(row, tmp_path_factory):
    file = tmp_path_factory.mktemp("scores") / "scores.json"
    origin = Origin((0,), 8, None, None, (None,))
    ExpertScores(origin, {"mine": torch.tensor([row], dtype=torch.float64)}).save(file)
    assert ExpertScores.load(file).by("mine").tolist() == [row]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, 'in each layer "scores" by the same criteria, at least one'),
        ([1.0], 'in each layer "scores" by the same criteria, at least one'),
        ({"mine": [1.0] * 7}, "mine must score each of 8 experts by a number, or null for none"),
        ({"mine": ["1"] * 8}, "mine must score each of 8 experts by a number, or null for none"),
        ({"mine": [math.inf] * 8}, "mine must score each of 8 experts by a number, or null for none"),
    ],
)
def test_scores_that_are_none(scores, message, tmp_path):
    origin = Origin((0,), 8, None, None, (None,))
    ExpertScores(origin, {"mine": torch.zeros(1, 8)}).save(tmp_path / "scores.json")
    held = json.loads((tmp_path / "scores.json").read_text())
    held["layers"][0]["scores"] = scores
    (tmp_path / "scores.json").write_text(json.dumps(held))
    with pytest.raises(CalibrationError, match=f"scores.json.*{message}"):
        ExpertScores.load(tmp_path / "scores.json")
