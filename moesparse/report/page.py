"""What a report page is made of: sections of sentences, tables and figures, and the one HTML file they become."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesparse._version import __version__
from moesparse.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page", "Section", "format_size", "layer_of", "ranges", "table"]


@dataclass
class Section:
    """One part of the page: sentences and tables (HTML), figures by file name with what a blind reader hears."""

    title: str
    parts: list[str] = field(default_factory=list)
    figures: list[tuple[str, str, Figure]] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def show(self, name: str, alt: str, figure: Figure) -> None:
        self.parts.append(f"<!--figure:{name}-->")
        self.figures.append((name, alt, figure))


@dataclass
class Page:
    """A finished page.

    Attributes:
        title: of the page.
        sections: in reading order.
        missing: sentences on what the page cannot show and what would supply it.
    """

    title: str
    sections: list[Section]
    missing: list[str]

    def to_html(self) -> str:
        """One self-contained HTML document; equal pages give equal text."""
        body = []
        for section in self.sections:
            images = {name: (alt, figures.to_svg(figure)) for name, alt, figure in section.figures}
            content = "\n".join(section.parts)
            for name, (alt, svg) in images.items():
                data = base64.b64encode(svg).decode()
                image = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
                content = content.replace(f"<!--figure:{name}-->", f"<figure>{image}</figure>")
            body.append(f"<section>\n<h2>{html.escape(section.title)}</h2>\n{content}\n</section>")
        if self.missing:
            items = "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.missing)
            body.append(f"<section>\n<h2>Not on this page</h2>\n<ul>\n{items}\n</ul>\n</section>")
        return _DOCUMENT.format(title=html.escape(self.title), style=_STYLE, body="\n".join(body), version=__version__)

    def pngs(self) -> dict[str, bytes]:
        """Every figure by name."""
        return {name: figures.to_png(figure) for section in self.sections for name, _, figure in section.figures}


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


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = True) -> str:
    """An HTML table; every column but the first is set to the right where `numeric`."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if any(header) else ""
    body = "\n".join(line(row, "td") for row in rows)
    kind = ' class="numbers"' if numeric else ""
    return f'<div class="wide"><table{kind}>{head}<tbody>\n{body}\n</tbody></table></div>'


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #999; padding-bottom: .2rem; }
p { margin: .5rem 0; max-width: 46rem; }
figure { margin: 1rem 0; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .75rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; border-bottom: 1px solid #ddd; }
th { border-bottom: 1px solid #555; font-weight: 600; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; }
.wide { overflow-x: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; padding: 0; margin: 1rem 0; }
.tiles li { border: 1px solid #999; border-radius: 4px; padding: .5rem .9rem; font-size: .875rem; max-width: 13rem; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.3; }
footer { margin-top: 3rem; font-size: .875rem; color: #555; }
@media print { body { font-size: 10pt; max-width: none; padding: 0; } section { break-inside: auto; }
  figure, tr, .tiles { break-inside: avoid; } h2 { break-after: avoid; } .wide { overflow: visible; } }
"""

_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>Made by moesparse {version}. This page is one file: nothing is fetched when it is opened.</footer>
</body>
</html>
"""
