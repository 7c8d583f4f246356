"""A plain checkpoint made of a quantised one while it is pruned: `output_dtype`."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from faults import at, kill, killed
from further_tokens import checkpoint
from packaging.version import Version
from quantised_folders import CASES, quantise_folder, raw, whole_model, write_quantised
from transformers import AutoModelForCausalLM

from moesparse import Recipe, prune
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.pretrained import load_model, save_pretrained
from moesparse.checkpoints.repack import pack_folder
from moesparse.distillation import Settings
from moesparse.distillation.run import distill_checkpoint
from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.models.on_disk import LayersOnDisk
from moesparse.pruning.plan import plan_run
from moesparse.pruning.quantised import plan_quantised
from moesparse.pruning.run import prune_checkpoint

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
PLAIN = Recipe(weights="2:4", saliency="magnitude", update="none", output_dtype="bfloat16")


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_the_dequantised_model_pruned(case, tmp_path):
    source, out = write_quantised(tmp_path / "source", case), tmp_path / "out"
    prune_checkpoint(source, out, None, PLAIN)
    layers = LayersOnDisk(source, output_dtype="bfloat16")
    plan = plan_run(layers.model, layers.blocks, PLAIN, windows=0, length=1, batch_size=1)
    plan = plan_quantised(plan, layers, PLAIN)
    dense = whole_model(source)
    prune(dense, None, replace(PLAIN, output_dtype=None))
    loaded, told = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"] and not told["unexpected_keys"]
    state = loaded.state_dict()
    assert all(torch.equal(state[name].to(each.dtype), each) for name, each in dense.state_dict().items())
    # the names are those of a plain checkpoint, and so are the dtypes
    weights, before = raw(out), LayersOnDisk(source).open().shards
    assert plan.stored_after == sum(len(each) for *_, each in weights.values())
    assert plan.stored == before.raw.nbytes and plan.formats == tuple(before.formats)
    assert weights.keys() == before.tensors.keys()
    assert all(weights[name][0] == torch.bfloat16 for name in before.stored)
    plain = {name: each for name, each in raw(source).items() if name in weights and name not in before.stored}
    assert all(weights[name] == each for name, each in plain.items())
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    found = compare_folders(out, source)
    assert found.problems == inspect_folder(out, verify=True).problems == []
    assert set(found.tensors["pruned"]) | set(found.tensors.get("dequantised", ())) == set(before.stored)
    assert inspect_folder(out).format == "dense"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_in_the_models_dtype_follows(dtype, tmp_path):
    source, out = write_quantised(tmp_path / "source", "awq"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    (source / "quant_config.json").write_text(json.dumps({"w_bit": 4}))
    report = prune_checkpoint(source, out, None, replace(PLAIN, output_dtype=dtype))
    assert {str(each[0]) for each in raw(out).values()} == {f"torch.{dtype}"}
    now = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    assert now == config | {"dtype": dtype, "moesparse": now["moesparse"]}
    # dequantised at once, not by way of the model's own dtype
    shards = LayersOnDisk(source).open().shards
    key = next(key for key in shards.stored if "down_proj" in key)
    wanted = shards.stored[key].format.decode(shards.parts_of(key), getattr(torch, dtype))
    got = LayersOnDisk(out).open().shards.read(key)
    assert got.equal(torch.where(got == 0, 0, wanted))
    assert report.surplus == {"quantisation": ["quant_config.json"]} and not (out / "quant_config.json").exists()
    found = compare_folders(out, source)
    assert found.problems == [] and "cast" in found.tensors and found.files["left out"] == ["quant_config.json"]
    # nothing explains another value
    values = bytearray((file := next(out.glob("*.safetensors"))).read_bytes())
    values[-3] ^= 64
    file.write_bytes(values)
    assert len(compare_folders(out, source).problems) == 1


def test_experts_go_with_a_refit_and_weights_with_them(tmp_path):
    source, out = write_quantised(tmp_path / "source", "fp8 qwen"), tmp_path / "out"
    recipe = Recipe(weights="2:4", saliency="wanda", update="least-squares", experts=0.25, output_dtype="bfloat16")

    def go(folder, **options):
        return prune_checkpoint(source, folder, WINDOWS, recipe, batch_size=4, **options)

    report = go(out)
    dense = whole_model(source)
    prune(dense, WINDOWS, replace(recipe, output_dtype=None), batch_size=4)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    with torch.no_grad():
        assert loaded(WINDOWS).logits.equal(dense(WINDOWS).logits)
    assert report.rounding is None and compare_folders(out, source).problems == []
    killed(lambda progress: go(tmp_path / "again", progress=progress), at("progress remove experts", kill, 2))
    go(tmp_path / "again", resume=True)
    assert raw(tmp_path / "again") == raw(out)


def test_layers_that_nobody_reads_are_dequantised_too(tmp_path):
    source, out = checkpoint(tmp_path / "source", "deepseek_v3", dtype=torch.bfloat16), tmp_path / "out"
    _, is_quantised, quantise, said = CASES["fp8 deepseek"]
    quantise_folder(source, lambda key, tensor: is_quantised(key, tensor) and "eh_proj" not in key, quantise, said)
    shards = LayersOnDisk(source).open().shards
    prune_checkpoint(source, out, None, PLAIN)
    found = {key: each for key, each in raw(out).items() if key.startswith("model.layers.2.")}
    assert found.keys() == {key for key in shards.tensors if key.startswith("model.layers.2.")}
    for key in found:
        assert found[key][2] == shards.read(key).contiguous().flatten().view(torch.uint8).numpy().tobytes(), key
    assert compare_folders(out, source).problems == []


def test_what_comes_next_works(tmp_path):
    source, out = write_quantised(tmp_path / "source", "fp8 qwen"), tmp_path / "out"
    prune_checkpoint(source, out, None, PLAIN)
    report = pack_folder(out, tmp_path / "packed")
    assert set(report.packed["model.layers.0.mlp.experts"].values()) == {"2:4"}
    assert compare_folders(tmp_path / "packed", source).problems == []
    # the quantised model is the teacher
    settings = Settings(epochs=1, batch_size=2, micro_batch=2)
    trained = distill_checkpoint(out, source, tmp_path / "trained", WINDOWS, settings=settings)
    assert trained.zeros[0] == trained.zeros[1] > 0
    with pytest.raises(UnsupportedModelError, match=r"student must hold plain weights.*output_dtype='bfloat16'"):
        distill_checkpoint(source, source, tmp_path / "none", WINDOWS)
    with pytest.raises(UnsupportedModelError, match=r"student must hold plain weights.*with `moesparse unpack`"):
        distill_checkpoint(tmp_path / "packed", source, tmp_path / "none", WINDOWS)


def test_what_it_is_not_for_is_refused(tmp_path):
    source = write_quantised(tmp_path / "source", "fp8 qwen")
    with pytest.raises(UsageError, match="output_dtype must be one of bfloat16, float16, float32, got 'int8'"):
        replace(PLAIN, output_dtype="int8")
    prune_checkpoint(source, tmp_path / "plain", None, PLAIN)
    with pytest.raises(UsageError, match=r"output_dtype must be left out for .*plain, which is not quantised, got"):
        prune_checkpoint(tmp_path / "plain", tmp_path / "out", None, PLAIN, allow_pruned=True)
    with pytest.raises(UsageError, match="output_dtype must be left out for a model in memory, got 'bfloat16'"):
        prune(whole_model(source), None, PLAIN)


def test_a_dequantised_model_in_memory_is_saved_as_far_as_transformers_can(tmp_path):
    loaded, out = load_model(write_quantised(tmp_path / "source", "fp8 qwen")), tmp_path / "out"
    goes_back = Version(transformers.__version__) >= Version("5.24")
    refused = pytest.raises(UnsupportedModelError, match=r"transformers can save.* pruned from its folder")
    with pytest.warns(UserWarning, match="is not edited, for it is quantised"), nullcontext() if goes_back else refused:
        save_pretrained(loaded, out)
    assert out.exists() == goes_back
    if goes_back:
        # 5.24 goes back every step by which it loaded, and what was dequantised stays so
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        again = load_model(out).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())
