"""Triton launches on the current device: every op must make that of its tensors the current one first.

One device shows nothing of that, so a spy looks at every launch whether a guard is open.
"""

import importlib
import pkgutil

import pytest
import torch
from moe_cases import make_layer, prune_2_4
from triton.runtime.interpreter import InterpretedFunction

import moesparse_kernels
from moesparse_kernels import (
    column_energies,
    column_energy,
    column_energy_sorted,
    moe_gpu,
    nm_prune,
    route,
    routing,
    row_topk,
)
from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_dense, moe_nm
from moesparse_kernels.tuning import GroupedConfig
from moesparse_kernels.unpack import unpack


@pytest.fixture
def launches(monkeypatch):
    """(kernel, is a guard open) of every launch."""
    seen, open_guards, guard, run = [], [], torch.cuda.device_of, InterpretedFunction.run

    class Spy(guard):
        def __init__(self, tensor):
            assert isinstance(tensor, torch.Tensor)
            super().__init__(tensor)

        def __enter__(self):
            open_guards.append(self)
            return super().__enter__()

        def __exit__(self, *error):
            open_guards.remove(self)
            return super().__exit__(*error)

    def spied(self, *arguments, **how):
        seen.append((self.__name__, bool(open_guards)))
        return run(self, *arguments, **how)

    monkeypatch.setattr(torch.cuda, "device_of", Spy)
    monkeypatch.setattr(InterpretedFunction, "run", spied)
    return seen


def kernels():
    """Names of all kernels of the package."""
    names = [f"moesparse_kernels.{module.name}" for module in pkgutil.iter_modules(moesparse_kernels.__path__)]
    # the compiled library is no module of Python's
    modules = [importlib.import_module(name) for name in names if not name.endswith("._native")]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
    }


def test_every_launch_is_under_a_guard(launches, monkeypatch):
    # 160 slots are two chunks, and a split reduction leaves the activation to a launch of its own
    monkeypatch.setattr(routing, "CHUNK", 128)
    monkeypatch.setattr(moe_gpu, "grouped_config", lambda *_: GroupedConfig(16, block_n=64, block_k=64, split_k=2))
    layer = make_layer(2, 1, 1, 128, 128)
    x, index, gates = layer.routed
    packed = [NMWeight.pack(weight).to_order("fragment") for weight in (layer.gate_up, layer.down)]
    weight, scale = prune_2_4(torch.randn(1, 4, 64)), torch.rand(1, 64)

    def function(projected):
        return projected[:, :128]

    calls = {
        "column_energy": lambda: column_energy(x, index, gates, 1),
        "column_energy_sorted": lambda: column_energy_sorted(x, torch.tensor([0, 1, 2])),
        "column_energies": lambda: column_energies(x, torch.tensor([0, 1, 2]), gates[:, 0].contiguous()),
        "nm_prune": lambda: nm_prune(weight, scale),
        "nm_prune 1:16": lambda: nm_prune(weight, scale, 1, 16),
        "nm_prune packed": lambda: nm_prune(weight, scale, packed=True),
        "row_topk": lambda: row_topk(weight, scale, 32),
        "route": lambda: route(torch.arange(160)[:, None] % 3, 3, 16),
        "unpack": lambda: unpack(packed[0]),
        "moe_nm": lambda: moe_nm(x, index, gates, *packed, backend="triton"),
        "moe_nm up and down": lambda: moe_nm(x, index, gates, *packed, activation=function, backend="triton"),
        "moe_nm unpack": lambda: moe_nm(x, index, gates, *packed, backend="unpack"),
        "moe_dense": lambda: moe_dense(x, index, gates, layer.gate_up, layer.down, backend="triton"),
        "moe_dense up and down": lambda: moe_dense(
            x, index, gates, layer.gate_up, layer.down, activation=function, backend="triton"
        ),
    }
    launched = set()
    for name, call in calls.items():
        launches.clear()
        call()
        assert launches, f"{name} launched nothing"
        assert all(guarded for _, guarded in launches), (name, launches)
        launched |= {kernel for kernel, _ in launches}
    assert launched == kernels(), "a kernel that no call here launches, or a new one"
