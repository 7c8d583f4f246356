"""The scripts of examples/ run as their first lines say, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
