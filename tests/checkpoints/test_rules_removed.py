"""Every family with planted oddities: experts go, also with weights pruned, and nothing else of the folder changes."""

import family_runs as runs
import pytest
from planted import plant
from rules import check
from transformers import AutoConfig

from moesparse.checkpoints.against import compare_folders


@pytest.mark.parametrize(("family", "operation", "way"), runs.turns("--experts", "both"))
def test_experts_are_removed_and_nothing_else(family, operation, way, tmp_path):
    if family == "zaya" and (operation == "both" or way == "by layer"):
        pytest.skip("cannot be run layer by layer")
    planted = plant(family, tmp_path / "in")
    source = planted.folder
    recipe, pattern = (runs.EXPERTS, None) if operation == "--experts" else (runs.BOTH, (2, 4))
    out = runs.prune(planted, source, tmp_path / "out", recipe, way)
    became = check(planted, source, out, pattern=pattern, removed=True)
    found = compare_folders(out, source)
    assert found.problems == [] and {what: set(names) for what, names in found.tensors.items()} == became
    # transformers reads it, and has a place for every tensor that it had one for
    AutoConfig.from_pretrained(out)
    runs.load(out)
