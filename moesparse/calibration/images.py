"""Records of text and images in, windows out: what a model with eyes is calibrated on.

A source is one of
    records.jsonl      one JSON object a line: "text", or "messages" as a chat template takes them; and "image" or
                       "images", paths relative to the file; .ndjson, .json and .jsonl.gz are the same
    records.parquet    the same columns, one record a row; an image is bytes, {"bytes": ..., "path": ...} as
                       `datasets` stores it, or a path

A record goes through the model's own processor by itself: "messages" by its chat template; "text" as it is where it
names its images by the processor's mark (`<|image_pad|>`, say), else as one message of the user with the images before
it. Records are padded behind to the longest of them. In messages, images without a source of their own are taken from
the record's, in order.

Held are the records as they are stored (pixels are made when they are wanted, and again when they are wanted again).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse.calibration.windows import ImageWindows
from moesparse.documents import SourceRead, SourceSampled, unpacked
from moesparse.errors import CalibrationError, MoESparseError, UsageError, reason_of
from moesparse.progress import Progress, ProgressEvent, ProgressLike, reporting
from moesparse.text import TextSource, windows

__all__ = ["holds_images", "image_windows"]

_LINES, _TABLE = (".jsonl", ".ndjson", ".json"), ".parquet"
_IMAGE_FIELDS = ("image", "images")

Record = Mapping[str, Any]


def holds_images(path: str | os.PathLike[str]) -> bool:
    """Whether a source of text has records with images: one at least, or a column for them.

    Raises:
        MoESparseError: pyarrow is missing, or the file is no table.
    """
    path = Path(path)
    if not path.is_file():
        return False
    if _kind(path) == _TABLE:
        with _table(path) as table:
            return any(name in table.schema_arrow.names for name in _IMAGE_FIELDS)
    try:
        # whatever is wrong with it, the reader of text says so
        return _kind(path) in _LINES and any(
            isinstance(record, dict) and _sources(record)
            for record in (json.loads(line) for line in _lines(path) if '"image' in line)
        )
    except (ValueError, MoESparseError, OSError):
        return False


def image_windows(
    sources: Sequence[TextSource],
    processor: Any,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    chat: bool = False,
    found: list[SourceRead] | None = None,
    progress: ProgressLike = "auto",
) -> tuple[ImageWindows, list[str]]:
    """Draw records with images, and windows of text where some sources are text alone.

    Every source gives the same number, or one more; what a short one lacks, the others do not give. Records of more
    than `length` tokens are left out: an image cannot be cut.

    Args:
        sources: files with their domains.
        processor: of the model.
        samples: records and windows wanted.
        length: tokens of a record at most, and of a window of text.
        seed: another seed draws others.
        chat: lay out the chat records of sources of text alone, as `moesparse.text.windows` does.
        found: told what was read of each source.
        progress: as in `moesparse.prune`; a function is called with every record.

    Returns:
        The windows, in seeded random order, and the domain of each.

    Raises:
        UsageError: no source, or fewer samples than sources.
        CalibrationError: a source holds too few records of at most `length` tokens; says how many.
        MoESparseError: a record or an image cannot be read; names the file and the place in it.
    """
    if not 1 <= len(sources) <= samples:
        raise UsageError(f"samples must be at least 1 for each source, got {samples} for {len(sources)}")
    rng = random.Random(seed)
    chosen: list[tuple[_Encoded, str]] = []
    read: list[SourceRead] = [] if found is None else found
    with reporting(progress) as told:
        for number, source in enumerate(sources):
            wanted = samples // len(sources) + (number < samples % len(sources))
            if holds_images(source.path):
                drawn = _draw(Path(source.path), processor, wanted, length, rng, told)
                tokens = sum(len(each.ids) for each in drawn)
                read.append(SourceSampled(source.path, len(drawn), windows=len(drawn), tokens=tokens))
            else:
                options: dict[str, Any] = {"samples": wanted, "length": length, "max_length": length, "seed": seed}
                ids = windows(source.path, processor.tokenizer, **options, chat=chat, found=read)
                drawn = [_Encoded(row, None, {}) for row in ids]
            chosen += [(each, source.domain) for each in drawn]
    rng.shuffle(chosen)
    return _joined([each for each, _ in chosen], processor), [domain for _, domain in chosen]


@dataclass(frozen=True)
class _Encoded:
    """A record that went through the processor.

    Attributes:
        ids: [t] its tokens.
        prompt: what the processor makes its inputs of again; None for text alone.
        shapes: name of an input that has an entry for each token -> its dtype.
        mark: hash of the inputs.
        images: in it.
    """

    ids: Tensor
    prompt: _Prompt | None
    shapes: Mapping[str, torch.dtype]
    mark: str = ""
    images: int = 0


def _draw(
    path: Path, processor: Any, wanted: int, length: int, rng: random.Random, progress: Progress
) -> list[_Encoded]:
    """Records of one source that fit, drawn without putting one back."""
    order = list(range(_count(path)))
    rng.shuffle(order)
    found: list[_Encoded] = []
    longer = shortest = 0
    while order and len(found) < wanted:
        here, order = order[: wanted - len(found)], order[wanted - len(found) :]
        records = dict(_records(path, set(here)))
        for number in here:
            progress(ProgressEvent(f"read {path.name}", len(found), wanted, "record"))
            encoded = _encode(_Prompt.of(records[number], path, number, processor))
            if len(encoded.ids) > length:
                longer += 1
                shortest = min(shortest or len(encoded.ids), len(encoded.ids))
            else:
                found.append(encoded)
    if len(found) < wanted:
        over = f" and {longer} longer ones, of {shortest} tokens and more" if longer else ""
        cures = [f"samples={len(found)}"] if found else []
        cures += [f"length={shortest}"] if longer else []
        raise CalibrationError(
            f"{path} must hold {wanted} records of at most {length} tokens, got {len(found)}{over}; give more records"
            + (f", or {' or '.join(cures)}" if cures else "")
        )
    return found


@dataclass(frozen=True)
class _Prompt:
    """A record as it is given to the processor.

    Attributes:
        processor: of the model.
        text: with a mark for each image, or None where there are messages.
        messages: for the chat template; images in them are numbers of `images`.
        images: paths or bytes.
        place: for errors.
    """

    processor: Any
    text: str | None
    messages: list[dict[str, Any]] | None
    images: tuple[Path | bytes, ...]
    place: str

    @classmethod
    def of(cls, record: Record, path: Path, number: int, processor: Any) -> _Prompt:
        """A record, checked.

        Raises:
            MoESparseError: it has no text, or names images in no way that is known; says where.
        """
        place = f"{path} record {number + 1}"
        images = [_image(each, path, place) for each in _sources(record)]
        messages, text = record.get("messages"), record.get("text")
        if messages is None and isinstance(text, str):
            mark = getattr(processor, "image_token", None)
            marks = text.count(mark) if mark else 0
            if marks == len(images):
                return cls(processor, text, None, tuple(images), place)
            if marks:
                raise MoESparseError(f"{place} must have an image for each {mark}, got {len(images)} for {marks}")
            parts: list[dict[str, Any]] = [{"type": "image"} for _ in images]
            messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
            if getattr(processor, "chat_template", None) is None:
                raise MoESparseError(
                    f"{place} must say by {mark!r} where its images belong, for the model has no chat template"
                )
        if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
            raise MoESparseError(f'{place} must have a string "text" or a list "messages", got {_shown(record)}')
        if getattr(processor, "chat_template", None) is None:
            raise MoESparseError(f'{place} has "messages", for which the model must have a chat template')
        return cls(processor, None, _numbered(messages, len(images), place), tuple(images), place)

    def inputs(self) -> dict[str, Tensor]:
        """What the processor makes of it.

        Raises:
            MoESparseError: an image cannot be read, or the processor refuses the record.
        """
        images = [_opened(each, self.place) for each in self.images]
        try:
            if self.text is not None:
                found = self.processor(text=[self.text], images=images or None, return_tensors="pt")
            else:
                messages = copy.deepcopy(self.messages)
                for part in _image_parts(messages):
                    part["image"] = images[part["image"]]
                found = self.processor.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_tensors="pt"
                )
        except Exception as error:  # whatever a processor or a template says to a record
            raise MoESparseError(
                f"{self.place} must be what the model's processor takes, got {reason_of(error)}"
            ) from error
        return {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "attention_mask"}


class _Inputs(Sequence[Mapping[str, Tensor]]):
    """The inputs of all records beside their ids, padded behind; made anew each time."""

    def __init__(self, records: Sequence[_Encoded], length: int) -> None:
        self._records, self._length = records, length
        self._per_token = {name: dtype for record in records for name, dtype in record.shapes.items()}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: Any) -> Any:
        record = self._records[number]
        found = {} if record.prompt is None else record.prompt.inputs()
        found.pop("input_ids", None)
        for name, dtype in self._per_token.items():
            row = torch.zeros(1, self._length, dtype=dtype)
            if name in found:
                row[:, : found[name].shape[1]] = found[name]
            found[name] = row
        return found


def _encode(prompt: _Prompt) -> _Encoded:
    inputs = prompt.inputs()
    ids = inputs.pop("input_ids")
    digest = hashlib.sha256()
    for name in sorted(inputs):
        digest.update(f"{name}{tuple(inputs[name].shape)}".encode())
        digest.update(inputs[name].contiguous().view(torch.uint8).numpy().tobytes())
    per_token = {name: each.dtype for name, each in inputs.items() if each.shape == ids.shape}
    return _Encoded(ids[0], prompt, per_token, digest.hexdigest()[:32], len(prompt.images))


def _joined(records: Sequence[_Encoded], processor: Any) -> ImageWindows:
    length = max(len(record.ids) for record in records)
    pad = processor.tokenizer.pad_token_id
    ids = torch.full((len(records), length), 0 if pad is None else pad)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, record in enumerate(records):
        ids[row, : len(record.ids)] = record.ids
        mask[row, : len(record.ids)] = True
    marks = [record.mark for record in records]
    stands_in = torch.isin(ids, torch.tensor(_stand_ins(processor), dtype=torch.int64)) & mask
    inputs, images = _Inputs(records, length), sum(record.images for record in records)
    return ImageWindows(ids, mask, inputs, marks, stands_in, images)


def _stand_ins(processor: Any) -> list[int]:
    """Ids of the tokens in whose places a model puts what it sees."""
    named = getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    return [each for each in named if each is not None]


def _sources(record: Record) -> list[Any]:
    """The images of a record, in order, those that stand in its messages too."""
    found = [each for part in _image_parts(record.get("messages")) for each in _of_part(part)]
    for name in _IMAGE_FIELDS:
        value = record.get(name)
        found += [] if value is None else value if isinstance(value, list) else [value]
    return found


def _image_parts(messages: Any) -> Iterator[dict[str, Any]]:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image":
                yield part


def _of_part(part: Mapping[str, Any]) -> list[Any]:
    """The source that an image in a message names; none where it only stands for the record's next one."""
    return [part[name] for name in ("image", "path", "url") if part.get(name) is not None][:1]


def _numbered(messages: list[dict[str, Any]], images: int, place: str) -> list[dict[str, Any]]:
    """Messages whose images are numbers: first those with a source of their own, then the record's, each in order."""
    messages = copy.deepcopy(messages)
    parts = list(_image_parts(messages))
    if len(parts) != images:
        raise MoESparseError(f"{place} must have an image for each one in its messages, got {images} for {len(parts)}")
    own = [part for part in parts if _of_part(part)]
    for number, part in enumerate([*own, *(part for part in parts if not _of_part(part))]):
        part.clear()
        part.update({"type": "image", "image": number})
    return messages


def _image(value: Any, path: Path, place: str) -> Path | bytes:
    """Where an image is, or its bytes."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise MoESparseError(f"{place} must name an image by its path or hold its bytes, got {_shown(value)}")
    file = path.parent / value
    if not file.is_file():
        raise MoESparseError(f"{place} must name an image that is there, got {value!r}, looked for at {file}")
    return file


def _opened(image: Path | bytes, place: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MoESparseError("reading images needs Pillow; pip install 'moesparse[images]'") from error
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        name = "the bytes in it" if isinstance(image, bytes) else str(image)
        raise MoESparseError(f"{place} must hold an image that Pillow reads, got {name}: {error}") from error


def _table(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MoESparseError(f"reading {path} needs pyarrow; pip install 'moesparse[text]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise MoESparseError(f"{path} must be a parquet file, got something else or a cut one") from error


def _kind(path: Path) -> str:
    """The end of a file's name that says what lies in it."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file that are not empty."""
    with unpacked(path) as (file, codec):
        try:
            for line in io.TextIOWrapper(file, encoding=codec):
                if line.strip():
                    yield line
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise MoESparseError(f"{path} must be text that can be read to its end, got {reason_of(error)}") from error


def _count(path: Path) -> int:
    if _kind(path) == _TABLE:
        with _table(path) as table:
            return table.metadata.num_rows
    return sum(1 for _ in _lines(path))


def _records(path: Path, numbers: Collection[int]) -> Iterator[tuple[int, Record]]:
    """The records of these numbers, in the order of the file."""
    if _kind(path) == _TABLE:
        with _table(path) as table:
            names = [name for name in ("text", "messages", *_IMAGE_FIELDS) if name in table.schema_arrow.names]
            first = 0
            for batch in table.iter_batches(batch_size=64, columns=names):
                here = [number - first for number in sorted(numbers) if first <= number < first + len(batch)]
                yield from ((first + row, batch.slice(row, 1).to_pylist()[0]) for row in here)
                first += len(batch)
        return
    for number, line in enumerate(_lines(path)):
        if number in numbers:
            try:
                record = json.loads(line)
            except ValueError as error:
                raise MoESparseError(f"{path} record {number + 1} must be a JSON object, got {_shown(line)}") from error
            if not isinstance(record, dict):
                raise MoESparseError(f"{path} record {number + 1} must be a JSON object, got {_shown(record)}")
            yield number, record


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
