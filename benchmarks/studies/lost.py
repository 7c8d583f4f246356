"""What `moesparse compare` says of models that lost experts: does KL by domain tell the perplexity, and do they loop?

    python -m benchmarks.studies.lost [--quick] [--seeds 3] [--testbed embedded] [-o FOLDER]

Writes study_lost.json and study_lost.png. The models are those of merging.py, a quarter and a half of their experts
removed or merged, with and without a refit; each is saved and compared with the dense one, folder to folder, on the
held-out windows. Then all continue the same prompts of 32 tokens, 24 in all domains together, by 128 tokens, greedily
and drawn at temperature 1. Protocol otherwise: protocol.py.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import moesparse
from benchmarks.studies.merging import METHODS, SHARES, Pruned
from benchmarks.studies.protocol import Study, mean_and_spread, parser
from moesparse.evaluate import compare
from moesparse.evaluate.continuations import make_prompts
from moesparse.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moesparse.evaluate.compared import Comparison

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 24, 32, 128


class Compared:
    """The dense folder, and the windows and prompts that all are compared on."""

    def __init__(self, study: Study, work: Path) -> None:
        self.study, self.work = study, work
        self.pruned = Pruned(study)
        self.windows = torch.cat(list(study.heldout.values()))
        self.domains = [domain for domain, windows in study.heldout.items() for _ in windows]
        self.prompts = make_prompts(
            self.windows,
            self.domains,
            count=6 if study.quick else PROMPTS,
            length=PROMPT_TOKENS,
            new_tokens=64 if study.quick else NEW_TOKENS,
            temperature=1.0,
            context=self.windows.shape[1],
        )
        self.dense = self._save(study.model, "dense")

    def _save(self, model: Any, name: str) -> Path:
        folder = self.work / name
        moesparse.save_pretrained(model, folder, tokenizer=self.study.testbed.tokenizer)
        return folder

    def measure(self, settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The figures that are kept of each, compared in one run, in which the dense model is passed through once."""
        if not settings:
            return []
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            folders = [
                self._save(self.pruned.model(**setting), f"{name}/{number}") for number, setting in enumerate(settings)
            ]
            found = compare(
                self.dense,
                folders,
                self.windows,
                self.domains,
                tokenizer=self.study.testbed.tokenizer,
                prompts=self.prompts,
                load=lambda each: moesparse.load_pretrained(each)[0],
                batch_size=self.study.batch,
                progress=None,
            )
        return [self._row(each) for each in found]

    def _row(self, found: Comparison) -> dict[str, Any]:
        assert found.generation is not None
        parts = {domain: figures_of.as_dict() for domain, figures_of in found.domains.items()}
        ratios = {name: part["perplexity"]["pruned"] / part["perplexity"]["dense"] for name, part in parts.items()}
        return {
            "kl": {name: part["kl"]["mean"] for name, part in parts.items()},
            "nats": {name: math.log(ratio) for name, ratio in ratios.items()},
            "loops": {kind: found.generation[kind] for kind in ("greedy", "sampled")},
            "warnings": found.warnings,
        }


def run(study: Study) -> None:
    ways = [(method, criterion, refit) for method, criterion in METHODS for refit in (False, True)]
    with tempfile.TemporaryDirectory() as work:
        compared = Compared(study, Path(work))
        for seed in study.seeds:
            for share in SHARES[1:] if study.quick else SHARES:
                settings = [
                    {"method": method, "criterion": criterion, "share": share, "seed": seed, "refit": refit}
                    for method, criterion, refit in (ways[:2] if study.quick else ways)
                ]
                missing = [setting for setting in settings if not study.select(**setting)]
                for setting, row in zip(missing, compared.measure(missing), strict=True):
                    study.measure(lambda row=row: row, **setting)


def correlation(pairs: list[tuple[float, float]], *, ranks: bool = False) -> float:
    """Pearson's, or Spearman's by the ranks."""
    values = torch.tensor(pairs, dtype=torch.float64).T
    return float(torch.corrcoef(values.argsort(1).argsort(1).double() if ranks else values)[0, 1])


def show(study: Study) -> None:
    """How far one figure tells the other, over all models and within each, and the loops."""
    pairs = [(row["kl"][name], row["nats"][name]) for row in study.rows for name in row["kl"]]
    print(
        f"{len(study.rows)} models, {len(pairs)} domains: nats above dense by KL, r {correlation(pairs):.3f}, ", end=""
    )
    ratio = sum(nats for _, nats in pairs) / sum(kl for kl, _ in pairs)
    print(f"Spearman {correlation(pairs, ranks=True):.3f}, {ratio:.2f} nats for a nat of KL")
    within = [
        correlation([(row["kl"][name], row["nats"][name]) for name in row["kl"]], ranks=True) for row in study.rows
    ]
    print("Spearman over the domains of one model: {:.2f} ± {:.2f}".format(*mean_and_spread(within)))
    worst = [max(row["kl"], key=row["kl"].get) == max(row["nats"], key=row["nats"].get) for row in study.rows]
    print(f"the domain of the largest KL is that of the largest loss in {sum(worst)} of {len(worst)} models")
    print(
        "\n| who stays by, the others | refit | gone | greedy loops, dense | pruned | sampled loops, dense | pruned |"
    )
    print("|---|---|---|---|---|---|---|")
    for share in SHARES:
        for refit in (False, True):
            for method, criterion in METHODS:
                rows = study.select(method=method, criterion=criterion, share=share, refit=refit)
                cells = [
                    "{:.0%}".format(mean_and_spread(row["loops"][kind][side]["loops"] for row in rows)[0])
                    for kind in ("greedy", "sampled")
                    for side in ("dense", "pruned")
                    if rows
                ]
                if cells:
                    print(f"| {criterion}, {method} | {'yes' if refit else 'no'} | {share:.0%} | {' | '.join(cells)} |")


def figure(study: Study) -> Figure:
    """The loss of every domain of every model over its KL."""
    drawn = figures.new_figure(3.6)
    axes = drawn.subplots()
    looks = zip(study.domains, [figures.BLUE, figures.ORANGE, "black", "0.45"] * 2, "os^DXPv", strict=False)
    for domain, colour, marker in looks:
        points = [(row["kl"][domain], row["nats"][domain]) for row in study.rows]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=domain, markersize=4.5, alpha=0.8)
    top = max(row["kl"][name] for row in study.rows for name in row["kl"])
    axes.plot([0, top], [0, top], "--", color="0.6", linewidth=1)
    axes.set_xlabel("KL(dense || pruned), mean nats a token")
    axes.set_ylabel("loss above dense, nats a token")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, frameon=False, ncols=2)
    return drawn


def main() -> None:
    arguments = parser(__doc__).parse_args()
    Study("study_lost", arguments).conduct(run, show, figure)


if __name__ == "__main__":
    main()
