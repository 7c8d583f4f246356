"""What a model makes of a text, layer by layer: its hidden states behind the last layer, and the experts it chose.

The hidden states of all windows go through one layer after the other (moesparse.models.stream), so that neither the
model nor its logits are ever whole in memory. In a `RunFolder` they survive a stop: those behind the last finished
layer are there, and the pass goes on from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moesparse.models.blocks import MoEBlock
from moesparse.models.experts_function import experts_watched
from moesparse.models.layers import RunOptions
from moesparse.models.on_disk import LayersOnDisk
from moesparse.models.stream import LayerStream, logits_behind
from moesparse.progress import ProgressEvent
from moesparse.system.run_folder import Part, RunFolder
from moesparse.system.shard_writer import MAX_SHARD_BYTES
from moesparse.system.shards import Shards

__all__ = ["Chosen", "FinalStates", "drop_states", "find_part", "pass_through"]

Chosen = dict[str, Tensor]
"""Block name -> [T, K] int16, the experts that its router chose for each token that counts, in the order of the text; E
and above where a slot is empty."""


class Noting(Protocol):
    """What is done with the choices of a layer once it has run; the JSON it gives is kept with the layer."""

    def __call__(self, position: int, blocks: Sequence[MoEBlock], chosen: Chosen) -> Any: ...


@dataclass(frozen=True, eq=False)
class FinalStates:
    """Hidden states of all windows behind the last layer, in a file.

    Attributes:
        layers: of the model; what lies outside of them makes logits of the states.
        forms: `LayerStream.forms`.
        notes: what `Noting` gave of each layer.
    """

    layers: LayersOnDisk
    forms: list[int | None]
    notes: list[Any]
    _shards: Shards

    def __len__(self) -> int:
        """Batches."""
        return len(self._shards.tensors)

    def __getitem__(self, number: int) -> Tensor:
        """[b, t, ...] of a batch of windows, read now."""
        return self._shards.read(_name(number))

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """[b, t, V] float32, of states [b, t, ...] of tokens [b, t], on the device of the model's head."""
        embedding: Any = self.layers.model.get_input_embeddings()
        device = embedding.weight.device
        found = logits_behind(self.layers.model, self.layers.layers, self.forms, ids.to(device), hidden.to(device))
        return found.float()


def find_part(run: RunFolder, name: str) -> Part | None:
    """A finished part that lies aside, by its name."""
    return next((part for part in run.aside if part.name == name), None)


def pass_through(
    run: RunFolder,
    name: str,
    layers: LayersOnDisk,
    ids: Tensor,
    mask: Tensor | None,
    options: RunOptions,
    note: Noting,
    *,
    counted: Tensor | None,
    every_layer: bool,
    spill: bool,
) -> FinalStates:
    """Send windows through all layers of a model, or go on with that.

    Holds what lies outside of the layers, one layer, and the hidden states unless they spill. Reads the model twice.

    Args:
        run: keeps the hidden states, and in the end holds them alone.
        name: of the model within the run.
        layers: of the model, opened.
        ids: [n, t] int64.
        mask: [n, t] bool, True where a token is real, or None.
        options: batch size, device, progress.
        note: told of the choices of every layer.
        counted: [n, t] bool, True for tokens whose choices are noted; None for all.
        every_layer: keep the states of every layer, so that a run that is stopped goes on behind it.
        spill: keep waiting hidden states in the folder of the run, not in memory.

    Raises:
        UnsupportedModelError: running the layers one by one is not what the model does.
        CalibrationError: a layer gives values that are not finite.
    """
    total = len(layers)
    held = _last_states(run, name)
    if held is not None and held.note["layer"] == total - 1:
        return FinalStates(layers, held.note["forms"], held.note["notes"], run.read(held))

    def checked(position: int) -> None:
        options.progress(ProgressEvent(f"check {name}", position, total, "layer"))

    # behind causal layers nobody sees padding that lies at the end, and a mask may take [t, t] values a window
    leads = mask is not None and not bool(mask[:, 0].all())
    stream = layers.stream(ids, mask if leads else None, options, checked, run.path if spill else None)
    notes: list[Any] = []
    start = 0
    if held is not None:
        shards, notes, start = run.read(held), list(held.note["notes"]), held.note["layer"] + 1
        for number in range(len(stream)):
            stream.hidden[number] = shards.read(_name(number))
    for position in range(start, total):
        options.progress(ProgressEvent(f"run {name}", position, total, "layer", layer=position, layers=total))
        chosen = _run_layer(stream, layers, position, counted)
        notes.append(note(position, layers.blocks_at(position), chosen))
        if every_layer or position == total - 1:
            tensors = {_name(number): hidden for number, hidden in enumerate(stream.hidden)}
            about = {"layer": position, "forms": stream.forms, "notes": notes}
            new = run.write(
                f"{name}-states-{position:05d}", tensors, about, max_shard_bytes=MAX_SHARD_BYTES, aside=True
            )
            if held is not None:
                run.drop(held)
            held = new
    assert held is not None
    options.progress(ProgressEvent(f"run {name}", total, total, "layer", layer=total, layers=total))
    return FinalStates(layers, stream.forms, notes, run.read(held))


def drop_states(run: RunFolder, name: str) -> None:
    """Remove the hidden states of a model that nobody reads any more."""
    held = _last_states(run, name)
    if held is not None:
        run.drop(held)


def _last_states(run: RunFolder, name: str) -> Part | None:
    """Of the layer furthest on; an earlier one's is there where a run was stopped before it removed it."""
    found = [part for part in run.aside if part.name.startswith(f"{name}-states-")]
    for part in found[:-1]:
        run.drop(part)
    return found[-1] if found else None


def _run_layer(stream: LayerStream, layers: LayersOnDisk, position: int, counted: Tensor | None) -> Chosen:
    """Run one layer over all batches and put its output in the place of the hidden states."""
    noted: dict[str, list[Tensor]] = {}

    def watch(block: str, _hidden: Tensor, top_k: Tensor, _gates: Tensor, _out: Tensor) -> None:
        noted.setdefault(block, []).append(top_k.reshape(-1, top_k.shape[-1]).to("cpu", torch.int16))

    with stream.on_device(position), ExitStack() as stack:
        for block in layers.blocks_at(position):
            stack.enter_context(experts_watched(block, partial(watch, block.name)))
        for _ in stream.run(position, keep=True):
            pass
    keep = None if counted is None else counted.flatten().cpu()
    chosen = {block: torch.cat(parts) for block, parts in noted.items()}
    return {block: ids if keep is None else ids[keep] for block, ids in chosen.items()}


def _name(number: int) -> str:
    return f"hidden.{number:05d}"
