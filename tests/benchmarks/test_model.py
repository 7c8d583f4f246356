"""The model of a decode step: its sums by hand, and the rates that a card's files hold."""

import json

import pytest

from benchmarks.speed import model
from moesparse.benchmarking import SHAPES
from moesparse_kernels import tuning

RATES = model.Rates()


def test_one_token_by_hand():
    shape = SHAPES["Qwen3-30B-A3B"]
    said = model.forecast(shape, 1, RATES)
    # eight experts of 3 x 768 x 2048 weights at 9 bits each
    floor = 8 * 3 * 768 * 2048 * 9 / 8 / RATES.copy
    assert said.floor == pytest.approx(floor)
    # two GEMMs and the combine; nothing but the memory is waited for
    assert (said.nodes, said.bound, said.blocks_per_expert) == (3, "memory", 1.0)
    assert said.seconds == pytest.approx(floor / 0.92 + 3 * RATES.node + 2.5 * RATES.ramp)
    assert said.share == pytest.approx(floor / said.seconds)


def test_a_routing_is_a_launch_more_and_many_rows_wait_for_the_decoder():
    shape = SHAPES["Mixtral-8x7B"]
    assert [model.forecast(shape, tokens, RATES).nodes for tokens in (64, 65, 1024)] == [3, 4, 5]
    # two blocks of 64 rows an expert and more: the weight is decoded for each of them
    prefill = model.forecast(shape, 2048, RATES)
    assert prefill.bound == "issue" and prefill.blocks_per_expert > 7
    assert model.forecast(shape, 64, RATES).bound == "memory"


def test_asking_leaves_the_launch_sizes_alone():
    kept = tuning._has_wgmma, tuning._multiprocessors
    model.forecast(SHAPES["OLMoE-1B-7B"], 8, RATES)
    assert (tuning._has_wgmma, tuning._multiprocessors) == kept


def test_measured_rates_and_rows_stand_beside(tmp_path, capsys):
    def put(name, rows):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))

    put("ceilings", [{"copy_gb_s": 3000.0, "multiprocessors": 114, "clocks_sm": "1500"}])
    put("launch", [{"part": "gap", "contender": "one after the other", "us_node": 2.0}])
    row = {"shape": "OLMoE-1B-7B", "tokens": 8, "contender": "moe_nm triton", "routing": "uniform", "status": "ok"}
    put("decode", [row | {"us": 123.4}])
    rates = model.measured_rates(tmp_path, RATES)
    assert (rates.copy, rates.multiprocessors, rates.clock, rates.node) == (3e12, 114, 1.5e9, pytest.approx(2e-6))
    assert (rates.ramp, rates.routing) == (RATES.ramp, RATES.routing)
    model.main(["--shapes", "OLMoE-1B-7B", "--tokens", "1", "8", "--results", str(tmp_path)])
    one, eight = capsys.readouterr().out.splitlines()[-2:]
    assert one.endswith("| - |") and eight.endswith("| 123.4 |")
