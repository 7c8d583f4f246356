"""How recovery grows with the amount of text: the 2:4 rows of study_recovery.py, distilled on fresh training text.

    python benchmarks/demo_model/fetch_text.py --work /tmp/demo_model
    python benchmarks/demo_model/build_text.py --work /tmp/demo_model --assets /tmp/demo_model/assets
    python -m benchmarks.studies.recovery_text --work /tmp/demo_model --start default --loss logits --tokens 1048576
    python -m benchmarks.studies.recovery_text                  # table and figure of what was measured
    python -m benchmarks.studies.recovery_text --testbed real --start default --loss logits --tokens 409600 --rates 5e-4

On a real testbed the text is that of benchmarks/real_weights/text.py, in windows of 512 that calibration does not see,
domains in turn, and --work is left out.

On the embedded model the text is what it was trained on. Masks and weights see the 160 calibration windows of
study_recovery.py; distillation then sees windows of 256 tokens, as many of each domain, drawn by the seed without
repetition until a domain's text is used up (7.86 M tokens in all: the smallest domain has 5123 windows) and then drawn
anew; a row's repeats says how many windows were seen before. Eight windows a domain are held back from all draws, and
learning rates chosen on them. Before a run the drawn windows are checked to share no 60 characters with the shipped
held-out text. Perplexity and seconds as in study_recovery.py. Rows are written as they are measured.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_model.build_text import window_hashes
from benchmarks.results import RESULTS as RESULTS_FOLDER
from benchmarks.studies.protocol import folder_of
from benchmarks.studies.recovery import GOAL, HELDOUT, STARTS, measure, plus_minus
from benchmarks.studies.testbed import EMBEDDED, Testbed, add_option, open_testbed
from moesparse import demo
from moesparse.checkpoints.pretrained import load_pretrained
from moesparse.distillation import Settings, distill
from moesparse.evaluate import perplexity
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.system.memory import peak_memory, reset_peak_memory

RESULTS = RESULTS_FOLDER / "cpu"
LENGTH = 256
HELD_BACK = 8
STEP = {"epochs": 1, "batch_size": 8, "micro_batch": 8}
LOSSES: dict[str, tuple[str, Settings]] = {
    "blockwise": ("blockwise", Settings(**STEP)),
    "paper": ("global", Settings(**STEP)),
    "logits": ("global", Settings(expert_weight=0.0, logit_share=1.0, **STEP)),
    "all": ("global", Settings(expert_weight=0.0, logit_share=1.0, train="all", **STEP)),
}
"""By name: mode and settings. paper is CE + lambda * experts, logits is KL to the teacher alone, and all is logits with
all weights in training."""


def windows(work: Path, count: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """([count, 256] training windows that take turns by domain, [6 * HELD_BACK, 256] that no seed draws, how many of
    count came up before)."""
    drawn, held, repeats = [], [], 0
    wanted = -(-count // len(demo.DOMAINS))
    for domain in demo.DOMAINS:
        tokens = torch.from_numpy(np.load(work / "tokens" / f"{domain}.npy").astype(np.int64))
        cut = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(12345))
        held.append(cut[order[:HELD_BACK]])
        rest = order[HELD_BACK:]
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randperm(len(rest), generator=generator) for _ in range(-(-wanted // len(rest)))]
        drawn.append(cut[rest[torch.cat(draws)[:wanted]]])
        repeats += max(wanted - len(rest), 0)
    return torch.stack(drawn, 1).flatten(0, 1)[:count], torch.cat(held), repeats


def refuse_leaks(ids: Tensor) -> None:
    """SystemExit when a window shares 60 characters in a row with the shipped held-out text."""
    _, tokenizer = demo.load()
    held = np.unique(np.concatenate([window_hashes(demo.text("heldout", domain)) for domain in demo.DOMAINS]))
    drawn = np.concatenate([window_hashes(text) for text in tokenizer.batch_decode(ids)])
    shared = int(np.isin(drawn, held).sum())
    if shared:
        raise SystemExit(f"{shared} runs of 60 characters of the training text are held out: build the text again")


def text_for(testbed: Testbed, tokens: int, seed: int, work: Path | None) -> tuple[Tensor, Tensor, int]:
    """`windows` of a testbed; SystemExit where the embedded model's text was not built."""
    if testbed.name == EMBEDDED:
        if work is None:
            raise SystemExit("--work must name the folder of the embedded model's training text, got nothing")
        drawn = windows(work, tokens // LENGTH, seed)
        refuse_leaks(drawn[0])
        return drawn
    # its beginning is what pruning saw, and what follows is held back from training
    first, held = testbed.default_windows, HELD_BACK * len(testbed.domains)
    whole = testbed.draw(first + held + tokens // testbed.length, seed)
    return whole[first + held :], whole[first : first + held], 0


def run(
    testbed: Testbed,
    start: str,
    loss: str,
    tokens: int,
    rate: float,
    seed: int,
    work: Path | None,
    heldout: int = HELDOUT,
) -> dict[str, Any]:
    """One pruned model, distilled."""
    ids, held, repeats = text_for(testbed, tokens, seed, work)
    teacher = testbed.model
    if start in STARTS:
        student = copy.deepcopy(teacher)
        saliency, update = STARTS[start]
        recipe = Recipe(weights="2:4", saliency=saliency, update=update, seed=seed)
        prune(student, testbed.calibration(seed), recipe, batch_size=testbed.batch)
    else:
        student = load_pretrained(start, dtype=torch.float32)[0]
    mode, settings = LOSSES[loss]
    settings = dataclasses.replace(settings, learning_rate=rate)
    if testbed.name != EMBEDDED:
        settings = dataclasses.replace(settings, batch_size=4, micro_batch=4)
    row: dict[str, Any] = {"pruned": measure(testbed, student, heldout), "repeats": repeats}
    reset_peak_memory()
    began = time.process_time()
    report = distill(student, teacher, ids, mode, settings=settings)
    row |= {"seconds": time.process_time() - began, "wall_seconds": report.seconds, "peak_bytes": peak_memory()}
    row |= {"perplexity": measure(testbed, student, heldout), "warnings": report.warnings}
    row["held_back"] = perplexity(student, held, batch_size=testbed.batch).perplexity
    first, last = report.rows[: len(report.rows) // 10], report.rows[-(len(report.rows) // 10) :]
    for part in ("ce", "kl"):
        if part in last[0]:
            row[part] = [statistics.fmean(each[part] for each in rows) for rows in (first, last)]
    return row


def show(result: dict[str, Any]) -> None:
    """The table of docs/recovery.md."""
    dense = result["dense"]
    print(f"\ndense {dense:.2f}, goal {dense * GOAL:.2f}\n")
    print(
        "| start | loss | tokens | rate | draws | as pruned | held-back text | perplexity | above dense | CPU s | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, rows in sorted(result["rows"].items(), key=lambda item: _order(item[0])):
        start, loss, tokens, rate = name.split()
        found = [row["perplexity"] for row in rows.values()]
        mean = statistics.fmean(found)
        pruned, held, seconds = (
            statistics.fmean(row[key] for row in rows.values()) for key in ("pruned", "held_back", "seconds")
        )
        label = " + ".join(STARTS.get(start, (start,)))
        peak = max(row["peak_bytes"] for row in rows.values()) / 2**30
        print(
            f"| {label} | {loss} | {int(tokens) / 1e6:.2f} M | {rate} | {len(found)} | "
            f"{pruned:.2f} | {held:.2f} | {plus_minus(found)} | {mean / dense - 1:.1%} | {seconds:.0f} | {peak:.2f} |"
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Perplexity against tokens, the best learning rate by held-back text of each start and loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for name, rows in result["rows"].items():
        start, loss, tokens, _ = name.split()
        held, found = (statistics.fmean(row[key] for row in rows.values()) for key in ("held_back", "perplexity"))
        points = best.setdefault((start, loss), {0: (0.0, statistics.fmean(row["pruned"] for row in rows.values()))})
        points[int(tokens)] = min(points.get(int(tokens), (held, found)), (held, found))
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    for (start, loss), points in sorted(best.items()):
        places = sorted(points)
        axes.plot(
            [place / 1e6 for place in places], [points[place][1] for place in places], "o-", label=f"{start}, {loss}"
        )
    axes.axhline(result["dense"], color="black", linewidth=1, label="dense")
    axes.axhline(result["dense"] * GOAL, color="black", linewidth=1, linestyle=":", label="dense + 2%")
    axes.set_xlabel("tokens of training text (millions)")
    axes.set_ylabel("held-out perplexity, 2:4")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _order(name: str) -> tuple[str, str, int, float]:
    start, loss, tokens, rate = name.split()
    return start, loss, int(tokens), float(rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    parser.add_argument(
        "--work", type=Path, help="the folder build_text.py wrote to; left out: measure nothing, unless real"
    )
    parser.add_argument(
        "--start",
        default="default",
        metavar=f"{'|'.join(STARTS)}|FOLDER",
        help="rules, or a model that benchmarks.studies.weights --keep has left",
    )
    parser.add_argument("--heldout", type=int, default=HELDOUT, help="held-out windows of each domain")
    parser.add_argument("--loss", choices=LOSSES, default="logits")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2**18], help="amounts of training text")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="draws of text")
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3], help="learning rates")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of rows and figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = folder_of(arguments.testbed, arguments.output) / "study_recovery_text.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    if arguments.start not in STARTS and not (Path(arguments.start) / "config.json").is_file():
        raise SystemExit(f"--start must be {', '.join(STARTS)} or a folder with a checkpoint, got {arguments.start}")
    start = arguments.start if arguments.start in STARTS else Path(arguments.start).name
    if arguments.work is not None or arguments.testbed != EMBEDDED:
        testbed = open_testbed(arguments.testbed)
        if "dense" not in result:
            result["dense"] = measure(testbed, testbed.model, arguments.heldout)
        if result.setdefault("heldout", HELDOUT if result["rows"] else arguments.heldout) != arguments.heldout:
            raise SystemExit(f"--heldout must be {result['heldout']} as in {path}, got {arguments.heldout}")
        for tokens, rate, seed in itertools.product(arguments.tokens, arguments.rates, arguments.seeds):
            rows = result["rows"].setdefault(f"{start} {arguments.loss} {tokens} {rate:g}", {})
            if str(seed) not in rows:
                rows[str(seed)] = run(
                    testbed, arguments.start, arguments.loss, tokens, rate, seed, arguments.work, arguments.heldout
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
