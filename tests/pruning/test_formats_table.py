"""docs/formats.md says of every format what works; behind each cell stands a test that goes through all of them."""

import re
from pathlib import Path

import pytest
from quantised_folders import CASES, write_quantised

from moesparse.models.on_disk import LayersOnDisk

HERE = Path(__file__).parent
COLUMNS = ("calibrate", "remove", "zero", "update", "plain", "GGUF")


def rows(heading):
    """Cells of the table under a heading row of docs/formats.md."""
    lines = (HERE.parents[1] / "docs/formats.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return [[each.strip() for each in lines[start].strip("|").split("|")], *found]
        found.append([each.strip() for each in line.strip("|").split("|")])
    return found


def test_every_column_has_a_test_that_takes_all_cases():
    tests = {column: re.findall(r"`(test_\w+)`", test) for column, _, test in rows("| column |")[1:]}
    assert tuple(tests) == COLUMNS
    code = "".join(file.read_text() for file in HERE.glob("test_*.py") if file != Path(__file__))
    for (name,) in tests.values():
        assert f'@pytest.mark.parametrize("case", CASES)\ndef {name}(case, tmp_path)' in code, name


@pytest.fixture(scope="module")
def said():
    """Format -> column -> what the table says."""
    heading, *lines = rows("| format |")
    assert tuple(heading[2:-1]) == COLUMNS
    return {line[0].strip("`"): dict(zip(COLUMNS, line[2:-1], strict=True)) for line in lines}


def test_every_format_that_the_table_says_works_is_among_the_cases(said, tmp_path):
    formats = set()
    for case in CASES:
        formats |= set(LayersOnDisk(write_quantised(tmp_path / case, case)).open().shards.formats)
    works = {name for name, cells in said.items() if set(cells.values()) == {"yes"}}
    assert works == formats
    assert set(said) - formats == {"packed_nm", "GGUF"}


def test_of_a_gguf_file_experts_are_removed_and_nothing_else(said):
    assert said["GGUF"] == dict.fromkeys(("zero", "update", "plain"), "no") | {
        "calibrate": "on a copy",
        "remove": "yes",
        "GGUF": "yes",
    }
