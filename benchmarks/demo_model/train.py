"""Train the demo model, a stock `MixtralForCausalLM`, or a variant of it, on one CPU core in about an hour.

The models and their fast forward pass are in architecture.py.

Hidden matrices are trained by Muon (Jordan et al., 2024; update scaled as in Liu et al., 2025, arXiv:2502.16982), which
orthogonalises each expert's matrices on their own; embedding, router and norms by AdamW. Parameters and optimizer
state are fp32, matrix products bf16 unless --dtype says otherwise. The schedule counts steps, so that a run repeats on
any machine up to rounding.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000 OMP_NUM_THREADS=1 \\
        python benchmarks/demo_model/train.py --work /tmp/demo_model --assets moesparse/demo --out /tmp/demo_model/run

The MALLOC variables make glibc keep freed memory, where it would return every large tensor and fault its pages in again
at the next step.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from architecture import VARIANTS, LinearCrossEntropy, balance_biases, forward_hidden, make_model
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

DOMAINS = ("scripture", "novel", "play", "dictionary", "code", "manual")


def newton_schulz(matrices: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> Tensor:
    """Move the singular values of each matrix (N, out, in) towards 1, computed in `dtype` (Jordan et al., 2024)."""
    x = matrices.to(dtype)
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return (x.mT if transposed else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised matrix by matrix. Parameters are (out, in) or (E, out, in).

    A fused gate_up projection, listed with `parts=2`, is two matrices on top of each other: each is treated alone.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])
                rows, columns = parameter.shape[-2] // group["parts"], parameter.shape[-1]
                update = newton_schulz(update.reshape(-1, rows, columns), self.dtype).view_as(parameter)
                # the root mean square that AdamW's updates have, so that both take the same learning rate
                scale = 0.2 * max(rows, columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: PreTrainedModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for everything."""
    fused, matrices, embedding, router, vectors = [], [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            vectors.append(parameter)
        elif "embed_tokens" in name:
            embedding.append(parameter)
        elif "mlp.gate." in name or "shared_expert_gate" in name:
            router.append(parameter)
        elif "gate_up_proj" in name:
            fused.append(parameter)
        else:
            matrices.append(parameter)
    rest = [
        {"params": embedding, "lr": args.adam_lr},
        {"params": router, "lr": args.adam_lr},
        {"params": vectors, "lr": args.adam_lr, "weight_decay": 0.0},
    ]
    hidden = [{"params": matrices}, {"params": fused, "parts": 2}]
    if args.optimizer == "adamw":
        rest += [{"params": group["params"], "lr": args.lr} for group in hidden]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "adamw":
        return [adamw]
    return [Muon(hidden, lr=args.lr, weight_decay=args.weight_decay, dtype=getattr(torch, args.dtype)), adamw]


def batches(tokens: dict[str, np.ndarray], args: argparse.Namespace) -> Iterator[Tensor]:
    """Yield (len(DOMAINS) * per_domain, length + 1) int64 for ever, the same number of sequences of every domain.

    Each domain goes through its own epochs: non-overlapping sequences in random order from a random start.
    """

    def sequences(domain: str) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([args.seed, DOMAINS.index(domain)])
        data = tokens[domain].astype(np.int64)
        while True:
            start = rng.integers(args.length)
            count = (len(data) - start - 1) // args.length
            for index in rng.permutation(count):
                first = start + index * args.length
                yield data[first : first + args.length + 1]

    streams = [sequences(domain) for domain in tokens]
    while True:
        yield torch.from_numpy(np.stack([next(stream) for stream in streams for _ in range(args.per_domain)]))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def heldout_losses(
    model: PreTrainedModel, heldout: dict[str, Tensor], dtype: torch.dtype, limit: int | None = None
) -> dict[str, float]:
    """Mean nll in nats a token of each domain's windows (n, length), the first token of a window not scored."""
    losses = {}
    for domain, windows in heldout.items():
        total = count = 0
        for batch in windows[:limit].split(16):
            hidden, _, _ = forward_hidden(model, batch[:, :-1], dtype)
            logits = (hidden @ model.lm_head.weight.to(hidden.dtype).T).float()
            total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
            count += batch[:, 1:].numel()
        losses[domain] = total / count
    return losses


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Factor in [0, 1]: linear warm-up, constant, linear decay to zero at the last step."""
    decay_steps = max(1, round(args.steps * args.decay))
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / decay_steps)


def export(model: PreTrainedModel, folder: Path) -> None:
    """Write the bf16 checkpoint as transformers does for the family, a Mixtral with w1, w2, w3 of each expert apart."""
    config = model.config
    state = {name: tensor.bfloat16().cpu() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        copy = type(model)(config)
    copy.load_state_dict(state, assign=True)
    copy.tie_weights()
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=False, max_new_tokens=64
    )
    copy.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder fetch_text.py and build_text.py wrote to")
    parser.add_argument("--assets", type=Path, default=Path("moesparse/demo"), help="holds the tokenizer and the text")
    parser.add_argument("--out", type=Path, required=True, help="log.jsonl, state.pt and model/ are written here")
    parser.add_argument(
        "--variant", choices=VARIANTS, default="mixtral", help="; ".join(map(": ".join, VARIANTS.items()))
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--stop", type=int, help="stop after this step of the schedule; the run can be resumed")
    parser.add_argument("--resume", action="store_true", help="go on from <out>/state.pt")
    parser.add_argument("--per-domain", type=int, default=4, help="sequences of each domain in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=128, help="width of one expert")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--balance", type=float, default=0.005, help="weight of the load-balance loss of each layer")
    parser.add_argument("--bias-rate", type=float, default=0.001, help="step of the balancing bias, where there is one")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=6e-3, help="of the hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="of embedding, router and norms")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.6, help="share of the steps in which the rate falls to zero")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of matrix products; where the CPU has no bf16 instructions float32 is many times faster",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; only the CPU's run is the shipped model's")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "model")
    tokens = {domain: np.load(args.work / "tokens" / f"{domain}.npy") for domain in DOMAINS}
    heldout = {}
    for domain in DOMAINS:
        text = (args.assets / "text" / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        heldout[domain] = ids[: len(ids) // args.length * args.length].view(-1, args.length).to(args.device)

    # drawn on the CPU, so that a device starts from the same weights
    model = make_model(args, len(tokenizer), tokenizer.eos_token_id).to(args.device)
    optimizers = make_optimizers(model, args)
    step, seconds = 0, 0.0
    if args.resume:
        state = torch.load(args.out / "state.pt", map_location=args.device)
        step, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    else:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
    stream = batches(tokens, args)
    for _ in range(step):
        next(stream)

    def save() -> None:
        state = {"step": step, "seconds": seconds, "model": model.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        torch.save(state, args.out / "state.tmp")
        (args.out / "state.tmp").replace(args.out / "state.pt")
        export(model, args.out / "model")

    log = (args.out / "log.jsonl").open("a", buffering=1)
    log.write(json.dumps({key: value for key, value in vars(args).items() if not isinstance(value, Path)}) + "\n")
    stop = min(args.steps, args.stop or args.steps)
    running = 0.0
    while step < stop:
        start = time.perf_counter()
        factor = learning_rate(step, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
        batch = next(stream).to(args.device)
        hidden, balance, shares = forward_hidden(model, batch[:, :-1], dtype)
        loss = LinearCrossEntropy.apply(hidden, model.lm_head.weight.to(hidden.dtype), batch[:, 1:].flatten())
        (loss + args.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        balance_biases(model, shares, args.bias_rate)
        step += 1
        seconds += time.perf_counter() - start

        running += (loss.item() - running) / min(step, 25)
        if step % 25 == 0:
            row = {"step": step, "seconds": round(seconds, 1), "loss": round(running, 4)}
            row["grad_norm"] = round(norm.item(), 3)
            row["least_used"] = round(min(share.min().item() for share in shares) * args.experts, 3)
            row["most_used"] = round(max(share.max().item() for share in shares) * args.experts, 3)
            row["heldout_sample"] = None
            if step % 100 == 0:
                losses = heldout_losses(model, heldout, dtype, limit=8)
                row["heldout_sample"] = round(sum(losses.values()) / len(losses), 4)
            log.write(json.dumps(row) + "\n")
        if step % args.save_every == 0 or step == stop:
            save()
        if step % 1000 == 0 or step == stop:
            losses = heldout_losses(model, heldout, dtype)
            perplexity = math.exp(sum(losses.values()) / len(losses))
            log.write(json.dumps({"step": step, "heldout": losses, "perplexity": perplexity}) + "\n")


if __name__ == "__main__":
    main()
