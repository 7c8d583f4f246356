"""`moesparse calibrate` and the expert options of `moesparse prune`, on a tiny model saved to a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from faults import Watch, assert_same, at
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moesparse.calibration.statistics import ModelStatistics
from moesparse.calibration.whole import calibrate
from moesparse.cli import main
from moesparse.experts.criteria import expert_scores
from moesparse.system.run_folder import claimed
from moesparse.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mixtral with a tokenizer of 64 words, and a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_model("mixtral").save_pretrained(path / "dense")
    words = {f"w{number}": number for number in range(64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path / "dense")
    for name, low, high in (("text", 3, 60), ("law", 3, 20), ("code", 40, 60)):
        ids = torch.randint(low, high, (600,), generator=torch.Generator().manual_seed(0)).tolist()
        (path / f"{name}.txt").write_text(" ".join(f"w{number}" for number in ids))
    (path / "short.txt").write_text("w3 w4 w5")
    (path / "empty.txt").write_text("\n")
    return path


def domains(folder, *names):
    """--calibration for files of the folder, each its own domain."""
    return [word for name in names for word in ("--calibration", f"{folder / name}.txt={name}")]


def run(monkeypatch, capsys, folder, command, *arguments, text=None):
    """(exit code, standard output, standard error) of a command with the folder's text, or another."""
    text = ["--calibration", str(folder / "text.txt")] if text is None else text
    text = [*text, "--samples", "8", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["moesparse", command, str(folder / "dense"), *map(str, arguments), *text])
    monkeypatch.setenv("COLUMNS", "120")
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_prune_removes_experts_and_says_which(folder, tmp_path, monkeypatch, capsys):
    # half of 8 would leave 4: the next multiple is 6
    arguments = (tmp_path / "out", "--experts", 0.5, "--divisible-by", 6, "--expert-saliency", "gated-norm", "--json")
    code, out, err = run(monkeypatch, capsys, folder, "prune", *arguments)
    assert code == 0, err
    report = json.loads(out)
    assert report["recipe"]["divisible_by"] == 6
    assert report["recipe"]["weights"] is None
    assert [len(block["kept"]) for block in report["experts"]["blocks"]] == [6, 6]
    assert report["experts"]["criterion"] == "gated-norm"
    assert len(report["experts"]["refit"]) == 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 6
    assert "# dense, 6 of 8 experts kept" in (tmp_path / "out" / "README.md").read_text()


def test_without_text_experts_go_by_their_weights(folder, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--experts", 0.25, "--json", text=[])
    assert code == 0, err
    report = json.loads(out)
    assert (report["recipe"]["expert_saliency"], report["recipe"]["update"]) == ("aimer", "none")
    assert (report["calibration"]["tokens"], report["experts"]["refit"]) == (0, [])
    named = ("--experts", 0.25, "--expert-saliency", "aimer", "--json")
    code, out, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "fitted", *named)
    assert code == 0, err
    fitted = json.loads(out)
    assert fitted["experts"]["blocks"] == report["experts"]["blocks"] and len(fitted["experts"]["refit"]) == 2
    code, _, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / "s", *named[:4])
    assert code == 2 and "--expert-saliency must be one that reads the sums of a text" in err
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "no", *named, "--update", "none")
    assert code == 2 and "--calibration must be left out with --plan, --scores or --expert-saliency aimer" in err


def test_experts_are_merged_and_it_says_into_which(folder, tmp_path, monkeypatch, capsys):
    arguments = ("--experts", 0.25, "--expert-method", "m-smoe", "--update", "none")
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *arguments)
    assert code == 0, err
    assert "experts by frequency, the others merged by m-smoe" in err and "merged into others" in err
    report = json.loads((tmp_path / "out" / "moesparse_report.json").read_text())
    assert report["experts"]["method"] == "m-smoe"
    assert sum(len(group["experts"]) - 1 for group in report["experts"]["blocks"][0]["merged"]) == 2
    assert "| the others merged by | m-smoe |" in (tmp_path / "out" / "README.md").read_text()
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "no", *arguments, text=[])
    assert code == 2 and "--calibration must name text for this model" in err
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "no", *arguments, "--refine-experts")
    assert code == 2 and "--refine-experts must be left out with --expert-method m-smoe" in err
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "no", "--expert-method", "m-smoe")
    assert code == 2 and "--expert-method must come with --experts or --keep-experts" in err


def test_the_table_names_the_removed(folder, tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--experts", 0.25, "--weights", "2:4")
    assert code == 0, err
    assert "experts by reap" in err
    assert "6 of 8" in err
    assert "50.0% of the expert weights are zero" in err


def test_calibrate_writes_statistics_that_score(folder, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / "new" / "s.stats", "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 8 * 32
    statistics = ModelStatistics.load(tmp_path / "new" / "s.stats")
    assert expert_scores(statistics, "easy-ep").shape == (2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep-experts", 0), "--keep-experts must be between 1 and the 8 experts of a block, got 0"),
        (("--keep-experts", 9), "--keep-experts must be between 1 and the 8 experts of a block, got 9"),
        (("--experts", 0.5, "--expert-saliency", "reep"), "--expert-saliency must be one of frequency, gate-sum"),
        (("--experts", 0.5, "--keep-experts", 4), "only one of --experts and --keep-experts may"),
        (("--weights", "none"), "must prune weights, round them to values or remove experts"),
        (("--experts", 0.5, "--mix", "loud"), "mix must be one of pooled, equal, got 'loud'"),
        (("--experts", 0.5, "--demonstrations-from-model", 32), "give 1 to 31 of its 32 tokens to the model, got 32"),
        (("--experts", 0.5, "--demonstrations-from-model", 8, "--temperature", -1), "temperature must be 0"),
        (("--experts", 0.5, "--statistics", "s.stats"), "only one of --statistics and calibration text"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(folder, tmp_path, monkeypatch, capsys, options, message):
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *options)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_named_domains_are_compared_and_mixed(folder, tmp_path, monkeypatch, capsys):
    arguments = (tmp_path / "out", "--experts", 0.5, "--mix", "equal", "--expert-saliency", "gated-norm")
    text = domains(folder, "law", "code")
    code, out, err = run(monkeypatch, capsys, folder, "prune", *arguments, "--json", text=text)
    assert code == 0, err
    report = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["recipe"]["expert_mix"] == "equal"
    found = report["experts"]["domains"]
    assert found["windows"] == {"code": 4, "law": 4}
    assert set(found["kept"]) == set(found["scores"]) == {"code", "law"}
    for number, overlap in enumerate(found["overlap"][0]["blocks"]):
        a, b = (set(found["kept"][name][number]) for name in ("code", "law"))
        assert overlap == len(a & b) / len(a | b)
    assert found["stability"]["demonstrations"] == 8
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "table", *arguments[1:], text=text)
    assert code == 0, err
    assert "domains by gated-norm" in err
    mean = sum(found["overlap"][0]["blocks"]) / len(found["overlap"][0]["blocks"])
    rows = [line.split() for line in err.splitlines()]
    assert ["domain", "windows", "code", "law"] in rows
    assert ["code", "4", f"{mean:.2f}"] in rows
    assert "resampling the 8 demonstrations keeps" in err


def test_calibrate_shows_the_choice_of_any_budget(folder, tmp_path, monkeypatch, capsys):
    arguments = ("--experts", 0.5, "--budget", "global", "--expert-floor", 3)
    text = domains(folder, "law", "code")
    code, out, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / "s", *arguments, "--json", text=text)
    assert code == 0, err
    choice = json.loads(out)["choice"]
    counts = [len(ids) for ids in choice["kept"].values()]
    assert sum(counts) == 8
    assert min(counts) >= 3
    assert set(choice["domains"]["kept"]) == {"law", "code"}


def test_statistics_by_domain_choose_as_their_text_does(folder, tmp_path, monkeypatch, capsys):
    saved = []
    for name in ("law", "code"):
        path = tmp_path / f"{name}.stats"
        code, _, err = run(monkeypatch, capsys, folder, "calibrate", path, text=domains(folder, name))
        assert code == 0, err
        saved += ["--statistics", f"{path}={name}"]
    arguments = ("--experts", 0.5, "--update", "none", "--mix", "equal", "--json")
    code, out, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "a", *arguments, text=saved)
    assert code == 0, err
    found = json.loads(out)["experts"]["domains"]
    assert set(found["kept"]) == {"law", "code"}
    assert found["stability"] is None


def test_statistics_of_another_model_are_refused(folder, tmp_path, monkeypatch, capsys):
    windows = torch.randint(3, 60, (2, 16))
    calibrate(tiny_model("mixtral", seed=1), windows).save(tmp_path / "other.stats")
    text = ["--statistics", str(tmp_path / "other.stats")]
    arguments = ("--experts", 0.5, "--update", "none")
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *arguments, text=text)
    assert code == 1
    assert "statistics must come from this model" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "domain 'short' must give at least one window of 32 tokens, got none from"),
        ("empty", "empty.txt must hold text, got none"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "calibrate"])
def test_a_domain_without_text_is_refused(folder, tmp_path, monkeypatch, capsys, command, name, message):
    text = domains(folder, "law", name)
    options = ("--experts", 0.5)
    code, _, err = run(monkeypatch, capsys, folder, command, tmp_path / "out", *options, text=text)
    assert code == 1
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_the_model_writes_its_own_demonstrations(folder, tmp_path, monkeypatch, capsys):
    arguments = (tmp_path / "out", "--experts", 0.25, "--demonstrations-from-model", 8, "--protect-super-experts")
    code, out, err = run(monkeypatch, capsys, folder, "prune", *arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["calibration"]["tokens from the model"] == 8
    assert report["calibration"]["length"] == 32
    assert report["recipe"]["protect_experts"] is True


def test_target_bytes_is_planned_without_writing_and_then_carried_out(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mixed"
    arguments = (out, "--target-bytes", "0.7", "--saliency", "moe-pruner", "--update", "none", "--no-compare-uniform")
    code, printed, _ = run(monkeypatch, capsys, folder, "prune", *arguments, "--dry-run", "--json")
    plan = json.loads(printed)
    assert code == 0 and not out.exists()
    assert plan["mixed"]["bytes"] <= 0.7 * plan["dense"]
    code, printed, told = run(monkeypatch, capsys, folder, "prune", *arguments, "--dry-run")
    assert code == 0 and "estimates in nats per token" in printed and "nats" not in told
    code, _, told = run(monkeypatch, capsys, folder, "prune", *arguments)
    assert code == 0
    assert "experts, 0." in told and "estimates in nats per token" in told
    config = json.loads((out / "config.json").read_text())
    recipe = config["moesparse"]["recipe"]
    assert recipe["patterns"] == plan["mixed"]["patterns"] and recipe["target_bytes"] == "0.7"
    assert config["num_local_experts"] == plan["mixed"]["keep"]


def test_target_bytes_takes_the_place_of_a_pattern(folder, tmp_path, monkeypatch, capsys):
    for extra, names in ((("--weights", "2:4"), "--weights"), (("--experts", "0.25"), "experts")):
        code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--target-bytes", "0.5", *extra)
        assert code == 2 and f"{names} must be left out with" in err
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--target-bytes", "a lot")
    assert code == 2 and "must be a share" in err


def hashes(out):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")}


@pytest.mark.parametrize(
    "options", [("--experts", 0.25), ("--experts", 0.25, "--weights", "2:4"), ("--update", "none")]
)
def test_the_same_command_gives_the_same_bits(folder, tmp_path, monkeypatch, capsys, options):
    for name in ("one", "two"):
        code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / name, *options)
        assert code == 0, err
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") != {}


def test_layer_by_layer_and_whole_give_the_same(folder, tmp_path, monkeypatch, capsys):
    for name, whole in (("layers", ()), ("whole", ("--whole",))):
        arguments = (tmp_path / name, "--experts", 0.5, "--weights", "2:4", *whole)
        code, _, err = run(monkeypatch, capsys, folder, "prune", *arguments, text=domains(folder, "law", "code"))
        assert code == 0, err
        code, _, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / f"{name}.stats", *whole)
        assert code == 0, err
    assert_same(tmp_path / "layers", tmp_path / "whole")
    one, other = (load_file(tmp_path / f"{name}.stats") for name in ("layers", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_that_transformers_would_save_otherwise_needs_whole(folder, tmp_path, monkeypatch, capsys):
    """Its experts are fused already, as the model holds them."""
    shutil.copytree(folder / "dense", tmp_path / "dense")
    state = AutoModelForCausalLM.from_pretrained(folder / "dense").state_dict()
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    text = ["--calibration", str(folder / "text.txt")]
    for command, *arguments in (("prune", "--experts", 0.5), ("calibrate",)):
        code, _, err = run(monkeypatch, capsys, tmp_path, command, tmp_path / command, *arguments, text=text)
        assert code == 1
        assert "which the model has no place for. So it is not read layer by layer; --whole loads it" in err
        code, _, err = run(monkeypatch, capsys, tmp_path, command, tmp_path / command, *arguments, "--whole", text=text)
        assert code == 0, err


def test_plans_of_removal_and_calibration(folder, tmp_path, monkeypatch, capsys):
    plans = {}
    for command, *arguments in (
        ("prune", "--experts", 0.25),
        ("prune", "--experts", 0.25, "--update", "none"),
        ("prune", "--experts", 0.25, "--weights", "2:4"),
        ("calibrate", "--moments", "gated"),
    ):
        options = (tmp_path / "out", *arguments, "--dry-run", "--json")
        code, out, err = run(monkeypatch, capsys, folder, command, *options)
        assert code == 0, err
        plans[" ".join(map(str, (command, *arguments)))] = json.loads(out)
    refit, cut, both, moments = plans.values()
    head = 64 * 32  # no pass computes logits
    assert refit["keep"] == cut["keep"] == both["keep"] == 6 and moments["keep"] is None
    dense = 2 * 8 * 3 * 32 * 96 * 4
    assert refit["packed"] == cut["packed"] == dense * 6 // 8
    assert both["packed"] < refit["packed"]
    assert refit["flops"]["forward"] == 4 * cut["flops"]["forward"] == 4 * 2 * 256 * (cut["active_parameters"] - head)
    assert both["flops"]["forward"] > refit["flops"]["forward"]
    # [E, H, H] and [E, I, I] in float64
    assert moments["moments"] == 8 * 8 * (32**2 + 96**2)
    assert moments["sums"] == 2 * 8 * 8 * (8 + 7 * 8)
    assert not (tmp_path / "out").exists()


def test_a_limit_that_cannot_be_kept_is_refused(folder, tmp_path, monkeypatch, capsys):
    for command, *arguments in (("prune", "--experts", 0.25), ("calibrate",)):
        options = (tmp_path / "out", *arguments, "--max-memory", "1MB")
        code, _, err = run(monkeypatch, capsys, folder, command, *options)
        assert code == 2
        assert "--max-memory must be at least" in err and "got 1,000,000" in err
        code, _, err = run(monkeypatch, capsys, folder, command, tmp_path / "out", *arguments, "--max-memory", "1 heap")
        assert code == 2
        assert "--max-memory must be a size with a unit, such as 24GiB or 24GB, got '1 heap'" in err
    assert not (tmp_path / "out").exists()


def test_old_statistics_are_neither_used_nor_written_over(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "s.stats"
    code, _, err = run(monkeypatch, capsys, folder, "calibrate", path, "--seed", 3)
    assert code == 0, err
    held = path.read_bytes()
    code, _, err = run(monkeypatch, capsys, folder, "calibrate", path, "--seed", 4)
    assert code == 1
    assert "STATISTICS must be a new file, got" in err
    assert path.read_bytes() == held
    arguments = ("--experts", 0.5, "--update", "none")
    for seed, expected in ((3, 0), (4, 2)):
        text = ["--statistics", str(path), "--seed", str(seed)]
        code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / f"out{seed}", *arguments, text=text)
        assert code == expected, err
    assert "--seed must be 3, by which the text of" in err


def test_a_calibration_that_was_stopped_goes_on(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "s.stats"
    with monkeypatch.context() as patch:
        Watch(patch, at("write statistics-00001", lambda: os.kill(os.getpid(), signal.SIGTERM)))
        code, _, err = run(monkeypatch, capsys, folder, "calibrate", path)
    assert code == 1
    assert "1 finished parts are kept in" in err and "the same command with --resume goes on" in err
    assert not path.exists()
    code, _, err = run(monkeypatch, capsys, folder, "calibrate", path)
    assert code == 1 and "unfinished run, 1 parts done" in err
    code, _, err = run(monkeypatch, capsys, folder, "calibrate", path, "--resume")
    assert code == 0, err
    code, _, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / "whole.stats")
    assert path.read_bytes() == (tmp_path / "whole.stats").read_bytes()


def test_a_second_run_that_loads_the_model_is_refused(folder, tmp_path, monkeypatch, capsys):
    arguments = ("--experts", 0.25, "--whole")
    with claimed(tmp_path / "out"):
        code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *arguments)
        assert code == 1
        assert f"out, where process {os.getpid()} is at work" in err
        code, _, err = run(monkeypatch, capsys, folder, "calibrate", tmp_path / "out", "--whole")
        assert code == 1
    (tmp_path / ".out.moesparse.lock").write_text("4194305")  # left by a process that is dead
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", *arguments)
    assert code == 0, err
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_run_that_loads_the_model_and_is_stopped_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def stop(*_arguments, **_options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("moesparse.pruning.run.prune", stop)
    code, _, err = run(monkeypatch, capsys, folder, "prune", tmp_path / "out", "--experts", 0.25, "--whole")
    assert code == 1
    assert "stopped: nothing was finished or written" in err
    assert not list(tmp_path.iterdir())
