"""Remove experts that text of one domain needs least, and see what that costs in every domain.

python examples/remove_experts.py                       # the embedded model, keeps what code needs
python examples/remove_experts.py mixtral/ --text law.jsonl --share 0.25
"""

import argparse

import torch

import moesparse
from moesparse import demo


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", default=demo.model_path(), help="a folder or a hub id")
    arguments.add_argument("--text", default=demo.text_path("calibration", "code"), help="of the domain to keep")
    arguments.add_argument("--share", type=float, default=0.25, help="of the experts of each block, to be removed")
    arguments.add_argument("--windows", type=int, default=8, help="for the perplexity of a domain")
    chosen = arguments.parse_args()

    model, tokenizer = moesparse.load_pretrained(chosen.model, dtype=torch.float32)
    context = min(moesparse.evaluate.context_length(model), 2048)
    windows = moesparse.text.windows(chosen.text, tokenizer, samples=32, length=context)

    def perplexities() -> dict[str, float]:
        found = {}
        for domain in demo.DOMAINS:
            file = demo.text_path("heldout", domain)
            cut, _ = moesparse.text.evaluation_windows(file, tokenizer, min(context, 256))
            found[domain] = moesparse.evaluate.perplexity(model, cut[: chosen.windows]).perplexity
        return found

    before = perplexities()
    recipe = moesparse.Recipe(weights=None, experts=chosen.share, expert_saliency="reap")
    report = moesparse.prune(model, windows, recipe)
    for block in report.experts["blocks"]:
        print(f"{block['name']}: {len(block['kept'])} of {block['before']} experts stay, without {block['removed']}")
    print(f"{'domain':12}{'before':>10}{'after':>10}")
    for domain, after in perplexities().items():
        print(f"{domain:12}{before[domain]:10.2f}{after:10.2f}")


if __name__ == "__main__":
    main()
