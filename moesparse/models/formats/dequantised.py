"""The shards of a quantised checkpoint as those of a plain one, made while they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from moesparse.models.formats.expert_names import SIDE_FILE
from moesparse.models.formats.stored import StoredWeights
from moesparse.system.file_bytes import FileBytes
from moesparse.system.shards import Shards, TensorSpec

__all__ = ["QUANTISATION_FILES", "DequantisedWeights"]

QUANTISATION_FILES = (SIDE_FILE, "quantize_config.json", "quant_config.json")
"""Of ModelOpt, GPTQ and AWQ: say how weights are quantised, and nothing else."""


class DequantisedWeights(StoredWeights):
    """Every quantised weight is a plain tensor of one dtype under the key that a bf16 checkpoint has for it.

    Plain tensors of the model's own dtype are of that dtype too; others, such as float32 routers, stay as they are.

    Args:
        weights: of the folder; what is quantised is read in the dtype that they have for it.
        own: the dtype of the model in the folder.

    Attributes:
        dequantised: keys of the weights that are quantised in the folder.
    """

    def __init__(self, weights: StoredWeights, own: torch.dtype) -> None:
        self._raw, self.files, self.dtype, self.where = weights.raw, weights.files, weights.dtype, weights.where
        self._weights, self.dequantised, self._formats = weights, set(weights.stored), ()
        # what they are for a plain folder
        self.stored, self._owner, self.tensors = {}, {}, {}
        for name, info in weights.tensors.items():
            cast = info.torch_dtype == own
            dtype = TensorSpec.of(name, weights.dtype, info.shape).dtype if cast else info.dtype
            self.tensors[name] = dataclasses.replace(info, dtype=dtype)

    @property
    def raw(self) -> Shards:
        """What a plain folder would hold: this."""
        return self

    @property
    def formats(self) -> list[str]:
        return self._weights.formats

    def form_of(self, name: str) -> str:
        """How a tensor differs from the folder's: "dequantised", "cast" to the other dtype, or "equal"."""
        if name in self.dequantised:
            return "dequantised"
        return "equal" if self.tensors[name].dtype == self._weights.tensors[name].dtype else "cast"

    def stored_bytes(self, name: str) -> int:
        return self.tensors[name].nbytes

    def read(self, name: str, entry: int | None = None, *, codes: bool = False) -> Tensor:
        tensor = self._weights.read(name, entry, codes=codes)
        return tensor.to(self.tensors[name].torch_dtype or tensor.dtype)

    def copy_to(self, name: str, out: Tensor) -> None:
        self._weights.copy_to(name, out)

    def read_ahead(self, names: Iterable[str]) -> None:
        self._weights.read_ahead(names)

    def parts(self, name: str) -> Iterator[FileBytes | bytes]:
        yield from self.chunks(name) if self._is_made(name) else self._weights.raw.parts(name)

    def _is_made(self, name: str) -> bool:
        return name in self.dequantised or self.tensors[name].dtype != self._weights.tensors[name].dtype

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor; of a quantised one, a matrix at a time."""
        if not self._is_made(name):
            yield from self._weights.raw.chunks(name)
            return
        info = self.tensors[name]
        entries: Iterable[Any] = range(info.shape[0]) if len(info.shape) == 3 else (None,)
        for entry in entries:
            data = self.read(name, entry).contiguous().flatten().view(torch.uint8)
            yield data.numpy().tobytes()
