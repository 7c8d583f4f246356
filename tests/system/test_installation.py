"""`moesparse.info()` and `moesparse info`: beside what the system, the packages and the dispatcher say themselves."""

import json
import platform
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import transformers

import moesparse
from moesparse.cli import main
from moesparse.system import installation
from moesparse_kernels import NMWeight, dispatch, native_library, native_sources, quantised_layer

NATIVE = native_library.library()
needs_native = pytest.mark.skipif(NATIVE is None, reason=str(native_library.reason_without()))
CPUINFO = Path("/proc/cpuinfo")


@pytest.fixture
def as_started(monkeypatch):
    """Load the library anew at every look, as a process does that starts now."""
    monkeypatch.setattr(native_library, "_load_once", lambda: native_library._load(native_library.LIBRARY))
    monkeypatch.delenv("MOESPARSE_NATIVE", raising=False)
    monkeypatch.delenv("MOESPARSE_NATIVE_PATH", raising=False)
    yield monkeypatch
    if NATIVE is not None:
        NATIVE.force_path(None)


def in_process(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moesparse", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return capsys.readouterr()


def test_versions_are_what_the_packages_say():
    found = moesparse.info()
    assert found.versions["moesparse"] == moesparse.__version__
    assert found.versions["transformers"] == transformers.__version__
    assert found.versions["safetensors"] == safetensors.__version__
    assert torch.__version__.startswith(found.versions["torch"].partition("+")[0])
    assert (found.python, found.machine.split()[0]) == (platform.python_version(), platform.system())
    assert found.devices[0] == "cpu" and len(found.devices) == 1 + torch.cuda.device_count()
    assert found.threads == torch.get_num_threads()


@needs_native
@pytest.mark.skipif(not CPUINFO.is_file() or platform.machine() != "x86_64", reason="no flags of an x86 to read")
def test_the_path_is_the_best_that_the_system_tells_of(as_started):
    line = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":")[1].split())
    needs = {
        "avx512_bf16": {"avx512_bf16", "avx512_vbmi2", "avx512bw"},
        "avx512": {"avx512_vbmi2", "avx512bw"},
        "avx2": {"avx2", "fma", "f16c"},
    }
    native = moesparse.info().native
    assert native.paths == tuple(path for path, wanted in needs.items() if wanted <= flags)
    assert (native.path, native.reason) == (native.paths[0], "the best that this CPU has")
    assert native.sources == native_sources.source_digest()
    assert Path(native.file) == Path(native_library.__file__).with_name("_native.so")


@needs_native
def test_a_path_that_was_asked_for_is_said(as_started):
    last = NATIVE.paths[-1]
    as_started.setenv("MOESPARSE_NATIVE_PATH", last)
    native = moesparse.info().native
    wanted = "chosen by MOESPARSE_NATIVE_PATH" if len(NATIVE.paths) > 1 else "the best that this CPU has"
    assert (native.path, native.reason) == (last, wanted)
    assert native_library.native_path() == last


def test_turned_off_is_said(as_started, capsys):
    as_started.setenv("MOESPARSE_NATIVE", "0")
    found = moesparse.info()
    assert (found.native.path, found.native.sources, found.native.paths) == (None, None, ())
    assert found.native.reason == "MOESPARSE_NATIVE=0 turns it off"
    assert {auto.backend for auto in found.auto["cpu"]} == {"reference"}
    said = in_process(as_started, capsys, "info").out
    assert "\nno compiled CPU kernels: MOESPARSE_NATIVE=0 turns it off\n" in said
    assert "moe_nm        bfloat16  reference (no compiled CPU kernels: MOESPARSE_NATIVE=0 turns it off)" in said


def test_a_pure_install_is_said(as_started, tmp_path):
    as_started.setattr(native_library, "LIBRARY", tmp_path / "_native.so")
    found = moesparse.info()
    assert found.native.path is None
    assert found.native.reason == "_native.so is not beside the package: it was installed without its compiled part"
    assert {(auto.backend, auto.rows) for auto in found.auto["cpu"]} == {("reference", None)}


@needs_native
def test_what_it_says_of_backends_is_what_they_choose(as_started):
    experts, hidden = 2, 32
    for path in NATIVE.paths:
        as_started.setenv("MOESPARSE_NATIVE_PATH", path)
        for auto in moesparse.info().auto["cpu"]:
            weight = torch.eye(hidden, dtype=auto.dtype).expand(experts, hidden, hidden).contiguous()
            packed = NMWeight.pack(weight)
            # the last number of rows that it is taken for, the first that it is not; any where there is no bound
            counts = [(1, auto.backend), (10**9, auto.backend)]
            if auto.rows is not None:
                counts[1:] = [(experts * auto.rows, auto.backend), (experts * auto.rows + 1, auto.beyond)]
            for rows, wanted in counts:
                if auto.op == "moe_quantised":
                    chosen = quantised_layer._choose("auto", weight.device)
                elif auto.op == "moe_nm":
                    chosen = dispatch.choose_nm_backend("auto", packed, rows, hidden, hidden)
                else:
                    chosen = dispatch.choose_dense_backend("auto", weight, rows)
                assert chosen == wanted, (path, auto, rows)


def installed(folder, name, version, *lines):
    record = folder / f"{name}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
    )


def test_extras_are_those_whose_every_package_is_there(monkeypatch, tmp_path):
    installed(
        tmp_path, "bread", "2.0", "Requires-Dist: butter", "Provides-Extra: jam", 'Requires-Dist: plum; extra == "jam"'
    )
    installed(tmp_path, "milk", "1.5")
    asked = {
        "old": 'milk>=2; extra == "old"',
        "plain": 'milk>=1; extra == "plain"',
        "absent": 'plum; extra == "absent"',
        "nested": 'bread[jam]; extra == "nested"',
        "elsewhere": 'plum; extra == "elsewhere" and sys_platform == "nowhere"',
        "through": 'moesparse[absent]; extra == "through"',
    }
    lines = [f"Provides-Extra: {name}" for name in asked] + [f"Requires-Dist: {line}" for line in asked.values()]
    installed(tmp_path, "moesparse", "0.1.0", *lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"old": False, "plain": True, "absent": False, "nested": False, "elsewhere": True, "through": False}
    assert installation.extras() == names
    installed(tmp_path, "plum", "3.0")
    assert installation.extras() == names | {"absent": True, "nested": True, "through": True}


def test_the_command_says_what_the_function_does(monkeypatch, capsys):
    found = json.loads(in_process(monkeypatch, capsys, "info", "--json").out)
    assert found.pop("schema") == "moesparse.info/1"
    assert found == json.loads(json.dumps(moesparse.info().as_dict()))
    assert [auto["dtype"] for auto in found["auto"]["cpu"]][::3] == ["bfloat16", "float16", "float32"]
    said = in_process(monkeypatch, capsys, "info").out
    assert f"torch {found['versions']['torch']}" in said and installation.kernels_in_words() in said
