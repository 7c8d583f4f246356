"""`calibrate`: one dense pass, what it leaves as it found it, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from slow_sums import EXPERTS, VOCABULARY, assert_same_bits, assert_same_sums, sums_of, windows

from moesparse.calibration.statistics import memory_needed
from moesparse.calibration.whole import calibrate
from moesparse.calibration.windows import check_windows
from moesparse.errors import CalibrationError, UsageError
from moesparse.models.blocks import find_moe_blocks
from moesparse.progress import ProgressEvent
from moesparse.testing import prune_by_magnitude, tiny_model


@pytest.fixture(scope="module")
def mixtral() -> torch.nn.Module:
    """Shared by tests that leave it as it was."""
    return tiny_model("mixtral")


def test_moments_come_only_when_asked_for(mixtral):
    for moments, plain, gated in [("none", 0, 0), ("plain", 2, 0), ("gated", 0, 2), ("both", 2, 2)]:
        block = next(iter(calibrate(mixtral, windows(1, 4), moments=moments).blocks.values()))
        assert (len(block.moment), len(block.gated_moment)) == (plain, gated)
        assert block.moments == moments


def test_the_same_call_gives_the_same_bits(mixtral):
    assert_same_bits(*(calibrate(mixtral, windows(), moments="both", batch_size=2) for _ in range(2)))


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


# What the pass leaves alone


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


def test_the_head_does_not_run_and_gradients_stay_off(mixtral):
    def fail(*_: Any) -> None:
        raise AssertionError("lm_head ran")

    hook = mixtral.lm_head.register_forward_pre_hook(fail)
    try:
        statistics = calibrate(mixtral, windows())
    finally:
        hook.remove()
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in statistics.tensors())


def test_a_replaced_forward_is_an_error():
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[1]
    block.experts.forward = lambda hidden, index, gates: hidden
    with pytest.raises(CalibrationError, match=f"{block.name} was never called"):
        calibrate(model, windows())


# What is refused


def test_a_pruned_model_is_refused_unless_allowed():
    model = tiny_model("mixtral")
    prune_by_magnitude(model)
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


def test_importing_needs_no_transformers():
    code = (
        "import sys, moesparse.calibration.whole; sys.exit(any(m in sys.modules for m in ('transformers', 'triton')))"
    )
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
