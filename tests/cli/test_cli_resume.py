"""`moesparse prune` that is told to stop: what is left, and going on from there, in processes of its own."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

OPTIONS = ["--saliency", "gated-sparsegpt", "--update", "least-squares", "--samples", "24", "--length", "64"]


def command(out, *more):
    return [sys.executable, "-m", "moesparse", "prune", "demo", str(out), *OPTIONS, *more]


def weights(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def stop(out, number):
    """Start a run and send it a signal when its second layer is written; what it said."""
    process = subprocess.Popen(
        command(out),
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background inherits it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (out / "layer-00001").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    return " ".join(said.split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_what_is_left(number, tmp_path):
    said = stop(tmp_path / "out", number)
    assert "finished parts are kept" in said
    assert "--resume" in said
    assert not (tmp_path / "out/config.json").exists()
    assert (tmp_path / "out/moesparse_journal.json").exists()


def test_it_goes_on_to_what_an_uninterrupted_run_gives(tmp_path):
    stop(tmp_path / "out", signal.SIGTERM)
    subprocess.run(command(tmp_path / "out", "--resume"), capture_output=True, check=True)
    subprocess.run(command(tmp_path / "whole"), capture_output=True, check=True)
    resumed, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_what_loads_the_whole_model_cannot_be_resumed(tmp_path):
    done = subprocess.run(
        command(tmp_path / "out", "--experts", "0.25", "--refine-experts", "--resume"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "must be left out where the whole model is loaded" in " ".join(done.stderr.split())
