"""Refusals name options on the command line and parameters in Python, and files that are not there come before work."""

import dataclasses
import shutil
import sys
import warnings

import pytest
from small_text import make_tokenizer
from typer.main import get_command

from moesparse import demo, load_pretrained, text
from moesparse.cli import app, main
from moesparse.cli.language import in_options, options_of
from moesparse.distillation.settings import PRESETS
from moesparse.errors import CalibrationError, CheckpointError, UsageError
from moesparse.pruning.recipe import Recipe
from moesparse.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def run(monkeypatch, capsys, *words):
    """(exit code, standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


# the same mistake in both languages: parameters in braces, and as what they are options
@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        ({"experts": 1.5}, ("--experts", 1.5), "{experts} must be a share between 0 and 1, got 1.5"),
        (
            {"experts": 0.5, "keep_experts": 3},
            ("--experts", 0.5, "--keep-experts", 3),
            "only one of {experts} and {keep_experts} may be given, got 0.5 and 3",
        ),
        (
            {"protect_experts": True},
            ("--protect-super-experts",),
            "{protect_experts} must come with {experts} or {keep_experts}, got neither",
        ),
        ({"saliency": "mystery"}, ("--saliency", "mystery"), "{saliency} must be one of magnitude, wanda"),
        ({"update": "hope"}, ("--update", "hope"), "{update} must be one of none"),
        ({"expert_mix": "loud", "experts": 0.5}, ("--mix", "loud", "--experts", 0.5), "{expert_mix} must be one of po"),
        (
            {"expert_saliency": "luck", "experts": 0.5},
            ("--expert-saliency", "luck", "--experts", 0.5),
            "{expert_saliency} must be one of frequency",
        ),
        (
            {"divisible_by": 0, "keep_experts": 4},
            ("--divisible-by", 0, "--keep-experts", 4),
            "{divisible_by} must be a positive number of experts, got 0",
        ),
        ({"target_bytes": "many"}, ("--target-bytes", "many"), "{target_bytes} must be a share of the dense experts"),
        ({"mtp": "maybe"}, ("--mtp", "maybe"), "{mtp} must be one of prune, keep, drop, got 'maybe'"),
        ({"output_dtype": "int3"}, ("--output-dtype", "int3"), "{output_dtype} must be one of bfloat16, float16"),
        ({"weights": "2:5"}, ("--weights", "2:5"), "{weights} must be a pattern, got '2:5': pattern n:m must have m"),
    ],
)
def test_the_same_refusal_in_both_languages(parameters, options, message, tmp_path, monkeypatch, capsys):
    as_option = {"protect_experts": "--protect-super-experts", "expert_mix": "--mix"}
    names = [part.split("}")[0] for part in message.split("{")[1:]]
    with pytest.raises(UsageError) as refused:
        Recipe(**parameters)
    assert str(refused.value).startswith(message.format(**{name: name for name in names}))
    code, out, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *options)
    told = {name: as_option.get(name, f"--{name.replace('_', '-')}") for name in names}
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message.format(**told)}"), err


def test_the_same_refusals_of_other_commands(tmp_path, monkeypatch, capsys):
    novel = demo.text_path("heldout", "novel")
    small = PRESETS["small"]["global"]
    with pytest.raises(UsageError, match=r"^learning_rate must be positive, got 0"):
        dataclasses.replace(small, learning_rate=0.0)
    with pytest.raises(UsageError, match=r"^batch_size must be a multiple of micro_batch=3, got 4$"):
        dataclasses.replace(small, batch_size=4, micro_batch=3)
    _, tokenizer = demo.load()
    with pytest.raises(UsageError, match=r"^stride must lie in 1\.\.16 \(the window\), got 99$"):
        text.evaluation_windows(novel, tokenizer, 16, stride=99)
    distill = ("distill", "demo", "--teacher", "demo", "-o", tmp_path / "out")
    for words, told in (
        ((*distill, "--lr", 0), "--lr must be positive, got 0"),
        (
            (*distill, "--batch-size", 4, "--micro-batch", 3),
            "--batch-size must be a multiple of --micro-batch 3, got 4",
        ),
        (("eval", "demo", "--text", novel, "--length", 16, "--stride", 99), "--stride must lie in 1..16 (the window)"),
    ):
        code, out, err = run(monkeypatch, capsys, *words)
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith(f"error: {told}"), err


@pytest.mark.parametrize(
    ("command", "said", "told"),
    [
        ("prune", "got weights=None and no share", "got --weights none and no share"),
        ("prune", "for saliency='wanda', update='none', got", "for --saliency wanda, --update none, got"),
        ("prune", "go on with allow_pruned=True.", "go on with --allow-pruned."),
        ("prune", "images: give compare_uniform=False", "images: give --no-compare-uniform"),
        ("calibrate", "the same again with resume=True goes on", "the same again with --resume goes on"),
        ("prune", "give more text or samples=6 or length=12", "give more text or --samples 6 or --length 12"),
        (
            "prune",
            "expert_floor must be given with expert_budget='global'",
            "--expert-floor must be given with --budget global",
        ),
        ("distill", "learning_rate must be positive, got 0", "--lr must be positive, got 0"),
        ("distill", "batch_size must divide by micro_batch=3", "--batch-size must divide by --micro-batch 3"),
        # an option of another command
        ("distill", "prune with output_dtype='bfloat16' what", "prune with --output-dtype bfloat16 what"),
        # words that are no parameters where they stand
        ("prune", "removing experts must leave samples", "removing experts must leave samples"),
        ("prune", "got the file /tmp/max_memory/seed=3.txt", "got the file /tmp/max_memory/seed=3.txt"),
        ("prune", "--samples must be 3", "--samples must be 3"),
    ],
)
def test_parameters_become_options(command, said, told):
    assert in_options(said, options_of(get_command(app).commands, command)) == told


@pytest.fixture
def gone(tmp_path):
    """Of every file and folder that an argument can name: one that is not there."""
    return tmp_path / "gone"


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (("prune", "GONE", "OUT"), "MODEL"),
        (("prune", "demo", "OUT", "--calibration", "GONE"), "--calibration"),
        (("prune", "demo", "OUT", "--calibration", "GONE=law", "--whole"), "--calibration"),
        (("prune", "demo", "OUT", "--plan", "GONE"), "--plan"),
        (("prune", "demo", "OUT", "--scores", "GONE", "--experts", "0.5"), "--scores"),
        (("prune", "demo", "OUT", "--statistics", "GONE", "--experts", "0.5", "--update", "none"), "--statistics"),
        (("prune", "GONE.gguf", "OUT.gguf", "--plan", "GONE"), "--plan"),
        (("calibrate", "GONE", "OUT"), "MODEL"),
        (("calibrate", "demo", "OUT", "--calibration", "GONE"), "--calibration"),
        (("distill", "GONE", "--teacher", "demo", "-o", "OUT"), "STUDENT"),
        (("distill", "demo", "--teacher", "GONE", "-o", "OUT"), "--teacher"),
        (("distill", "demo", "--teacher", "demo", "-o", "OUT", "--calibration", "GONE"), "--calibration"),
        (("eval", "GONE"), "MODEL"),
        (("eval", "demo", "--text", "GONE"), "--text"),
        (("report", "demo", "--before", "GONE", "-o", "OUT"), "--before"),
        (("inspect", "GONE"), "MODEL"),
        (("pack", "GONE", "OUT"), "MODEL"),
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_named_before_the_plan(words, argument, gone, tmp_path, monkeypatch, capsys):
    places = {"GONE": str(gone), "OUT": str(tmp_path / "out")}
    words = [word.replace("GONE", places["GONE"]).replace("OUT", places["OUT"]) for word in words]
    if argument == "MODEL" and words[0] == "eval":
        words += ["--text", str(demo.text_path("heldout", "novel"))]
    code, out, err = run(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {argument} must be "), err
    assert str(gone) in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_a_wrong_argument_and_no_checkpoint(gone):
    with pytest.raises(UsageError, match=r"MODEL must be a local folder .*gone': there is no such folder") as refused:
        load_pretrained(gone)
    assert isinstance(refused.value, CheckpointError)


@pytest.fixture
def own(tmp_path):
    """A model of one's own with the tokenizer of the embedded one, and one with another."""
    for name, tokenizer in (("alike", demo.load()[1]), ("other", make_tokenizer())):
        tiny_model("qwen3_moe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    shutil.copy(demo.model_path() / "tokenizer.json", tmp_path / "alike")
    return tmp_path


SMALL = ("--samples", "6", "--length", "16")


def test_the_embedded_text_is_not_taken_without_a_word(own, tmp_path, monkeypatch, capsys):
    said = f"no --calibration: the embedded texts are taken ({', '.join(demo.DOMAINS)}), because {own / 'alike'} has"
    rules = ("--saliency", "wanda", "--update", "none")
    code, _, err = run(monkeypatch, capsys, "prune", own / "alike", tmp_path / "a", *rules, *SMALL)
    assert code == 0 and err.startswith(said)
    code, _, err = run(monkeypatch, capsys, "calibrate", own / "alike", tmp_path / "b", "--whole", *SMALL, "--json")
    assert code == 0 and err.startswith(said)
    code, _, err = run(monkeypatch, capsys, "calibrate", "demo", tmp_path / "c", *SMALL)
    assert code == 0 and "no --calibration" not in err
    rules = ("--saliency", "magnitude", "--update", "none")
    code, _, err = run(monkeypatch, capsys, "prune", own / "alike", tmp_path / "d", *rules)
    assert code == 0 and "no --calibration" not in err


@pytest.mark.parametrize("command", ["prune", "calibrate"])
@pytest.mark.parametrize("how", [(), ("--whole",)])
def test_a_model_without_text_is_refused_before_the_plan(command, how, own, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, command, own / "other", tmp_path / "out", *how)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: --calibration must name text for this model"), err
    assert "calibration tokens" not in err
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_told_in_options(own, tmp_path, monkeypatch, capsys):
    file = tmp_path / "short.txt"
    file.write_text("the quick brown fox " * 40)
    how = ("--calibration", file, "--samples", "40", "--length", "64")
    code, _, err = run(monkeypatch, capsys, "calibrate", own / "other", tmp_path / "out", *how)
    assert code == 1
    assert "times as much) or --samples " in err and "--length" not in err
    with pytest.raises(CalibrationError, match=r"times as much\) or samples=\d+$"):
        text.windows(file, make_tokenizer(), samples=40, length=64)
