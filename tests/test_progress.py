"""What is said of long work: which way of saying it, a line for every layer, and how long is left."""

import io
import re
import threading
import time

import pytest
import torch
from rich.console import Console

import moesparse
from moesparse import progress
from moesparse.errors import UsageError
from moesparse.progress import ProgressEvent, reporting
from moesparse.testing import tiny_model


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Outside of any other call, without what the environment says."""
    for name in (progress.VARIABLE, "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "peak_memory", lambda: 3 * 2**30)
    return now


def console(*, terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def said(out):
    """The lines, without the time they begin with."""
    found = out.file.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in found), found
    return [line[20:] for line in found]


def layer(number, layers=4, tokens=0, stage="calibrate a", **more):
    return ProgressEvent(stage, number, layers, tokens=tokens, work="prune", layer=number, layers=layers, **more)


def test_a_line_for_every_layer_with_time_speed_what_is_left_and_memory(clock):
    out = console()
    with reporting("log", console=out, planned=80) as told:
        told(layer(0))
        for number in (1, 2, 3):
            clock[0] += 60
            # batches within a layer say nothing
            told(layer(number - 1, tokens=6000 * number, stage="propagate a"))
            told(layer(number, tokens=6000 * number))
        clock[0] += 60
        told(ProgressEvent("write", 0, 7, "tensor"))
    assert said(out) == [
        "prune: layer 1 of 4, 60 s, 100 tokens/s, about 3.0 min left, planned 80 s in all, peak 3 GiB",
        "prune: layer 2 of 4, 2.0 min, 100 tokens/s, about 2.0 min left, peak 3 GiB",
        "prune: layer 3 of 4, 3.0 min, 100 tokens/s, about 60 s left, peak 3 GiB",
        # that another pass begins says that the last layer is finished
        "prune: layer 4 of 4, 4.0 min, 75 tokens/s, peak 3 GiB",
    ]


def test_a_run_that_goes_on_counts_its_own_layers(clock):
    out = console()
    with reporting("log", console=out) as told:
        told(layer(2))
        clock[0] += 30
        told(layer(3))
    assert said(out)[0] == "prune: layer 3 of 4, 30 s, about 30 s left, peak 3 GiB"


def test_a_pass_without_layers_gets_a_line_if_it_took_long(clock):
    out = console()
    with reporting("log", console=out) as told:
        for stage, seconds in (("read", 1), ("score a.txt", 20), ("score b.txt", 40)):
            told(ProgressEvent(stage, 0, 8, "window"))
            clock[0] += seconds
            told(ProgressEvent(stage, 8, 8, "window", tokens=800))
    assert said(out) == [
        "score a.txt: window 8 of 8, 20 s, 40 tokens/s, peak 3 GiB",
        "score b.txt: window 8 of 8, 40 s, 20 tokens/s, peak 3 GiB",
    ]


def test_work_that_is_broken_off_does_not_claim_its_last_layer(clock):
    out = console()

    def work():
        with reporting("log", console=out) as told:
            told(layer(0))
            told(layer(1))
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        work()
    assert len(said(out)) == 1


def test_a_layer_that_takes_long_is_told_of_all_the_same(monkeypatch):
    monkeypatch.setattr(progress, "_HEARTBEAT", 0.01)
    out = console()
    with reporting("log", console=out) as told:
        told(layer(1, stage="calibrate model.layers.1"))
        while not out.file.getvalue():
            time.sleep(0.01)
    assert said(out)[0].startswith("prune: layer 1 of 4 done, now calibrate model.layers.1, 0 s, peak ")
    assert "moesparse-progress" not in [thread.name for thread in threading.enumerate()]


def test_what_is_over_soon_says_nothing_unless_it_was_asked_to(clock):
    for asked, seconds, count in (("auto", 1, 0), ("auto", 9, 3), ("log", 1, 4), ("none", 9, 0), (None, 9, 0)):
        out = console()
        with reporting(asked, console=out) as told:
            told(layer(0))
            for number in (1, 2, 3):
                clock[0] += seconds / 2 if number == 1 else seconds
                told(layer(number))
        assert len(said(out)) == count, asked


def test_memory_is_said_once_and_first(clock):
    out = console()
    with reporting("log", console=out) as told:
        for number in (0, 1):
            told(layer(number, memory=2**20))
        told(ProgressEvent("calibrate", 0, 2, memory=2**21))
    assert said(out)[0] == "second moments of the experts take 1 MiB at a time"
    assert sum("second moments" in line for line in said(out)) == 1


def test_a_terminal_gets_a_bar(clock):
    for kind, seconds, shown in (("auto", 0, False), ("auto", 9, True), ("bar", 0, True)):
        out = console(terminal=True)
        with reporting(kind, console=out) as told:
            told(layer(1))
            clock[0] += seconds
            told(layer(2, tokens=1800))
        assert ("calibrate a" in out.file.getvalue()) == shown, kind
    # lines, where they were asked for
    out = console(terminal=True)
    with reporting("log", console=out) as told:
        told(layer(0))
        told(layer(1))
    assert said(out)[0].startswith("prune: layer 1 of 4")


def test_the_outermost_call_speaks(clock):
    out, inner, events = console(), console(), []
    with reporting("log", console=out) as told:
        told(layer(0))
        with reporting("auto", console=inner, patience=0) as silent, reporting(events.append) as own:
            silent(layer(1))
            own(layer(2))
        told(layer(1))
    assert inner.file.getvalue() == ""
    assert [event.layer for event in events] == [2]
    assert len(said(out)) == 2
    # and behind it others do again
    with reporting("auto", console=inner, patience=0) as told:
        told(layer(0))
        told(layer(1))
    assert said(inner)


def test_one_of_several_processes_speaks(monkeypatch, clock):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        out = console()
        with reporting("log", console=out) as told:
            told(layer(0, layers=2))
            told(layer(1, layers=2))
        assert len(said(out)) == lines


def test_the_environment_names_a_way_or_a_file(tmp_path, monkeypatch, clock):
    def lines(**asked):
        out = console()
        with reporting("auto", console=out, **asked) as told:
            told(layer(0, layers=2))
            clock[0] += 9
            told(layer(1, layers=2))
        return len(said(out))

    monkeypatch.setenv(progress.VARIABLE, "none")
    assert lines() == 0
    monkeypatch.setenv(progress.VARIABLE, "log")
    assert lines() == 2
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "log"))
    for count in (2, 4):
        assert lines() == 2
        assert len((tmp_path / "log").read_text().splitlines()) == count
    assert lines(log_file=tmp_path / "named") == 2
    assert len((tmp_path / "named").read_text().splitlines()) == 2
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "no" / "log"))
    with pytest.raises(
        UsageError, match="MOESPARSE_LOG must be one of auto, bar, log, none or a file that can be writ"
    ):
        lines()


def test_what_is_no_way_to_say_it_is_refused():
    with pytest.raises(UsageError, match="progress must be one of auto, bar, log, none, None or a function"):
        moesparse.prune(tiny_model("mixtral"), torch.randint(3, 60, (2, 8)), progress="loud")


@pytest.mark.parametrize("update", ["rescale", "none"])
def test_pruning_says_a_line_for_every_layer(update, capsys):
    # one update runs text through the layers, the other looks at weights alone
    magnitude = {"saliency": "magnitude"} if update == "none" else {}
    text = None if magnitude else torch.randint(3, 60, (4, 16))
    recipe = moesparse.Recipe(update=update, **magnitude)
    moesparse.prune(tiny_model("mixtral"), text, recipe, progress="log")
    told = [line for line in capsys.readouterr().err.splitlines() if " prune: " in line]
    assert [re.search(r"layer \d of \d", line)[0] for line in told] == ["layer 1 of 2", "layer 2 of 2"]
    assert all("peak" in line for line in told)
    assert all("tokens/s" in line for line in told) == (update != "none")


def test_removal_and_statistics_say_a_line_for_every_layer(capsys):
    text = torch.randint(3, 60, (4, 16))
    recipe = moesparse.Recipe(weights=None, experts=0.25)
    moesparse.prune(tiny_model("mixtral"), text, recipe, progress="log")
    told = capsys.readouterr().err
    for work in ("score experts", "remove experts"):
        found = re.findall(rf"{work}: layer (\d) of 2, \d+ s, [\d,]+ tokens/s", told)
        assert found == ["1", "2"], told
