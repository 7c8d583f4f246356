"""Half-precision products by way of float32: as near to the truth as torch's own, wherever a model may multiply."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moesparse.calibration.whole import calibrate
from moesparse.distillation import Settings, distill
from moesparse.models.stream import LayerStream
from moesparse.system import cpu_products
from moesparse.system.cpu_products import fast_products
from moesparse.testing import assert_within_budget, prune_by_magnitude, tiny_model


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


def _attention_gradients(tensors, grad, **options):
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    F.scaled_dot_product_attention(*leaves, **options).backward(grad)
    return [each.grad for each in leaves]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_attention(masked, dtype):
    *tensors, grad = _draw(4, 2, 3, 40, 16, dtype=dtype)
    mask = _draw(2, 1, 40, 40, dtype=dtype) if masked else None
    options = {"attn_mask": mask, "is_causal": not masked, "scale": 0.3}
    plain = _attention_gradients(tensors, grad, **options)
    called = []
    product = cpu_products._attention_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            cpu_products._PRODUCTS,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            lambda *given, **more: called.append(1) or product(*given, **more),
        )
        with fast_products(nn.Linear(1, 1).to(dtype)):
            ours = _attention_gradients(tensors, grad, **options)
    assert called
    wide = options | {"attn_mask": None if mask is None else mask.double()}
    exact = _attention_gradients([each.double() for each in tensors], grad.double(), **wide)
    for name, found, near, true in zip(("query", "key", "value"), ours, plain, exact, strict=True):
        assert found.dtype == dtype
        assert_within_budget(found, near, true, name)


def test_gradients_of_a_model():
    """Every gradient of a half-precision MoE is as near to that of the same weights in float32 as torch's own."""
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))

    def gradients(model, fast):
        with fast_products(model) if fast else nullcontext():
            model(ids, labels=ids).loss.backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    model = tiny_model("mixtral").to(torch.bfloat16)
    exact = gradients(copy.deepcopy(model).float(), fast=False)
    plain = gradients(copy.deepcopy(model), fast=False)
    ours = gradients(model, fast=True)
    assert ours.keys() == exact.keys()
    far = {name: [float((each[name].float() - exact[name]).norm()) for each in (ours, plain)] for name in exact}
    for name, (found, near) in far.items():
        assert found <= 1.1 * near + 1e-3 * float(exact[name].norm()), name


# blockwise mode trains experts only
@pytest.mark.parametrize(("mode", "train"), [("global", "experts"), ("global", "all"), ("blockwise", "experts")])
def test_distillation_multiplies_so(mode, train):
    """Forward and backward, also where all of the student's weights are float32 while they train."""
    seen = []
    teacher = tiny_model("mixtral").to(torch.bfloat16)
    student = prune_by_magnitude(tiny_model("mixtral").to(torch.bfloat16), "2:4")
    ids = torch.randint(3, 60, (4, 40), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            cpu_products._PRODUCTS,
            torch.ops.aten._grouped_mm.default,
            lambda a, b, *rest, **more: seen.append((a.dim(), b.dim())) or None,
        )
        distill(student, teacher, ids, mode, settings=Settings(1e-3, epochs=1, batch_size=4, train=train))
    # rows by matrices in the forward; rows by rows is the gradient of the weights
    assert {(2, 3), (2, 2)} <= set(seen)
    assert not _get_current_dispatch_mode_stack()
