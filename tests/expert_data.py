"""Routed tokens and the sums over them, by slow float64 loops: what the saliency tests compare with."""

from dataclasses import dataclass, field

import torch


@dataclass
class Sums:
    """The fields of ExpertStatistics that the mask and weight rules read."""

    tokens: torch.Tensor
    energy: dict = field(default_factory=dict)
    gated_energy: dict = field(default_factory=dict)
    moment: dict = field(default_factory=dict)
    gated_moment: dict = field(default_factory=dict)


@dataclass
class Routed:
    """x [T, in], index [T, k] of experts, gates [T, k], all on the CPU, x and gates float64."""

    x: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor
    experts: int

    def of(self, expert):
        """(x [N, in], g [N]) of the tokens routed to one expert."""
        token, slot = (self.index == expert).nonzero(as_tuple=True)
        return self.x[token], self.gates[token, slot]

    def sums(self, order="token", pairing="right"):
        """Walk the (token, slot) pairs one by one; pairing="wrong" takes the gates in the other order."""
        T, k = self.index.shape
        by_token = [(t, s) for t in range(T) for s in range(k)]
        by_slot = [(t, s) for s in range(k) for t in range(T)]
        pairs, other = (by_token, by_slot) if order == "token" else (by_slot, by_token)
        width = self.x.shape[1]
        sums = Sums(torch.zeros(self.experts, dtype=torch.int64))
        energy, gated_energy = (torch.zeros(self.experts, width, dtype=torch.float64) for _ in range(2))
        moment, gated_moment = (torch.zeros(self.experts, width, width, dtype=torch.float64) for _ in range(2))
        for (t, s), gate_at in zip(pairs, pairs if pairing == "right" else other, strict=True):
            j, g, x = int(self.index[t, s]), self.gates[gate_at], self.x[t]
            sums.tokens[j] += 1
            energy[j] += x * x
            gated_energy[j] += (g * x) ** 2
            moment[j] += torch.outer(x, x)
            gated_moment[j] += torch.outer(g * x, g * x)
        for name in ("hidden", "activation"):
            sums.energy[name], sums.gated_energy[name] = energy, gated_energy
            sums.moment[name], sums.gated_moment[name] = moment, gated_moment
        return sums


def routed(in_features=32, experts=4, tokens=120, top_k=2, unseen=(), seed=0):
    """Correlated inputs of decaying scale, routed at random but never to `unseen`, with strongly varying gates."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mix = draw(in_features, in_features) * torch.logspace(0, -1, in_features, dtype=torch.float64)
    logits = draw(tokens, experts) * 2
    logits[:, list(unseen)] = -torch.inf
    top = logits.softmax(-1).topk(top_k)
    return Routed(draw(tokens, in_features) @ mix.T, top.indices, top.values, experts)


def random_weight(experts=4, out_features=12, in_features=32, seed=1):
    return torch.randn(experts, out_features, in_features, generator=torch.Generator().manual_seed(seed))
