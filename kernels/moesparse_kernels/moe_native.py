"""The expert layer by the compiled CPU kernels (native/): packed n:m weights in "row" order, dense or quantised ones.

Products accumulate in fp32, bias and activation are fp32, h is rounded once to the dtype of x, gates are applied and
summed in fp32 to rows that were never rounded, y is rounded once. Each token's experts are added in the order of their
ids. The number of threads changes no bit; the number of tokens of an expert and the instruction path may.

Special values: NaN and infinities come through as in torch's products, also where x meets a pruned weight (0 times NaN
is NaN). On the path "avx512_bf16" bf16 products flush subnormal operands to zero, as torch's own do on such a CPU.
"""

from __future__ import annotations

import torch

from .moe_reference import ACTIVATIONS
from .native_library import DTYPES, Gemm, Layer, Native, Weight, library, matrices
from .quantised import AnyWeight, QuantisedWeight

__all__ = ["NATIVE_ACTIVATIONS", "down_native", "gemm_native", "layer_native", "up_native"]

# enum moesparse_activation, enum moesparse_stage
NATIVE_ACTIVATIONS = {
    "none": 0,
    "silu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "relu": 4,
    "relu2": 5,
    "swigluoai": 6,
}
assert NATIVE_ACTIVATIONS.keys() == set(ACTIVATIONS)
_WHOLE, _UP, _DOWN = 0, 1, 2

_GATES = (torch.bfloat16, torch.float16, torch.float32)
_NO_WEIGHT = Weight()


def _weight(weight: AnyWeight) -> Weight:
    _, N, K = weight.shape
    if isinstance(weight, torch.Tensor):
        return matrices(weight, None, N, K, 0, 0)
    of = matrices(weight.values, weight.index, N, K, weight.n, weight.m)
    if isinstance(weight, QuantisedWeight):
        of.scales = weight.scales.data_ptr()
        of.scales_expert, of.scales_row, _ = (
            stride * weight.scales.element_size() for stride in weight.scales.stride()
        )
        of.bits, of.group, of.scales_dtype = weight.bits, weight.group, DTYPES[weight.scales.dtype]
    return of


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _native() -> Native:
    native = library()
    assert native is not None, "the dispatcher chooses these kernels only where they are"
    return native


def layer_native(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: AnyWeight,
    down: AnyWeight,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    x_bits: int = 8,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(T, H) -> (T, H): both projections in one call; arguments as `moe_nm`, `moe_dense` and `moe_quantised` have
    checked them. x_bits says to how many bits x and h are brought where they meet a quantised weight; out_dtype, to
    what the result is rounded, is that of x where None.

    Memory: R rows of x and of h, in their dtype or fp32 as the instruction path multiplies, and the result in fp32.
    """
    gates = top_k_weights if top_k_weights.dtype in _GATES else top_k_weights.float()
    out = torch.empty_like(x, dtype=out_dtype)
    call = Layer(
        stage=_WHOLE,
        dtype=DTYPES[x.dtype],
        y_dtype=DTYPES[out.dtype],
        activation=NATIVE_ACTIVATIONS[activation],
        gated=gated,
        x_bits=x_bits,
        experts=gate_up.shape[0],
        tokens=top_k_index.shape[0],
        top_k=top_k_index.shape[1],
        up=_weight(gate_up),
        down=_weight(down),
        up_bias=_address(gate_up_bias),
        down_bias=_address(down_bias),
        x=x.data_ptr(),
        ids=top_k_index.data_ptr(),
        gates=gates.data_ptr(),
        ids_bytes=top_k_index.element_size(),
        gates_dtype=DTYPES[gates.dtype],
        y=out.data_ptr(),
    )
    _native().run_layer(call)
    return out


def up_native(x: torch.Tensor, top_k_index: torch.Tensor, weight: AnyWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """(T, H) -> (R, N), expert-sorted, without an activation. Rows of dropped slots are not written."""
    rows = x.new_empty(top_k_index.numel(), weight.shape[1])
    call = Layer(
        stage=_UP,
        dtype=DTYPES[x.dtype],
        experts=weight.shape[0],
        tokens=x.shape[0],
        top_k=top_k_index.shape[1],
        up=_weight(weight),
        up_bias=_address(bias),
        x=x.data_ptr(),
        ids=top_k_index.data_ptr(),
        ids_bytes=top_k_index.element_size(),
        rows=rows.data_ptr(),
    )
    _native().run_layer(call)
    return rows


def down_native(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: AnyWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """(R, I), expert-sorted -> (T, H), with gates and the sum over each token's experts."""
    gates = top_k_weights if top_k_weights.dtype in _GATES else top_k_weights.float()
    out = rows.new_empty(top_k_index.shape[0], weight.shape[1])
    call = Layer(
        stage=_DOWN,
        dtype=DTYPES[rows.dtype],
        y_dtype=DTYPES[out.dtype],
        experts=weight.shape[0],
        tokens=top_k_index.shape[0],
        top_k=top_k_index.shape[1],
        down=_weight(weight),
        down_bias=_address(bias),
        ids=top_k_index.data_ptr(),
        ids_bytes=top_k_index.element_size(),
        gates=gates.data_ptr(),
        gates_dtype=DTYPES[gates.dtype],
        rows=rows.data_ptr(),
        y=out.data_ptr(),
    )
    _native().run_layer(call)
    return out


def gemm_native(
    x: torch.Tensor, weight: AnyWeight, expert: int, bias: torch.Tensor | None = None, x_bits: int = 8
) -> torch.Tensor:
    """x (T, K), contiguous, times one expert of a weight (E, N, K): (T, N), rounded once to the dtype of x."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    of_expert = _weight(weight)
    of_expert.values += expert * of_expert.value_expert
    if of_expert.index:
        of_expert.index += expert * of_expert.index_expert
    if of_expert.scales:
        of_expert.scales += expert * of_expert.scales_expert
    call = Gemm(of_expert, _address(bias), x.data_ptr(), out.data_ptr(), x.shape[0], DTYPES[x.dtype], x_bits)
    _native().run_gemm(call)
    return out
