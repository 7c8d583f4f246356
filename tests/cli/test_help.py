"""What --help shows first, and that shells can complete the commands without anything heavy."""

import sys

import pytest

from moesparse.cli import main

TEN = [
    "--recipe",
    "--weights",
    "--saliency",
    "--update",
    "--experts",
    "--calibration",
    "--samples",
    "--length",
    "--resume",
    "--dry-run",
]


def help_of(monkeypatch, capsys, command, columns=100):
    monkeypatch.setattr(sys, "argv", ["moesparse", command, "--help"])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().out


def panels(text):
    """Title of each panel in order -> the options it lists, in order."""
    found, title = {}, None
    for line in text.splitlines():
        if line.startswith("╭─ "):
            title = line.strip("╭╮─ ")
            found[title] = []
        elif title is not None:
            words = line.strip("│ *").split()
            found[title] += words[:1] if words and words[0].startswith("--") else []
    return found


def test_prune_shows_the_ten_options_that_matter_before_all_others(monkeypatch, capsys):
    found = panels(help_of(monkeypatch, capsys, "prune"))
    assert list(found)[:2] == ["Arguments", "Options"]
    assert found["Options"] == [*TEN, "--help"]
    assert list(found)[2:] == ["Experts", "Bytes to aim at", "Weights", "Calibration text", "The run", "The result"]
    assert all(found[title] for title in list(found)[2:])


@pytest.mark.parametrize("command", ["calibrate", "distill", "eval", "report"])
def test_no_command_lists_more_than_ten_options_before_its_panels(command, monkeypatch, capsys):
    found = panels(help_of(monkeypatch, capsys, command))
    assert 2 <= len(found["Options"]) <= 11
    assert len(found) >= 3
