"""Merging experts: groups against slow loops, aligned neurons against functions, and what a block computes after it."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch

from moesparse import Recipe, prune
from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.errors import CalibrationError, UnsupportedModelError, UsageError
from moesparse.experts.choice import choose_rule
from moesparse.experts.criteria import expert_scores
from moesparse.experts.grouping import cluster, cosines, nearest, pseudo_prune
from moesparse.experts.merging import MERGED_BY, Merged, Seen, check_merging, form_groups, merge_experts
from moesparse.experts.plan_file import PLAN_FILE, ExpertPlan
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(3))
# gate and up in halves; alternating, transposed, with biases; no gate
LAYOUTS = ("mixtral", "gpt_oss", "nemotron_h")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffle(block, source, target, seed=0):
    """Make `target` the same function as `source`, its neurons in another order; gives the order."""
    order = torch.randperm(block.intermediate_size, generator=torch.Generator().manual_seed(seed))
    I = block.intermediate_size
    if not block.has_gate:
        rows = order
    elif block.is_concatenated:
        rows = torch.cat([order, I + order])
    else:
        rows = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    up, down = block.matrices
    with torch.no_grad():
        up.weight[target] = up.weight[source][rows]
        down.weight[target] = down.weight[source][:, order]
        if up.bias is not None:
            up.bias[target] = up.bias[source][rows]
            down.bias[target] = down.bias[source]
    return order


def outputs(block, expert, x):
    return block.output_of(expert, block.activation_of(expert, x)).detach()


def seen(block, tokens=50, seed=0):
    return Seen(normal(tokens, block.hidden_size, seed=seed), normal(tokens, block.num_experts, seed=seed + 1))


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("method", ["ream", "m-smoe"])
def test_one_function_in_two_orders_merges_into_itself(family, method):
    block = find_moe_blocks(tiny_model(family))[0]
    order = shuffle(block, 1, 6)
    x = normal(9, block.hidden_size, seed=5)
    before = outputs(block, 1, x)
    torch.testing.assert_close(outputs(block, 6, x), before, rtol=1e-4, atol=1e-5)
    given = seen(block)
    given.logits[:, 6] = given.logits[:, 1]
    scores = torch.tensor([5.0, 4, 3, 2, 2, 2, 1, 2]).double()
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 7])
    if method == "ream":
        # the best expert takes the one that goes: let it be the twin
        scores[1] = 9
    stay, groups = form_groups(block, given, method, scores, kept)
    assert stay.tolist() == kept.tolist()
    (group,) = groups
    assert group.experts == (1, 6)
    assert group.weights == pytest.approx((float(scores[1]) / (float(scores[1]) + 1), 1 / (float(scores[1]) + 1)))
    assert torch.tensor(group.orders[0]).tolist() == order.argsort().tolist()
    merge_experts(block, groups)
    torch.testing.assert_close(outputs(block, 1, x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_merged_expert_is_the_weighted_mean_neuron_by_neuron(family):
    block = find_moe_blocks(tiny_model(family))[0]
    before = copy.deepcopy(block)
    I, H = block.intermediate_size, block.hidden_size
    orders = [torch.randperm(I, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2)]
    merge_experts(block, [Merged((3, 0, 5), (0.5, 0.2, 0.3), tuple(map(tuple, orders)))])
    rows = [
        (i,) if not block.has_gate else (i, I + i) if block.is_concatenated else (2 * i, 2 * i + 1) for i in range(I)
    ]
    up, down = before.matrices
    for i in range(I):
        theirs = [(3, 0.5, i), (0, 0.2, orders[0][i]), (5, 0.3, orders[1][i])]
        for place in range(len(rows[0])):
            want = sum(w * up.weight[e][rows[n][place]].double() for e, w, n in theirs)
            torch.testing.assert_close(block.matrices[0].weight[3][rows[i][place]].double(), want, rtol=1e-5, atol=1e-6)
            if block.has_bias:
                want = sum(w * float(up.bias[e][rows[n][place]]) for e, w, n in theirs)
                assert float(block.matrices[0].bias[3][rows[i][place]]) == pytest.approx(want, abs=1e-6)
        want = sum(w * down.weight[e][:, n].double() for e, w, n in theirs)
        torch.testing.assert_close(block.matrices[1].weight[3][:, i].double(), want, rtol=1e-5, atol=1e-6)
    if block.has_bias:
        want = 0.5 * down.bias[3] + 0.2 * down.bias[0] + 0.3 * down.bias[5]
        torch.testing.assert_close(block.matrices[1].bias[3], want, rtol=1e-5, atol=1e-6)
    for one, other in zip(before.matrices, block.matrices, strict=True):
        others = [expert for expert in range(8) if expert != 3]
        assert torch.equal(one.weight[others], other.weight[others])
    assert block.matrices[1].weight.shape[1] == H


def test_ream_lets_the_best_take_the_nearest_first():
    similarity = normal(12, 12)
    similarity = similarity + similarity.T
    scores = normal(12, seed=1).abs().double()
    kept = torch.tensor([1, 4, 5, 8, 9, 11])
    found = {group[0]: group[1:] for group in pseudo_prune(similarity, scores, kept, size=4)}
    alone = [expert for expert in range(12) if expert not in kept.tolist()]
    for centre in sorted(kept.tolist(), key=lambda expert: -float(scores[expert])):
        want = sorted(alone, key=lambda expert: -float(similarity[centre, expert]))[:3]
        assert found[centre] == want
        alone = [expert for expert in alone if expert not in want]
    assert not alone
    # C of the paper would leave some alone: 2 groups of 3 do not hold 8
    assert sorted(map(len, pseudo_prune(similarity[:8, :8], scores[:8], torch.tensor([0, 1]), size=3))) == [4, 4]


def test_m_smoe_joins_the_most_similar_that_stays():
    similarity, kept = normal(10, 10), torch.tensor([0, 3, 7])
    groups = nearest(similarity, kept)
    assert [group[0] for group in groups] == [0, 3, 7]
    for other in sorted(set(range(10)) - {0, 3, 7}):
        best = max((0, 3, 7), key=lambda expert: float(similarity[expert, other]))
        assert next(group[0] for group in groups if other in group) == best


def test_hc_smoe_joins_what_lies_nearest_on_average():
    points, scores = normal(9, 5).double(), normal(9, seed=1).double()
    groups = [[number] for number in range(9)]
    while len(groups) > 4:

        def apart(pair):
            one, other = pair
            each = [float((points[a] - points[b]).norm()) for a in groups[one] for b in groups[other]]
            return sum(each) / len(each)

        one, other = min(itertools.combinations(range(len(groups)), 2), key=apart)
        groups[one] += groups.pop(other)
    found = cluster(points, scores, 4)
    assert sorted(map(sorted, found)) == sorted(map(sorted, groups))
    assert all(group[0] == max(group, key=lambda expert: float(scores[expert])) for group in found)


@pytest.mark.parametrize("form", [
    lambda alike, scores, kept: pseudo_prune(alike, scores, kept, 2),
    lambda alike, scores, kept: nearest(alike, kept, 2),
    lambda alike, scores, kept: cluster(alike, scores, len(kept), 2),
])  # fmt: skip
def test_experts_of_two_router_groups_stay_apart(form):
    # most alike across the halves
    alike = normal(8, 4)
    alike = cosines(torch.cat([alike[:4], alike[:4]]))
    groups = form(alike, normal(8, seed=2).double(), torch.tensor([0, 2, 5, 6]))
    assert sorted(itertools.chain(*groups)) == list(range(8))
    assert sum(group[0] < 4 for group in groups) == 2
    assert all({expert // 4 for expert in group} == {group[0] // 4} for group in groups)


def test_similarities_are_those_of_the_formulas():
    block = find_moe_blocks(tiny_model("mixtral"))[0]
    given, scores = seen(block, 30), torch.arange(8.0).double() + 1
    kept = torch.tensor([4, 5, 6, 7])
    gates = given.logits.double().softmax(1)
    each = torch.stack([outputs(block, expert, given.hidden).double() for expert in range(8)])

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    gated = [(each[expert] * gates[:, expert, None]).mean(0) for expert in range(8)]
    columns, alike = given.logits.double().unbind(1), torch.zeros(8, 8)
    for i, j in itertools.product(range(8), repeat=2):
        alike[i, j] = cosine(gated[i], gated[j]) + cosine(columns[i], columns[j])
    want = [tuple(group) for group in pseudo_prune(alike, scores, kept) if len(group) > 1]
    assert [group.experts for group in form_groups(block, given, "ream", scores, kept)[1]] == want
    want = [tuple(group) for group in cluster(each.mean(1), scores, 4) if len(group) > 1]
    stay, groups = form_groups(block, given, "hc-smoe", scores, kept)
    assert [group.experts for group in groups] == want
    assert all(group.orders == () for group in groups)
    assert len(stay) == 4 and {group.experts[0] for group in groups} <= set(stay.tolist())


@pytest.mark.parametrize(("method", "share"), [("ream", 1 / 6), ("m-smoe", 0.0), ("hc-smoe", 0.0)])
def test_what_experts_without_tokens_weigh(method, share):
    block = find_moe_blocks(tiny_model("mixtral"))[0]
    given = seen(block)
    shuffle(block, 0, 7)
    given.logits[:, 7] = given.logits[:, 0]
    scores = torch.tensor([5.0, 4, 3, 2, 2, 2, 1, -torch.inf]).double()
    (group,) = form_groups(block, given, method, scores, torch.arange(7))[1]
    assert group.experts == (0, 7)
    assert group.weights == pytest.approx((1 - share, share))


@pytest.mark.parametrize("method", MERGED_BY)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_model_is_merged_block_by_block(family, method):
    model = tiny_model(family)
    dense, recipe = copy.deepcopy(model), Recipe(weights=None, experts=0.5, update="none", expert_method=method)
    report = prune(model, WINDOWS, recipe)
    assert report.recipe["expert_method"] == report.experts["method"] == method
    assert report.experts["criterion"] == report.recipe["expert_saliency"] == MERGED_BY[method]
    scores = expert_scores(calibrate(dense, WINDOWS), MERGED_BY[method])
    for number, (before, after) in enumerate(zip(find_moe_blocks(dense), find_moe_blocks(model), strict=True)):
        done, groups = report.experts["blocks"][number], report.plan.merged[number]
        assert done["merged"] == [group.summary() for group in groups]
        assert sorted(done["kept"] + [e for group in groups for e in group.experts[1:]]) == list(range(8))
        if method != "hc-smoe":
            # as many of each of the router's groups
            assert done["kept"] == choose_rule(find_moe_blocks(dense), remove=0.5)(scores)[number].tolist()
        merge_experts(before, groups)
        for one, other in zip(before.matrices, after.matrices, strict=True):
            assert torch.equal(one.weight[done["kept"]], other.weight)
            assert one.bias is None or torch.equal(one.bias[done["kept"]], other.bias)
        assert torch.equal(before.router.weight[done["kept"]], after.router.weight)
        for group in groups:
            alive = [max(float(scores[number][expert]), 0) for expert in group.experts]
            assert group.weights == pytest.approx([each / sum(alive) for each in alive])


def test_later_blocks_see_what_the_merged_ones_give():
    """Groups are formed on the inputs that a block will get, behind blocks merged before it."""
    dense, recipe = tiny_model("mixtral"), Recipe(weights=None, experts=0.5, update="none", expert_method="hc-smoe")
    merged = copy.deepcopy(dense)
    plan = prune(merged, WINDOWS, recipe).plan
    given = []
    block = find_moe_blocks(dense)[1]
    first = find_moe_blocks(merged)[0]
    model = copy.deepcopy(merged)
    # the second block whole again
    find_moe_blocks(model)[1].experts.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    assert first.num_experts == 4
    scores = expert_scores(calibrate(dense, WINDOWS), "frequency")[1]
    stay, groups = form_groups(block, Seen(torch.cat(given), None), "hc-smoe", scores, torch.arange(4))
    assert [group.experts for group in groups] == [group.experts for group in plan.merged[1]]
    assert tuple(stay.tolist()) == plan.kept[1]


@pytest.mark.parametrize("method", MERGED_BY)
def test_the_refit_brings_a_merged_block_nearer_to_the_dense_one(method):
    report = prune(tiny_model("qwen3_moe"), WINDOWS, Recipe(weights=None, experts=0.5, expert_method=method))
    fits = report.experts["refit"]
    assert len(fits) == 2 and all(fit["after"] < fit["before"] for fit in fits)


def table_of(block):
    named = dict(block.moe.named_parameters()) | dict(block.moe.named_buffers())
    return next((tensor for name, tensor in named.items() if name.endswith("tid2eid")), None)


def test_tokens_of_a_table_go_where_their_expert_went():
    model = tiny_model("deepseek_v4")
    blocks = find_moe_blocks(model)
    tables = {block.name: table_of(block) for block in blocks}
    before = {name: table.clone() for name, table in tables.items() if table is not None}
    assert before
    report = prune(model, WINDOWS, Recipe(weights=None, experts=0.25, update="none", expert_method="m-smoe"))
    for number, block in enumerate(find_moe_blocks(model)):
        if block.name not in before:
            continue
        kept = report.plan.kept[number]
        goes = {old: group.experts[0] for group in report.plan.merged[number] for old in group.experts}
        table = table_of(block)
        for row, (old, new) in enumerate(zip(before[block.name].tolist(), table.tolist(), strict=True)):
            stays = [goes.get(expert, expert) for expert in old]
            if len(set(stays)) == len(stays):
                assert [kept[each] for each in new] == stays, row


def test_a_plan_of_merges_is_carried_out_without_text(tmp_path):
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path / "dense")
    merged = copy.deepcopy(model)
    recipe = Recipe(weights=None, experts=0.25, update="none", expert_method="ream")
    report = prune(merged, WINDOWS, recipe)
    save_pretrained(merged, tmp_path / "merged", source=tmp_path / "dense", recipe=report.recipe, plan=report.plan)
    plan = ExpertPlan.load(tmp_path / "merged" / PLAN_FILE)
    assert plan == report.plan and plan.method == "ream"
    held = json.loads((tmp_path / "merged" / PLAN_FILE).read_text())
    assert (held["format_version"], held["method"]) == (2, "ream")
    neurons = find_moe_blocks(model)[0].intermediate_size
    orders = [order for layer in held["layers"] for group in layer["merged"] for order in group["orders"]]
    assert len(orders) == 4 and all(len(order) == neurons for order in orders)
    again, _ = load_pretrained(tmp_path / "dense")
    replayed = prune(again, None, Recipe(weights=None, update="none", plan=plan))
    assert replayed.plan == plan and replayed.experts["method"] == "ream"
    assert replayed.recipe["plan"]["method"] == "ream"
    for (name, one), other in zip(merged.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(UsageError, match=r"plan must be left out with expert_method='ream', got one"):
        Recipe(weights=None, plan=plan, expert_method="ream")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer["merged"][0]["experts"].reverse(), "merge experts that go into ones that stay"),
        (lambda layer: layer["merged"][0]["weights"].append(0.5), "two experts or more with weights of sum 1"),
        (lambda layer: layer["merged"][0]["weights"].__setitem__(0, 3.0), "two experts or more with weights of sum 1"),
        (lambda layer: layer["merged"][0]["orders"][0].pop(), "every neuron once|neuron by neuron"),
        (lambda layer: layer["merged"][0].pop("weights"), "must be experts, weights and orders"),
        (lambda layer: layer.update(merged=[3]), "must be experts, weights and orders, got 3"),
    ],
)
def test_plans_that_merge_what_cannot_be_are_refused(change, message, tmp_path):
    recipe = Recipe(weights=None, experts=0.25, update="none", expert_method="ream")
    prune(tiny_model("mixtral"), WINDOWS, recipe).plan.save(tmp_path / "plan.json")
    held = json.loads((tmp_path / "plan.json").read_text())
    change(held["layers"][0])
    (tmp_path / "plan.json").write_text(json.dumps(held))
    with pytest.raises(CalibrationError, match=rf"plan.json: .*({message})"):
        ExpertPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"expert_method": "average"}, "expert_method must be one of remove, ream, m-smoe, hc-smoe, got 'average'"),
        (
            {"expert_method": "ream", "protect_experts": True},
            "protect_experts must be left out with expert_method='ream'",
        ),
        (
            {"expert_method": "ream", "refine_experts": True},
            "refine_experts must be left out with expert_method='ream'",
        ),
        (
            {"expert_method": "ream", "experts": None},
            "expert_method must come with experts or keep_experts, got neither",
        ),
        (
            {"expert_method": "ream", "experts": None, "target_bytes": 0.7},
            "target_bytes must be left out with expert_method='ream', got 0.7",
        ),
    ],
)
def test_merges_that_cannot_be(recipe, message):
    with pytest.raises(UsageError, match=message):
        Recipe(**{"experts": 0.25} | recipe)


def test_merging_takes_text_and_a_router_it_can_read():
    model = tiny_model("mixtral")
    recipe = {"weights": None, "experts": 0.25, "update": "none", "expert_method": "ream"}
    with pytest.raises(CalibrationError, match=r"windows to merge experts \(expert_method='ream'\), got None"):
        prune(model, None, Recipe(**recipe))
    with pytest.raises(CalibrationError, match="must be windows to merge experts, got statistics"):
        prune(model, calibrate(model, WINDOWS), Recipe(**recipe))
    block = replace(find_moe_blocks(model)[1], router=None)
    check_merging([block], "hc-smoe")
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp must have a router .* expert_method='hc-smoe' n"):
        check_merging([block], "m-smoe")
