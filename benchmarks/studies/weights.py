"""Every mask rule and weight rule on the embedded model: held-out perplexity, spread over calibration seeds, seconds.

    python -m benchmarks.studies.weights                    # 2:4, three seeds: the table in the README
    python -m benchmarks.studies.weights --pattern 4:8 --pattern 0.7 --seeds 1
    python -m benchmarks.studies.weights --quick            # one seed, few windows, nothing written
    python -m benchmarks.studies.weights --model RUN/model --out large.json     # another model of demo_model/train.py

A seed draws 160 of the 242 calibration windows. Perplexity: windows of 256 tokens scored independently, first token
unscored; geometric mean over the six domains. Rows are written as they are measured, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.results import RESULTS as RESULTS_FOLDER
from benchmarks.studies.protocol import geometric
from moesparse import demo
from moesparse.evaluate import perplexity
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
WINDOWS = 160


def measure(model: torch.nn.Module, limit: int | None) -> float:
    """Geometric mean over domains of held-out perplexity."""
    texts = [demo.windows("heldout", domain)[:limit] for domain in demo.DOMAINS]
    return geometric([perplexity(model, text, batch_size=16).perplexity for text in texts])


def load(folder: Path | None) -> torch.nn.Module:
    """The embedded model, or one of the same tokenizer from a folder, in float32."""
    if folder is None:
        return demo.load()[0]
    if not (folder / "config.json").is_file():
        raise SystemExit(f"--model must be a folder with a checkpoint, got {folder}")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def run(
    dense: torch.nn.Module, pattern: str, saliency: str, update: str, seed: int, limit: int | None
) -> dict[str, float]:
    """Perplexity of a pruned copy, and the seconds that pruning it took."""
    model = copy.deepcopy(dense)
    windows = demo.windows("calibration")
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:WINDOWS]
    started = time.perf_counter()
    prune(model, windows[chosen], Recipe(weights=pattern, saliency=saliency, update=update, seed=seed))
    seconds = time.perf_counter() - started
    return {"perplexity": measure(model, limit), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", action="append", help="2:4 when left out; repeat for more")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a folder; the embedded model when left out")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 windows a domain, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER / "cpu" / "study_weights.json")
    arguments = parser.parse_args()
    limit = 4 if arguments.quick else None
    seeds = range(1 if arguments.quick else arguments.seeds)
    result = {"rows": {}}
    if arguments.out.is_file() and not arguments.quick:
        result = json.loads(arguments.out.read_text())
    model = load(arguments.model)
    fingerprint = model_fingerprint(model)
    if result.setdefault("model", fingerprint) != fingerprint:
        raise SystemExit(f"--out must be a new file for another model, got {arguments.out}")
    if "dense" not in result:
        result["dense"] = measure(model, limit)
    print(f"dense {result['dense']:.2f}")
    for pattern in arguments.pattern or ["2:4"]:
        for saliency, update in RULES:
            rows = result["rows"].setdefault(f"{pattern} {saliency} {update}", {})
            for seed in seeds:
                if str(seed) not in rows:
                    rows[str(seed)] = run(model, pattern, saliency, update, seed, limit)
                    if not arguments.quick:
                        arguments.out.parent.mkdir(parents=True, exist_ok=True)
                        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            values = [row["perplexity"] for row in rows.values()]
            seconds = statistics.mean(row["seconds"] for row in rows.values())
            spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(
                f"{pattern} {saliency:16} {update:22} {statistics.mean(values):8.2f}{spread}  {seconds:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
