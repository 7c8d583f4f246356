"""A model for images and text is pruned, packed and trained inside its wrapper, and read again as that wrapper."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_data import record
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import moesparse
from moesparse.calibration.data import text_of
from moesparse.calibration.windows import ImageWindows
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.distillation import Settings, distill, distill_checkpoint
from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.on_disk import LayersOnDisk
from moesparse.models.opener import opener, towers
from moesparse.system.json_text import json_with
from moesparse.testing import WRAPPERS, tiny_model

# how a folder may hold the experts: as transformers saves them, or as the hub does
FORMS = [*((family, "saved") for family in sorted(WRAPPERS)), ("qwen3_5_moe", "fused"), ("qwen3_vl_moe", "turned")]
BOTH = moesparse.Recipe(weights="2:4", experts=0.25, saliency="wanda", update="none")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def folder_of(family: str, form: str, folder: Path) -> Path:
    """A checkpoint with odd dtypes in its tower and files beside it."""
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if form == "turned":
        tensors = {key: each.mT.contiguous() if "mlp.experts." in key else each for key, each in tensors.items()}
    if form == "fused":
        for layer in (0, 1):
            prefix = f"model.language_model.layers.{layer}.mlp.experts"
            up, gate, down = (
                torch.stack([tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(8)])
                for name in ("up", "gate", "down")
            )
            tensors |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}.down_proj": down}
    for number, key in enumerate(sorted(tensors)):
        if is_of_tower(key) and number % 2:
            # float32 with bits that bf16 does not have
            tensors[key] = tensors[key].float() * 1.0001
    tensors["model.visual.probe"] = torch.randn(3)
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text('{"size":   1}')
    return folder


def is_of_tower(key: str) -> bool:
    return "visual" in key or "vision" in key


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: each for file in sorted(folder.glob("*.safetensors")) for key, each in load_file(file).items()}


def logits(model, seed: int = 0) -> torch.Tensor:
    ids, seen = record(model, seed)
    seen = {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in seen.items()}
    with torch.no_grad():
        return model(input_ids=ids[None], **seen).logits


def windows() -> torch.Tensor:
    return torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(1))


def prune(source: Path, out: Path, recipe: moesparse.Recipe, whole: bool) -> None:
    if not whole:
        moesparse.prune_checkpoint(source, out, windows(), recipe)
        return
    model, _ = moesparse.load_pretrained(source)
    report = moesparse.prune(model, windows(), recipe)
    moesparse.save_pretrained(model, out, source=source, recipe=report.recipe, report=report.to_dict())


@pytest.mark.parametrize(
    ("family", "form", "whole"),
    [*((*each, False) for each in FORMS), *((*each, True) for each in FORMS if each[1] != "saved" or "4" in each[0])],
)
def test_experts_change_inside_the_wrapper_and_nothing_else(family, form, whole, tmp_path):
    source, out = folder_of(family, form, tmp_path / "in"), tmp_path / "out"
    prune(source, out, BOTH, whole)

    before, after = tensors_of(source), tensors_of(out)
    for key, tensor in before.items():
        if "experts" in key or "router" in key or "mlp.gate." in key:
            continue
        assert after[key].dtype == tensor.dtype and after[key].equal(tensor), key
    gone = before.keys() - after.keys()
    assert all(".experts." in key for key in gone) and bool(gone) == (form == "saved" and family in PER_EXPERT)
    for key in after:
        if "experts." in key:
            assert after[key].shape[-2:] == before[key].shape[-2:], key
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()

    config = json.loads((out / "config.json").read_text())
    (count,) = {"num_experts", "num_local_experts", "n_routed_experts"} & config["text_config"].keys()
    changed = {("text_config", count): 6, ("moesparse",): config["moesparse"]}
    assert (out / "config.json").read_text() == json_with((source / "config.json").read_text(), changed)
    assert compare_folders(out, source).problems == [] == inspect_folder(out, verify=True).problems

    model, _ = moesparse.load_pretrained(out)
    assert type(model).__name__ == config["architectures"][0]
    assert logits(model).equal(logits(pruned_by_hand(source, model, config["moesparse"]["kept_experts"])))


PER_EXPERT = ("glm4v_moe", "qwen3_5_moe")


def pruned_by_hand(source: Path, result, kept: dict[str, list[int]]):
    """The source's model in transformers' hands: experts cut, then 2:4 where the result has its zeros."""
    dense = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").eval()
    state = dense.state_dict()
    for name in list(state):
        block = next((each for each in kept if name.startswith(each.rpartition(".")[0] + ".")), None)
        if block is None:
            continue
        if state[name].shape[:1] == (8,) and (name.startswith(block) or "router" in name or ".gate." in name):
            state[name] = state[name][kept[block]]
        if name.startswith(block):
            mask = result.state_dict()[name] != 0
            # of every 4 along the input, which is last
            assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
            state[name] = state[name] * mask
    smaller = type(dense)._from_config(result.config, dtype=dense.dtype).eval()
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize(("family", "form"), [each for each in FORMS if each != ("qwen3_5_moe", "saved")])
def test_packed_is_the_same_wrapper_and_unpacked_the_same_folder(family, form, tmp_path):
    source, out = folder_of(family, form, tmp_path / "in"), tmp_path / "out"
    moesparse.prune_checkpoint(source, out, None, moesparse.Recipe(saliency="magnitude", update="none"))
    assert len(pack_folder(out, tmp_path / "packed").packed) == len(find_moe_blocks(tiny_model(family)))
    assert compare_folders(tmp_path / "packed", source).problems == []
    assert inspect_folder(tmp_path / "packed", verify=True).problems == []
    unpack_folder(tmp_path / "packed", tmp_path / "dense")
    before, after = tensors_of(out), tensors_of(tmp_path / "dense")
    assert before.keys() == after.keys() and all(after[key].equal(before[key]) for key in before)

    packed, _ = moesparse.load_pretrained(tmp_path / "packed")
    dense, _ = moesparse.load_pretrained(out)
    # bf16 products of 96 columns in another order
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0.05, atol=0.05 * float(logits(dense).abs().max()))
    ids, seen = record(packed, 0)
    seen["pixel_values"] = seen["pixel_values"].to(torch.bfloat16)
    written = packed.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=3, **seen)
    assert written.shape == (1, len(ids) + 3)


@pytest.mark.parametrize("mode", ["blockwise", "global"])
@pytest.mark.parametrize(("family", "form"), [("qwen3_5_moe", "fused"), ("qwen3_vl_moe", "turned")])
def test_distilled_experts_are_trained_and_towers_are_not(family, form, mode, tmp_path):
    source, out = folder_of(family, form, tmp_path / "in"), tmp_path / "out"
    moesparse.prune_checkpoint(source, out, None, moesparse.Recipe(saliency="magnitude", update="none"))
    settings = Settings(epochs=1, batch_size=2, learning_rate=1e-2)
    if mode == "blockwise":
        distill_checkpoint(out, source, tmp_path / "new", windows(), settings=settings)
    else:
        student, teacher = (moesparse.load_pretrained(each)[0] for each in (out, source))
        distill(student, teacher, windows(), mode, settings=settings)
        recipe = student.config.moesparse["recipe"] | {"distillation": {"train": "experts"}}
        moesparse.save_pretrained(student, tmp_path / "new", source=out, recipe=recipe)
    before, after = tensors_of(out), tensors_of(tmp_path / "new")
    assert before.keys() == after.keys()
    changed = {key for key in before if not after[key].equal(before[key])}
    assert changed and all("experts." in key for key in changed)
    assert all((after[key] == 0)[before[key] == 0].all() for key in changed)
    assert compare_folders(tmp_path / "new", source).problems == []


@pytest.mark.parametrize("form", ["saved", "fused"])
def test_a_layer_that_predicts_a_further_token_goes_with_the_text_model(form, tmp_path):
    """As Qwen3.5 has it: mtp.* beside the wrapper, its count in text_config."""
    source, out = folder_of("qwen3_5_moe", form, tmp_path / "in"), tmp_path / "out"
    file, prefix = source / "model.safetensors", "model.language_model.layers.1."
    tensors = load_file(file)
    further = {key.replace(prefix, "mtp.layers.0."): each * 1.5 for key, each in tensors.items() if prefix in key}
    norm = tensors[f"{prefix}input_layernorm.weight"]
    further |= {f"mtp.{name}.weight": norm + 0.5 for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    save_file(tensors | further | {"mtp.fc.weight": torch.randn(32, 64).bfloat16()}, file, metadata={"format": "pt"})
    config = source / "config.json"
    config.write_text(json_with(config.read_text(), {("text_config", "mtp_num_hidden_layers"): 1}))

    moesparse.prune_checkpoint(source, out, windows(), replace(BOTH, mtp="prune"))
    assert compare_folders(out, source).problems == []
    after = tensors_of(out)
    if form == "saved":
        assert sum("mtp.layers.0.mlp.experts." in key for key in after) == 3 * 6
    else:
        assert len(after["mtp.layers.0.mlp.experts.down_proj"]) == 6
    assert json.loads((out / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 1

    ids, seen = map(list, zip(*(record(tiny_model("qwen3_5_moe"), seed) for seed in range(4)), strict=True))
    ids = torch.stack(ids)
    images = ImageWindows(ids, torch.ones_like(ids).bool(), seen, [""] * 4, torch.zeros_like(ids).bool(), 4)
    with pytest.raises(UnsupportedModelError, match=r"run on text alone, got images: leave it out with mtp='drop'"):
        moesparse.prune_checkpoint(source, tmp_path / "seen", images, replace(BOTH, mtp="prune"))
    moesparse.prune_checkpoint(source, tmp_path / "left", images, replace(BOTH, mtp="drop"))
    assert not any(key.startswith("mtp.") for key in tensors_of(tmp_path / "left"))
    assert compare_folders(tmp_path / "left", source).problems == []


def test_a_text_model_taken_out_of_a_wrapper_is_saved_into_its_folder(tmp_path):
    """transformers gives the text model alone to who asks for a causal one; its settings lie in text_config."""
    source, out = folder_of("qwen3_5_moe", "saved", tmp_path / "in"), tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    assert not towers(model)
    report = moesparse.prune(model, windows(), BOTH)
    moesparse.save_pretrained(model, out, source=source, recipe=report.recipe)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["num_experts"] == 6 and "num_experts" not in config
    assert all(name.startswith("model.language_model.layers.") for name in config["moesparse"]["kept_experts"])
    assert compare_folders(out, source).problems == []
    # transformers took the text model in float32, for its tower is in part
    wrapper, _ = moesparse.load_pretrained(out, dtype=model.dtype)
    with torch.no_grad():
        assert wrapper(input_ids=windows()).logits.equal(model(input_ids=windows()).logits)


def test_the_folder_decides_which_class_opens_it():
    config = tiny_model("qwen3_5_moe").config
    for named, want in (
        (["Qwen3_5MoeForConditionalGeneration"], AutoModelForImageTextToText),
        (["Qwen3_5MoeForCausalLM"], AutoModelForCausalLM),
        # nothing that is known: the wrapper, so that nothing is lost
        (["SomethingElse"], AutoModelForImageTextToText),
        (None, AutoModelForImageTextToText),
    ):
        config.architectures = named
        assert opener(config) is want
    assert opener(config.text_config) is AutoModelForCausalLM
    with pytest.raises(
        UnsupportedModelError, match=r"language model of transformers, or one for .* 'clip', which is n"
    ):
        opener(AutoConfig.for_model("clip"))


def test_llama4_is_refused_by_name(tmp_path):
    """Its experts weigh their input, not their output."""
    text = {"hidden_size": 32, "intermediate_size": 96, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 8}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("llama4", text_config=text | {"vocab_size": 64}, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"llama4: .* gate scales the input of its experts"):
        LayersOnDisk(tmp_path)


def test_text_alone_is_warned_of_where_there_is_a_tower():
    model = tiny_model("gemma4")
    with pytest.warns(UserWarning, match="calibrated on text alone and has a vision tower: experts that only see"):
        text_of(windows(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_of(windows(), tiny_model("mixtral"))


def test_images_are_refused_by_a_model_without_eyes():
    ids = windows()
    seen = ImageWindows(ids, torch.ones_like(ids).bool(), [{}] * 4, [""] * 4, torch.zeros_like(ids).bool(), 0)
    with pytest.raises(UsageError, match="text alone for MixtralForCausalLM, which takes no images"):
        text_of(seen, tiny_model("mixtral"))
