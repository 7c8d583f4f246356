"""Packing folders tensor by tensor: the bits, the names, what stays dense, memory, and kill -9 at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from processes import Started
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import moesparse
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.cli import app
from moesparse.errors import CheckpointError, MoESparseError, UnsupportedModelError
from moesparse.models.blocks import find_moe_blocks
from moesparse.packed.model import packed_blocks
from moesparse.testing import has_family, prune_by_magnitude, tiny_model


def pruned(family: str = "mixtral", pattern: str = "2:4") -> nn.Module:
    if not has_family(family):
        pytest.skip(f"this transformers release has no {family} behind ExpertsInterface")
    model = prune_by_magnitude(tiny_model(family), pattern)
    for parameter in model.parameters():
        # not model.bfloat16(), which rounds the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    return tensors


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[key].dtype
        and x.shape == b[key].shape
        and torch.equal(x.view(torch.uint8), b[key].view(torch.uint8))
        for key, x in a.items()
    )


# merged with and without a renamed block; first layers dense and shared experts; stored fused, transposed, with biases
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_a_folder_is_packed_as_the_model_is_and_unpacked_to_the_same_bits(family: str, tmp_path: Path):
    model = pruned(family)
    save_pretrained(model, tmp_path / "dense", recipe={"weights": "2:4"}, max_shard_size="100KB", card="# mine")
    save_pretrained(model, tmp_path / "memory", recipe={"weights": "2:4"}, packed=True)
    report = pack_folder(tmp_path / "dense", tmp_path / "packed", max_shard_bytes=50_000)
    assert report.packed and not report.dense and report.shards > 2
    assert same_bits(stored(tmp_path / "packed"), stored(tmp_path / "memory"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "memory")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0].keys() == configs[1].keys()

    back = unpack_folder(tmp_path / "packed", tmp_path / "back", max_shard_bytes=10**9)
    assert (back.packed, back.shards) == (report.packed, 1)
    assert (back.bytes_before, back.bytes_after) == (report.bytes_after, report.bytes_before)
    assert same_bits(stored(tmp_path / "back"), stored(tmp_path / "dense"))
    assert (tmp_path / "back/README.md").read_text() == "# mine"
    for name in ("packed", "back"):
        assert inspect_folder(tmp_path / name, verify=True).problems == []
    # the values and one bit for each weight, to the byte
    assert report.bytes_after == report.bytes_before * 9 // 16
    loaded, _ = load_pretrained(tmp_path / "packed")
    assert [name for name, _ in packed_blocks(loaded)] == list(report.packed)


def test_experts_fused_into_one_tensor_keep_that_layout(tmp_path: Path):
    model = pruned("mixtral")
    save_pretrained(model, tmp_path / "dense")
    (tmp_path / "dense/model.safetensors").unlink()
    names = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(names, tmp_path / "dense/model.safetensors", metadata={"format": "pt"})
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    tensors = stored(tmp_path / "packed")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert tensors[name].shape == (8, 192, 16) and tensors[f"{name}_meta"].shape == (8, 192, 4)
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert same_bits(stored(tmp_path / "back"), stored(tmp_path / "dense"))
    loaded, _ = load_pretrained(tmp_path / "packed")
    moesparse.unpack(loaded)
    assert same_bits(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("family", "message"),
    [("granitemoe", "a name that cannot be given to a packed matrix"), ("dbrx", "stacked in 2-D tensors")],
)
def test_a_family_that_cannot_be_stored_packed_is_refused_by_name(family: str, message: str, tmp_path: Path):
    model = pruned(family) if family == "granitemoe" else tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match=message):
        pack_folder(tmp_path / "dense", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_blocks_without_a_pattern_stay_dense_and_matrices_keep_their_own(tmp_path: Path):
    model = pruned("qwen3_moe")
    blocks = find_moe_blocks(model)
    with torch.no_grad():
        blocks[0].matrices[1].weight[5, 3] = 1  # one row of one expert
        blocks[1].matrices[1].weight.unflatten(-1, (-1, 8))[..., 4:] = 0
    save_pretrained(model, tmp_path / "dense")
    report = pack_folder(tmp_path / "dense", tmp_path / "packed")
    assert report.dense == {"model.layers.0.mlp.experts": "down_proj holds no n:m pattern"}
    assert report.packed == {"model.layers.1.mlp.experts": {"gate_up_proj": "2:4", "down_proj": "2:8"}}
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert same_bits(stored(tmp_path / "back"), stored(tmp_path / "dense"))
    dense = sum(tensor.nbytes for key, tensor in stored(tmp_path / "dense").items() if "experts" in key)
    half = dense // 2
    assert report.bytes_before == dense
    assert report.bytes_after == half + half * 2 // 3 * 9 // 16 + half // 3 * 5 // 16
    facts = inspect_folder(tmp_path / "packed", verify=True)
    assert [[t.packed for t in block.tensors] for block in facts.blocks] == [[False, False], [True, True]]
    assert (facts.expert_bytes, facts.dense_expert_bytes) == (report.bytes_after, report.bytes_before)


def test_a_dense_model_is_an_error_and_leaves_nothing(tmp_path: Path):
    save_pretrained(tiny_model("mixtral"), tmp_path / "dense")
    with pytest.raises(MoESparseError, match=r"layers.0.mlp.experts: gate_up_proj holds no n:m pattern; .*; prune it"):
        pack_folder(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"IN must be a packed checkpoint, got .*dense, which is dense already"):
        unpack_folder(tmp_path / "dense", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_is_packed_cannot_be_packed_again(tmp_path: Path):
    save_pretrained(pruned(), tmp_path / "packed", packed=True)
    with pytest.raises(CheckpointError, match=r"IN must be a dense checkpoint, got .*packed, which is packed already"):
        pack_folder(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(CheckpointError, match="OUT must be a new or empty folder"):
        unpack_folder(tmp_path / "packed", tmp_path / "packed")


def test_negative_zeros_are_counted_and_nan_kept(tmp_path: Path):
    model = pruned()
    weight = find_moe_blocks(model)[0].matrices[0].weight
    with torch.no_grad():
        weight[weight == 0] = -0.0
        weight[0, 0, 0:4] = torch.tensor([0.0, -0.0, 1.0, 0.0])  # room for one -0.0
        weight[0, 0, 4:8] = torch.tensor([0.0, float("nan"), 0.0, float("inf")])
    negative = int((weight.signbit() & (weight == 0)).sum())
    save_pretrained(model, tmp_path / "dense")
    assert pack_folder(tmp_path / "dense", tmp_path / "packed").negative_zeros == negative - 1
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    before, after = stored(tmp_path / "dense"), stored(tmp_path / "back")
    for key, value in before.items():
        bits = value.view(torch.int16)
        different = bits != after[key].view(torch.int16)
        assert (bits[different] == -(2**15)).all()
        assert (after[key].view(torch.int16)[different] == 0).all()
    assert sum(int((before[k].view(torch.int16) != after[k].view(torch.int16)).sum()) for k in before) == negative - 1


def test_what_lies_beside_the_weights_travels(tmp_path: Path):
    save_pretrained(
        pruned(),
        tmp_path / "dense",
        card="Plain transformers loads the folder: its weights are stored dense with zeros.",
    )
    (tmp_path / "dense/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "dense/additional_chat_templates").mkdir()
    (tmp_path / "dense/additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    (tmp_path / "dense/pytorch_model.bin").write_text("another format stays behind")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "packed/pytorch_model.bin").exists()
    for name in (
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "generation_config.json",
        "config.json",
    ):
        first = (tmp_path / "dense" / name).read_text()
        assert (
            json.loads(first) == json.loads((tmp_path / "back" / name).read_text())
            if name.endswith("json")
            else (first == (tmp_path / "back" / name).read_text())
        )
    assert "its experts are stored packed" in (tmp_path / "packed/README.md").read_text()
    assert (tmp_path / "back/README.md").read_text() == (tmp_path / "dense/README.md").read_text()


def test_a_hub_id_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # the cache as huggingface_hub lays it out: the snapshot's files are links to blobs
    save_pretrained(pruned(), tmp_path / "dense", max_shard_size="100KB")
    repository = tmp_path / "cache/models--someone--small-moe"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    for number, file in enumerate((tmp_path / "dense").iterdir()):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["pack", "someone/small-moe", str(tmp_path / "packed"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["packed"].keys() == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    assert inspect_folder(tmp_path / "packed", verify=True).problems == []


def pack_when_told(source: Path, out: Path) -> None:
    print("ready", flush=True)
    while not out.with_name("go").exists():
        time.sleep(0.001)
    pack_folder(source, out, max_shard_bytes=2_000_000)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of 25 MB: packing it takes long enough to be killed in the middle."""
    folder = tmp_path_factory.mktemp("large") / "dense"
    model = prune_by_magnitude(tiny_model("mixtral", hidden_size=256, intermediate_size=512)).bfloat16()
    save_pretrained(model, folder, max_shard_size="5MB")
    return folder


def wait_for(condition, process: Started) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.parametrize(
    "moment",
    [
        "third shard",
        "random",
        *(pytest.param(moment, marks=pytest.mark.long) for moment in ("first shard", "index", "random again")),
    ],
)
def test_kill_9_in_the_middle_leaves_no_folder_and_a_rerun_finishes(moment: str, large: Path, tmp_path: Path):
    process = Started(pack_when_told, large, tmp_path / "out")
    wait_for(lambda: process.said()[0], process)
    (tmp_path / "go").touch()
    if moment.startswith("random"):
        time.sleep(random.Random(moment).uniform(0.0, 1.0))
    else:
        pattern = {"first shard": "model-00001*", "third shard": "model-00003*"}.get(moment)
        wait_for(lambda: any(tmp_path.glob(f".out.*.partial/{pattern or '*.index.json'}")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (tmp_path / "go").unlink()
    if moment.endswith("shard"):
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    if (tmp_path / "out").exists():
        # the rename was faster than the kill: then it must be whole
        assert inspect_folder(tmp_path / "out", verify=True).problems == []
        return
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    report = pack_folder(large, tmp_path / "out")
    assert report.packed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert inspect_folder(tmp_path / "out", verify=True).problems == []


def test_an_error_in_the_middle_leaves_an_empty_folder_as_it_was(large: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "out").mkdir()
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moesparse.checkpoints.repack.write_manifest", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device. Nothing was left there"):
        pack_folder(large, tmp_path / "out")
    assert calls
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not list((tmp_path / "out").iterdir())


def test_memory_is_one_matrix(tmp_path: Path):
    code = """
        import sys, torch
        from moesparse.system.memory import peak_memory, reset_peak_memory
        from moesparse.checkpoints.pretrained import save_pretrained
        from moesparse.checkpoints.repack import pack_folder, unpack_folder
        from moesparse.checkpoints.inspection import inspect_folder
        from moesparse.testing import prune_by_magnitude, tiny_model
        folder = sys.argv[1]
        small = prune_by_magnitude(tiny_model("mixtral")).bfloat16()
        save_pretrained(small, folder + "/small")
        pack_folder(folder + "/small", folder + "/small-packed")  # what is imported on the way is not counted below
        unpack_folder(folder + "/small-packed", folder + "/small-back")
        size = 1024
        torch.set_default_dtype(torch.bfloat16)
        model = tiny_model("mixtral", hidden_size=size, intermediate_size=size, num_hidden_layers=3)
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.data.unflatten(-1, (-1, 2, 2))[..., 1] = 0
        save_pretrained(model, folder + "/dense")
        del model, parameter

        def measure(step, *arguments, **options):
            reset_peak_memory()
            before = peak_memory()
            step(*arguments, **options)
            print((peak_memory() - before) / (size * size * 2))

        measure(pack_folder, folder + "/dense", folder + "/packed")
        measure(inspect_folder, folder + "/packed", verify=True)
        measure(unpack_folder, folder + "/packed", folder + "/back")
        measure(inspect_folder, folder + "/dense", verify=True)
    """
    # the C library may keep freed blocks of up to 32 MB
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peaks = [float(word) for word in out.split()]
    assert len(peaks) == 4
    # the model is 72 matrices of 2 MB; one is held with what counting and packing it takes
    assert all(peak < 12 for peak in peaks), peaks


def test_the_commands(tmp_path: Path):
    model = pruned()
    with torch.no_grad():
        find_moe_blocks(model)[0].matrices[0].weight.add_(1)
    save_pretrained(model, tmp_path / "dense")
    run = CliRunner().invoke
    packed, back = str(tmp_path / "packed"), str(tmp_path / "back")
    result = run(app, ["pack", str(tmp_path / "dense"), packed, "--shard-size", "0.0001"])
    assert result.exit_code == 0, result.output
    assert "stays dense: model.layers.0.mlp.experts: gate_up_proj holds no n:m pattern" in result.stderr
    assert "1 blocks packed" in result.stderr
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    result = run(app, ["unpack", packed, back, "--json"])
    assert json.loads(result.stdout)["packed"] == {
        "model.layers.1.mlp.experts": {"gate_up_proj": "2:4", "down_proj": "2:4"}
    }
    assert run(app, ["inspect", packed, "--verify"]).exit_code == 0
    with pytest.raises(CheckpointError, match="MODEL must be a local folder or a hub id"):
        run(app, ["pack", str(tmp_path / "nowhere"), str(tmp_path / "x")], catch_exceptions=False)
