"""What a result may change of its source, checked byte by byte and without the code that writes and compares folders.

1. Files beside the weights are there byte for byte. 2. Tensors are there under their name, with dtype, shape and bytes,
but for pruned or trained matrices of experts, removed experts and their rows, and what the report and the card name as
left out. 3. config.json is the source's text with other counts of experts, and notes behind it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from planted import EXPERT, Planted, is_matrix, layer_of

ALWAYS = {"README.md", "config.json", "moesparse_report.json", "moesparse_manifest.json"}
OURS = ALWAYS | {"moesparse_plan.json"}
NOTES = {"moesparse", "quantization_config"}
COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"}
GROUPS = {"n_group", "num_expert_group"}
FURTHER = {"num_nextn_predict_layers", "mtp_num_hidden_layers"}
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, as its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.data), dtype=_DTYPES[self.dtype]).reshape(self.shape)


def read_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, by the layout that safetensors publishes: length, JSON header, data."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if index.exists() else None
    names = sorted(set(where.values())) if where is not None else ["model.safetensors"]
    found: dict[str, Stored] = {}
    for name in names:
        raw = (folder / name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for key, entry in json.loads(raw[8:start]).items():
            if key != "__metadata__":
                assert key not in found and (where is None or where[key] == name), key
                a, b = entry["data_offsets"]
                found[key] = Stored(entry["dtype"], tuple(entry["shape"]), raw[start + a : start + b])
    assert where is None or where.keys() == found.keys()
    return found


def check(
    planted: Planted,
    source: Path,
    result: Path,
    *,
    pattern: tuple[int, int] | None = None,
    removed: bool = False,
    trained: bool = False,
    packed: bool = False,
) -> dict[str, set[str]]:
    """Assert all rules of a result.

    Args:
        planted: what the source, or what that was made of, holds.
        source, result: the folders.
        pattern: (n, m) that all matrices of experts got on the way from one to the other.
        removed: experts were removed on that way.
        trained: their weights were trained.
        packed: the result is packed.

    Returns:
        What became of the tensors -> names in the result; for "removed" and "dropped" names in the source.
    """
    check_files(source, result)
    before = read_tensors(source)
    after = _unpacked(result, before) if packed else read_tensors(result)
    config = json.loads((result / "config.json").read_bytes())
    kept = _kept(config, before) if removed else {}
    became = _check_tensors(planted, before, after, kept, pattern, trained)
    origins = {name: _origin(planted, name, kept) for name in after}
    strange = {name: origin for name, origin in origins.items() if origin in planted.strange}
    report = json.loads((result / "moesparse_report.json").read_text())
    named = {name for names in report.get("surplus", {}).values() for name in names}
    assert planted.strange & before.keys() <= {*strange.values(), *became["removed"], *became["dropped"]}
    assert strange.keys() <= named, "surplus that the report does not name"
    assert became["dropped"] == set(report.get("surplus", {}).get("dropped", [])) & before.keys()
    if became["dropped"]:
        assert min(became["dropped"], key=list(before).index) in (result / "README.md").read_text()
    check_config(source, result, kept, packed=packed, dropped=bool(became["dropped"]))
    return {what: names for what, names in became.items() if names}


def check_files(source: Path, result: Path) -> None:
    there, here = (
        {str(file.relative_to(at)): file for file in at.rglob("*") if file.is_file()} for at in (source, result)
    )
    weights = {name for name in there if name.endswith((".safetensors", ".safetensors.index.json", ".bin"))}
    shards = set(map(str, read_shards(result)))
    assert here.keys() - OURS - shards == there.keys() - OURS - weights
    assert here.keys() >= ALWAYS
    for name in there.keys() - OURS - weights:
        assert here[name].read_bytes() == there[name].read_bytes(), name
        assert not here[name].is_symlink(), name


def read_shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [Path("model.safetensors")]
    return [Path(index.name), *map(Path, set(json.loads(index.read_text())["weight_map"].values()))]


def _kept(config: dict, before: Mapping[str, Stored]) -> dict[int, list[int]]:
    """Layer -> the experts that are left, as the note says; in the right number, each once, in order."""
    kept = {layer_of(block): ids for block, ids in config["moesparse"]["kept_experts"].items()}
    (count,) = {len(ids) for ids in kept.values()}
    holds = dict(_values(config))
    assert {holds[key] for key in COUNTS & holds.keys()} == {count}
    for ids in kept.values():
        assert ids == sorted(set(ids)) and set(ids) <= set(range(8)) and 0 < len(ids) < 8
    return kept


def _values(config: dict):
    for key, value in config.items():
        yield from _values(value) if key == "text_config" else [(key, value)]


def _check_tensors(
    planted: Planted,
    before: Mapping[str, Stored],
    after: Mapping[str, Stored],
    kept: Mapping[int, Sequence[int]],
    pattern: tuple[int, int] | None,
    trained: bool,
) -> dict[str, set[str]]:
    became: dict[str, set[str]] = {
        what: set() for what in ("equal", "pruned", "updated", "cut", "rerouted", "removed", "dropped")
    }
    met = set()
    for name, new in after.items():
        ids, origin = _ids(planted, name, kept), _origin(planted, name, kept)
        met.add(origin)
        matrix = is_matrix(name, new.shape) and name not in planted.beyond
        became[_became(name, before[origin], new, ids, matrix, pattern, trained)].add(name)
    for name in before.keys() - met:
        expert = EXPERT.fullmatch(name)
        if expert and name not in planted.beyond and int(expert[3]) not in kept.get(layer_of(name), range(8)):
            became["removed"].add(name)
        else:
            # with experts, which the config has one count of
            assert kept and name in planted.beyond and "mtp" in planted.oddities, f"{name} is gone"
            became["dropped"].add(name)
    assert not became["dropped"] or became["dropped"] == planted.beyond
    matrices = {name for name in after if is_matrix(name, after[name].shape) and name not in planted.beyond}
    assert matrices
    if pattern is not None:
        assert became["pruned"] == matrices
    if trained:
        assert became["updated"] and became["updated"] <= matrices
    return became


def _ids(planted: Planted, name: str, kept: Mapping[int, Sequence[int]]) -> Sequence[int] | None:
    return None if name in planted.beyond else kept.get(layer_of(name))


def _origin(planted: Planted, name: str, kept: Mapping[int, Sequence[int]]) -> str:
    """What a tensor of the result is called in the source."""
    ids, expert = _ids(planted, name, kept), EXPERT.fullmatch(name)
    return name if ids is None or expert is None else f"{expert[1]}{ids[int(expert[3])]}{expert[4]}"


def _became(
    name: str,
    old: Stored,
    new: Stored,
    ids: Sequence[int] | None,
    matrix: bool,
    pattern: tuple[int, int] | None,
    trained: bool,
) -> str:
    assert new.dtype == old.dtype, (name, old.dtype, new.dtype)
    if new.shape != old.shape:
        assert ids is not None, (name, old.shape, new.shape)
        want = _rows(old.tensor(), new.shape, ids)
        if not matrix:
            assert _bytes(want) == new.data, name
            return "cut"
        old = Stored(old.dtype, new.shape, _bytes(want))
    if new.data == old.data:
        assert ids is None or matrix or not _has_experts(name, old), f"{name} keeps rows of removed experts"
        return "equal"
    if ids is not None and new.dtype == "I64":
        _check_table(old.tensor(), new.tensor(), ids)
        return "rerouted"
    assert matrix, f"{name} has other bytes"
    before, after = old.tensor(), new.tensor()
    if pattern is not None:
        assert _bytes(torch.where(after == 0, 0, before)) == _bytes(torch.where(after == 0, 0, after)), name
        assert holds(after, *pattern) or holds(after.transpose(-1, -2), *pattern), name
        return "pruned"
    assert trained, f"{name} has other bytes"
    assert ((before == 0) == (after == 0)).all() and after.isfinite().all(), name
    return "updated"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _has_experts(name: str, old: Stored) -> bool:
    """Whether a tensor has a row or an entry for every expert: the routers, and what corrects their scores."""
    return 8 in old.shape and bool(re.search(r"router.*weight|\.gate\.(wg\.)?weight|correction_bias|expert_bias", name))


def _rows(old: torch.Tensor, shape: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Those of the kept experts; in a few routers rows of others lie behind them and stay."""
    for dim, (was, now) in enumerate(zip(old.shape, shape, strict=True)):
        if was != now:
            assert was - now == 8 - len(ids), (old.shape, shape)
            old = old.index_select(dim, torch.tensor([*ids, *range(8, was)]))
    return old


def _check_table(old: torch.Tensor, new: torch.Tensor, ids: Sequence[int]) -> None:
    """A table of experts: those that stay have their new number, each token gets as many and none twice."""
    assert new.min() >= 0 and new.max() < len(ids)
    for was, now in zip(old.tolist(), new.tolist(), strict=True):
        assert {ids.index(expert) for expert in was if expert in ids} <= set(now) and len(set(now)) == len(set(was))


def holds(weight: torch.Tensor, n: int, m: int) -> bool:
    """Whether exactly m - n of every m neighbours along the last dim are zero."""
    return weight.shape[-1] % m == 0 and bool(((weight.unflatten(-1, (-1, m)) == 0).sum(-1) == m - n).all())


def _unpacked(folder: Path, before: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a packed folder, dense, by docs/packed-format.md."""
    found = read_tensors(folder)
    masks = {name.removesuffix("_meta"): found.pop(name) for name in list(found) if name.endswith("_meta")}
    assert masks
    for name, mask in masks.items():
        values, bits = found[name].tensor(), mask.tensor()
        chosen = (bits[..., None] >> torch.arange(8) & 1).bool().flatten(-2)
        dense = torch.zeros(chosen.shape, dtype=values.dtype)
        dense[chosen] = values.flatten()
        # a stack that the dense checkpoint holds with its inputs first
        if dense.shape != before[name].shape:
            dense = dense.transpose(-1, -2)
        found[name] = Stored(found[name].dtype, tuple(dense.shape), _bytes(dense))
    return found


def check_config(
    source: Path, result: Path, kept: Mapping[int, Sequence[int]], *, packed: bool = False, dropped: bool = False
) -> None:
    """The text of the source but for counts, and the notes behind it."""
    old, new = ((folder / "config.json").read_bytes().decode() for folder in (source, result))
    was, now = json.loads(old), json.loads(new)
    may = (COUNTS | GROUPS | {"block_configs"} if kept else set()) | (FURTHER if dropped else set()) | NOTES
    assert {key for key in was.keys() | now.keys() if was.get(key, ...) != now.get(key, ...)} <= may
    assert ("quantization_config" in now) == packed
    for key in FURTHER & now.keys() if dropped else ():
        assert not now[key]
    for key in now.keys() - was.keys():
        assert key in NOTES
    head, pieces, tail = members(old)
    head_now, pieces_now, tail_now = members(new)
    texts = [text for key, text in pieces_now if key not in may]
    assert texts == [text for key, text in pieces if key not in may]
    assert (head_now, tail_now) == (head, tail)
    # what changed stands where it stood, and what is new behind it
    order = [key for key, _ in pieces]
    assert [key for key, _ in pieces_now if key in was] == [key for key in order if key in now]
    assert {key for key, _ in pieces_now[len([key for key in order if key in now]) :]} == now.keys() - was.keys()


def members(text: str) -> tuple[str, list[tuple[str, str]], str]:
    """What stands before the members of a JSON object, each by its key with the space before it, and what is behind."""
    start, depth, quoted, escaped, cuts = text.index("{") + 1, 0, False, False, []
    for at in range(start, len(text)):
        char = text[at]
        if quoted:
            quoted, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "{[":
            depth += 1
        elif depth == 0 and char in ",}":
            cuts.append(at)
            if char == "}":
                break
        elif char in "}]":
            depth -= 1
    pieces = [text[a:b] for a, b in zip([start, *(cut + 1 for cut in cuts)], cuts, strict=False)]
    last = pieces[-1]
    pieces[-1] = last.rstrip()
    keyed = [(json.JSONDecoder().raw_decode(piece.strip())[0], piece) for piece in pieces]
    return text[:start], keyed, last[len(pieces[-1]) :] + text[cuts[-1] :]
