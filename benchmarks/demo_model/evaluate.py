"""Measure a demo checkpoint on the shipped held-out text, through the stock transformers forward pass in fp32.

Protocol: windows of 256 tokens that do not overlap, each scored by itself, its first token not scored. Perplexity of a
domain is exp(mean nll of its tokens), the overall one the geometric mean over domains. Bits a byte divide the same nll
by the UTF-8 bytes of the scored tokens, so that they compare across tokenizers.

    python benchmarks/demo_model/evaluate.py
    python benchmarks/demo_model/evaluate.py --model /tmp/demo_model/run/model
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, MixtralForCausalLM

from moesparse import demo


@torch.no_grad()
def score(model: MixtralForCausalLM, windows: Tensor, token_bytes: Tensor) -> tuple[float, int, int, Tensor]:
    """Sum up one domain.

    Args:
        windows: (n, length) int64.
        token_bytes: (V,) int64, UTF-8 bytes of each token.

    Returns:
        nll in nats, scored tokens, scored bytes, and how often each expert was chosen: (layers, E) int64.
    """
    nll, slots = 0.0, torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts, dtype=torch.int64)
    for batch in windows.split(16):
        output = model(batch, output_router_logits=True)
        nll += F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten()
            slots[layer] += torch.bincount(chosen, minlength=slots.shape[1])
    scored = windows[:, 1:]
    return nll, scored.numel(), int(token_bytes[scored].sum()), slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo.model_path(), help="checkpoint with the shipped tokenizer")
    parser.add_argument("--json", action="store_true", help="print one object")
    args = parser.parse_args()

    model = MixtralForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    # in a byte-level vocabulary each character of a token stands for one byte
    token_bytes = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])

    domains, total_nll, total_bytes = {}, 0.0, 0
    slots = torch.zeros((), dtype=torch.int64)
    for domain in demo.DOMAINS:
        nll, tokens, size, chosen = score(model, demo.windows("heldout", domain), token_bytes)
        domains[domain] = {
            "perplexity": math.exp(nll / tokens),
            "bits_per_byte": nll / math.log(2) / size,
            "tokens": tokens,
        }
        total_nll, total_bytes, slots = total_nll + nll, total_bytes + size, slots + chosen
    shares = slots / slots.sum(dim=1, keepdim=True) * slots.shape[1]
    result = {
        "perplexity": math.exp(sum(math.log(row["perplexity"]) for row in domains.values()) / len(domains)),
        "bits_per_byte": total_nll / math.log(2) / total_bytes,
        "domains": domains,
        # 1 is an expert's fair share
        "least_used_expert": shares.min().item(),
        "most_used_expert": shares.max().item(),
    }
    if args.json:
        print(json.dumps(result))
        return
    for domain, row in domains.items():
        print(f"{domain:12s} {row['perplexity']:7.2f} {row['bits_per_byte']:6.3f} bits/byte {row['tokens']:6d} tokens")
    print(f"{'overall':12s} {result['perplexity']:7.2f} {result['bits_per_byte']:6.3f} bits/byte")
    print(f"slots of an expert, as a multiple of its fair share: {shares.min():.2f} to {shares.max():.2f}")


if __name__ == "__main__":
    main()
