"""The studies of benchmarks/: what they disturb, solve and count, and that each runs from end to end."""

import argparse
import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import architectures as study_architectures
from benchmarks.studies import calibration as study_calibration
from benchmarks.studies import frontier as study_frontier
from benchmarks.studies import gate as study_gate
from benchmarks.studies import imbalance as study_imbalance
from benchmarks.studies import limit as study_limit
from benchmarks.studies import merging as study_merging
from benchmarks.studies import protocol as study_protocol
from benchmarks.studies import stability as stability
from benchmarks.studies import testbed as study_testbed
from moesparse import demo
from moesparse.calibration.recorder import record
from moesparse.models.blocks import find_moe_blocks
from moesparse.weights.patterns import Pattern, mask_from_score

TESTBED = study_testbed.open_testbed()


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    return study_protocol.parser("").parse_args(["--quick", "-o", str(folder), *more])


@pytest.fixture(scope="module")
def model():
    return demo.load()[0]


def test_draws_are_even_over_domains_and_nest():
    windows = TESTBED.draw(12, seed=3)
    assert torch.equal(windows[:6], TESTBED.draw(6, seed=3))
    assert not torch.equal(windows, TESTBED.draw(12, seed=4))
    for place, window in enumerate(windows):
        text = demo.windows("calibration", demo.DOMAINS[place % 6])
        assert (text == window).all(dim=1).any()
    alone = TESTBED.draw(5, 0, "code", length=120)
    assert alone.shape == (5, 120)
    assert all((demo.windows("calibration", "code", length=120) == window).all(dim=1).any() for window in alone)
    with pytest.raises(SystemExit, match=r"need 100000 calibration windows of 256 tokens, the text has \d+"):
        TESTBED.draw(100_000, seed=0)


def test_a_row_is_measured_once_and_only_under_its_protocol(tmp_path, model):
    study = study_protocol.Study("one", arguments(tmp_path), model=model)
    assert study.measure(lambda: {"perplexity": 2.0}, rule="a", seed=0)["perplexity"] == 2.0
    again = study_protocol.Study("one", arguments(tmp_path), model=model)
    assert again.measure(lambda: pytest.fail("measured twice"), rule="a", seed=0)["perplexity"] == 2.0
    assert again.measure(lambda: {"perplexity": 3.0}, rule="a", seed=1)["perplexity"] == 3.0
    assert [row["perplexity"] for row in again.select(rule="a")] == [2.0, 3.0]
    with pytest.raises(SystemExit, match=r"one\.json holds rows of another protocol"):
        study_protocol.Study("one", arguments(tmp_path), model=model, length=120)


def test_disturbed_router(model):
    ids = TESTBED.draw(2, 0)[:, :64]
    with torch.no_grad():
        plain = model(ids).logits
        with stability.disturbed(model) as moved:
            torch.testing.assert_close(model(ids).logits, plain)
        assert moved == [0.0] * 4
        with stability.disturbed(model, temperature=4.0) as moved:
            assert not torch.allclose(model(ids).logits, plain, atol=1e-2)
        # the first router sees what it always sees, and temperature does not reorder
        assert moved[0] == 0.0
        with stability.disturbed(model, noise=1.0, seed=1) as moved:
            noisy = model(ids).logits
            # the same call gets the same noise, which pruning layer by layer relies on
            assert torch.equal(model(ids).logits, noisy)
        assert 0.2 < moved[0] < 0.8
        assert torch.equal(model(ids).logits, plain), "a hook stayed behind"


def test_overlap_counts_kept_weights(model):
    pruned = [copy.deepcopy(model) for _ in range(2)]
    for seed, each in enumerate(pruned):
        generator = torch.Generator().manual_seed(seed)
        for block in find_moe_blocks(each):
            for matrix in block.matrices:
                scores = torch.rand(matrix.weight.shape, generator=generator)
                matrix.weight.mul_(mask_from_score(scores, Pattern.parse("2:4")))
    assert stability.overlap(pruned[0], pruned[0]) == 1.0
    assert stability.overlap(*pruned) == pytest.approx(0.5, abs=0.01)


def test_skew_reaches_its_shares(model):
    skewed = copy.deepcopy(model)
    windows = TESTBED.draw(12, 0)
    study_imbalance.skew(skewed, 10.0, 0, windows)
    expected = 10 ** (-torch.arange(16) / 15)
    order = torch.Generator().manual_seed(0)
    for block, dense in zip(find_moe_blocks(skewed), find_moe_blocks(model), strict=True):
        seen = study_imbalance.router_inputs(skewed, block, windows)
        chosen = (seen @ block.moe.gate.weight.T).topk(2, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=16) / len(chosen)
        by_rank = share[torch.randperm(16, generator=order)]
        torch.testing.assert_close(by_rank, expected / expected.sum(), rtol=0.1, atol=0.0)
        for matrix, before in zip(block.matrices, dense.matrices, strict=True):
            assert torch.equal(matrix.weight, before.weight)


def test_gate_exponent_reaches_the_sums_alone(model):
    windows = TESTBED.draw(2, 0)
    blocks = find_moe_blocks(model)
    with torch.no_grad(), record(blocks, "both") as recorders:
        plain = model(windows).logits
    whole = [each.statistics for each in recorders]
    for exponent, name in ((1.0, "gated_moment"), (0.0, "moment"), (0.5, None)):
        with torch.no_grad(), study_gate.gates_to_the(exponent), record(blocks, "gated") as recorders:
            assert torch.equal(model(windows).logits, plain)
        for each, dense in zip(recorders, whole, strict=True):
            sums, seen = each.statistics, dense.tokens > 0
            if name is not None:
                for input in ("hidden", "activation"):
                    torch.testing.assert_close(sums.gated_moment[input], getattr(dense, name)[input])
                continue
            # sum (g^0.5)^2 |f|^2 lies between sum |f|^2 and sum g^2 |f|^2, as 0 < g < 1
            assert (sums.gated_norm_sq_sum < dense.norm_sq_sum)[seen].all()
            assert (sums.gated_norm_sq_sum > dense.gated_norm_sq_sum)[seen].all()


def test_a_refit_of_routers_as_they_are_is_the_products(tmp_path):
    study = study_protocol.Study("one", arguments(tmp_path))
    study.calibration_windows = 2
    pruned = study_merging.Pruned(study)
    removed = pruned.model("remove", "reap", 0.5, 0, refit=False)
    before = [block.matrices[-1].weight.clone() for block in find_moe_blocks(removed)]
    study_merging.refit_as_it_routes(removed, study.model, study.draw(study.calibration_windows, 0), study.batch)
    refitted = pruned.model("remove", "reap", 0.5, 0, refit=True)
    for old, mine, theirs in zip(before, find_moe_blocks(removed), find_moe_blocks(refitted), strict=True):
        mine, theirs = mine.matrices[-1].weight, theirs.matrices[-1].weight
        assert (mine - old).norm() > 0.1 * old.norm()
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_bytes_and_agreement():
    assert study_limit.bytes_per_weight("2:4") == 2 * 9 / 16
    assert study_limit.bytes_per_weight("0.5") == study_limit.bytes_per_weight("4:8")
    for pattern, experts in study_imbalance.BUDGETS.values():
        assert study_limit.bytes_per_weight(pattern) / 2 == experts / 16
    order = {"a": [1.0, 3.0], "b": [3.0], "c": [4.0]}
    assert study_architectures.agreement(order, order) == 1.0
    assert study_architectures.agreement(order, {"a": [9.0], "b": [8.0], "c": [7.0]}) == -1.0
    assert study_architectures.agreement(order, {"a": [1.0], "b": [5.0], "c": [3.0]}) == pytest.approx(1 / 3)
    assert study_architectures.agreement(order, {"a": [1.0], "b": [1.0], "c": [3.0]}) == 1.0


@pytest.fixture
def variants(tmp_path, monkeypatch):
    """The embedded model, and an untrained one of another family, in the place of trained variants."""
    monkeypatch.syspath_prepend(Path(study_protocol.__file__).parents[1] / "demo_model")
    from architecture import make_model

    (tmp_path / "mixtral").mkdir()
    (tmp_path / "mixtral" / "model").symlink_to(demo.model_path())
    sizes = {"hidden": 64, "intermediate": 32, "layers": 1, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2}
    options = argparse.Namespace(**sizes, length=256, variant="sigmoid-bias", balance=0.0, seed=0)
    make_model(options, vocab_size=2048, eos_token_id=0).save_pretrained(tmp_path / "sigmoid-bias" / "model")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["frontier", "limit", "imbalance", "stability", "gate", "calibration", "architectures"]
)
def test_quick_run_writes_rows_and_figure(name, tmp_path, request, capsys):
    modules = {"limit": study_limit, "imbalance": study_imbalance, "stability": stability, "gate": study_gate}
    modules |= {"frontier": study_frontier, "calibration": study_calibration, "architectures": study_architectures}
    out = tmp_path / "out"
    command = ["--quick", "-o", str(out)]
    if name == "architectures":
        command += ["--models", str(request.getfixturevalue("variants")), "--variants", "sigmoid-bias"]
    modules[name].main(command)
    written = json.loads((out / f"study_{name}.json").read_text())
    dense = written["rows"][0]["perplexity"]
    assert 10 < dense < 25
    assert len(written["rows"]) >= 3 and all(row["seconds"] >= 0 for row in written["rows"])
    assert (out / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")
    before = capsys.readouterr().out
    modules[name].main(command)
    assert json.loads((out / f"study_{name}.json").read_text()) == written, "the second run measured again"
    # the tables are printed again
    assert capsys.readouterr().out.splitlines()[-1] == before.splitlines()[-1]


def test_architectures_name_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"--models must hold mixtral/model, got"):
        study_architectures.main(["--quick", "-o", str(tmp_path), "--models", str(tmp_path)])
