"""Every mask rule and weight rule on one testbed: held-out perplexity, spread over calibration seeds, CPU seconds.

    python -m benchmarks.studies.weights                    # 2:4, three seeds: the table in the README
    python -m benchmarks.studies.weights --pattern 4:8 --pattern 0.7 --seeds 1
    python -m benchmarks.studies.weights --quick            # one seed, few windows, nothing written
    python -m benchmarks.studies.weights --testbed real --seeds 1 --rule moe-pruner+none --rule auto+auto --heldout 28

A seed draws the calibration windows: 160 of the embedded model's 242, 128 of a real testbed's. Perplexity: windows
scored independently, first token unscored; geometric mean over the domains (benchmarks/studies/testbed.py). "above" is
the mean over windows of the log loss above the dense model's, with its standard error. Rows are written as they are
measured, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

from benchmarks.results import RESULTS as RESULTS_FOLDER
from benchmarks.studies.protocol import folder_of
from benchmarks.studies.testbed import Score, Testbed, add_option, open_testbed
from moesparse.checkpoints.pretrained import save_pretrained
from moesparse.models.fingerprint import model_fingerprint
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune

RULES = (
    ("random", "none"),
    ("magnitude", "none"),
    ("wanda", "none"),
    ("moe-pruner", "none"),
    ("moe-pruner", "rescale"),
    ("moe-pruner", "least-squares"),
    ("moe-pruner", "least-squares+rescale"),
    ("moe-pruner", "asymmetric"),
    ("moe-pruner", "asymmetric+rescale"),
    ("sparsegpt", "obs"),
    ("gated-sparsegpt", "obs"),
    ("gated-sparsegpt", "least-squares+rescale"),
    ("admm", "least-squares+rescale"),
    ("gated-admm", "least-squares"),
    ("gated-admm", "least-squares+rescale"),
    ("gated-admm", "asymmetric"),
    ("gated-admm", "asymmetric+rescale"),
)


def run(
    testbed: Testbed, recipe: Recipe, limit: int | None, dense: Score, count: int | None, kept: Path | None
) -> dict[str, float]:
    """A pruned copy: its perplexity, how far its loss is above the dense one's, and the CPU seconds of pruning."""
    model = copy.deepcopy(testbed.model)
    windows = testbed.calibration(recipe.seed) if count is None else testbed.draw(count, recipe.seed)
    started = time.process_time()
    prune(model, windows, recipe, batch_size=testbed.batch)
    seconds = time.process_time() - started
    if kept is not None:
        save_pretrained(model, kept, tokenizer=testbed.tokenizer)
    scored = testbed.score(model, testbed.heldout(limit))
    above, error = scored.above(dense)
    return {"perplexity": scored.perplexity, "above": above, "above_error": error, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    parser.add_argument("--pattern", action="append", help="2:4 when left out; repeat for more")
    parser.add_argument("--rule", action="append", metavar="MASK+WEIGHT", help="mask and weight rule; repeat for more")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, help="of calibration text; the testbed's own number when left out")
    parser.add_argument("--heldout", type=int, help="held-out windows of each domain; all when left out")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the pruned models, in folders of their own")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 windows a domain, nothing written")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS_FOLDER / "cpu", help="folder of the rows")
    arguments = parser.parse_args()
    limit = 4 if arguments.quick else arguments.heldout
    seeds = range(1 if arguments.quick else arguments.seeds)
    path = folder_of(arguments.testbed, arguments.output) / "study_weights.json"
    result = {"rows": {}}
    if path.is_file() and not arguments.quick:
        result = json.loads(path.read_text())
    testbed = open_testbed(arguments.testbed)
    protocol = {"model": model_fingerprint(testbed.model), "heldout_windows_per_domain": limit}
    for name, value in protocol.items():
        if result.setdefault(name, value) != value:
            raise SystemExit(f"--output must be a new folder for another {name}, got {path} with {result[name]}")
    if "dense_nats" not in result:
        scored = testbed.score(testbed.model, testbed.heldout(limit))
        result |= {"dense": scored.perplexity, "dense_nats": scored.nats}
    dense = Score(result["dense_nats"])
    print(f"dense {result['dense']:.2f}")
    rules = [tuple(rule.split("+", 1)) for rule in arguments.rule or ()] or RULES
    for pattern in arguments.pattern or ["2:4"]:
        for saliency, update in rules:
            name = f"{pattern} {saliency} {update}" + (f" {arguments.windows}" if arguments.windows else "")
            rows = result["rows"].setdefault(name, {})
            for seed in seeds:
                if str(seed) not in rows:
                    recipe = Recipe(weights=pattern, saliency=saliency, update=update, seed=seed)
                    kept = arguments.keep and arguments.keep / f"{name} {seed}".replace(" ", "_").replace(":", "of")
                    rows[str(seed)] = run(testbed, recipe, limit, dense, arguments.windows, kept)
                    if not arguments.quick:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps(result, indent=1) + "\n")
            values = [row["perplexity"] for row in rows.values()]
            seconds = statistics.mean(row["seconds"] for row in rows.values())
            spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(
                f"{pattern} {saliency:16} {update:22} {statistics.mean(values):8.2f}{spread}  {seconds:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
