"""The sections about what was lost: what `moesparse compare` found, whole, on a page that a browser reads."""

import json
import re

import pytest
import torch
from test_page_looks import Tree

import moesparse
from moesparse.checkpoints.pretrained import save_pretrained
from moesparse.errors import CheckpointError, UsageError
from moesparse.evaluate import compare
from moesparse.evaluate.continuations import make_prompts
from moesparse.pruning.recipe import Recipe
from moesparse.pruning.run import prune
from moesparse.report.findings import Findings, read_checkpoint, read_comparison
from moesparse.report.sections import build
from moesparse.testing import tiny_model

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("lost")
    model = tiny_model("mixtral")
    save_pretrained(model, root / "dense")
    windows = torch.randint(3, 60, (6, 40), generator=torch.Generator().manual_seed(0))
    done = prune(model, windows, Recipe(weights=None, keep_experts=6, saliency="moe-pruner", update="none"))
    save_pretrained(model, root / "pruned", recipe=done.recipe, report=done.to_dict())
    domains = ["law", "law", "code", "code", "French", "French"]
    prompts = make_prompts(windows[:4], domains[:4], count=2, length=8, new_tokens=64, temperature=1.0, context=128)
    more = {"languages": ["French"], "prompts": prompts, "load": lambda folder: moesparse.load_pretrained(folder)[0]}
    found = compare(root / "dense", [root / "pruned", root / "dense"], windows, domains, **more)
    models = [each.as_dict() for each in found]
    write(root / "one.json", {"schema": "moesparse.compare/1", **models[0]})
    write(root / "several.json", {"schema": "moesparse.compare.several/1", "dense": "dense", "models": models})
    return root


def write(path, value):
    path.write_text(json.dumps(value))


def page(place, **more):
    found = read_comparison(place / "one.json", place / "pruned") | more
    return build(Findings("A <page>", read_checkpoint(place / "pruned"), comparison=found)), found


def cells(html, title):
    """Rows of the tables of a section."""
    section = html.split(f"<h2>{title}</h2>")[1].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


def test_the_sections_hold_the_figures(place):
    made, found = page(place)
    html = made.to_html()
    titles = [section.title for section in made.sections]
    lost = ["What was lost", "Whom the routers choose instead", "The tokens that changed most", "What both write"]
    assert titles[1:5] == lost
    rows = {row[0]: row for row in cells(html, "What was lost")}
    for name, row in {**found["domains"], **found["languages"], "all": found}.items():
        wanted = [f"{row['kl']['mean']:.4f}", f"{row['agreement']['top1']:.1%}", f"{row['tokens']:,}"]
        assert [rows[name][at] for at in (1, 3, 8)] == wanted
    layers = cells(html, "Whom the routers choose instead")[1:]
    assert [row[0] for row in layers] == ["0", "1"]
    assert layers[0][1] == f"{found['layers'][0]['gone']:.1%}"
    first = found["changed"][0]
    assert cells(html, "The tokens that changed most")[1][:2] == [f"{first['kl']:.2f}", str(first["token"])]
    written = found["generation"]["greedy"]["pruned"]
    assert cells(html, "What both write")[2][1] == f"{written['loops']:.1%}"
    assert html.count('class="sides"') == len(found["generation"]["examples"]) == 4
    assert made.data["comparison"] == found


def test_it_is_one_tree_in_both_widths(place):
    made, _ = page(place)
    elements = Tree(made.to_html()).elements
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    names = [figure.name for section in made.sections for figure in section.figures]
    assert names[:4] == ["lost", "lost-positions", "lost-languages", "routers"]
    assert all(above[-1][1] == {"class": "wide", "tabindex": "0"} for tag, _, above in elements if tag == "table")
    style = made.to_html().split("<style>")[1].split("</style>")[0]
    assert ".sides { grid-template-columns: 1fr;" in style.split("(max-width: 40rem)")[1]


def test_warnings_are_said_first_and_markup_is_text(place):
    made, _ = page(place, warnings=["domain <b>law</b>: KL 1 is 4 times the mean"])
    html = made.to_html()
    assert '<ul class="warnings"><li>domain &lt;b&gt;law&lt;/b&gt;: KL 1' in html
    assert html.index('class="warnings"') < html.index("KL by domain")
    none = page(place, warnings=[])[0].to_html()
    assert '<ul class="warnings">' not in none and "No warning sign" in none


def test_what_both_write_alike_is_set_back(place):
    example = {"kind": "greedy", "domain": "law", "prompt": "a <b", "first_divergence": 2}
    example |= {"dense": "the same & on", "pruned": "the same & off", "loops": {"dense": False, "pruned": True}}
    _, found = page(place)
    html = page(place, generation=found["generation"] | {"examples": [example]})[0].to_html()
    assert '<b>dense</b><span class="same">the same &amp; o</span>n</div>' in html
    assert '<b>pruned, loops</b><span class="same">the same &amp; o</span>ff</div>' in html
    assert '<span class="same">a &lt;b</span>' in html


def test_without_routers_continuations_or_a_comparison(place):
    _, found = page(place)
    layers = [row | dict.fromkeys(("chosen", "kept", "gone", "taken_over")) for row in found["layers"]]
    made, _ = page(place, layers=layers, generation=None, loops=None, changed=[], languages={})
    assert [section.title for section in made.sections][1:3] == ["What was lost", "Whom the routers choose instead"]
    assert "so that the routers cannot be compared" in made.to_html()
    bare = build(Findings("A page", read_checkpoint(place / "pruned")))
    assert any("moesparse compare DENSE pruned -o lost.json" in sentence for sentence in bare.missing)


def test_a_comparison_is_read_of_its_model(place, tmp_path):
    one = read_comparison(place / "one.json", None)
    assert read_comparison(place / "several.json", place / "pruned")["kl"] == one["kl"]
    assert read_comparison(place / "several.json", place / "dense")["kl"]["mean"] == 0
    with pytest.raises(UsageError, match=r"several\.json must compare one model, got .*pruned, .*dense"):
        read_comparison(place / "several.json", None)
    with pytest.raises(UsageError, match=r"one\.json must compare other, got .*pruned"):
        read_comparison(place / "one.json", tmp_path / "other")
    write(tmp_path / "else.json", {"schema": "moesparse.eval/1"})
    with pytest.raises(UsageError, match=r"must be what `moesparse compare --json` prints, got another JSON file"):
        read_comparison(tmp_path / "else.json", None)
    with pytest.raises(CheckpointError, match="must be a readable JSON file"):
        read_comparison(tmp_path / "gone.json", None)
