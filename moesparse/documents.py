"""Documents out of sources of text: what a file or a dataset holds, record by record, before any of it is tokenized.

Whatever a file is called, gzip is unpacked and a byte-order mark decides between UTF-8, UTF-16 and UTF-32; without one
text is UTF-8. The end of the name, less ".gz", says what lies in it (see moesparse.text). A chat record is laid out
by the tokenizer's own chat template, where that was asked for, and nowhere else.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moesparse.chats import CHAT_COLUMNS, CHAT_KEYS, ChatTemplate, chat_key, without_nulls
from moesparse.errors import MissingFileError, MoESparseError, UsageError, reason_of
from moesparse.presets import files_that_do

__all__ = [
    "Chunk",
    "GivenText",
    "PathLike",
    "SourceRead",
    "SourceSampled",
    "check_chats",
    "is_dataset",
    "name_of",
    "read",
    "unpacked",
    "whole_documents",
]

PathLike = str | os.PathLike[str]

_DATASET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?:[\w.-]+")
# longer marks first: that of UTF-32 begins as that of UTF-16 does
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_GZIP = b"\x1f\x8b"
_ARCHIVES = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Chunk(NamedTuple):
    """A document, or a part of one.

    Attributes:
        text: of it.
        starts, ends: whether its first and last character are in here.
        complete: the special tokens it is to have are in the text.
    """

    text: str
    starts: bool
    ends: bool
    complete: bool = False


@dataclass
class SourceRead:
    """What was read of a source; of a large dataset that is not all of it.

    Attributes:
        source: its name.
        documents: with text in them.
        chats: those among them that a chat template has laid out.
        chat_template: sha256 of that template; None without chat records.
        left_out: chats of which the template leaves out all thinking, all calls of tools or all tools.
    """

    source: str
    documents: int = 0
    chats: int = 0
    chat_template: str | None = None
    left_out: int = 0


@dataclass
class SourceSampled(SourceRead):
    """What was read of a source of calibration text, and drawn from it.

    Attributes:
        share: of all tokens, as it was asked for; None where none was.
        windows, tokens: drawn from it, padding not counted.
        cut: records that are longer than their window, where each has one.
    """

    share: float | None = None
    windows: int = 0
    tokens: int = 0
    cut: int = 0


@dataclass(frozen=True, eq=False)
class GivenText:
    """Text that a caller holds, which stands where a file would.

    Attributes:
        records: strings, each a document, or rows as of a `datasets` object. Read once.
        name: what errors call it.
    """

    records: Iterable[Any]
    name: str = "documents"

    def __fspath__(self) -> str:
        return self.name


def is_dataset(source: PathLike) -> bool:
    """Whether a source is the name of a dataset; a file of that name goes before."""
    return isinstance(source, str) and _DATASET_NAME.fullmatch(source) is not None and not os.path.exists(source)


def name_of(path: str) -> str:
    """What a file is called without the ends that say how it is written: "c4.jsonl.gz" is "c4"."""
    file = Path(path)
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem


def read(
    source: PathLike, block: int, limit: int | None, chat: ChatTemplate | None, found: SourceRead
) -> Iterator[Chunk]:
    """The documents of one source.

    Args:
        source: a file or a name of a dataset.
        block: bytes of plain text read at a time.
        limit: characters at most, from a dataset or a caller.
        chat: lays out chat records; None refuses them.
        found: is told what was read.

    Raises:
        MoESparseError: the source is missing, is no text, or holds no text.
    """
    name = os.fspath(source)
    empty = True
    try:
        for chunk in _chunks(source, block, limit, _Records(chat, found)):
            empty = empty and not chunk.text.strip()
            yield chunk
    except UnicodeDecodeError as error:
        kind = error.encoding.upper()
        raise MoESparseError(
            f"text source {name} must be {kind} text, got byte 0x{error.object[error.start]:02x}; convert it to UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MoESparseError(
            f"text source {name} must be a whole gzip file, got a cut or damaged one ({error}); download it again"
        ) from error
    except OSError as error:
        raise MoESparseError(f"text source {name} could not be read: {error.strerror or error}") from error
    if empty:
        raise MoESparseError(f"text source {name} must hold text, got none")


def check_chats(found: Sequence[SourceRead]) -> None:
    """Refuse a request for chat records where there were none.

    Raises:
        MoESparseError: names the sources.
    """
    if not any(note.chats for note in found):
        names = ", ".join(note.source for note in found)
        raise MoESparseError(
            f'chat=True is for records with "messages" or "conversations", got none in {names}: leave it out'
        )


def whole_documents(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Put neighbouring parts of a document together again, so that a cut made while reading changes no token."""
    parts: list[str] = []
    starts = True
    for chunk in chunks:
        if not parts:
            starts = chunk.starts
        parts.append(chunk.text)
        if chunk.ends:
            yield Chunk("".join(parts), starts, True, chunk.complete)
            parts = []
    if parts:
        yield Chunk("".join(parts), starts, False)


def _chunks(source: PathLike, block: int, limit: int | None, records: _Records) -> Iterator[Chunk]:
    name = os.fspath(source)
    if isinstance(source, GivenText):
        return _limited(_read_given(source, records), limit)
    if is_dataset(source):
        return _limited(_read_dataset(name, records), limit)
    path = Path(name)
    if path.is_dir():
        raise MoESparseError(f"text source {name} must be a file, got a folder; name the files in it")
    if not path.exists():
        raise MissingFileError(f"text source {name} must be a file or a datasets name (NAME:SPLIT), got neither")
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    match suffix.lower():
        case ".jsonl" | ".ndjson" | ".json":
            return _read_jsonl(path, records, suffix.lower())
        case ".parquet":
            return _read_parquet(path, records)
        case ".csv" | ".tsv":
            raise _no_table(path, "\t" if suffix.lower() == ".tsv" else ",")
        case _:
            return _read_plain(path, block, records.found)


class _Records:
    """Makes documents of records, and counts them."""

    def __init__(self, chat: ChatTemplate | None, found: SourceRead) -> None:
        self.chat, self.found = chat, found

    def document(self, record: Any, where: str, got: str) -> Iterator[Chunk]:
        """The document of a record; none where its text is empty.

        Args:
            record: anything.
            where: it lies, for errors.
            got: what it is, for errors.
        """
        key = chat_key(record)
        text = record.get("text") if isinstance(record, Mapping) else None
        if key is not None and self.chat is not None:
            text, left_out = self.chat.lay_out(record, key, where)
            self.found.chats += 1
            self.found.left_out += left_out
            self.found.chat_template = self.chat.sha256
        elif key is not None and not isinstance(text, str):
            raise MoESparseError(
                f'{where} is a chat record ("{key}"), which is read only when asked for: give chat=True, and '
                "the tokenizer's chat template makes text of it"
            )
        elif not isinstance(text, str):
            wanted = 'a string "text"' if self.chat is None else 'a string "text", or a list of "messages"'
            raise MoESparseError(f"{where} must have {wanted}, got {got}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise MoESparseError(f"{where} must be Unicode text, got half of a surrogate pair")
        if text:
            self.found.documents += 1
            yield Chunk(text, True, True, key is not None and self.chat is not None)


def _limited(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    seen = 0
    for chunk in chunks:
        yield chunk
        seen += len(chunk.text)
        if limit is not None and seen >= limit:
            return


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """A file of text, unpacked where it is gzip, and the codec of its text.

    Raises:
        MoESparseError: it is an archive of another kind.
    """
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        start = file.peek(8)[:8]
        for magic, kind in _ARCHIVES.items():
            if start.startswith(magic):
                raise MoESparseError(f"text source {path} must be text, alone or in gzip, got {kind} data: unpack it")
        if start.startswith(_GZIP):
            file = stack.enter_context(io.BufferedReader(stack.enter_context(gzip.GzipFile(fileobj=file))))  # type: ignore[arg-type]
            start = file.peek(8)[:8]
        yield file, next((codec for mark, codec in _MARKS.items() if start.startswith(mark)), "utf-8")


def _read_plain(path: Path, block: int, found: SourceRead) -> Iterator[Chunk]:
    """One document, in chunks of about `block` bytes cut after a line end or before a space."""
    carry, starts = "", True
    with unpacked(path) as (file, codec):
        decoder = codecs.getincrementaldecoder(codec)()
        wide = codec in ("utf-16", "utf-32")
        while data := file.read(block):
            # looked for before decoding: binary data is rarely UTF-8
            text = decoder.decode(data) if wide or b"\0" not in data else "\0"
            if "\0" in text:
                raise MoESparseError(
                    f"text source {path} must be text, got binary data (it holds zero bytes); UTF-16 is known by its "
                    "byte-order mark"
                )
            carry += text
            cut = carry.rfind("\n") + 1 or max(carry.rfind(" "), 0)
            if cut:
                yield Chunk(carry[:cut], starts, False)
                carry, starts = carry[cut:], False
        found.documents = 1
        yield Chunk(carry + decoder.decode(b"", final=True), starts, True)


def _read_jsonl(path: Path, records: _Records, suffix: str) -> Iterator[Chunk]:
    with unpacked(path) as (file, codec):
        lines = io.TextIOWrapper(file, encoding=codec, newline="\n")
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text:
                continue
            if suffix == ".json" and text.startswith("["):
                raise _no_array(path)
            where = f"{path} line {number}"
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise MoESparseError(f"{where} must be a JSON object, got {_shown(text)}") from error
            yield from records.document(record, where, _shown(text))


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_parquet(path: Path, records: _Records) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MoESparseError(f"reading {path} needs pyarrow; pip install 'moesparse[text]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in ("text", *CHAT_COLUMNS) if name in names]
            if not {"text", *CHAT_KEYS} & set(wanted):
                raise MoESparseError(f'{path} must have a column "text", got {", ".join(names)}')
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    value = record.get("text")
                    if value is not None and not isinstance(value, str):
                        raise MoESparseError(f'column "text" of {path} must hold strings, got {type(value).__name__}')
                    if "text" in wanted and value is None:
                        record["text"] = ""
                    yield from records.document(without_nulls(record), f"{path} row {row}", ", ".join(wanted))
    except pyarrow.ArrowInvalid as error:
        raise MoESparseError(f"{path} must be a parquet file, got something else or a cut one") from error


def _read_given(given: GivenText, records: _Records) -> Iterator[Chunk]:
    for number, row in enumerate(given.records, start=1):
        record = {"text": row} if isinstance(row, str) else row
        got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        yield from records.document(record, f"record {number} of {given.name}", got)


def _read_dataset(spec: str, records: _Records) -> Iterator[Chunk]:
    try:
        import datasets
    except ImportError as error:
        raise MoESparseError(f"reading dataset {spec} needs datasets; pip install 'moesparse[text]'") from error
    name, *config, split = spec.split(":")
    try:
        rows = datasets.load_dataset(name, *config, split=split, streaming=True)
        for row in rows:
            if records.chat is None and chat_key(row) is None and not isinstance(row.get("text"), str):
                raise MoESparseError(f'dataset {spec} must have a string column "text", got {", ".join(row)}')
            yield from records.document(without_nulls(row), f"a row of dataset {spec}", ", ".join(row))
    except MoESparseError:
        raise
    # datasets raises its own, the hub's, the file system's and the network's errors: all mean that it cannot be had
    except Exception as error:
        raise MoESparseError(
            f"dataset {spec} could not be read: {reason_of(error)}; without network give a .txt, .jsonl or .parquet "
            f"file{files_that_do(spec)}"
        ) from error


def _no_array(path: Path) -> MoESparseError:
    """What to say to a JSON array, which would have to be held whole."""
    return MoESparseError(
        f"text source {path} must have one JSON object a line, got an array; this writes it so: "
        + _one_liner(path, "json.load(f)", "json.dumps(row)")
    )


def _no_table(path: Path, delimiter: str) -> UsageError:
    """What to say to a table of text, with the column that looks like the text of it."""
    with unpacked(path) as (file, codec):
        lines = io.TextIOWrapper(file, encoding=codec, errors="replace", newline="")
        columns = next(csv.reader(lines, delimiter=delimiter), [])
    named = "text" if "text" in columns else (columns or ["text"])[-1]
    rows = "csv.DictReader(f)" if delimiter == "," else "csv.DictReader(f, delimiter='\\t')"
    return UsageError(
        f"text source {path} must be .txt, .jsonl or .parquet, got a table of the columns {', '.join(columns)}; this "
        f"writes the column {named!r} as .jsonl: "
        + _one_liner(path, rows, "json.dumps({'text': row[sys.argv[2]]})", named)
    )


def _one_liner(path: Path, rows: str, line: str, *more: str) -> str:
    """A command that writes a file as JSON lines."""
    with unpacked(path) as (file, codec):
        opener = "open" if isinstance(file.raw, io.FileIO) else "gzip.open"  # type: ignore[attr-defined]
    encoding = "utf-8-sig" if codec == "utf-8" else codec
    bare = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    program = (
        f"import csv, gzip, json, sys; csv.field_size_limit(2**31 - 1); "
        f"f = {opener}(sys.argv[1], 'rt', encoding='{encoding}', newline=''); [print({line}) for row in {rows}]"
    )
    words = " ".join(map(shlex.quote, (str(path), *more)))
    return f'python -c "{program}" {words} > {shlex.quote(str(bare.with_suffix(".jsonl")))}'
