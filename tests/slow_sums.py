"""The sums of a block by a slow loop over tokens and slots, and what compares statistics: shared by their tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from moesparse.calibration.statistics import ExpertStatistics, ModelStatistics
from moesparse.models.blocks import MoEBlock, find_moe_blocks

VOCABULARY = 64


def windows(n: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


# What each family computes, written from its modeling file; none of it goes through moesparse.


def _gated_expert(experts: Any, e: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = experts.gate_up_proj[e].double().chunk(2)
    activation = F.silu(gate @ x) * (up @ x)
    return activation, experts.down_proj[e].double() @ activation


def _gpt_oss_expert(experts: Any, e: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = x @ experts.gate_up_proj[e].double() + experts.gate_up_proj_bias[e].double()
    gate, up = gate_up[0::2].clamp(max=experts.limit), gate_up[1::2].clamp(-experts.limit, experts.limit)
    activation = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    return activation, activation @ experts.down_proj[e].double() + experts.down_proj_bias[e].double()


def _nemotron_expert(experts: Any, e: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    activation = F.relu(experts.up_proj[e].double() @ x).square()
    return activation, experts.down_proj[e].double() @ activation


EXPERTS: dict[str, Callable[[Any, int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "mixtral": _gated_expert,  # softmax router, the plain layout
    "deepseek_v3": _gated_expert,  # sigmoid scores, groups, a shared expert, gates scaled by a factor
    "gpt_oss": _gpt_oss_expert,  # transposed, biased, gate and up interleaved and clamped
    "nemotron_h": _nemotron_expert,  # no gate
}


@torch.no_grad()
def slow_sums(
    family: str, block: MoEBlock, hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, keep=None
) -> dict[str, torch.Tensor]:
    """Every sum of one block by a loop over tokens and slots in float64, from what the experts were called with."""
    E, H, I = block.num_experts, block.hidden_size, block.intermediate_size
    sums = ExpertStatistics.zeros(E, {"hidden": H, "activation": I}, "both")
    for t in range(hidden.shape[0]):
        if keep is not None and not keep[t]:
            continue
        for k in range(index.shape[1]):
            e, g, x = int(index[t, k]), gates[t, k].double(), hidden[t].double()
            if e >= E:
                continue
            activation, f = EXPERTS[family](block.experts, e, x)
            norm = f.square().sum().sqrt()
            sums.tokens[e] += 1
            sums.maxima["output"][e] = max(sums.maxima["output"][e], f.abs().max())
            sums.gate_sum[e] += g
            sums.norm_sum[e] += norm
            sums.norm_sq_sum[e] += norm**2
            sums.gated_norm_sum[e] += g * norm
            sums.gated_norm_sq_sum[e] += g**2 * norm**2
            for name, X in (("hidden", x), ("activation", activation)):
                sums.energy[name][e] += X**2
                sums.gated_energy[name][e] += (g * X) ** 2
                sums.moment[name][e] += torch.outer(X, X)
                sums.gated_moment[name][e] += torch.outer(g * X, g * X)
    return sums.named_tensors() | sums.named_maxima()


def sums_of(statistics: ExpertStatistics) -> dict[str, torch.Tensor]:
    """Sums and maxima by name; the `extra` ones have tests of their own."""
    named = statistics.named_tensors() | statistics.named_maxima()
    return {name: tensor for name, tensor in named.items() if not name.startswith("extra.")}


def assert_same_sums(actual: ExpertStatistics, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to the largest value of each sum; token counts exactly."""
    named = sums_of(actual)
    assert named.keys() == expected.keys()
    assert torch.equal(named["tokens"], expected["tokens"])
    for name, tensor in named.items():
        assert tensor.isfinite().all(), name
        error = (tensor - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same_bits(actual: ModelStatistics, expected: ModelStatistics) -> None:
    assert list(actual.blocks) == list(expected.blocks)
    for name, block in actual.blocks.items():
        other = expected.blocks[name]
        mine, theirs = block.named_tensors() | block.named_maxima(), other.named_tensors() | other.named_maxima()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@contextmanager
def experts_inputs(model: torch.nn.Module) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """What the experts modules are called with while the body runs, by block: hidden states, expert ids, gates."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name] = tuple(arg.clone() for arg in args)

        return keep

    hooks = [block.experts.register_forward_pre_hook(keeper(block.name)) for block in find_moe_blocks(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
