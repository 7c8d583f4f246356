"""Experts that differ, of really pretrained weights: the dense model upcycled to 4 experts, top 2, and trained apart.

    python -m benchmarks.real_weights.upcycle                  # 25 CPU minutes; goes on where it stopped
    python -m benchmarks.real_weights.upcycle --steps 400      # longer

Every expert begins as the dense model's MLP (Komatsuzaki et al. 2022, arXiv 2212.05055), so the logits are the dense
model's, which is checked, whatever the routers say. A router's rows are the centroids of its inputs (spherical k-means,
every channel over its root mean square), scaled so that its logits have a deviation of 1 over tokens: tokens part by
what they are from the first step on. Then routers and experts, and nothing else, learn the next token on training
text of seven domains, windows of 512, with Switch's balancing loss. A stopped run goes on from its last save.

What became of it is in `<cache>/upcycled/trained.json` and printed: held-out perplexity before and after, the entropy
of routing, by how much experts differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_weights import text
from benchmarks.real_weights.model import cache, check_same, dense, mixtral
from benchmarks.studies.protocol import geometric
from moesparse.evaluate import perplexity

EXPERTS, TOP_K = 4, 2
STEPS, BATCH = 30, 4
RATE, ROUTER_RATE, WARM_UP = 4e-4, 1e-3, 4
BALANCE = 0.01
SEED = 1000
SAVE_SECONDS = 900


@torch.no_grad()
def part_tokens(model: Any, made: Any, ids: Tensor) -> None:
    """Give `made` routers whose rows are centroids of what they read in the dense `model` over windows `ids`."""
    seen: dict[int, list[Tensor]] = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, inputs, number=number: seen.setdefault(number, []).append(inputs[0].flatten(0, -2))
        )
        for number, layer in enumerate(model.model.layers)
    ]
    for window in ids.split(4):
        model(input_ids=window)
    for hook in hooks:
        hook.remove()
    for number, layer in enumerate(made.model.layers):
        inputs = torch.cat(seen[number]).float()
        # the first token of a window is like no other one, and large
        inputs = inputs.view(len(ids), -1, inputs.shape[-1])[:, 1:].flatten(0, 1)
        size = inputs.square().mean(0).sqrt()
        rows = F.normalize(inputs / size, dim=-1)
        centroids = _k_means(rows, EXPERTS, number)
        router = (centroids - centroids.mean(0)) / size
        logits = inputs @ router.T
        layer.mlp.gate.weight.copy_(router / logits.std(0).mean())


def _k_means(rows: Tensor, count: int, seed: int) -> Tensor:
    """[count, n] unit centroids of unit rows, of least largest share out of eight starts."""
    best: tuple[float, Tensor] = (math.inf, rows[:count])
    for start in range(8):
        generator = torch.Generator().manual_seed(100 * seed + start)
        centroids = rows[torch.randperm(len(rows), generator=generator)[:count]]
        for _ in range(20):
            nearest = (rows @ centroids.T).argmax(1)
            sums = torch.zeros_like(centroids).index_add_(0, nearest, rows)
            centroids = F.normalize(torch.where(sums.any(1, keepdim=True), sums, centroids), dim=-1)
        share = float(torch.bincount(nearest, minlength=count).max()) / len(rows)
        best = min(best, (share, centroids), key=lambda each: each[0])
    return best[1]


def train(model: Any, tokenizer: Any, steps: int, folder: Path) -> list[dict[str, float]]:
    """Train routers and experts, from the last save on."""
    routers, experts = [], []
    for name, weight in model.named_parameters():
        weight.requires_grad_("mlp." in name)
        if "mlp." in name:
            (routers if "mlp.gate." in name else experts).append(weight)
    groups = [{"params": experts, "rate": RATE}, {"params": routers, "rate": ROUTER_RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    windows = text.draw(tokenizer, steps * BATCH, SEED)
    log: list[dict[str, float]] = []
    state = folder / "state.pt"
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        log = saved["log"]
    saved_at = time.perf_counter()
    for step in range(len(log), steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            warm = min((step + 1) / WARM_UP, 1)
            group["lr"] = group["rate"] * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        losses, balances = [], []
        # one window at a time: the logits of four are half of all memory
        for ids in windows[step * BATCH : (step + 1) * BATCH].split(1):
            out = model(input_ids=ids, output_router_logits=True)
            loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            ((loss + BALANCE * out.aux_loss) / BATCH).backward()
            losses.append(float(loss.detach()))
            balances.append(float(out.aux_loss.detach()))
        torch.nn.utils.clip_grad_norm_(experts + routers, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.append({"loss": sum(losses) / BATCH, "balance": sum(balances) / BATCH})
        seconds = time.perf_counter() - began
        print(f"step {step + 1} of {steps}  loss {log[-1]['loss']:.3f}  {seconds:.0f} s", flush=True)
        if time.perf_counter() - saved_at > SAVE_SECONDS or step + 1 == steps:
            partial = state.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}, partial)
            os.replace(partial, state)
            saved_at = time.perf_counter()
    return log


@torch.no_grad()
def describe(model: Any, heldout: dict[str, Tensor]) -> dict[str, Any]:
    """How far apart experts are: routing by domain, entropy of its choice, cosine of weights and of outputs."""
    model.eval()
    load, gates = {}, []
    outputs: list[float] = []
    for domain, windows in heldout.items():
        routed = model(input_ids=windows[:2], output_router_logits=True).router_logits
        chosen = [layer.softmax(-1).topk(TOP_K, dim=-1) for layer in routed]
        counts = [torch.bincount(each.indices.flatten(), minlength=EXPERTS).double() for each in chosen]
        load[domain] = torch.stack([each / each.sum() for each in counts])
        gates += [float((each.values / each.values.sum(-1, keepdim=True)).amax(-1).mean()) for each in chosen]
    everywhere = torch.stack(list(load.values())).mean(0)
    entropy = float(-(everywhere * everywhere.clamp_min(1e-9).log()).sum(-1).mean()) / math.log(EXPERTS)
    apart = torch.stack([0.5 * (each - everywhere).abs().sum(-1) for each in load.values()]).mean()
    hidden = torch.randn(256, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    change = []
    for layer in model.model.layers:
        held = layer.mlp.experts
        each = []
        for expert in range(EXPERTS):
            gate, up = (hidden @ held.gate_up_proj[expert].T).chunk(2, dim=-1)
            each.append((F.silu(gate) * up) @ held.down_proj[expert].T)
        flat = torch.stack(each).flatten(1)
        middle = flat.mean(0)
        change.append(float(((flat - middle).norm(dim=1) / flat.norm(dim=1)).mean()))
        similar = F.normalize(flat, dim=-1) @ F.normalize(flat, dim=-1).T
        outputs.append(float((similar.sum() - EXPERTS) / (EXPERTS * (EXPERTS - 1))))
    return {
        "entropy_of_load": entropy,
        "routing_apart_by_domain": float(apart),
        "larger_gate": sum(gates) / len(gates),
        "output_cosine_between_experts": sum(outputs) / len(outputs),
        "output_distance_from_mean_expert": sum(change) / len(change),
    }


def score(model: Any, heldout: dict[str, Tensor]) -> dict[str, float]:
    """Held-out perplexity by domain, and their geometric mean as "all"."""
    found = {name: perplexity(model, windows, progress=None).perplexity for name, windows in heldout.items()}
    return {**found, "all": geometric(list(found.values()))}


def upcycled(steps: int = STEPS) -> Path:
    """The folder of the trained model, made unless it is there with as many steps."""
    folder = cache() / "upcycled"
    note = folder / "trained.json"
    if note.is_file() and json.loads(note.read_text())["steps"] >= steps:
        return folder
    work = cache() / "upcycling"
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = dense(cache())
    made = mixtral(model, EXPERTS, TOP_K).float()
    model = model.float()
    part_tokens(model, made, text.draw(tokenizer, 28, SEED + 1))
    heldout = text.heldout(tokenizer, 14_336)
    told: dict[str, Any] = {"steps": steps, "tokens": steps * BATCH * text.LENGTH}
    told["logits_before_training"] = check_same(model, made, next(iter(heldout.values()))[:1])
    told["perplexity_before"] = score(model, heldout)
    told["before"] = describe(made, heldout)
    del model
    log = train(made, tokenizer, steps, work)
    told |= {"loss": [round(each["loss"], 4) for each in log]}
    made = made.to(torch.bfloat16)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told["perplexity_after"] = score(made.float(), heldout)
    told["after"] = describe(made, heldout)
    note.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({name: value for name, value in told.items() if name != "loss"}, indent=1))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} windows of {text.LENGTH} tokens")
    print(upcycled(parser.parse_args().steps))
