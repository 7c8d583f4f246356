"""What a checkpoint folder holds, and whether it is what it says: one expert's matrix in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from moesparse.checkpoints.skeleton import Piece, Skeleton, StoredMatrix, open_skeleton
from moesparse.errors import MoESparseError
from moesparse.packed.experts import META_SUFFIX, MatrixLayout
from moesparse.progress import ProgressEvent, ProgressLike, reporting
from moesparse.system.manifest import MANIFEST_FILE, check_manifest
from moesparse.system.shards import Shards
from moesparse.weights.patterns import Pattern, PatternFinder, check_mask
from moesparse_kernels.row_order import count_kept

__all__ = ["BlockFacts", "Inspection", "TensorFacts", "bad_groups", "inspect_folder"]


@dataclass(frozen=True)
class TensorFacts:
    """One weight of every expert of a block.

    Attributes:
        name: of the parameter, "gate_up_proj".
        shape: (E, out, in) of the dense weight.
        sparsity: share of zeros; of a packed weight, share of what is not stored.
        pattern: the sparsest n:m that holds, else "unstructured" or "dense".
        packed: stored as values and bitmask.
        bytes: on the disk.
        dense_bytes: the same weight dense.
    """

    name: str
    shape: tuple[int, int, int]
    sparsity: float
    pattern: str
    packed: bool
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class BlockFacts:
    """A MoE block: its name in the model, its number of experts, its matrices."""

    name: str
    experts: int
    tensors: list[TensorFacts]


@dataclass
class Inspection:
    """What `inspect_folder` found.

    Attributes:
        format: "packed" when any block is, else "dense", or the formats that quantised weights are stored in.
        blocks: in forward order.
        expert_parameters, other_parameters: of the dense model.
        expert_bytes, other_bytes: on the disk.
        dense_expert_bytes: of the experts if all were dense.
        recipe: how config.json says the model was pruned, or None.
        earlier: the recipes of the commands before the last one.
        verified: what --verify looked at, and how much of it; None without --verify.
        problems: what is off, one sentence each.
    """

    format: str
    blocks: list[BlockFacts] = field(default_factory=list)
    expert_parameters: int = 0
    other_parameters: int = 0
    expert_bytes: int = 0
    dense_expert_bytes: int = 0
    other_bytes: int = 0
    recipe: dict[str, Any] | None = None
    earlier: list[dict[str, Any]] = field(default_factory=list)
    verified: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


def inspect_folder(
    folder: str | os.PathLike[str], *, verify: bool = False, progress: ProgressLike = "auto"
) -> Inspection:
    """Look at a checkpoint folder, dense or packed. Memory: one expert's matrix.

    The zeros of dense experts are counted, always, and compared with the recipe in config.json. Of packed experts only
    headers are read, unless `verify`.

    Args:
        folder: local; see `skeleton.local_folder` for hub ids.
        verify: read everything: the sha256 of each shard against the manifest, the bits of every group in every
            bitmask, and that the tensors are exactly those of the model.
        progress: as in `moesparse.prune`; a function is told after each matrix.

    Raises:
        CheckpointError: the folder is no checkpoint, or so damaged that there is nothing to look at.
        UnsupportedModelError: a model without experts that fit.
    """
    skeleton = open_skeleton(folder)
    result = Inspection(_format(skeleton), recipe=skeleton.recipe, earlier=skeleton.earlier)
    index_bytes = 0
    total = sum(len(block.matrices) for block in skeleton.blocks)
    done = 0
    with reporting(progress) as told:
        told(ProgressEvent("inspect", 0, total, "matrix"))
        for block in skeleton.blocks:
            tensors = []
            for matrix in skeleton.matrices(block):
                if matrix.layout is None:
                    facts, problems = _dense(matrix, skeleton)
                else:
                    facts, problems = _packed(matrix, skeleton.shards), []
                    if verify:
                        for piece in matrix.pieces(skeleton.shards):
                            index = piece.read(skeleton.shards, META_SUFFIX)
                            index_bytes += index.nbytes
                            if problem := bad_groups(piece, index, matrix.layout):
                                problems.append(problem)
                tensors.append(facts)
                result.problems += problems
                done += 1
                told(ProgressEvent("inspect", done, total, "matrix", name=matrix.block))
            result.blocks.append(BlockFacts(block.name, block.num_experts, tensors))
    every = [tensor for block_facts in result.blocks for tensor in block_facts.tensors]
    result.expert_parameters = sum(E * N * K for E, N, K in (tensor.shape for tensor in every))
    result.other_parameters = skeleton.dense_parameters - result.expert_parameters
    result.expert_bytes = sum(tensor.bytes for tensor in every)
    result.dense_expert_bytes = sum(tensor.dense_bytes for tensor in every)
    result.other_bytes = skeleton.shards.raw.nbytes - result.expert_bytes
    if verify:
        hashes = check_manifest(skeleton.folder, skeleton.shards.files)
        result.problems += hashes or []
        result.problems += skeleton.plan.would_not_load
        result.verified = {
            "tensors": len(skeleton.shards.raw.tensors),
            **({"not the model's": len(skeleton.plan.unexpected)} if skeleton.plan.unexpected else {}),
            "shards hashed": len(skeleton.shards.files) if hashes is not None else f"none, there is no {MANIFEST_FILE}",
            "index bytes": index_bytes,
        }
    return result


def _dense(matrix: StoredMatrix, skeleton: Skeleton) -> tuple[TensorFacts, list[str]]:
    shards, finder = skeleton.shards, PatternFinder()
    check, problems = _claim(matrix, skeleton), []
    for piece in matrix.pieces(shards):
        weight = piece.read(shards)
        finder.add(weight)
        if check is not None and (problem := check(weight, piece.key)):
            # one sentence for each matrix, which names the first tensor
            problems, check = [problem], None
    patterns = finder.patterns()
    pattern = str(patterns[0]) if patterns else ("unstructured" if finder.zeros else "dense")
    size = sum(shards.stored_bytes(key) for key in matrix.keys)
    dense = sum(shards.tensors[key].nbytes for key in matrix.keys)
    sparsity = finder.zeros / max(finder.numel, 1)
    return TensorFacts(matrix.name, matrix.shape, sparsity, pattern, False, size, dense), problems


def _format(skeleton: Skeleton) -> str:
    if skeleton.quantised is not None:
        return ", ".join(skeleton.quantised.formats)
    return "packed" if skeleton.packing and skeleton.packing.blocks else "dense"


def _claim(matrix: StoredMatrix, skeleton: Skeleton) -> Callable[[torch.Tensor, str], str | None] | None:
    """A check of the pattern that config.json claims for a dense matrix; None when it claims none."""
    recipe = skeleton.recipe or {}
    claimed, mixed = recipe.get("weights"), recipe.get("patterns")
    if isinstance(mixed, dict):
        in_block = mixed.get(matrix.block)
        claimed = in_block.get(matrix.name) if isinstance(in_block, dict) else None
    if claimed is None or claimed == "dense":
        return None
    try:
        pattern = Pattern.parse(claimed)
    except MoESparseError as error:
        problem = f"config.json claims weights {claimed!r}: {error}"
        return lambda _weight, _key: problem

    def check(weight: torch.Tensor, key: str) -> str | None:
        if check_mask(weight, pattern, name=key).holds:
            return None
        return f"{matrix.block}.{matrix.name} does not hold {claimed} as config.json says: {key}"

    return check


def _packed(matrix: StoredMatrix, shards: Shards) -> TensorFacts:
    layout = matrix.layout
    assert layout is not None
    values = [shards.tensors[key] for key in matrix.keys]
    size = sum(info.nbytes + shards.tensors[info.name + META_SUFFIX].nbytes for info in values)
    dense = sum(info.nbytes for info in values) // layout.n * layout.m
    return TensorFacts(matrix.name, matrix.shape, 1 - layout.n / layout.m, layout.pattern, True, size, dense)


def bad_groups(piece: Piece, index: torch.Tensor, layout: MatrixLayout) -> str | None:
    """What to say of a bitmask [out, in / 8] in which a group does not hold exactly n bits; None when all do."""
    count = count_kept(index, layout.m)
    wrong = (count != layout.n).nonzero()
    if not len(wrong):
        return None
    row, group = wrong[0].tolist()
    expert = "" if piece.entry is None else f"expert {piece.entry}, "
    return (
        f"{piece.key}{META_SUFFIX} must keep exactly {layout.n} of every {layout.m} columns, got "
        f"{int(count[row, group])} in {expert}row {row}, group {group} ({len(wrong)} such groups)"
    )
