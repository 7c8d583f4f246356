"""llama.cpp in the benchmarks: what its programs print is read right, and a layer's time is what is left of them."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")

from benchmarks.speed import bench_llama, llama_cpp
from benchmarks.speed.bench_llama import Models, Sitting, layer_seconds
from benchmarks.speed.llama_cpp import LlamaCpp, Sample, parse_batched, parse_bench
from moesparse.benchmarking import Shape
from moesparse.benchmarking.layer import make_layer
from moesparse_kernels.native_library import library

# as printed by llama-bench and llama-batched-bench of the release, fields that nobody reads left out
BENCH = """[
  { "build_commit": "0c1e570", "model_filename": "/m/a-1.gguf", "n_threads": 1, "n_prompt": 4, "n_gen": 0,
    "avg_ns": 38061, "samples_ns": [ 42623, 33500 ] },
  { "build_commit": "0c1e570", "model_filename": "/m/a-1.gguf", "n_threads": 1, "n_prompt": 0, "n_gen": 32,
    "avg_ns": 2677608, "samples_ns": [ 4724480, 630752 ] }
]
"""
BATCHED = """
main: n_kv_max = 1024
{"n_kv_max": 1024, "pp": 8, "tg": 8, "pl": 1, "n_kv": 16, "t_pp": 0.000475, "t_tg": 0.000316, "speed_tg": 25316.457031}
{"n_kv_max": 1024, "pp": 8, "tg": 8, "pl": 4, "n_kv": 64, "t_pp": 0.000277, "t_tg": 0.000508, "speed_tg": 62992.121094}
"""


def test_what_llama_bench_prints():
    assert parse_bench(BENCH) == [
        Sample("a-1.gguf", 4, 1, (42623e-9, 33500e-9)),
        # 32 tokens one behind the other are one token each
        Sample("a-1.gguf", 1, 1, (147640e-9, 19711e-9)),
    ]
    both = BENCH.replace('"n_prompt": 4, "n_gen": 0', '"n_prompt": 4, "n_gen": 8')
    with pytest.raises(ValueError, match="must read a prompt or generate, got n_prompt=4, n_gen=8"):
        parse_bench(both)


def test_what_llama_batched_bench_prints():
    found = parse_batched(BATCHED)
    # its own rate is that of all sequences together
    assert found.keys() == {1, 4}
    assert found[1] == pytest.approx(25316.457031, rel=1e-6)
    assert found[4] == pytest.approx(62992.121094, rel=1e-6)


@pytest.fixture
def scripted(tmp_path):
    """Programs that print what they are told to and note what they were asked."""
    programs = tmp_path / "build" / "bin"
    programs.mkdir(parents=True)
    for name, said in (("llama-bench", BENCH), ("llama-batched-bench", BATCHED), ("llama-quantize", "")):
        (tmp_path / f"{name}.txt").write_text(said)
        script = f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.asked\ncat {tmp_path}/{name}.txt\n'
        script += 'cp "$1" "$2"\n' if name == "llama-quantize" else ""
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    return LlamaCpp(tmp_path)


def test_programs_are_asked_for_what_is_measured(scripted):
    folder = scripted.folder
    scripted.bench([Path("a.gguf"), Path("b.gguf")], [1, 4, 16], 2, 3)
    scripted.bench([Path("a.gguf")], [1], 1, 1)
    scripted.generate(Path("a.gguf"), [1, 4], 8, 32, 1)
    first, alone = (folder / "llama-bench.asked").read_text().splitlines()
    assert first == "-m a.gguf -m b.gguf -p 4,16 -n 32 -t 2 -r 3 -ub 16 -lm none -o json"
    assert alone == "-m a.gguf -p 0 -n 32 -t 1 -r 1 -ub 1 -lm none -o json"
    (batched,) = (folder / "llama-batched-bench.asked").read_text().splitlines()
    assert batched == "-m a.gguf -npp 8 -ntg 32 -npl 1,4 -c 160 -t 1 -tb 1 -lm none --output-format jsonl"
    model = folder / "a.gguf"
    model.write_text("weights")
    assert scripted.quantise(model, "BF16") == model
    assert scripted.quantise(model, "Q8_0").name == "a-Q8_0.gguf" and scripted.quantise(model, "Q8_0").is_file()
    (quantised,) = (folder / "llama-quantize.asked").read_text().splitlines()
    assert quantised.split()[0] == str(model) and quantised.split()[2] == "Q8_0"


def test_a_program_that_fails_says_what_it_said(scripted):
    (scripted.folder / "build" / "bin" / "llama-bench").write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    with pytest.raises(SystemExit, match=r"llama-bench -m x .* ended with 3:\nno such model"):
        scripted.bench([Path("x")], [1], 1, 1)


class Clock:
    """Answers for llama.cpp: a call takes 5 units, what is beside a layer's experts 2, they 1 a column."""

    asked: list[tuple[int, ...]]

    def bench(self, models, tokens, threads, repeats):
        found = []
        for model in models:
            columns, layers = map(int, model.stem.split("-")[:2])
            found += [
                Sample(model.name, count, threads, (5.0 + count * layers * (2 + columns),) * 2) for count in tokens
            ]
        return found


@pytest.mark.skipif(library() is None, reason="no compiled CPU kernels here")
def test_a_layer_is_what_its_experts_take():
    shape = Shape("tiny", 4, 2, 64, 32)
    models = Models({"BF16": (Path("768-1.gguf"), Path("768-3.gguf"))}, (Path("32-1.gguf"), Path("32-3.gguf")))
    layer = make_layer(shape, torch.bfloat16, torch.device("cpu"))
    sitting = Sitting(Clock(), models, layer, [1, 4], 1, 0.0)
    sitting.round(["packed", "dense native"])
    sitting.round(["packed", "dense native"])
    assert layer_seconds(sitting.times, models.experts["BF16"], 4) == 4 * 770
    rows = {(row["contender"], row["tokens"]): row for row in sitting.rows(["packed", "dense native"], run=7)}
    assert rows["llama.cpp BF16", 4]["layer_us"] == 4 * 770e6
    assert rows["llama.cpp BF16", 4]["us"] == 4 * (768 - 32) * 1e6
    # one turn of each round is counted, the one before it warmed up
    assert rows["packed", 1]["turns"] == 2 and 0 < rows["packed", 1]["us"] < 1e6
    assert {row["run"] for row in rows.values()} == {7}


def test_a_release_is_pinned_by_its_hash():
    assert llama_cpp.RELEASE.replace(" ", "-").replace("llama-cpp-python", "llama_cpp_python") == llama_cpp._SOURCE
    assert len(bytes.fromhex(llama_cpp._HASH)) == 32


def test_a_layer_of_another_kind_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--shape must be one whose experts are like Qwen3's, got gpt-oss-20b"):
        bench_llama.make_models(bench_llama.SHAPES["gpt-oss-20b"], LlamaCpp(tmp_path), ["BF16"])


def test_rows_are_kept_and_said(tmp_path, monkeypatch, capsys):
    shape = Shape("tiny", 4, 2, 64, 32)
    monkeypatch.setattr(bench_llama, "SHAPES", {"Qwen3-30B-A3B": shape})
    models = Models({"BF16": (Path("768-1.gguf"), Path("768-3.gguf"))}, (Path("32-1.gguf"), Path("32-3.gguf")))
    monkeypatch.setattr(bench_llama, "make_models", lambda *_: models)
    monkeypatch.setattr(bench_llama, "build", Clock)
    asked = ["--tokens", "1", "--rounds", "2", "--seconds", "0", "--contenders", "packed", "--results", str(tmp_path)]
    bench_llama.main(asked)
    held = json.loads((tmp_path / "cpu" / "llama.json").read_text())["rows"]
    assert [(row["contender"], row["rounds"], row["threads"]) for row in held] == [
        ("llama.cpp BF16", 2, 1),
        ("packed", 2, 1),
    ]
    assert "llama.cpp BF16" in capsys.readouterr().out
