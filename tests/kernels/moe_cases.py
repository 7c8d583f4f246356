"""Seeded expert layers, their slow fp64 oracle, and the error budget, for the plain, interpreter and GPU tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATE = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def prune_2_4(weight: torch.Tensor) -> torch.Tensor:
    """Zero the two smallest of every four neighbours."""
    groups = weight.unflatten(-1, (-1, 4))
    keep = groups.abs().float().topk(2, dim=-1).indices
    # where, not times: a product would leave -0.0, which a packed weight does not bring back
    return groups.where(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, keep, True), 0).flatten(-2).contiguous()


def gated_hidden(activation: str, projected: torch.Tensor) -> torch.Tensor:
    """act(gate) * up of [gate | up]; "swigluoai" has them in alternating columns, clamped."""
    if activation == "swigluoai":
        gate, up = projected[..., ::2].clamp(max=7.0), projected[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = projected.chunk(2, dim=-1)
    return ACTIVATE[activation](gate) * up


@dataclass
class Layer:
    """One call of the expert layer, dense weights with 2:4 zeros."""

    x: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: str
    gated: bool

    @property
    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x, self.top_k_index, self.top_k_weights

    @property
    def options(self) -> dict:
        return {
            "activation": self.activation,
            "gated": self.gated,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
        }


def make_layer(
    T: int,
    top_k: int,
    E: int,
    H: int,
    I: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    routing: str = "spread",
    bias: bool = False,
    activation: str = "silu",
    gated: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Layer:
    """Random weights scaled so that every stage is of order one.

    Args:
        routing: "spread" distinct random experts; "one" all on expert E - 1; "few" only E - 100 .. E - 1 unused;
            "sentinels" some ids -1 and some >= E, the first token's all of them.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(dtype)

    scores = torch.rand(T, E, generator=random)
    if routing == "one":
        scores[:, E - 1] = 2.0
    if routing == "few":
        scores[:, E - 100 :] = -1.0
    top_k_index = scores.topk(top_k, dim=-1).indices
    if routing == "sentinels":
        top_k_index[torch.rand(T, top_k, generator=random) < 0.3] = E
        top_k_index[torch.rand(T, top_k, generator=random) < 0.2] = -1
        top_k_index[0] = E + 3
    N = 2 * I if gated else I
    layer = Layer(
        x=normal(T, H),
        top_k_index=top_k_index,
        top_k_weights=torch.rand(T, top_k, generator=random) + 0.1,
        gate_up=prune_2_4(normal(E, N, H, scale=H**-0.5)),
        down=prune_2_4(normal(E, H, I, scale=I**-0.5)),
        gate_up_bias=normal(E, N) if bias else None,
        down_bias=normal(E, H) if bias else None,
        activation=activation,
        gated=gated,
    )
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(layer, name, value.to(device))
    return layer


def oracle(layer: Layer, compute: torch.dtype, rounded: bool) -> torch.Tensor:
    """The layer token by token and choice by choice, in `compute`; with `rounded`, as the kernels promise to round."""
    dtype = layer.x.dtype

    def stored(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype).to(compute) if rounded else value

    out = torch.zeros(layer.x.shape[0], layer.down.shape[1], dtype=compute)
    for t in range(layer.x.shape[0]):
        for k in range(layer.top_k_index.shape[1]):
            e = int(layer.top_k_index[t, k])
            if not 0 <= e < layer.gate_up.shape[0]:
                continue
            hidden = layer.gate_up[e].to(compute) @ layer.x[t].to(compute)
            if layer.gate_up_bias is not None:
                hidden = hidden + layer.gate_up_bias[e].to(compute)
            if layer.gated:
                hidden = gated_hidden(layer.activation, hidden)
            else:
                hidden = ACTIVATE[layer.activation](hidden)
            row = layer.down[e].to(compute) @ stored(hidden)
            if layer.down_bias is not None:
                row = row + layer.down_bias[e].to(compute)
            out[t] += layer.top_k_weights[t, k].to(compute) * stored(row)
    return stored(out)


def assert_within_budget(
    actual: torch.Tensor, same_dtype: torch.Tensor, fp64: torch.Tensor, name: str, slack: float = 1.0
) -> None:
    """Lie no further from fp64 than plain torch does at the same dtype, plus one rounding of the largest value."""
    assert actual.shape == fp64.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(fp64.shape)}"
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name}: non-finite values"
    rounding = torch.finfo(actual.dtype).eps * fp64.abs().max()
    budget = slack * ((same_dtype.double() - fp64).abs().max() + rounding)
    error = (actual.double() - fp64).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} over budget {budget:.2e}"


def assert_layer(actual: torch.Tensor, layer: Layer, name: str) -> None:
    """`actual` is the layer's result within the budget of its dtype."""
    assert actual.dtype == layer.x.dtype and actual.device == layer.x.device
    cpu = Layer(
        **{key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in vars(layer).items()}
    )
    same_dtype = oracle(cpu, torch.float32, rounded=True)
    assert_within_budget(actual.cpu(), same_dtype, oracle(cpu, torch.float64, rounded=False), name)


# the reason of each shape: T, top_k, E, H, I, options
SHAPES = {
    "one token": (1, 2, 4, 128, 128, {}),
    "no tokens": (0, 2, 4, 128, 128, {}),
    "an empty expert, top_k = 1": (2, 1, 4, 128, 128, {}),
    "all tokens on one expert": (19, 1, 3, 128, 128, {"routing": "one"}),
    "top_k = E": (3, 3, 3, 128, 128, {}),
    "no power of two; gate and up inside one tile": (5, 2, 3, 200, 72, {}),
    "sentinels": (6, 2, 3, 128, 128, {"routing": "sentinels"}),
    "100 empty experts of 128": (4, 8, 128, 16, 16, {"routing": "few"}),
    "bias": (5, 2, 3, 128, 128, {"bias": True}),
    "bias, no power of two": (5, 2, 3, 136, 88, {"bias": True}),
    "not gated": (5, 2, 3, 128, 128, {"gated": False, "activation": "relu2", "bias": True}),
}
