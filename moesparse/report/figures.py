"""Figures of a report: plain matplotlib, no window system, no global state.

For eyes and paper: cividis, which colour-blind readers and grey printers see as one ramp; removed experts carry a cross
and bars a hatch, so that no fact hangs on colour alone; numbers are printed in the cells while they are legible. In the
page, lines and words take its colours, light or dark.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from moesparse.errors import UsageError
from moesparse.weights.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "cividis"
BLUE, ORANGE = "#0072b2", "#e69f00"
"""Of Okabe and Ito's palette; they differ in lightness too."""

INK, PAPER = "#1a1a1a", "#fefefe"
"""Of lines and words, and of what is left white: `to_inline_svg` puts the page's own in their place."""

_LOOKS: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
)
_LOOKS |= {"axes.facecolor": "none"}

P = ParamSpec("P")

WIDTH, SLIM = 9.0, 4.2
"""Inches of a figure on a page, and of the same where the page is as narrow as a telephone."""

_CELLS_WITH_NUMBERS = 24
_LABELLED = 32


def check_plots() -> None:
    """Raise UsageError where nothing can be drawn, before any work for it; names the extra that brings matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "figures must be drawn by matplotlib, which is not installed: pip install 'moesparse[plots]'"
        ) from error


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure in inches.

    Raises:
        UsageError: matplotlib is missing; names the extra that brings it.
    """
    check_plots()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _in_ink(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with INK for lines and words."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        check_plots()
        import matplotlib

        with matplotlib.rc_context(_LOOKS):
            return draw(*args, **options)

    return drawn


@_in_ink
def heat_map(
    values: Tensor,
    rows: Sequence[str],
    *,
    label: str,
    removed: Sequence[Sequence[int]] | None = None,
    top: float | None = None,
    width: float = WIDTH,
) -> Figure:
    """Layers down, experts across.

    Args:
        values: [layers, experts], 0 or more; NaN is drawn hatched.
        rows: label of each layer.
        label: of the colour bar.
        removed: per layer the experts that get a cross.
        top: value of the brightest colour; the largest value when None.
        width: of the figure, WIDTH or SLIM.
    """
    layers = len(values)
    figure = new_figure(min(1.6 + 0.34 * layers, 11), width)
    axes = figure.subplots()
    image = _draw_map(axes, values, rows, removed, top)
    axes.set_xlabel("expert" if removed is None else "expert (× removed)")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.015)
    return figure


@_in_ink
def domain_maps(shares: Mapping[str, Tensor], rows: Sequence[str], *, width: float = WIDTH) -> Figure:
    """One small heat map a domain on one colour scale.

    Args:
        shares: domain -> [layers, experts], each layer's values in units of the even share.
        rows: label of each layer.
        width: of the figure, WIDTH or SLIM.
    """
    columns = 2 if len(shares) > 1 and width > SLIM else 1
    lines = -(-len(shares) // columns)
    layers = len(rows)
    figure = new_figure(lines * min(1.1 + 0.2 * layers, 5), width)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    top = max(float(values.max()) for values in shares.values())
    for axes, (name, values) in zip(grid.flat, shares.items(), strict=False):
        image = _draw_map(axes, values, rows, None, top, numbers=False)
        axes.set_title(name, fontsize=10)
    for axes in list(grid.flat)[len(shares) :]:
        axes.remove()
    figure.supxlabel("expert", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    figure.colorbar(image, ax=grid, label="tokens, in even shares", fraction=0.04, pad=0.015)
    return figure


@_in_ink
def divergence(pairs: Tensor, names: Sequence[str], rows: Sequence[str], *, width: float = WIDTH) -> Figure:
    """Specialisation by layer, and between every two domains in the layer that specialises most.

    Args:
        pairs: [layers, domains, domains], Jensen-Shannon divergences in bits.
        names: of the domains.
        rows: label of each layer.
        width: of the figure, WIDTH or SLIM.
    """
    layers, domains = pairs.shape[:2]
    first, second = torch.triu_indices(domains, domains, 1)
    between = pairs[:, first, second]
    figure, left, right = _pair(max(2.9, 1.4 + 0.3 * domains), width, (3, 2))
    mean, low, high = between.mean(1), between.amin(1), between.amax(1)
    where = list(range(layers))
    left.vlines(where, low.tolist(), high.tolist(), color="0.45", linewidth=3, label="least to most of two domains")
    left.plot(where, mean.tolist(), "o", color=BLUE, markersize=7, markeredgecolor=INK, label="mean of all pairs")
    left.set_ylim(0, max(0.05, float(high.max()) * 1.15))
    left.set_xlim(-0.5, layers - 0.5)
    _ticks(left, "x", rows)
    left.set_xlabel("layer")
    left.set_ylabel("Jensen-Shannon divergence, bits")
    left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    _open_frame(left)
    most = int(mean.argmax())
    matrix = pairs[most].masked_fill(torch.eye(domains, dtype=torch.bool), torch.nan)
    _draw_map(right, matrix, names, None, float(between.max()), numbers=domains <= 8)
    right.set_xticks(range(domains), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    right.set_title(f"between domains, layer {rows[most]}", fontsize=10)
    return figure


@_in_ink
def bars(
    groups: Mapping[str, Mapping[str, float]], *, label: str, digits: str = "{:.2f}", width: float = WIDTH
) -> Figure:
    """Horizontal bars in groups of one to three, each with its number.

    Args:
        groups: group -> {series: value}; the series of the first group name the legend. Infinite values get no bar.
        label: of the axis.
        digits: how a number is printed.
        width: of the figure, WIDTH or SLIM.
    """
    series = list(next(iter(groups.values())))
    figure = new_figure(0.9 + 0.26 * len(groups) * len(series) + 0.1 * len(groups), width)
    axes = figure.subplots()
    height = 0.8 / len(series)
    looks: list[dict[str, Any]] = [{"color": PAPER, "hatch": "////"}, {"color": BLUE}, {"color": ORANGE}]
    finite = [v for group in groups.values() for v in group.values() if v < float("inf")]
    axes.set_xlim(0, 1.15 * max(finite, default=1.0))
    for number, name in enumerate(series):
        look = looks[number] if len(series) > 1 else looks[1]
        for position, group in enumerate(groups.values()):
            value, at = group[name], position + (number - (len(series) - 1) / 2) * height
            shown = value if value < float("inf") else 0.0
            axes.barh(
                at,
                shown,
                height * 0.92,
                edgecolor=INK,
                linewidth=0.8,
                **look,
                label=name if position == 0 else None,
            )
            axes.annotate(f" {digits.format(value)}", (shown, at), va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_xlabel(label)
    if len(series) > 1:
        figure.legend(loc="outside upper right", ncols=len(series), fontsize=9, frameon=False)
    _open_frame(axes)
    return figure


@_in_ink
def lines(
    series: Mapping[str, Sequence[float]], rows: Sequence[str], *, across: str, label: str, width: float = WIDTH
) -> Figure:
    """Values of 0 or more along one axis, a line with marks of its own for each of one to three series.

    Args:
        series: name -> one value for each row; NaN leaves a gap.
        rows: labels across.
        across, label: of the axes.
        width: of the figure, WIDTH or SLIM.
    """
    figure = new_figure(2.9, width)
    axes = figure.subplots()
    looks = [("o", "-", BLUE), ("s", "--", ORANGE), ("^", ":", INK)]
    where = list(range(len(rows)))
    for (name, values), (mark, dash, colour) in zip(series.items(), looks, strict=False):
        size = 6 if len(rows) <= _LABELLED else 3
        axes.plot(where, list(values), mark, linestyle=dash, color=colour, markersize=size, label=name)
    known = [value for values in series.values() for value in values if value == value]
    axes.set_ylim(0, 1.08 * max(known, default=1.0) or 1.0)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    _ticks(axes, "x", rows)
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    if len(series) > 1:
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), frameon=False)
    _open_frame(axes)
    return figure


@_in_ink
def budget_map(
    patterns: Sequence[Sequence[str]],
    losses: Mapping[str, Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    width: float = WIDTH,
) -> Figure:
    """What each layer's matrices keep, and beside it what that is estimated to cost.

    Args:
        patterns: [layers][matrices], n:m or "dense"; printed in the cell, whose shade is the share kept.
        losses: part -> [layers], stacked.
        rows: label of each layer.
        columns: label of each matrix.
        width: of the figure, WIDTH or SLIM.
    """
    layers = len(rows)
    figure, left, right = _pair(min(1.6 + 0.3 * layers, 14), width, (2, 3), sharey=True)
    kept = [[1.0 if name == "dense" else Pattern.parse(name).density for name in row] for row in patterns]
    left.imshow(kept, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for layer, row in enumerate(patterns):
        for matrix, name in enumerate(row):
            left.text(
                matrix,
                layer,
                name,
                ha="center",
                va="center",
                fontsize=9 if layers <= _LABELLED else 6,
                color="white" if kept[layer][matrix] < 0.45 else "black",
            )
    left.set_xticks(range(len(columns)), list(columns), fontsize=8)
    left.set_ylabel("layer")
    start = [0.0] * layers
    looks: list[dict[str, Any]] = [{"color": PAPER, "hatch": "////"}, {"color": BLUE}]
    for (name, values), look in zip(losses.items(), looks, strict=True):
        right.barh(range(layers), values, 0.7, left=start, edgecolor=INK, linewidth=0.8, label=name, **look)
        start = [a + b for a, b in zip(start, values, strict=True)]
    _ticks(left, "y", rows)
    right.tick_params(axis="y", left=False)
    right.set_xlabel("estimated loss, nats per token")
    right.set_xlim(0, 1.05 * max(*start, 1e-9))
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    _open_frame(right)
    return figure


def to_inline_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an svg element for a page whose style says --ink and --paper; equal figures give equal text.

    Args:
        name: before every id in it, which must differ from those of other figures on the page.
        alt: what a blind reader hears.
    """
    import matplotlib

    out = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_LOOKS, "svg.hashsalt": "moesparse"}):
        figure.savefig(out, format="svg", facecolor="none", metadata=nothing)
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    # its style would be that of the whole page, and a page knows the names of SVG
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    for colour, variable in ((INK, "var(--ink)"), (PAPER, "var(--paper)")):
        text = text.replace(f'fill="{colour}"', f'style="fill: {variable}"').replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 150 dots per inch."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(_LOOKS):
        figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def _draw_map(
    axes: Axes,
    values: Tensor,
    rows: Sequence[str],
    removed: Sequence[Sequence[int]] | None,
    top: float | None,
    *,
    numbers: bool = True,
) -> Any:
    known = values[~values.isnan()]
    top = max(top if top is not None else float(known.max()) if len(known) else 1.0, 1e-12)
    axes.set_facecolor(PAPER)
    axes.patch.set_hatch("///")
    axes.patch.set_edgecolor("0.6")
    image = axes.imshow(values.numpy(), cmap=COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    _ticks(axes, "y", rows)
    _ticks(axes, "x", [str(expert) for expert in range(values.shape[1])])
    crossed = {(layer, expert) for layer, gone in enumerate(removed or ()) for expert in gone}
    share = _share(axes)
    small = numbers and values.shape[1] <= _CELLS_WITH_NUMBERS * share and values.shape[0] <= _CELLS_WITH_NUMBERS
    if small:
        for layer, expert in ((layer, expert) for layer in range(values.shape[0]) for expert in range(values.shape[1])):
            value = float(values[layer, expert])
            if value == value and (layer, expert) not in crossed:
                dark = value < 0.45 * top
                text = f"{value:.2f}" if top < 10 else f"{value:.0f}"
                axes.text(expert, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    if crossed:
        layers, experts = zip(*sorted(crossed), strict=True)
        size = min(7, max(1.5, 300 * share / values.shape[1]))
        # black on a white edge: seen on both ends of the ramp
        axes.plot(experts, layers, "x", color="white", markersize=size + 1, markeredgewidth=size / 2)
        axes.plot(experts, layers, "x", color="black", markersize=size, markeredgewidth=size / 5)
    return image


def _ticks(axes: Axes, which: str, labels: Sequence[str]) -> None:
    """At most _LABELLED labels, evenly spaced; fewer across a slim figure."""
    share = _share(axes) if which == "x" else 1
    step = max(1, -(-len(labels) // int(_LABELLED * share)))
    where = range(0, len(labels), step)
    set_ticks = axes.set_xticks if which == "x" else axes.set_yticks
    set_ticks(list(where), [labels[i] for i in where], fontsize=8)


def _pair(height: float, width: float, ratios: tuple[int, int], *, sharey: bool = False) -> tuple[Figure, Axes, Axes]:
    """Two plots side by side, or one above the other where the figure is slim."""
    if width > SLIM:
        figure = new_figure(height, width)
        left, right = figure.subplots(1, 2, width_ratios=ratios, sharey=sharey)
    else:
        figure = new_figure(2 * height, width)
        left, right = figure.subplots(2, 1, sharey=sharey)
    return figure, left, right


def _share(axes: Axes) -> float:
    """Width of the figure, as a share of a broad one's."""
    figure: Any = axes.figure
    return figure.get_figwidth() / WIDTH


def _open_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
