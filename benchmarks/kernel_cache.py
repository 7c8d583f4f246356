"""Triton kernels compiled ahead of a short lease, for a card that is not there.

    make gpu-cache                                   # with the Triton of the card: .venv-triton-3.6
    python -m benchmarks.kernel_cache out/triton-cache --target 90 --multiprocessors 132

Runs the host code of what `make gpu-short` measures on tensors without memory; every launch only compiles. Triton names
what it has compiled by its own files too, which differ between the wheels of one version for two Pythons: `use_carried`
names them by the version alone, here and on the card, and what is not found there is compiled there. That a card
computes the same names was not seen yet; a second process here does.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moesparse.benchmarking import SHAPES, Shape

__all__ = ["build", "calls", "compiling", "main", "use_carried"]

CARRIED = Path(__file__).resolve().parents[1] / "out" / "triton-cache"


def use_carried(folder: Path = CARRIED) -> bool:
    """Have this process read compiled kernels in `folder` and write them there; False when there is no such folder."""
    if not folder.is_dir():
        return False
    import triton
    from triton.runtime import cache

    os.environ["TRITON_CACHE_DIR"] = str(folder)
    cache.triton_key = lambda: f"moesparse-carried-{triton.__version__}"
    return True


class _Driver:
    """What Triton asks a driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def compiling(capability: int, multiprocessors: int) -> Iterator[list[str]]:
    """Every launch compiles and does not run, for a card of these; gives the names of the kernels launched."""
    from triton.runtime import driver, jit

    from moesparse_kernels import moe_gpu, tuning

    launched: list[str] = []

    def compile_only(kernel: Any, grid: Any) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            launched.append(kernel.__name__)
            return kernel.run(*arguments, grid=grid, warmup=True, **options)

        return run

    kept = {name: getattr(tuning, name) for name in ("_has_wgmma", "_multiprocessors", "_table")}
    launch, active = jit.JITFunction.__getitem__, driver._active
    tuning._has_wgmma = lambda _: capability // 10 == 9
    tuning._multiprocessors = lambda _: multiprocessors
    tuning._table = lambda _: {}
    early, moe_gpu.starts_early = moe_gpu.starts_early, lambda _: capability >= 90
    jit.JITFunction.__getitem__ = compile_only
    driver.set_active(_Driver(capability))
    try:
        yield launched
    finally:
        # not reset_active: without a GPU there is none to go back to
        driver._active = active
        jit.JITFunction.__getitem__ = launch
        moe_gpu.starts_early = early
        for name, value in kept.items():
            setattr(tuning, name, value)


def _packed(E: int, N: int, K: int) -> Any:
    from moesparse_kernels import NMWeight

    empty = functools.partial(torch.empty, dtype=torch.int32, device="meta")
    rows, columns = -(-N // 128), -(-K // 128)
    values = empty(E, rows, 2 * columns, 4, 4, 32, 4)
    return NMWeight(values, empty(E, rows, columns, 4, 32, 4), (E, N, K), 2, 4, "fragment", torch.bfloat16)


def calls(shape: Shape, tokens: int) -> None:
    """The packed and the dense layer of a shape."""
    from moesparse_kernels.moe_gpu import down_gpu, has_few_slots, layer_of_few_slots, up_gpu
    from moesparse_kernels.ops import route_inside
    from moesparse_kernels.schedule import Routings

    E, H, I = shape.num_experts, shape.hidden, shape.intermediate
    empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    x, gates = empty(tokens, H), empty(tokens, shape.top_k)
    index = torch.empty(tokens, shape.top_k, dtype=torch.int64, device="meta")
    for gate_up, down in ((_packed(E, 2 * I, H), _packed(E, H, I)), (empty(E, 2 * I, H), empty(E, H, I))):
        if has_few_slots(gate_up, index, gated=True):
            layer_of_few_slots(x, index, gates, gate_up, down, None, None, "silu", gated=True)
            continue
        routings = Routings(index, E, route_inside)
        rows = up_gpu(x, index, gate_up, None, "silu", True, "triton", routings)
        down_gpu(rows, index, gates, down, None, "triton", routings)


def _weight_calls(shape: Shape) -> None:
    """What makes a layer, and the ops of bench_kernels that run Triton kernels."""
    from moesparse_kernels import select, threshold, unpack_fragment

    E, H, I = shape.num_experts, shape.hidden, shape.intermediate
    empty = functools.partial(torch.empty, device="meta")
    for N, K in ((2 * I, H), (H, I)):
        weight, scale = empty(E, N, K, dtype=torch.bfloat16), empty(E, K)
        select.nm_prune(weight, scale, 2, 4)
        select.nm_prune_packed(weight, scale, 2, 4)
    weight, scale = empty(E, 2 * I, H, dtype=torch.bfloat16), empty(E, H)
    select.nm_prune(weight, scale, 4, 8)
    threshold.row_topk(weight, scale, H // 2)
    unpack_fragment.unpack_fragment(_packed(E, 2 * I, H))


def build(names: list[str], tokens: list[int], capability: int, multiprocessors: int) -> int:
    """Compile the kernels of these shapes and batches; how many launches that is."""
    with compiling(capability, multiprocessors) as launched:
        for name in names:
            began = time.monotonic()
            _weight_calls(SHAPES[name])
            for count in tokens:
                calls(SHAPES[name], count)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return len(launched)


def main(arguments: list[str] | None = None) -> None:
    from benchmarks.speed.short import DECODE, NAMES, PREFILL

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?", default=CARRIED)
    options.add_argument("--target", type=int, default=90, help="compute capability (90: H100, H200)")
    options.add_argument("--multiprocessors", type=int, default=132, help="of the card (132: H100 SXM, H200)")
    options.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(NAMES))
    options.add_argument("--tokens", nargs="*", type=int, default=[*DECODE, *PREFILL])
    chosen = options.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    use_carried(chosen.folder.resolve())
    launched = build(chosen.shapes, chosen.tokens, chosen.target, chosen.multiprocessors)
    files = [path for path in chosen.folder.rglob("*") if path.is_file()]
    kernels = sum(path.suffix == ".cubin" for path in files)
    size = sum(path.stat().st_size for path in files)
    print(f"{launched} launches, {kernels} kernels, {size / 2**20:.0f} MiB in {chosen.folder}")


if __name__ == "__main__":
    main()
