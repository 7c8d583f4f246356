"""Shards: what is written is what safetensors reads; what is read was checked first."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.system.shard_writer import ShardWriter, write_shards
from moesparse.system.shards import INDEX_FILE, Shards, TensorSpec, read_header, read_json

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8)


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> ShardWriter:
    specs = [TensorSpec.of(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with ShardWriter(folder, specs, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    writer.write_index()
    return writer


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (numel,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8
    ),
    room=st.integers(1, 400),
)
def test_safetensors_reads_what_is_written(shapes, room, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": random_bits(tuple(shape), dtype, i) for i, (dtype, shape) in enumerate(shapes)}
    writer = write(folder, tensors, room)
    assert sorted(folder.glob("*.safetensors")) == sorted(writer.files)
    read = {}
    for file in writer.files:
        assert writer.hash_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
        part = load_file(file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= room
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
        read |= part
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensor) for name, tensor in tensors.items())
    if len(writer.files) > 1:
        index = json.loads((folder / INDEX_FILE).read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    shards = Shards.open(folder)
    assert all(same(shards.read(name), tensor) for name, tensor in tensors.items())
    assert all(b"".join(shards.chunks(n)) == bytes(t.view(-1).view(torch.uint8).tolist()) for n, t in tensors.items())


def test_items_start_at_multiples_of_their_size(tmp_path):
    tensors = {
        "a": random_bits((3,), torch.uint8),
        "b": random_bits((5,), torch.float32),
        "c": random_bits((7,), torch.bfloat16),
    }
    (file,) = write(tmp_path, tensors).files
    for name, info in read_header(file).items():
        assert info.offset % tensors[name].element_size() == 0


def test_entries_come_in_any_order(tmp_path):
    stack = random_bits((4, 3, 2), torch.bfloat16)
    with ShardWriter(tmp_path, [TensorSpec.of("x", stack.dtype, stack.shape)], 10**9) as writer:
        for entry in (2, 0, 3, 1):
            writer.write("x", stack[entry], entry)
    shards = Shards.open(tmp_path)
    assert same(shards.read("x"), stack)
    assert same(shards.read("x", 2), stack[2])


def test_tensors_of_dtypes_without_torch_are_copied_as_bytes(tmp_path):
    data = bytes(range(48))
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [64], "data_offsets": [0, 48]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    shards = Shards.open(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"x must be one of .*, got F6_E2M3"):
        shards.read("x")
    (tmp_path / "copy").mkdir()
    with ShardWriter(tmp_path / "copy", [shards.tensors["x"]], 10**9) as writer:
        writer.copy("x", shards.chunks("x"))
    assert b"".join(Shards.open(tmp_path / "copy").chunks("x")) == data


def test_shards_that_are_written_in_order_are_hashed_without_being_read_again(tmp_path, monkeypatch):
    write(tmp_path, {"a": random_bits((4, 3), torch.bfloat16), "b": random_bits((5,), torch.uint8)})
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("moesparse.system.shard_writer.file_hash", None)
    tensors = {"x": random_bits((7,), torch.uint8), "y": random_bits((2, 2), torch.float64).T}
    # more than one file, items of all sizes, a tensor without bytes
    copies = {"c": "a", "d": "b", "e": "a"}
    tensors |= {"z": torch.empty(0)}
    writer = write_shards(tmp_path / "out", tensors, 40, (copies, Shards.open(tmp_path)))
    assert len(writer.files) == 3
    for file in writer.files:
        assert writer.hash_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    read = Shards(writer.files)
    assert all(same(read.read(name), tensor) for name, tensor in tensors.items())
    assert all(same(read.read(new), Shards.open(tmp_path).read(old)) for new, old in copies.items())


def test_a_writer_that_was_not_given_all_says_so(tmp_path):
    specs = [TensorSpec("x", "BF16", (4, 2)), TensorSpec("y", "U8", (3,))]

    def leave_out():
        with ShardWriter(tmp_path, specs, 10**9) as writer:
            writer.write("x", torch.zeros(2, dtype=torch.bfloat16), entry=1)

    with pytest.raises(ValueError, match="x must be written in full, 12 bytes are missing"):
        leave_out()
    (tmp_path / "b").mkdir()
    writer = ShardWriter(tmp_path / "b", specs, 10**9)
    with pytest.raises(ValueError, match=r"y must be U8 \(3,\), got torch.float32 \(3,\)"):
        writer.write("y", torch.zeros(3))
    writer.write("y", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="y must be written once, got 3 bytes too many"):
        writer.write("y", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="specs must name every tensor once"):
        ShardWriter(tmp_path / "b", [specs[0], specs[0]], 10**9)


GOOD = {
    "x": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "y": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]},
}


def file_with(header, size: int = 16, length: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(data) if length is None else length).to_bytes(8, "little") + data + bytes(size)


def changed(name: str, **entry) -> dict:
    return GOOD | {name: GOOD[name] | entry}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234", "got 4 bytes that announce a header of"),
        (file_with(GOOD, length=2**63), "got [0-9,]+ bytes that announce a header of 9,223,372,036,854,775,808"),
        (file_with(GOOD, size=0, length=10**6), "announce a header of 1,000,000"),
        (file_with(b"{"), "the header of .* must be valid JSON"),
        (file_with(b"[" * 100_000), "the header of .* must be valid JSON"),
        (file_with(b"\xff\xfe"), "the header of .* must be valid JSON"),
        (file_with(b"[]"), "must be a table of tensors, got a list"),
        (file_with(b'{"x": {}, "x": {}}'), "must name everything once, got 'x' twice"),
        (file_with({"x": 3}), "'x' must have a dtype, a shape and data_offsets"),
        (file_with(GOOD, size=15), "is truncated: its header describes [0-9]+ bytes"),
        (file_with(GOOD, size=17), "is too long"),
        (file_with(changed("x", dtype="BF17")), "'x' must have a dtype of safetensors, got 'BF17'"),
        (file_with(changed("x", dtype=["BF16"])), "must have a dtype of safetensors"),
        (file_with(changed("x", shape=[2, 4])), r"'x' must take the 16 bytes of BF16 \[2, 4\], got 12"),
        (file_with(changed("x", shape=[2**40, 2**40])), "must take the .* got 12"),
        (file_with(changed("x", shape=[-2, -3])), "must have a shape of at most 16 sizes"),
        (file_with(changed("x", shape=[2.0, 3])), "must have a shape of at most 16 sizes"),
        (file_with(changed("x", shape=[True, 6])), "must have a shape of at most 16 sizes"),
        (file_with(changed("x", shape=[1] * 17)), "must have a shape of at most 16 sizes"),
        (file_with(changed("x", shape=[10**30, 0])), "must have a shape of at most 16 sizes"),
        (file_with(changed("x", data_offsets=[0])), "must have two data_offsets"),
        (file_with(changed("y", data_offsets=[16, 20]), size=20), "'y', which leaves a gap behind 'x'"),
        (file_with(changed("y", data_offsets=[8, 12]), size=12), "'y', which overlaps 'x'"),
        (file_with(changed("x", data_offsets=[2**62, 2**62 + 12])), "must lie end to end"),
        (file_with({"\x1b[31m" + "x" * 500: 3}), r"'\\x1b\[31mx{95}'\.\.\. must have a dtype"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(data, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        Shards.open(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../b.safetensors"}, "must name files of its own folder, got '../b.safetensors'"),
        ({"x": "/etc/b.safetensors"}, "must name files of its own folder"),
        ({"x": "sub/b.safetensors"}, "must name files of its own folder"),
        ({"x": "..\\b.safetensors"}, "must name files of its own folder"),
        ({"x": ".."}, "must name .safetensors files, got '..'"),
        ({"x": ""}, "must name .safetensors files"),
        ({"x": "a\0.safetensors"}, "must name files of its own folder"),
        ({"x": 3}, "must name files of its own folder, got '3'"),
        ({"x": "weights.bin"}, "must name .safetensors files, got 'weights.bin'"),
        (
            {"x": "c.safetensors"},
            "must hold c.safetensors, which model.safetensors.index.json names, got a folder without it",
        ),
        ({"z": "a.safetensors"}, "a.safetensors must hold 'z' as model.safetensors.index.json says"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, "a.safetensors must hold 'y'"),
        ({}, "must hold a weight_map"),
        (["x"], "must hold a weight_map"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(weight_map, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path / "b", folder / "a"):
        save_file({"x": torch.zeros(3)}, f"{place}.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        Shards.open(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(3), "y": torch.ones(1)}, tmp_path / "b.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'x' must lie in one shard, got .*a.safetensors and .*b"):
        Shards.open(tmp_path)


def test_only_regular_files_are_read(tmp_path):
    # reading a pipe would wait for ever
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="must be a regular file"):
        Shards.open(tmp_path)
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="must be a regular file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(CheckpointError, match=r"must be a (regular file|file that can be read)"):
        read_json(tmp_path / "dir.json")


def test_a_huge_json_file_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**12)  # a hole: takes no disk
    with pytest.raises(CheckpointError, match="must be at most 100,000,000 bytes"):
        read_json(tmp_path / "config.json")


def test_pickles_are_not_read(tmp_path):
    torch.save({"x": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors weights are read"):
        Shards.open(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_are_refused_or_read_as_safetensors_reads_them(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / "model.safetensors"
    tensors = {
        "x": random_bits((2, 3), torch.bfloat16),
        "y": random_bits((4,), torch.uint8),
        "z": random_bits((3,), torch.float32),
    }
    write(folder, tensors)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(
            st.one_of(st.binary(max_size=3), st.sampled_from([b"99999999999999", b'"x"', b"[", b"0", b"-1"]))
        )
        content[at : at + data.draw(st.integers(0, 3))] = patch
    file.write_bytes(content)
    try:
        shards = Shards.open(folder)
    except CheckpointError:
        return
    theirs = load_file(file)
    assert shards.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if shards.tensors[name].torch_dtype is not None:
            assert same(shards.read(name), tensor)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no hints")
def test_reading_ahead_names_the_bytes_of_the_tensors(tmp_path, monkeypatch):
    tensors = {name: random_bits((3, 5), torch.bfloat16, seed) for seed, name in enumerate("abc")}
    write(tmp_path, tensors, max_shard_bytes=60)
    shards = Shards.open(tmp_path)
    asked = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, size, advice: asked.append((os.pread(fd, size, offset), advice))
    )
    shards.read_ahead(["c", "a"])
    want = [(bytes(tensors[name].view(torch.uint8).flatten().tolist()), os.POSIX_FADV_WILLNEED) for name in "ca"]
    assert sorted(asked) == sorted(want)
    shards.tensors["b"].file.unlink()
    shards.read_ahead(["b"])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no hints")
@pytest.mark.parametrize(("available", "dropped"), [(10**6, False), (40, True), (None, False)])
def test_what_does_not_fit_in_memory_does_not_stay_in_the_cache(available, dropped, tmp_path, monkeypatch):
    write(tmp_path, {"a": random_bits((4, 3), torch.bfloat16), "b": random_bits((5,), torch.uint8)})
    (tmp_path / "out").mkdir()
    source, gone = Shards.open(tmp_path), []
    monkeypatch.setattr("moesparse.system.shard_writer.available_memory", lambda: available)
    monkeypatch.setattr("moesparse.system.file_bytes.drop_from_cache", lambda file, *part: gone.append(part))
    monkeypatch.setattr("moesparse.system.shard_writer.drop_from_cache", lambda file: gone.append(file.name))
    writer = write_shards(tmp_path / "out", {}, 10**9, ({"x": "b", "y": "a"}, source))
    parts = [(source.tensors[name].offset, source.tensors[name].nbytes) for name in "ab"]
    assert sorted(gone, key=str) == (sorted([*parts, *writer.files], key=str) if dropped else [])
