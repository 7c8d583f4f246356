"""What a machine is remembered to give without load, and when that is told."""

import json
from datetime import date, timedelta

import pytest
import torch

from moesparse.system import speed
from moesparse.system.speed import FILE, Speed, cache_folder, speed_here


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Of two CPUs: what it gives and its load are set by hand."""
    monkeypatch.setenv("MOESPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(speed, "_cpu", lambda: "a CPU")

    def measure(rate, load, half=None):
        rates = {torch.float32: rate, torch.bfloat16: half or rate}
        monkeypatch.setattr(speed, "gemm_rate", lambda _, dtype: rates[dtype])
        monkeypatch.setattr(speed, "_load", lambda: load)
        return speed_here(None, torch.bfloat16)

    return measure


TODAY = date.today().isoformat()


def test_what_was_measured_without_load_is_told_under_load(machine):
    assert machine(4e10, 0.2, half=2e10) == Speed((4e10, 2e10), 0.2, 2)
    assert machine(1e10, 3.2, half=5e9) == Speed((1e10, 5e9), 3.2, 2, (4e10, 2e10), TODAY)
    # what is measured under load is not remembered
    assert machine(1e9, 3.2, half=1e9).idle == (4e10, 2e10)


@pytest.mark.parametrize(
    ("rate", "load"),
    [
        # no more than measurements differ
        (3.5e10, 3.2),
        # slower, and not by the load
        (1e10, 0.2),
    ],
)
def test_only_what_the_load_makes_much_slower_is_told_twice(rate, load, machine):
    machine(4e10, 0.2)
    assert machine(rate, load).idle is None


def test_the_best_of_a_month_is_kept(machine):
    for rate in (3e10, 4e10, 2e10):
        machine(rate, 0.2)
    assert machine(1e10, 2.0).idle == (4e10, 4e10)
    file = cache_folder() / FILE
    old = (date.today() - timedelta(days=31)).isoformat()
    file.write_text(json.dumps({name: each | {"measured": old} for name, each in json.loads(file.read_text()).items()}))
    assert machine(1e10, 2.0).idle is None
    machine(2e10, 0.2)
    assert machine(1e10, 2.0).idle == (2e10, 2e10)


def test_another_machine_or_version_has_its_own(machine, monkeypatch):
    machine(4e10, 0.2)
    monkeypatch.setattr(speed, "_cpu", lambda: "another CPU")
    assert machine(1e10, 3.2).idle is None
    monkeypatch.setattr(speed, "_cpu", lambda: "a CPU")
    assert machine(1e10, 3.2).idle is not None
    monkeypatch.setattr(speed, "__version__", "0.0.0")
    assert machine(1e10, 3.2).idle is None


@pytest.mark.parametrize("held", ["", "[]", '{"a": 1}', '{"a": {"rate": "fast", "measured": 3}}'])
def test_a_file_that_is_none_of_ours_is_written_anew(held, machine):
    cache_folder().mkdir()
    (cache_folder() / FILE).write_text(held)
    machine(4e10, 0.2)
    assert machine(1e10, 3.2).idle == (4e10, 4e10)


def test_nothing_is_remembered_where_nothing_can_be_written(tmp_path, machine, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOESPARSE_CACHE", str(tmp_path / "file"))
    assert machine(4e10, 0.2) == Speed((4e10, 4e10), 0.2, 2)
    assert machine(1e10, 3.2).idle is None


def test_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("MOESPARSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "moesparse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "moesparse"
    monkeypatch.setenv("MOESPARSE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
