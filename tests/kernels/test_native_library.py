"""The compiled CPU kernels as a library: found, checked, chosen, turned off, refused."""

import re
from pathlib import Path

import pytest
import torch
from moe_cases import make_layer

from moesparse_kernels import dispatch, native_library, native_sources
from moesparse_kernels.layout import NMWeight
from moesparse_kernels.moe import moe_nm

NATIVE = native_library.library()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(native_library.reason_without()))
PATHS = NATIVE.paths if NATIVE is not None else ()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def packed(layer):
    return NMWeight.pack(layer.gate_up), NMWeight.pack(layer.down)


def test_auto_takes_it_where_it_wins(monkeypatch):
    NATIVE.force_path(None)
    rows = {NATIVE.path: dict.fromkeys(DTYPES, (192, 64))}
    monkeypatch.setattr(dispatch, "_NATIVE_ROWS", rows)
    monkeypatch.setattr(type(NATIVE), "torch_has_better", lambda self, dtype: False)
    layer = make_layer(1, 1, 1, 64, 32)
    weight, _ = packed(layer)
    for rows, wanted in ((1, "native"), (192, "native"), (193, "reference")):
        assert dispatch.choose_nm_backend("auto", weight, rows, 64, 32) == wanted
    for rows, wanted in ((1, "native"), (64, "native"), (65, "reference")):
        assert dispatch.choose_dense_backend("auto", layer.gate_up, rows) == wanted
    with monkeypatch.context() as better:
        better.setattr(type(NATIVE), "torch_has_better", lambda self, dtype: dtype == torch.bfloat16)
        assert dispatch.choose_nm_backend("auto", weight, 17, 64, 32) == "reference"
    fragment = weight.to_order("fragment")
    assert dispatch.choose_nm_backend("auto", fragment, 1, 64, 32) == "reference"
    with pytest.raises(ValueError, match=r'backend "native" must fit .* "row" order are wanted, got \'fragment\''):
        dispatch.choose_nm_backend("native", fragment, 1, 64, 32)
    with native_library.turned_off():
        assert dispatch.choose_nm_backend("auto", weight, 1, 64, 32) == "reference"
        with pytest.raises(ValueError, match=r'backend "native" must fit the weight and the machine: turned_off\(\)'):
            dispatch.choose_dense_backend("native", layer.gate_up, 1)


def test_every_path_has_its_numbers():
    # by their names in the sources, so that those of another machine are seen too
    sources = "".join(file.read_text() for file in native_sources.sources())
    names = set(re.findall(r'\.name = "(\w+)"|add_path_with\(&\w+, "(\w+)"', sources))
    names = {name for pair in names for name in pair if name}
    assert set(PATHS) < names == dispatch._NATIVE_ROWS.keys()
    for numbers in dispatch._NATIVE_ROWS.values():
        assert numbers.keys() == set(DTYPES)


def test_without_the_library_all_is_as_before():
    layer = make_layer(5, 2, 3, 64, 32, bias=True)
    wanted = moe_nm(*layer.routed, *packed(layer), **layer.options, backend="reference")
    assert not torch.equal(moe_nm(*layer.routed, *packed(layer), **layer.options), wanted)
    with native_library.turned_off():
        assert torch.equal(moe_nm(*layer.routed, *packed(layer), **layer.options), wanted)


def test_environment_turns_it_off_and_chooses_a_path(monkeypatch):
    monkeypatch.setenv("MOESPARSE_NATIVE", "0")
    assert native_library._load(native_library.LIBRARY) == (None, "MOESPARSE_NATIVE=0 turns it off")
    monkeypatch.delenv("MOESPARSE_NATIVE")
    for name in PATHS:
        monkeypatch.setenv("MOESPARSE_NATIVE_PATH", name)
        assert native_library._load(native_library.LIBRARY)[0].path == name
    NATIVE.force_path(None)
    monkeypatch.setenv("MOESPARSE_NATIVE_PATH", "mmx")
    with pytest.raises(ValueError, match=r"MOESPARSE_NATIVE_PATH: path must be one this CPU has, .*, got 'mmx'"):
        native_library._load(native_library.LIBRARY)


def test_a_library_of_other_sources_is_refused(tmp_path):
    digest = native_library.source_digest().encode()
    content = native_library.LIBRARY.read_bytes()
    assert content.count(digest) == 1
    other = tmp_path / "_native.so"
    other.write_bytes(content.replace(digest, b"0" * 16))
    with pytest.warns(UserWarning, match=r"are not used: .* must be built from the sources of this package .*0{16}"):
        assert native_library._load(other)[0] is None


def test_a_library_of_another_interface_is_refused(monkeypatch):
    monkeypatch.setattr(native_library, "ABI", 0)
    with pytest.warns(UserWarning, match=r"\(interface 0, sources \w{16}\), got interface 2, sources \w{16}"):
        assert native_library._load(native_library.LIBRARY)[0] is None


def test_what_is_no_library_is_refused(tmp_path):
    nothing, text = tmp_path / "none.so", tmp_path / "text.so"
    assert native_library._load(nothing)[1] == (
        "none.so is not beside the package: it was installed without its compiled part"
    )
    text.write_text("no library")
    with pytest.warns(UserWarning, match="the compiled CPU kernels are not used: .*text.so"):
        assert native_library._load(text)[0] is None


def test_structures_are_those_of_the_header():
    # what ctypes lays out must be what the compiler does: names in order, and no name of the other
    header = (Path(native_library.__file__).parent / "native" / "moesparse_native.h").read_text()
    for structure, name in (("Weight", "weight"), ("Layer", "layer"), ("Gemm", "gemm"), ("Unpack", "unpack")):
        body = header.split(f"}} moesparse_{name};")[0].rpartition("typedef struct {")[2]
        told = [line.partition("//")[0].strip() for line in body.splitlines()]
        fields = [
            field.strip(" *;").split()[-1].lstrip("*")
            for line in told
            if line
            for field in line.replace("const ", "").partition(";")[0].split(",")
        ]
        assert fields == [field for field, _ in getattr(native_library, structure)._fields_], structure
