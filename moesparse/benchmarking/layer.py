"""The expert layer, ours and everybody else's: every contender is compared with fp64 before it is timed.

Symbols: T tokens, E experts, H hidden, I intermediate, R = T * top_k rows. Bytes are the least a layer moves: the
weights of the experts that have tokens (packed or dense, as the contender reads them), x and y once, gates and ids.
Operations are those of the dense layer, 6 * R * H * I, also for sparse contenders. The floor of a contender is the
larger of its bytes over the measured copy bandwidth and these operations over the measured dense matmul rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moesparse.benchmarking.measure import Ceilings, time_call
from moesparse.benchmarking.shapes import Shape
from moesparse_kernels import NMWeight, nm_prune

__all__ = [
    "ROUTINGS",
    "Contender",
    "ExpertLayer",
    "RoutedCall",
    "Unavailable",
    "bench_layer",
    "device_is_lost",
    "failed",
    "make_layer",
    "make_routing",
    "print_rows",
]

ROUTINGS = ("uniform", "skewed")

# tokens whose result is compared with fp64; each token's depends on its own row alone, so a sample is a proof
_CHECKED_TOKENS = 256


class Unavailable(Exception):
    """A contender cannot run here; says why."""


def _silu_gate(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def _gpt_oss_gate(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


_GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": _silu_gate, "gpt_oss": _gpt_oss_gate}


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """Random experts of a shape with 2:4 zeros, dense and packed.

    Attributes:
        shape: the sizes.
        gate_up: (E, 2 * I, H).
        down: (E, H, I).
        packed_gate_up: the same weight packed, in fragment order on a GPU.
        packed_down: likewise.
        gate_up_bias: (E, 2 * I) or None.
        down_bias: (E, H) or None.
    """

    shape: Shape
    gate_up: torch.Tensor
    down: torch.Tensor
    packed_gate_up: NMWeight
    packed_down: NMWeight
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of moe_nm and moe_dense."""
        activation = self.shape.activation
        return {
            "activation": "swigluoai" if activation == "gpt_oss" else activation,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
        }

    @cached_property
    def transformers_module(self) -> nn.Module:
        """A module with the attributes transformers' experts functions read; weights are shared, not copied."""
        return _Experts(self)


class _Experts(nn.Module):
    has_gate = True
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.num_experts = layer.shape.num_experts
        self.has_bias = layer.shape.bias
        for name in ("gate_up", "down"):
            self.register_buffer(f"{name}_proj", getattr(layer, name))
            self.register_buffer(f"{name}_proj_bias", getattr(layer, f"{name}_bias"))
        self._apply_gate = _GATES[layer.shape.activation]


def make_layer(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> ExpertLayer:
    """Normal weights scaled so that every stage is of order one, pruned to 2:4 by magnitude."""
    random = torch.Generator(device=device).manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=random).mul_(scale)

    def packed(weight: torch.Tensor) -> NMWeight:
        made = nm_prune(weight, torch.ones(weight.shape[-1], device=device), packed=True)
        return made.to_order("fragment") if device.type == "cuda" and dtype.itemsize == 2 else made

    E, H, I = shape.num_experts, shape.hidden, shape.intermediate
    ones = torch.ones(max(H, I), device=device)
    gate_up = nm_prune(normal(E, 2 * I, H, scale=H**-0.5), ones[:H])
    down = nm_prune(normal(E, H, I, scale=I**-0.5), ones[:I])
    return ExpertLayer(
        shape=shape,
        gate_up=gate_up,
        down=down,
        packed_gate_up=packed(gate_up),
        packed_down=packed(down),
        gate_up_bias=normal(E, 2 * I, scale=0.1) if shape.bias else None,
        down_bias=normal(E, H, scale=0.1) if shape.bias else None,
    )


def make_routing(num_experts: int, top_k: int, tokens: int, law: str, seed: int = 0) -> torch.Tensor:
    """Experts of each token, (T, top_k) int64, drawn without replacement; on the CPU, the same on every machine.

    Args:
        law: "uniform": every expert is as likely. "skewed": the r-th most popular expert is drawn in proportion to
            1 / r (Zipf's law with exponent 1); which expert is how popular is random.
    """
    random = torch.Generator().manual_seed(seed)
    if law == "uniform":
        weight = torch.zeros(num_experts)
    elif law == "skewed":
        weight = -torch.log(1.0 + torch.randperm(num_experts, generator=random))
    else:
        raise ValueError(f"law must be one of {', '.join(ROUTINGS)}, got {law!r}")
    # the largest of log-weight plus Gumbel noise are a draw without replacement
    noise = -torch.log(-torch.log(torch.rand(tokens, num_experts, generator=random).clamp(1e-12, 1 - 1e-7)))
    return (weight + noise).topk(top_k, dim=-1).indices


@dataclass(frozen=True, eq=False)
class RoutedCall:
    """One call of a layer: inputs, and what its result must be."""

    layer: ExpertLayer
    x: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor

    @classmethod
    def make(cls, layer: ExpertLayer, tokens: int, law: str, seed: int = 0) -> RoutedCall:
        """Normal x; gates are a softmax of normal scores, in the dtype of x as routers return them."""
        shape, like = layer.shape, layer.gate_up
        random = torch.Generator(device=like.device).manual_seed(seed + 1)
        x = torch.empty(tokens, shape.hidden, dtype=like.dtype, device=like.device).normal_(generator=random)
        scores = torch.empty(tokens, shape.top_k, device=like.device).normal_(generator=random)
        index = make_routing(shape.num_experts, shape.top_k, tokens, law, seed).to(like.device)
        return cls(layer, x, index, scores.softmax(-1).to(like.dtype))

    @property
    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x, self.top_k_index, self.top_k_weights

    @cached_property
    def touched(self) -> int:
        """Experts that have tokens."""
        return int(self.top_k_index.unique().numel())

    @property
    def flops(self) -> int:
        """Of the dense layer."""
        return 6 * self.top_k_index.numel() * self.layer.shape.hidden * self.layer.shape.intermediate

    def moved(self, packed: bool) -> int:
        """The least bytes of the call."""
        layer = self.layer
        weights: Iterable[Any] = (layer.packed_gate_up, layer.packed_down) if packed else (layer.gate_up, layer.down)
        biases = [bias for bias in (layer.gate_up_bias, layer.down_bias) if bias is not None]
        per_expert = sum(tensor.nbytes for tensor in (*weights, *biases)) // layer.shape.num_experts
        return self.touched * per_expert + 2 * self.x.nbytes + self.top_k_index.nbytes + self.top_k_weights.nbytes

    @cached_property
    def checked(self) -> torch.Tensor:
        """Tokens that are compared with fp64, the first and the last among them."""
        tokens = self.x.shape[0]
        return torch.linspace(0, tokens - 1, min(tokens, _CHECKED_TOKENS), device=self.x.device).round().long()

    def oracle(self, compute: torch.dtype, rounded: bool) -> torch.Tensor:
        """The checked tokens' results computed in `compute`; `rounded` stores where the kernels promise to round."""
        layer, gate_of = self.layer, _GATES[self.layer.shape.activation]
        dtype, index = self.x.dtype, self.top_k_index[self.checked]
        x, gates = self.x[self.checked].to(compute), self.top_k_weights[self.checked].to(compute)
        out = torch.zeros_like(x)

        def stored(value: torch.Tensor) -> torch.Tensor:
            return value.to(dtype).to(compute) if rounded else value

        def biased(rows: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
            return rows if bias is None else rows + bias[expert].to(compute)

        for e in index.unique().tolist():
            token, choice = (index == e).nonzero(as_tuple=True)
            rows = biased(x[token] @ layer.gate_up[e].to(compute).T, layer.gate_up_bias, e)
            if rounded and layer.shape.activation != "silu":
                # a gate that is not fused reads the rounded projection and computes in its dtype
                rows = rows.to(dtype)
            hidden = stored(gate_of(rows)).to(compute)
            rows = biased(hidden @ layer.down[e].to(compute).T, layer.down_bias, e)
            out.index_add_(0, token, stored(rows) * gates[token, choice, None])
        return stored(out)

    @cached_property
    def references(self) -> tuple[torch.Tensor, float]:
        """fp64 result of the checked tokens and the error a kernel may make: plain fp32's, plus one rounding."""
        exact = self.oracle(torch.float64, rounded=False)
        plain = self.oracle(torch.float32, rounded=True)
        rounding = torch.finfo(self.x.dtype).eps * float(exact.abs().max())
        return exact, float((plain.double() - exact).abs().max()) + rounding

    def verify(self, out: torch.Tensor, slack: float) -> dict[str, Any]:
        """Largest error over the checked tokens, relative error and budget; `ok` also wants every value finite."""
        exact, budget = self.references
        difference = out[self.checked].double() - exact
        error = float(difference.abs().max())
        return {
            "ok": bool(out.isfinite().all()) and error <= slack * budget,
            "error": error,
            "error_budget": slack * budget,
            "relative_error": float(difference.norm() / exact.norm()),
        }


@dataclass(frozen=True)
class Contender:
    """One way to run an expert layer.

    Attributes:
        name: as it is printed.
        devices: device types it runs on.
        sparse: reads packed weights; else it is a dense baseline.
        prepare: makes the call that is timed, or raises Unavailable.
        slack: times the error budget. 2 for those that round the first projection and the activation to 16 bits too.
        graph: can be captured in a CUDA graph.
    """

    name: str
    devices: tuple[str, ...]
    sparse: bool
    prepare: Callable[[RoutedCall], Callable[[], torch.Tensor]]
    slack: float = 1.0
    graph: bool = True


def device_is_lost() -> bool:
    """Whether every later call on the device fails, as after an illegal access; only a new process has it back."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def failed(error: Exception) -> dict[str, str]:
    """What a row says of a contender that raised: "failed", or "lost" where it took the device along."""
    status = "lost" if device_is_lost() else "failed"
    return {"status": status, "reason": f"{type(error).__name__}: {error}"[:500]}


def _bench_one(call: RoutedCall, contender: Contender, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    device = call.x.device
    try:
        run = contender.prepare(call)
        out = run()
        checked = call.verify(out, contender.slack)
        del out
        if not checked.pop("ok"):
            return {"status": "wrong", **checked, "reason": "differs from the fp64 result by more than the budget"}
        timing = time_call(run, device, graph=contender.graph, budget=budget)
    except (Unavailable, torch.OutOfMemoryError) as error:
        return {"status": "skipped", "reason": str(error).splitlines()[0]}
    except Exception as error:
        if str(error).startswith("backend "):
            # a forced backend that does not fit this weight or this device
            return {"status": "skipped", "reason": str(error)}
        return failed(error)
    moved = call.moved(contender.sparse)
    floor = ceilings.floor(moved, call.flops)
    return {
        "status": "ok",
        **checked,
        **timing.as_row(),
        "bytes": moved,
        "dense_flops": call.flops,
        "gb_s": moved / timing.median / 1e9,
        "dense_tflop_s": call.flops / timing.median / 1e12,
        "floor_us": floor * 1e6,
        "roofline_share": floor / timing.median,
        "copy_share": moved / timing.median / ceilings.copy,
    }


@torch.no_grad()
def bench_layer(
    layer: ExpertLayer,
    tokens: int,
    law: str,
    ceilings: Ceilings,
    contenders: Sequence[Contender],
    *,
    seed: int = 0,
    budget: float = 0.06,
    lost: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Verify, then time, every contender on one call of a layer.

    Args:
        lost: names of contenders that have lost the device in another process, with the reason: they do not run.

    Returns:
        One row for each contender: sizes, status ("ok", "skipped", "wrong", "failed" or "lost", with the reason),
        errors against fp64, times in microseconds, rates, shares of the ceilings, and `speedup`, the best dense time
        over its own, with `against`, whose time that is. A contender that is wrong is not timed. Where one loses the
        device, its row is the last.
    """
    lost = lost or {}
    call = RoutedCall.make(layer, tokens, law, seed)
    shape = layer.shape
    rows = []
    for contender in contenders:
        rows.append(
            {
                "shape": shape.name,
                "experts": shape.num_experts,
                "top_k": shape.top_k,
                "hidden": shape.hidden,
                "intermediate": shape.intermediate,
                "dtype": str(layer.gate_up.dtype).removeprefix("torch."),
                "tokens": tokens,
                "routing": law,
                "seed": seed,
                "rows_per_expert": call.top_k_index.numel() / shape.num_experts,
                "touched_experts": call.touched,
                "contender": contender.name,
                "sparse": contender.sparse,
                **(
                    {"status": "lost", "reason": lost[contender.name]}
                    if contender.name in lost
                    else _bench_one(call, contender, ceilings, budget)
                ),
            }
        )
        if rows[-1]["status"] == "lost" and contender.name not in lost:
            break
    dense = [row for row in rows if row["status"] == "ok" and not row["sparse"]]
    best = min(dense, key=lambda row: row["us"], default=None)
    for row in rows:
        if row["status"] == "ok" and best is not None:
            row |= {"speedup": best["us"] / row["us"], "against": best["contender"]}
    return rows


def _short(name: str) -> str:
    return name.replace("transformers", "hf").replace("moe_", "").replace("semi_structured", "semi")


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """One line for each call: our packed layer, the best contender that is packed and the best dense one, in us."""
    calls: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        calls.setdefault((row["shape"], row["dtype"], row["routing"], row["tokens"]), []).append(row)
    print("us are medians; speedup = best dense / nm; roofline = floor of the packed bytes / nm")
    print(f"{'shape':<17}{'dtype':<9}{'routing':<8}{'tokens':>6}{'nm us':>10}  {'best packed':<22}", end="")
    print(f"{'best dense':<26}{'speedup':>8}{'roofline':>9}")
    for (shape, dtype, law, tokens), found in calls.items():
        ours = next(row for row in found if row["sparse"])
        best = []
        for sparse in (True, False):
            timed = [row for row in found if row["sparse"] == sparse and row["status"] == "ok"]
            fastest = min(timed, key=lambda row: row["us"], default=None)
            best.append("-" if fastest is None else f"{_short(fastest['contender'])} {fastest['us']:,.1f}")
        print(f"{shape[:16]:<17}{dtype:<9}{law:<8}{tokens:>6}", end="")
        if ours["status"] != "ok":
            print(f"{ours['status']:>10}  {best[0]:<22}{best[1]:<26}")
            continue
        speedup = f"{ours['speedup']:.2f}x" if "speedup" in ours else "-"
        print(f"{ours['us']:>10,.1f}  {best[0]:<22}{best[1]:<26}{speedup:>8}{ours['roofline_share']:>9.0%}")
    ran = {row["contender"] for row in rows if row["status"] == "ok"}
    for contender, reason in {
        row["contender"]: row["reason"]
        for row in rows
        if row["status"] == "skipped" and not row["sparse"] and row["contender"] not in ran
    }.items():
        print(f"no speed-up here is against {contender}: {reason}")
    for reason in dict.fromkeys(
        f"{row['shape']} {row['contender']} {row['status']}: {row['reason']}"
        for row in rows
        if row["status"] in ("wrong", "failed", "lost")
    ):
        print(reason)
