"""`moesparse prune` that is told to stop: what is left, and going on from there, in processes of its own."""

import signal
import time

import pytest
import torch
from processes import command, start_command
from safetensors.torch import load_file

OPTIONS = ["--saliency", "gated-sparsegpt", "--update", "least-squares", "--samples", "24", "--length", "64"]


def words(out, *more):
    return ["prune", "demo", out, *OPTIONS, *more]


def weights(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def stop(out, number):
    """Start a run and send it a signal when its second layer is written: it says what is left."""
    process = start_command(*words(out))
    while not (out / "layer-00001").exists():
        assert process.poll() is None, process.said()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 1
    said = " ".join(said.split())
    assert "finished parts are kept" in said
    assert "--resume" in said
    assert not (out / "config.json").exists()
    assert (out / "moesparse_journal.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = command(*words(out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_what_is_left_and_goes_on_to_what_an_uninterrupted_one_gives(number, whole, tmp_path):
    stop(tmp_path / "out", number)
    done = command(*words(tmp_path / "out", "--resume"))
    assert done.returncode == 0, done.stderr
    resumed, undisturbed = weights(tmp_path / "out"), weights(whole)
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[key], undisturbed[key]) for key in undisturbed)


def test_what_loads_the_whole_model_cannot_be_resumed(tmp_path):
    done = command(*words(tmp_path / "out", "--experts", "0.25", "--refine-experts", "--resume"))
    assert done.returncode == 2
    assert "must be left out where the whole model is loaded" in " ".join(done.stderr.split())
