"""Every family with planted oddities: folders are packed and unpacked, and nothing else of them changes."""

import family_runs as runs
import pytest
from planted import is_matrix, layer_of, plant
from rules import check, read_tensors

from moesparse.checkpoints.against import compare_folders
from moesparse.errors import MoESparseError, UnsupportedModelError

# whose checkpoints name matrices of experts in a way that leaves no place for a bitmask
WITHOUT_PLACE = ("aria_text", "granitemoe", "granitemoehybrid", "granitemoeshared")


@pytest.mark.parametrize(("family", "operation", "way"), runs.turns("pack and unpack"))
def test_matrices_are_packed_and_nothing_else(family, operation, way, tmp_path):
    planted = plant(family, tmp_path / "in")
    source = planted.folder
    pruned = runs.prune(planted, source, tmp_path / "pruned", runs.WEIGHTS, "by layer")
    if family in WITHOUT_PLACE:
        with pytest.raises(UnsupportedModelError, match="a name that cannot be given to a packed matrix"):
            runs.pack(pruned, tmp_path / "packed", way)
        assert not (tmp_path / "packed").exists()
        return
    if not can_be_packed(planted, pruned):
        with pytest.raises(MoESparseError, match="is of several dtypes"):
            runs.pack(pruned, tmp_path / "packed", way)
        return
    packed = runs.pack(pruned, tmp_path / "packed", way)
    check(planted, source, packed, pattern=(2, 4), packed=True)
    assert check(planted, pruned, packed, packed=True).keys() == {"equal"}
    dense = runs.unpack(packed, tmp_path / "dense", way)
    assert read_tensors(dense) == read_tensors(pruned)
    assert (dense / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    for folder in (packed, dense):
        assert compare_folders(folder, source).problems == []


def can_be_packed(planted, folder):
    """Whether there is a block whose matrices are each of one dtype."""
    dtypes = {}
    for name, stored in read_tensors(folder).items():
        if is_matrix(name, stored.shape) and name not in planted.beyond:
            down = any(part in name for part in ("down", "w2", "fc2"))
            dtypes.setdefault(layer_of(name), {}).setdefault(down, set()).add(stored.dtype)
    return any(all(len(each) == 1 for each in block.values()) for block in dtypes.values())
