"""Safetensors shards: checked before anything is allocated, and read one tensor at a time; shard_writer.py writes them.

A checkpoint folder comes from anywhere, so nothing in it is believed: file names in the index lead nowhere else,
headers must describe the file they stand in to the byte, and only then is memory taken, never more than one tensor's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.system.file_bytes import FileBytes, copy_bytes

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "WEIGHT_SUFFIXES",
    "Shards",
    "TensorInfo",
    "TensorSpec",
    "check_not_pointer",
    "copy_part",
    "read_header",
    "read_json",
    "read_weight_map",
    "reading",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
)
"""Of files that hold weights, whatever the format."""

# what safetensors' own reader takes
_MAX_JSON_BYTES = 100_000_000
_MAX_DIMS = 16
_COPY_BYTES = 16 * 2**20
_POINTER = b"version https://git-lfs"

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# those that can be read as tensors; the others are only copied, as bytes
_TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
# of 8 bits, for which torch has no arithmetic: read by those who know what the codes mean
_CODE_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in (_TORCH_DTYPES | _CODE_DTYPES).items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, dtype as safetensors names it ("BF16", "U8"), and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
        return cls(name, _NAMES[dtype], tuple(shape))

    @property
    def bits(self) -> int:
        """Of one element."""
        return _BITS[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.bits // 8

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's dtype is this one; its shape may be another."""
        return _NAMES.get(tensor.dtype) == self.dtype


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor in a file: `offset` bytes from its start lie `nbytes` bytes."""

    file: Path
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a dtype that is only copied."""
        return _TORCH_DTYPES.get(self.dtype)


def check_not_pointer(path: Path) -> None:
    """Refuse what git leaves in the place of a large file that it has not fetched.

    Raises:
        CheckpointError: names the file and the cure.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        _refuse_pointer(path, file.read(len(_POINTER)))


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_POINTER):
        raise CheckpointError(
            f"{path} must be the file itself, got the pointer that Git LFS leaves in its place: run git lfs pull in "
            f"{path.parent}, or download the file"
        )


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """A JSON object from a regular file of at most 100 MB; a key that comes twice is refused.

    Raises:
        CheckpointError: names the file.
    """
    try:
        with _open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > _MAX_JSON_BYTES:
                raise CheckpointError(f"{path} must be at most {_MAX_JSON_BYTES:,} bytes, got a larger file")
            data = file.read(_MAX_JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} must be a file that can be read, got {error.strerror or error}") from error
    _refuse_pointer(path, data)
    if not data.strip():
        raise CheckpointError(f"{path} must be valid JSON, got an empty file: download it again")
    value = _parse_json(data, str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold {what or 'a JSON object'}, got a {type(value).__name__}")
    return value


def _parse_json(data: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where} must name everything once, got {_shown(twice)} twice")
        return found

    try:
        return json.loads(data.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} must be valid JSON, got {error}") from error


def _open_regular(path: Path) -> BufferedReader:
    """A file opened for reading; a pipe or a device, on which reading may never end, is refused."""
    # without O_NONBLOCK opening a pipe waits for its other end
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path} must be a regular file, got another kind")
    return file


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """A shard whose header was read before, open for its data."""
    try:
        with _open_regular(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"{path} was there and cannot be read any more: {error.strerror or error}; put it back"
        ) from error


def copy_part(part: FileBytes, name: str, new: FileIO) -> None:
    """Copy bytes of a shard whose header was read before to where a file stands.

    Args:
        name: what they are of, for errors.

    Raises:
        CheckpointError: the shard has gone or changed.
        OSError: the other file cannot be written.
    """
    failed = None
    with reading(part.path) as old:
        if os.fstat(old.fileno()).st_size < part.start + part.nbytes:
            raise CheckpointError(f"{part.path} was changed while it was read: {name} is cut off")
        try:
            copy_bytes(old, part.start, part.nbytes, new)
        except OSError as error:
            failed = error
    # a full disk is not the shard's fault
    if failed is not None:
        raise failed


def _shown(name: str) -> str:
    """A name from a file as it may stand in a message."""
    return ascii(name[:100]) + ("..." if len(name) > 100 else "")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, which must fill it exactly. Reads the header only.

    Raises:
        CheckpointError: the file is truncated or longer than its header says, or the header is no table of tensors of
            known dtypes that lie end to end; names the file and the tensor.
    """
    try:
        with _open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(_POINTER))
            _refuse_pointer(path, start)
            file.seek(8)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{path} must be a safetensors file, got {size:,} bytes that announce a header of {length:,}: "
                    "download it again"
                )
            header = _parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise CheckpointError(f"{path} must be a file that can be read, got {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} must be a table of tensors, got a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    end, last = 8 + length, None
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            how = "overlaps" if info.offset < end else "leaves a gap behind"
            raise CheckpointError(f"{path}: tensors must lie end to end, got {_shown(name)}, which {how} {last}")
        end, last = end + info.nbytes, _shown(name)
    if end != size:
        what = "truncated" if size < end else "too long"
        raise CheckpointError(
            f"{path} is {what}: its header describes {end:,} bytes, the file has {size:,}; download it again"
        )
    return tensors


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{path}: {_shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} must have a dtype of safetensors, got {_shown(str(dtype))}")
    if not _sizes(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where} must have a shape of at most {_MAX_DIMS} sizes, got {_shown(str(shape))}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} must have two data_offsets, got {_shown(str(offsets))}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise CheckpointError(
            f"{where} must take the {bits // 8:,} bytes of {dtype} {shape}, got {offsets[1] - offsets[0]:,}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a checkpoint.

    Raises:
        CheckpointError: it holds no such table, or names a file that is not a safetensors file beside it.
    """
    weight_map = read_json(index, "a weight_map").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must hold a weight_map, got none")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index} must name files of its own folder, got {_shown(str(file))}")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} must name .safetensors files, got {_shown(file)}")
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    """What to say of a folder without safetensors, with a command that makes some where there are other weights."""
    wanted = f"the checkpoint {folder} must hold {SINGLE_FILE} or {INDEX_FILE}"
    others = sorted(file.name for file in folder.glob("*") if file.name.endswith(WEIGHT_SUFFIXES))
    if not others:
        return CheckpointError(f"{wanted}, got a folder without weights; only safetensors weights are read")
    named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    cure = ""
    if any(name.startswith("pytorch_model") for name in others):
        source, out = (shlex.quote(str(each)) for each in (folder, folder.with_name(f"{folder.name}-safetensors")))
        cure = (
            ". This writes a folder of them, to which the tokenizer's files are to be copied: python -c \"import sys; "
            "from transformers import AutoModelForCausalLM as Model; Model.from_pretrained(sys.argv[1], dtype='auto')"
            f'.save_pretrained(sys.argv[2])" {source} {out}'
        )
    return CheckpointError(f"{wanted}, got {named}; only safetensors weights are read{cure}")


class Shards:
    """The tensors of a checkpoint folder. Opening it reads headers; `read` reads one tensor.

    Args:
        files: safetensors files.

    Attributes:
        files: as given.
        tensors: name -> where it lies, in the order of the files and of the data in them.

    Raises:
        CheckpointError: a file is not what it should be (`read_header`), or two hold a tensor of one name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in sorted(read_header(file).items(), key=lambda item: item[1].offset):
                if name in self.tensors:
                    raise CheckpointError(
                        f"{_shown(name)} must lie in one shard, got {self.tensors[name].file} and {file}: download the "
                        "checkpoint again into an empty folder, or load and save it once with transformers"
                    )
                self.tensors[name] = info

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """The shards that transformers would load: model.safetensors, or those that the index names.

        Raises:
            CheckpointError: there are none, one is missing or damaged, or the index names a file elsewhere or a tensor
                that is not where it says.
        """
        if (folder / SINGLE_FILE).exists():
            return cls([folder / SINGLE_FILE])
        index = folder / INDEX_FILE
        if not index.exists():
            raise _no_weights(folder)
        weight_map = read_weight_map(index)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(
                f"the checkpoint {folder} must hold {', '.join(missing)}, which {INDEX_FILE} names, got a folder "
                f"without {'it' if len(missing) == 1 else 'them'}: download what is missing"
            )
        shards = cls([folder / name for name in names])
        for name, file in weight_map.items():
            if name not in shards.tensors or shards.tensors[name].file.name != file:
                raise CheckpointError(
                    f"{folder / file} must hold {_shown(name)} as {INDEX_FILE} says, and does not: index and files are "
                    "of two checkpoints; download both again"
                )
        return shards

    @property
    def raw(self) -> Shards:
        """The shards as they lie on the disk: these."""
        return self

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def stored_bytes(self, name: str) -> int:
        """Of a tensor, on the disk."""
        return self.tensors[name].nbytes

    def read(self, name: str, entry: int | None = None, *, codes: bool = False) -> Tensor:
        """One tensor, or its entry along the first dim; memory: that much.

        Args:
            name: of the tensor.
            entry: along its first dim; None reads all of it.
            codes: read also dtypes of 8 bits that torch cannot calculate with.

        Raises:
            UnsupportedModelError: a dtype that is only copied.
            CheckpointError: the file has gone or changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        dtype = info.torch_dtype or (_CODE_DTYPES.get(info.dtype) if codes else None)
        if dtype is None:
            raise UnsupportedModelError(f"{name} must be one of {', '.join(_TORCH_DTYPES)}, got {info.dtype}")
        shape, nbytes, offset = info.shape, info.nbytes, info.offset
        if entry is not None:
            shape, nbytes = shape[1:], nbytes // shape[0]
            offset += entry * nbytes
        data = torch.empty(nbytes, dtype=torch.uint8)
        with reading(info.file) as file:
            file.seek(offset)
            if file.readinto(data.numpy().data) != nbytes:
                raise CheckpointError(f"{info.file} was changed while it was read: {name} is cut off")
        return data.view(dtype).view(shape)

    def copy_to(self, name: str, out: Tensor) -> None:
        """Read a tensor into one of its shape, in whatever dtype, on whatever device."""
        out.copy_(self.read(name))

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system bring these tensors into its cache while this process computes; a hint that may be lost."""
        if not hasattr(os, "posix_fadvise"):
            return
        by_file: dict[Path, list[TensorInfo]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(self.tensors[name])
        for path, infos in by_file.items():
            # a file that is gone is reported by the read that needs it
            with contextlib.suppress(OSError, CheckpointError), _open_regular(path) as file:
                for info in infos:
                    os.posix_fadvise(file.fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def parts(self, name: str) -> Iterator[FileBytes | bytes]:
        """The bytes of one tensor for a writer that copies them: where they lie, or themselves where they are made."""
        info = self.tensors[name]
        yield FileBytes(info.file, info.offset, info.nbytes)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor of any dtype, at most 16 MiB at a time.

        Raises:
            CheckpointError: the file has gone or changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        left = info.nbytes
        with reading(info.file) as file:
            file.seek(info.offset)
            while left:
                data = file.read(min(left, _COPY_BYTES))
                if not data:
                    raise CheckpointError(f"{info.file} was changed while it was read: {name} is cut off")
                left -= len(data)
                yield data
