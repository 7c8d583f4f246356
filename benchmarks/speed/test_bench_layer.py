"""pytest-benchmark entry points of the expert layer; checked, then timed, host time included."""

from functools import cache

import pytest
import torch

from benchmarks.conftest import DRY
from moesparse.benchmarking import CONTENDERS
from moesparse.benchmarking.layer import RoutedCall, Unavailable, make_layer

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.gpu

DEVICE = "cpu" if DRY else "cuda"


@cache
def layer_of(shape):
    """Kept for the tests of one shape, which follow each other."""
    layer_of.cache_clear()
    return make_layer(shape, torch.bfloat16, torch.device(DEVICE))


# one token; a decode batch; prefill
@pytest.mark.parametrize("tokens", [5] if DRY else [1, 64, 2048])
@pytest.mark.parametrize("contender", [c for c in CONTENDERS if DEVICE in c.devices], ids=lambda c: c.name)
@torch.no_grad()
def test_layer(contender, tokens, shape, timed):
    call = RoutedCall.make(layer_of(shape), tokens, "uniform")
    try:
        run = contender.prepare(call)
    except Unavailable as reason:
        pytest.skip(str(reason))
    checked = call.verify(run(), contender.slack)
    assert checked["ok"], checked
    timed(run)
