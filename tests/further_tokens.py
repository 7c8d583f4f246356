"""Tiny checkpoints with a layer that predicts a further token, and that layer in plain torch, from its tensors."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesparse.testing import tiny_model

DEEPSEEK, QWEN = "model.layers.{layers}.", "mtp.layers.0."


def checkpoint(folder: Path, family: str, style: str = DEEPSEEK, dtype: torch.dtype = torch.float32, **config) -> Path:
    """A family's tiny model with a further layer as the last one has it, with other values, and what is around it."""
    model = tiny_model(family, **config).to(dtype)
    model.save_pretrained(folder)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(7)
    tensors, H, layers = load_file(file), model.config.hidden_size, model.config.num_hidden_layers
    stored = style.format(layers=layers)

    def near(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        return (tensor + (tensor.float().std() if tensor.numel() > 1 else 1.0) * noise).to(tensor.dtype)

    own = {key: value for key, value in tensors.items() if key.startswith(f"model.layers.{layers - 1}.")}
    further = {key.replace(f"model.layers.{layers - 1}.", stored): near(value) for key, value in own.items()}
    norm = next(value for key, value in own.items() if key.endswith("input_layernorm.weight"))
    joining = torch.randn(H, 2 * H, generator=generator).to(dtype) / 4
    if style == DEEPSEEK:
        further |= {f"{stored}{name}.weight": norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
        further |= {f"{stored}eh_proj.weight": joining}
        further |= {f"{stored}embed_tokens.weight": next(v for key, v in tensors.items() if "embed" in key).clone()}
    else:
        names = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        further |= {f"mtp.{name}.weight": norm.clone() for name in names} | {"mtp.fc.weight": joining}
    # norms are all ones, or zeros, in a fresh model: one taken for another would not show
    tensors |= further
    for key in [*further, "model.norm.weight"]:
        if "norm" in key and key in tensors:
            tensors[key] += torch.rand(tensors[key].shape, generator=generator).to(tensors[key].dtype) / 2
    save_file(tensors, file, metadata={"format": "pt"})
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | {"num_nextn_predict_layers": 1}, indent=2))
    return folder


class Routed(NamedTuple):
    """What the experts of the layer are given: rows x [T, H], their experts and gates [T, K], before the last token."""

    x: Tensor
    index: Tensor
    gates: Tensor


def routed(folder: Path, family: str, last: Tensor, ids: Tensor) -> Routed:
    """Run the layer of a deepseek_v3 or qwen3_next checkpoint in float64.

    Args:
        last: [n, t, H], what the trunk gives behind its final norm.
        ids: [n, t].
    """
    tensors = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    deepseek = family == "deepseek_v3"
    stored = DEEPSEEK.format(layers=config["num_hidden_layers"]) if deepseek else QWEN
    own = {key.removeprefix(stored): value for key, value in tensors.items() if key.startswith(stored)}
    embeddings = tensors["model.embed_tokens.weight"][ids[:, 1:]]
    eps, more = config["rms_norm_eps"], 0.0 if deepseek else 1.0

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + more)

    names = ("enorm", "hnorm", "eh_proj") if deepseek else ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc")
    enorm, hnorm, joining = (own[f"{n}.weight"] if deepseek else tensors[f"mtp.{n}.weight"] for n in names)
    joined = torch.cat((norm(embeddings, enorm), norm(last[:, :-1].double(), hnorm)), dim=-1) @ joining.T
    attend = _latent if deepseek else _gated
    h = joined + attend(norm(joined, own["input_layernorm.weight"]), own, config, norm)
    x = norm(h, own["post_attention_layernorm.weight"]).flatten(0, 1)
    return Routed(x, *(_by_groups if deepseek else _by_softmax)(x, own, config))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, heads, t, d] each."""
    t = q.shape[2]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ v


def _angles(t: int, size: int, base: float) -> Tensor:
    return torch.arange(t)[:, None].double() / base ** (torch.arange(0, size, 2).double() / size)


def _latent(x: Tensor, w: dict[str, Tensor], config: dict, norm) -> Tensor:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), rotating neighbours."""
    n, t, _ = x.shape
    heads, plain, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    q = norm(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"])
    q = (q @ w["self_attn.q_b_proj.weight"].T).view(n, t, heads, plain + rope).transpose(1, 2)
    latent, k_rope = (x @ w["self_attn.kv_a_proj_with_mqa.weight"].T).split((config["kv_lora_rank"], rope), -1)
    kv = norm(latent, w["self_attn.kv_a_layernorm.weight"]) @ w["self_attn.kv_b_proj.weight"].T
    kv = kv.view(n, t, heads, plain + config["v_head_dim"]).transpose(1, 2)

    def rotated(each: Tensor) -> Tensor:
        turn = torch.polar(torch.ones(()).double(), _angles(t, rope, config["rope_parameters"]["rope_theta"]))
        pairs = torch.view_as_complex(each.unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(pairs).flatten(-2)

    q = torch.cat((q[..., :plain], rotated(q[..., plain:])), -1)
    k = torch.cat((kv[..., :plain], rotated(k_rope[:, None]).expand(-1, heads, -1, -1)), -1)
    out = _attention(q, k, kv[..., plain:])
    return out.transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T


def _gated(x: Tensor, w: dict[str, Tensor], config: dict, norm) -> Tensor:
    """Qwen3-Next's full attention: a gate beside the queries, a part of each head rotated, by halves."""
    n, t, _ = x.shape
    size, settings = config["head_dim"], config["rope_parameters"]
    q, gate = (x @ w["self_attn.q_proj.weight"].T).view(n, t, -1, 2 * size).chunk(2, dim=-1)
    k, v = ((x @ w[f"self_attn.{name}_proj.weight"].T).view(n, t, -1, size).transpose(1, 2) for name in "kv")
    q, k = norm(q, w["self_attn.q_norm.weight"]).transpose(1, 2), norm(k, w["self_attn.k_norm.weight"])
    rope = int(size * settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    angles = _angles(t, rope, settings["rope_theta"])

    def rotated(each: Tensor) -> Tensor:
        a, b, rest = each.split((rope // 2, rope // 2, size - rope), -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest), -1)

    groups = q.shape[1] // k.shape[1]
    out = _attention(rotated(q), rotated(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    out = out.transpose(1, 2).flatten(2) * gate.flatten(2).sigmoid()
    return out @ w["self_attn.o_proj.weight"].T


def _by_groups(x: Tensor, w: dict[str, Tensor], config: dict) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router: sigmoid, the best groups by their two best, then the best experts in those."""
    scores = (x @ w["mlp.gate.weight"].T).sigmoid()
    biased = (scores + w["mlp.gate.e_score_correction_bias"]).view(len(x), config["n_group"], -1)
    best = biased.topk(2).values.sum(-1).topk(config["topk_group"]).indices
    inside = torch.zeros(len(x), config["n_group"], 1, dtype=torch.bool).scatter(1, best[..., None], True)
    index = biased.masked_fill(~inside, -torch.inf).flatten(1).topk(config["num_experts_per_tok"]).indices
    gates = scores.gather(1, index)
    return index, gates / gates.sum(-1, keepdim=True) * config["routed_scaling_factor"]


def _by_softmax(x: Tensor, w: dict[str, Tensor], config: dict) -> tuple[Tensor, Tensor]:
    gates, index = (x @ w["mlp.gate.weight"].T).softmax(-1).topk(config["num_experts_per_tok"])
    return index, gates / gates.sum(-1, keepdim=True)


def expert(tensors: dict[str, Tensor], stored: str, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and down of one expert, float64."""
    base = f"{stored}mlp.experts.{number}"
    gate, up, down = (tensors[f"{base}.{name}_proj.weight"].double() for name in ("gate", "up", "down"))
    return gate, up, down


def activation(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(x @ gate.T) * (x @ up.T)
