"""The scripts of examples/ run as their first lines say, and print what they promise."""

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from processes import Started

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_file(file, arguments):
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")


def run(name, *arguments, **options):
    return Started(run_file, EXAMPLES / name, [*map(str, arguments)], **options).ended_well().stdout


def test_there_are_tests_for_all_of_them_and_they_are_short():
    scripts = list(EXAMPLES.glob("*.py"))
    here = Path(__file__).read_text()
    assert {script.name for script in scripts} == set(re.findall(r'run\("(\w+\.py)"', here))
    assert all(len(script.read_text().splitlines()) < 60 for script in scripts)


def test_prune_and_pack(tmp_path):
    out = run("prune_and_pack.py", "--out", tmp_path / "both", "--samples", "12")
    assert "50% of the expert weights are zero" in out
    dense, packed = map(float, re.findall(r"(\d+\.\d) MB", out))
    # 8.26 of the 11.2 MB are experts, and 9/16 of their bytes stay
    assert packed < 0.7 * dense
    assert (tmp_path / "both" / "packed" / "config.json").is_file()


def test_remove_experts():
    out = run("remove_experts.py", "--windows", "2")
    assert out.count("12 of 16 experts stay") == 4
    figures = {name: (float(a), float(b)) for name, a, b in re.findall(r"(\w+) +([\d.]+) +([\d.]+)\n", out)}
    costs = {name: after / before for name, (before, after) in figures.items()}
    # what was kept is what code needs
    assert min(costs, key=costs.get) == "code"
    assert costs["code"] < 1.3 < costs["scripture"]


def test_serve_and_chat():
    pytest.importorskip("openai")
    out = run("serve_and_chat.py", "--prompt", "And the LORD spake unto")
    completion, chat = re.fullmatch(r"completion: (.*)\nchat: (.*)\n", out, re.DOTALL).groups()
    assert completion.startswith("And the LORD spake unto Moses")
    assert chat == completion


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # shipped as it is before the first run
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    assert not any(line.startswith(("!", "%")) for cell in code for line in cell.splitlines())
    file = tmp_path / "cells.py"
    file.write_text("\n".join(code))
    out = run(file, place=tmp_path, environment={"TMPDIR": str(tmp_path)})
    assert "4 blocks of experts" in out and "50% of the expert weights are zero" in out
    dense, packed = map(float, re.findall(r"(\d+\.\d) MB", out))
    assert packed < 0.7 * dense
    assert "It is a truth universally acknowledged, that" in out


def test_the_image_is_made_as_the_quick_start_installs():
    """There is no engine here to build it: what its steps name must be there."""
    text = (EXAMPLES.parent / "Dockerfile").read_text()
    steps = re.sub(r"\\\n\s*", "", text).splitlines()
    words = [step.split(maxsplit=1) for step in steps if step and not step.startswith("#")]
    assert [word for word, _ in words] == ["FROM", "RUN", "COPY", "RUN", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD"]
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    installed = set(re.search(r'pip install --no-cache-dir "/src\[(.*?)\]"', text)[1].split(","))
    page = (EXAMPLES.parent / "docs" / "quickstart.md").read_text()
    wanted = set(re.search(r"^pip install '[\w./-]*\[(.*?)\]'", page, re.MULTILINE)[1].split(","))
    assert wanted <= installed <= set(project["optional-dependencies"])
    assert json.loads(words[-2][1])[0] in project["scripts"]
    oldest = tuple(map(int, re.search(r"(\d+)\.(\d+)", project["requires-python"]).groups()))
    assert tuple(map(int, re.search(r"python:(\d+)\.(\d+)", text).groups())) >= oldest
