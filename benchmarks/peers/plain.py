"""Wanda and SparseGPT as their papers define them, plainly: the baseline for the time that the same masks take.

Every expert becomes three nn.Linear, every Linear gets a forward hook that sums up its inputs, and every matrix is
pruned by itself: Wanda (Sun et al., 2023, arXiv 2306.11695) compares |W| ||x|| group by group, or sorts every row;
SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774) keeps an fp32 Hessian, inverts it by Cholesky and walks blocks of
128 columns. Decoder layers go one after the other, each on what the pruned layers before it give, and only experts are
pruned. Options: "rule", wanda or sparsegpt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.clock import Clock

__all__ = ["HessianSum", "NormSum", "SeparateExperts", "prune", "run"]

DAMPING = 0.01
BLOCK = 128


class SeparateExperts(nn.Module):
    """The experts of one Mixtral layer as an nn.Linear for each matrix, run one after the other on their own tokens."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.act_fn = experts.act_fn
        self.gate, self.up, self.down = (nn.ModuleList() for _ in range(3))
        for both, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            for linears, weight in zip((self.gate, self.up, self.down), (*both.chunk(2), down), strict=True):
                linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta", dtype=weight.dtype)
                linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
                linears.append(linear)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            rows = hidden_states[token]
            rows = down(self.act_fn(gate(rows)) * up(rows)) * top_k_weights[token, choice, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out

    def copy_back(self, experts: Any) -> None:
        """Into the fused parameters they came from."""
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            experts.gate_up_proj.data[expert] = torch.cat([gate.weight, up.weight])
            experts.down_proj.data[expert] = down.weight


class NormSum:
    """Wanda: the squared norm of every input column."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight = linear.weight.data
        self.squares = torch.zeros(self.weight.shape[1])

    def add(self, rows: Tensor) -> None:
        self.squares += rows.float().norm(dim=0) ** 2

    def prune(self, keep: int, of: int) -> None:
        """Zero all but `keep` of every `of` columns, in place; `of` = 0 keeps that many of a whole row."""
        score = self.weight.float().abs() * self.squares.sqrt()
        mask = torch.zeros_like(score, dtype=torch.bool)
        if not of:
            order = score.sort(dim=1, stable=True).indices
            mask.scatter_(1, order[:, : score.shape[1] - keep], True)
        for start in range(0, score.shape[1] if of else 0, of or 1):
            group = score[:, start : start + of]
            mask.scatter_(1, start + group.topk(of - keep, dim=1, largest=False).indices, True)
        self.weight[mask] = 0


class HessianSum:
    """SparseGPT: the second moment of the inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        self.weight = linear.weight.data
        self.hessian = torch.zeros(self.weight.shape[1], self.weight.shape[1])

    def add(self, rows: Tensor) -> None:
        rows = rows.float()
        self.hessian += 2 * rows.T @ rows

    def prune(self, keep: int, of: int) -> None:
        """Prune `keep` of `of` columns and let the columns to the right make up for it, in place."""
        columns = self.weight.shape[1]
        weight, hessian = self.weight.float(), self.hessian
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, columns, BLOCK):
            block = slice(start, min(start + BLOCK, columns))
            here, factor = weight[:, block].clone(), upper[block, block]
            errors, mask = torch.zeros_like(here), torch.zeros_like(here, dtype=torch.bool)
            for i in range(here.shape[1]):
                if i % of == 0:
                    score = (here[:, i : i + of] / factor.diagonal()[i : i + of]) ** 2
                    mask.scatter_(1, i + score.topk(of - keep, dim=1, largest=False).indices, True)
                pruned = here[:, i].masked_fill(mask[:, i], 0)
                errors[:, i] = (here[:, i] - pruned) / factor[i, i]
                here[:, i:] -= errors[:, i, None] * factor[i, i:]
                here[:, i] = pruned
            weight[:, block] = here
            weight[:, block.stop :] -= errors @ upper[block, block.stop :]
        self.weight.copy_(weight)


RULES: dict[str, Callable[[nn.Linear], NormSum | HessianSum]] = {"wanda": NormSum, "sparsegpt": HessianSum}


@contextmanager
def _summed(layer: nn.Module, rule: str) -> Iterator[list[NormSum | HessianSum]]:
    """Hooks on every Linear of the layer's experts while the body runs; Linears that see no token have no sum."""
    sums: dict[nn.Module, NormSum | HessianSum] = {}

    def add(linear: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        if linear not in sums:
            sums[linear] = RULES[rule](linear)
        sums[linear].add(args[0])

    linears = [
        linear
        for module in layer.modules()
        if isinstance(module, SeparateExperts)
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    ]
    hooks = [linear.register_forward_hook(add) for linear in linears]
    found: list[NormSum | HessianSum] = []
    yield found
    for hook in hooks:
        hook.remove()
    found += sums.values()


@torch.no_grad()
def prune(model: Any, windows: Tensor, rule: str, batch_size: int, keep: int = 2, of: int = 4) -> None:
    """Prune the experts of a transformers Mixtral in place.

    Args:
        model: its experts are fused parameters, gate and up in one.
        windows: [n, t] token ids.
        rule: one of RULES.
        batch_size: windows in one forward.
        keep: weights that stay of every `of`.
        of: neighbours in a row; 0 is the whole row, for Wanda only.
    """
    layers = model.model.layers
    fused = [layer.mlp.experts for layer in layers]
    for layer in layers:
        layer.mlp.experts = SeparateExperts(layer.mlp.experts)
    hidden, keywords = _first_inputs(model, windows.split(batch_size))
    for layer in layers:
        with _summed(layer, rule) as sums:
            for each, named in zip(hidden, keywords, strict=True):
                layer(each, **named)
        for each in sums:
            each.prune(keep, of)
        hidden = [layer(each, **named) for each, named in zip(hidden, keywords, strict=True)]
    for layer, experts in zip(layers, fused, strict=True):
        layer.mlp.experts.copy_back(experts)
        layer.mlp.experts = experts


class _Caught(Exception):
    pass


def _first_inputs(model: Any, batches: tuple[Tensor, ...]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first layer is called with, batch by batch: hidden states, and the rest by name."""
    hidden: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append(args[0])
        keywords.append(named)
        raise _Caught

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(batch, use_cache=False)
        except _Caught:
            continue
    hook.remove()
    return hidden, keywords


def run(job: dict[str, Any], clock: Clock) -> None:
    """A job of `clock.serve`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto")
    windows = torch.load(job["windows"])
    clock.prune(lambda: prune(model, windows, job["options"]["rule"], job["batch_size"]))
    model.save_pretrained(job["out"])
