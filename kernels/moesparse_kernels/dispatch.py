"""Which code runs an expert layer: the backends, what each needs, and the choice between them.

    native           packed weights of any pattern in row order (or dense weights) through the compiled CPU kernels
    mma_sp           packed 2:4 weights in mma_sp order through the sparse tensor cores (cuda/), NVIDIA sm_80 and newer
    triton           packed 2:4 weights in fragment order (or dense weights) through the grouped GEMMs of this package
    semi_structured  packed 2:4 weights through torch's sparse tensor-core GEMMs, expert by expert
    unpack           packed weights of any pattern made dense in a scratch, then the dense layer
    grouped_mm       dense weights through torch's grouped GEMM
    reference        plain torch, any device

The choice depends on the average number of rows per expert, the shape, the dtype and the device: from the device's
measured table (tuning.py) where it has the shape; on a CPU from `_NATIVE_ROWS`, for a whole layer by the rows of each
expert (`experts_for_torch`). On a GPU without a table packed 2:4 experts take the kernels of the order they are held
in, for any number of rows: "unpack" is the dense layer and the writing of it besides, at every call, so that it never
reaches the layer that holds dense weights. `order_on` says which order that should be: "mma_sp" where its kernels are
asked for and have passed their check on the device, else "fragment", for "triton". That either reaches a dense layer
for many rows is an estimate from instruction counts, nothing was measured.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from .cuda.check import reason_without_mma_sp
from .layout import NMWeight
from .native_library import Native, library, reason_without
from .semi_structured import reason_unavailable
from .tuning import backend_from_table

__all__ = [
    "DENSE_BACKENDS",
    "NM_BACKENDS",
    "Auto",
    "auto_on",
    "choose_dense_backend",
    "choose_nm_backend",
    "experts_for_torch",
    "order_on",
    "rows_for_native",
]

NM_BACKENDS = ("auto", "native", "triton", "mma_sp", "semi_structured", "unpack", "reference")
DENSE_BACKENDS = ("auto", "native", "triton", "grouped_mm", "reference")

# rows per expert up to which the fused Triton layer is taken for dense experts, where nothing was measured: an estimate
_FUSED_DENSE_ROWS = 64
# Rows per expert up to which the compiled kernels are faster than torch's products, by instruction path and dtype: of
# packed weights, which torch must have unpacked, and of dense ones. Measured on an AMD Zen 4, the last two paths with
# torch held to their instructions; without bf16 or fp16 instructions torch multiplies these in plain loops.
_NATIVE_ROWS: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "avx512_bf16": {torch.bfloat16: (192, 64), torch.float16: (math.inf, math.inf), torch.float32: (256, 128)},
    "avx512": {torch.bfloat16: (math.inf, math.inf), torch.float16: (math.inf, math.inf), torch.float32: (256, 128)},
    "avx2": {torch.bfloat16: (math.inf, math.inf), torch.float16: (math.inf, math.inf), torch.float32: (128, 64)},
    # estimates: no Arm was at hand
    "neon_bf16": {torch.bfloat16: (32, 8), torch.float16: (32, 8), torch.float32: (32, 8)},
    "neon": {torch.bfloat16: (32, 8), torch.float16: (32, 8), torch.float32: (32, 8)},
}
# where torch has better instructions for the dtype than these kernels, AMX above all: an estimate, measured nowhere
_NATIVE_ROWS_BESIDE_BETTER = (16, 8)


def _on_gpu_or_interpreted(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    import triton

    return bool(triton.knobs.runtime.interpret)


def _check_triton(device: torch.device, dtype: torch.dtype, order: str = "fragment") -> None:
    if not _on_gpu_or_interpreted(device):
        raise ValueError(f'backend must be "auto", "native" or "reference" on {device.type} tensors, got "triton"')
    if dtype.itemsize != 2:
        raise ValueError(f'backend "triton" must have bf16 or fp16 weights, got {dtype}; use "reference"')
    if order != "fragment":
        raise ValueError(
            f'backend "triton" must have packed weights in "fragment" order, got {order!r}; '
            f'repack once with weight.to_order("fragment")'
        )


def order_on(device: torch.device, dtype: torch.dtype) -> str:
    """The order to hold 2:4 weights of 16 bits in on a device; compiles and checks kernels at first use."""
    if device.type != "cuda":
        return "row"
    return "fragment" if reason_without_mma_sp(device, dtype) else "mma_sp"


def _check_mma_sp(weight: NMWeight) -> None:
    if weight.order != "mma_sp":
        raise ValueError(
            f'backend "mma_sp" must have packed weights in "mma_sp" order, got {weight.order!r}; '
            f'repack once with weight.to_order("mma_sp")'
        )
    reason = reason_without_mma_sp(weight.device, weight.dtype)
    if reason is not None:
        raise ValueError(
            f'packed weights in "mma_sp" order must be where its kernels run: {reason}; '
            'reorder once with weight.to_order("fragment")'
        )


def _reason_not_native(weight: NMWeight | torch.Tensor, device: torch.device) -> str | None:
    """Why the compiled kernels cannot run a weight, None when they can."""
    if device.type != "cpu":
        return f"weights on a CPU are wanted, got {device.type}"
    if isinstance(weight, NMWeight) and weight.order != "row":
        return f'packed weights in "row" order are wanted, got {weight.order!r}; weight.to_order("row") once'
    return reason_without()


def _check_native(weight: NMWeight | torch.Tensor, device: torch.device) -> None:
    reason = _reason_not_native(weight, device)
    if reason is not None:
        raise ValueError(f'backend "native" must fit the weight and the machine: {reason}')


def _native_rows(native: Native, dtype: torch.dtype) -> tuple[float, float]:
    """Rows per expert up to which the compiled kernels win, of packed weights and of dense ones."""
    if native.torch_has_better(dtype):
        return _NATIVE_ROWS_BESIDE_BETTER
    assert native.path is not None, "the library is used only where the CPU has one of its paths"
    return _NATIVE_ROWS[native.path][dtype]


def rows_for_native(weight: NMWeight | torch.Tensor) -> float:
    """Up to how many rows of an expert the compiled kernels are the fastest; 0 where they cannot run the weight."""
    native = library()
    if native is None or _reason_not_native(weight, weight.device) is not None:
        return 0
    packed, dense = _native_rows(native, weight.dtype)
    return packed if isinstance(weight, NMWeight) else dense


def experts_for_torch(top_k_index: torch.Tensor, num_experts: int, most: float) -> torch.Tensor | None:
    """bool (E,): the experts that have more than `most` rows; None for none of them.

    A few experts may have most of the rows, so each is run by what wins for it. On a CPU: reads the ids.
    """
    if top_k_index.numel() <= most:
        return None
    kept = top_k_index[(top_k_index >= 0) & (top_k_index < num_experts)]
    many = kept.bincount(minlength=num_experts) > most
    return many if bool(many.any()) else None


def _native_wins(weight: NMWeight | torch.Tensor, rows: int) -> bool:
    """Whether the compiled kernels can run a weight and are the fastest for so many rows in equal parts."""
    most = rows_for_native(weight)
    return most > 0 and rows <= max(weight.shape[0], 1) * most


@dataclass(frozen=True)
class Auto:
    """What backend "auto" of an op takes on a device, weights being packed in the order that serves it.

    Attributes:
        op: "moe_nm", "moe_dense" or "moe_quantised".
        dtype: of x, and of weights that are not quantised.
        backend: taken up to `rows` rows per expert.
        rows: None where `backend` is taken for any number.
        beyond: the backend for more rows; None where `rows` is.
        reason: why.
    """

    op: str
    dtype: torch.dtype
    backend: str
    rows: int | None
    beyond: str | None
    reason: str


def _auto_on_cpu(op: str, dtype: torch.dtype) -> Auto:
    native = library()
    if native is None:
        return Auto(op, dtype, "reference", None, None, f"no compiled CPU kernels: {reason_without()}")
    rows = _native_rows(native, dtype)[op == "moe_dense"]
    if math.isinf(rows):
        reason = f"on {native.path} CPUs torch's products of it are not faster"
        return Auto(op, dtype, "native", None, None, reason)
    return Auto(op, dtype, "native", int(rows), "reference", "for more rows torch's products are faster")


def auto_on(device: torch.device, dtype: torch.dtype) -> tuple[Auto, Auto, Auto]:
    """What "auto" takes on a device for packed, dense and quantised experts; a GPU's measured table may differ."""
    if device.type != "cpu":
        reason = "weights are made dense, expert by expert"
        return *_auto_on_others(device, dtype), Auto("moe_quantised", dtype, "reference", None, None, reason)
    quantised = _auto_on_cpu("moe_quantised", dtype)
    if quantised.backend == "native":
        quantised = Auto("moe_quantised", dtype, "native", None, None, "x and weights meet in whole numbers")
    return _auto_on_cpu("moe_nm", dtype), _auto_on_cpu("moe_dense", dtype), quantised


def _auto_on_others(device: torch.device, dtype: torch.dtype) -> tuple[Auto, Auto]:
    if device.type != "cuda" or dtype.itemsize != 2:
        reason = f"there are no kernels for {dtype} on {device.type}"
        packed, dense = (Auto(op, dtype, "reference", None, None, reason) for op in ("moe_nm", "moe_dense"))
        return packed, dense
    reason = "an estimate, where nothing was measured for a shape"
    packed = Auto("moe_nm", dtype, "mma_sp" if order_on(device, dtype) == "mma_sp" else "triton", None, None, reason)
    if dtype == torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm"):
        return packed, Auto("moe_dense", dtype, "triton", _FUSED_DENSE_ROWS, "grouped_mm", reason)
    return packed, Auto("moe_dense", dtype, "triton", None, None, "torch has no grouped GEMM of this dtype")


def choose_nm_backend(backend: str, weight: NMWeight, rows: int, hidden: int, intermediate: int) -> str:
    """The backend that will run a packed weight: `backend` itself, checked, unless it is "auto".

    Args:
        backend: one of NM_BACKENDS.
        weight: the packed weight.
        rows: R, tokens times top_k.
        hidden: H.
        intermediate: I.

    Raises:
        ValueError: a forced backend cannot run this weight on this device, or a 2:4 weight on a GPU is in "row" order.
    """
    device, E = weight.values.device, weight.shape[0]
    if backend == "native":
        _check_native(weight, device)
        return backend
    if backend == "mma_sp":
        _check_mma_sp(weight)
        return backend
    if backend == "triton":
        _check_triton(device, weight.dtype, weight.order)
        return backend
    if backend == "semi_structured":
        reason = reason_unavailable(weight)
        if reason is not None:
            raise ValueError(f'backend "semi_structured" must fit the weight and the device: {reason}')
        return backend
    if backend != "auto":
        return backend
    if device.type == "cpu" and _native_wins(weight, rows):
        return "native"
    if device.type != "cuda" or weight.dtype.itemsize != 2:
        return "reference"
    own = {"fragment": "triton", "mma_sp": "mma_sp"}.get(weight.order)
    if own == "mma_sp":
        _check_mma_sp(weight)
    if own is None:
        if (weight.n, weight.m) == (2, 4):
            raise ValueError(
                'packed 2:4 weights of 16 bits must be in "fragment" or "mma_sp" order on a GPU, '
                f"got {weight.order!r}; "
                'reorder once with weight.to_order("fragment"), or ask for backend="unpack"'
            )
        _warn_of_unpacking(f"{weight.n}:{weight.m}")
        return "unpack"
    rows_per_expert = rows / max(E, 1)
    measured = backend_from_table(rows_per_expert, E, hidden, intermediate, weight.dtype, device)
    if measured == "semi_structured" and (
        torch.cuda.is_current_stream_capturing() or reason_unavailable(weight) is not None
    ):
        return own
    # a table says where the kernels on packed weights win, whichever the weight's order has
    return own if measured in (None, "triton", "mma_sp") else measured


@cache
def _warn_of_unpacking(pattern: str) -> None:
    """Say once for a pattern what every call will cost."""
    warnings.warn(
        f"there are no GPU kernels for packed {pattern} weights: every call makes the layer dense first, "
        "which is slower than to hold it dense (moesparse unpack)",
        stacklevel=2,
    )


def choose_dense_backend(backend: str, weight: torch.Tensor, rows: int) -> str:
    """The backend that will run a dense weight (E, N, K): `backend` itself, checked, unless it is "auto"."""
    if backend == "native":
        _check_native(weight, weight.device)
    if backend == "triton":
        _check_triton(weight.device, weight.dtype)
    has_grouped_mm = hasattr(torch.nn.functional, "grouped_mm") and weight.dtype == torch.bfloat16
    if backend == "grouped_mm" and not (has_grouped_mm and _on_gpu_or_interpreted(weight.device)):
        raise ValueError(
            'backend "grouped_mm" must have bf16 weights on a GPU and torch.nn.functional.grouped_mm, '
            f"got {weight.dtype} on {weight.device}"
        )
    if backend != "auto":
        return backend
    if weight.device.type == "cpu" and _native_wins(weight, rows):
        return "native"
    if weight.device.type != "cuda" or weight.dtype.itemsize != 2:
        return "reference"
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    if has_grouped_mm and aligned and rows / max(weight.shape[0], 1) > _FUSED_DENSE_ROWS:
        return "grouped_mm"
    return "triton"
