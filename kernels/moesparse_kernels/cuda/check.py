"""Whether the kernels of this folder may run on a device: where nobody has seen them run yet, they are compared first.

    python -m moesparse_kernels.cuda.check 0      the comparison on GPU 0: one line, exit status 0, or 3 for a mismatch

The first use on a device compiles the kernels and multiplies small cases, in a process of its own, so that a kernel
that hangs or writes where it must not takes down nothing but the check. The verdict is kept beside the compiled
kernels, for the device's model, the driver, the compiler and the source. What does not pass is off, with one warning,
and Triton's kernels run. Nothing of these kernels was measured on a GPU yet, so MOESPARSE_CUDA=1 has to ask for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..layout import NMWeight
from ..moe_reference import activate_torch
from ..reference import nm_prune_packed
from ..schedule import Routing, route_torch
from . import nvrtc
from .driver import driver_version
from .plan import KERNELS, SOURCE, TOKENS

__all__ = ["Grouped", "mismatch", "reason_without_mma_sp"]

Grouped = Callable[..., torch.Tensor]
"""`grouped.grouped_mma_sp`, or something in its place."""

# a compilation takes seconds, a process that imports torch some more; what takes this long hangs
_SECONDS = 300
_MISMATCH = 3


@dataclass(frozen=True)
class _Case:
    """One grouped GEMM, and what it is for."""

    what: str
    N: int
    K: int
    gated: bool = False
    activation: str = "none"
    bias: bool = False
    gather: bool = True
    keep_splits: bool = False


# 2048 rows are more pieces of work than a device has multiprocessors, so that pieces follow one another
_CASES = (
    _Case("gate and up", 2048, 264, gated=True, activation="silu"),
    _Case("gate and up with bias", 256, 128, gated=True, activation="gelu", bias=True),
    _Case("rows that fill no unit", 200, 136, activation="relu2", bias=True),
    _Case("gate and up inside one unit", 176, 128, gated=True, activation="gelu_tanh", bias=True),
    _Case("sorted rows in parts of the reduction", 192, 2056, gather=False, keep_splits=True),
    _Case("sorted rows and bias", 128, 256, bias=True, gather=False, keep_splits=True),
)
_EXPERTS, _TOP_K = 5, 2


def _expected(
    case: _Case, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    """(R, n_out) float64 on a CPU, zeros in rows of dropped slots."""
    offsets = routing.offsets.tolist()
    rows = x[routing.slot_of.long() // _TOP_K] if case.gather else x
    out = torch.zeros(rows.shape[0], case.N, dtype=torch.float64)
    for e in range(_EXPERTS):
        span = slice(offsets[e], offsets[e + 1])
        out[span] = rows[span].double() @ dense[e].double().T
        if bias is not None:
            out[span] += bias[e].double()
    # in float32, which is far more than is compared
    return activate_torch(out.float(), case.activation, case.gated).double()


def _difference(run: Grouped, case: _Case, block_m: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error over the rounding of the largest value in `dtype`; infinite for one that is no number."""
    random = torch.Generator().manual_seed(block_m + case.N)
    tokens = 3 * block_m
    index = torch.randint(0, _EXPERTS, (tokens, _TOP_K), generator=random)
    # an expert without a row, one with rows beyond whole blocks, ids of experts that are elsewhere
    index[index == 3] = 1
    index[0, 0], index[1, 1] = -1, _EXPERTS
    routing = route_torch(index, _EXPERTS, block_m)
    rows = tokens if case.gather else index.numel()
    x = torch.randn(rows, case.K, generator=random).to(dtype)
    dense = (torch.randn(_EXPERTS, case.N, case.K, generator=random) * case.K**-0.5).to(dtype)
    packed = NMWeight(
        *nm_prune_packed(dense, torch.ones(_EXPERTS, case.K), 2, 4), (_EXPERTS, case.N, case.K), 2, 4, "row", dtype
    )
    bias = torch.randn(_EXPERTS, case.N, generator=random).to(dtype) if case.bias else None
    wanted = _expected(case, x, packed.unpack(), bias, routing)

    fields = {name: getattr(routing, name).to(device) for name in vars(routing) if name != "block_m"}
    # memory that the result is likely to be given next, so that what is not written shows
    torch.full((8, *wanted.shape), float("nan"), device=device)
    got = run(
        x.to(device),
        packed.to(device, order="mma_sp"),
        Routing(**fields, block_m=block_m),
        index.to(device),
        gather=case.gather,
        bias=None if bias is None else bias.to(device),
        activation=case.activation,
        gated=case.gated,
        keep_splits=case.keep_splits,
    ).cpu()
    real = int(routing.offsets[-1])
    if case.keep_splits:
        partial = got.shape[0] > 1
        got = got.double().sum(0)
        if partial and bias is not None:
            got += bias.double()[index.reshape(-1)[routing.slot_of.long()].clamp(0, _EXPERTS - 1)]
    got, wanted = got[:real].double(), wanted[:real]
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max() / torch.finfo(dtype).eps)


def mismatch(run: Grouped, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a kernel gets wrong on small cases, None when it is nothing.

    Every case is multiplied with blocks of every size and compared with float64: a sum in fp32 that is rounded once
    lies within one rounding of the largest value, a weight or a token in a wrong place far outside.
    """
    for case in _CASES:
        for block_m in TOKENS:
            error = _difference(run, case, block_m, dtype, device)
            if error > 2:
                return f"{case.what}, {dtype}, blocks of {block_m} tokens: an error of {error:.3g} roundings"
    return None


def _child(device: torch.device) -> str | None:
    """The comparison in a process of its own; raises where it came to no verdict.

    Raises:
        RuntimeError: it died, or took too long.
    """
    command = [sys.executable, "-m", __name__, str(device.index or 0)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the check took longer than {_SECONDS} s") from error
    except OSError as error:
        raise RuntimeError(f"the check did not start: {error}") from error
    words = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:] or [""]
    if done.returncode == _MISMATCH:
        return words[0]
    if done.returncode:
        raise RuntimeError(f"the check ended with status {done.returncode}: {words[0]}")
    return None


def _key(device: torch.device) -> str:
    """What a verdict is good for."""
    compiler = nvrtc.find()
    assert compiler is not None
    what = (
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        driver_version(),
        compiler.version,
        SOURCE.read_text(),
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


@cache
def _verdict(device: torch.device) -> str | None:
    """Why the kernels are off on a device that could run them, None when they have passed; warns of the former once."""
    file = nvrtc.cache_folder() / f"check-{_key(device)}.json"
    if file.is_file():
        reason = json.loads(file.read_text())["mismatch"]
    else:
        try:
            reason = _child(device)
            nvrtc.keep(file, json.dumps({"mismatch": reason}).encode())
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        warnings.warn(
            "the sparse tensor-core kernels of moesparse did not pass their check on "
            f"{torch.cuda.get_device_name(device)} and are off there, Triton's kernels run: {reason}. Please report "
            f"it, with the output of `python -m {__name__} {device.index or 0}`.",
            stacklevel=3,
        )
    return reason


@cache
def reason_without_mma_sp(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not run on a device, None when they do; compiles and checks them there at first use."""
    if dtype not in KERNELS:
        return f"there are kernels for {', '.join(map(str, KERNELS))} and the weight is {dtype}"
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return f"it runs on NVIDIA GPUs only and the weight is on {device}"
    if os.environ.get("MOESPARSE_CUDA") != "1":
        return "it is run where MOESPARSE_CUDA=1 asks for it, as nothing of it was measured on a GPU yet"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 and {torch.cuda.get_device_name(device)} has less"
    if nvrtc.find() is None:
        return "there is no NVRTC, which comes with torch's CUDA packages and with CUDA toolkits"
    return _verdict(device)


def main(index: int) -> int:
    from .grouped import grouped_mma_sp

    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        for dtype in KERNELS:
            # the context that the driver's calls act on
            torch.zeros(1, device=device)
            wrong = mismatch(grouped_mma_sp, device, dtype)
            if wrong is not None:
                print(wrong)
                return _MISMATCH
    print(f"{torch.cuda.get_device_name(device)}: the sparse tensor-core kernels are right")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 0))
