"""Folders appear whole or not at all, and what is read is what was written."""

import hashlib
import json
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Started
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moesparse.checkpoints.pretrained import CONFIG_KEY, load_pretrained, save_pretrained
from moesparse.errors import CheckpointError
from moesparse.system import folders
from moesparse.system.folders import atomic_folder, check_output_folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def folder(model, tmp_path):
    path = tmp_path / "model"
    save_pretrained(model, path, max_shard_size="20KB")
    return path


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_plain_transformers_loads_the_same_bits(model, tmp_path):
    with torch.no_grad():
        zeroed = model.model.layers[0].mlp.experts.gate_up_proj
        zeroed[:, :, ::2] = 0
    save_pretrained(model, tmp_path / "out", recipe={"weights": "2:4"}, card="# card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert (again.model.layers[0].mlp.experts.gate_up_proj[:, :, ::2] == 0).all()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config[CONFIG_KEY]["recipe"] == {"weights": "2:4"}
    assert (tmp_path / "out/README.md").read_text() == "# card"


def test_shards_use_the_standard_names(folder):
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) > 2
    assert any(name.endswith("experts.3.w2.weight") for name in names)
    assert not [file for file in folder.parent.iterdir() if file.name.endswith(".partial")]


def test_small_files_of_the_source_travel(model, folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("theirs")
    (folder / "pytorch_model.bin").write_text("weights of another format stay behind")
    save_pretrained(model, tmp_path / "out", source=folder)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out/LICENSE").read_text() == "theirs"
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    # a stale index would point at shards that are not there, a stale manifest at other bytes
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    manifest = json.loads((tmp_path / "out/moesparse_manifest.json").read_text())
    assert list(manifest["shards"]) == ["model.safetensors"]
    digest = hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest()
    assert manifest["shards"]["model.safetensors"]["sha256"] == digest


def test_a_link_out_of_the_source_is_not_copied(model, folder, tmp_path):
    (tmp_path / "key").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "key")
    with pytest.raises(CheckpointError, match="LICENSE must not lead out of its folder"):
        save_pretrained(model, tmp_path / "out", source=folder)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="OUT must be a new or empty folder, got a folder that holds files"):
        save_pretrained(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(CheckpointError, match="got a file"):
        check_output_folder(tmp_path / "notes.txt")


def test_an_error_inside_leaves_nothing(tmp_path):
    def fail_halfway():
        with atomic_folder(tmp_path / "out") as work:
            (work / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def small_mixtral():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


def write_on_a_full_disk(out):
    # a limit on the size of a file is refused by the kernel in the middle of writing, as a full disk is
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = small_mixtral()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_pretrained(model, out)
    except Exception as error:
        print(type(error).__name__, error)


def test_a_full_disk_leaves_the_old_state(tmp_path):
    out, _ = Started(write_on_a_full_disk, tmp_path / "out").communicate()
    assert "CheckpointError cannot write" in out
    assert "Nothing was left there" in out
    assert list(tmp_path.iterdir()) == []


def write_slowly(out):
    def slowly(_path):
        print("writing", flush=True)
        time.sleep(60)

    folders.flush = slowly
    save_pretrained(small_mixtral(), out)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_in_the_middle_leaves_no_half_folder(tmp_path, stop):
    process = Started(write_slowly, tmp_path / "out")
    while process.said()[0] != "writing\n":
        assert process.poll() is None, process.said()
        time.sleep(0.02)
    process.send_signal(stop)
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    leftovers = list(tmp_path.iterdir())
    # nothing can clean up after SIGKILL; what stays is hidden, and named as a part
    assert all(path.name.startswith(".out.") and path.name.endswith(".partial") for path in leftovers)
    assert len(leftovers) == (stop == signal.SIGKILL)
    # the next one that writes the folder does, but leaves the work of others alone
    with atomic_folder(tmp_path / "out") as work, atomic_folder(tmp_path / "out"):
        assert work.is_dir()
        assert not set(leftovers) & set(tmp_path.iterdir())
    assert (tmp_path / "out").is_dir()


def test_unknown_path(tmp_path):
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="MODEL must be a local folder or a hub id"):
        load_pretrained(str(tmp_path / "nowhere"))
    assert time.monotonic() - started < 60
    with pytest.raises(CheckpointError, match=r"folder with a config.json"):
        load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="got the file"):
        load_pretrained(Path(__file__))


def test_a_missing_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_pretrained(folder)


def test_a_truncated_shard_is_an_error(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated: its header describes"):
        load_pretrained(folder)


def test_a_missing_tensor_is_named(model, tmp_path):
    from safetensors.torch import load_file, save_file

    save_pretrained(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        load_pretrained(tmp_path / "out")


def test_bad_json_is_named(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index.json must be valid JSON"):
        load_pretrained(folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"must hold a weight_map"):
        load_pretrained(folder)
    (folder / "config.json").write_text("not json")
    with pytest.raises(CheckpointError, match="must be valid JSON"):
        load_pretrained(folder)
