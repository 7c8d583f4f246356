"""The tables of the CPU's results: quotients of what was measured together, and pages that say what the files do."""

import json

import pytest

from benchmarks.results import RESULTS
from benchmarks.speed import cpu_tables

TIMES = {
    "packed": 2000.0,
    "dense native": 3000.0,
    "transformers eager": 9000.0,
    "transformers grouped_mm": 8000.0,
    "eager, oneDNN off": 5000.0,
    "read": 1800.0,
    "packed int8": 1000.0,
}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "cpu").mkdir()

    def write(name, rows):
        (tmp_path / "cpu" / f"{name}.json").write_text(json.dumps({"rows": rows}))
        return tmp_path

    return write


def rows(tokens, key="best_us", scale=1.0, times=TIMES, **more):
    same = {"shape": "S", "threads": 1, "routing": "uniform", "tokens": tokens, "run": 5} | more
    return [same | {"contender": name, key: time * scale} for name, time in times.items()]


def test_layers_beside_the_fastest_dense_of_each_kind(write):
    held = [*rows(1), *rows(4, scale=10), *rows(1, scale=100, routing="skewed"), *rows(1, threads=2)[:2]]
    lines = cpu_tables.layers(write("bench_cpu", held)).splitlines()
    assert lines[0].startswith("| a whole layer, 1 / 4 tokens | threads | routing | packed, ms |")
    ratios = "4.00 / 4.00 | 2.50 / 2.50 | 1.50 / 1.50 | 0.900 / 0.900 | 2.00 / 2.00"
    assert lines[2] == f"| S | 1 | uniform | 2.00 / 20.0 | {ratios} |"
    assert lines[3].startswith("| S | 1 | skewed | 200 / - | 4.00 / - |")
    # not measured is no number
    assert lines[4] == "| S | 2 | uniform | 2.00 / - | - / - | - / - | 1.50 / - | - / - | - / - |"


def test_other_paths_and_unpacking_stand_in_tables_of_their_own(write):
    folder = write("bench_cpu", rows(1))
    assert cpu_tables.other_paths(folder) == cpu_tables.unpacked(folder) == "(not measured)"
    folder = write("bench_cpu_avx2", [*rows(1), *rows(4), *rows(1, routing="skewed", scale=9)])
    lines = cpu_tables.other_paths(folder).splitlines()
    assert lines[2:] == ["| avx2 | S | 1 | 2.00 | 4.00 | 2.50 | 1.50 | 0.900 |"]
    same = {"shape": "8 x 8", "dtype": "float32", "op": "2:4", "threads": 2}
    times = {"native": 500.0, "torch": 4000.0}
    held = [same | {"contender": name, "best_us": time} for name, time in times.items()]
    lines = cpu_tables.unpacked(write("unpack", held)).splitlines()
    assert lines[2:] == ["| 8 x 8 | float32 | 2:4 | 2 | 0.500 | 4.00 | 8.00 |"]


def test_only_what_was_measured_together_is_divided(write):
    held = rows(1)
    # the dense layer was measured again, on a machine that was slower then
    held[1] |= {"run": 6, "best_us": 90000.0}
    line = cpu_tables.layers(write("bench_cpu", held)).splitlines()[2]
    assert line == "| S | 1 | uniform | 2.00 | 4.00 | 2.50 | - | 0.900 | 2.00 |"


def test_llama_cpp_stands_beside_and_the_gain_is_told_apart(write):
    times = TIMES | {"llama.cpp BF16": 3100.0, "llama.cpp Q8_0": 2500.0, "llama.cpp Q4_0": 1400.0}
    held = [*rows(1, "us", times=times), *rows(512, "us", 1000, times=times), *rows(1, "us", threads=2)]
    folder = write("llama", held)
    lines = cpu_tables.llama(folder).splitlines()
    assert lines[0] == "| a layer of S, 1 thread, ms | 1 token | 512 tokens |"
    assert "| llama.cpp BF16 | 3.10 | 3,100 |" in lines
    assert "| **packed 2:4 bf16** | 2.00 | 2,000 |" in lines
    quotients = dict(line.strip("| ").split(" | ")[:2] for line in lines if "times" in line or "of it" in line)
    assert quotients["packed bf16, times the fastest default dense"] == "4.00"
    assert float(quotients["- of it a better dense product"]) * float(quotients["- of it sparsity"]) == pytest.approx(
        4, rel=0.01
    )
    assert quotients["packed bf16, times llama.cpp BF16"] == "1.55"
    assert quotients["packed int8, times llama.cpp Q4_0"] == "1.40"
    # of what was not measured there is no line
    assert "packed int8, times our dense int8" not in quotients
    assert sum("2 threads" in line for line in lines) == 1
    assert "2 threads" not in cpu_tables.TABLES["llama_one_thread"](folder)


def test_whole_models_and_the_server(write):
    rates = {"transformers grouped_mm": 10.0, "transformers eager": 12.0, "packed": 30.0, "llama.cpp BF16": 40.0}
    same = {"shape": "large", "threads": 1, "tokens": 4, "weight_bytes": 2e9}
    folder = write("generate_cpu", [same | {"contender": n, "tokens_per_second": r} for n, r in rates.items()])
    lines = cpu_tables.generate(folder).splitlines()
    # a loss to llama.cpp is printed like a win
    assert lines[2] == "| large | 1 | 4 | 10.0 | 12.0 | 30.0 | 40.0 | 2.50 |"
    assert lines[3].startswith("| large, GB of weights |  |  | 2.00 |")
    same = {"shape": "large", "threads": 1, "part": "together"}
    served = [
        same | {"contender": "dense", "tokens_per_second": 8.0, "peak_bytes": 4e9},
        same | {"contender": "packed", "tokens_per_second": 6.0, "peak_bytes": 3e9},
    ]
    lines = cpu_tables.serve(write("serve_cpu", served)).splitlines()
    assert lines[2] == "| large | 1 | together | 8.00 | 6.00 | 0.750 | 4.00 | 3.00 |"


def test_what_was_aimed_at_is_told_missed(write, capsys):
    folder = write("bench_cpu", [*rows(1, shape="OLMoE-1B-7B"), *rows(1, shape="OLMoE-1B-7B", threads=2, scale=3)])
    cpu_tables.main(["--floors", "--results", str(folder)])
    said = {" ".join(line.split("at least")[0].split()): line for line in capsys.readouterr().out.splitlines()}
    assert said["OLMoE-1B-7B, 1 token, times default dense"].endswith("at least 3.00:  4.00 holds")
    # 3000 of our own dense layer over 2000
    assert said["OLMoE-1B-7B, 1 token, times any dense"].endswith("at least 1.50:  1.50 holds")
    assert said["OLMoE-1B-7B, 1 token, 2 threads, times default dense"].endswith("at least 1.00:  4.00 holds")
    assert said["OLMoE-1B-7B, 4 tokens, times default dense"].endswith("not measured")
    held = rows(1, shape="OLMoE-1B-7B", times=TIMES | {"packed": 4000.0})
    cpu_tables.main(["--floors", "--results", str(write("bench_cpu", held))])
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "OLMoE-1B-7B, 1 token, times default dense at least 3.00: 2.00 MISSED" in said


@pytest.mark.parametrize("name", cpu_tables.PAGES)
def test_pages_say_what_the_files_do(name):
    page = (cpu_tables.ROOT / name).read_text()
    assert "<!-- table: " in page
    assert cpu_tables.written(page, RESULTS) == page
