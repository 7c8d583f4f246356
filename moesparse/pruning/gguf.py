"""Experts removed from a GGUF file: blocks of bytes are copied or left out, whatever they are quantised to.

llama.cpp stacks the experts of a layer along the slowest dimension, so an expert is one run of bytes in every tensor.
Router rows, biases and selection biases go with it, and the counts in the metadata; all else stays byte for byte. The
result computes what the whole model does with the removed experts never chosen.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moesparse._version import __version__
from moesparse.checkpoints.gguf import GGUFFiles, Items, Slices, output_files, sliceable, write_files
from moesparse.errors import CheckpointError, UnsupportedModelError, UsageError
from moesparse.experts.origin import QUANTIZED_TOLERANCE, ROUTER_TOLERANCE, Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.experts.router_groups import RouterGroups
from moesparse.experts.scores_file import ExpertScores
from moesparse.experts.selection import choose_experts
from moesparse.models.fingerprint import router_sketch
from moesparse.progress import ProgressEvent, ProgressLike, reporting
from moesparse.system.run_folder import claimed

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

__all__ = ["GGUFModel", "GGUFReport", "plan_from_scores", "prune_gguf", "removal_noted"]

NOTE = "moesparse.plan"
"""Metadata of a result: JSON of criterion, statistics, experts before, and for each layer the ids that were kept."""

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_ROWS = re.compile(r"(ffn_(gate|up|down|gate_up)_exps\.(weight|bias)|ffn_gate_inp\.(weight|bias)|exp_probs_b(\.\w+)?)")
_SCALES = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.\w+")
# shared experts, a norm for all of them, a router's scale of its input, experts of attention with their own count
_WHOLE = re.compile(
    r"ffn_\w+_shexp\.\w+|ffn_gate_inp_shexp\.\w+|ffn_norm_exps\.\w+|ffn_gate_inp\.\w+|attn_\w+_exps\.\w+"
)
_STRANGE = {
    "tid2eid": "a table sends tokens to experts by their number",
    "chexps": "groups of its experts share further ones",
    "exp_probs_b_vl": "it has a second selection bias, for images",
}
_LONE = re.compile(r"ffn_(gate|up|down)\.\d+\.\w+")


@dataclass
class GGUFReport:
    """What `prune_gguf` did.

    Attributes:
        files: that were written.
        architecture: of the model.
        criterion: of the choice.
        experts: of a layer before.
        kept: of a layer, now.
        layers: that lost experts.
        types: what their tensors are quantised to.
        routers: "compared" with the plan's, "compared, quantised" with a wide tolerance, or "not compared" where the
            plan has none.
        dropped: tensors of layers that predict further tokens, which the plan does not name.
        bytes_before, bytes_after: of all files.
    """

    files: list[str]
    architecture: str
    criterion: str
    experts: int
    kept: int
    layers: list[int]
    types: list[str]
    routers: str
    dropped: list[str]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


class GGUFModel:
    """The experts of a GGUF model.

    Attributes:
        files: it lies in.
        experts: E of every layer that has some.
        used: experts a token uses.
        groups: of the router, or None.
        ahead: numbers of the layers that predict further tokens (MTP).
    """

    def __init__(self, files: GGUFFiles) -> None:
        """Look at names and shapes.

        Raises:
            UnsupportedModelError: no experts, counts by layer, or a tensor with experts that cannot be placed; named.
        """
        self.files = files
        count, used = files.own("expert_count"), files.own("expert_used_count")
        if type(count) is not int or count < 1:
            what = "a count for each layer" if isinstance(count, list) else "none"
            raise UnsupportedModelError(
                f"the model must have one {files.architecture}.expert_count, got {what}; moesparse prunes "
                "Mixture-of-Experts models"
            )
        self.experts, self.used = count, used if type(used) is int else 1
        number = files.own("expert_group_count") or 1
        top = files.own("expert_group_used_count") or number
        # llama.cpp ranks a group by its two best experts
        self.groups = RouterGroups(number, top, 2) if number > 1 else None
        blocks, ahead = files.own("block_count") or 0, files.own("nextn_predict_layers") or 0
        self.ahead = range(blocks - ahead, blocks)
        self._by_layer: dict[int, list[str]] = {}
        for name in files.tensors:
            found = _BLOCK.fullmatch(name)
            if found and self._has_rows(name, found[2]):
                self._by_layer.setdefault(int(found[1]), []).append(name)
        for layer in [each for each, names in self._by_layer.items() if not any("_exps." in name for name in names)]:
            del self._by_layer[layer]
        if not self._by_layer:
            raise UnsupportedModelError(f"the model must hold blk.N.ffn_*_exps, got none in {files.paths[0]}")

    def _has_rows(self, name: str, rest: str) -> bool:
        """Whether a tensor of a layer has a row for each expert."""
        tensor, family = self.files.tensors[name], self.files.architecture
        for part, why in _STRANGE.items():
            if part in rest:
                raise UnsupportedModelError(f"{family}: {name} cannot be cut: {why}")
        if _LONE.fullmatch(rest):
            raise UnsupportedModelError(
                f"{family}: {name} is one expert alone, a form that llama.cpp no longer writes; convert the model again"
            )
        if not (_ROWS.fullmatch(rest) or _SCALES.fullmatch(rest)):
            if "exp" in rest and not _WHOLE.fullmatch(rest):
                raise UnsupportedModelError(f"{family}: {name} has to do with experts in a way that is not known here")
            return False
        rows = int(tensor.shape[-1])
        if rows == 1 and not _ROWS.fullmatch(rest):
            return False
        if rows != self.experts or not sliceable(tensor):
            raise UnsupportedModelError(
                f"{family}: {name} must have its slowest dimension for {self.experts} experts, got "
                f"{tensor.shape.tolist()} in {tensor.tensor_type.name}"
            )
        return True

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers with experts, those that predict further tokens left out."""
        return [layer for layer in sorted(self._by_layer) if layer not in self.ahead]

    def names(self, layer: int) -> list[str]:
        """Tensors of a layer with a row for each expert."""
        return self._by_layer.get(layer, [])

    @cached_property
    def quantized_router(self) -> bool:
        """Whether a router is stored in fewer bits than 16."""
        kinds = {self._router(layer).tensor_type.name for layer in self.layers if self._router(layer) is not None}
        return bool(kinds - {"F32", "F16", "BF16"})

    def origin(self, layers: list[int]) -> Origin:
        """Of these layers, as a plan knows the model."""
        down = self.files.tensors.get(f"blk.{layers[0]}.ffn_down_exps.weight")
        router = self._router(layers[0])
        sketches = [self._sketch(layer) for layer in layers]
        return Origin(
            layers=tuple(layers),
            experts=self.experts,
            hidden_size=None if router is None else int(router.shape[0]),
            intermediate_size=None if down is None else int(down.shape[0]),
            routers=tuple(None if each is None else tuple(each.tolist()) for each in sketches),
            model_type=self.files.architecture,
            tolerance=QUANTIZED_TOLERANCE if self.quantized_router else ROUTER_TOLERANCE,
        )

    def _router(self, layer: int) -> Any:
        return self.files.tensors.get(f"blk.{layer}.ffn_gate_inp.weight")

    def _sketch(self, layer: int) -> Tensor | None:
        router = self._router(layer)
        return None if router is None else router_sketch(torch.from_numpy(values_of(router)))


def values_of(tensor: ReaderTensor) -> np.ndarray[Any, Any]:
    """float32, the slowest dimension first, whatever it is quantised to."""
    from gguf.quants import dequantize

    return np.array(dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type), dtype=np.float32)


def plan_from_scores(
    model: GGUFModel,
    scores: ExpertScores,
    criterion: str,
    *,
    keep: int | None = None,
    remove: float | None = None,
    divisible_by: int | None = None,
) -> ExpertPlan:
    """A plan for a GGUF model from scores of a file.

    Args:
        model: they are of.
        scores: of the model or of a copy of it.
        criterion: one of theirs.
        keep, remove, divisible_by: as in `choose_experts`.

    Raises:
        CalibrationError: scores of another model.
        UsageError: a criterion that is not there; counts that cannot be.
    """
    origin = model.origin(model.layers)
    scores.check(origin)
    count: dict[str, Any] = {"keep": keep, "remove": remove, "divisible_by": divisible_by}
    kept = choose_experts(scores.by(criterion), **count, top_k=model.used, groups=model.groups)
    return ExpertPlan.of(scores.origin, kept, criterion, scores.statistics)


def prune_gguf(
    source: str | os.PathLike[str] | GGUFModel,
    out: str | os.PathLike[str],
    plan: ExpertPlan,
    *,
    progress: ProgressLike = "auto",
) -> GGUFReport:
    """Remove experts from a GGUF model, into new files.

    Reads what stays once and writes it; memory: metadata, one router, and a buffer. Every type that the gguf package
    knows is copied as it is. A model in files of a split becomes one in as many. Layers that predict further tokens
    (nextn) and have experts are cut where the plan names them, else dropped: llama.cpp has one count for all layers.

    Args:
        source: a file, or one of the files of a split.
        out: NAME.gguf; for a split NAME-00001-of-0000N.gguf and so on. It appears whole or not at all.
        plan: which experts stay; of this model or of a copy of it in any form.
        progress: as in `moesparse.prune`; a function is called with every tensor.

    Raises:
        CalibrationError: the plan of another model.
        UsageError: a plan that merges experts; kept counts that differ by layer, fewer than a token uses, or that its
            groups do not allow.
        UnsupportedModelError: no experts, or some that cannot be placed.
        CheckpointError: a file cannot be read or written.
    """
    if plan.merged:
        raise UsageError(
            "plan must remove experts to be carried out on a GGUF file, whose bytes are copied, got one that merges "
            f"them ({plan.method})"
        )
    model = source if isinstance(source, GGUFModel) else GGUFModel(GGUFFiles(source))
    files, out = model.files, Path(out)
    extra = [layer for layer in model.ahead if model.names(layer)]
    named = [layer for layer in extra if layer in plan.origin.layers]
    layers = [*model.layers, *named]
    origin = model.origin(layers)
    plan.check(origin)
    values = _values(model, plan)
    slices: dict[str, Slices | None] = {}
    for layer, kept in zip(layers, plan.kept, strict=True):
        slices |= dict.fromkeys(model.names(layer), _runs(kept))
    dropped = []
    if len(named) < len(extra):
        dropped = [name for name in files.tensors if (found := _BLOCK.fullmatch(name)) and int(found[1]) in model.ahead]
        slices |= dict.fromkeys(dropped)
        values |= _values_without(model, len(dropped))
    done = 0
    with reporting(progress) as told, claimed(out):

        def tell(name: str) -> None:
            nonlocal done
            told(ProgressEvent("cut", done, len(files.tensors) - len(dropped), "tensor", name=name))
            done += 1

        paths = output_files(files, out)
        write_files(files, paths, slices, values, tell)
    cut = [name for layer in layers for name in model.names(layer) if "_exps.weight" in name]
    compared = any(router is not None for router in plan.origin.routers)
    how = "compared, quantised" if model.quantized_router else "compared"
    return GGUFReport(
        files=[str(path) for path in paths],
        architecture=files.architecture,
        criterion=plan.criterion,
        experts=model.experts,
        kept=len(plan.kept[0]),
        layers=layers,
        types=sorted({files.tensors[name].tensor_type.name for name in cut}),
        routers=how if compared else "not compared",
        dropped=dropped,
        bytes_before=files.nbytes,
        bytes_after=sum(path.stat().st_size for path in paths),
    )


def _values(model: GGUFModel, plan: ExpertPlan) -> dict[str, Any]:
    """Counts and note of the result; a plan that llama.cpp could not load is refused."""
    counts = {layer: len(ids) for layer, ids in zip(plan.origin.layers, plan.kept, strict=True)}
    family, (first, count) = model.files.architecture, next(iter(counts.items()))
    for layer, other in counts.items():
        if other != count:
            raise UsageError(
                f"plan must keep equally many experts in every layer of a GGUF model, got {count} in layer {first} and "
                f"{other} in layer {layer}: llama.cpp reads one {family}.expert_count"
            )
    if count < model.used:
        raise UsageError(
            f"plan must keep at least the {model.used} experts that a token uses ({family}.expert_used_count), got "
            f"{count}"
        )
    values: dict[str, Any] = {f"{family}.expert_count": count}
    if model.groups is not None:
        left = {
            model.groups.left(torch.tensor(ids), model.experts, model.used, f"blk.{layer}")
            for layer, ids in zip(plan.origin.layers, plan.kept, strict=True)
        }
        if len(left) > 1:
            raise UsageError(f"plan must leave as many groups in every layer, got {sorted(left)}")
        values[f"{family}.expert_group_count"] = left.pop()
    return values | {"moesparse.version": __version__, NOTE: _note(model, plan)}


def _note(model: GGUFModel, plan: ExpertPlan) -> str:
    """JSON of the ids in the model before any removal, through one that was noted earlier."""
    earlier = removal_noted(model) or {}
    before = earlier.get("kept", {})
    kept = {
        str(layer): [before[str(layer)][each] for each in ids] if str(layer) in before else list(ids)
        for layer, ids in zip(plan.origin.layers, plan.kept, strict=True)
    }
    said = {"criterion": plan.criterion, "statistics": plan.statistics}
    return json.dumps({**said, "experts": earlier.get("experts", model.experts), "kept": kept})


def removal_noted(model: GGUFModel) -> dict[str, Any] | None:
    """What an earlier removal has noted in the model, see NOTE; None where there was none.

    Raises:
        CheckpointError: the note is none of ours.
    """
    text = model.files.value(NOTE)
    if text is None:
        return None
    try:
        found = json.loads(text)
        fits = all(len(ids) == model.experts for ids in found["kept"].values()) and "criterion" in found
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{NOTE} must be JSON that names the experts kept, got {text[:80]!r}") from error
    if not fits:
        raise CheckpointError(f"{NOTE} must name {model.experts} experts kept in each layer, got {text[:80]!r}")
    return found


def _values_without(model: GGUFModel, dropped: int) -> dict[str, Any]:
    """Metadata of a model without its layers that predict further tokens, which are the last ones."""
    files, family = model.files, model.files.architecture
    blocks = files.own("block_count")
    values: dict[str, Any] = {f"{family}.block_count": model.ahead.start, f"{family}.nextn_predict_layers": 0}
    for key, field in files.readers[0].fields.items():
        if key.startswith(f"{family}.") and isinstance(field.contents(), list) and len(field.contents()) == blocks:
            values[key] = Items(model.ahead.start)
    if (count := files.value("split.tensors.count")) is not None:
        values["split.tensors.count"] = count - dropped
    return values


def _runs(kept: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ascending ids as runs, first and behind the last."""
    runs: list[tuple[int, int]] = []
    for number in kept:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
