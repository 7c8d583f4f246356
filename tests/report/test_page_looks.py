"""The page as a browser takes it: one tree, both colour schemes, narrow windows, and its JSON."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from moesparse.calibration.whole import calibrate
from moesparse.checkpoints.history import REPORT_FILE
from moesparse.checkpoints.pretrained import save_pretrained
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.report.findings import Findings, read_checkpoint, read_routing
from moesparse.report.sections import build
from moesparse.testing import tiny_model

pytest.importorskip("matplotlib")

RECIPE = Recipe(weights="2:4", keep_experts=6, saliency="moe-pruner", update="least-squares")
VOID = {"br", "hr", "img", "link", "meta"}
# 400 px at 16 px a rem
NARROW = {"px": 400, "rem": 25, "em": 25, "pt": 300}


def windows(seed):
    return torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(seed))


def result(perplexity):
    row = {"file": "law.txt", "name": "law", "perplexity": perplexity, "bits_per_byte": 1.0, "tokens": 100}
    return {"perplexity": perplexity, "files": [row], "protocol": {"window": 256, "stride": 256, "bos": False}}


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """All that a page can show but a budget."""
    root = tmp_path_factory.mktemp("made")
    model = tiny_model("mixtral")
    for name, seed in (("law", 1), ("code", 2)):
        calibrate(model, windows(seed)).save(root / f"{name}.stats")
    done = prune(model, windows(1), RECIPE)
    save_pretrained(model, root / "pruned", recipe=done.recipe, report=done.to_dict())
    routing = read_routing({name: root / f"{name}.stats" for name in ("law", "code")})
    return Findings("A <page>", read_checkpoint(root / "pruned"), routing, before=result(4.0), after=result(5.0))


@pytest.fixture(scope="module")
def html(findings):
    return build(findings).to_html()


class Tree(HTMLParser):
    """Each element with those it lies in, outermost first; a tag that closes another one is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        assert len(dict(attributes)) == len(attributes), attributes
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open)
        self.open.pop()


def test_it_is_one_tree_whose_ids_differ_and_are_all_found(html):
    elements = Tree(html).elements
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(ids) > 20 and len(set(ids)) == len(ids)
    named = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html))
    assert named and {one or other for one, other in named} <= set(ids)
    assert not re.search(r"<\?xml|<!DOCTYPE svg|<metadata|xmlns", html)


def test_tables_scroll_in_their_own_box_and_figures_have_a_slim_form(html):
    elements = Tree(html).elements
    tables = [above[-1][1] for tag, _, above in elements if tag == "table"]
    assert len(tables) == 6
    assert all(box == {"class": "wide", "tabindex": "0"} for box in tables)
    assert ".wide { overflow-x: auto; }" in html
    forms = [(above[-1][1]["class"], attributes) for tag, attributes, above in elements if tag == "svg"]
    assert [form for form, _ in forms] == ["broad", "slim"] * 6
    assert {(form, attributes["width"]) for form, attributes in forms} == {("broad", "648pt"), ("slim", "302.4pt")}
    assert re.search(r"^.slim { display: none; }$", html, re.MULTILINE)
    assert "(max-width: 40rem) { .slim { display: block; } .broad { display: none; }" in html


def test_nothing_is_wider_than_a_narrow_window(html):
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", style)
    assert len(rules) > 20
    fixed = {
        selector.strip()
        for selector, body in rules
        for size, unit in re.findall(r"(?<!max-)\bwidth: ([\d.]+)(px|rem|em|pt)", body)
        if float(size) > NARROW[unit]
    }
    assert fixed == set()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html


def luminance(colour):
    """Of WCAG 2.2, of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_both_colour_schemes_can_be_read(html):
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", each)) for each in re.findall(r":root \{([^}]*)\}", html)]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    assert "color-scheme: light dark" in html
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert luminance(schemes[0]["paper"]) > 0.9 and luminance(schemes[1]["paper"]) < 0.02
    for scheme in schemes:
        assert contrast(scheme["ink"], scheme["paper"]) > 12
        assert contrast(scheme["soft"], scheme["paper"]) > 4.5
        assert contrast(scheme["link"], scheme["paper"]) > 4.5


def test_figures_take_the_colours_of_the_page(html):
    figures = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    assert len(figures) == 12
    for figure in figures:
        assert "var(--ink)" in figure
        assert "#1a1a1a" not in figure and "#fefefe" not in figure
        # the sheet of matplotlib, which would be white in the dark
        assert not re.search(r'id="[\w-]*patch_1">\s*<path [^>]*fill: #', figure)
    assert any("var(--paper)" in figure for figure in figures)


def test_what_it_was_drawn_from_can_be_saved(findings, html):
    name, data = re.search(r'<a download="([^"]*)" href="data:application/json;base64,([^"]*)"', html).groups()
    held = json.loads(base64.b64decode(data))
    assert name == "report.json"
    assert held == json.loads(json.dumps(findings.to_dict()))
    run = json.loads((findings.checkpoint.folder / REPORT_FILE).read_text())
    assert (held["report"], held["recipe"]["keep_experts"], held["perplexity after"]["perplexity"]) == (run, 6, 5.0)
    assert held["routing"]["tokens per expert"]["law"] == findings.routing.domains["law"].tolist()


def test_what_was_read_is_said_in_words(findings):
    checkpoint = findings.checkpoint
    sources = [
        {"source": "law.jsonl", "documents": 1, "chats": 0, "chat_template": None},
        {"source": "chats.jsonl", "documents": 1200, "chats": 1200, "chat_template": "abc"},
    ]
    run = {**checkpoint.run, "calibration": {**checkpoint.run["calibration"], "sources": sources}}
    text = build(dataclasses.replace(findings, checkpoint=dataclasses.replace(checkpoint, run=run))).to_html()
    assert "law.jsonl (1 document), chats.jsonl (1,200 documents, 1,200 of them chats)" in text
    assert "<td>propagate</td><td>yes</td>" in text


def test_the_recipe_stands_in_words_above_its_fields(html):
    words = "6 experts of every block stay, chosen by reap; those that stay are refitted. Of the experts, 2 of every 4"
    assert f"<p>{words}" in html
