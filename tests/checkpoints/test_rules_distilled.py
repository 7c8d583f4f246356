"""Every family with planted oddities: kept weights of experts are trained, and nothing else of the folder changes."""

import family_runs as runs
import pytest
from planted import plant
from rules import check

from moesparse.checkpoints.against import compare_folders


@pytest.mark.parametrize(("family", "mode", "way"), runs.turns("global", "blockwise"))
def test_experts_are_trained_and_nothing_else(family, mode, way, tmp_path):
    if family == "zaya" and mode == "blockwise":
        pytest.skip("cannot be run layer by layer")
    planted = plant(family, tmp_path / "in")
    source = planted.folder
    student = runs.prune(planted, source, tmp_path / "student", runs.WEIGHTS, "by layer")
    out = runs.train(student, source, tmp_path / "out", mode, way)
    became = check(planted, student, out, trained=True)
    found = compare_folders(out, student)
    assert found.problems == [] and {what: set(names) for what, names in found.tensors.items()} == became
    assert compare_folders(out, source).problems == []
