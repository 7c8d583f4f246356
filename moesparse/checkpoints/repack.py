"""Pack and unpack checkpoints on the disk: tensor by tensor, one expert's matrix in memory, whole or not at all.

What `moesparse.pack` does to a model in memory, for folders of any size. Tensors keep the names and the layout that the
source has, one per expert or all in one; a packed one gets its bitmask beside it (docs/packed-format.md). Unpacking
gives back the tensors that were packed, bit for bit, but for the sign of pruned zeros: those become +0.0.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from moesparse.checkpoints.against import check_written
from moesparse.checkpoints.card import card_in_form
from moesparse.checkpoints.edit import SourceFolder
from moesparse.checkpoints.history import tell_surplus
from moesparse.checkpoints.hub import unread_weights
from moesparse.checkpoints.inspection import bad_groups
from moesparse.checkpoints.skeleton import Skeleton, StoredMatrix, open_skeleton
from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.models.meta import bare_model, read_config
from moesparse.packed.experts import META_SUFFIX, PACKED_DTYPES
from moesparse.packed.model import choose_among, nothing_to_pack
from moesparse.progress import Progress, ProgressEvent, ProgressLike, reporting
from moesparse.system.folders import atomic_folder, check_output_folder, copy_companions
from moesparse.system.json_text import json_with, json_without
from moesparse.system.manifest import MANIFEST_FILE, write_manifest
from moesparse.system.shard_writer import MAX_SHARD_BYTES, ShardWriter
from moesparse.system.shards import TensorInfo, TensorSpec
from moesparse.weights.patterns import Pattern, PatternFinder
from moesparse_kernels import NMWeight

if TYPE_CHECKING:
    from moesparse.packed.quantizer import MoESparseConfig

__all__ = ["FolderReport", "pack_folder", "unpack_folder"]

_PACKING = "quantization_config"


@dataclass
class FolderReport:
    """What `pack_folder` or `unpack_folder` did.

    Attributes:
        bytes_before: of all expert matrices, on the disk.
        bytes_after: the same afterwards.
        packed: block name -> parameter name -> "n:m", of the blocks that were packed or unpacked.
        dense: block name -> why it stays dense.
        negative_zeros: pruned weights that were -0.0 and come back as +0.0.
        shards: files written.
        formats: weight files of the source that were not copied.
    """

    bytes_before: int = 0
    bytes_after: int = 0
    packed: dict[str, dict[str, str]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    negative_zeros: int = 0
    shards: int = 0
    formats: list[str] = field(default_factory=list)


def pack_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressLike = "auto",
) -> FolderReport:
    """Pack the experts of a checkpoint folder whose weights hold n:m patterns; the rest is copied as it is.

    The weights are read twice: to find the patterns, which must hold for all experts of a matrix, and to pack. Memory:
    one expert's matrix [out, in] with its temporaries.

    Args:
        source: a dense checkpoint with zeros.
        out: a new or empty folder; it appears whole or not at all.
        max_shard_bytes: of one safetensors file.
        progress: as in `moesparse.prune`; a function is told after each matrix.

    Raises:
        CheckpointError: `source` is damaged or packed already, or `out` cannot be written.
        UnsupportedModelError: a model without experts that fit, or whose family's checkpoints cannot hold packed ones.
        MoESparseError: no block holds a pattern worth packing.
    """
    check_output_folder(out)
    skeleton = open_skeleton(source)
    if skeleton.packing is not None:
        raise CheckpointError(f"IN must be a dense checkpoint, got {source}, which is packed already")
    if skeleton.quantised is not None:
        raise UnsupportedModelError(
            f"IN must hold plain weights, got {source} in {', '.join(skeleton.quantised.formats)}: n:m weights of "
            "quantised values are not packed yet; pruned with output_dtype='bfloat16' they are plain, and can be"
        )
    with reporting(progress) as told:
        return _pack(skeleton, out, max_shard_bytes, told)


def _pack(skeleton: Skeleton, out: str | os.PathLike[str], max_shard_bytes: int, progress: Progress) -> FolderReport:
    from moesparse.packed.quantizer import MoESparseConfig

    report = FolderReport()
    matrices = {block.name: skeleton.matrices(block) for block in skeleton.blocks}
    report.bytes_before = sum(_nbytes(matrix, skeleton) for group in matrices.values() for matrix in group)
    report.packed, report.dense = _find_patterns(skeleton, matrices, progress)
    if not report.packed:
        raise nothing_to_pack(report.dense)
    is_turned = {block.name: block.is_transposed for block in skeleton.blocks}
    turned = [
        f"{name}.{matrix.name}"
        for name in report.packed
        for matrix in matrices[name]
        if matrix.transposed != is_turned[name]
    ]
    packing = MoESparseConfig(report.packed, recipe=skeleton.recipe, turned=turned)
    parts = {key: matrix for name in report.packed for matrix in matrices[name] for key in matrix.keys}
    specs: list[TensorSpec] = []
    for key, info in skeleton.shards.tensors.items():
        if key in parts:
            specs += _packed_specs(info, parts[key], *_group(report.packed, parts[key]))
        else:
            specs.append(info)

    def convert(writer: ShardWriter, key: str) -> None:
        n, m = _group(report.packed, parts[key])
        for piece in parts[key].pieces(skeleton.shards, key):
            weight = piece.read(skeleton.shards)
            packed = NMWeight.pack(weight[None], n=n, m=m)
            report.negative_zeros += _negative_zeros(weight) - _negative_zeros(packed.values)
            writer.write(key, packed.values[0], piece.entry)
            writer.write(key + META_SUFFIX, packed.index[0], piece.entry)

    _check_family(skeleton, packing, specs)
    config = json_with(_config_text(skeleton), {(_PACKING,): packing.to_dict()})
    report.shards, report.formats = _write(skeleton, out, specs, convert, parts, config, max_shard_bytes, progress)
    kept = sum(_nbytes(matrix, skeleton) for name in report.dense for matrix in matrices[name])
    names = {name for key in parts for name in (key, key + META_SUFFIX)}
    report.bytes_after = kept + sum(spec.nbytes for spec in specs if spec.name in names)
    return report


def unpack_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressLike = "auto",
) -> FolderReport:
    """Make a packed checkpoint folder dense, with zeros: what any program reads. Memory: one expert's matrix [out, in].

    Args:
        source: a packed checkpoint.
        out: a new or empty folder; it appears whole or not at all.
        max_shard_bytes: of one safetensors file.
        progress: as in `moesparse.prune`; a function is told after each matrix.

    Raises:
        CheckpointError: `source` is damaged or not packed, or `out` cannot be written.
    """
    check_output_folder(out)
    skeleton = open_skeleton(source)
    if skeleton.packing is None:
        raise CheckpointError(f"IN must be a packed checkpoint, got {source}, which is dense already")
    with reporting(progress) as told:
        return _unpack(skeleton, out, max_shard_bytes, told)


def _unpack(skeleton: Skeleton, out: str | os.PathLike[str], max_shard_bytes: int, progress: Progress) -> FolderReport:
    report = FolderReport()
    parts: dict[str, StoredMatrix] = {}
    transposed = set()
    turned = set(getattr(skeleton.packing, "turned", ()))
    for block in skeleton.blocks:
        for matrix in skeleton.matrices(block):
            report.bytes_before += _nbytes(matrix, skeleton)
            if matrix.layout is not None:
                report.packed.setdefault(block.name, {})[matrix.name] = matrix.layout.pattern
                parts |= dict.fromkeys(matrix.keys, matrix)
                if block.is_transposed != (f"{block.name}.{matrix.name}" in turned):
                    transposed |= set(matrix.keys)
    metas = {key + META_SUFFIX for key in parts}
    specs = []
    for key, info in skeleton.shards.tensors.items():
        if key in parts:
            specs.append(_dense_spec(info, parts[key], key in transposed))
        elif key not in metas:
            specs.append(info)

    def convert(writer: ShardWriter, key: str) -> None:
        layout = parts[key].layout
        assert layout is not None
        for piece in parts[key].pieces(skeleton.shards, key):
            values, index = piece.read(skeleton.shards), piece.read(skeleton.shards, META_SUFFIX)
            if problem := bad_groups(piece, index, layout):
                raise CheckpointError(f"{skeleton.folder} is damaged: {problem}")
            shape = (1, values.shape[0], values.shape[1] // layout.n * layout.m)
            weight = NMWeight(values[None], index[None], shape, layout.n, layout.m, "row", values.dtype)
            dense = weight.unpack_expert(0)
            writer.write(key, dense.t() if key in transposed else dense, piece.entry)

    config = json_without(_config_text(skeleton), _PACKING)
    report.shards, report.formats = _write(skeleton, out, specs, convert, parts, config, max_shard_bytes, progress)
    report.bytes_after = report.bytes_before - sum(skeleton.shards.tensors[name].nbytes for name in {*parts, *metas})
    report.bytes_after += sum(spec.nbytes for spec in specs if spec.name in parts)
    return report


def _config_text(skeleton: Skeleton) -> str:
    return (skeleton.folder / "config.json").read_bytes().decode()


def _nbytes(matrix: StoredMatrix, skeleton: Skeleton) -> int:
    suffixes = ("",) if matrix.layout is None else ("", META_SUFFIX)
    return sum(skeleton.shards.tensors[key + suffix].nbytes for key in matrix.keys for suffix in suffixes)


def _find_patterns(
    skeleton: Skeleton, matrices: Mapping[str, Sequence[StoredMatrix]], progress: Progress
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The patterns of the blocks that can be packed, by parameter, and why the others cannot."""
    packed: dict[str, dict[str, str]] = {}
    dense: dict[str, str] = {}
    total, done, started = sum(map(len, matrices.values())), 0, time.perf_counter()
    progress(ProgressEvent("find patterns", 0, total, "matrix"))
    for name, group in matrices.items():
        choices: dict[str, Pattern | str] = {}
        for matrix in group:
            choices[matrix.name] = _choose(matrix, skeleton)
            done += 1
            progress(
                ProgressEvent("find patterns", done, total, "matrix", seconds=time.perf_counter() - started, name=name)
            )
        reasons = [f"{key} {choice}" for key, choice in choices.items() if isinstance(choice, str)]
        if reasons:
            dense[name] = "; ".join(reasons)
        else:
            packed[name] = {key: str(choice) for key, choice in choices.items()}
    return packed, dense


def _choose(matrix: StoredMatrix, skeleton: Skeleton) -> Pattern | str:
    dtypes = {skeleton.shards.tensors[key].dtype: skeleton.shards.tensors[key].torch_dtype for key in matrix.keys}
    if len(dtypes) > 1:
        return f"is of several dtypes, {', '.join(sorted(dtypes))}, and must be of one"
    ((name, dtype),) = dtypes.items()
    if dtype not in PACKED_DTYPES:
        return f"is {name}, which cannot be packed"
    finder = PatternFinder()
    for piece in matrix.pieces(skeleton.shards):
        finder.add(piece.read(skeleton.shards))
    return choose_among(finder.patterns(), dtype, matrix.shape[-1])


def _group(patterns: Mapping[str, Mapping[str, str]], matrix: StoredMatrix) -> tuple[int, int]:
    group = Pattern.parse(patterns[matrix.block][matrix.name]).group
    assert group is not None
    return group


def _packed_specs(info: TensorInfo, matrix: StoredMatrix, n: int, m: int) -> list[TensorSpec]:
    """The kept values and the bitmask of a tensor [..., out, in], or [..., in, out] when it is stored transposed."""
    *outer, rows, columns = info.shape
    if matrix.transposed:
        rows, columns = columns, rows
    return [
        TensorSpec(info.name, info.dtype, (*outer, rows, columns // m * n)),
        TensorSpec(info.name + META_SUFFIX, "U8", (*outer, rows, columns // 8)),
    ]


def _dense_spec(info: TensorInfo, matrix: StoredMatrix, transposed: bool) -> TensorSpec:
    assert matrix.layout is not None
    *outer, rows, kept = info.shape
    columns = kept // matrix.layout.n * matrix.layout.m
    return TensorSpec(info.name, info.dtype, (*outer, columns, rows) if transposed else (*outer, rows, columns))


def _negative_zeros(weight: Tensor) -> int:
    return int(((weight == 0) & weight.signbit()).sum())


def _check_family(skeleton: Skeleton, packing: MoESparseConfig, specs: Sequence[TensorSpec]) -> None:
    """Make sure, before anything is written, that transformers will load what is written as it loads the source.

    Raises:
        UnsupportedModelError: it would not; names the tensor.
    """
    from moesparse.packed.conversions import packed_conversions, plan_loading
    from moesparse.packed.quantizer import insert_packed

    conversions = packed_conversions(skeleton.conversions, packing.blocks)
    insert_packed(skeleton.model, packing)
    plan = plan_loading(skeleton.model, conversions, {spec.name: spec.shape for spec in specs})
    new = [problem for problem in plan.problems if problem not in skeleton.plan.problems]
    if new:
        raise UnsupportedModelError(f"this family's checkpoints cannot hold packed experts: {new[0]}")


def _write(
    skeleton: Skeleton,
    out: str | os.PathLike[str],
    specs: Sequence[TensorSpec],
    convert: Callable[[ShardWriter, str], None],
    converted: Collection[str],
    config: str,
    max_shard_bytes: int,
    progress: Progress,
) -> tuple[int, list[str]]:
    """Write the folder: shards, the other small files, config, manifest, index, and look at it once more.

    Args:
        config: text of config.json.

    Returns:
        Number of shards, and weight files of the source that were not copied.
    """
    formats = unread_weights(skeleton.folder)
    written = {spec.name for spec in specs}
    keys = [key for key in skeleton.shards.tensors if key in written]
    started = time.perf_counter()
    progress(ProgressEvent("write", 0, len(keys), "tensor"))
    with atomic_folder(out) as work:
        with ShardWriter(work, specs, max_shard_bytes) as writer:
            for done, key in enumerate(keys, start=1):
                if key in converted:
                    convert(writer, key)
                else:
                    writer.copy(key, skeleton.shards.parts(key))
                progress(ProgressEvent("write", done, len(keys), "tensor", seconds=time.perf_counter() - started))
        copy_companions(skeleton.folder, work, leave=("config.json", "README.md", MANIFEST_FILE))
        card = skeleton.folder / "README.md"
        if card.is_file():
            text = card_in_form(card.read_text(errors="replace"), packed=_PACKING in json.loads(config))
            (work / "README.md").write_text(text)
        if formats:
            tell_surplus(work, {"formats": formats})
        (work / "config.json").write_bytes(config.encode())
        write_manifest(work, writer.files)
        writer.write_index()
        twin, read = bare_model(skeleton.folder), read_config(skeleton.folder)
        check_written(work, SourceFolder(skeleton.folder, twin, read, skeleton.shards))
        return len(writer.files), formats
