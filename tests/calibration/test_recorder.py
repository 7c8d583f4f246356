"""The recorder's sums against a slow loop over raw activations, and everything it must leave as it found it."""

from __future__ import annotations

import pytest
import torch
from slow_sums import EXPERTS, assert_same_sums, experts_inputs, slow_sums, sums_of, windows

from moesparse.calibration.recorder import Recorder, record
from moesparse.calibration.whole import calibrate
from moesparse.errors import CalibrationError, UsageError
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import tiny_model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=windows(), use_cache=False)[0]


@pytest.fixture(scope="module")
def mixtral() -> torch.nn.Module:
    """Shared by tests that leave it as it was."""
    return tiny_model("mixtral")


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


def test_without_outputs_the_last_matrix_is_left_out_and_the_inputs_sums_are_the_same():
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    with experts_inputs(model) as inputs:
        logits(model)
    hidden, index, gates = inputs[block.name]
    whole, short = Recorder(block, "both"), Recorder(block, "both", outputs=False)
    whole(hidden, index, gates)
    block.matrices[1].weight.fill_(torch.nan)
    assert not short(hidden, index, gates).any()
    want, found = whole.statistics.named_tensors(), short.statistics.named_tensors()
    of_outputs = {name for name in want if "norm" in name}
    assert len(of_outputs) == 4 and not any(found[name].any() for name in of_outputs)
    assert all(torch.equal(found[name], want[name]) for name in want.keys() - of_outputs)


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


def test_the_diagonal_of_a_moment_is_the_energy(mixtral):
    for block in calibrate(mixtral, windows(), moments="both").blocks.values():
        for moment, energy in ((block.moment, block.energy), (block.gated_moment, block.gated_energy)):
            for name in energy:
                diagonal = moment[name].diagonal(dim1=1, dim2=2)
                torch.testing.assert_close(diagonal, energy[name], rtol=1e-5, atol=1e-6)


# Padding


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


def test_one_recorder_at_a_time(mixtral):
    block = find_moe_blocks(mixtral)[0]
    with record([block]), pytest.raises(UsageError, match=f"one recorder at a time.*{block.name}"), record([block]):
        pass
    assert block.experts.config is mixtral.config


def test_a_recorder_made_in_inference_mode_can_be_used_outside(mixtral):
    block = find_moe_blocks(mixtral)[0]
    with torch.inference_mode():
        recorder = Recorder(block, "both")
    for _ in range(2):
        with recorder, torch.no_grad():
            mixtral(windows(1, 4))
    assert recorder.statistics.tokens.sum() == 2 * 4 * 2


# What is refused


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
