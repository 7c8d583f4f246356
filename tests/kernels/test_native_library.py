"""The compiled CPU kernels as a library: found, checked, chosen, turned off, refused."""

import re
from pathlib import Path

import pytest
import torch
from moe_cases import assert_layer, make_layer

from moesparse_kernels import dispatch, moe, native_library, native_sources
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
    monkeypatch.setenv("MOESPARSE_NATIVE", "avx2")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'avx2'; MOESPARSE_NATIVE_PATH names a path"):
        native_library._load(native_library.LIBRARY)
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
    with pytest.warns(UserWarning, match=r"\(interface 0, sources \w{16}\), got interface 3, sources \w{16}"):
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


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
def test_each_expert_by_what_wins_for_it(monkeypatch, activation):
    NATIVE.force_path(None)
    monkeypatch.setattr(dispatch, "_NATIVE_ROWS", {NATIVE.path: dict.fromkeys(DTYPES, (4, 4))})
    monkeypatch.setattr(type(NATIVE), "torch_has_better", lambda self, dtype: False)
    layer = make_layer(9, 2, 6, 64, 32, routing="sentinels", bias=True, activation=activation)
    # expert 1 has all tokens but the first, 5 rows in all go to the others; ids outside stay
    layer.top_k_index[1:, 0] = 1
    layer.top_k_index[1:, 1] = torch.tensor([0, 2, 3, 4, 5, -1, 6, 2**40])
    seen = {"native": [], "torch": []}
    for name, function, at in (("native", moe.layer_native, 1), ("torch", moe.up_reference, 1)):

        def noted(*args, name=name, function=function, at=at, **options):
            seen[name].append(args[at])
            return function(*args, **options)

        monkeypatch.setattr(moe, function.__name__, noted)
    out = moe_nm(*layer.routed, *packed(layer), **layer.options)
    assert_layer(out, layer, "skewed")
    assert seen["native"][0][1:, 0].tolist() == [-1] * 8
    assert seen["torch"][0].offsets.diff().tolist() == [0, 8, 0, 0, 0, 0]
    # no more than 4 rows of any: all by the compiled kernels, without a look at the ids
    seen["torch"].clear()
    few = moe_nm(layer.x[:2], layer.top_k_index[:2], layer.top_k_weights[:2], *packed(layer), **layer.options)
    assert few.shape == (2, 64) and not seen["torch"]
    # all rows of one expert: all by torch's products
    seen["native"].clear()
    one = layer.top_k_index.clone()
    one[:, 1] = -1
    moe_nm(layer.x, one, layer.top_k_weights, *packed(layer), **layer.options)
    assert not seen["native"]
