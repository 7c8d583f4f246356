"""A folder that is pruned again says what all of its steps were: config.json, report, card, `inspect` and the page."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import moesparse
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.history import REPORT_FILE, card_after, joined_recipe, noted_with
from moesparse.checkpoints.inspection import inspect_folder
from moesparse.checkpoints.pretrained import load_pretrained, save_pretrained
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.cli import app
from moesparse.distillation import Settings, distill_checkpoint
from moesparse.distillation.card import distilled_card
from moesparse.pruning.card import model_card
from moesparse.testing import tiny_model

WEIGHTS = moesparse.Recipe(saliency="magnitude", update="none")
EXPERTS = moesparse.Recipe(weights=None, update="none", keep_experts=5, expert_saliency="frequency")


def windows():
    return torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(1))


def step(source, out, recipe, whole=False):
    """One command."""
    name, allow = str(source), {"allow_pruned": True}
    if not whole:
        card = lambda report: model_card(name, report)  # noqa: E731
        return moesparse.prune_checkpoint(source, out, windows(), recipe, card=card, **allow)
    model, _ = load_pretrained(source)
    report = moesparse.prune(model, windows(), recipe, **allow)
    noted = {"recipe": report.recipe, "report": report.to_dict(), "card": model_card(name, report)}
    save_pretrained(model, out, source=source, **noted)
    return report


def noted(folder):
    return json.loads((folder / "config.json").read_text())["moesparse"]


def told(folder):
    return json.loads((folder / REPORT_FILE).read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history") / "source"
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def removed(source):
    step(source, source.parent / "removed", EXPERTS)
    return source.parent / "removed"


@pytest.fixture(scope="module")
def pruned(source):
    step(source, source.parent / "pruned", WEIGHTS)
    return source.parent / "pruned"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("first", ["experts", "weights"])
def test_both_steps_stay(first, whole, source, removed, pruned, tmp_path):
    before, then = (removed, WEIGHTS) if first == "experts" else (pruned, EXPERTS)
    report = step(before, tmp_path / "out", then, whole)
    # what a run returns is what that run did
    assert (report.experts is None) == (first == "experts")
    found, one, other = noted(tmp_path / "out"), told(removed), told(pruned)
    assert {key: found["recipe"][key] for key in ("weights", "saliency", "keep_experts", "expert_saliency")} == {
        "weights": "2:4",
        "saliency": "magnitude",
        "keep_experts": 5,
        "expert_saliency": "frequency",
    }
    assert found["earlier"] == [noted(before)["recipe"]]
    assert found["kept_experts"].keys() == noted(removed)["kept_experts"].keys()
    # the report is that of both, and each step's own is there
    whole_report = told(tmp_path / "out")
    assert whole_report["earlier"] == [{key: value for key, value in told(before).items() if key != "earlier"}]
    assert whole_report["fingerprint"] == told(source.parent / "removed")["fingerprint"] == other["fingerprint"]
    assert whole_report["sizes"]["before"] == one["sizes"]["before"]
    # 5 of 8 experts, 9/16 of bf16 at 2:4
    after = whole_report["sizes"]["after"]
    assert after["experts"] * 8 == one["sizes"]["before"]["experts"] * 5
    assert after["packed"] * 16 == after["experts"] * 9
    assert len(whole_report["experts"]["blocks"]) == len(whole_report["blocks"]) == 2
    for block in whole_report["blocks"]:
        assert block["experts"] == 5 and all(tensor["shape"][0] == 5 for tensor in block["tensors"])
    assert whole_report["sparsity"] == 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 of 8 experts kept" in card and "experts pruned to 2:4" in card
    assert card.count("---\n") == 2 and card.count("\n## Before that: ") == 1
    # and it holds: all that differs from the first model is explained
    assert inspect_folder(tmp_path / "out").problems == []
    assert compare_folders(tmp_path / "out", source).problems == []


def test_packed_and_unpacked_it_says_the_same(removed, tmp_path):
    step(removed, tmp_path / "out", WEIGHTS)
    pack_folder(tmp_path / "out", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "dense")
    for name in ("packed", "dense"):
        assert noted(tmp_path / name) == noted(tmp_path / "out") and told(tmp_path / name) == told(tmp_path / "out")
    assert "5 of 8 experts kept" in (tmp_path / "packed" / "README.md").read_text()
    assert (tmp_path / "dense" / "README.md").read_text() == (tmp_path / "out" / "README.md").read_text()


def test_commands_and_the_page_show_both(removed, tmp_path):
    step(removed, tmp_path / "out", WEIGHTS)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")], env={"COLUMNS": "200"})
    said = "5 experts of every block stay, chosen by frequency"
    assert re.search(rf"^{said}\. Of the experts, 2 of every 4 weights stay", shown.stdout, re.MULTILINE)
    assert f"step 1 before: {said}.\n" in shown.stdout
    pytest.importorskip("matplotlib")
    page = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "-o", str(tmp_path / "page.html")])
    assert page.exit_code == 0, page.output
    text = (tmp_path / "page.html").read_text()
    assert "5 of 8" in text and "chosen by frequency" in text and "2:4" in text and "Step 1 before that:" in text


def test_a_third_and_a_repeated_step(source, removed, tmp_path):
    """Experts, distilled, experts again, weights: every recipe and every report is there, in their order."""
    with torch.no_grad():
        model, _ = load_pretrained(removed)
        model.model.layers[0].mlp.experts.down_proj += 0.01
    student = tmp_path / "student"
    save_pretrained(model, student, source=removed, report=told(removed), card=(removed / "README.md").read_text())
    # a report that is the source's own is no step of its own
    assert told(student) == told(removed)
    text = lambda report: distilled_card((student / "README.md").read_text(), "source", report, 4, 16)  # noqa: E731
    settings = Settings(epochs=1, batch_size=4)
    distill_checkpoint(student, source, tmp_path / "d1", windows(), settings=settings, card=text)
    step(tmp_path / "d1", tmp_path / "again", moesparse.Recipe(weights=None, update="none", keep_experts=3))
    step(tmp_path / "again", tmp_path / "out", WEIGHTS)
    found = noted(tmp_path / "out")
    assert [each["keep_experts"] for each in [*found["earlier"], found["recipe"]]] == [5, 3, 3]
    assert [each["weights"] for each in [*found["earlier"], found["recipe"]]] == [None, None, "2:4"]
    assert all("distillation" in each for each in [*found["earlier"], found["recipe"]])
    reports = told(tmp_path / "out")["earlier"]
    assert [len(each["experts"]["blocks"][0]["kept"]) for each in reports] == [5, 3]
    assert "distillation" in reports[0]
    card = (tmp_path / "out" / "README.md").read_text()
    places = [
        card.index(text) for text in ("pruned to 2:4", "3 of 5 experts", "5 of 8 experts", "blockwise distillation")
    ]
    assert places == sorted(places)


def test_a_refit_of_experts_whose_weights_were_pruned_takes_their_pattern(pruned, tmp_path):
    step(pruned, tmp_path / "out", moesparse.Recipe(weights=None, update="least-squares", keep_experts=5))
    found = noted(tmp_path / "out")
    assert found["recipe"]["weights"] is None and found["earlier"][0]["weights"] == "2:4"
    assert told(tmp_path / "out")["blocks"] == [] and told(tmp_path / "out")["earlier"][0]["blocks"]
    assert inspect_folder(tmp_path / "out").problems == []


def test_one_command_of_two_steps_is_one_step(source, tmp_path):
    both = moesparse.Recipe(weights="2:4", update="none", saliency="magnitude", keep_experts=5)
    step(source, tmp_path / "out", both)
    assert "earlier" not in noted(tmp_path / "out") and told(tmp_path / "out").get("earlier", []) == []
    assert "Before that" not in (tmp_path / "out" / "README.md").read_text()


def test_one_command_of_two_steps_on_a_pruned_folder(removed, tmp_path):
    both = moesparse.Recipe(weights="2:4", update="none", saliency="magnitude", keep_experts=3)
    step(removed, tmp_path / "out", both)
    found, report = noted(tmp_path / "out"), told(tmp_path / "out")
    assert found["earlier"] == [noted(removed)["recipe"]] and len(report["earlier"]) == 1
    assert (found["recipe"]["keep_experts"], found["recipe"]["weights"]) == (3, "2:4")
    assert len(report["experts"]["blocks"][0]["kept"]) == 3 and report["blocks"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 of 5 experts kept, experts pruned to 2:4" in card and "5 of 8 experts kept" in card


def test_recipes_and_notes_alone():
    old = EXPERTS.to_dict()
    new = WEIGHTS.to_dict()
    assert joined_recipe(None, new) == new
    both = joined_recipe(old, new)
    assert both == joined_recipe(both, new) == {**new, **{key: old[key] for key in old if "expert" in key}}
    # without a report the note itself knows the step before, once
    note = noted_with({"recipe": old, "kept_experts": {}}, new, None, "1")
    assert note == {"recipe": both, "kept_experts": {}, "version": "1", "earlier": [old]}
    assert noted_with(note, both, None, "1") == note
    # a recipe as it was written, its rules not chosen yet: those that stay were refitted and hold no pattern
    written = moesparse.Recipe(weights=None, experts=0.25).to_dict()
    assert written["update"] == "auto"
    assert joined_recipe(new, written)["weights"] is None
    assert joined_recipe(new, {**written, "update": "none"})["weights"] == new["weights"]


def test_a_card_stands_behind_the_next_one_once():
    first = "---\ntags: [a]\n---\n# m, 5 of 8 experts kept\n\ntext\n"
    second = card_after("---\ntags: [b]\n---\n# e, pruned\n\nmore\n", first)
    assert second == "---\ntags: [b]\n---\n# e, pruned\n\nmore\n\n## Before that: m, 5 of 8 experts kept\n\ntext\n"
    assert card_after(second, first) == second
    assert re.findall(r"^#+ .*", card_after("# third\n", second), re.M) == [
        "# third",
        "## Before that: e, pruned",
        "## Before that: m, 5 of 8 experts kept",
    ]
