"""What is said of a contender that cannot run, and what a speed-up is against."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from moesparse.benchmarking import CONTENDERS, Ceilings, Shape, bench_layer, print_rows
from moesparse.benchmarking.layer import make_layer
from moesparse_kernels import moe_dense

NAMED = {contender.name: contender for contender in CONTENDERS}
CEILINGS = Ceilings(copy=1e10, matmul=1e12)


@pytest.fixture
def package(monkeypatch, tmp_path):
    """package(name, path, source): the module `path` of a package in the place of the one that is installed."""

    def make(name, path, source):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        top = ModuleType(name)
        top.__path__, top.__spec__ = [str(tmp_path)], ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, top)
        file = tmp_path.joinpath(*path.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True)
        for folder in file.relative_to(tmp_path).parents:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(source)

    before = set(sys.modules)
    yield make
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in ("vllm", "transformers"):
            del sys.modules[module]


def bench(*names, **sizes):
    layer = make_layer(Shape("tiny", 2, 1, 64, 64, **sizes), torch.bfloat16, torch.device("cpu"))
    rows = bench_layer(layer, 3, "uniform", CEILINGS, [NAMED[name] for name in names], budget=0.001)
    return {row["contender"]: row for row in rows}


def test_a_transformers_that_does_not_import_is_an_error(package):
    package("transformers", "integrations.moe", "import a_module_that_is_not_there")
    row = bench("transformers grouped_mm")["transformers grouped_mm"]
    assert row["status"] == "failed"
    assert row["reason"] == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"


def test_a_transformers_without_the_function_is_none(package):
    package("transformers", "integrations.moe", "ALL_EXPERTS_FUNCTIONS = {}")
    row = bench("transformers batched_mm")["transformers batched_mm"]
    assert (row["status"], row["reason"]) == ("skipped", "this transformers has no experts function 'batched_mm'")


def test_vllm_gets_what_its_routers_give(package):
    package(
        "vllm",
        "model_executor.layers.fused_moe",
        "def fused_experts(x, w1, w2, topk_weights, topk_ids):\n    return RUN(x, w1, w2, topk_weights, topk_ids)\n",
    )
    from vllm.model_executor.layers import fused_moe

    def run(x, w1, w2, topk_weights, topk_ids):
        assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
        assert (w1.shape, w2.shape) == ((2, 128, 64), (2, 64, 64))
        return moe_dense(x, topk_ids, topk_weights, w1, w2, backend="reference")

    fused_moe.RUN = run
    row = bench("vllm fused_moe")["vllm fused_moe"]
    assert (row["status"], row["against"]) == ("ok", "vllm fused_moe")
    assert bench("vllm fused_moe", bias=True)["vllm fused_moe"]["status"] == "skipped"


def test_without_vllm_the_row_says_so_and_a_speedup_names_its_baseline(monkeypatch, capsys):
    monkeypatch.setattr("moesparse.benchmarking.contenders.find_spec", lambda name: None)
    rows = bench("moe_nm reference", "moe_dense reference", "vllm fused_moe")
    assert rows["vllm fused_moe"]["reason"] == "vllm is not installed"
    assert rows["vllm fused_moe"]["status"] == "skipped"
    packed, dense = rows["moe_nm reference"], rows["moe_dense reference"]
    assert packed["against"] == dense["against"] == "moe_dense reference"
    assert packed["speedup"] == pytest.approx(dense["us"] / packed["us"])
    print_rows(list(rows.values()))
    assert "no speed-up here is against vllm fused_moe: vllm is not installed" in capsys.readouterr().out
