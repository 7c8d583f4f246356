"""Where finished layers go: nowhere, because the model is the result, or into a folder that becomes a checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse.calibration.layers import Stored, from_shards
from moesparse.checkpoints.against import check_written
from moesparse.checkpoints.coded import CodedExperts, expert_keys
from moesparse.checkpoints.config_text import QUANTIZATION
from moesparse.checkpoints.edit import SourceFolder, Surplus, surplus
from moesparse.checkpoints.hub import unread_weights
from moesparse.checkpoints.pretrained import note_recipe, write_companions
from moesparse.checkpoints.requantised import requantise
from moesparse.experts.plan_file import ExpertPlan
from moesparse.models.blocks import MoEBlock
from moesparse.models.formats.expert_names import SIDE_FILE
from moesparse.models.formats.rounding import Rounding
from moesparse.models.formats.stored import StoredWeights
from moesparse.models.layers import Layers, RunOptions
from moesparse.models.on_disk import LayersOnDisk
from moesparse.progress import ProgressEvent
from moesparse.system.folders import companions
from moesparse.system.json_text import json_with
from moesparse.system.pieces import Pieces
from moesparse.system.run_folder import Part, RunFolder
from moesparse.system.shard_writer import MAX_SHARD_BYTES
from moesparse.system.shards import Shards
from moesparse.weights.value_formats import Scales, ValueFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["InPlace", "IntoFolder", "Output"]


class InPlace:
    """The model is the result: nothing to write, nothing to go on from.

    Attributes:
        spill: a folder for hidden states that find no room in memory; None keeps them there.
        notes: of each finished layer, in order.
        aside: what was kept aside, in order.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.spill: Path | None = None
        self.notes: list[Any] = []
        self.aside: list[Stored] = []

    def hold(self, position: int, device: torch.device | None) -> AbstractContextManager[Any]:
        """Have a finished layer in memory for the body, as the run left it."""
        return self._layers.hold(position, device)

    def refill(self, position: int, device: torch.device | None) -> None:
        """The same for a layer that is held and has the shapes by now that the run left."""

    def take_scales(self, block: MoEBlock, scales: Sequence[Scales] | None) -> None:
        """By which the matrices of a block that is held were rounded; here nobody stores codes."""

    def round(self, position: int, kept: Sequence[Sequence[int]] = ()) -> Rounding | None:
        """Give the experts of the layer that is held the values that will be stored, before anything is run on them.

        Args:
            position: of the layer.
            kept: as for `keep`.

        Returns:
            How much that has changed; None where they are stored as they are.
        """
        return None

    def pieces(self, position: int) -> Pieces:
        """Where experts of a layer go that are done before all of it is, and are found again; here nowhere."""
        return Pieces(None)

    def keep(self, position: int, note: list[Any] | dict[str, Any], kept: Sequence[Sequence[int]] = ()) -> None:
        """The layer that is held is finished.

        Args:
            position: of the layer.
            note: JSON.
            kept: for each block of the layer the experts that were kept; nothing where none was removed.
        """

    def keep_aside(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors for the run to go on with; they are no part of the result."""
        self.aside.append([(key, tensor.to("cpu").clone) for key, tensor in tensors.items()])

    def surplus(self) -> Surplus:
        """What of the source's tensors the model has no place for: here nobody knows."""
        return {}


class IntoFolder:
    """A run of `RunFolder` whose parts are the layers of a checkpoint on the disk: see `InPlace`. Use `open`.

    The folder becomes the source's, edited: `SourceFolder`.
    """

    def __init__(
        self, run: RunFolder, layers: LayersOnDisk, source: SourceFolder, *, spill: bool, coded: CodedExperts | None
    ) -> None:
        self.run, self._layers, self._source, self._coded = run, layers, source, coded
        self.spill = run.path if spill else None
        self._rounded: dict[str, Tensor] = {}
        self._scales: dict[str, Sequence[Scales]] = {}

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        folder: str | os.PathLike[str],
        layers: LayersOnDisk,
        inputs: Mapping[str, Any],
        options: RunOptions,
        *,
        spill: bool = False,
        mtp: str | None = None,
        values: ValueFormat | None = None,
    ) -> Iterator[IntoFolder]:
        """Start a run or go on with one.

        Args:
            folder: new, empty, or holding an unfinished run.
            layers: whose tensors are written.
            inputs: JSON of everything the result depends on.
            options: `resume`, and `progress`, which hears what has to be done again.
            spill: hidden states go to a file in the folder.
            mtp: what becomes of layers that predict further tokens, as in `SourceFolder`.
            values: of which the experts are stored as codes; None stores them as the source does.

        Raises:
            UsageError, CheckpointError: as `RunFolder.open`; and a file of the source that is a link out of it.
            UnsupportedModelError: no loader would find codes of these values in the checkpoints of this family.
        """
        companions(layers.folder)
        coded = None if values is None else CodedExperts(layers, values)
        source = SourceFolder(layers.folder, layers.model, layers.model.config, layers.shards, mtp)
        how: dict[str, Any] = {"resume": options.resume, "layers": len(layers), "processes": layers.processes}
        with RunFolder.open(folder, inputs, **how) as run:
            if run.redone:
                what = f"redo {run.redone[0]} and what follows: it was damaged"
                options.progress(ProgressEvent(what, 0, 1, "layer"))
            yield cls(run, layers, source, spill=spill, coded=coded)

    @property
    def notes(self) -> Sequence[Any]:
        return [part.note for part in self.run.parts[: len(self._layers)]]

    def hold(self, position: int, device: torch.device | None) -> AbstractContextManager[Any]:
        return self._layers.hold(position, device, self._written(position))

    def refill(self, position: int, device: torch.device | None) -> None:
        self._layers.refill(position, device, self._written(position))

    def _written(self, position: int) -> Shards:
        return self._weights_of(self.run.parts[position])

    def _weights_of(self, part: Part) -> StoredWeights:
        raw, ours = self.run.read(part), self._layers.shards
        return (
            ours.like(raw) if self._coded is None else StoredWeights(raw, [self._coded.format], ours.dtype, ours.where)
        )

    def take_scales(self, block: MoEBlock, scales: Sequence[Scales] | None) -> None:
        if scales is not None:
            self._scales[block.name] = scales

    def round(self, position: int, kept: Sequence[Sequence[int]] = ()) -> Rounding | None:
        ids, blocks = self._ids(position, kept), self._layers.blocks_at(position)
        if not blocks:
            return None
        views = self._layers.checkpoint_tensors(position)
        self._rounded, rounding = requantise(self._source, blocks[0], views, ids)
        return rounding

    def pieces(self, position: int) -> Pieces:
        return self.run.pieces(_part_name(position))

    def keep(self, position: int, note: list[Any] | dict[str, Any], kept: Sequence[Sequence[int]] = ()) -> None:
        ids, views = self._ids(position, kept), self._layers.checkpoint_tensors(position)
        coded, matrices = self._in_codes(position, views), self._expert_keys(position, views)
        plain = {key: view for key, view in views.items() if key not in matrices}
        # what was rounded goes before the source's own rows, which a cut stack is made of
        tensors = self._source.changed(plain, ids) | coded | self._rounded
        self._rounded, self._scales = {}, {}
        others = (self._source.untouched(views, tensors, ids), self._source.shards)
        self.run.write(_part_name(position), tensors, note, max_shard_bytes=MAX_SHARD_BYTES, copies=others)

    def _expert_keys(self, position: int, views: Mapping[str, Tensor]) -> set[str]:
        """Of matrices that are stored as codes."""
        return set() if self._coded is None else expert_keys(views, self._layers.blocks_at(position))

    def _in_codes(self, position: int, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Only the first process writes."""
        blocks = self._layers.blocks_at(position)
        if self._coded is None or not blocks or not self._layers.processes.first:
            return {}
        return self._coded.tensors(views, blocks, self._scales)

    def _ids(self, position: int, kept: Sequence[Sequence[int]]) -> dict[int, Sequence[int]]:
        # a source with several blocks in a layer was refused when it was opened
        return {position: kept[0]} if kept else {}

    @property
    def aside(self) -> Sequence[Stored]:
        return [from_shards(self.run.read(part)) for part in self.run.aside]

    def keep_aside(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.run.write(name, tensors, None, max_shard_bytes=MAX_SHARD_BYTES, aside=True)

    def surplus(self) -> Surplus:
        """What of the source the model has no place for; every layer must be finished."""
        formats = unread_weights(self._layers.folder)
        found = self._source.became(*self._others(), set(self._layers.surplus))
        return found | surplus(formats=formats, quantisation=self._source.left_out)

    def _others(self) -> tuple[dict[str, str], list[str]]:
        parts = self.run.parts[: len(self._layers)]
        held = {key for part in parts for key in self.run.read(part).tensors}
        if self._coded is not None:
            # the matrices that the codes stand for
            held |= {key for part in parts for key in self._weights_of(part).stored}
        return self._source.others(held, self._source.kept())

    def finish(
        self,
        recipe: dict[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        card: str | None,
        report: dict[str, Any] | None,
        plan: ExpertPlan | None = None,
    ) -> None:
        """Write what lies outside of the layers, all of which are finished, and make the folder a checkpoint.

        Args:
            recipe: noted in config.json.
            tokenizer: saved beside the weights.
            card: text of README.md.
            report: written as moesparse_report.json.
            plan: by which experts were removed, written as moesparse_plan.json.
        """

        def write_others(folder: Path) -> None:
            note_recipe(self._layers.model, recipe, report)
            beside: dict[str, Any] = {"card": card, "report": report, "surplus": self.surplus(), "plan": plan}
            write_companions(folder, tokenizer=tokenizer, source=self._layers.folder, **beside)
            for name in self._source.left_out:
                (folder / name).unlink()
            text = self._source.config(bool(dropped), self._source.kept())
            if self._coded is not None:
                text = json_with(text, {(QUANTIZATION,): self._coded.said(self._plain_modules())})
            (folder / "config.json").write_bytes(text.encode())
            side = self._source.side_file(self._source.kept())
            if side is not None:
                (folder / SIDE_FILE).write_text(side, encoding="utf-8")

        copies, dropped = self._others()
        if len(self.run.parts) == len(self._layers):
            others = (copies, self._source.shards)
            self.run.write("outside", {}, [], max_shard_bytes=MAX_SHARD_BYTES, copies=others)
        self.run.assemble(write_others, lambda folder: check_written(folder, self._source))

    def _plain_modules(self) -> list[str]:
        """Names of those of the result whose matrices are not quantised, the head among them also where it is tied."""
        names = {"lm_head"}
        for part in self.run.parts:
            stored = self._weights_of(part)
            for name, info in stored.tensors.items():
                if name not in stored.stored and len(info.shape) == 2 and name.endswith(".weight"):
                    names.add(name.removesuffix(".weight"))
        return sorted(names)


def _part_name(position: int) -> str:
    return f"layer-{position:05d}"


Output = InPlace | IntoFolder
"""What of a run is finished, and what was said of it."""
