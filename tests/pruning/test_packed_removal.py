"""Experts removed from packed n:m checkpoints, byte for byte: values and bitmasks of those that stay are copies."""

import json
import sys

import pytest
import torch
from test_quantised_removal import kept_in, raw, renamed

from moesparse import Recipe
from moesparse.calibration.checkpoint import calibrate_checkpoint
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.pretrained import load_pretrained
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.cli import main
from moesparse.errors import CalibrationError, UnsupportedModelError, UsageError
from moesparse.pruning.run import prune_checkpoint
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
CUT = Recipe(weights=None, experts=0.25, update="none")


def make(tmp_path, family, **config):
    """A model pruned to 2:4, dense and packed."""
    tiny_model(family, **config).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    prune_checkpoint(tmp_path / "whole", tmp_path / "dense", None, Recipe(saliency="magnitude", update="none"))
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_result_is_the_dense_one_packed(family, tmp_path):
    packed = make(tmp_path, family)
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "cut", WINDOWS, CUT, batch_size=4, allow_pruned=True)
    pack_folder(tmp_path / "cut", tmp_path / "cut packed")
    replayed = prune_checkpoint(packed, tmp_path / "out", None, Recipe(weights=None, update="none", plan=report.plan))
    chosen = prune_checkpoint(packed, tmp_path / "text", WINDOWS, CUT, batch_size=4, allow_pruned=True)
    assert replayed.plan.kept == chosen.plan.kept == report.plan.kept
    assert raw(tmp_path / "out") == raw(tmp_path / "text") == raw(tmp_path / "cut packed")
    # every byte of what stays is the source's
    kept, before, after = kept_in(tmp_path / "out"), raw(packed), raw(tmp_path / "out")
    names = {new: name for name in before if (new := renamed(name, kept)) is not None}
    assert after.keys() == names.keys()
    assert all(after[new] == before[name] for new, name in names.items() if "experts." in new)
    unpack_folder(tmp_path / "out", tmp_path / "unpacked")
    assert raw(tmp_path / "unpacked") == raw(tmp_path / "cut")
    for source in (packed, tmp_path / "dense"):
        assert compare_folders(tmp_path / "out", source).problems == []
    looked = inspect_folder(tmp_path / "out", verify=True)
    assert looked.problems == [] and looked.format == "packed"


def test_it_loads_and_computes_what_the_dense_one_does(tmp_path):
    packed = make(tmp_path, "mixtral")
    prune_checkpoint(packed, tmp_path / "out", WINDOWS, CUT, batch_size=4, allow_pruned=True)
    prune_checkpoint(tmp_path / "dense", tmp_path / "cut", WINDOWS, CUT, batch_size=4, allow_pruned=True)
    packed_model, dense = (load_pretrained(tmp_path / name)[0] for name in ("out", "cut"))
    with torch.no_grad():
        wanted = dense(WINDOWS).logits
        torch.testing.assert_close(packed_model(WINDOWS).logits, wanted, atol=0.05 * wanted.abs().max(), rtol=0)


def test_sums_are_those_of_the_dense_one(tmp_path):
    packed = make(tmp_path, "mixtral")
    sums = [
        calibrate_checkpoint(source, tmp_path / f"{source.name}.stats", WINDOWS, batch_size=4, allow_pruned=True)
        for source in (packed, tmp_path / "dense")
    ]
    assert sums[0].fingerprint == sums[1].fingerprint
    for ours, theirs in zip(sums[0].blocks.values(), sums[1].blocks.values(), strict=True):
        assert ours.tokens.equal(theirs.tokens) and ours.gated_norm_sum.equal(theirs.gated_norm_sum)


def test_what_would_move_zeros_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    packed = make(tmp_path, "mixtral")
    out = tmp_path / "out"
    for recipe, error, match in (
        (
            Recipe(weights="1:4"),
            UnsupportedModelError,
            "packed must be dense to have its weights pruned, got packed n:m",
        ),
        (
            Recipe(weights=None, experts=0.25),
            UnsupportedModelError,
            r"experts refitted \(update='least-squares.*`moesparse unpack`",
        ),
        (
            Recipe(weights="2:4", output_dtype="float32"),
            UsageError,
            "which is packed, .* moesparse unpack makes it dense",
        ),
        (CUT, CalibrationError, r"must be dense, got \d+% zeros .* allow_pruned=True"),
    ):
        with pytest.raises(error, match=match):
            prune_checkpoint(packed, out, WINDOWS, recipe)
        assert not out.exists()
    plan = prune_checkpoint(packed, tmp_path / "cut", WINDOWS, CUT, batch_size=4, allow_pruned=True).plan
    plan.save(tmp_path / "plan.json")
    command = ["prune", str(packed), str(out), "--plan", str(tmp_path / "plan.json"), "--json"]
    monkeypatch.setattr(sys, "argv", ["moesparse", *command])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(capsys.readouterr().out)["experts"]["blocks"][0]["kept"] == list(plan.kept[0])
    assert raw(out) == raw(tmp_path / "cut")
