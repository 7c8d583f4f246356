"""A result as its source folder edited: the source's own bytes, but for those that the work has changed.

transformers reads a checkpoint into a model and may write another one: without the tensors it has no place for, with
every tensor in one dtype, with a config.json and a generation_config.json that it derived. So the model is asked for
what was changed, and for nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesparse.checkpoints.config_text import (
    CONFIG_KEY,
    QUANTIZATION,
    at,
    deepest,
    differences,
    dtype_changes,
    renamed,
    spellings,
)
from moesparse.errors import UnsupportedModelError
from moesparse.experts.surgery import KEPT_KEY
from moesparse.models.blocks import decoder_layers, find_moe_blocks
from moesparse.models.formats.dequantised import QUANTISATION_FILES, DequantisedWeights
from moesparse.models.formats.expert_names import SIDE_FILE, with_kept_experts
from moesparse.models.formats.stored import StoredWeights
from moesparse.models.keys import layers_prefix
from moesparse.models.layer_counts import COUNT_KEY
from moesparse.models.meta import bare_model
from moesparse.models.next_token import NEXT_TOKEN_COUNTS, attached, is_next_token
from moesparse.models.opener import text_part
from moesparse.system.json_text import json_with, json_without
from moesparse.system.shards import Shards, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["SourceFolder", "Surplus", "say_surplus", "surplus"]

_EXPERTS = re.compile(r"\bexperts\b")
_ONE_EXPERT = re.compile(r"(.*?\bexperts\.)(\d+)(\..*)")

Surplus = dict[str, list[str]]
"""Tensors of a source that the model has no place for: "carried" over as they are, or "left" out; and of layers that
predict further tokens (MTP): "mtp" carried over as they are, "mtp pruned" or cut, and "dropped".

"formats" are files: weights that lie beside those that were read and were not copied. So are "quantisation", which say
how weights were quantised that are plain by now.
"""


def surplus(**found: list[str]) -> Surplus:
    """What became of them; empty when there were none."""
    return {what.replace("_", " "): names for what, names in found.items() if names}


def say_surplus(found: Surplus) -> list[str]:
    """A sentence for each thing that became of them."""
    said = []
    for what, why in (
        ("carried", "carried over as they are, for the model has no place for them"),
        ("mtp", "carried over as they are; they predict tokens further ahead (MTP)"),
        ("mtp pruned", "pruned like the others; they predict tokens further ahead (MTP)"),
        ("dropped", "dropped, with the layers that predict tokens further ahead (MTP): the result has none"),
        ("left", "left out, for the model was written as transformers writes it, which has no place for them"),
        ("quantisation", "left out, for the weights are not quantised any more"),
        ("formats", "not copied, for they are weights that were not read and that nothing has pruned"),
    ):
        names = found.get(what, [])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said.append(f"{', '.join(names[:3])}{more}: {why}.")
    return said


class SourceFolder:
    """The checkpoint folder that a result is an edit of.

    Attributes:
        weights: of the folder, quantised ones as matrices.
        shards: its tensors as they lie there.

    Args:
        folder: a checkpoint.
        model: that was read from the folder.
        config: as transformers reads it there.
        shards: of the folder, when they are open.
        mtp: what becomes of layers that predict further tokens: "prune", "keep" or "drop"; None keeps them, but for
            those whose experts config.json could not count. Where the model has them they are pruned with it.

    Raises:
        UnsupportedModelError: several MoE blocks in one decoder layer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        config: PreTrainedConfig,
        shards: Shards | None = None,
        mtp: str | None = None,
    ) -> None:
        self.folder, self.mtp = Path(folder), mtp
        self.weights = (
            shards if isinstance(shards, StoredWeights) else StoredWeights.of_folder(self.folder, model.dtype)
        )
        self.shards = self.weights.raw
        self._model, self._before = model, config.to_dict()
        self._noted = self._before.get(CONFIG_KEY)
        self.blocks = find_moe_blocks(model)
        # a text model that was taken out of the folder's wrapper: where its settings lie, and what its blocks are there
        self._place: tuple[str, ...] = ()
        self._names: dict[str, str] = {}
        self._model_type = str(model.config.model_type)
        place, part = text_part(config)
        if place and type(model.config) is type(part):
            self._place, self._model_type = place, str(config.model_type)
            self._before = part.to_dict()
            inside = find_moe_blocks(bare_model(self.folder))
            self._names = {ours.name: theirs.name for ours, theirs in zip(self.blocks, inside, strict=True)}
        if len({block.layer for block in self.blocks}) < len(self.blocks):
            raise UnsupportedModelError(
                f"{type(model).__name__} must have one MoE block in a layer, got one with several"
            )
        layers, _ = decoder_layers(model, self.blocks)
        further = attached(model)
        self._layers = len(layers) if further is None else further.trunk
        self._further = {} if further is None else {layer.stored: layer.number for layer in further.layers}
        self._prefix = layers_prefix(model, self.blocks[0])
        self._of_a_layer = re.compile(rf"{re.escape(self._prefix)}(\d+)\.")

    def kept(self, noted: Mapping[str, Any] | None = None) -> dict[int, list[int]]:
        """Decoder layer -> for each of its experts that are left the number it has in the folder.

        Only layers that lost some. What the configs note of removals is read, here and in the folder.

        Args:
            noted: in the config of the result; None is the model's.
        """
        now = (noted or getattr(self._model.config, CONFIG_KEY, None) or {}).get(KEPT_KEY) or {}
        now = renamed(now, self._names)
        then = (self._noted or {}).get(KEPT_KEY) or {}
        found: dict[int, list[int]] = {}
        for block in self.blocks:
            name = self._names.get(block.name, block.name)
            if name not in now or now[name] == then.get(name):
                continue
            ids = now[name]
            if name in then:
                ids = [then[name].index(each) for each in ids]
            found[int(block.layer.rpartition(".")[2])] = ids
        return found

    def changed(self, views: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """Tensors of the model as the folder stores them.

        Those of the model's and the folder's one dtype are the views themselves. In another dtype an entry is the
        folder's where the model still holds what was read, and the model's value where it does not; such a tensor is in
        memory twice. A quantised weight is the folder's own, whatever the model holds; of a stack of experts those that
        are left are read, and one of a single expert is not here but among the `others`.

        Args:
            views: key in the checkpoint -> tensor of the model, as it is now.
            kept: as `kept` gives it.

        Returns:
            Key -> tensor, of the keys that the folder has.
        """
        found: dict[str, Tensor] = {}
        for key, view in views.items():
            name = self.name_of(key, kept)
            if name in self.weights.stored:
                found |= self._stacked(name, kept)
                continue
            info = self.shards.tensors.get(name)
            if info is None:
                continue
            found[key] = view
            if info.torch_dtype != view.dtype or view.dtype != self._model.dtype:
                found[key] = self._as_stored(key, view.cpu(), kept)
        return found

    def untouched(
        self, views: Mapping[str, Tensor], held: Collection[str], kept: Mapping[int, Sequence[int]]
    ) -> dict[str, str]:
        """The tensors of quantised weights that are as they were, for a layer to lie together.

        Args:
            views: key in the checkpoint -> tensor of the model; those on the meta device count not.
            held: names in the result that are written otherwise.
            kept: as `kept` gives it.

        Returns:
            Name in the result -> name in the folder, to be copied.
        """
        names = [self.name_of(key, kept) for key, view in views.items() if not view.is_meta]
        parts = [part for name in names if name in self.weights.stored for part in self.weights.names_of(name)]
        found = {self._key_of(part, kept): part for part in parts}
        return {key: part for key, part in found.items() if key is not None and key not in held}

    def _key_of(self, name: str, kept: Mapping[int, Sequence[int]]) -> str | None:
        """What a tensor of the folder is called in the result; None where its expert is gone. See `name_of`."""
        expert, ids = _ONE_EXPERT.fullmatch(name), self.ids_of(name, kept)
        if expert is None or ids is None:
            return name
        number = int(expert[2])
        return f"{expert[1]}{list(ids).index(number)}{expert[3]}" if number in ids else None

    def missing(self, keys: Collection[str], kept: Mapping[int, Sequence[int]]) -> list[str]:
        """Keys of a model that the folder does not have."""
        return [key for key in keys if self.name_of(key, kept) not in self.weights.tensors]

    def others(self, held: Collection[str], kept: Mapping[int, Sequence[int]]) -> tuple[dict[str, str], list[str]]:
        """What of the folder is in the result besides the tensors that the model holds.

        A layer behind the last that has experts (of those that predict tokens further ahead) has as many as the others,
        and its config mostly one count for all: when the others lose some it cannot stay, see `mtp`.

        Args:
            held: keys of the result.
            kept: as `kept` gives it.

        Returns:
            Key in the result -> name in the folder, to be copied; and names of the folder that cannot stay.
        """
        found = {self._key_of(name, kept): name for name in self.shards.tensors}
        copies = {key: name for key, name in found.items() if key is not None and key not in held}
        dropped = self._dropped(copies, bool(kept))
        for key in dropped:
            del copies[key]
        return copies, dropped

    def _dropped(self, keys: Collection[str], removed: bool) -> list[str]:
        """What does not stay of layers behind the last."""
        if self.mtp == "drop":
            return [key for key in keys if self.is_next_token(key)]
        if self.mtp is not None or not removed or self.counts_apart:
            return []
        behind = {self._group(key) for key in keys if _EXPERTS.search(key)} - {None}
        return [key for key in keys if self._group(key) in behind]

    def is_next_token(self, name: str) -> bool:
        """Whether a tensor of the folder is of a layer that predicts further tokens, or in front or behind of it."""
        return is_next_token(name, self._prefix, self._layers)

    @property
    def counts_apart(self) -> list[tuple[str, ...]]:
        """Where config.json says how many experts layers have that predict further tokens, in a key of its own."""
        held = read_json(self.folder / "config.json")
        places = ((), *((key,) for key, value in held.items() if isinstance(value, dict)))
        return [
            (*where, key)
            for where in places
            for key, value in at(held, where).items()
            if key.startswith("mtp_") and COUNT_KEY.fullmatch(key.removeprefix("mtp_")) and type(value) is int
        ]

    def became(self, copies: Mapping[str, str], dropped: list[str], strange: Collection[str]) -> Surplus:
        """What became of tensors that the model has no place for, and of layers that predict further tokens.

        Args:
            copies, dropped: as `others` gives them.
            strange: names in the folder that the model has no place for.
        """
        further = [name for name in self.shards.tensors if self.is_next_token(name)]
        copied = {*copies.values()}
        return surplus(
            carried=[key for key, name in copies.items() if name in strange and not self.is_next_token(name)],
            mtp=[name for name in further if name in copied],
            mtp_pruned=[name for name in further if self._further and name not in copied and _EXPERTS.search(name)],
            dropped=dropped,
        )

    def config(self, dropped: bool, kept: Mapping[int, Sequence[int]]) -> str:
        """The text of config.json with the values that have changed, under the folder's own keys, and the note.

        Args:
            dropped: layers that predict tokens further ahead are no longer there.
            kept: as `kept` gives it.
        """
        file, config = self.folder / "config.json", self._model.config
        held = read_json(file)
        changes: dict[tuple[str, ...], Any] = {}
        for path, value in differences(self._before, config.to_dict()):
            where = deepest(held, (*self._place, *path[:-1]))
            names = spellings(config, path)
            parent = at(held, where)
            there = [key for key in names if key in parent]
            changes |= {(*where, key): value for key in there or names}
        if dropped:
            for where in ((), *((key,) for key, value in held.items() if isinstance(value, dict))):
                for key in NEXT_TOKEN_COUNTS:
                    if at(held, where).get(key):
                        changes[(*where, key)] = 0
        cut = [len(kept[number]) for number in self._further.values() if number in kept]
        changes |= {path: cut[0] for path in self.counts_apart if cut}
        said = held.get(QUANTIZATION)
        if isinstance(said, dict):
            named = with_kept_experts(said, kept)
            changes |= {(QUANTIZATION, key): named[key] for key in said if named.get(key) != said[key]}
        if self.output_dtype is not None:
            changes |= dtype_changes(held, self.output_dtype)
        noted = getattr(config, CONFIG_KEY, None)
        if noted is not None:
            changes[(CONFIG_KEY,)] = renamed(noted, self._names)
        # as bytes: reading as text would make every end of a line the same
        text = json_with(file.read_bytes().decode(), changes)
        return text if self.output_dtype is None else json_without(text, QUANTIZATION)

    @property
    def output_dtype(self) -> str | None:
        """In which the weights of a quantised folder are plain in the result; None where they stay what they are."""
        plain = isinstance(self.weights, DequantisedWeights)
        return str(self.weights.dtype).removeprefix("torch.") if plain else None

    @property
    def left_out(self) -> list[str]:
        """Files of the folder that would say of the result how it is quantised, which it is not."""
        return [] if self.output_dtype is None else [n for n in QUANTISATION_FILES if (self.folder / n).is_file()]

    def side_file(self, kept: Mapping[int, Sequence[int]]) -> str | None:
        """The text of the file that says again how weights are quantised, where it names experts; None elsewhere."""
        file = self.folder / SIDE_FILE
        said = read_json(file) if kept and file.is_file() and self.output_dtype is None else {}
        named = with_kept_experts(said, kept)
        changes: dict[tuple[str, ...], Any] = {(key,): named[key] for key in said if named.get(key) != said[key]}
        return json_with(file.read_text(encoding="utf-8"), changes) if changes else None

    def _stacked(self, name: str, kept: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """The tensors of a stack of quantised experts, of those that are left."""
        ids = self.ids_of(name, kept)
        if ids is None or not self.weights.is_stacked(name):
            return {}
        return {
            part: self.shards.read(part, codes=True).index_select(0, torch.tensor(list(ids)))
            for part in self.weights.names_of(name)
        }

    def _group(self, key: str) -> str | None:
        """What a tensor belongs to that is in no decoder layer of the model; None for what is in one."""
        layer = self._of_a_layer.match(key)
        if layer:
            return layer[0] if int(layer[1]) >= self._layers else None
        parts = key.split(".")
        return ".".join(parts[:2] if parts[0] == "model" else parts[:1])

    def ids_of(self, key: str, kept: Mapping[int, Sequence[int]]) -> Sequence[int] | None:
        """The experts that were kept of the layer a tensor is in; None where none was removed."""
        number = next((number for stored, number in self._further.items() if key.startswith(stored)), None)
        layer = self._of_a_layer.match(key)
        if number is None and layer:
            number = int(layer[1])
        return None if number is None else kept.get(number)

    def name_of(self, key: str, kept: Mapping[int, Sequence[int]]) -> str:
        """What a key of the result is called in the folder."""
        ids, expert = self.ids_of(key, kept), _ONE_EXPERT.fullmatch(key)
        if ids is None or expert is None or int(expert[2]) >= len(ids):
            return key
        return f"{expert[1]}{ids[int(expert[2])]}{expert[3]}"

    def cut(self, key: str, shape: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Tensor:
        """A tensor of the folder, of the kept experts where the shape that it has in the result says so."""
        stored, ids = self.shards.read(self.name_of(key, kept)), self.ids_of(key, kept)
        if ids is not None and stored.ndim == len(shape):
            for dim, (before, now) in enumerate(zip(stored.shape, shape, strict=True)):
                if before > now >= len(ids):
                    # a few routers have rows for others behind those of the experts
                    behind = range(before - (now - len(ids)), before)
                    stored = stored.index_select(dim, torch.tensor([*ids, *behind]))
        return stored

    def fits(self, key: str, before: Sequence[int], now: Sequence[int], kept: Mapping[int, Sequence[int]]) -> bool:
        """Whether a tensor has the shape that it has in the folder, but for the experts that were removed."""
        if len(before) != len(now):
            return False
        ids = self.ids_of(key, kept)
        shrunk = [(then, by_now) for then, by_now in zip(before, now, strict=True) if then != by_now]
        return not shrunk or (ids is not None and all(then > by_now >= len(ids) for then, by_now in shrunk))

    @property
    def model_type(self) -> str:
        """Of the folder that the model belongs to: its own, or that of the wrapper it was taken out of."""
        return self._model_type

    def settings(self) -> list[tuple[str, ...]]:
        """Paths of what the model's config says otherwise than the folder's, but for the note and what loading sets."""
        return [path for path, _ in differences(self._before, self._model.config.to_dict())]

    def _as_stored(self, key: str, view: Tensor, kept: Mapping[int, Sequence[int]]) -> Tensor:
        """A tensor of the model in the dtype of the folder, with the folder's entries where the model has those."""
        stored = self.cut(key, view.shape, kept)
        if stored.shape != view.shape:
            return view.to(stored.dtype)
        # transformers keeps some tensors in float32 and has them go through the model's dtype on the way there
        read = (stored.to(view.dtype) == view) | (stored.to(self._model.dtype).to(view.dtype) == view)
        return torch.where(read, stored, view.to(stored.dtype))
