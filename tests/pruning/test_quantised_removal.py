"""Experts removed from quantised checkpoints: what stays has its bytes, and the result is the dense model cut alike."""

import json
from dataclasses import replace

import pytest
import torch
from further_tokens import checkpoint
from quantised_folders import CASES, fp8_blocks, quantise_folder, raw, whole_model, write_quantised
from safetensors import safe_open

from moesparse import Recipe
from moesparse.calibration.checkpoint import calibrate_checkpoint
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.repack import pack_folder
from moesparse.distillation.run import distill_checkpoint
from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.experts.choice import choose_rule
from moesparse.experts.criteria import aimer_scores
from moesparse.experts.surgery import remove_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.formats.stored import StoredWeights
from moesparse.models.on_disk import LayersOnDisk
from moesparse.pruning.plan import plan_run
from moesparse.pruning.quantised import plan_quantised
from moesparse.pruning.run import prune_checkpoint
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
CUT = Recipe(weights=None, experts=0.25, update="none")


def kept_in(out):
    """Layer -> ids that were kept, from the result's config."""
    noted = json.loads((out / "config.json").read_text())["moesparse"]["kept_experts"]
    return {int(name.split("layers.")[1].split(".")[0]): ids for name, ids in noted.items()}


def renamed(name, kept):
    """What a tensor of the source is called in the result; None where it is gone."""
    parts = name.split(".")
    if "experts" not in parts or not parts[parts.index("experts") + 1].isdigit():
        return name
    at, layer = parts.index("experts") + 1, int(parts[parts.index("layers") + 1])
    if layer not in kept:
        return name
    if int(parts[at]) not in kept[layer]:
        return None
    parts[at] = str(kept[layer].index(int(parts[at])))
    return ".".join(parts)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_alone_choose_as_those_of_the_dequantised_model_do(case, tmp_path):
    source = write_quantised(tmp_path / "source", case)
    prune_checkpoint(source, tmp_path / "out", None, CUT)
    blocks = find_moe_blocks(whole_model(source))
    want = choose_rule(blocks, remove=0.25)(torch.stack([aimer_scores(block) for block in blocks]))
    assert list(kept_in(tmp_path / "out").values()) == [ids.tolist() for ids in want]


@pytest.mark.parametrize("case", CASES)
def test_what_stays_has_its_bytes_and_computes_what_the_cut_model_does(case, tmp_path):
    source = write_quantised(tmp_path / "source", case)
    report = prune_checkpoint(source, tmp_path / "out", WINDOWS, CUT, batch_size=4)
    kept = kept_in(tmp_path / "out")
    assert kept and all(len(ids) == 6 and ids == sorted(ids) for ids in kept.values())
    before, after = raw(source), raw(tmp_path / "out")
    names = {new: name for name in before if (new := renamed(name, kept)) is not None}
    assert after.keys() == names.keys()
    changed = {new for new, name in names.items() if after[new] != before[name]}
    # the router's rows, and what else there is one of for each expert
    for new in changed:
        (dtype, shape, data), (old_dtype, old_shape, old) = after[new], before[names[new]]
        assert dtype == old_dtype
        # a table of experts for tokens is rewritten, which test_removal.py is about
        if not new.endswith("tid2eid"):
            assert (shape[0], old_shape[0]) == (6, 8) and shape[1:] == old_shape[1:], new
            rows, size = kept[int(new.split("layers.")[1].split(".")[0])], len(old) // 8
            assert data == b"".join(old[row * size : (row + 1) * size] for row in rows), new
    quantised = LayersOnDisk(source).open().shards
    stacked = {part for key in quantised.stored if quantised.is_stacked(key) for part in quantised.names_of(key)}
    assert all(new in stacked or "gate." in new or "router." in new or "proj_bias" in new for new in changed)
    # config.json: the count, and the note
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert new["quantization_config"] == old["quantization_config"]
    differing = {key for key in new if new[key] != old.get(key)}
    assert differing <= {"moesparse", "num_experts", "num_local_experts", "n_routed_experts", "n_group"}
    assert report.recipe["update"] == "none"
    # the same model cut in memory
    dense = whole_model(source)
    remove_experts(dense, [kept[layer] for layer in sorted(kept)])
    with torch.no_grad():
        assert whole_model(tmp_path / "out")(WINDOWS).logits.equal(dense(WINDOWS).logits)
    found = compare_folders(tmp_path / "out", source)
    assert found.problems == []
    assert found.tensors.keys() <= {"equal", "cut", "removed", "rerouted"}
    assert ("removed" in found.tensors) == (not stacked)
    looked = inspect_folder(tmp_path / "out", verify=True)
    assert looked.problems == [] and looked.expert_bytes < looked.dense_expert_bytes
    assert looked.format == ", ".join(quantised.formats)


@pytest.mark.parametrize("case", CASES)
def test_by_a_plan_no_weight_is_dequantised(case, tmp_path, monkeypatch):
    source = write_quantised(tmp_path / "source", case)
    report = prune_checkpoint(source, tmp_path / "text", WINDOWS, CUT, batch_size=4)
    layers = LayersOnDisk(source).open()
    outside = set(layers.checkpoint_tensors(None))
    decoded = StoredWeights._decoded

    def outside_alone(self, name, *args):
        assert name in outside, f"{name} was dequantised"
        return decoded(self, name, *args)

    monkeypatch.setattr(StoredWeights, "_decoded", outside_alone)
    recipe = Recipe(weights=None, update="none", plan=report.plan)
    unopened = LayersOnDisk(source)
    planned = plan_run(unopened.model, unopened.blocks, recipe, windows=0, length=1, batch_size=1)
    said = plan_quantised(planned, unopened, recipe)
    replayed = prune_checkpoint(source, tmp_path / "plan", None, recipe)
    before, after = raw(source), raw(tmp_path / "plan")
    routers = [
        sum(len(data) for name, (*_, data) in found.items() if ".experts." not in name) for found in (before, after)
    ]
    assert said.stored == sum(len(data) for *_, data in before.values())
    assert said.stored_after == sum(len(data) for *_, data in after.values()) + routers[0] - routers[1]
    # what is dequantised for text
    assert said.layer < planned.layer and list(said.formats) == layers.shards.formats
    assert raw(tmp_path / "plan") == raw(tmp_path / "text")
    # what tells models apart is a sample of all weights: nothing is said of those that were not read
    assert (replayed.fingerprint, replayed.plan.kept) == (None, report.plan.kept)
    assert report.fingerprint is not None


def test_blocks_that_the_end_of_a_matrix_cuts_off(tmp_path):
    """transformers refuses to dequantise these; DeepSeek's format has them."""
    block = [24, 20]
    said = {"quant_method": "fp8", "weight_block_size": block}
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    quantise = lambda name, weight: fp8_blocks(name, weight, block)  # noqa: E731
    quantise_folder(tmp_path / "source", CASES["fp8 qwen"][1], quantise, said)
    prune_checkpoint(tmp_path / "source", tmp_path / "out", WINDOWS, CUT, batch_size=4)
    assert compare_folders(tmp_path / "out", tmp_path / "source").problems == []


def test_names_of_experts_in_the_config_and_beside_it_follow(tmp_path):
    source = write_quantised(tmp_path / "source", "nvfp4 modelopt")
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj" for expert in range(8)]
    # as ModelOpt says it: in config.json and again beside it
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= {"ignore": ["lm_head", *names]}
    (source / "config.json").write_text(json.dumps(config))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", *names]}
    side = {"producer": {"name": "modelopt", "version": "0.40"}, "quantization": quantization}
    (source / "hf_quant_config.json").write_text(json.dumps(side, indent=4))
    prune_checkpoint(source, tmp_path / "out", WINDOWS, CUT, batch_size=4)
    result = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    beside = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert result["ignore"] == beside["quantization"]["exclude_modules"] == ["lm_head", *names[:6]]
    assert beside == side | {"quantization": quantization | {"exclude_modules": ["lm_head", *names[:6]]}}
    found = compare_folders(tmp_path / "out", source)
    assert found.problems == [] and found.files["renumbered"] == ["hf_quant_config.json"]
    (tmp_path / "out/hf_quant_config.json").write_text(json.dumps(side, indent=4))
    problems = compare_folders(tmp_path / "out", source).problems
    assert problems == ["the file hf_quant_config.json of the source is changed"]


def test_a_byte_that_differs_is_found(tmp_path):
    source = write_quantised(tmp_path / "source", "int4")
    prune_checkpoint(source, tmp_path / "out", WINDOWS, CUT, batch_size=4)
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            names = [name for name in shard.keys() if name.endswith("experts.3.up_proj.weight_scale")]  # noqa: SIM118
        if names:
            data = bytearray(file.read_bytes())
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            at = 8 + int.from_bytes(data[:8], "little") + header[names[0]]["data_offsets"][0]
            data[at] ^= 1
            file.write_bytes(data)
    problems = compare_folders(tmp_path / "out", source).problems
    assert problems == [
        "the tensor model.layers.1.mlp.experts.3.up_proj.weight is not what the source holds, and nothing says why"
    ]


@pytest.mark.parametrize(("mtp", "plain"), [(None, ""), ("prune", ""), ("prune", "further"), ("prune", "trunk")])
def test_layers_that_predict_further_tokens_are_in_their_own_format(mtp, plain, tmp_path):
    """In that of the trunk, or plain behind a quantised trunk and the other way round."""
    source = checkpoint(tmp_path / "source", "deepseek_v3", dtype=torch.bfloat16)
    _, is_quantised, quantise, said = CASES["fp8 deepseek"]

    def quantised(key, tensor):
        here = "further" if key.startswith("model.layers.2.") else "trunk"
        return is_quantised(key, tensor) and "eh_proj" not in key and here != plain

    quantise_folder(source, quantised, quantise, said)
    further = {name: each for name, each in raw(source).items() if name.startswith("model.layers.2.")}
    recipe = replace(CUT, mtp=mtp)
    report = prune_checkpoint(source, tmp_path / "out", WINDOWS, recipe, batch_size=4)
    assert compare_folders(tmp_path / "out", source).problems == []
    after = {name: each for name, each in raw(tmp_path / "out").items() if name.startswith("model.layers.2.")}
    if mtp is None:
        assert not after and sorted(report.surplus["dropped"]) == sorted(further)
        return
    # the layer has lost as many experts as the others, codes and scales
    kept = kept_in(tmp_path / "out")
    names = {new: name for name in further if (new := renamed(name, kept)) is not None}
    assert len(kept[2]) == 6 and after.keys() == names.keys()
    assert {new for new, name in names.items() if after[new] != further[name]} == {
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
    }


def test_saved_statistics_choose_as_the_text_does(tmp_path):
    source = write_quantised(tmp_path / "source", "fp8 qwen")
    statistics = calibrate_checkpoint(source, tmp_path / "sums", WINDOWS, batch_size=4)
    prune_checkpoint(source, tmp_path / "text", WINDOWS, CUT, batch_size=4)
    prune_checkpoint(source, tmp_path / "saved", statistics, CUT)
    assert raw(tmp_path / "text") == raw(tmp_path / "saved")


def test_what_is_not_done_with_quantised_folders_is_refused_by_name(tmp_path):
    source = write_quantised(tmp_path / "source", "fp8 qwen")
    with pytest.raises(UnsupportedModelError, match=r"IN must hold plain weights, got .* in fp8_block"):
        pack_folder(source, tmp_path / "packed")
    with pytest.raises(UnsupportedModelError, match=r"student must hold plain weights, got .*, quantised by 'fp8'"):
        distill_checkpoint(source, source, tmp_path / "out", WINDOWS)
    said = json.loads((source / "config.json").read_text())["quantization_config"]
    for changed, error, match in (
        (said | {"quant_method": "bitsandbytes"}, UnsupportedModelError, "quant_method .* got 'bitsandbytes'"),
        (None, CheckpointError, "must say in quantization_config of config.json how .* is stored"),
        (said | {"weight_block_size": [128, 128]}, CheckpointError, "_scale_inv must be .* to fit its weight"),
        (
            said | {"modules_to_not_convert": ["re:.*layers.1.*experts.7.*"]},
            UnsupportedModelError,
            "quantization_config must name experts one by one",
        ),
    ):
        config = json.loads((source / "config.json").read_text()) | {"quantization_config": changed}
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=match):
            prune_checkpoint(source, tmp_path / "out", WINDOWS, CUT)
        assert not (tmp_path / "out").exists()


def test_a_quantised_router_is_refused_before_any_work(tmp_path):
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    _, is_quantised, quantise, said = CASES["fp8 qwen"]
    with_routers = lambda key, tensor: is_quantised(key, tensor) or "mlp.gate." in key  # noqa: E731
    quantise_folder(tmp_path / "source", with_routers, quantise, said)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.gate.weight must be plain .* got fp8_block"):
        prune_checkpoint(tmp_path / "source", tmp_path / "out", WINDOWS, CUT)
    assert not (tmp_path / "out").exists()
