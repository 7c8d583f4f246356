"""The command line as a user meets it: results, exit codes, and one clear line for every mistake."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import start_command

from moesparse import demo
from moesparse.cli import main
from moesparse.models import on_disk
from moesparse.system.installation import kernels_in_words
from moesparse.system.sizes import format_bytes
from moesparse.system.speed import Speed

pytestmark = pytest.mark.filterwarnings("ignore")


MAGNITUDE = ("--saliency", "magnitude", "--update", "none")


def in_process(monkeypatch, capsys, *arguments, columns=100):
    """The same entry point without a new interpreter: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The embedded model pruned once for all tests, and what the command printed."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    rules = ("--weights", "2:4", "--saliency", "moe-pruner", "--update", "least-squares")
    words = ("prune", "demo", folder, *rules, "--samples", "24", "--length", "256", "--json")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    program = [sys.executable, "-m", "moesparse", *map(str, words)]
    return folder, subprocess.run(program, capture_output=True, text=True, env=environment, timeout=600)


def test_prune_prints_one_json_object(pruned):
    folder, run = pruned
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["output"] == str(folder)
    assert len(report["blocks"]) == 4
    assert report["sparsity"] == 0.5
    assert report["calibration"]["tokens"] == 24 * 256
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")


@pytest.mark.parametrize("command", [("prune", *MAGNITUDE), ("calibrate", "--samples", "6", "--length", "32")])
def test_a_command_opens_its_model_once(command, tmp_path, monkeypatch, capsys):
    opened = []
    build = on_disk.meta_model
    monkeypatch.setattr(on_disk, "meta_model", lambda *args: opened.append(1) or build(*args))
    code, _, err = in_process(monkeypatch, capsys, command[0], "demo", tmp_path / "out", *command[1:])
    assert code == 0, err
    assert opened == [1]


def test_magnitude_plans_to_run_nothing(tmp_path, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *MAGNITUDE, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert (plan["tokens"], plan["hidden_states"], plan["moments"], plan["flops"]["forward"]) == (0, 0, 0, 0)
    assert plan["flops"]["masks"] > 0


@pytest.mark.parametrize(
    ("arguments", "said", "rules"),
    [
        ((), True, ("gated-sparsegpt", "asymmetric+tune")),
        (("--saliency", "wanda", "--update", "none"), False, ("wanda", "none")),
        (("--weights", "none", "--experts", "0.25"), False, (None, None)),
    ],
)
def test_the_rules_are_named_and_in_words_that_of_this_device(arguments, said, rules, tmp_path, monkeypatch, capsys):
    how = (*arguments, "--device", "cpu", "--dry-run")
    code, out, err = in_process(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *how)
    assert code == 0, err
    assert ("Mask rule: gated-sparsegpt, the default of this device" in out + err) == said
    code, out, err = in_process(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *how, "--json")
    assert code == 0 and "Mask rule" not in out + err
    plan = json.loads(out)
    assert (plan["saliency"], plan["update"]) == rules


def test_a_dry_run_prints_its_plan_as_its_result(tmp_path, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *MAGNITUDE, "--dry-run")
    assert (code, err) == (0, "")
    assert "decoder layers, with experts" in out and "time at this load, within a factor of three" in out
    assert not (tmp_path / "out").exists()
    code, out, err = in_process(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *MAGNITUDE)
    assert (code, out) == (0, "")
    assert "decoder layers, with experts" in err


def test_a_plan_names_the_load_and_what_it_was_without(tmp_path, monkeypatch, capsys):
    speed = Speed((1e9, 1e9), 3.2, 2, (4e9, 4e9), "2026-11-30")
    monkeypatch.setattr("moesparse.system.speed.speed_here", lambda *_: speed)
    words = ("prune", "demo", tmp_path / "out", *MAGNITUDE, "--dry-run")
    code, out, _ = in_process(monkeypatch, capsys, *words, "--json")
    plan = json.loads(out)
    assert (code, plan["load"], plan["cpus"], plan["measured_without_load"]) == (0, 3.2, 2, "2026-11-30")
    assert plan["seconds"] == pytest.approx(4 * plan["seconds_without_load"])
    assert plan["process"] > 50 * 2**20
    _, out, _ = in_process(monkeypatch, capsys, *words)
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "this load: average of a minute, CPUs 3.2, 2" in rows
    whole = format_bytes(plan["peak_in_memory"] + plan["process"]).split()[-1]
    assert any(row.startswith("at most, with it: the peak column, time -v") and row.endswith(whole) for row in rows)
    assert any(row.startswith("without load, as measured here on 2026-11-30") for row in rows)


def test_inspect_shows_the_pattern_in_every_expert_matrix_and_nothing_else_changed(pruned, monkeypatch, capsys):
    folder, _ = pruned
    code, out, err = in_process(monkeypatch, capsys, "inspect", folder, "--json")
    assert code in (0, None), err
    result = json.loads(out)
    tensors = [tensor for block in result["blocks"] for tensor in block["tensors"]]
    assert [tensor["pattern"] for tensor in tensors] == ["2:4"] * 8
    assert all(tensor["sparsity"] == 0.5 for tensor in tensors)
    assert result["recipe"]["weights"] == "2:4"
    dense, _ = demo.load()
    sizes = [p.numel() for name, p in dense.named_parameters() if ".experts." in name]
    assert result["expert_parameters"] == sum(sizes)
    assert result["other_parameters"] == sum(p.numel() for p in dense.parameters()) - sum(sizes)

    from safetensors.torch import load_file

    before, after = (
        {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for path in (demo.model_path(), folder)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if ".experts." in name}


def test_inspect_fails_when_the_config_claims_too_much(pruned, tmp_path, monkeypatch, capsys):
    folder, _ = pruned
    liar = tmp_path / "liar"
    liar.mkdir()
    for file in folder.iterdir():
        (liar / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["moesparse"]["recipe"]["weights"] = "1:4"
    (liar / "config.json").unlink()
    (liar / "config.json").write_text(json.dumps(config))
    code, _, err = in_process(monkeypatch, capsys, "inspect", liar)
    assert code == 1
    assert "model.layers.0.mlp.experts.gate_up_proj does not hold 1:4" in err


def test_eval_tells_dense_from_pruned(pruned, monkeypatch, capsys):
    folder, _ = pruned
    text = demo.text_path("heldout", "scripture")
    results = {}
    for model in ("demo", folder):
        words = ("eval", model, "--text", f"{text}=psalms", "--length", "256", "--json")
        code, out, err = in_process(monkeypatch, capsys, *words)
        assert code in (0, None), err
        results[model] = json.loads(out)
    dense, sparse = results["demo"], results[folder]
    assert dense["perplexity"] < sparse["perplexity"] < 1.5 * dense["perplexity"]
    assert dense["tokens"] == sparse["tokens"] > 10_000
    assert [row["name"] for row in dense["files"]] == ["psalms"]
    assert dense["files"][0]["bits_per_byte"] == dense["bits_per_byte"]
    assert dense["protocol"] == {"window": 256, "stride": 256, "bos": False}


def test_a_result_whose_file_cannot_be_written_is_shown_all_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("And the king said unto him. " * 20)

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    words = ("eval", "demo", "--text", tmp_path / "a.txt", "--length", "32", "--json", "-o", tmp_path / "a.json")
    code, out, err = in_process(monkeypatch, capsys, *words)
    assert code == 1
    assert json.loads(out)["tokens"] > 100
    assert err == f"error: {tmp_path / 'a.json'}: No space left on device\n"


def test_bench_says_what_it_measured(monkeypatch, capsys):
    words = ("bench", "--shape", "gpt-oss-20b", "--tokens", "3", "--device", "cpu", "--json")
    code, out, err = in_process(monkeypatch, capsys, *words)
    assert code in (0, None), err
    assert "says nothing about a GPU" in err
    assert f"\n{kernels_in_words()}\n" in err
    result = json.loads(out)
    assert 16 * result["packed_bytes"] == 9 * result["dense_bytes"]
    runs = {row["contender"]: row for row in result["rows"]}
    assert runs.keys() >= {"moe_nm reference", "moe_dense reference", "transformers grouped_mm"}
    assert all(row["status"] == "ok" and row["error"] <= row["error_budget"] for row in runs.values())
    assert {row["shape"] for row in runs.values()} == {"gpt-oss-20b (reduced)"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prune", "demo", "OUT", "--weights", "2:5"], 2, "m in 4, 8, 16, 32, got 2:5"),
        (["prune", "demo", "OUT", "--weights", "1.2"], 2, "between 0 and 1 (the share removed), got 1.2"),
        (["prune", "demo", "OUT", "--saliency", "mystery"], 2, "saliency must be one of magnitude"),
        (["prune", "demo", "OUT", *MAGNITUDE, "--statistics", "x"], 2, "--statistics must come with --experts or --k"),
        (["prune", "demo", "OUT", "--statistics", "x"], 2, "--statistics must come with --experts or --keep-experts"),
        (["prune", "demo", "OUT", "--device", "tpu9"], 2, "--device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        (["prune", "demo", "OUT", "--device", "meta"], 2, "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        (["prune", "demo", "OUT", "--device", "cuda:99"], 2, "--device must be one this machine has, got 'cuda:99'"),
        (["prune", "demo", "OUT", "--samples", "0"], 2, "Invalid value for '--samples'"),
        (["prune", "demo", "OUT", "--samples", "4"], 2, "samples must be at least 6, a window for each domain"),
        (["prune", "demo", "OUT", "--experts", "1.5"], 2, "experts must be a share between 0 and 1, got 1.5"),
        (["prune", "demo", "OUT", "--expert-saliency", "ean"], 2, "--expert-saliency must come with --experts"),
        (["prune", "demo", "OUT", "--protect-super-experts"], 2, "--protect-super-experts must come with --experts or"),
        (["prune", "demo", "OUT", "--experts", "0.5", "--expert-floor", "3"], 2, "left out with --budget per-layer"),
        (["prune", "demo", "OUT", "--experts", "0.5", "--budget", "global"], 2, "unless --allow-non-uniform, got 'gl"),
        (["prune", "demo", "OUT", "--choices", "drop,2:4"], 2, "--choices must come with --target-bytes, which"),
        (["prune", "demo", "OUT", "--temperature", "1"], 2, "--temperature must come with --demonstrations-from-model"),
        (["prune", "demo", "OUT", "--report", "FULL"], 2, "--report must be a file to write, got the folder"),
        (["prune", "demo", "OUT", "--report", "INFILE"], 1, "--report must lie in a folder that can be written, got"),
        (["prune", "demo"], 2, "Missing argument"),
        (["prune", "NOWHERE", "OUT"], 2, "MODEL must be a local folder or a hub id"),
        (["prune", "demo", "FULL"], 1, "OUT must be a new or empty folder"),
        (["prune", "demo", "OUT", "--calibration", "BINARY"], 1, "must be text, got binary data"),
        (["prune", "demo", "OUT", "--samples", "100000"], 1, "times as much) or --samples "),
        (["eval", "demo", "--text", "missing.txt"], 2, "--text must be a file or a datasets name"),
        (["bench", "--shape", "gpt-9"], 2, "--shape must be one of Mixtral-8x7B"),
        (["bench", "--routing", "fair"], 2, "--routing must be one of uniform, skewed, got 'fair'"),
        (["calibrate", "demo", "OUT", "--experts", "1.5"], 2, "experts must be a share between 0 and 1, got 1.5"),
        (["calibrate", "demo", "OUT", "--budget", "global"], 2, "--budget global must come with --experts or --keep-"),
        (["calibrate", "demo", "OUT", "--expert-floor", "3"], 2, "--expert-floor must come with --experts or --keep"),
        (["calibrate", "demo", "INFILE"], 1, "STATISTICS must lie in a folder that can be written, got"),
        (["eval", "demo", "-o", "INFILE"], 1, "--output must lie in a folder that can be written, got"),
        (["report", "demo", "-o", "INFILE"], 1, "--output must lie in a folder that can be written, got"),
        (["report", "demo", "--png", "BINARY"], 2, "--png must be a folder, got the file"),
        (["distill", "OUT", "--teacher", "demo", "-o", "OUT", "--preset", "huge"], 2, "--preset must be one of paper"),
        (["distill", "BROKEN", "--teacher", "demo", "-o", "OUT", "--mode", "blockwise"], 1, "must be valid JSON"),
        (["inspect", "FULL"], 1, "MODEL must be a folder with a config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"a":')
    places = {
        "OUT": "out",
        "FULL": "full",
        "BINARY": "binary",
        "NOWHERE": "nowhere",
        "BROKEN": "broken",
        "INFILE": "binary/x",
    }
    words = [tmp_path / places[word] if word in places else word for word in arguments]
    found, out, err = in_process(monkeypatch, capsys, *words)
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_out_is_looked_at_before_the_plan_is_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = in_process(monkeypatch, capsys, "prune", "demo", tmp_path)
    assert code == 1
    assert err.startswith("error: OUT must be a new or empty folder, got a folder that holds files")


def test_inspect_and_help_lose_no_words_at_80_columns(monkeypatch, capsys):
    _, out, _ = in_process(monkeypatch, capsys, "inspect", "demo", columns=80)
    rows = [line.split() for line in out.splitlines()]
    for layer in range(4):
        start = rows.index([f"model.layers.{layer}.mlp.experts", "16", "experts"])
        assert rows[start + 1] == ["gate_up_proj", "16x256x192", "0.00%", "dense", "1.5", "MiB"]
        assert rows[start + 2] == ["down_proj", "16x192x128", "0.00%", "dense", "768", "KiB"]
    _, out, _ = in_process(monkeypatch, capsys, "bench", "--shape", "list", columns=80)
    assert "mistralai/Mixtral-8x22B-v0.1 8       2     6144   16384        silu       no" in out
    _, out, _ = in_process(monkeypatch, capsys, "eval", "--help", columns=80)
    assert "moesparse[eval]" in out


def test_ctrl_c_in_a_command_that_writes_at_the_end_promises_no_more_than_that(monkeypatch, capsys):
    """It may come after OUT took its name."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moesparse.checkpoints.inspection.inspect_folder", stop)
    code, out, err = in_process(monkeypatch, capsys, "inspect", "demo")
    assert (code, out, err) == (1, "", "interrupted: nothing is left half written\n")


def test_ctrl_c_leaves_no_output(tmp_path):
    process = start_command("prune", "demo", tmp_path / "out", "--length", "256", "--samples", "200")
    journal = tmp_path / "out/moesparse_journal.json"
    while not journal.exists():  # then it has begun, and is far from the end of its first layer
        assert process.poll() is None, process.said()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "stopped: nothing was finished or written" in " ".join(errors.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["demo", "prune", "eval", "inspect", "bench", "info"])
def test_help_teaches(command, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert f"moesparse {command}" in out
    assert "--json" in out


def test_importing_the_package_is_light():
    code = "import moesparse, sys; sys.exit(any(name in sys.modules for name in ('transformers', 'triton', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
