"""The driver: what is pruned, what is not, in which order, and what the report says of it."""

import contextlib
import copy
import json

import pytest
import torch

import moesparse
from moesparse.calibration.recorder import record
from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, MoESparseError, UnsupportedModelError, UsageError
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.system.memory import peak_memory
from moesparse.testing import tiny_model
from moesparse.weights.patterns import check_mask

# transposed, biased and interleaved; no gate; shared experts and dense first layers; state-space layers between
FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "qwen3_moe", "jamba"]


def windows(n=6, length=16, seed=0):
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(seed))


def expert_parameters(model):
    return {id(matrix.parameter) for block in find_moe_blocks(model) for matrix in block.matrices}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_matrix_and_nothing_else(family):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = expert_parameters(model)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in experts}
    report = prune(model, windows(), Recipe(weights="2:4"))
    for block in find_moe_blocks(model):
        for matrix in block.matrices:
            groups = matrix.weight.unflatten(-1, (-1, 4))
            assert ((groups != 0).sum(-1) <= 2).all()
    assert len(names) == sum(len(block.tensors) for block in report.blocks)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in names), name
    assert all(tensor.holds for block in report.blocks for tensor in block.tensors)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_the_paper_by_hand():
    """moe-pruner without update on the first block, from raw activations, in fp64 and token order."""
    model = tiny_model("mixtral").double()
    model.set_experts_implementation("eager")  # the grouped kernels have no fp64
    ids = windows()
    dense = copy.deepcopy(model)
    prune(model, ids, Recipe(weights=0.5, saliency="moe-pruner", update="none"))
    block, after = find_moe_blocks(dense)[0], find_moe_blocks(model)[0]
    caught = []
    handle = block.experts.register_forward_pre_hook(
        lambda _m, args, kwargs: caught.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        dense(ids)
    handle.remove()
    args, kwargs = caught[0]
    x, index, gates = (*args, *kwargs.values())
    gate_up = block.matrices[0].weight
    energy = torch.zeros(block.num_experts, x.shape[1], dtype=torch.float64)
    for t in range(len(x)):
        for slot in range(index.shape[1]):
            energy[index[t, slot]] += (gates[t, slot] * x[t]) ** 2
    score = gate_up.abs() * energy.sqrt()[:, None, :]
    keep = torch.zeros_like(score, dtype=torch.bool)
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : score.shape[-1] // 2]
    keep.scatter_(-1, best, True)
    assert energy.sum(-1).min() > 0
    assert torch.equal(after.matrices[0].weight, gate_up * keep)


def test_propagation_feeds_the_second_block_what_the_pruned_first_gives():
    ids = windows()
    results = {}
    for propagate in (True, False):
        model = tiny_model("mixtral")
        prune(model, ids, Recipe(weights="1:4", saliency="wanda", update="none", propagate=propagate))
        results[propagate] = find_moe_blocks(model)
    first, second = ([results[p][i].matrices[0].weight for p in (True, False)] for i in (0, 1))
    assert torch.equal(*first)
    assert not torch.equal(*second)

    # the statistics of the second block after propagation are those of the model with the first block pruned
    model = tiny_model("mixtral")
    with torch.no_grad():
        for own, pruned in zip(find_moe_blocks(model)[0].matrices, results[True][0].matrices, strict=True):
            own.weight.copy_(pruned.weight)
    block = find_moe_blocks(model)[1]
    with torch.no_grad(), record([block]) as (recorder,):
        for batch in ids.split(8):
            model(batch)
    scale = recorder.statistics.energy["hidden"].sqrt().float()
    score = block.matrices[0].weight.abs() * scale[:, None, :]
    groups = score.unflatten(-1, (-1, 4))
    best = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.argmax(-1, keepdim=True), True).flatten(-2)
    assert torch.equal(results[True][1].matrices[0].weight, block.matrices[0].weight * best)


def test_statistics_from_a_file_prune_like_a_live_pass_without_propagation(tmp_path):
    ids = windows()
    live, scored = tiny_model("mixtral"), tiny_model("mixtral")
    recipe = Recipe(weights="2:4", saliency="moe-pruner", update="least-squares", propagate=False)
    prune(live, ids, recipe)
    calibrate(scored, ids, moments="gated").save(tmp_path / "stats")
    report = prune(scored, moesparse.ModelStatistics.load(tmp_path / "stats"), recipe)
    for a, b in zip(live.state_dict().items(), scored.state_dict().items(), strict=True):
        assert torch.equal(a[1], b[1]), a[0]
    assert report.calibration["tokens"] == ids.numel()
    with pytest.raises(CalibrationError, match="must come from this model"):
        prune(scored, moesparse.ModelStatistics.load(tmp_path / "stats"), recipe)


@pytest.mark.parametrize(
    ("recipe", "read"),
    [
        (Recipe(update="asymmetric"), False),
        (Recipe(update="none"), False),
        (Recipe(update="none", propagate=False), True),
        (Recipe(update="least-squares+rescale"), True),
        (Recipe(), False),
    ],
)
def test_experts_outputs_are_calibrated_only_where_they_are_read(recipe, read, monkeypatch):
    def run_whole(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(MoEBlock, "output_of", run_whole)
    with pytest.raises(ZeroDivisionError) if read else contextlib.nullcontext():
        prune(tiny_model("mixtral"), windows(n=2), recipe)


@pytest.mark.parametrize(
    ("device", "rule"),
    [(None, "gated-sparsegpt"), ("cpu", "gated-sparsegpt"), ("cuda:1", "gated-admm"), ("mps", "gated-admm")],
)
def test_the_mask_rule_left_out_is_what_the_device_can_afford(device, rule):
    device = None if device is None else torch.device(device)
    assert Recipe().on(device) == Recipe(saliency=rule, update="asymmetric+tune", expert_saliency="reap")
    assert Recipe(saliency="wanda").on(device).saliency == "wanda"


def test_a_report_names_the_rule_of_the_device():
    left_out, named = tiny_model("mixtral"), tiny_model("mixtral")
    report = prune(left_out, windows(n=2), device="cpu")
    assert report.recipe == prune(named, windows(n=2), Recipe(saliency="gated-sparsegpt")).recipe
    assert report.recipe["saliency"] == "gated-sparsegpt"
    for a, b in zip(left_out.state_dict().items(), named.state_dict().items(), strict=True):
        assert torch.equal(a[1], b[1]), a[0]


def test_rescale_brings_the_output_energy_back():
    ids = windows(n=8)
    dense, model = tiny_model("mixtral"), tiny_model("mixtral")
    recipe = Recipe(weights="1:4", saliency="moe-pruner", update="rescale", propagate=False)
    report = prune(model, ids, recipe)
    energies = []
    for network in (dense, model):
        block = find_moe_blocks(network)[0]
        with torch.no_grad(), record([block]) as (recorder,):
            for batch in ids.split(8):
                network(batch)
        energies.append(recorder.statistics.gated_norm_sq_sum)
    assert torch.allclose(energies[0], energies[1], rtol=1e-3)
    assert all(factor > 1 for factor in report.blocks[0].rescale)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_asymmetric_brings_each_expert_nearer_to_its_dense_output(family):
    """The report's error is that of the expert's gated output over the calibration tokens, from raw activations."""
    ids, errors = windows(n=24), {}
    for update in ("least-squares", "asymmetric"):
        dense, model = tiny_model(family), tiny_model(family)
        report = prune(model, ids, Recipe(weights="2:4", saliency="moe-pruner", update=update))
        block, pruned = find_moe_blocks(dense)[0], find_moe_blocks(model)[0]
        calls = []
        handle = block.experts.register_forward_pre_hook(
            lambda _m, args, kwargs, calls=calls: calls.append((*args, *kwargs.values())), with_kwargs=True
        )
        with torch.no_grad():
            dense(ids)
        handle.remove()
        x, index, gates = calls[0]
        errors[update] = []
        for expert in range(block.num_experts):
            token, slot = (index == expert).nonzero(as_tuple=True)
            outputs = []
            for one in (block, pruned):
                up, down = one.matrices
                bias = 0 if up.bias is None else up.bias[expert]
                outputs.append(one.activation(x[token] @ up.weight[expert].T + bias) @ down.weight[expert].T)
            want, got = (out.double() * gates[token, slot, None] for out in outputs)
            errors[update].append(float((want - got).norm() / want.norm()) if len(token) else 0.0)
    assert report.blocks[0].tensors[1].error_after == pytest.approx(errors["asymmetric"], rel=1e-3)
    assert sum(errors["asymmetric"]) < 0.97 * sum(errors["least-squares"])
    assert all(tensor.holds for block in report.blocks for tensor in block.tensors)


def test_asymmetric_needs_the_tokens_again():
    model = tiny_model("mixtral")
    statistics = calibrate(model, windows(), moments="gated")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="give prune windows instead of statistics, or take least-squares"):
        prune(model, statistics, Recipe(saliency="moe-pruner", update="asymmetric"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_least_squares_lowers_the_error_it_reports():
    report = prune(tiny_model("mixtral"), windows(), Recipe(weights="2:4", update="least-squares"))
    for block in report.blocks:
        for tensor in block.tensors:
            pairs = zip(tensor.error_before, tensor.error_after, strict=True)
            assert all(after <= before for before, after in pairs)
            assert sum(tensor.error_after) < 0.9 * sum(tensor.error_before)


def test_an_expert_without_tokens_falls_back_to_magnitude_and_is_listed():
    model = tiny_model("mixtral")
    with torch.no_grad():
        for block in find_moe_blocks(model):
            block.router.weight[3] = 0
            # logits are positive for the others only where x is: a huge negative row is never among the best two
            block.router.weight[3].add_(-1e4)
            block.router.weight.abs_()
            block.router.weight[3].neg_()
        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_hook(lambda _m, _i, out: out.abs())
    before = find_moe_blocks(model)[0].matrices[0].weight[3].clone()
    report = prune(model, windows(), Recipe(weights="2:4", saliency="moe-pruner", update="none"))
    assert report.blocks[0].tokens_per_expert[3] == 0
    assert ("model.layers.0.mlp.experts", "gate_up_proj", 3) in report.fallbacks
    groups = before.abs().unflatten(-1, (-1, 4))
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2).indices, True).flatten(-2)
    assert torch.equal(find_moe_blocks(model)[0].matrices[0].weight[3], before * keep)


def test_the_same_run_twice_gives_the_same_bits():
    states = []
    for _ in range(2):
        model = tiny_model("qwen3_moe")
        prune(model, windows(), Recipe(weights="4:8", saliency="gated-sparsegpt", update="least-squares+rescale"))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_magnitude_needs_no_data_and_others_say_they_do():
    model = tiny_model("mixtral")
    report = prune(model, None, Recipe(weights="2:4", saliency="magnitude", update="none"))
    assert check_mask(find_moe_blocks(model)[0].matrices[0].weight, Recipe().pattern).exact
    assert report.blocks[0].tokens_per_expert is None
    with pytest.raises(CalibrationError, match="calibration must be windows or statistics"):
        prune(tiny_model("mixtral"), None, Recipe())


def test_the_report_is_json_with_the_recipe():
    report = prune(tiny_model("mixtral"), windows(), Recipe(weights=0.5, saliency="wanda", update="none", seed=3))
    loaded = json.loads(report.to_json())
    assert loaded["recipe"] == {
        "weights": "0.5",
        "saliency": "wanda",
        "update": "none",
        "propagate": True,
        "experts": None,
        "keep_experts": None,
        "expert_saliency": "reap",
        "expert_mix": "pooled",
        "expert_budget": "per-layer",
        "expert_floor": None,
        "protect_experts": False,
        "refine_experts": False,
        "seed": 3,
    }
    assert [block["name"] for block in loaded["blocks"]] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    block = loaded["blocks"][0]
    assert sum(block["tokens_per_expert"]) == 6 * 16 * 2
    assert block["peak_bytes"] > 0
    assert block["seconds"] > 0


def test_progress_counts_to_the_end():
    events = []
    prune(tiny_model("mixtral"), windows(), Recipe(update="rescale"), batch_size=2, progress=events.append)
    # the look at every layer counts layers, and the pass behind it batches
    for looks in (True, False):
        done = [event.done for event in events if (event.stage == "check") == looks]
        assert done == sorted(done)
        assert done[0] == 0
    assert all(event.done <= event.total for event in events)
    assert any("model.layers.1.mlp.experts" in event.stage for event in events)


@pytest.mark.skipif(torch.cuda.is_available(), reason="then it is the GPU's memory that is counted")
def test_the_peak_is_the_process_own_as_the_system_counts_it():
    # taken and given back: `time -v` still knows it
    torch.ones(2**26)
    before = peak_memory()
    report = prune(tiny_model("mixtral"), windows(), Recipe(update="none", saliency="wanda"))
    assert all(block.peak_bytes >= before for block in report.blocks)


class TestBadInput:
    def test_recipes(self):
        for arguments, message in (
            ({"weights": "2:5"}, "m in 4, 8, 16, 32"),
            ({"weights": 1.2}, "between 0 and 1"),
            ({"saliency": "mystery"}, "saliency must be one of magnitude, wanda, moe-pruner"),
            ({"update": "mystery"}, "update must be one of none, rescale"),
        ):
            with pytest.raises(UsageError, match=message):
                Recipe(**arguments)

    def test_nothing_is_changed_when_the_pattern_does_not_divide(self):
        model = tiny_model("mixtral", intermediate_size=20)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(UsageError, match=r"experts\.down_proj: in_features must be a multiple of m=8"):
            prune(model, windows(), Recipe(weights="4:8"))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_nan_in_a_weight_is_named(self):
        model = tiny_model("mixtral")
        find_moe_blocks(model)[1].matrices[1].weight[2, 3, 4] = float("nan")
        with pytest.raises(MoESparseError, match=r"model\.layers\.1\.mlp\.experts\.down_proj must hold finite weights"):
            prune(model, windows(), Recipe())

    def test_a_pruned_model_is_refused_unless_allowed(self):
        model = tiny_model("mixtral")
        prune(model, windows(), Recipe(weights=0.25))
        with pytest.raises(CalibrationError, match="must be dense"):
            prune(model, windows(), Recipe(weights="2:4"))
        prune(model, windows(), Recipe(weights="2:4"), allow_pruned=True)

    def test_windows_of_another_tokenizer(self):
        with pytest.raises(UsageError, match="token ids must lie in"):
            prune(tiny_model("mixtral"), torch.full((2, 8), 10**6), Recipe())


def test_a_model_that_was_loaded_from_quantised_weights_is_refused():
    """MXFP4 comes as bf16 on a CPU, and its config goes on saying MXFP4."""
    model = tiny_model("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UnsupportedModelError, match="must not be quantised, got one by 'mxfp4'"):
        prune(model, None, Recipe(saliency="magnitude", update="none"))
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
