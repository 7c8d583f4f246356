"""`moesparse prune --recipe`: a file or a published name, options over its fields, and what contradicts it."""

import json
import re
import sys
import warnings

import pytest

from moesparse.checkpoints.history import REPORT_FILE
from moesparse.cli import main, options
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.recipe_file import PUBLISHED

SMALL = ("--samples", "6", "--length", "32", "--device", "cpu")


def run(monkeypatch, capsys, *words):
    """(exit code, standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
        main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def recipe_of(folder):
    return json.loads((folder / REPORT_FILE).read_text())["recipe"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_by_its_name(name, tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", "--recipe", name, *SMALL)
    assert code == 0, err
    assert recipe_of(tmp_path / "out") == Recipe.load(name).on(None).to_dict()


def test_the_options_of_a_recipe_give_what_its_file_gives(tmp_path, monkeypatch, capsys):
    words = ("--saliency", "moe-pruner", "--update", "none", "--seed", "3")
    Recipe(saliency="moe-pruner", update="none", seed=3).save(tmp_path / "mine.yaml")
    for name, how in (("options", words), ("file", ("--recipe", tmp_path / "mine.yaml"))):
        code, _, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / name, *how, *SMALL)
        assert code == 0, err
    # the seed is that of the windows too
    manifests = [(tmp_path / name / "moesparse_manifest.json").read_bytes() for name in ("options", "file")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (("--recipe", "paper", "--weights", "4:8"), {"weights": "4:8", "saliency": "moe-pruner", "update": "none"}),
        (("--recipe", "paper", "--saliency", "magnitude", "--seed", "0"), {"saliency": "magnitude", "seed": 0}),
        (("--recipe", "FILE", "--propagate", "--mix", "pooled"), {"propagate": True, "expert_mix": "pooled"}),
        (("--recipe", "FILE", "--experts", "0.5"), {"experts": 0.5, "propagate": False, "weights": "2:4"}),
        (("--recipe", "FILE"), {"experts": 0.25, "propagate": False, "expert_mix": "equal", "weights": "2:4"}),
        (("--recipe", "FILE", "--weights", "none"), {"experts": 0.25, "weights": None}),
    ],
)
def test_options_override_the_fields_of_the_file(words, fields, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("saliency: magnitude\nupdate: none\nseed: 5\npropagate: no\nexperts: 0.25\nexpert_mix: equal\n")
    words = [file if word == "FILE" else word for word in words]
    code, _, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *words, *SMALL)
    assert code == 0, err
    found = recipe_of(tmp_path / "out")
    assert {name: found[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--recipe", "reap-25", "--keep-experts", "12"),
            "only one of --experts and --keep-experts may be given, got 0.25 and 12; --recipe reap-25 says weights: "
            "None, experts: 0.25, expert_saliency: reap",
        ),
        (
            ("--recipe", "reap-25", "--target-bytes", "0.7"),
            "--experts must be left out with --target-bytes, which chooses it, got 0.25; --recipe reap-25",
        ),
        (("--recipe", "paper", "--divisible-by", "4"), "--divisible-by must come with --experts or --keep-experts"),
        (("--recipe", "reap-25", "--plan", "PLAN"), "--experts, --keep-experts and --scores must be left out with --p"),
        # names of the file, which is no command line
        (("--recipe", "TYPO"), "must hold fields of a recipe, got 'weigths'; the nearest is 'weights'"),
        (("--recipe", "KIND"), "'keep_experts' in "),
        (("--recipe", "papre"), "--recipe must be a YAML file, or one of cpu, default, paper, reap-25, got 'papre'"),
    ],
)
def test_what_contradicts_a_recipe_is_named(words, message, tmp_path, monkeypatch, capsys):
    typo = tmp_path / "typo.yaml"
    typo.write_text("weigths: 2:4\n")
    kind = tmp_path / "kind.yaml"
    kind.write_text("keep_experts: some\n")
    words = [{"TYPO": typo, "KIND": kind, "PLAN": tmp_path / "plan.json"}.get(word, word) for word in words]
    code, out, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert message in err, err
    assert not (tmp_path / "out").exists()


def test_the_help_names_the_published_recipes():
    (text,) = (each.help for each in options.Recipe.__metadata__)
    named = re.search(r"a published recipe: ([\w, -]+)\.", text)[1]
    assert tuple(named.split(", ")) == PUBLISHED
