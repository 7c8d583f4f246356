"""The CUDA kernel's own source, run thread by thread on a CPU (cuda_emulator.cpp): right results, and each byte once.

The launcher, its plan, the routing and the comparison with plain torch are those that a GPU gets. Which warp goes on
and when a copy arrives is drawn by chance, so that a missing wait is a wrong result or a block that never ends.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if shutil.which("g++") is None:
    pytest.skip("needs g++, which compiles the kernel for the CPU", allow_module_level=True)

from cuda_emulator import build

from moesparse_kernels import NMWeight, nm_prune
from moesparse_kernels.cuda import check
from moesparse_kernels.cuda.grouped import grouped_mma_sp
from moesparse_kernels.schedule import route_torch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """bf16 on sm_90, with bulk copies. Few multiprocessors, so that pieces of work follow one another."""
    return replace(build(tmp_path_factory.mktemp("sm_90"), 900, torch.bfloat16), multiprocessors=7)


@pytest.fixture(autouse=True)
def small_cases(monkeypatch):
    sizes = {"gate and up": {"N": 256}, "sorted rows in parts of the reduction": {"K": 1032}}
    monkeypatch.setattr(check, "_CASES", [replace(case, **sizes.get(case.what, {})) for case in check._CASES])


def test_the_check_finds_nothing_wrong_on_sm_90(hopper):
    with hopper.in_place_of_a_gpu():
        assert check.mismatch(grouped_mma_sp, CPU, torch.bfloat16) is None


def test_nor_on_sm_80_with_two_stages(tmp_path, monkeypatch):
    # the shared memory of sm_86 and sm_89, two stages of 64 tokens; copies of 16 bytes
    ampere = replace(build(tmp_path, 800, torch.float16), multiprocessors=7, shared_memory=101376, seed=1)
    monkeypatch.setattr(check, "TOKENS", (16, 64))
    with ampere.in_place_of_a_gpu():
        assert check.mismatch(grouped_mma_sp, CPU, torch.float16) is None


# what a slip in the kernel does: each is found, by the comparison or because the block never ends
MUTANTS = {
    "the other selector": ("            mma_sp<1>(first[nt]", "            mma_sp<0>(first[nt]"),
    "no wait for copies": ("barrier_wait(pipe.full, pipe.parity);", ""),
    "a wait for too many arrivals": ("+ 8 * s, WEIGHT_ARRIVALS + 32);", "+ 8 * s, 33 + 32);"),
    "columns behind the last": ("bool inside = column < a.K;", "bool inside = true;"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_found(name, tmp_path, monkeypatch):
    old, new = MUTANTS[name]
    wrong = replace(build(tmp_path, 900, torch.bfloat16, {old: new}), multiprocessors=7)
    monkeypatch.setattr(check, "_CASES", check._CASES[:1])
    monkeypatch.setattr(check, "TOKENS", (8,))
    with wrong.in_place_of_a_gpu():
        try:
            found = check.mismatch(grouped_mma_sp, CPU, torch.bfloat16)
        except RuntimeError as error:
            found = str(error)
    assert found is not None


def test_every_byte_is_read_once_for_each_block_and_every_output_written_once(hopper):
    # experts with no row, one block and three of them; two rows of tokens are dropped
    E, N, K, block_m = 4, 256, 520, 8
    index = torch.tensor([0] * 5 + [2] * 20 + [3] * 8 + [-1, 7])[:, None]
    dense = nm_prune(torch.randn(E, N, K).bfloat16(), torch.ones(E, K))
    weight, routing = NMWeight.pack(dense).to_order("mma_sp"), route_torch(index, E, block_m)
    x = torch.randn(index.numel(), K).bfloat16()
    hopper.launches.clear()
    with hopper.in_place_of_a_gpu():
        grouped_mma_sp(x, weight, routing, index, gather=True, activation="silu", gated=True)
        parts = grouped_mma_sp(x, weight, routing, index, gather=False, keep_splits=True)
    blocks = np.array([1, 0, 3, 1])
    for launch in hopper.launches:
        assert (launch.values.reshape(E, -1) == blocks[:, None]).all()
        assert (launch.index.reshape(E, -1) == blocks[:, None]).all()
        assert (launch.stored[:, :33] == 1).all() and not launch.stored[:, 33:].any()
    assert parts.shape[0] == len(hopper.launches[1].stored) == 1
