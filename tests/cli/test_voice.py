"""How much a command says: lines where there is no terminal, --quiet, --log-file, and MOESPARSE_LOG."""

import json
import re
import sys

import pytest

from moesparse.cli import main
from moesparse.cli.voice import voice

QUICK = ("--saliency", "wanda", "--update", "none", "--samples", "6", "--length", "32")
LAYERS = [f"prune: layer {number} of 4" for number in (1, 2, 3, 4)]


def run(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def layers(text):
    return re.findall(r"\d\d:\d\d:\d\d (prune: layer \d of 4), [\w. ]+, [\d,]+ tokens/s, .*peak [\w. ]+$", text, re.M)


def test_without_a_terminal_there_is_a_line_for_every_layer(tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *QUICK)
    assert (code, out) == (0, "")
    assert layers(err) == LAYERS
    assert re.search(r"prune: layer 1 of 4, .*about \d+ s left, planned .* in all", err)


def test_quiet_says_nothing_but_what_is_wrong(tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *QUICK, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["output"] == str(tmp_path / "out")
    code, out, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "out", *QUICK, "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("error: OUT must be a new or empty folder")
    # and the next command speaks again
    code, _, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "again", *QUICK)
    assert f"wrote {tmp_path / 'again'}" in err


def test_a_log_file_holds_the_command_its_layers_and_how_it_ended(tmp_path, monkeypatch, capsys):
    log = tmp_path / "logs" / "run.log"
    words = ("prune", "demo", tmp_path / "out", *QUICK, "--quiet", "--log-file", log)
    assert run(monkeypatch, capsys, *words) == (0, "", "")
    first, *lines, last = log.read_text().splitlines()
    assert " ".join(map(str, words[:3])) in first
    assert layers("\n".join(lines)) == LAYERS
    assert last.endswith(" done")
    code, _, _ = run(monkeypatch, capsys, *words)
    assert code == 1
    assert len(log.read_text().splitlines()) == len(lines) + 4
    assert " ended by CheckpointError: OUT must be a new or empty folder" in log.read_text()
    assert voice.log_file is None


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "inspect", "demo", "--log-file", tmp_path)
    assert code == 2
    assert f"--log-file must be a file to write, got the folder {tmp_path}" in err


def test_the_environment_chooses_for_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MOESPARSE_LOG", "none")
    code, _, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "one", *QUICK)
    assert code == 0 and layers(err) == [] and "wrote" in err
    monkeypatch.setenv("MOESPARSE_LOG", str(tmp_path / "log"))
    code, _, err = run(monkeypatch, capsys, "prune", "demo", tmp_path / "two", *QUICK)
    assert code == 0
    assert layers(err) == layers((tmp_path / "log").read_text()) == LAYERS
