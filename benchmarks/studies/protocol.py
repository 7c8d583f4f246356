"""What the studies share: texts, perplexity, rows that survive a stop, and the look of a figure.

Every study calibrates on 24 windows of its testbed's calibration text, as many of each domain, drawn by the seed, and
scores 4 held-out windows of each domain by themselves, the first token of each unscored: the geometric mean over the
domains of the perplexity. Held-out windows are spread evenly over each domain's documents and are the same for all.
What a window is, and which domains there are, is the testbed's (benchmarks/studies/testbed.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from benchmarks.results import RESULTS as RESULTS_FOLDER
from benchmarks.studies.testbed import EMBEDDED, Score, add_option, open_testbed, spread
from moesparse.calibration.windows import windows_hash
from moesparse.models.fingerprint import model_fingerprint
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = RESULTS_FOLDER / "cpu"


__all__ = ["Study", "curve", "finish", "folder_of", "geometric", "mean_and_spread", "parser", "spread"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all studies have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a few points on a few windows, to see that it runs")
    options.add_argument("--seeds", type=int, default=3, help="draws of calibration windows")
    add_option(options)
    options.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the rows and the figure")
    return options


def folder_of(testbed: str, output: Path) -> Path:
    """Where rows measured on a testbed lie: beside those of the embedded model, in a folder of its name."""
    return output if testbed == EMBEDDED else output / Path(testbed).name


class Study:
    """The rows of one study, each measured once, and what they are measured on.

    Attributes:
        testbed: what is measured on.
        model: its model, dense; `prune_copy` leaves it so.
        quick: fewer windows; every study also takes fewer points.
        seeds: draws of calibration windows.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, *, model: Any = None, **protocol: Any) -> None:
        """Args:
        name: of the result files.
        arguments: of `parser`.
        model: in place of the testbed's.
        protocol: what else decides a number; kept in the file.

        Raises:
            SystemExit: the file at hand holds rows of another protocol.
        """
        self.testbed = open_testbed(arguments.testbed)
        self.path = folder_of(arguments.testbed, arguments.output) / f"{name}.json"
        self.quick = arguments.quick
        self.seeds = range(1 if arguments.quick else arguments.seeds)
        self.calibration_windows = 6 if self.quick else 24
        self.model = self.testbed.model if model is None else model
        self.heldout = self.testbed.heldout(1 if self.quick else 4)
        self.protocol = {
            "model": model_fingerprint(self.model),
            "heldout": windows_hash(torch.cat(list(self.heldout.values()))),
            "heldout_windows_per_domain": len(next(iter(self.heldout.values()))),
            "calibration_windows": self.calibration_windows,
            "quick": self.quick,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **protocol,
        }
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            saved = json.loads(self.path.read_text())
            if saved["protocol"] != self.protocol:
                raise SystemExit(f"{self.path} holds rows of another protocol, {saved['protocol']}: move it away")
            self.rows = saved["rows"]
        self._started = time.perf_counter()

    def measure(self, run: Callable[[], dict[str, Any]], **setting: Any) -> dict[str, Any]:
        """The row with this setting: from the file, or measured now and written there."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in setting.items()):
                return row
        started = time.perf_counter()
        row = {**setting, **run()}
        row["seconds"] = round(time.perf_counter() - started, 2)
        self.rows.append(row)
        lines = ",\n".join(json.dumps(each) for each in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(f'{{"protocol": {json.dumps(self.protocol, indent=1)},\n"rows": [\n{lines}\n]}}\n')
        os.replace(temporary, self.path)
        print(f"{time.perf_counter() - self._started:6.0f} s  {_line(row)}", flush=True)
        return row

    @property
    def domains(self) -> Sequence[str]:
        """Of the held-out text."""
        return tuple(self.heldout)

    @property
    def batch(self) -> int:
        """Windows to run at once."""
        return self.testbed.batch

    def draw(self, count: int, seed: int, domain: str | None = None, length: int | None = None) -> Tensor:
        """Calibration windows, see `Testbed.draw`."""
        return self.testbed.draw(count, seed, domain, length)

    def scores(self, model: Any) -> Score:
        """Of every held-out window."""
        return self.testbed.score(model, self.heldout)

    def score(self, model: Any, domain: str | None = None) -> float:
        """Held-out perplexity of one domain, or the geometric mean over all."""
        wanted = self.heldout if domain is None else {domain: self.heldout[domain]}
        return self.testbed.score(model, wanted).perplexity

    def prune_copy(self, recipe: Recipe, windows: Tensor | None, model: Any = None) -> Any:
        """A pruned copy of the model (the testbed's unless another is given)."""
        copied = copy.deepcopy(self.model if model is None else model)
        prune(copied, windows, recipe, batch_size=self.batch)
        return copied

    def pruned(self, recipe: Recipe, windows: Tensor | None = None, *, model: Any = None) -> dict[str, float]:
        """Perplexity of a pruned copy, calibrated on `windows` or on those that the recipe's seed draws."""
        if windows is None:
            windows = self.draw(self.calibration_windows, recipe.seed)
        return {"perplexity": self.score(self.prune_copy(recipe, windows, model))}

    def select(self, **setting: Any) -> list[dict[str, Any]]:
        """Measured rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in setting.items())]

    def conduct(
        self, run: Callable[[Study], None], show: Callable[[Study], None], figure: Callable[[Study], Figure]
    ) -> None:
        """Measure what is missing, print the tables, and write the figure beside the rows."""
        torch.manual_seed(0)
        run(self)
        show(self)
        path = self.path.with_suffix(".png")
        figure(self).savefig(path, dpi=120)
        print(path)


def geometric(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    held = list(values)
    return statistics.mean(held), statistics.stdev(held) if len(held) > 1 else 0.0


def curve(axes: Axes, points: dict[float, list[float]], number: int, label: str, **style: Any) -> None:
    """Draw the mean over seeds at each place, with bars of one standard deviation."""
    from benchmarks.figures import COLOURS, MARKERS

    places = sorted(points)
    summary = [mean_and_spread(points[place]) for place in places]
    axes.errorbar(
        places,
        [mean for mean, _ in summary],
        [deviation for _, deviation in summary],
        label=label,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        **{"linewidth": 1.3, "markersize": 4.5, "capsize": 2, **style},
    )


def finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Titles, a light grid, and no frame that carries nothing."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if not isinstance(value, dict | list)
    )
