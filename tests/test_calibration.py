"""The sums against a slow loop over raw activations, and everything the recorder must leave as it found it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moesparse.blocks import MoEBlock, find_moe_blocks
from moesparse.calibration import (
    ExpertStatistics,
    ModelStatistics,
    Recorder,
    calibrate,
    check_windows,
    memory_needed,
    model_fingerprint,
    record,
)
from moesparse.errors import CalibrationError, UsageError
from moesparse.progress import ProgressEvent
from moesparse.statistics import FORMAT, windows_hash
from moesparse.testing import tiny_model

VOCABULARY = 64


def windows(n: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


# What each family computes, written from its modeling file; none of it goes through moesparse.


def _gated_expert(experts: Any, e: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = experts.gate_up_proj[e].double().chunk(2)
    activation = F.silu(gate @ x) * (up @ x)
    return activation, experts.down_proj[e].double() @ activation


def _gpt_oss_expert(experts: Any, e: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = x @ experts.gate_up_proj[e].double() + experts.gate_up_proj_bias[e].double()
    gate, up = gate_up[0::2].clamp(max=experts.limit), gate_up[1::2].clamp(-experts.limit, experts.limit)
    activation = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    return activation, activation @ experts.down_proj[e].double() + experts.down_proj_bias[e].double()


def _nemotron_expert(experts: Any, e: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    activation = F.relu(experts.up_proj[e].double() @ x).square()
    return activation, experts.down_proj[e].double() @ activation


EXPERTS: dict[str, Callable[[Any, int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "mixtral": _gated_expert,  # softmax router, the plain layout
    "deepseek_v3": _gated_expert,  # sigmoid scores, groups, a shared expert, gates scaled by a factor
    "gpt_oss": _gpt_oss_expert,  # transposed, biased, gate and up interleaved and clamped
    "nemotron_h": _nemotron_expert,  # no gate
}


@torch.no_grad()
def slow_sums(
    family: str, block: MoEBlock, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, keep=None
) -> dict[str, torch.Tensor]:
    """Every sum of one block by a loop over tokens and slots in float64, from what the experts were called with."""
    E, H, I = block.num_experts, block.hidden_size, block.intermediate_size
    sums = ExpertStatistics.zeros(E, {"hidden": H, "activation": I}, "both")
    for t in range(hidden.shape[0]):
        if keep is not None and not keep[t]:
            continue
        for k in range(index.shape[1]):
            e, g, x = int(index[t, k]), gates[t, k].double(), hidden[t].double()
            if e >= E:
                continue
            activation, f = EXPERTS[family](block.experts, e, x)
            norm = f.square().sum().sqrt()
            sums.tokens[e] += 1
            sums.maxima["output"][e] = max(sums.maxima["output"][e], f.abs().max())
            sums.gate_sum[e] += g
            sums.norm_sum[e] += norm
            sums.norm_sq_sum[e] += norm**2
            sums.gated_norm_sum[e] += g * norm
            sums.gated_norm_sq_sum[e] += g**2 * norm**2
            for name, X in (("hidden", x), ("activation", activation)):
                sums.energy[name][e] += X**2
                sums.gated_energy[name][e] += (g * X) ** 2
                sums.moment[name][e] += torch.outer(X, X)
                sums.gated_moment[name][e] += torch.outer(g * X, g * X)
    return sums.named_tensors() | sums.named_maxima()


def sums_of(statistics: ExpertStatistics) -> dict[str, torch.Tensor]:
    """Sums and maxima by name; the `extra` ones have tests of their own."""
    named = statistics.named_tensors() | statistics.named_maxima()
    return {name: tensor for name, tensor in named.items() if not name.startswith("extra.")}


def assert_same_sums(actual: ExpertStatistics, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to the largest value of each sum; token counts exactly."""
    named = sums_of(actual)
    assert named.keys() == expected.keys()
    assert torch.equal(named["tokens"], expected["tokens"])
    for name, tensor in named.items():
        assert tensor.isfinite().all(), name
        error = (tensor - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same_bits(actual: ModelStatistics, expected: ModelStatistics) -> None:
    assert list(actual.blocks) == list(expected.blocks)
    for name, block in actual.blocks.items():
        other = expected.blocks[name]
        mine, theirs = block.named_tensors() | block.named_maxima(), other.named_tensors() | other.named_maxima()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@contextmanager
def experts_inputs(model: torch.nn.Module) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """What the experts modules are called with while the body runs, by block: hidden states, expert ids, gates."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name] = tuple(arg.clone() for arg in args)

        return keep

    hooks = [block.experts.register_forward_pre_hook(keeper(block.name)) for block in find_moe_blocks(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=windows(), use_cache=False)[0]


@pytest.fixture(scope="module")
def mixtral() -> torch.nn.Module:
    """Shared by tests that leave it as it was."""
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def statistics(mixtral) -> ModelStatistics:
    return calibrate(mixtral, windows(), moments="both", batch_size=2, seed=7)


# The sums


@pytest.mark.parametrize("family", EXPERTS)
# float64 throughout shows the formulas, float32 the accumulation
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_sums_equal_a_slow_loop_over_raw_activations(family, dtype, tolerance):
    model = tiny_model(family).to(dtype)
    ids = windows(2, 10)
    with experts_inputs(model) as inputs:
        statistics = calibrate(model, ids, moments="both", batch_size=2)
    for block in find_moe_blocks(model):
        expected = slow_sums(family, block, *inputs[block.name])
        assert_same_sums(statistics.blocks[block.name], expected, tolerance)


def test_the_slow_loop_sees_gates_paired_with_the_wrong_tokens(mixtral):
    """Rows in slot order with gates in token order: the mistake is large enough for the test above to fail."""
    block = find_moe_blocks(mixtral)[0]
    with experts_inputs(mixtral) as inputs:
        logits(mixtral)
    hidden, index, gates = inputs[block.name]
    wrong = gates.reshape(-1).reshape(gates.shape[1], gates.shape[0]).T
    expected = slow_sums("mixtral", block, hidden, index, gates)
    recorder = Recorder(block, "both")
    recorder(hidden, index, wrong)
    for name in ("gated_norm_sum", "gated_energy.hidden", "gated_energy.activation", "gated_moment.hidden"):
        error = (recorder.statistics.named_tensors()[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert error > 1e-2, name
    recorder = Recorder(block, "both")
    recorder(hidden, index, gates)
    assert_same_sums(recorder.statistics, expected, 2e-5)


def _all_experts(T: int, E: int) -> torch.Tensor:
    return torch.arange(E).expand(T, E).contiguous()


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(torch.tensor([[2, 5]]), id="one token"),
        pytest.param(torch.zeros(0, 2, dtype=torch.int64), id="no tokens"),
        pytest.param(torch.tensor([[0, 1], [1, 0], [0, 7]]), id="empty experts between used ones"),
        pytest.param(torch.full((5, 1), 3), id="all tokens on one expert, top_k 1"),
        pytest.param(_all_experts(3, 8), id="top_k = E"),
        pytest.param(torch.tensor([[8, 1], [1, 8], [8, 8]]), id="slots of experts that live elsewhere"),
        pytest.param(torch.tensor([[1, 2, 3], [4, 5, 6]]).T, id="non-contiguous"),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_routing_cases(family, index):
    block = find_moe_blocks(tiny_model(family).double())[0]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(index.shape[0], block.hidden_size, dtype=torch.float64, generator=generator)
    gates = torch.rand(index.shape, dtype=torch.float64, generator=generator)
    recorder = Recorder(block, "both")
    out = recorder(hidden, index, gates)

    expected = slow_sums(family, block, hidden, index, gates)
    for name, tensor in recorder.statistics.named_tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-11, msg=name)
    combined = torch.zeros_like(hidden)
    for t, k in ((t, k) for t in range(index.shape[0]) for k in range(index.shape[1]) if index[t, k] < 8):
        combined[t] += gates[t, k] * EXPERTS[family](block.experts, int(index[t, k]), hidden[t])[1]
    torch.testing.assert_close(out, combined, rtol=1e-11, atol=1e-11)


def test_neither_the_order_of_tokens_nor_of_slots_matters():
    block = find_moe_blocks(tiny_model("mixtral").double())[0]
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(33, block.hidden_size, dtype=torch.float64, generator=generator)
    gates, index = torch.rand(33, 8, dtype=torch.float64, generator=generator).topk(3)
    order = torch.randperm(33, generator=generator)
    plain, shuffled, flipped = (Recorder(block, "both") for _ in range(3))
    plain(hidden, index, gates)
    shuffled(hidden[order], index[order], gates[order])
    flipped(hidden, index.flip(1), gates.flip(1))
    expected = sums_of(plain.statistics)
    assert_same_sums(shuffled.statistics, expected, 1e-13)
    assert_same_sums(flipped.statistics, expected, 1e-13)


def test_moments_come_only_when_asked_for(mixtral):
    for moments, plain, gated in [("none", 0, 0), ("plain", 2, 0), ("gated", 0, 2), ("both", 2, 2)]:
        block = next(iter(calibrate(mixtral, windows(1, 4), moments=moments).blocks.values()))
        assert (len(block.moment), len(block.gated_moment)) == (plain, gated)
        assert block.moments == moments


def test_the_diagonal_of_a_moment_is_the_energy(statistics):
    for block in statistics.blocks.values():
        for moment, energy in ((block.moment, block.energy), (block.gated_moment, block.gated_energy)):
            for name in energy:
                diagonal = moment[name].diagonal(dim1=1, dim2=2)
                torch.testing.assert_close(diagonal, energy[name], rtol=1e-5, atol=1e-6)


def test_the_same_call_gives_the_same_bits(mixtral, statistics):
    assert_same_bits(calibrate(mixtral, windows(), moments="both", batch_size=2, seed=7), statistics)


# Padding


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_padding_is_not_in_the_sums(family, side):
    model = tiny_model(family).double()
    ids = windows(3, 10)
    padded = torch.zeros(3, 14, dtype=torch.int64)
    mask = torch.zeros(3, 14, dtype=torch.int64)
    where = slice(0, 10) if side == "right" else slice(4, 14)
    padded[:, where], mask[:, where] = ids, 1
    plain = calibrate(model, ids, moments="both")
    statistics = calibrate(model, (padded, mask), moments="both")
    assert statistics.tokens == plain.tokens == 30
    assert statistics.text_hash == plain.text_hash
    for name, block in statistics.blocks.items():
        # rotary angles are float32 in a float64 model, and left padding shifts them
        assert_same_sums(block, sums_of(plain.blocks[name]), 1e-12 if side == "right" else 1e-4)


def test_padded_rows_are_computed_but_not_recorded_whatever_they_hold():
    block = find_moe_blocks(tiny_model("mixtral").double())[0]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, block.hidden_size, dtype=torch.float64, generator=generator)
    gates, index = torch.rand(9, 8, dtype=torch.float64, generator=generator).topk(2)
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    all_rows = Recorder(block)(hidden, index, gates)
    recorder = Recorder(block, "both")
    recorder.token_mask = keep
    torch.testing.assert_close(recorder(hidden, index, gates), all_rows, rtol=1e-12, atol=1e-12)
    expected = slow_sums("mixtral", block, hidden, index, gates, keep)
    assert_same_sums(recorder.statistics, expected, 1e-12)

    hidden[~keep] = float("nan")
    recorder = Recorder(block, "both")
    recorder.token_mask = keep
    recorder(hidden, index, gates)
    assert_same_sums(recorder.statistics, expected, 1e-12)


def test_a_token_mask_of_another_length_is_refused(mixtral):
    block = find_moe_blocks(mixtral)[0]
    with record([block]) as (recorder,):
        recorder.token_mask = torch.ones(5, dtype=torch.bool)
        with pytest.raises(UsageError, match=r"token_mask must be \[12\].*got \[5\]"), torch.no_grad():
            mixtral(windows(1, 12))


# What recording leaves alone


# layouts of EXPERTS, and: a norm after each expert, a clamp in the gate, linear attention beside the experts
@pytest.mark.parametrize("family", [*EXPERTS, "muse_spark_text", "deepseek_v4", "qwen3_next"])
def test_logits_are_bit_for_bit_those_of_the_eager_loop(family):
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    expected = logits(model)
    with record(find_moe_blocks(model), "both") as recorders:
        assert torch.equal(logits(model), expected)
    assert all(recorder.calls == 1 for recorder in recorders)
    assert torch.equal(logits(model), expected)


def test_bfloat16_logits_are_those_of_the_eager_loop_too():
    model = tiny_model("mixtral").to(torch.bfloat16)
    model.set_experts_implementation("eager")
    expected = logits(model)
    with record(find_moe_blocks(model), "both"):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_blocks_that_are_not_recorded_run_as_always(implementation):
    model = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    first, last = find_moe_blocks(model)
    with experts_inputs(model) as expected:
        logits(model)
    with record([last]) as (recorder,), experts_inputs(model) as found:
        assert model.config._experts_implementation == implementation
        assert first.experts.config is model.config
        logits(model)
    # the input of the last block is the output of all before it
    assert all(torch.equal(a, b) for a, b in zip(found[last.name], expected[last.name], strict=True))
    assert recorder.statistics.tokens.sum() == windows().numel() * 2


def test_an_exception_inside_leaves_no_trace(mixtral):
    blocks = find_moe_blocks(mixtral)
    before = logits(mixtral)
    with pytest.raises(KeyboardInterrupt), record(blocks):
        raise KeyboardInterrupt
    assert all(block.experts.config is mixtral.config for block in blocks)
    assert torch.equal(logits(mixtral), before)


def test_a_failing_pass_leaves_the_model_as_it_was(mixtral):
    def fail(event: ProgressEvent) -> None:
        if event.done:
            raise RuntimeError("from the callback")

    mixtral.train()
    mixtral.model.layers[0].eval()
    flags = [module.training for module in mixtral.modules()]
    try:
        with pytest.raises(RuntimeError, match="from the callback"):
            calibrate(mixtral, windows(), progress=fail)
        assert [module.training for module in mixtral.modules()] == flags
        assert all(block.experts.config is mixtral.config for block in find_moe_blocks(mixtral))
    finally:
        mixtral.eval()


def test_one_recorder_at_a_time(mixtral):
    block = find_moe_blocks(mixtral)[0]
    with record([block]), pytest.raises(UsageError, match=f"one recorder at a time.*{block.name}"), record([block]):
        pass
    assert block.experts.config is mixtral.config


def test_the_head_does_not_run_and_gradients_stay_off(mixtral):
    def fail(*_: Any) -> None:
        raise AssertionError("lm_head ran")

    hook = mixtral.lm_head.register_forward_pre_hook(fail)
    try:
        statistics = calibrate(mixtral, windows())
    finally:
        hook.remove()
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in statistics.tensors())


def test_a_recorder_made_in_inference_mode_can_be_used_outside(mixtral):
    block = find_moe_blocks(mixtral)[0]
    with torch.inference_mode():
        recorder = Recorder(block, "both")
    for _ in range(2):
        with recorder, torch.no_grad():
            mixtral(windows(1, 4))
    assert recorder.statistics.tokens.sum() == 2 * 4 * 2


def test_a_replaced_forward_is_an_error():
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[1]
    block.experts.forward = lambda hidden, index, gates: hidden
    with pytest.raises(CalibrationError, match=f"{block.name} was never called"):
        calibrate(model, windows())


# Merging


def test_merged_halves_equal_the_whole(mixtral):
    ids = windows(8)
    whole = calibrate(mixtral, ids, moments="both", batch_size=2, seed=7)
    first, second = (calibrate(mixtral, half, moments="both", batch_size=2, seed=7) for half in ids.chunk(2))
    merged = first + second
    assert (merged.tokens, merged.text_hash, merged.seed) == (whole.tokens, whole.text_hash, 7)
    assert merged.fingerprint == whole.fingerprint
    for name, block in merged.blocks.items():
        assert_same_sums(block, sums_of(whole.blocks[name]), 1e-15)
    backwards = second + first
    assert_same_bits(backwards, merged)


def test_parts_cut_inside_a_batch_merge_to_float32_rounding(mixtral):
    ids = windows(5)
    whole = calibrate(mixtral, ids, moments="both", batch_size=5)
    merged = calibrate(mixtral, ids[:2], moments="both") + calibrate(mixtral, ids[2:], moments="both")
    for name, block in merged.blocks.items():
        assert_same_sums(block, sums_of(whole.blocks[name]), 1e-5)


def test_merging_forgets_a_seed_that_differs(mixtral):
    first, second = (calibrate(mixtral, windows(1, 4, seed), seed=seed) for seed in (0, 1))
    assert (first + second).seed is None


def test_statistics_that_do_not_belong_together_are_not_merged(mixtral, statistics):
    with pytest.raises(CalibrationError, match=r"same sums, only one has gated_moment\.activation"):
        statistics + calibrate(mixtral, windows(), moments="plain")
    with pytest.raises(CalibrationError, match="must come from one model"):
        statistics + calibrate(tiny_model("mixtral", seed=1), windows(), moments="both")
    part = ModelStatistics({}, statistics.fingerprint, statistics.text_hash, 0, 0)
    with pytest.raises(CalibrationError, match=r"same blocks.*model\.layers\.0"):
        statistics + part
    small = ExpertStatistics.zeros(2, {"hidden": 32, "activation": 96})
    with pytest.raises(CalibrationError, match=r"same shapes, got \(2,\) and \(3,\)"):
        small + ExpertStatistics.zeros(3, {"hidden": 32, "activation": 96})


def test_tensors_are_the_sums_themselves(mixtral):
    statistics = calibrate(mixtral, windows())
    doubled = statistics + statistics
    for tensor in statistics.tensors():
        tensor += tensor.clone()
    assert_same_bits(statistics, doubled)


# Files


def test_a_saved_file_holds_the_same_bits(statistics, tmp_path):
    path = tmp_path / "calibration.safetensors"
    statistics.save(path)
    loaded = ModelStatistics.load(path)
    assert_same_bits(loaded, statistics)
    for field in ("fingerprint", "text_hash", "seed", "tokens", "schema_version"):
        assert getattr(loaded, field) == getattr(statistics, field)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_further_sums_are_saved_merged_and_reduced(mixtral, tmp_path):
    statistics = calibrate(mixtral, windows())
    for block in statistics.blocks.values():
        block.extra["gated_norm_angle_sum"] = torch.rand(block.num_experts, dtype=torch.float64)
    statistics.save(tmp_path / "file")
    loaded = ModelStatistics.load(tmp_path / "file")
    assert_same_bits(loaded, statistics)
    for name, block in (loaded + statistics).blocks.items():
        once = statistics.blocks[name].extra["gated_norm_angle_sum"]
        assert torch.equal(block.extra["gated_norm_angle_sum"], 2 * once)
        assert any(tensor is block.extra["gated_norm_angle_sum"] for tensor in block.tensors())


def test_maxima_are_saved_and_merged_by_the_larger_one(mixtral, tmp_path):
    first, second = calibrate(mixtral, windows()[:1]), calibrate(mixtral, windows()[1:])
    both = first + second
    both.save(tmp_path / "file")
    loaded = ModelStatistics.load(tmp_path / "file")
    whole = calibrate(mixtral, windows())
    for name, block in loaded.blocks.items():
        largest = block.maxima["output"]
        parts = [part.blocks[name].maxima["output"] for part in (first, second)]
        assert torch.equal(largest, torch.maximum(*parts))
        # the outputs are float32, and a batch of other rows rounds them differently
        torch.testing.assert_close(largest, whole.blocks[name].maxima["output"], rtol=1e-5, atol=1e-6)
        assert not any(tensor is largest for tensor in block.tensors())


def _rewritten(path: Any, change: Callable[[dict, dict], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t, m: m.update(schema_version="0"), "schema version 2, got 0", id="another schema"),
        pytest.param(lambda t, m: m.pop("format"), "another kind of safetensors file", id="no statistics"),
        pytest.param(lambda t, m: m.pop("blocks"), "damaged.*'blocks'", id="no list of blocks"),
        pytest.param(
            lambda t, m: t.pop("gate_sum/model.layers.0.mlp.experts"), "missing gate_sum", id="a sum is missing"
        ),
        pytest.param(
            lambda t, m: t.update({"median/model.layers.0.mlp.experts": torch.zeros(8)}),
            "does not know: 'median'",
            id="an unknown sum",
        ),
        pytest.param(
            lambda t, m: t.update({"gate_sum/model.layers.0.mlp.experts": torch.zeros(8)}),
            r"'gate_sum' must be torch\.float64 with 8 rows",
            id="another dtype",
        ),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(statistics, tmp_path, change, message):
    path = tmp_path / "file"
    statistics.save(path)
    _rewritten(path, change)
    with pytest.raises(CalibrationError, match=message):
        ModelStatistics.load(path)


def test_a_missing_or_cut_file_is_one_clear_error(statistics, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(CalibrationError, match=f"cannot read statistics from {path}"):
        ModelStatistics.load(path)
    statistics.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match=f"cannot read statistics from {path}"):
        ModelStatistics.load(path)


def test_a_failed_save_keeps_the_file_that_was_there(statistics, tmp_path, monkeypatch):
    path = tmp_path / "file"
    statistics.save(path)
    before = path.read_bytes()

    def fail(tensors: Any, filename: Any, metadata: Any) -> None:
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(CalibrationError, match="no space left"):
        statistics.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_format_name_is_part_of_the_file(statistics, tmp_path):
    from safetensors import safe_open

    statistics.save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT == "moesparse-statistics"
    assert metadata["schema_version"] == "2"
    assert metadata["seed"] == "7"


# Which model, which text


def _prune_2_4(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for block in find_moe_blocks(model):
            for matrix in block.matrices:
                groups = matrix.weight.unflatten(-1, (-1, 4))
                weakest = groups.abs().topk(2, dim=-1, largest=False).indices
                matrix.weight.copy_(groups.scatter(-1, weakest, 0.0).flatten(-2))


def test_statistics_know_their_model(statistics):
    model = tiny_model("mixtral")
    statistics.check_model(model)
    with pytest.raises(CalibrationError, match=r"must come from this model.*before it was pruned"):
        statistics.check_model(tiny_model("mixtral", seed=1))
    _prune_2_4(model)
    with pytest.raises(CalibrationError, match="must come from this model"):
        statistics.check_model(model)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_saved_model_keeps_its_fingerprint(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == model_fingerprint(model)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.config.__setattr__("num_experts_per_tok", 3), id="top_k"),
        pytest.param(lambda m: m.model.layers[1].mlp.experts.down_proj.data[7].zero_(), id="one expert"),
        pytest.param(lambda m: m.model.layers[0].mlp.gate.weight.data.mul_(1.01), id="the router"),
        pytest.param(lambda m: m.model.layers[0].self_attn.q_proj.weight.data.mul_(1.01), id="attention"),
    ],
)
def test_the_fingerprint_changes_with_what_changes_activations(change):
    model = tiny_model("mixtral")
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


def test_the_fingerprint_does_not_change_by_being_used():
    model = tiny_model("mixtral")
    before = model_fingerprint(model)
    calibrate(model, windows())
    model.set_experts_implementation("batched_mm")
    model.config._name_or_path = "elsewhere"
    assert model_fingerprint(model) == before


def test_the_text_hash_is_of_the_windows_not_of_their_order():
    ids = windows(5)
    assert windows_hash(ids) == windows_hash(ids.flip(0))
    assert windows_hash(ids) != windows_hash(ids[:4])
    assert windows_hash(ids) != windows_hash(ids.flip(1))
    twice = torch.cat([ids, ids])
    assert windows_hash(twice) != windows_hash(ids)


# What is refused


def test_a_pruned_model_is_refused_unless_allowed():
    model = tiny_model("mixtral")
    _prune_2_4(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(CalibrationError, match=rf"must be dense, got 50% zeros in {name}, expert \d.*allow_pruned"):
        calibrate(model, windows())
    assert calibrate(model, windows(), allow_pruned=True).tokens == windows().numel()


def test_one_zeroed_expert_is_found():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[5].zero_()
    with pytest.raises(CalibrationError, match=r"nothing but zeros in model\.layers\.1.*down_proj, expert 5"):
        calibrate(model, windows())


def test_a_masked_router_is_found():
    model = tiny_model("deepseek_v3")
    block = find_moe_blocks(model)[0]
    block.moe.gate.e_score_correction_bias[3] = float("-inf")
    with pytest.raises(CalibrationError, match=rf"masked one in {block.moe_name}\.gate\.e_score_correction_bias"):
        calibrate(model, windows())


def test_non_finite_weights_are_named():
    model = tiny_model("mixtral")
    used = int(calibrate(model, windows()).blocks["model.layers.1.mlp.experts"].tokens.argmax())
    model.model.layers[1].mlp.experts.down_proj.data[used, 0, 0] = float("nan")
    where = rf"in the output of model\.layers\.1\.mlp\.experts, expert {used}, window \d"
    with pytest.raises(CalibrationError, match=f"must be finite, got nan {where}"):
        calibrate(model, windows())


def test_a_non_finite_activation_names_its_window():
    model = tiny_model("mixtral")
    ids = windows(5, 12)
    ids[3, 4] = 1
    model.model.embed_tokens.weight.data[1] = float("inf")
    with pytest.raises(CalibrationError, match=r"got nan in the input of model\.layers\.0.*window 3 "):
        calibrate(model, ids, batch_size=2)


def test_an_activation_too_large_to_square_is_named(mixtral):
    block = find_moe_blocks(mixtral)[0]
    hidden = torch.ones(2, 32)
    hidden[1, 5] = 1e20
    with pytest.raises(CalibrationError, match=r"got 1\.0\d*e\+20 in the input of .*token 1 of the batch"):
        Recorder(block)(hidden, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def test_a_gate_that_is_not_finite_is_named(mixtral):
    block = find_moe_blocks(mixtral)[0]
    gates = torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(CalibrationError, match=r"got nan in the gate of .*expert 0, token 1 of the batch"):
        Recorder(block)(torch.ones(2, 32), torch.zeros(2, 1, dtype=torch.int64), gates)


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (IDS.int(), r"LongTensor \[n, t\].*got torch.int32 \[2, 3\]"),
        (IDS[0], r"got torch.int64 \[3\]"),
        (IDS[:0], r"at least one token, got torch.int64 \[0, 3\]"),
        ([[1, 2]], "got list"),
        (IDS + VOCABULARY, rf"\[0, {VOCABULARY}\), got 64 to 64.*another tokenizer"),
        (IDS - 100, "got -100 to -100"),
        ((IDS, torch.ones(2, 4)), r"shape of the windows, \[2, 3\], got \[2, 4\]"),
        ((IDS, torch.full((2, 3), 2)), "0 and 1 only"),
        ((IDS, torch.tensor([[1, 1, 1], [0, 0, 0]])), "only padding in window 1"),
    ],
)
def test_windows_that_are_none(mixtral, wrong, message):
    with pytest.raises(UsageError, match=message):
        calibrate(mixtral, wrong)


def test_check_windows_drops_a_mask_without_padding():
    assert check_windows((IDS, torch.ones(2, 3)))[1] is None
    assert check_windows((IDS, None))[1] is None


def test_arguments_that_can_never_be_right(mixtral):
    with pytest.raises(UsageError, match="moments must be one of none, plain, gated, both, got 'all'"):
        calibrate(mixtral, windows(), moments="all")
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        calibrate(mixtral, windows(), batch_size=0)


# Memory and progress


def test_memory_is_said_before_it_is_taken(mixtral, monkeypatch):
    blocks = find_moe_blocks(mixtral)
    events: list[ProgressEvent] = []
    statistics = calibrate(mixtral, windows(), moments="both", progress=events.append)
    taken = sum(
        tensor.nbytes
        for block in statistics.blocks.values()
        for group in (block.moment, block.gated_moment)
        for tensor in group.values()
    )
    assert memory_needed(blocks, "both") == taken == events[0].memory
    assert memory_needed(blocks, "none") == 0
    assert memory_needed(blocks[:1], "gated") * 4 == taken

    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(CalibrationError, match=r"must fit in memory, moments='both' takes .* GiB for 2 blocks"):
        calibrate(mixtral, windows(), moments="both")


def test_progress_counts_windows_and_tokens(mixtral):
    events: list[ProgressEvent] = []
    mask = torch.ones(5, 12)
    mask[4, 6:] = 0
    calibrate(mixtral, (windows(5), mask), batch_size=2, progress=events.append)
    assert [(event.done, event.tokens) for event in events] == [(0, 0), (2, 24), (4, 48), (5, 54)]
    assert all((event.stage, event.unit, event.total) == ("calibrate", "window", 5) for event in events)
    assert events[0].remaining is None
    assert events[-1].remaining == 0


def test_importing_needs_no_transformers():
    code = "import sys, moesparse.calibration; sys.exit(any(m in sys.modules for m in ('transformers', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", EXPERTS)
def test_a_gpu_gives_the_same_sums_and_the_model_comes_back(family):
    model = tiny_model(family)
    expected = calibrate(model, windows(), moments="both")
    found = calibrate(model, windows(), moments="both", device="cuda")
    assert next(model.parameters()).device.type == "cpu"
    for name, block in found.blocks.items():
        assert block.gate_sum.device.type == "cpu"
        assert_same_sums(block, sums_of(expected.blocks[name]), 1e-3)
