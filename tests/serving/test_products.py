"""Linear layers of a served model: few rows by the compiled kernels, against float64 and torch's own product."""

import pytest
import torch
from torch import nn

from moesparse.serving import products
from moesparse.serving.products import serve_few_rows
from moesparse_kernels.native_library import library, turned_off

compiled = pytest.mark.skipif(library() is None, reason="no compiled kernels for this CPU")


def layer(bias=True, dtype=torch.bfloat16):
    torch.manual_seed(1)
    return nn.Linear(200, 96, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.fixture
def calls(monkeypatch):
    """Rows of every product by the compiled kernels."""
    seen, run = [], products.gemm_native

    def gemm(x, *rest):
        seen.append(len(x))
        return run(x, *rest)

    monkeypatch.setattr(products, "gemm_native", gemm)
    return seen


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(200,), (1, 200), (3, 1, 200), (2, 5, 200), (0, 200), (70, 200)])
def test_result_is_the_product_rounded_once(shape, bias, dtype, calls):
    changed, x = layer(bias, dtype), torch.randn(shape).to(dtype)
    expected = layer(bias, dtype)(x)
    assert serve_few_rows(nn.Sequential(changed)) == 1
    found = changed(x)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    exact = nn.functional.linear(
        x.double(), changed.weight.double(), None if changed.bias is None else changed.bias.double()
    )
    # half a unit of the last place, and what fp32 sums of 200 products of size 1 may lose
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=200 * 2**-24)
    rows = x.numel() // 200
    assert calls == ([rows] if 0 < rows <= 64 else [])


@compiled
def test_rows_that_do_not_lie_together(calls):
    changed, x = layer(), torch.randn(4, 3, 200).bfloat16()
    serve_few_rows(changed)
    assert torch.equal(changed(x[:, -1]), changed(x[:, -1].contiguous()))
    assert calls == [4, 4]


@compiled
def test_what_else_there_is_stays_torchs(calls):
    class Own(nn.Linear):
        def forward(self, x):
            return x

    model = nn.Sequential(Own(4, 4).bfloat16(), nn.Linear(4, 4), nn.Embedding(2, 4, dtype=torch.bfloat16))
    assert serve_few_rows(model) == 0
    changed = layer()
    serve_few_rows(changed)
    with pytest.raises(RuntimeError, match="dtype"):
        changed(torch.randn(1, 200))
    assert calls == []


def test_without_the_compiled_kernels_nothing_changes():
    with turned_off():
        model = layer()
        assert serve_few_rows(model) == 0
    assert "forward" not in vars(model)
