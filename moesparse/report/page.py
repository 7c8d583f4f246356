"""What a report page is made of: sections of sentences, tables and figures, and the one HTML file they become."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moesparse._version import __version__
from moesparse.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page", "Section", "format_size", "layer_of", "ranges"]

_DATA_FILE = "report.json"


@dataclass(frozen=True)
class _Sentence:
    kind: ClassVar = "sentence"
    text: str


@dataclass(frozen=True)
class _Tiles:
    """(figure, what it is of), side by side."""

    kind: ClassVar = "tiles"
    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Table:
    """Every column but the first is set to the right where `numeric`; a header of empty cells is left out."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool


@dataclass(frozen=True)
class _Warnings:
    """Sentences that must not be missed."""

    kind: ClassVar = "warnings"
    sentences: Sequence[str]


@dataclass(frozen=True)
class _Sides:
    """Two texts that go on from the same one, side by side; `same` is what both begin with.

    Attributes:
        about: a line above them.
        before: the text they go on from.
        same: begin of both.
        sides: (name, what follows the same).
    """

    kind: ClassVar = "sides"
    about: str
    before: str
    same: str
    sides: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Drawing:
    """A figure by its file name, with what a blind reader hears; drawn for a width in inches."""

    kind: ClassVar = "figure"
    name: str
    alt: str
    draw: Callable[..., Figure]

    @property
    def svgs(self) -> dict[str, Markup]:
        """To stand in the page, whose colours they take: for a broad one and for a slim one."""
        widths = {"broad": figures.WIDTH, "slim": figures.SLIM}
        return {
            kind: Markup(figures.to_inline_svg(self.draw(width=width), f"{self.name}-{kind}", self.alt))
            for kind, width in widths.items()
        }


@dataclass
class Section:
    """One part of the page, filled in reading order."""

    title: str
    parts: list[_Sentence | _Tiles | _Table | _Warnings | _Sides | _Drawing] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(_Sentence(text))

    def tile(self, tiles: Sequence[tuple[str, str]]) -> None:
        """Figures that stand out: (value, what it is of)."""
        self.parts.append(_Tiles(tiles))

    def tabulate(self, header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = True) -> None:
        """A table; every column but the first is set to the right where `numeric`."""
        self.parts.append(_Table(header, rows, numeric))

    def warn(self, sentences: Sequence[str]) -> None:
        """What must not be missed, a sentence each."""
        self.parts.append(_Warnings(sentences))

    def put_side_by_side(self, about: str, before: str, one: tuple[str, str], other: tuple[str, str]) -> None:
        """Two texts, each with its name, that go on from `before`; a line about them stands above."""
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one[1], other[1], strict=False))
        same = "".join(letter for letter, _ in pairs)
        sides = [(name, text[len(same) :]) for name, text in (one, other)]
        self.parts.append(_Sides(about, before, same, sides))

    def show(self, name: str, alt: str, draw: Callable[..., Figure]) -> None:
        """A figure; `name` is that of its file, and `draw` makes it for a `width`."""
        self.parts.append(_Drawing(name, alt, draw))

    @property
    def figures(self) -> list[_Drawing]:
        return [part for part in self.parts if isinstance(part, _Drawing)]


@dataclass
class Page:
    """A finished page.

    Attributes:
        title: of the page.
        sections: in reading order.
        missing: sentences on what the page cannot show and what would supply it.
        data: what it was drawn from, JSON that a reader can save.
    """

    title: str
    sections: list[Section]
    missing: list[str]
    data: dict[str, Any]

    def to_html(self) -> str:
        """One self-contained HTML document; equal pages give equal text."""
        environment = Environment(
            loader=PackageLoader("moesparse.report", "."),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=StrictUndefined,
        )
        data = json.dumps(self.data, separators=(",", ":")).encode()
        return environment.get_template("page.html.jinja").render(
            title=self.title,
            sections=self.sections,
            missing=self.missing,
            version=__version__,
            data=base64.b64encode(data).decode(),
            data_name=_DATA_FILE,
            data_size=f"{max(1, round(len(data) / 1024)):,} KiB",
        )

    def pngs(self) -> dict[str, bytes]:
        """Every figure by name."""
        return {each.name: figures.to_png(each.draw()) for section in self.sections for each in section.figures}


def layer_of(block: str) -> str:
    """ "model.layers.3.mlp.experts" -> "3"; the name itself when it holds no number."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", block)
    return numbers[-1] if numbers else block


def ranges(ids: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2 5"."""
    runs: list[list[int]] = []
    for value in ids:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return " ".join(str(a) if a == b else f"{a} {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)


def format_size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
