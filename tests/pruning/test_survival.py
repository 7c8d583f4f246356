"""Streamed pruning and what happens to machines: killed at each named step, full and read-only disks, lost files."""

import errno
import json
import os
import shutil

import pytest
import torch
from faults import SmallDisk, Watch, assert_same, at, fail, kill, killed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moesparse import Recipe
from moesparse.errors import CalibrationError, CheckpointError
from moesparse.pruning.run import prune_checkpoint
from moesparse.system.folders import JOURNAL_FILE
from moesparse.testing import tiny_model

RECIPE = Recipe(weights="2:4", saliency="gated-sparsegpt", update="least-squares+rescale")
WINDOWS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, "w0")))
CALLS = ("choose_masks", "write_companions")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "source"
    tiny_model("mixtral", num_hidden_layers=3).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    run(source, out)
    return out


def run(source, out, resume=False, **options):
    return prune_checkpoint(
        source, out, options.pop("windows", WINDOWS), RECIPE, batch_size=4, resume=resume, **options
    )


def parts(out):
    """Finished, as the journal lists them; None without one."""
    file = out / JOURNAL_FILE
    return len(json.loads(file.read_text())["parts"]) if file.exists() else None


@pytest.mark.parametrize(
    ("place", "count", "done"),
    [
        pytest.param("progress check", 2, 0, id="probe"),
        pytest.param("progress calibrate .*layers.1", 1, 1, id="calibrate"),
        pytest.param("call choose_masks", 4, 1, id="prune a matrix"),
        pytest.param("progress rescale .*layers.1", 1, 1, id="rescale"),
        pytest.param("progress propagate .*layers.1", 1, 1, id="propagate"),
        pytest.param("write layer-00001.partial", 9, 1, id="write a part"),
        pytest.param("flush layer-00001.partial", 1, 1, id="flush a part"),
        pytest.param("rename out/layer-00001", 1, 1, id="before a part has its name"),
        pytest.param("renamed out/layer-00001", 1, 1, id="a part that is not in the journal"),
        pytest.param(f"write out/{JOURNAL_FILE}", 3, 1, id="write the journal"),
        pytest.param(f"renamed out/{JOURNAL_FILE}", 3, 2, id="the journal is renewed"),
        pytest.param("write outside.partial", 2, 3, id="write what lies outside of the layers"),
        pytest.param("renamed out/model-00002-of-00004", 1, 4, id="half of the shards have their names"),
        pytest.param("write out/model.safetensors.index", 1, 4, id="write the index"),
        pytest.param("call write_companions", 1, 4, id="companions"),
        pytest.param("rename out/config.json", 1, 4, id="before it is a checkpoint"),
        pytest.param("renamed out/config.json", 1, 4, id="a checkpoint with a journal"),
        pytest.param(f"remove out/{JOURNAL_FILE}", 1, 4, id="the journal goes"),
    ],
)
def test_killed_at_a_named_step_it_goes_on_to_the_same_bits(source, pruned, tmp_path, place, count, done):
    out = tmp_path / "out"
    killed(lambda progress: run(source, out, progress=progress), at(place, kill, count), CALLS)
    assert parts(out) == done
    if done:
        with pytest.raises(CheckpointError, match=f"holds an unfinished run, {done} parts done: .* resume=True"):
            run(source, out)
    run(source, out, resume=True)
    assert_same(out, pruned)
    assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("place", "count", "done"),
    [
        pytest.param(f"write out/{JOURNAL_FILE}", 1, None, id="first journal"),
        pytest.param("write layer-00000.partial", 5, None, id="first part"),
        pytest.param("write layer-00001.partial", 5, 1, id="part"),
        pytest.param("flush layer-00001.partial", 1, 1, id="flush"),
        pytest.param("rename out/layer-00001", 1, 1, id="rename"),
        pytest.param(f"write out/{JOURNAL_FILE}", 3, 1, id="journal"),
        pytest.param("write outside.partial", 1, 3, id="outside"),
        pytest.param("rename out/model-00003-of-00004", 1, 4, id="shard"),
        pytest.param("write out/model.safetensors.index", 1, 4, id="index"),
        pytest.param("write others.partial/moesparse_report", 1, 4, id="companions"),
        pytest.param("rename out/config.json", 1, 4, id="config"),
    ],
)
def test_a_full_disk_keeps_what_is_finished(source, pruned, tmp_path, monkeypatch, place, count, done):
    out = tmp_path / "out"
    said = f"No space left on device. {done} finished parts are kept in" if done else "left on device. No part was"
    with monkeypatch.context() as patch:
        progress = Watch(patch, at(place, fail(), count), CALLS).progress
        with pytest.raises(CheckpointError, match=rf"cannot write .*{said}.*resume=True"):
            run(source, out, progress=progress)
    assert parts(out) == done
    run(source, out, resume=True)
    assert_same(out, pruned)


def fails(source, out):
    """Go on with a run; whether the disk was full again."""
    try:
        run(source, out, resume=True, tokenizer=TOKENIZER)
    except CheckpointError as error:
        if "No space left on device" not in str(error):
            raise
        return True
    return False


def test_a_disk_that_is_really_full(source, pruned, tmp_path):
    """It is enlarged page by page towards the end, so that every small file finds it full once."""
    whole = sum(-(-file.stat().st_size // 4096) * 4 for file in pruned.iterdir())
    found = []
    with SmallDisk(tmp_path / "disk", "16k") as disk:
        out = disk.path / "out"
        for size in [16, *range(100, whole - 60, 90), *range(whole - 30, whole + 60, 4)]:
            disk.remount(f"size={size}k")
            if not fails(source, out):
                break
            found.append(parts(out) or 0)
        assert found == sorted(found)
        assert {0, 1, 2, 4} <= set(found)
        assert_same(out, pruned)


def test_hidden_states_that_do_not_fit_on_the_disk_are_an_error_and_no_crash(source, tmp_path, monkeypatch):
    monkeypatch.setattr("moesparse.calibration.plan.available_memory", lambda: 1)
    windows = WINDOWS.repeat(100, 1)
    refused = pytest.raises(CheckpointError, match="No space left on device")
    with SmallDisk(tmp_path / "disk", "300k") as disk, refused:
        run(source, disk.path / "out", windows=windows)


def test_a_folder_that_cannot_be_written(source, pruned, tmp_path, monkeypatch):
    with SmallDisk(tmp_path / "disk", "4m") as disk:
        out = disk.path / "out"
        with monkeypatch.context() as patch:
            read_only = fail(OSError(errno.EROFS, "Read-only file system"))
            progress = Watch(patch, at("write layer-00001.partial", read_only)).progress
            with pytest.raises(CheckpointError, match=r"Read-only file system. 1 finished parts are .* resume=True"):
                run(source, out, progress=progress)
        disk.remount("ro")
        with pytest.raises(CheckpointError, match=r"cannot write .*Read-only file system. 1 finished parts are kept"):
            run(source, out, resume=True)
        with pytest.raises(
            CheckpointError, match=r"must lie in a folder that can be written, got .*other: .* read-only"
        ):
            run(source, disk.path / "other")
        disk.remount("rw")
        run(source, out, resume=True)
        assert_same(out, pruned)


@pytest.mark.parametrize("harm", ["vanish", "cut"])
def test_a_shard_of_the_source_that_is_lost_on_the_way(source, pruned, tmp_path, harm):
    shutil.copytree(source, tmp_path / "source")
    shard, out = tmp_path / "source" / "model.safetensors", tmp_path / "out"

    def lose(event):
        if event.stage.startswith("propagate model.layers.1"):
            if harm == "vanish":
                shard.unlink(missing_ok=True)
            else:
                os.truncate(shard, 10_000)

    said = "cannot be read any more.*put it back" if harm == "vanish" else "was changed while it was read"
    with pytest.raises(CheckpointError, match=rf"model.safetensors .*{said}.* 2 finished parts are kept .*resume=True"):
        run(tmp_path / "source", out, progress=lose)
    shutil.copy(source / "model.safetensors", shard)
    run(tmp_path / "source", out, resume=True)
    assert_same(out, pruned)


def spoiled(source, folder, name, value):
    """The source with one weight replaced, or all of a tensor scaled."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        for key, factor in value.items() if isinstance(value, dict) else {name: value}.items():
            tensor = model.get_parameter(key)
            if isinstance(value, dict):
                tensor.mul_(factor)
            else:
                tensor.view(-1)[7] = factor
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.2.mlp.experts.gate_up_proj", "gate_up_proj must hold finite weights, got NaN or infinity"),
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 .*NaN or infinity in its self_attn.v_proj.weight: repair"),
    ],
)
def test_a_nan_in_the_weights_is_found_before_any_work(source, tmp_path, name, said):
    with pytest.raises(ValueError, match=said):
        run(spoiled(source, tmp_path / "source", name, float("nan")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_on_the_way_keep_what_is_finished(source, tmp_path):
    # gate * up is about 1e21 here, its square is no float32, and the layer's output is as small as ever
    experts = "model.layers.2.mlp.experts"
    large = spoiled(source, tmp_path / "source", "", {f"{experts}.gate_up_proj": 1e10, f"{experts}.down_proj": 1e-20})
    with pytest.raises(
        CalibrationError, match=rf"must be finite, got .* in the activation of {experts}, expert .*2 fin"
    ):
        run(large, tmp_path / "out")
    assert parts(tmp_path / "out") == 2


def test_the_lock_of_a_dead_process_keeps_nobody_out(source, pruned, tmp_path):
    out = tmp_path / "out"
    killed(lambda progress: run(source, out, progress=progress), at("progress rescale .*layers.1", kill))
    assert (out / ".moesparse.lock").read_text().isdigit()
    run(source, out, resume=True)
    assert_same(out, pruned)


def test_windows_in_another_order_are_other_windows(source, tmp_path):
    """Their sums round otherwise: the result would not have the bits of any uninterrupted run."""
    killed(lambda progress: run(source, tmp_path / "out", progress=progress), at("call choose_masks", kill, 3), CALLS)
    with pytest.raises(CheckpointError, match="another windows"):
        run(source, tmp_path / "out", resume=True, windows=WINDOWS.flip(0))
