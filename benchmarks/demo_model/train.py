"""Train the demo model: a stock `MixtralForCausalLM`, on one CPU core in about an hour.

transformers holds the parameters, initialises the config and writes the checkpoint; the forward pass is this file's own
(`forward_hidden`), because most of the stock one's time on a CPU goes outside of matrix products. tests/test_demo.py
checks that both compute the same logits and gradients.

Hidden matrices are trained by Muon (Jordan et al., 2024; update scaled as in Liu et al., 2025, arXiv:2502.16982), which
orthogonalises each expert's matrices on their own; embedding, router and norms by AdamW. Parameters and optimizer
state are fp32, matrix products bf16. The schedule counts steps, so that a run repeats on any machine up to rounding.

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
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, MixtralConfig, MixtralForCausalLM

DOMAINS = ("scripture", "novel", "play", "dictionary", "code", "manual")


class GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert times each expert's matrix: y[r] = x[r] @ weight[expert of r].T."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        """rows (R, in), weight (E, out, in), counts: rows of each expert, summing to R; returns (R, out)."""
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        for x, y, w in zip(rows.split(counts), out.split(counts), weight, strict=True):
            torch.mm(x, w.T, out=y)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
        groups = zip(rows.split(ctx.counts), grad.split(ctx.counts), grad_rows.split(ctx.counts), strict=True)
        for (x, dy, dx), w, dw in zip(groups, weight, grad_weight, strict=True):
            torch.mm(dy, w, out=dx)
            torch.mm(dy.T, x, out=dw)
        return grad_rows, grad_weight, None


class Dispatch(torch.autograd.Function):
    """Copy each token's row to its K expert-sorted places; the gradient is a gather, not a scatter."""

    @staticmethod
    def forward(ctx, tokens: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        """tokens (T, H), order and inverse (T * K,) int64; returns (T * K, H)."""
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class Unsort(torch.autograd.Function):
    """Bring expert-sorted rows back to token order."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


class CausalAttention(torch.autograd.Function):
    """Softmax attention with the probabilities kept, one sequence at a time so that they stay in cache."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, heads, T, D), k and v (B, kv_heads, T, D); returns (B, heads, T, D)."""
        batch, heads, length, dim = q.shape
        kv_heads = k.shape[1]
        mask = torch.full((length, length), -math.inf, dtype=q.dtype).triu(1).repeat(heads // kv_heads, 1)
        out = torch.empty_like(q)
        probs = q.new_empty(batch, kv_heads, heads // kv_heads * length, length)
        # the query heads that share a key head are stacked along the length: one product for all of them
        grouped_q, grouped_out = (x.view(batch, kv_heads, -1, dim) for x in (q, out))
        for b in range(batch):
            scores = torch.baddbmm(mask.expand_as(probs[b]), grouped_q[b], k[b].mT, alpha=dim**-0.5)
            torch.softmax(scores, -1, out=probs[b])
            torch.bmm(probs[b], v[b], out=grouped_out[b])
        ctx.save_for_backward(grouped_q, k, v, probs)
        ctx.shape = q.shape
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, probs = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for b in range(q.shape[0]):
            p = probs[b]
            torch.bmm(p.mT, grad[b], out=grad_v[b])
            # p * (g - sum(p * g)) in one pass, as autograd itself calls it
            grad_scores = torch._softmax_backward_data(grad[b] @ v[b].mT, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
            torch.bmm(grad_scores, k[b], out=grad_q[b])
            torch.bmm(grad_scores.mT, q[b], out=grad_k[b])
        return grad_q.view(ctx.shape), grad_k, grad_v


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, its gradient taken chunk by chunk so that no (T, V) tensor exists."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
        """hidden (T, H) and weight (V, H) in one dtype, labels (T,) int64; returns () fp32."""
        total = torch.zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32)
        chunks = zip(hidden.split(chunk), labels.split(chunk), grad_hidden.split(chunk), strict=True)
        for rows, targets, grad_rows in chunks:
            logits = (rows @ weight.T).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, targets[:, None])).sum()
            probs = logits.sub_(normaliser).exp_()
            probs.scatter_add_(1, targets[:, None], torch.full_like(normaliser, -1.0))
            probs = probs.to(hidden.dtype)
            torch.mm(probs, weight, out=grad_rows)
            grad_weight += probs.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / len(labels)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_hidden)
        return grad_hidden * grad, (grad_weight * grad).to(grad_hidden.dtype), None, None


@torch.compile(dynamic=False)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dim, fp32; compiled, as all that is elementwise here, to fuse its passes."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@torch.compile(dynamic=False)
def combine(x: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    """Add the gated sum of each token's K expert outputs: x (T, H) fp32, slots (T, K, H), gates (T, K) fp32."""
    return x + (slots * gates.unsqueeze(-1).to(slots.dtype)).sum(1)


@torch.compile(dynamic=False)
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the fused projection (R, 2I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.compile(dynamic=False)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: x (B, heads, T, D), cos and sin (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).contiguous()


def forward_hidden(model: MixtralForCausalLM, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the stock architecture up to its head, with the matrix products in `dtype` and the residual stream in fp32.

    Args:
        model: holds the parameters, fp32.
        ids: (B, T) int64.
        dtype: of weights and activations in matrix products; the router stays fp32.

    Returns:
        what the head reads, (B * T, H) in `dtype`; the balance loss summed over layers, top_k each when balanced; and
        per layer every expert's share of the slots, (E,) summing to 1.
    """
    config = model.config
    length = ids.shape[1]
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    num_experts, top_k, eps = config.num_local_experts, config.num_experts_per_tok, config.rms_norm_eps

    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    x = F.embedding(ids, model.model.embed_tokens.weight)
    balance, shares = x.new_zeros(()), []
    for layer in model.model.layers:
        attention = layer.self_attn
        y = rms_norm(x, layer.input_layernorm.weight, eps).to(dtype)
        projections = ((attention.q_proj, heads), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads))
        q, k, v = (
            (y @ projection.weight.to(dtype).T).unflatten(-1, (count, dim)).transpose(1, 2)
            for projection, count in projections
        )
        mixed = CausalAttention.apply(rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous())
        x = x + mixed.transpose(1, 2).flatten(2) @ attention.o_proj.weight.to(dtype).T

        y = rms_norm(x, layer.post_attention_layernorm.weight, eps).flatten(0, 1)
        probs = F.softmax(y @ layer.mlp.gate.weight.T, dim=-1)
        gates, experts = probs.topk(top_k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        counts = torch.bincount(experts.flatten(), minlength=num_experts)
        rows = Dispatch.apply(y.to(dtype), order, inverse, top_k)
        rows = GroupedLinear.apply(rows, layer.mlp.experts.gate_up_proj.to(dtype), counts.tolist())
        rows = GroupedLinear.apply(swiglu(rows), layer.mlp.experts.down_proj.to(dtype), counts.tolist())
        slots = Unsort.apply(rows, order, inverse).unflatten(0, (-1, top_k))
        x = combine(x.flatten(0, 1), slots, gates).view_as(x)

        shares.append(counts / counts.sum())
        balance = balance + num_experts * top_k * (shares[-1] * probs.mean(0)).sum()
    return rms_norm(x, model.model.norm.weight, eps).flatten(0, 1).to(dtype), balance, shares


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move the singular values of each matrix (N, out, in) towards 1, in bf16 (Jordan et al., 2024)."""
    x = matrices.bfloat16()
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

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
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
                update = newton_schulz(update.reshape(-1, rows, columns)).view_as(parameter)
                # the root mean square that AdamW's updates have, so that both take the same learning rate
                scale = 0.2 * max(rows, columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: MixtralForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for everything."""
    fused, matrices, embedding, router, vectors = [], [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            vectors.append(parameter)
        elif "embed_tokens" in name:
            embedding.append(parameter)
        elif "mlp.gate." in name:
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
    return [Muon(hidden, lr=args.lr, weight_decay=args.weight_decay), adamw]


def make_model(args: argparse.Namespace, vocab_size: int, eos_token_id: int) -> MixtralForCausalLM:
    """A stock Mixtral with matrices drawn at 1 / sqrt(inputs), those that write to the residual stream smaller."""
    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=args.length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        router_aux_loss_coef=args.balance,
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(args.seed)
    model = MixtralForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.05)
        elif "mlp.gate." in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim > 1:
            writes = "o_proj" in name or "down_proj" in name
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 / (math.sqrt(2 * args.layers) if writes else 1))
    return model


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
def heldout_losses(model: MixtralForCausalLM, heldout: dict[str, Tensor], limit: int | None = None) -> dict[str, float]:
    """Mean nll in nats a token of each domain's windows (n, length), the first token of a window not scored."""
    losses = {}
    for domain, windows in heldout.items():
        total = count = 0
        for batch in windows[:limit].split(16):
            hidden, _, _ = forward_hidden(model, batch[:, :-1], torch.bfloat16)
            logits = (hidden @ model.lm_head.weight.to(hidden.dtype).T).float()
            total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
            count += batch[:, 1:].numel()
        losses[domain] = total / count
    return losses


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Factor in [0, 1]: linear warm-up, constant, linear decay to zero at the last step."""
    decay_steps = max(1, round(args.steps * args.decay))
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / decay_steps)


def export(model: MixtralForCausalLM, folder: Path) -> None:
    """Write the bf16 checkpoint as transformers does for every Mixtral: w1, w2, w3 of each expert by itself."""
    config = model.config
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        copy = MixtralForCausalLM(config)
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
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=6e-3, help="of the hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="of embedding, router and norms")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.6, help="share of the steps in which the rate falls to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "model")
    tokens = {domain: np.load(args.work / "tokens" / f"{domain}.npy") for domain in DOMAINS}
    heldout = {}
    for domain in DOMAINS:
        text = (args.assets / "text" / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        heldout[domain] = ids[: len(ids) // args.length * args.length].view(-1, args.length)

    model = make_model(args, len(tokenizer), tokenizer.eos_token_id)
    optimizers = make_optimizers(model, args)
    step, seconds = 0, 0.0
    if args.resume:
        state = torch.load(args.out / "state.pt")
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
        batch = next(stream)
        hidden, balance, shares = forward_hidden(model, batch[:, :-1], torch.bfloat16)
        loss = LinearCrossEntropy.apply(hidden, model.lm_head.weight.to(hidden.dtype), batch[:, 1:].flatten())
        (loss + args.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
                losses = heldout_losses(model, heldout, limit=8)
                row["heldout_sample"] = round(sum(losses.values()) / len(losses), 4)
            log.write(json.dumps(row) + "\n")
        if step % args.save_every == 0 or step == stop:
            save()
        if step % 1000 == 0 or step == stop:
            losses = heldout_losses(model, heldout)
            perplexity = math.exp(sum(losses.values()) / len(losses))
            log.write(json.dumps({"step": step, "heldout": losses, "perplexity": perplexity}) + "\n")


if __name__ == "__main__":
    main()
