"""The weights of a checkpoint folder, whatever they are stored as: each under its own key, as a matrix."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.errors import CheckpointError
from moesparse.models.formats.base import CODES, Format
from moesparse.models.formats.said import PACKED, formats_of, said_of
from moesparse.system.shards import Shards, TensorSpec

__all__ = ["Stored", "StoredWeights"]

# dtypes that stand for nothing without a scale
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")

# ends of names that only codes have; scales may be left over
_MARKS = ("weight_packed", "qweight", "_blocks")


@dataclass(frozen=True)
class Stored:
    """A weight that is stored as several tensors.

    Attributes:
        format: it is stored in.
        names: what a tensor is for -> its name.
        beside: names of tensors that belong to it and are not read.
    """

    format: Format
    names: Mapping[str, str]
    beside: Sequence[str]

    @property
    def all_names(self) -> tuple[str, ...]:
        return (*self.names.values(), *self.beside)


class StoredWeights(Shards):
    """Shards in which every quantised weight is one tensor under the key that a bf16 checkpoint has for it.

    `read` gives the matrix. `raw` has the tensors as they lie on the disk, to be copied.

    Args:
        raw: the shards as they are.
        formats: that weights may be stored in besides plain.
        dtype: of the matrices that are read.
        where: the folder, for errors.

    Attributes:
        stored: key -> how it is stored, of weights that are not plain.
        dtype, where: as given.
        said: quantization_config of the folder, or None.

    Raises:
        CheckpointError: tensors that contradict the formats or each other; named.
    """

    said: Mapping[str, Any] | None = None

    def __init__(self, raw: Shards, formats: Sequence[Format], dtype: torch.dtype, where: str) -> None:
        self._raw, self.files, self.dtype, self.where = raw, raw.files, dtype, where
        self._formats = formats
        self.stored: dict[str, Stored] = {}
        for name in raw.tensors:
            for key, stored in _weights_of(name, formats, raw):
                if key in self.stored:
                    raise CheckpointError(
                        f"{where} must hold {key} in one format, got {self.stored[key].format.name} and "
                        f"{stored.format.name}"
                    )
                if key in raw.tensors and key not in stored.all_names:
                    raise CheckpointError(f"{where} must hold {key} once, got it plain and as {stored.format.name}")
                self.stored[key] = stored
        self._owner = {name: key for key, stored in self.stored.items() for name in stored.all_names}
        self.tensors = {}
        for name, info in raw.tensors.items():
            owner = self._owner.get(name)
            if owner is None:
                if name.endswith(_MARKS):
                    raise self._unexplained(name)
                self.tensors[name] = info
            elif name == self.stored[owner].names[CODES]:
                spec = TensorSpec.of(owner, dtype, self.shape_of(owner))
                self.tensors[owner] = dataclasses.replace(info, name=owner, dtype=spec.dtype, shape=spec.shape)

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str], dtype: torch.dtype, *, packed: bool = False) -> StoredWeights:
        """Of a folder, in the formats that its config.json names.

        Args:
            folder: of a checkpoint.
            dtype: of the matrices that are read.
            packed: packed n:m weights are matrices too; else they stay the tensors that they are.

        Raises:
            CheckpointError: it is damaged, or contradicts itself. UnsupportedModelError: a format that is not known.
        """
        folder = Path(folder)
        said = said_of(folder)
        skipped = not packed and said is not None and said.get("quant_method") == PACKED
        formats = () if skipped else formats_of(said)
        where = f"the checkpoint {folder}"
        weights = cls(Shards.open(folder), formats, dtype, where)
        if formats and not weights.stored:
            names = ", ".join(dict.fromkeys(each.name for each in formats))
            raise CheckpointError(
                f"{where} must hold tensors of {names}, as its quantization_config says, got plain ones alone"
            )
        weights.said = said
        return weights

    def like(self, raw: Shards) -> StoredWeights:
        """Other shards of the same checkpoint, in its formats."""
        return StoredWeights(raw, self._formats, self.dtype, self.where)

    @property
    def raw(self) -> Shards:
        """The shards as they lie on the disk."""
        return self._raw

    @property
    def on_disk(self) -> Shards:
        """The same, also where `raw` has them otherwise."""
        return self._raw

    @property
    def formats(self) -> list[str]:
        """Names of the formats that weights are stored in, besides plain."""
        return sorted({stored.format.name for stored in self.stored.values()})

    def stored_bytes(self, name: str) -> int:
        """Of all tensors of a weight, on the disk."""
        return sum(self._raw.tensors[each].nbytes for each in self.names_of(name))

    def names_of(self, key: str) -> tuple[str, ...]:
        """The tensors that hold a weight; the key itself where it is plain."""
        return self.stored[key].all_names if key in self.stored else (key,)

    def owner_of(self, name: str) -> str | None:
        """The key of the weight that a tensor is a part of; None where it is a plain tensor."""
        return self._owner.get(name)

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Of a weight that is not plain."""
        stored = self.stored[key]
        return stored.format.shape({what: self.raw.tensors[name] for what, name in stored.names.items()})

    def is_stacked(self, key: str) -> bool:
        """Whether a weight that is not plain is that of all experts of a layer."""
        return len(self.tensors[key].shape) == 3

    def read(self, name: str, entry: int | None = None, *, codes: bool = False) -> Tensor:
        """One weight as a matrix; memory: its tensors, and about three times the matrix in float32 meanwhile.

        Raises:
            CheckpointError, UnsupportedModelError: as `Shards.read`; and codes that the format does not have.
        """
        if name not in self.stored:
            return self.raw.read(name, entry, codes=codes)
        return self._decoded(name, entry, self.dtype)

    def _decoded(self, name: str, entry: int | None, dtype: torch.dtype) -> Tensor:
        try:
            return self.stored[name].format.decode(self.parts_of(name, entry), dtype)
        except ValueError as error:
            raise type(error)(f"{name} of {self.where}: {error}") from error

    def parts_of(self, name: str, entry: int | None = None) -> dict[str, Tensor]:
        """The tensors of a weight that is not plain, or their entries along the first dim: what for -> tensor."""
        return {what: self.raw.read(part, entry, codes=True) for what, part in self.stored[name].names.items()}

    def copy_to(self, name: str, out: Tensor) -> None:
        """Read a tensor into one of its shape, rounded once to its dtype; of a stack of experts one at a time."""
        if name not in self.stored:
            super().copy_to(name, out)
        elif self.is_stacked(name):
            for entry in range(self.tensors[name].shape[0]):
                out[entry].copy_(self._decoded(name, entry, out.dtype))
        else:
            out.copy_(self._decoded(name, None, out.dtype))

    def read_ahead(self, names: Iterable[str]) -> None:
        self.raw.read_ahead(part for name in names for part in self.names_of(name))

    def check_plain(self, names: Iterable[str]) -> None:
        """Refuse plain tensors of a model that hold codes: without scales they mean nothing.

        Raises:
            CheckpointError: names one, and what it is.
        """
        for name in names:
            info = self.raw.tensors.get(name)
            if info is None or name in self.stored:
                continue
            if info.dtype in _CODES or (info.dtype in ("I8", "U8") and name.endswith(".weight")):
                raise self._unexplained(name)

    def _unexplained(self, name: str) -> CheckpointError:
        info = self.raw.tensors[name]
        return CheckpointError(
            f"{self.where} must say in quantization_config of config.json how {name} is stored, got {info.dtype} "
            f"{list(info.shape)}, which nothing there explains"
        )


def _weights_of(name: str, formats: Sequence[Format], raw: Shards) -> list[tuple[str, Stored]]:
    """The weight that a tensor is the mark of; nothing where it is none.

    Raises:
        CheckpointError: the tensors are of none of the formats that have such a mark; says why not of the last.
    """
    problem = None
    for format in formats:
        key = format.key_of(name)
        if key is None:
            continue
        names = {what: part for what, part in format.names(key).items() if part in raw.tensors}
        lacking = [what for what in format.tensors if what not in names and what not in format.optional]
        if lacking:
            problem = problem or CheckpointError(
                f"{name} must come with {format.names(key)[lacking[0]]} to be {format.name}, got none"
            )
            continue
        infos = {what: raw.tensors[part] for what, part in names.items()}
        try:
            format.shape(infos)
        except CheckpointError as error:
            # of two formats that differ in the dtype of the codes it is about the one whose dtype it is
            problem = error if problem is None or infos[CODES].dtype in format.dtypes[CODES] else problem
            continue
        beside = [each for each in format.names_beside(key) if each in raw.tensors]
        return [(key, Stored(format, names, beside))]
    if problem is not None:
        raise problem
    return []
