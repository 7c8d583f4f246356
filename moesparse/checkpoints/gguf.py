"""GGUF files: read by the gguf package, written again as an edit of their own bytes.

A file is a header, records of metadata, records of tensors, and the tensors' data, each aligned. What is written keeps
every record and every tensor byte for byte and in its order, but for what is asked to change. The package's own writer
is not used: it takes metadata apart into Python values, and cannot put an empty or a nested array together again.
"""

from __future__ import annotations

import importlib.util
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesparse.errors import CheckpointError, MissingFileError, MoESparseError, UsageError
from moesparse.system.file_bytes import copy_bytes, write_bytes
from moesparse.system.folders import check_writable, flush

if TYPE_CHECKING:
    import numpy as np
    from gguf.gguf_reader import GGUFReader, ReaderField, ReaderTensor

__all__ = ["GGUFFiles", "Slices", "is_gguf", "output_files", "write_files"]

SUFFIX = ".gguf"
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

# of GGUFValueType
_PACK = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

Slices = Sequence[tuple[int, int]]
"""Rows of a tensor along its slowest dimension, first and behind the last, in order."""


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return os.fspath(name).endswith(SUFFIX)


class GGUFFiles:
    """A model in a GGUF file, or in the files it is split into.

    Opening maps the files and reads metadata and tensor records; the vocabulary of a large model takes some 100 MB.
    Tensor data is read when it is asked for.

    Attributes:
        paths: of the files, in order.
        readers: of the gguf package, one for each file.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        """Open a file, or all files of a split of which one is named.

        Raises:
            CheckpointError: a file is missing or damaged, or is no GGUF that can be read here; names it.
            MoESparseError: the gguf package is not there.
        """
        if importlib.util.find_spec("gguf") is None:
            raise MoESparseError("GGUF files need the package gguf; pip install 'moesparse[gguf]'")
        self.paths = _all_of(Path(source))
        self.readers = [_read(path) for path in self.paths]
        count = self.value("split.count")
        if (count or 1) != len(self.paths):
            raise CheckpointError(
                f"{self.paths[0]} must be named NAME-00001-of-{count:05d}.gguf with the others beside it, for it is "
                f"one of {count} files"
            )

    @property
    def split(self) -> bool:
        """Whether the model lies in files of a split."""
        return _SPLIT.fullmatch(self.paths[0].name) is not None

    @cached_property
    def architecture(self) -> str:
        """What llama.cpp calls the family."""
        return str(self.value("general.architecture"))

    @cached_property
    def tensors(self) -> dict[str, ReaderTensor]:
        """Name -> tensor, of all files. The numpy view `data` has the slowest dimension first."""
        return {tensor.name: tensor for reader in self.readers for tensor in reader.tensors}

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.paths)

    def value(self, key: str) -> Any:
        """Of a metadata record of the first file; None where there is none."""
        field = self.readers[0].fields.get(key)
        return None if field is None else field.contents()

    def own(self, key: str) -> Any:
        """The same under the architecture's name."""
        return self.value(f"{self.architecture}.{key}")


def _all_of(path: Path) -> list[Path]:
    named = _SPLIT.fullmatch(path.name)
    names = [path.name]
    if named:
        names = [f"{named[1]}-{number:05d}-of-{named[3]}.gguf" for number in range(1, int(named[3]) + 1)]
    paths = [path.with_name(name) for name in names]
    for each in paths:
        if not each.is_file():
            what = f", the split that {path.name} is of" if named else ""
            raise MissingFileError(f"MODEL must be a GGUF file that is there, got no {each}{what}")
    return paths


def _read(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        ends = [tensor.data_offset + tensor.n_bytes for tensor in reader.tensors]
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError) as error:
        # of numpy and of the package, about whatever does not fit
        raise CheckpointError(f"{path} must be a GGUF file that the package gguf reads, got: {error}") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path} must have the byte order of this machine, got the other one")
    if max(ends, default=0) > path.stat().st_size:
        raise CheckpointError(f"{path} must hold all its tensors, got a file that was cut off")
    return reader


def output_files(source: GGUFFiles, out: Path) -> list[Path]:
    """The files to write: OUT itself, or OUT-00001-of-0000N.gguf and so on where the source is split.

    Raises:
        UsageError: OUT is not named as a GGUF file, or as one of another split. CheckpointError: one of them is there.
    """
    if not is_gguf(out):
        raise UsageError(f"OUT must be named NAME.gguf for a GGUF model, got {out}")
    named, count = _SPLIT.fullmatch(out.name), len(source.paths)
    if named and (not source.split or int(named[3]) != count):
        raise UsageError(f"OUT must be named NAME.gguf, the source has {count} files, got {out}")
    paths = [out]
    if source.split:
        stem = named[1] if named else out.name.removesuffix(SUFFIX)
        paths = [out.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for path in paths:
        if path.exists():
            raise CheckpointError(f"OUT must be a new file, got {path}, which is there. Remove it or name another")
    check_writable("OUT", paths[0])
    return paths


def write_files(
    source: GGUFFiles,
    paths: Sequence[Path],
    slices: Mapping[str, Slices | None],
    values: Mapping[str, Any],
    told: Callable[[str], None],
) -> None:
    """Write the files again with some tensors cut and some values changed; they get their names when all are whole.

    Memory: the records of a file, and a buffer of 8 MiB where the kernel does not copy by itself.

    Args:
        source: to be edited.
        paths: one for each of its files.
        slices: tensor -> rows that stay, None for one that is left out; what is not named stays whole.
        values: metadata key -> new value of the record, in its type; an array is cut to the number of items given as
            `Items`. What is not there is added to the first file, as a string.
        told: called with the name of every tensor before it is written.

    Raises:
        CheckpointError: writing failed; nothing is left of it.
    """
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        paths[0].absolute().parent.mkdir(parents=True, exist_ok=True)
        for number, (reader, partial) in enumerate(zip(source.readers, partials, strict=True)):
            _write_file(reader, source.paths[number], partial, slices, values, told, first=number == 0)
            flush(partial)
        # the first file last: without it no program takes the others for a model
        for partial, path in reversed(list(zip(partials, paths, strict=True))):
            os.replace(partial, path)
        flush(paths[0].absolute().parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {paths[0]}: {error.strerror or error}. Nothing was left there") from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Items:
    """How many items of an array stay, the first ones."""

    count: int


def _write_file(
    reader: GGUFReader,
    source: Path,
    path: Path,
    slices: Mapping[str, Slices | None],
    values: Mapping[str, Any],
    told: Callable[[str], None],
    *,
    first: bool,
) -> None:
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    starts = [*(field.offset for field in fields.values()), _end_of_metadata(reader)]
    records = []
    for (key, field), start, stop in zip(fields.items(), starts, starts[1:], strict=False):
        raw = reader.data[start:stop].tobytes()
        records.append(_changed(raw, field, values[key]) if key in values else raw)
    if first:
        records += [_string_record(key, value) for key, value in values.items() if key not in fields]
    stay = [(tensor, _rows(tensor, slices)) for tensor in reader.tensors if slices.get(tensor.name, ()) is not None]
    table, offset = [], 0
    for tensor, rows in stay:
        table.append(_tensor_record(tensor.field, _count(rows), offset))
        offset += _count(rows) * _row_bytes(tensor)
        offset += -offset % int(reader.alignment)
    # magic number and version are the source's own
    head = reader.data[:8].tobytes() + struct.pack("<QQ", len(stay), len(records))
    with source.open("rb", buffering=0) as old, path.open("wb", buffering=0) as new:
        write_bytes(b"".join([head, *records, *table]), new)
        for tensor, rows in stay:
            write_bytes(bytes(-new.tell() % int(reader.alignment)), new)
            told(tensor.name)
            for start, stop in rows:
                size = _row_bytes(tensor)
                copy_bytes(old, tensor.data_offset + start * size, (stop - start) * size, new)
        write_bytes(bytes(-new.tell() % int(reader.alignment)), new)


def _end_of_metadata(reader: GGUFReader) -> int:
    if reader.tensors:
        return min(tensor.field.offset for tensor in reader.tensors)
    last = list(reader.fields.values())[-1]
    return last.offset + sum(int(part.nbytes) for part in last.parts)


def _rows(tensor: ReaderTensor, slices: Mapping[str, Slices | None]) -> Slices:
    return slices.get(tensor.name) or [(0, int(tensor.shape[-1]))]


def _count(rows: Slices) -> int:
    return sum(stop - start for start, stop in rows)


def _row_bytes(tensor: ReaderTensor) -> int:
    """Of one entry of the slowest dimension: whole blocks of the quantisation lie in it, see `sliceable`."""
    return tensor.n_bytes // int(tensor.shape[-1])


def sliceable(tensor: ReaderTensor) -> bool:
    """Whether each entry of the slowest dimension has bytes of its own: not where a block spans several."""
    return tensor.n_bytes % int(tensor.shape[-1]) == 0 and (
        len(tensor.shape) > 1 or tensor.tensor_type.name[0] in "FIB"
    )


def _changed(raw: bytes, field: ReaderField, value: Any) -> bytes:
    """A metadata record with another value."""
    kind = int(field.types[0])
    head = raw[: 8 + int(field.parts[0][0]) + 4]
    if isinstance(value, Items):
        assert kind == _ARRAY
        inner = int(field.parts[3][0])
        assert inner in _PACK, "an array by layer holds numbers"
        size = struct.calcsize(_PACK[inner])
        return head + struct.pack("<IQ", inner, value.count) + raw[len(head) + 12 :][: size * value.count]
    if kind == _STRING:
        text = str(value).encode()
        return head + struct.pack("<Q", len(text)) + text
    return head + struct.pack(f"<{_PACK[kind]}", value)


def _string_record(key: str, value: Any) -> bytes:
    name, text = key.encode(), str(value).encode()
    return struct.pack("<Q", len(name)) + name + struct.pack("<IQ", _STRING, len(text)) + text


def _tensor_record(field: ReaderField, rows: int, offset: int) -> bytes:
    """Name, number of dimensions, dimensions with the slowest last, type, offset."""
    length, name, count, dims, kind, _ = field.parts
    shape: np.ndarray[Any, Any] = dims.copy()
    shape[-1] = rows
    head = b"".join(part.tobytes() for part in (length, name, count, shape, kind))
    return head + struct.pack("<Q", offset)
