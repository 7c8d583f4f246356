"""Every family with planted oddities: weights are pruned 2:4, and nothing else of the folder changes."""

import family_runs as runs
import pytest
from planted import FAMILIES, ODDITIES, plant
from rules import check, read_tensors

from moesparse.checkpoints.against import compare_folders


def test_there_are_families_and_oddities_enough(tmp_path):
    assert len(FAMILIES) >= 25
    drawn = [plant(family, tmp_path / family).oddities for family in FAMILIES]
    few = {each for each in ODDITIES if sum(each in one for one in drawn) < 8}
    # only where a family ties them
    assert few <= {"a head beside tied embeddings"}


@pytest.mark.parametrize(("family", "operation", "way"), runs.turns("prune 2:4"))
def test_weights_are_pruned_and_nothing_else(family, operation, way, tmp_path):
    planted = plant(family, tmp_path / "in")
    source = planted.folder
    out = runs.prune(planted, source, tmp_path / "out", runs.WEIGHTS, way)
    became = check(planted, source, out, pattern=(2, 4))
    found = compare_folders(out, source)
    assert found.problems == [] and {what: set(names) for what, names in found.tensors.items()} == became


@pytest.mark.parametrize("way", runs.WAYS)
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "minimax_m2", "qwen3_moe"])
def test_float32_routers_of_a_bf16_checkpoint_stay_to_the_bit(family, way, tmp_path):
    """Rounded to bf16, routers and what corrects their scores choose other experts."""
    planted = plant(family, tmp_path / "in", oddities={"float32 routers"})
    before = read_tensors(planted.folder)
    routers = [name for name, stored in before.items() if stored.dtype == "F32"]
    assert any("gate.weight" in name for name in routers) and before["model.norm.weight"].dtype == "BF16"
    assert all((before[name].tensor() != before[name].tensor().bfloat16().float()).any() for name in routers)
    after = read_tensors(runs.prune(planted, planted.folder, tmp_path / "out", runs.WEIGHTS, way))
    assert {name: after[name] for name in routers} == {name: before[name] for name in routers}
