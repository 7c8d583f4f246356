"""The demo model's architecture and its variants: stock transformers classes with a forward pass made for a CPU.

transformers holds the parameters, initialises the config and writes the checkpoint; the forward pass is this file's own
(`forward_hidden`), because most of the stock one's time on a CPU goes outside of matrix products. tests/test_demo.py
checks for every variant that both compute the same logits and gradients.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# what each has that the demo model has not; queries and keys are normalised where the family always does so
VARIANTS = {
    "mixtral": "the demo model: softmax over the chosen two of 16 experts, SwiGLU",
    "sigmoid-bias": "MiniMax-M2: sigmoid scores, and a bias that balances the choice in place of a loss; qk-norm",
    "top-1": "Qwen3-MoE: one expert a token, its gate the softmax over all experts, not renormalised; qk-norm",
    "shared-expert": "Qwen2-MoE: one more expert, as wide as the rest, that every token passes, behind a sigmoid gate",
    "geglu": "Mixtral with GELU in place of SiLU",
}
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


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
    """Softmax attention with the probabilities kept."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, heads, T, D), k and v (B, kv_heads, T, D); returns (B, heads, T, D)."""
        batch, heads, length, dim = q.shape
        kv_heads = k.shape[1]
        mask = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        # the query heads that share a key head are stacked along the length: one product for all of them
        rows = heads // kv_heads * length
        mask = mask.repeat(heads // kv_heads, 1)
        out = torch.empty_like(q)
        probs = q.new_empty(batch * kv_heads, rows, length)
        # one sequence at a time, so that its scores stay in a CPU's cache; all of them on a GPU
        together = kv_heads if q.device.type == "cpu" else batch * kv_heads
        q, k, v = q.reshape(-1, rows, dim), k.reshape(-1, length, dim), v.reshape(-1, length, dim)
        for q_, k_, v_, p, o in _pieces(together, q, k, v, probs, out.view(-1, rows, dim)):
            scores = torch.baddbmm(mask.expand_as(p), q_, k_.mT, alpha=dim**-0.5)
            torch.softmax(scores, -1, out=p)
            torch.bmm(p, v_, out=o)
        ctx.save_for_backward(q, k, v, probs)
        ctx.shapes, ctx.together = (out.shape, (batch, kv_heads, length, dim)), together
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, probs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        for q_, k_, v_, p, g, dq, dk, dv in _pieces(ctx.together, q, k, v, probs, grad.reshape(q.shape), *grads):
            torch.bmm(p.mT, g, out=dv)
            # p * (g - sum(p * g)) in one pass, as autograd itself calls it
            grad_scores = torch._softmax_backward_data(g @ v_.mT, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
            torch.bmm(grad_scores, k_, out=dq)
            torch.bmm(grad_scores.mT, q_, out=dk)
        query, key = ctx.shapes
        return grads[0].view(query), grads[1].view(key), grads[2].view(key)


def _pieces(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of `size` places along the first dim, of all tensors at once."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, its gradient taken chunk by chunk so that no (T, V) tensor exists."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
        """hidden (T, H) and weight (V, H) in one dtype, labels (T,) int64; returns () fp32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
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
def gated_unit(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up of the fused projection (R, 2I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


@torch.compile(dynamic=False)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: x (B, heads, T, D), cos and sin (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).contiguous()


def route(block: nn.Module, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts for y (T, H) fp32: every expert's score (T, E), the chosen ones' gates and numbers (T, K)."""
    logits = y @ block.gate.weight.T
    if hasattr(block, "e_score_correction_bias"):
        scores = logits.sigmoid()
        experts = (scores + block.e_score_correction_bias).topk(block.gate.top_k, dim=-1).indices
        gates = scores.gather(1, experts)
    else:
        scores = F.softmax(logits, dim=-1)
        gates, experts = scores.topk(block.gate.top_k, dim=-1)
    # Mixtral and MiniMax-M2 have no such switch and always normalise
    if getattr(block.gate, "norm_topk_prob", True):
        gates = gates / gates.sum(-1, keepdim=True)
    return scores, gates, experts


def project_heads(y: Tensor, projection: nn.Linear, norm: nn.Module | None, dim: int) -> Tensor:
    """Project y (B, T, H) to (B, heads, T, dim), normalised by head or over all heads, as wide as the norm's weight."""
    out = y @ projection.weight.to(y.dtype).T
    if norm is not None:
        heads = out.float().unflatten(-1, (-1, len(norm.weight)))
        out = rms_norm(heads, norm.weight, norm.variance_epsilon).to(y.dtype).flatten(2)
    return out.unflatten(-1, (-1, dim)).transpose(1, 2)


def forward_hidden(model: PreTrainedModel, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the stock architecture up to its head, with the matrix products in `dtype` and the residual stream in fp32.

    Args:
        model: holds the parameters, fp32.
        ids: (B, T) int64.
        dtype: of weights and activations in matrix products; the router stays fp32.

    Returns:
        what the head reads, (B * T, H) in `dtype`; the balance loss summed over layers, top_k each when balanced, 0
        where a bias balances; and per layer every expert's share of the slots, (E,) summing to 1.
    """
    config = model.config
    length = ids.shape[1]
    dim, eps = model.model.layers[0].self_attn.head_dim, config.rms_norm_eps
    activation = _ACTIVATIONS[config.hidden_act]

    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2, device=ids.device) / dim)
    angles = torch.outer(torch.arange(length, device=ids.device), frequencies).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    x = F.embedding(ids, model.model.embed_tokens.weight)
    balance, shares = x.new_zeros(()), []
    for layer in model.model.layers:
        attention = layer.self_attn
        y = rms_norm(x, layer.input_layernorm.weight, eps).to(dtype)
        q = project_heads(y, attention.q_proj, getattr(attention, "q_norm", None), dim)
        k = project_heads(y, attention.k_proj, getattr(attention, "k_norm", None), dim)
        v = project_heads(y, attention.v_proj, None, dim)
        mixed = CausalAttention.apply(rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous())
        x = x + mixed.transpose(1, 2).flatten(2) @ attention.o_proj.weight.to(dtype).T

        y = rms_norm(x, layer.post_attention_layernorm.weight, eps).flatten(0, 1)
        block, num_experts, top_k = layer.mlp, layer.mlp.experts.num_experts, layer.mlp.gate.top_k
        scores, gates, experts = route(block, y)
        order = experts.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.bincount(experts.flatten(), minlength=num_experts)
        rows = Dispatch.apply(y.to(dtype), order, inverse, top_k)
        rows = GroupedLinear.apply(rows, block.experts.gate_up_proj.to(dtype), counts.tolist())
        rows = GroupedLinear.apply(gated_unit(rows, activation), block.experts.down_proj.to(dtype), counts.tolist())
        slots = Unsort.apply(rows, order, inverse).unflatten(0, (-1, top_k))
        out = combine(x.flatten(0, 1), slots, gates)
        if hasattr(block, "shared_expert"):
            shared = block.shared_expert
            gate_up = y.to(dtype) @ torch.cat((shared.gate_proj.weight, shared.up_proj.weight)).to(dtype).T
            every = gated_unit(gate_up, activation) @ shared.down_proj.weight.to(dtype).T
            out = combine(out, every.unsqueeze(1), (y @ block.shared_expert_gate.weight.T).sigmoid())
        x = out.view_as(x)

        shares.append(counts / counts.sum())
        if not hasattr(block, "e_score_correction_bias"):
            balance = balance + num_experts * top_k * (shares[-1] * scores.mean(0)).sum()
    return rms_norm(x, model.model.norm.weight, eps).flatten(0, 1).to(dtype), balance, shares


def balance_biases(model: PreTrainedModel, shares: list[Tensor], rate: float) -> None:
    """Step every expert's bias towards its fair share, where there is one (Wang et al., 2024, arXiv:2408.15664)."""
    for layer, share in zip(model.model.layers, shares, strict=True):
        if hasattr(layer.mlp, "e_score_correction_bias"):
            layer.mlp.e_score_correction_bias += rate * (share.mean() - share).sign()


def make_model(args: argparse.Namespace, vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    """The stock model of `args.variant`, matrices drawn at 1 / sqrt(inputs), smaller if they write to the residual."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": args.length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "router_aux_loss_coef": args.balance,
        "tie_word_embeddings": True,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }
    local = {
        "head_dim": args.hidden // args.heads,
        "intermediate_size": args.intermediate,
        "num_local_experts": args.experts,
        "num_experts_per_tok": args.top_k,
    }
    qwen = {"moe_intermediate_size": args.intermediate, "num_experts": args.experts}
    torch.manual_seed(args.seed)
    if args.variant == "sigmoid-bias":
        model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**common, **local))
    elif args.variant == "top-1":
        own = {"head_dim": args.hidden // args.heads, "num_experts_per_tok": 1, "norm_topk_prob": False}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **qwen, **own))
    elif args.variant == "shared-expert":
        own = {"num_experts_per_tok": args.top_k, "norm_topk_prob": True, "qkv_bias": False}
        own["shared_expert_intermediate_size"] = args.intermediate
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **qwen, **own))
    else:
        activation = "gelu" if args.variant == "geglu" else "silu"
        model = MixtralForCausalLM(MixtralConfig(**common, **local, rms_norm_eps=1e-5, hidden_act=activation))
    for name, parameter in model.float().named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.05)
        elif "mlp.gate." in name or "shared_expert_gate" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim > 1:
            writes = "o_proj" in name or "down_proj" in name
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 / (math.sqrt(2 * args.layers) if writes else 1))
    return model
