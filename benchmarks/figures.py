"""Figures from the result files: where the layer stands under the roofline, and its speed-up by batch and by tokens.

    python -m benchmarks.figures benchmarks/results/NVIDIA_H100_80GB_HBM3

Draws roofline.png, speedup_decode.png and speedup_prefill.png into that folder, from decode.json and prefill.json; a
figure without rows is not drawn. Only what the files hold is drawn, losses included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "MARKERS", "draw", "main"]

# Okabe and Ito's colours, told apart with every kind of colour vision; markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PACKED = ("moe_nm", "moe_nm reference")


def _rows(folder: Path, part: str) -> list[dict[str, Any]]:
    path = folder / f"{part}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [row for row in rows if row["status"] == "ok" and row["dtype"] == "bfloat16"]


def _caption(figure: Any, rows: list[dict[str, Any]]) -> None:
    row = rows[-1]
    words = (
        f"{row['device']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}; bf16, L2 flushed, "
        if "l2_bytes" in row
        else f"{row['device']}, torch {row['torch']}, commit {row['commit']}; warm caches, tiny layers, "
    )
    figure.text(0.01, 0.01, words + "median of the runs", fontsize=7, color="#444444")


def _speedup(rows: list[dict[str, Any]], title: str, xlabel: str) -> Any:
    import matplotlib.pyplot as plt

    ours = [row for row in rows if row["contender"] in _PACKED and "speedup" in row]
    laws = list(dict.fromkeys(row["routing"] for row in rows))
    figure, panels = plt.subplots(1, len(laws), figsize=(5.2 * len(laws), 4.2), sharey=True, squeeze=False)
    for panel, law in zip(panels[0], laws, strict=True):
        ticks = sorted({row["tokens"] for row in rows})
        for number, shape in enumerate(dict.fromkeys(row["shape"] for row in rows)):
            points = sorted(
                (row["tokens"], row["speedup"]) for row in ours if row["shape"] == shape and row["routing"] == law
            )
            if points:
                style = {"color": COLOURS[number % 7], "marker": MARKERS[number % 7]}
                panel.plot(*zip(*points, strict=True), label=shape, linewidth=1.5, markersize=5, **style)
        panel.axhline(1.0, color="#444444", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xlabel(xlabel)
        panel.set_title(f"{law} routing", fontsize=10)
        panel.grid(alpha=0.25)
    panels[0][0].set_ylim(0, 1.08 * max([1.0, *(row["speedup"] for row in ours)]))
    panels[0][0].set_ylabel("speed-up over the best dense layer")
    panels[0][-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _caption(figure, rows)
    return figure


def _roofline(rows: list[dict[str, Any]]) -> Any:
    """Dense flops over bytes against dense flops per second, under the two measured ceilings."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, panel = plt.subplots(figsize=(7.2, 5.0))
    shown = [row for row in rows if row["routing"] == "uniform"]
    dense = [row for row in shown if not row["sparse"]]
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in dense:
        key = (row["shape"], row["tokens"])
        if key not in best or row["us"] < best[key]["us"]:
            best[key] = row
    copy, matmul = shown[-1]["copy_gb_s"] / 1e3, shown[-1]["matmul_tflop_s"]
    intensity = [row["dense_flops"] / row["bytes"] for row in shown]
    span = np.geomspace(min(intensity) / 1.5, max(*intensity, 2 * matmul / copy), 200)
    panel.plot(span, np.minimum(span * copy, matmul), color="#444444", linewidth=1.5)
    panel.annotate(
        f"copy {copy:.3g} TB/s",
        (span[20], span[20] * copy),
        rotation=0,
        fontsize=8,
        xytext=(-4, 10),
        textcoords="offset points",
        ha="right",
    )
    panel.annotate(
        f"dense matmul {matmul:.3g} TFLOP/s",
        (span[-1], matmul),
        fontsize=8,
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
    )
    for number, shape in enumerate(dict.fromkeys(row["shape"] for row in shown)):
        style = {"color": COLOURS[number % 7], "marker": MARKERS[number % 7], "linestyle": "none", "markersize": 5}
        for name, points, fill in (
            (shape, [row for row in shown if row["shape"] == shape and row["contender"] in _PACKED], "full"),
            (None, [row for key, row in best.items() if key[0] == shape], "none"),
        ):
            panel.plot(
                [row["dense_flops"] / row["bytes"] for row in points],
                [row["dense_tflop_s"] for row in points],
                label=name,
                fillstyle=fill,
                **style,
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("dense flops per byte moved at least")
    panel.set_ylabel("dense TFLOP/s")
    panel.set_title("Expert layers under the measured ceilings: 2:4 packed (filled), best dense (hollow)", fontsize=10)
    panel.legend(fontsize=8, frameon=False, loc="lower right")
    panel.grid(alpha=0.25)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _caption(figure, shown)
    return figure


def draw(folder: Path) -> list[Path]:
    """Draw what the folder has rows for; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode, prefill = _rows(folder, "decode"), _rows(folder, "prefill")
    figures = {}
    if decode or prefill:
        figures["roofline"] = _roofline(decode + prefill)
    if decode:
        figures["speedup_decode"] = _speedup(decode, "2:4 experts at decode", "tokens in the batch")
    if prefill:
        figures["speedup_prefill"] = _speedup(prefill, "2:4 experts at prefill", "tokens")
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=160)
        plt.close(figure)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="benchmarks/results/<gpu>")
    folder = parser.parse_args(arguments).folder
    written = draw(folder)
    if not written:
        raise SystemExit(f"{folder} holds no rows of decode.json or prefill.json that can be drawn")
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
