"""Whether a checkpoint folder is an edit of another one: what is equal, what has changed and why, what is missing.

Nothing that the writing of a folder has said is believed but how it was pruned; bytes are compared. One expert's matrix
of each folder is in memory, or one other tensor of an odd shape. What is known of the headers alone, names, dtypes and
shapes, is looked at whenever a folder is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.checkpoints.against_stored import became, same_bytes
from moesparse.checkpoints.config_text import CONFIG_KEY, at, dtype_changes
from moesparse.checkpoints.edit import SourceFolder
from moesparse.checkpoints.history import REPORT_FILE
from moesparse.checkpoints.recipe_words import merges
from moesparse.checkpoints.skeleton import Piece, Skeleton, StoredMatrix, open_skeleton
from moesparse.errors import ResultError, UsageError
from moesparse.experts.plan_file import PLAN_FILE
from moesparse.experts.twins import GROUP_KEYS
from moesparse.models.formats.dequantised import DequantisedWeights
from moesparse.models.formats.expert_names import SIDE_FILE, with_kept_experts
from moesparse.models.formats.said import PACKED
from moesparse.models.formats.stored import Stored, StoredWeights
from moesparse.models.formats.written import said_of_values
from moesparse.models.layer_counts import COUNT_KEY, PER_LAYER
from moesparse.models.meta import bare_model, dtype_of, read_config
from moesparse.models.next_token import NEXT_TOKEN_COUNTS, attach, attached, find_next_token_layers
from moesparse.packed.experts import META_SUFFIX
from moesparse.progress import Progress, ProgressEvent, ProgressLike, reporting
from moesparse.system.folders import companions
from moesparse.system.manifest import MANIFEST_FILE, check_manifest
from moesparse.system.shards import Shards, TensorInfo, read_json
from moesparse.weights.value_formats import ValueFormat
from moesparse_kernels import NMWeight

__all__ = ["Comparison", "check_written", "compare_folders"]

# in quantization_config: names of modules that are plain
_PLAIN = ("ignore", "modules_to_not_convert")
_OURS = ("config.json", "README.md", MANIFEST_FILE, PLAN_FILE, REPORT_FILE)


@dataclass
class Comparison:
    """What `compare_folders` found.

    Attributes:
        files: "equal", "changed", "added", "missing", "renumbered" (names of experts), "left out" (of a quantisation
            that is no more) -> names of those beside the weights.
        tensors: what became of a tensor -> names, those of the source where it is gone:
            "equal", "pruned" (zeros, and else the source's values), "updated" (other values where the recipe says so),
            "requantised" (the same of a quantised weight), "rounded" (a plain weight in codes of the format that the
            recipe says), "dequantised" and "cast" (the source's values in the dtype that the recipe says), "cut" (the
            rows of the experts that are left), "rerouted" (a table of experts), "removed" (of an expert), "dropped" (of
            a layer that predicts further tokens); "held" where only headers were looked at.
        config: keys of config.json with another value.
        problems: what nothing explains, one sentence each.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    tensors: dict[str, list[str]] = field(default_factory=dict)
    config: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def compare_folders(
    folder: str | os.PathLike[str], source: str | os.PathLike[str], *, progress: ProgressLike = "auto"
) -> Comparison:
    """Explain every difference between a checkpoint and the one it was made of.

    Args:
        folder: dense or packed by moesparse.
        source: the same.
        progress: as in `moesparse.prune`; a function is told after each tensor.

    Raises:
        CheckpointError: one of them is damaged. UnsupportedModelError: no experts, or some that cannot be read.
    """
    found = Comparison()
    result = _Folder.of(open_skeleton(folder))
    dtypes = [step["output_dtype"] for step in result.steps if step.get("output_dtype")]
    before = _Folder.of(_dequantised(open_skeleton(source), dtypes[0]) if dtypes else open_skeleton(source))
    edit = _edit_of(result, before)
    _compare_files(result, before, edit, found)
    with reporting(progress) as told:
        _Tensors(result, before, edit, found).compare(told)
    return found


def _dequantised(source: Skeleton, dtype: str) -> Skeleton:
    """A quantised source as the plain one that a run has made of it."""
    if source.quantised is None or not isinstance(getattr(torch, dtype, None), torch.dtype):
        return source
    weights = StoredWeights.of_folder(source.folder, getattr(torch, dtype))
    return replace(source, shards=DequantisedWeights(weights, dtype_of(source.folder, read_config(source.folder))))


def _edit_of(result: _Folder, source: _Folder) -> SourceFolder:
    """The edit that a folder is said to be; layers that predict further tokens are looked at where one pruned them.

    Their matrices become parts of both folders.
    """
    model, shards = bare_model(source.folder), source.shards
    if any(step.get("mtp") == "prune" for step in result.steps):
        shapes = {name: info.shape for name, info in shards.tensors.items()}
        if (further := find_next_token_layers(model, shapes)) is not None:
            attach(model, further)
    edit = SourceFolder(source.folder, model, read_config(source.folder), shards, result.steps[-1].get("mtp"))
    kept = edit.kept(result.config.get(CONFIG_KEY))
    for layer in () if (further := attached(model)) is None else further.layers:
        keys = layer.expert_keys(model)
        matrix = StoredMatrix(f"{layer.name}.{layer.experts}", "", (0, 0, 0), None, tuple(keys), False)
        source.parts.update(dict.fromkeys(keys, matrix))
        result.parts.update({key: matrix for key in result.shards.tensors if edit.name_of(key, kept) in keys})
    return edit


def check_written(folder: Path, edit: SourceFolder) -> None:
    """Make sure that a folder which was just written is its source with the changes that were meant.

    The cheap part of `compare_folders`: names, dtypes and shapes of all tensors, config.json, the files beside the
    weights, and that the shards are those of the manifest, by their sizes. Reads headers and small files.

    Args:
        folder: dense or packed by moesparse.
        edit: of its source, by the model that was written: what that model's config says is meant.

    Raises:
        ResultError: names the first thing that nothing explains.
    """
    found = Comparison()
    places = (folder, edit.folder)
    if any(_is_packed(read_json(place / "config.json")) for place in places):
        result, before = (_Folder.of(open_skeleton(place)) for place in places)
    else:
        # also of quantised ones: then every tensor of a weight counts by itself
        shards = Shards.open(folder)
        if not edit.weights.stored and _says_values(read_json(folder / "config.json")):
            shards = StoredWeights.of_folder(folder, edit.weights.dtype)
        result = _Folder.dense(folder, shards)
        before = _Folder.dense(edit.folder, edit.shards)
    _compare_files(result, before, edit, found)
    found.problems += check_manifest(folder, result.shards.files, hashes=False) or []
    _Tensors(result, before, edit, found).compare_headers()
    if found.problems:
        more = f" and {len(found.problems) - 1} more like it" if len(found.problems) > 1 else ""
        raise ResultError(f"{folder} must be {edit.folder} with what was pruned, got: {found.problems[0]}{more}")


@dataclass(frozen=True)
class _Folder:
    """What is asked of a folder.

    Attributes:
        config: its config.json.
        steps: recipes, first to last.
        parts: key of an expert matrix -> how it is stored; nothing where only headers count and it is dense.
        stored: key -> the tensors of a quantised weight.
    """

    folder: Path
    config: dict[str, Any]
    shards: Shards
    steps: list[dict[str, Any]]
    parts: dict[str, StoredMatrix]
    stored: Mapping[str, Stored] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: Skeleton) -> _Folder:
        parts = {key: matrix for block in opened.blocks for matrix in opened.matrices(block) for key in matrix.keys}
        steps = [*opened.earlier, opened.recipe or {}]
        stored = opened.quantised.stored if opened.quantised else {}
        return cls(opened.folder, opened.config, opened.shards, steps, parts, stored)

    @classmethod
    def dense(cls, folder: Path, shards: Shards) -> _Folder:
        """Of headers alone."""
        stored = shards.stored if isinstance(shards, StoredWeights) else {}
        return cls(folder, read_json(folder / "config.json"), shards, [], {}, stored)


def _compare_files(result: _Folder, before: _Folder, edit: SourceFolder, found: Comparison) -> None:
    """Compare what lies beside the weights, of which one file may name experts."""
    folder, source = result.folder, before.folder
    renumbered = edit.side_file(edit.kept(result.config.get(CONFIG_KEY)))
    here, there = ({str(file) for file in companions(place)} - set(_OURS) for place in (folder, source))
    for name in sorted(here | there):
        if name not in there:
            what = "added"
        elif name not in here:
            what = "left out" if name in edit.left_out else "missing"
        elif name == SIDE_FILE and renumbered is not None:
            what = "renumbered" if (folder / name).read_text(encoding="utf-8") == renumbered else "changed"
        else:
            what = "equal" if (folder / name).read_bytes() == (source / name).read_bytes() else "changed"
        found.files.setdefault(what, []).append(name)
        if what in ("missing", "changed"):
            found.problems.append(f"the file {name} of the source is {what}")


class _Tensors:
    """The tensors and the configs of two folders, result and source."""

    def __init__(self, result: _Folder, source: _Folder, edit: SourceFolder, found: Comparison) -> None:
        self._result, self._source, self._edit, self._found = result, source, edit, found
        self._kept = edit.kept(result.config.get(CONFIG_KEY))
        trained = [step["distillation"] for step in result.steps if step.get("distillation")]
        self._merges = any(map(merges, result.steps))
        solved = any(step.get("update", "none") != "none" for step in result.steps)
        self._updates = bool(trained) or solved or self._merges
        self._prunes = any(step.get("weights") or step.get("patterns") for step in result.steps)
        # a router's bias of choice gets no gradient, but is its own
        self._trains_routers = any(each.get("train") == "routers" for each in trained)
        names = {(block.router_name or "").rpartition(".")[2] for block in edit.blocks} - {""}
        self._of_router = re.compile(rf"\.({'|'.join(map(re.escape, sorted(names))) or '(?!)'})\.\w+$")
        self._trains_all = any(each.get("train") == "all" for each in trained)
        self._parts, self._parts_before = result.parts, source.parts

    def compare_headers(self) -> None:
        """Names, dtypes and shapes; and the configs, in which what the model's own says is meant."""
        self._compare_configs({path[-1] for path in self._edit.settings()})
        keys = self._keys()
        for key in keys:
            name = self._edit.name_of(key, self._kept)
            if problem := self._off(key, name):
                self._found.problems.append(f"the tensor {key} {problem}")
            else:
                self._found.tensors.setdefault("held", []).append(key)
        self._compare_missing(set(keys))

    def _keys(self) -> list[str]:
        metas = {f"{key}{META_SUFFIX}" for key, matrix in self._parts.items() if matrix.layout is not None}
        return [key for key in self._result.shards.tensors if key not in metas]

    def _off(self, key: str, name: str) -> str | None:
        """What is wrong with the header of a tensor."""
        new, old = self._result.shards.tensors[key], self._source.shards.tensors.get(name)
        if old is None:
            return "is not in the source"
        if new.dtype != old.dtype and not self._is_rounded(key, name):
            return f"is {new.dtype}, and {old.dtype} in the source"
        before, now = _dense_shape(old, self._parts_before.get(name)), _dense_shape(new, self._parts.get(key))
        if self._edit.fits(key, before, now, self._kept):
            return None
        return f"has the shape {list(now)}, and {list(before)} in the source"

    def compare(self, progress: Progress) -> None:
        self._compare_configs()
        keys = self._keys()
        for done, key in enumerate(keys, start=1):
            name = self._edit.name_of(key, self._kept)
            what = self._became(key, name)
            if what == "equal" and isinstance(self._source.shards, DequantisedWeights):
                what = self._source.shards.form_of(name)
            if what is None:
                self._found.problems.append(f"the tensor {key} is not what the source holds, and nothing says why")
            else:
                self._found.tensors.setdefault(what, []).append(key)
            progress(ProgressEvent("compare", done, len(keys), "tensor", name=key))
        parts = {part for key in keys if key in self._result.stored for part in self._result.stored[key].all_names}
        rounded = {key for key in keys if self._is_rounded(key, self._edit.name_of(key, self._kept))}
        self._compare_missing({key for key in keys if key not in self._result.stored} | parts | rounded)

    def _became(self, key: str, name: str) -> str | None:
        """What became of a tensor of the source; None where it is another for no reason."""
        result, source = self._result.shards, self._source.shards
        if name not in source.tensors:
            return None
        new, old = result.tensors[key], source.tensors[name]
        if self._is_rounded(key, name):
            matrix = self._parts.get(key)
            return "rounded" if matrix and _says_values(self._result.config) and new.shape == old.shape else None
        if new.dtype != old.dtype:
            return None
        if key in self._result.stored or name in self._source.stored:
            return self._stored_became(key, name)
        matrix, before = self._parts.get(key), self._parts_before.get(name)
        if matrix is not None and before is not None:
            return self._experts_became(key, name, matrix, before)
        if new.shape == old.shape and same_bytes(result, key, source, name):
            return "equal"
        routes = self._trains_routers and self._of_router.search(key) is not None
        if (self._trains_all or routes) and new.shape == old.shape:
            return "updated"
        if self._edit.ids_of(key, self._kept) is None or new.torch_dtype is None:
            return None
        if new.shape != old.shape:
            cut = self._edit.cut(key, new.shape, self._kept)
            if cut.shape != new.shape:
                return None
            # biases of experts are merged like their weights
            renewed = self._merges and re.search(r"\bexperts\b.*bias", key)
            return "cut" if cut.equal(result.read(key)) else "updated" if renewed or routes else None
        return None if new.torch_dtype.is_floating_point else "rerouted"

    def _is_rounded(self, key: str, name: str) -> bool:
        """Whether a plain tensor of the source is codes by now."""
        return key in self._result.stored and name not in self._source.stored

    def _stored_became(self, key: str, name: str) -> str | None:
        """The same for a quantised weight."""
        result, source = self._result.shards, self._source.shards
        if not isinstance(result, StoredWeights) or not isinstance(source, StoredWeights):
            return None
        is_stack = len(source.tensors[name].shape) == 3
        found = became(result, key, source, name, self._edit.ids_of(key, self._kept) if is_stack else None)
        if found == "equal" or (found == "pruned" and self._prunes):
            return found
        # zeros come by rounding, too
        return "requantised" if found and self._updates and key in self._parts else None

    def _experts_became(self, key: str, name: str, matrix: StoredMatrix, before: StoredMatrix) -> str | None:
        """The same for the matrices of experts, one at a time."""
        ids, found = self._edit.ids_of(key, self._kept), {"equal"}
        for piece in matrix.pieces(self._result.shards, key):
            entry = piece.entry if ids is None or piece.entry is None else ids[piece.entry]
            new = _dense(piece, matrix, self._result.shards)
            old = _dense(Piece(name, entry, before.transposed), before, self._source.shards)
            if new.shape != old.shape:
                return None
            if not new.equal(old):
                found.add("pruned" if torch.where(new == 0, 0, old).equal(new) else "updated")
        if "updated" in found:
            return "updated" if self._updates else None
        return "pruned" if "pruned" in found else "equal"

    def _compare_missing(self, held: set[str]) -> None:
        metas = {f"{key}{META_SUFFIX}" for key, matrix in self._parts_before.items() if matrix.layout is not None}
        copies, dropped = self._edit.others(held, self._kept)
        for name in copies.values():
            if name not in metas:
                self._found.problems.append(f"the tensor {name} of the source is missing")
        met = {self._edit.name_of(key, self._kept) for key in held} | {*copies.values(), *dropped} | metas
        removed = [name for name in self._source.shards.raw.tensors if name not in met]
        for what, names in (("removed", removed), ("dropped", dropped)):
            if names:
                self._found.tensors[what] = names

    def _compare_configs(self, meant: Collection[str] = ()) -> None:
        pruned, dropped = bool(self._kept), self._edit.mtp == "drop"
        dtype = self._edit.output_dtype
        dtypes = {} if dtype is None else dtype_changes(self._source.config, dtype)
        for path in _differing(self._source.config, self._result.config):
            self._found.config.append(".".join(path))
            ours = path[0] == CONFIG_KEY or (path[0] == "quantization_config" and self._quantization_follows())
            ours |= path in dtypes and at(self._result.config, path[:-1]).get(path[-1]) == dtype
            further = path[-1] in NEXT_TOKEN_COUNTS
            count = COUNT_KEY.fullmatch(path[-1].removeprefix("mtp_")) or path[-1] in GROUP_KEYS
            count = count or PER_LAYER in path
            if not (ours or (pruned and (count or further)) or (dropped and further) or path[-1] in meant):
                self._found.problems.append(f"{'.'.join(path)} of config.json has another value")

    def _quantization_follows(self) -> bool:
        """Whether quantization_config is what packing, or the removal of experts that it names, makes of it."""
        if _says_values(self._result.config) and not self._edit.weights.stored:
            return True
        if self._edit.output_dtype is not None:
            return "quantization_config" not in self._result.config or _is_packed(self._result.config)
        if _is_packed(self._source.config) or _is_packed(self._result.config):
            return True
        said = with_kept_experts(self._source.config.get("quantization_config"), self._kept)
        return self._result.config.get("quantization_config") == said


def _is_packed(config: Mapping[str, Any]) -> bool:
    said = config.get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == PACKED


def _says_values(config: Mapping[str, Any]) -> bool:
    """Whether quantization_config is that of the values to which a recipe in the note has rounded."""
    recipe = (config.get(CONFIG_KEY) or {}).get("recipe") or {}
    said = config.get("quantization_config")
    try:
        values = ValueFormat.parse(recipe.get("values") or "")
    except UsageError:
        return False
    if values.scale_dtype is None or not isinstance(said, dict):
        return False
    wanted = (said_of_values(values, [], stacked=stacked) for stacked in (False, True))
    return any({**said, name: []} == {**each, name: []} for each in wanted for name in _PLAIN if name in each)


def _dense(piece: Piece, matrix: StoredMatrix, shards: Shards) -> Tensor:
    """A piece [out, in] with its zeros."""
    values = piece.read(shards)
    if matrix.layout is None:
        return values
    n, m = matrix.layout.n, matrix.layout.m
    shape = (1, values.shape[0], values.shape[1] // n * m)
    index = piece.read(shards, META_SUFFIX)
    return NMWeight(values[None], index[None], shape, n, m, "row", values.dtype).unpack_expert(0)


def _dense_shape(info: TensorInfo, matrix: StoredMatrix | None) -> tuple[int, ...]:
    """[..., out, in] of a tensor with its zeros; as it is stored where it is not known to be an expert's."""
    if matrix is None:
        return info.shape
    *outer, rows, columns = info.shape
    if matrix.layout is not None:
        columns = columns // matrix.layout.n * matrix.layout.m
    return (*outer, columns, rows) if matrix.transposed else (*outer, rows, columns)


def _differing(
    before: Mapping[str, Any], after: Mapping[str, Any], path: Sequence[str] = ()
) -> Iterator[tuple[str, ...]]:
    """Paths of keys that two objects do not have alike."""
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, (*path, key))
        elif (key in before) != (key in after) or old != new:
            yield (*path, key)
