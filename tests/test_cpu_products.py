"""Half-precision products by way of float32: as near to the truth as torch's own, wherever a model may multiply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moesparse import cpu_products
from moesparse.calibration import calibrate
from moesparse.cpu_products import fast_products
from moesparse.layerwise import LayerStream
from moesparse.testing import assert_within_budget, tiny_model


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    """A CPU without units for bfloat16, whatever this one has."""
    monkeypatch.setattr(cpu_products, "_is_slow", lambda dtype: dtype in (torch.bfloat16, torch.float16))


def _draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# 8: the fewest rows that are widened; 33: no power of two; the part is smaller than a matrix, so that parts meet
@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(rows, dtype, bias, monkeypatch):
    monkeypatch.setattr(cpu_products, "_PART", 64 * 20)
    layer = nn.Linear(64, 48, bias=bias).to(dtype)
    x = _draw(2, rows, 64, dtype=dtype)
    with torch.no_grad():
        plain = layer(x)
        with fast_products(layer):
            ours = layer(x)
        with torch.inference_mode(), fast_products(layer):
            again = layer(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert ours.dtype == dtype
    assert torch.equal(ours, again)
    assert_within_budget(ours, plain, exact, "linear")


def test_products_of_batches_and_groups():
    a, b = _draw(3, 16, 32, dtype=torch.bfloat16), _draw(3, 32, 8, dtype=torch.bfloat16)
    # an empty group, one of a single row, and rows behind the last group
    offsets = torch.tensor([10, 10, 11, 40], dtype=torch.int32)
    x, weights = _draw(44, 32, dtype=torch.bfloat16), _draw(4, 24, 32, dtype=torch.bfloat16)
    module = nn.Linear(1, 1).bfloat16()
    with torch.no_grad(), fast_products(module):
        batched, grouped = a @ b, F.grouped_mm(x, weights.transpose(1, 2), offs=offsets)
    assert_within_budget(batched, a @ b, a.double() @ b.double(), "bmm")
    plain = F.grouped_mm(x, weights.transpose(1, 2), offs=offsets)
    exact = torch.cat(
        [
            x[start:stop].double() @ w.double().T
            for start, stop, w in zip([0, 10, 10, 11], offsets, weights, strict=True)
        ]
    )
    assert_within_budget(grouped[:40], plain[:40], exact, "grouped_mm")


def test_only_models_with_slow_weights_are_touched():
    with fast_products(nn.Linear(2, 2)) as nothing:
        assert nothing is None
    with fast_products(nn.Linear(2, 2).bfloat16()) as mode:
        assert mode is not None


@pytest.mark.parametrize("run", ["calibrate", "layer by layer"])
def test_calibration_and_the_stream_multiply_so(run):
    """Both do, or statistics of the whole model and of its layers would differ."""
    model = tiny_model("mixtral").to(torch.bfloat16)
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    seen = []

    def note(*_: object) -> None:
        seen.append(any(isinstance(mode, cpu_products._InFloat32) for mode in _get_current_dispatch_mode_stack()))

    layers = model.model.layers
    stream = LayerStream(model, layers, ids)
    for layer in layers:
        layer.register_forward_pre_hook(note)
    if run == "calibrate":
        calibrate(model, ids)
    else:
        for _ in stream.run(0):
            assert not _get_current_dispatch_mode_stack()
    assert seen
    assert all(seen)
