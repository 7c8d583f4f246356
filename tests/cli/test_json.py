"""docs/json.md names the keys that every command prints with --json, those one level deeper too, and no others."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moesparse
from moesparse.calibration.statistics import ModelStatistics
from moesparse.cli import app
from moesparse.cli.console import SCHEMAS
from moesparse.experts.plan_file import ExpertPlan
from moesparse.report.findings import read_results
from moesparse.testing import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
# what takes images, the hub, or a machine where something fails
RARE = {"prune": {"calibration.images", "experts.method", "experts.readers", "pushed"}, "bench": {"rows[].reason"}}
RARE |= {"distill": {"pushed"}, "pack": {"pushed"}}
QUICK = ("--saliency", "moe-pruner", "--update", "none")


def documented():
    """Name of an object -> the keys that the page lists."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        bullets = re.findall(r"^- (.*?): ", body, re.MULTILINE | re.DOTALL)
        found[title.strip("`")] = {key for bullet in bullets for key in re.findall(r"`([^`]+)`", bullet)}
    return found


def keys_of(value, known):
    """The keys of an object in the page's words."""
    found = set()
    for key, each in value.items():
        free = {f"{key}.*", f"{key}[].*"} & known
        below = {name for name in known if name.startswith((f"{key}.", f"{key}[]."))}
        if free:
            found |= free
        elif isinstance(each, dict):
            found |= {f"{key}.{name}" for name in each}
        elif isinstance(each, list) and each and all(isinstance(one, dict) for one in each):
            found |= {f"{key}[].{name}" for one in each for name in one}
        elif not below:
            # else it is null or empty, where other runs have an object or a list of them
            found.add(key)
    return found


class Commands:
    """Runs commands on small models, and keeps what they print by the name of the object."""

    def __init__(self):
        self.printed = {}

    def run(self, *arguments, code=0):
        words = [*map(str, arguments), "--json"]
        result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        assert result.exit_code == code, (words, result.exception, result.output)
        found = json.loads(result.stdout)
        assert next(iter(found)) == "schema"
        self.printed.setdefault(found.pop("schema"), []).append(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Mixtral with a tokenizer of 64 words, and a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("json")
    tiny_model("mixtral").save_pretrained(path / "dense")
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path / "dense")
    ids = torch.randint(3, 60, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    (path / "text.txt").write_text(" ".join(f"w{number}" for number in ids))
    return path


@pytest.fixture(scope="module")
def printed(place):
    """What the commands print, by the name of the object; what lacks a library is left out."""
    commands, dense, pruned = Commands(), place / "dense", place / "pruned"
    text = ("--calibration", place / "text.txt", "--samples", 8, "--length", 32)
    budget = ("prune", dense, place / "budget", *text, *QUICK, "--target-bytes", 0.7)
    commands.run("prune", dense, place / "out", *text, "--dry-run")
    commands.run(*budget, "--dry-run")
    commands.run(*budget)
    commands.run("prune", dense, pruned, *text, "--experts", 0.25, "--weights", "2:4")
    commands.run("prune", dense, place / "own", *text, "--experts", 0.25, "--demonstrations-from-model", 8)
    files = ("--experts", 0.25, "--plan", place / "plan.json", "--scores", place / "scores.json")
    commands.run("calibrate", dense, place / "stats", *text, *files)
    saved = ("--experts", 0.25, "--update", "none", "--statistics", place / "stats")
    commands.run("prune", dense, place / "saved", *saved)
    commands.run("inspect", pruned, "--verify", "--against", dense)
    commands.run("pack", pruned, place / "packed")
    commands.run("eval", dense, "--text", place / "text.txt", "--length", 32, "-o", place / "eval.json")
    for models in ((pruned,), (pruned, place / "packed")):
        commands.run("compare", dense, *models, "--text", place / "text.txt", "--length", 32, "--generate", 2)
    training = ("--teacher", dense, *text, "--epochs", 1, "--batch-size", 4, "--micro-batch", 4)
    commands.run("distill", pruned, *training, "-o", place / "global", "--logits", 0.5)
    commands.run("distill", pruned, *training, "-o", place / "blockwise", "--mode", "blockwise")
    for finished in (
        ("prune", dense, pruned, *text, "--experts", 0.25, "--weights", "2:4"),
        ("calibrate", dense, place / "stats"),
    ):
        commands.run(*finished, "--resume")
    commands.run("distill", pruned, *training, "-o", place / "blockwise", "--mode", "blockwise", "--resume")
    _stopped(dense, place / "stopped")
    commands.run("inspect", place / "stopped", code=1)
    commands.run("info")
    commands.run("bench", "--shape", "list")
    commands.run("bench", "--shape", "gpt-oss-20b", "--tokens", 3, "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["moesparse.cli.demo"], "METHODS", [("magnitude", "none")])
        commands.run("demo", "--windows", 1, "--output", place / "demo")
    if find_spec("matplotlib"):
        commands.run("report", pruned, "-o", place / "page.html", "--png", place / "figures")
    if find_spec("lm_eval"):
        commands.run("eval", "demo", "--tasks", "demo_last_word", "--limit", 2)
    if find_spec("gguf") and find_spec("xllamacpp"):
        _gguf(commands, place)
    return commands.printed


def _stopped(dense, out):
    def stop(event):
        if event.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moesparse.prune_checkpoint(dense, out, torch.randint(3, 60, (4, 16)), progress=stop)


def _gguf(commands, place):
    from gguf_files import minimax

    from moesparse.checkpoints.gguf import GGUFFiles
    from moesparse.pruning.gguf import GGUFModel

    source = minimax(place / "all.gguf", "Q4_0")
    model = GGUFModel(GGUFFiles(source))
    ExpertPlan.of(model.origin(model.layers), [torch.arange(12)] * 2, "reap").save(place / "gguf.json")
    commands.run("prune", source, place / "kept.gguf", "--plan", place / "gguf.json")
    commands.run("inspect", place / "kept.gguf")


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_page_lists_the_keys_that_are_printed(name, printed):
    schema = f"moesparse.{name}/{SCHEMAS[name]}"
    known = documented()[schema]
    if schema not in printed:
        pytest.skip(f"{schema} takes a library that is not installed")
    found = set().union(*(keys_of(value, known) for value in printed[schema]))
    assert found - known == set(), "printed, and not on the page"
    assert known - found == RARE.get(name, set()), "on the page, and not printed"


def test_the_page_lists_every_object():
    assert documented().keys() == {f"moesparse.{name}/{version}" for name, version in SCHEMAS.items()}


def test_files_that_are_read_again_may_bear_the_schema(printed, place):
    """`moesparse report --before` takes what `eval --json` prints and what its -o writes."""
    held = read_results(place / "eval.json")
    assert held["schema"] == "moesparse.eval/1"
    assert held["perplexity"] == printed["moesparse.eval/1"][0]["perplexity"]
    assert ModelStatistics.load(place / "stats").tokens == printed["moesparse.calibrate/1"][0]["tokens"]
