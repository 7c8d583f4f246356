"""Prune the experts of a model to 2:4, save it dense and packed, and check that both say the same.

python examples/prune_and_pack.py                     # the embedded model: under a minute on a CPU, no network
python examples/prune_and_pack.py allenai/OLMoE-1B-7B-0924 --text c4.jsonl --out olmoe
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import moesparse
from moesparse import demo


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", default=demo.model_path(), help="a folder or a hub id")
    arguments.add_argument("--text", nargs="*", help="calibration text; the embedded one if left out")
    arguments.add_argument("--out", type=Path, default=Path("out/prune_and_pack"))
    arguments.add_argument("--samples", type=int, default=48)
    chosen = arguments.parse_args()

    model, tokenizer = moesparse.load_pretrained(chosen.model)
    text = chosen.text or [demo.text_path("calibration", domain) for domain in demo.DOMAINS]
    context = moesparse.evaluate.context_length(model)
    windows = moesparse.text.windows(text, tokenizer, samples=chosen.samples, max_length=context)

    # the default's mask rule on a CPU: cheaper than gated-admm and nearly as good
    report = moesparse.prune(model, windows, moesparse.Recipe(weights="2:4", saliency="gated-sparsegpt"))
    print(f"{report.sparsity:.0%} of the expert weights are zero")

    for form in ("dense", "packed"):
        moesparse.save_pretrained(
            model, chosen.out / form, packed=form == "packed", tokenizer=tokenizer, recipe=report.recipe
        )
        size = sum(file.stat().st_size for file in (chosen.out / form).glob("*.safetensors"))
        print(f"{chosen.out / form}: {size / 1e6:.1f} MB")

    # plain transformers: the import of moesparse above is all that the packed folder needs
    logits = {}
    for form in ("dense", "packed"):
        again = AutoModelForCausalLM.from_pretrained(chosen.out / form, dtype=torch.float32)
        with torch.no_grad():
            logits[form] = again(windows[:1]).logits
    difference = (logits["dense"] - logits["packed"]).abs().max() / logits["dense"].abs().max()
    print(f"largest difference of a logit, relative to the largest: {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
