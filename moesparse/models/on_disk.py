"""A checkpoint as a transformers model of which only one decoder layer is in memory.

The model is built on the meta device; what lies outside of the decoder layers (embedding, norms, head) is loaded and
stays, a layer is filled from its safetensors shards while it is held. Parameters keep their identity when they come and
go, so whoever found the blocks of the model once may keep them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.errors import CheckpointError, NotInPiecesError, UnsupportedModelError, UsageError
from moesparse.models.blocks import decoder_layers
from moesparse.models.formats.dequantised import DequantisedWeights
from moesparse.models.formats.said import PACKED, said_of
from moesparse.models.formats.stored import StoredWeights
from moesparse.models.keys import checkpoint_views
from moesparse.models.layers import Layers
from moesparse.models.meta import dtype_of, meta_model, read_config, source_of
from moesparse.models.next_token import Behind, attach, attached, check_runs, find_next_token_layers
from moesparse.system.memory import return_free_memory
from moesparse.system.processes import Processes
from moesparse.system.shards import Shards, TensorInfo, reading

__all__ = ["LayersOnDisk"]


class LayersOnDisk(Layers):
    """A checkpoint folder whose decoder layers come into memory one at a time.

    Making it takes config.json alone. `open`, or the first layer that is held, looks at the shards and loads what lies
    outside of the layers. From then on that is in memory, with the layer held at the moment, and while one is filled
    one tensor of the checkpoint beside it. A fused parameter is filled expert by expert. Quantised weights are
    dequantised while they are read.

    Attributes:
        model: the transformers model in eval mode; parameters of layers that are not held are on the meta device.
        blocks: its MoE blocks.
        layers: its decoder layers.
        outside: names in the state dict of what lies outside of them.
        said: how weights are quantised, quantization_config; None when none are. Which of them are, `shards` knows.
        output_dtype: in which the weights of a quantised checkpoint are plain here; None when it stays quantised.
        surplus: tensors of the folder that the model has no place for, once it was opened.
    """

    whole = False

    def __init__(self, folder: str | os.PathLike[str], *, output_dtype: str | None = None) -> None:
        """Build the model without its weights.

        Args:
            folder: a checkpoint of safetensors under the names that transformers saves, or "demo".
            output_dtype: have a quantised checkpoint as a plain one in this dtype of torch; None leaves it quantised.

        Raises:
            CheckpointError: no config that transformers knows.
            UnsupportedModelError: no experts, or experts that cannot be handled in pieces; named.
            UsageError: an output dtype for a checkpoint that is not quantised.
        """
        self.folder, self.output_dtype = Path(source_of(folder)), output_dtype
        self.said = said_of(self.folder)
        if output_dtype is not None and self.packed:
            raise UsageError(
                f"output_dtype must be left out for {self.folder}, which is packed, got {output_dtype!r}: moesparse "
                "unpack makes it dense"
            )
        if output_dtype is not None and self.said is None:
            raise UsageError(
                f"output_dtype must be left out for {self.folder}, which is not quantised, got {output_dtype!r}: a "
                "result keeps the dtypes of its source"
            )
        self.model = meta_model(self.folder, "auto" if output_dtype is None else getattr(torch, output_dtype))
        self.surplus: list[str] = []
        self._shards: StoredWeights | None = None
        self._lay_out()
        if self.packed and self.blocks[0].is_transposed:
            raise UnsupportedModelError(
                f"{self.folder} must be dense to be read layer by layer, got packed experts of "
                f"{type(self.model).__name__}, which transformers holds the other way round: make it dense with "
                "`moesparse unpack`"
            )

    def _lay_out(self) -> None:
        self.find_blocks()
        layers, self.prefix = decoder_layers(self.model, self.blocks)
        self.layers: Sequence[nn.Module] = list(layers)
        self.outside: list[str] = []
        self._inside: list[list[str]] = [[] for _ in self.layers]
        pattern = re.compile(rf"{re.escape(self.prefix)}\.(\d+)\.")
        for name in self.model.state_dict():
            found = pattern.match(name)
            (self._inside[int(found[1])] if found else self.outside).append(name)

    @property
    def packed(self) -> bool:
        """Whether experts are stored as packed n:m weights."""
        return self.said is not None and self.said.get("quant_method") == PACKED

    @classmethod
    def of(cls, source: str | os.PathLike[str] | LayersOnDisk, output_dtype: str | None = None) -> LayersOnDisk:
        """A folder opened; what was made of one before is opened and used up."""
        layers = source if isinstance(source, LayersOnDisk) else cls(source, output_dtype=output_dtype)
        if layers.output_dtype != output_dtype:
            raise UsageError(f"output_dtype must be {layers.output_dtype!r}, as for the source, got {output_dtype!r}")
        return layers.open()

    def open(self) -> LayersOnDisk:
        """Look at the headers of the shards and load what lies outside of the layers, once.

        Raises:
            CheckpointError: a tensor is missing or of another shape, or contradicts quantization_config.
            NotInPiecesError: it has another name than transformers would save it under; transformers may still load
                such a checkpoint.
        """
        if self._shards is None:
            shards = self._checked()
            self._fill(self.outside, None, shards)
            self.model.tie_weights()
            self._shards = shards
        return self

    def check_headers(self) -> None:
        """Refuse what `open` would refuse, from the headers of the shards alone; without shards config.json is all.

        Raises:
            CheckpointError, NotInPiecesError: as `open`.
        """
        if self._shards is None and any(self.folder.glob("*.safetensors")):
            self._checked()

    def _checked(self) -> StoredWeights:
        shards = self.headers
        self._check_keys(shards)
        shards.check_plain(name for name in shards.tensors if name not in self.surplus)
        return shards

    @cached_property
    def headers(self) -> StoredWeights:
        """Of the shards, as they say it; whether they fit the model is asked by `check_headers` and `open`."""
        weights = StoredWeights.of_folder(self.folder, self.model.dtype, packed=True)
        if self.output_dtype is None:
            return weights
        return DequantisedWeights(weights, dtype_of(self.folder, read_config(self.folder)))

    def add_next_token_layers(self, *, run: bool) -> None:
        """Have the layers with experts that predict further tokens as further layers behind the last, once.

        Args:
            run: text will go through them.

        Raises:
            UnsupportedModelError: one is like no layer of the model, or cannot be run; named.
        """
        if attached(self.model) is None:
            shards = self.headers
            found = find_next_token_layers(self.model, {name: info.shape for name, info in shards.tensors.items()})
            if found is None:
                return
            if run:
                check_runs(found)
            attach(self.model, found)
            self._lay_out()
            if self._shards is not None:
                self._check_keys(self._shards)

    @property
    def behind(self) -> Behind | None:
        found = attached(self.model)
        if found is None or len(found.layers) > 1 or not found.norm:
            return None
        norm = self.model.get_submodule(found.norm)
        embedding: Any = self.model.get_input_embeddings()
        return Behind(self.layers[found.trunk], found.layers[0].template, embedding, norm)

    @property
    def shards(self) -> StoredWeights:
        """Of the folder."""
        shards = self.open()._shards
        assert shards is not None
        return shards

    @property
    def processes(self) -> Processes:
        """Those of torch.distributed's default group, which may have come since."""
        return Processes.current()

    def __len__(self) -> int:
        return len(self.layers)

    def name(self, position: int) -> str:
        return f"{self.prefix}.{position}"

    def in_order(self) -> Sequence[nn.Module]:
        self.open()
        return self.layers

    def state(self, position: int) -> dict[str, Tensor]:
        """Name in the state dict -> tensor of a layer."""
        state = self.model.state_dict()
        return {name: state[name] for name in self._inside[position]}

    def waiting(self) -> dict[str, Tensor]:
        """Name in the state dict -> tensor of all layers, on the meta device but for the layer that is held."""
        state, outside = self.model.state_dict(), set(self.outside)
        return {name: tensor for name, tensor in state.items() if name not in outside}

    def checkpoint_tensors(self, position: int | None) -> dict[str, Tensor]:
        """Key in a checkpoint -> view of the tensors of a layer, or of what lies outside (None).

        They are meta tensors when the layer is not held. A tied weight appears once.
        """
        state = self.model.state_dict(keep_vars=True)
        names = self.outside if position is None else self._inside[position]
        tied = getattr(self.model, "all_tied_weights_keys", {})
        return self._views({name: state[name].data for name in names if name not in tied}, self._shards)

    def _views(self, state: Mapping[str, Tensor], shards: Shards | None) -> dict[str, Tensor]:
        """`checkpoint_views`, by the names and in the form of the folder."""
        found, own = attached(self.model), dict(state)
        views: dict[str, Tensor] = {}
        for layer in found.layers if found is not None else ():
            theirs = {name: own.pop(name) for name in state if name.startswith(f"{layer.name}.")}
            if theirs:
                views |= layer.views(self.model, theirs)
        return checkpoint_views(self.model, own, shards) | views

    @contextlib.contextmanager
    def hold(self, position: int, device: torch.device | None = None, shards: Shards | None = None) -> Iterator[None]:
        """Have one layer in memory for the body, while the system reads ahead for the next.

        It stays in memory when the body ends by an exception.

        Args:
            position: of the layer.
            device: where to; None is the CPU.
            shards: read it from here instead of the model's own folder, under the same keys.
        """
        self._fill(self._inside[position], device, shards or self.shards)
        if position + 1 < len(self.layers):
            self.shards.read_ahead(key for key in self.checkpoint_tensors(position + 1) if key in self.shards.tensors)
        yield
        self._drop(position)

    @contextlib.contextmanager
    def hold_to_cut(self, position: int) -> Iterator[None]:
        """The same without parameters whose bytes are copied from quantised tensors: they stay on the meta device."""
        self._fill(self._inside[position], None, self.shards, quantised=False)
        yield
        self._drop(position)

    @torch.no_grad()
    def whole_model(self) -> Any:
        """The model with all of its layers in memory, weights plain."""
        shards = self.shards
        for names in self._inside:
            self._fill(names, None, shards)
        return self.model

    def outside_to(self, device: torch.device | None) -> None:
        """Move what lies outside of the layers, with tables that no checkpoint holds, to a device; None leaves it."""
        for name, module in self.open().model.named_modules():
            if device is not None and not f"{name}.".startswith(f"{self.prefix}."):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.data = parameter.data.to(device)
                for key, buffer in module._buffers.items():
                    module._buffers[key] = None if buffer is None else buffer.to(device)

    def _drop(self, position: int) -> None:
        # not behind an exception: whatever was interrupted may still hold a parameter, and then it cannot be swapped
        self._place({name: torch.empty_like(each, device="meta") for name, each in self.state(position).items()})
        return_free_memory()

    def refill(self, position: int, device: torch.device | None, shards: Shards) -> None:
        """Read a layer that is held again, in the shapes it has now.

        Args:
            position: of the layer.
            device: where to; None is the CPU.
            shards: hold it under the keys of the checkpoint.
        """
        self._fill(self._inside[position], device, shards)

    def signature(self) -> str:
        """Hash of the config, of name, dtype and shape of every tensor, and of 256 bytes out of each."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        by_file: dict[Path, list[TensorInfo]] = {}
        for info in self.shards.on_disk.tensors.values():
            by_file.setdefault(info.file, []).append(info)
        for path, infos in by_file.items():
            with reading(path) as file:
                for info in infos:
                    file.seek(info.offset + info.nbytes // 2)
                    digest.update(f"{info.name} {info.dtype} {info.shape}".encode())
                    digest.update(file.read(min(256, info.nbytes - info.nbytes // 2)))
        return digest.hexdigest()[:32]

    def _check_keys(self, shards: StoredWeights) -> None:
        """The checkpoint must hold what the model needs, in the form that transformers saves it."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        views = self._views(self.model.state_dict(), shards)
        held = {name: info.shape for name, info in shards.tensors.items()}
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or ()]
        surplus = [key for key in held if key not in views]
        self.surplus = [name for key in surplus for name in shards.names_of(key)]
        strange = [key for key in surplus if not any(each.search(key) for each in ignored)]
        for key, view in views.items():
            if key in held and held[key] != tuple(view.shape):
                raise CheckpointError(
                    f"the checkpoint {self.folder} must hold {key} as {list(view.shape)}, got {list(held[key])}"
                )
            if key not in held and key not in tied and tied.get(key) not in held:
                other = f" but {strange[0]}, which the model has no place for" if strange else ""
                kind = NotInPiecesError if strange else CheckpointError
                raise kind(f"the checkpoint {self.folder} must hold {key}, got none{other}")

    @torch.no_grad()
    def _fill(
        self, names: Sequence[str], device: torch.device | None, shards: Shards, *, quantised: bool = True
    ) -> None:
        state = self.model.state_dict(keep_vars=True)
        waiting = set() if quantised else self._quantised(names)
        # by identity: tied weights are one tensor under two names, stored under one of them
        empty = {
            id(state[name]): torch.empty_like(state[name].data, device="meta" if name in waiting else device or "cpu")
            for name in names
        }
        new = {name: empty[id(state[name])] for name in names}
        for key, view in self._views(new, shards).items():
            if key in shards.tensors and not view.is_meta:
                shards.copy_to(key, view)
        self._place(new)

    def _quantised(self, names: Sequence[str]) -> set[str]:
        """Those of which every tensor in the folder is quantised."""
        state = self.model.state_dict(keep_vars=True)
        held = {name: torch.empty_like(state[name].data, device="meta") for name in names}
        plain = {
            view.untyped_storage()._cdata
            for key, view in self._views(held, self.shards).items()
            if key not in self.shards.stored
        }
        return {name for name, tensor in held.items() if tensor.untyped_storage()._cdata not in plain}

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        placed: set[int] = set()
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf not in module._parameters:
                module._buffers[leaf] = tensor
                continue
            parameter: Any = module._parameters[leaf]
            if id(parameter) not in placed:
                placed.add(id(parameter))
                torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
