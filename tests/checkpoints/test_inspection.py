"""What inspect finds; and hostile or damaged folders are refused by name: no other exception, hang or allocation."""

import copy
import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moesparse import demo
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.checkpoints.repack import pack_folder
from moesparse.cli import app
from moesparse.errors import CheckpointError, MoESparseError, UnsupportedModelError
from moesparse.system.manifest import write_manifest
from moesparse.testing import prune_by_magnitude, tiny_model

META = "model.layers.1.block_sparse_moe.experts.5.w2.weight_meta"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense/ and packed/ of one model, in several shards."""
    folder = tmp_path_factory.mktemp("made")
    model = prune_by_magnitude(tiny_model("mixtral"))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    save_pretrained(model, folder / "dense", recipe={"weights": "2:4"}, max_shard_size="100KB")
    pack_folder(folder / "dense", folder / "packed", max_shard_bytes=100_000)
    return folder


@pytest.fixture
def packed(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "packed", tmp_path / "packed"))


@pytest.fixture
def dense(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "dense", tmp_path / "dense"))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_tensors(folder: Path, name: str, edit) -> None:
    """Change the shard that holds a tensor; `edit` takes its dictionary. The manifest is made to fit."""
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    write_manifest(folder, sorted(folder.glob("*.safetensors")))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def problems(folder: Path) -> list[str]:
    return inspect_folder(folder, verify=True).problems


def test_what_is_whole_has_no_problems_and_the_facts_are_right(made: Path):
    facts = {name: inspect_folder(made / name, verify=True) for name in ("dense", "packed")}
    for name, found in facts.items():
        assert found.problems == []
        assert found.format == name
        assert found.recipe == {"weights": "2:4"}
        assert [block.name for block in found.blocks] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        for block in found.blocks:
            assert [(t.name, t.shape, t.pattern, t.sparsity) for t in block.tensors] == [
                ("gate_up_proj", (8, 192, 32), "2:4", 0.5),
                ("down_proj", (8, 32, 96), "2:4", 0.5),
            ]
    parameters = 2 * 8 * 3 * 32 * 96
    assert facts["dense"].expert_parameters == facts["packed"].expert_parameters == parameters
    assert facts["dense"].other_parameters == facts["packed"].other_parameters
    assert facts["dense"].expert_bytes == facts["packed"].dense_expert_bytes == 2 * parameters
    assert facts["packed"].expert_bytes == parameters + parameters // 8
    assert facts["dense"].other_bytes == facts["packed"].other_bytes == 2 * facts["dense"].other_parameters
    assert facts["packed"].verified == {
        "tensors": len(load_all(made / "packed")),
        "shards hashed": len(list((made / "packed").glob("*.safetensors"))),
        "index bytes": parameters // 8,
    }


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_every_flipped_byte_of_a_shard_is_caught(form: str, made: Path, tmp_path: Path):
    folder = Path(shutil.copytree(made / form, tmp_path / form))
    generator = torch.Generator().manual_seed(0)
    for shard in sorted(folder.glob("*.safetensors")):
        whole = shard.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for at in torch.randint(header, len(whole), (2,), generator=generator).tolist():
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(torch.randint(8, (), generator=generator))
            shard.write_bytes(damaged)
            assert any(f"{shard.name} was changed after it was written" in problem for problem in problems(folder))
        shard.write_bytes(whole)
    assert problems(folder) == []


def test_the_command_ends_with_1_and_names_what_is_off(packed: Path):
    run = CliRunner().invoke(app, ["inspect", str(packed), "--verify", "--json"])
    assert run.exit_code == 0
    assert json.loads(run.stdout)["problems"] == []
    shard = shard_of(packed, META)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    # without --verify the bytes are not looked at
    assert CliRunner().invoke(app, ["inspect", str(packed)]).exit_code == 0
    run = CliRunner().invoke(app, ["inspect", str(packed), "--verify"])
    assert run.exit_code == 1
    assert f"error: {shard.name} was changed after it was written" in run.stderr
    assert "looked at, and not all of it holds: tensors" in run.stdout
    assert "verified" not in run.stdout
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"must hold {shard.name}, which .* names, got a folder without it"):
        CliRunner().invoke(app, ["inspect", str(packed)], catch_exceptions=False)


def test_index_bits_are_counted_even_when_the_hash_fits(packed: Path):
    def flip(tensors):
        tensors[META][3, 2] ^= 1
        tensors[META][4, 0] ^= 0x11

    edit_tensors(packed, META, flip)
    (problem,) = problems(packed)
    assert problem.startswith(f"{META} must keep exactly 2 of every 4 columns, got ")
    assert problem.endswith("in row 3, group 4 (3 such groups)")
    with pytest.raises(CheckpointError, match=r"damaged model.layers.1.mlp.experts.down_proj: index must"):
        load_pretrained(packed)


def test_a_manifest_that_does_not_fit_is_a_problem_and_none_is_said(packed: Path):
    (packed / "moesparse_manifest.json").write_text('{"manifest_version": 1, "shards": {"other.safetensors": {}}}')
    found = problems(packed)
    assert found[0] == "moesparse_manifest.json lists 'other.safetensors', which is no shard"
    assert len(found) == 1 + len(list(packed.glob("*.safetensors")))
    assert all(problem.endswith("is not in moesparse_manifest.json") for problem in found[1:])
    (packed / "moesparse_manifest.json").unlink()
    facts = inspect_folder(packed, verify=True)
    assert facts.problems == []
    assert facts.verified is not None
    assert facts.verified["shards hashed"] == "none, there is no moesparse_manifest.json"


def test_zeros_that_do_not_hold_the_recipe_s_pattern_are_named(dense: Path):
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    edit_tensors(dense, name, lambda tensors: tensors[name][0, :4].fill_(1))
    # with and without --verify
    for verify in (False, True):
        found = inspect_folder(dense, verify=verify)
        assert found.problems == [f"model.layers.1.mlp.experts.down_proj does not hold 2:4 as config.json says: {name}"]
        assert found.blocks[1].tensors[1].pattern == "18:32"


def test_each_matrix_of_a_mixed_recipe_is_held_to_its_own_pattern(dense: Path):
    first, second = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    patterns = {
        first: {"gate_up_proj": "2:4", "down_proj": "1:4"},
        second: {"gate_up_proj": "dense", "down_proj": "4:8"},
    }
    edit_json(dense / "config.json", moesparse={"recipe": {"weights": None, "patterns": patterns}})
    (problem,) = inspect_folder(dense).problems
    assert problem.startswith(f"{first}.down_proj does not hold 1:4 as config.json says: ")


def rename(old: str, new: str):
    def edit(tensors):
        tensors[new] = tensors.pop(old)

    return edit


def cut(name: str):
    def edit(tensors):
        tensors[name] = tensors[name][:-1].clone()

    return edit


def cast(name: str, dtype: torch.dtype):
    def edit(tensors):
        tensors[name] = tensors[name].to(dtype)

    return edit


VALUES = META.removesuffix("_meta")


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (META, cut(META), r"down_proj_meta cannot be made from .*experts.0.w2.weight_meta"),
        (VALUES, cut(VALUES), r"down_proj cannot be made from .*experts.0.w2.weight and its like"),
        (META, cast(META, torch.int32), r"experts.5.w2.weight_meta must be uint8 to be packed, got I32"),
        (
            VALUES,
            cast(VALUES, torch.float64),
            r"must be bfloat16 or float16 or float32 to be packed, got F64",
        ),
        (META, rename(META, META.replace(".5.", ".9.")), r"experts 0 to 7, got .*experts.6.* in the place of expert 5"),
        (META, rename(META, "other"), r"must hold model.layers.1.mlp.experts.down_proj|experts 0 to 6|does not fit"),
    ],
)
def test_a_packed_folder_whose_tensors_do_not_make_the_model_is_refused_before_loading(
    name, edit, message, packed: Path, monkeypatch: pytest.MonkeyPatch
):
    edit_tensors(packed, name, edit)
    index = packed / "model.safetensors.index.json"
    edit_json(index, weight_map={n: f.name for f in packed.glob("*.safetensors") for n in load_file(f)})
    # nothing is to be read
    monkeypatch.setattr("transformers.core_model_loading._materialize_copy", None)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(MoESparseError):
        raise MoESparseError(problems(packed)[0])


def test_a_missing_expert_is_not_filled_with_random_numbers(packed: Path):
    for name in [n for n in load_all(packed) if "layers.1" in n and ".w2.weight" in n]:
        edit_tensors(packed, name, lambda tensors, name=name: tensors.pop(name))
    index = packed / "model.safetensors.index.json"
    edit_json(index, weight_map={n: f.name for f in packed.glob("*.safetensors") for n in load_file(f)})
    message = r"must hold model.layers.1.mlp.experts.down_proj, which quantization_config calls packed"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(CheckpointError, match=r"must hold model.layers.1.mlp.experts.down_proj, got none"):
        problems(packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "must not ask for more layers than there are tensors, got num_hidden_layers"),
        ({"hidden_size": 10**9, "head_dim": 8}, "does not fit its config.json"),
        ({"num_local_experts": 10**9}, "does not fit its config.json"),
        ({"vocab_size": 10**9}, "does not fit its config.json"),
        ({"num_attention_heads": 0}, "does not fit its config.json"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq|GPTQ|optimum|bits of quantization_config"),
        ({"model_type": "no_such_model"}, "no_such_model"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict, message: str, packed: Path):
    edit_json(packed / "config.json", **changes)
    with pytest.raises(MoESparseError, match=message):
        load_pretrained(packed)
    with pytest.raises(MoESparseError, match=message.replace("does not fit its config.json", "must be")):
        raise MoESparseError(problems(packed)[0])


def test_models_quantised_by_others_are_refused_by_name(dense: Path):
    edit_json(dense / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UnsupportedModelError, match=r"quant_method of .* must be 'fp8' or .*, got 'bitsandbytes'"):
        inspect_folder(dense)
    edit_json(dense / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="must hold tensors of awq, as its quantization_config says"):
        inspect_folder(dense)


def test_code_of_a_folder_is_not_run(dense: Path):
    (dense / "modeling_evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    edit_json(dense / "config.json", auto_map=auto_map)
    load_pretrained(dense)  # transformers knows the model itself
    assert problems(dense) == []
    edit_json(dense / "config.json", model_type="evil")
    for call in (load_pretrained, inspect_folder):
        with pytest.raises(UnsupportedModelError, match=r"a model_type that transformers .* has, got 'evil'"):
            call(dense)


def test_a_packed_folder_of_the_embedded_model_takes_at_most_57_percent(tmp_path: Path):
    model, tokenizer = demo.load()
    save_pretrained(prune_by_magnitude(model), tmp_path / "dense", tokenizer=tokenizer)
    report = pack_folder(tmp_path / "dense", tmp_path / "packed")
    dense, packed = (load_all(tmp_path / name) for name in ("dense", "packed"))
    experts = [sum(t.nbytes for name, t in tensors.items() if ".experts." in name) for tensors in (dense, packed)]
    assert (report.bytes_before, report.bytes_after) == tuple(experts)
    assert experts[1] <= 0.57 * experts[0]
    # and the file itself, header included: within 1% of n/m of the values and one bit per weight
    rest = sum(t.nbytes for name, t in dense.items() if ".experts." not in name)
    size = (tmp_path / "packed/model.safetensors").stat().st_size
    assert size - rest == pytest.approx(experts[0] * (0.5 + 1 / 32), rel=0.01)


HOSTILE = (
    0,
    -1,
    2**31,
    2**63,
    10**12,
    10**30,
    1e308,
    None,
    True,
    "",
    "x" * 1000,
    "../../x",
    "/etc/passwd",
    [],
    {},
    [[]],
)


class Hang(BaseException):
    """An example took too long; not an Exception, so that nothing takes it for an error of the folder."""


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    sizes = {"num_hidden_layers": 1, "num_local_experts": 2, "intermediate_size": 32}
    model = prune_by_magnitude(tiny_model("mixtral", **sizes)).bfloat16()
    save_pretrained(model, folder / "dense", recipe={"weights": "2:4"})
    pack_folder(folder / "dense", folder / "packed", max_shard_bytes=10_000)
    load_pretrained(folder / "packed")
    return folder / "packed"


def outcome(call: Callable[[], Any]) -> str:
    """What a call says when it refuses; any other exception gets through."""
    try:
        call()
    except MoESparseError as error:
        return str(error)
    return "done"


def draw_file(folder: Path, data: st.DataObject) -> tuple[Path, bytes, bytes]:
    """One of the files, its JSON, and what comes behind it."""
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    names = ["config.json", "config.json", "model.safetensors.index.json", "moesparse_manifest.json", *shards]
    file = folder / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return file, content, b""
    length = int.from_bytes(content[:8], "little")
    return file, content[8 : 8 + length], content[8 + length :]


def put_back(file: Path, text: bytes, rest: bytes) -> None:
    length = len(text).to_bytes(8, "little") if file.suffix == ".safetensors" else b""
    file.write_bytes(length + text + rest)


def change_a_value(folder: Path, data: st.DataObject) -> None:
    file, text, rest = draw_file(folder, data)
    value = json.loads(text)
    *path, last = data.draw(st.sampled_from(leaves(value)))
    parent = value
    for key in path:
        parent = parent[key]
    if data.draw(st.integers(0, 4)):
        parent[last] = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
    else:
        del parent[last]
    put_back(file, json.dumps(value).encode(), rest)


def change_bytes(folder: Path, data: st.DataObject) -> None:
    file, text, rest = draw_file(folder, data)
    at = data.draw(st.integers(0, len(text) - 1))
    put_back(file, text[:at] + data.draw(st.binary(max_size=4)) + text[at + data.draw(st.integers(0, 4)) :], rest)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_damaged_folder_is_refused_or_loads(data, small: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = Path(shutil.copytree(small, tmp_path_factory.mktemp("fuzz") / "packed"))
    values = data.draw(st.integers(0, 2))
    for _ in range(values):
        change_a_value(folder, data)
    if not values or not data.draw(st.integers(0, 3)):
        change_bytes(folder, data)

    def stop(*_):
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGALRM, stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
        for call in (lambda: inspect_folder(folder, verify=True), lambda: load_pretrained(folder)):
            signal.alarm(60)
            assert "memory" not in outcome(call)
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
