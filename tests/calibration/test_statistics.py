"""Statistics: they merge, they are files, and they know their model and their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_sums import assert_same_bits, assert_same_sums, sums_of, windows

from moesparse.calibration.statistics import FORMAT, ExpertStatistics, ModelStatistics
from moesparse.calibration.whole import calibrate
from moesparse.calibration.windows import windows_hash
from moesparse.errors import CalibrationError
from moesparse.models.fingerprint import fingerprint_sample, model_fingerprint
from moesparse.testing import prune_by_magnitude, tiny_model


@pytest.fixture(scope="module")
def mixtral() -> torch.nn.Module:
    """Shared by tests that leave it as it was."""
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def statistics(mixtral) -> ModelStatistics:
    return calibrate(mixtral, windows(), moments="both", batch_size=2, seed=7)


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


def test_statistics_know_their_model(statistics):
    model = tiny_model("mixtral")
    statistics.check_model(model)
    with pytest.raises(CalibrationError, match=r"must come from this model.*before it was pruned"):
        statistics.check_model(tiny_model("mixtral", seed=1))
    prune_by_magnitude(model)
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


def test_a_fingerprint_sample_holds_no_weights():
    # also of a tensor that is float32 on the CPU already, or a run layer by layer would keep every layer
    weight = torch.zeros(64, 4096)
    assert fingerprint_sample(weight).untyped_storage().nbytes() < weight.nbytes / 16
