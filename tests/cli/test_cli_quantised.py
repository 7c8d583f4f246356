"""The commands on a quantised checkpoint: the embedded model in FP8 blocks."""

import json
import shutil

import pytest
from quantised_folders import fp8_blocks, quantise_folder

from moesparse import demo
from moesparse.cli import main

TEXT = ("--samples", "8", "--length", "64")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "fp8"
    shutil.copytree(demo.model_path(), path)
    quantise_folder(
        path,
        lambda key, tensor: tensor.ndim == 2 and "embed" not in key and ".gate." not in key,
        lambda key, tensor: fp8_blocks(key, tensor, [32, 32]),
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    )
    return path


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error without the breaks of lines."""
    monkeypatch.setattr("sys.argv", ["moesparse", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, " ".join(err.split())


def test_calibrate_prune_and_inspect(source, tmp_path, monkeypatch, capsys):
    sums, out = tmp_path / "sums.safetensors", tmp_path / "out"
    text = demo.text_path("calibration", "novel")
    code, _, err = run(monkeypatch, capsys, "calibrate", source, sums, "--calibration", text, *TEXT)
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, "prune", source, out, "--experts", "0.25", "--statistics", sums)
    assert code == 0, err
    assert "The checkpoint is quantised: experts that stay are copied byte for byte, and not refitted." in err
    config = json.loads((out / "config.json").read_text())
    assert config["num_local_experts"] == 12 and config["moesparse"]["recipe"]["update"] == "none"
    code, printed, err = run(monkeypatch, capsys, "inspect", out, "--against", source, "--verify", "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert found["format"] == "fp8_block" and found["problems"] == []
    # 4 layers, 4 of 16 experts, 3 matrices, each with its scales
    assert len(found["against"]["tensors"]["removed"]) == 4 * 4 * 3 * 2
    assert len(found["against"]["tensors"]["cut"]) == 4


def test_weights_and_experts_in_their_format(source, tmp_path, monkeypatch, capsys):
    text, out = ("--calibration", demo.text_path("calibration", "novel")), tmp_path / "out"
    code, _, err = run(monkeypatch, capsys, "prune", source, out, "--experts", "0.25", "--weights", "2:4", *text, *TEXT)
    assert code == 0, err
    assert "not refitted, and of their codes those of pruned weights alone change; --update names a rule" in err
    assert "rounding" not in err
    code, printed, err = run(monkeypatch, capsys, "inspect", out, "--against", source, "--verify", "--json")
    assert code == 0, err
    found = json.loads(printed)["against"]["tensors"]
    assert len(found["pruned"]) == 4 * 12 * 3 and "requantised" not in found


def test_what_is_solved_for_says_its_rounding(source, tmp_path, monkeypatch, capsys):
    text, out = ("--calibration", demo.text_path("calibration", "novel")), tmp_path / "out"
    code, _, err = run(monkeypatch, capsys, "prune", source, out, *text, *TEXT)
    assert code == 0, err
    report = json.loads((out / "moesparse_report.json").read_text())
    said = f"{report['rounding']:.2g}"
    assert f"quantised again in the formats of the checkpoint: squared error {said} of the weights' squares" in err
    assert f"| rounding to the formats, squared error | {said} |" in (out / "README.md").read_text()
    assert [block["rounding"]["relative"] for block in report["blocks"]] and 0 < report["rounding"] < 1e-3
    code, printed, err = run(monkeypatch, capsys, "inspect", out, "--against", source)
    assert code == 0 and "tensors requantised" in printed, err


def test_a_plain_checkpoint_of_it_is_packed(source, tmp_path, monkeypatch, capsys):
    out, packed = tmp_path / "out", tmp_path / "packed"
    how = ("--saliency", "magnitude", "--update", "none")
    code, _, err = run(monkeypatch, capsys, "prune", source, out, *how)
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, "pack", out, packed)
    assert code == 1 and "pruned with --output-dtype bfloat16 they are plain, and can be" in err
    shutil.rmtree(out)
    code, _, err = run(monkeypatch, capsys, "prune", source, out, *how, "--output-dtype", "bfloat16")
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, "pack", out, packed)
    assert code == 0, err
    assert "| dequantised to | bfloat16 |" in (packed / "README.md").read_text()
    code, printed, err = run(monkeypatch, capsys, "inspect", packed, "--against", source, "--verify")
    assert code == 0 and "tensors dequantised" in printed, err


@pytest.mark.parametrize("mode", ["global", "blockwise"])
def test_a_quantised_student_is_refused(mode, source, tmp_path, monkeypatch, capsys):
    code, _, err = run(
        monkeypatch, capsys, "distill", source, "--teacher", "demo", "--output", tmp_path / "out", "--mode", mode
    )
    assert code == 1 and "student must hold plain weights" in err and "--output-dtype bfloat16 what is to be" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experts", "0.25", "--whole"), "the model must not be quantised, got one by 'fp8'"),
        (("--target-bytes", "0.7"), "with --output-dtype bfloat16 into a plain one"),
        (("--whole", "--output-dtype", "bfloat16"), "--output-dtype must be left out where the whole model is loaded"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_plan(arguments, message, source, tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "prune", source, tmp_path / "out", *TEXT, *arguments)
    assert code == (2 if "--output-dtype" in arguments else 1) and message in err and "calibration tokens" not in err
    assert not (tmp_path / "out").exists()
