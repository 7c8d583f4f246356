"""Whole models on a CPU: the same tokens in every form, the clock that leaves the prompt out, the server's clients."""

import contextlib
import json
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gguf")

from benchmarks.speed import bench_generate_cpu, bench_serve_cpu, cpu_models
from benchmarks.speed.bench_generate_cpu import NEW, PROMPT, Run

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = {
    "layers": 2,
    "vocabulary": 2048,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def test_a_rate_counts_what_comes_behind_the_first_token():
    run = Run(torch.zeros(4, 33, dtype=torch.int64), first=5.0, rest=2.0)
    assert run.rate == 4 * 32 / 2.0


def test_every_form_gives_the_tokens_of_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_models, "LARGE", TINY)
    asked = ["--models", "large", "--batches", "1", "3", "--threads", "1", "--runs", "1", "--kinds"]
    bench_generate_cpu.main([*asked, "--folder", str(tmp_path / "models"), "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "cpu" / "generate_cpu.json").read_text())["rows"]
    found = {(row["contender"], row["tokens"]): row for row in rows}
    several = {*bench_generate_cpu.DENSE, "packed"}
    one = several | {"transformers eager, oneDNN off", "packed, oneDNN off"}
    assert found.keys() == {*((name, 1) for name in one), *((name, 3) for name in several)}
    assert torch.backends.mkldnn.enabled
    for row in rows:
        # bf16 logits of random weights may tie
        assert row["agree"] > 0.5 and row["tokens_per_second"] > 0, row
    dense, packed = (found[name, 1]["weight_bytes"] for name in ("transformers eager", "packed"))
    experts = 2 * 2 * 8 * 3 * 64 * 64
    assert dense - packed == experts * 7 // 16
    assert cpu_models.gguf_file(tmp_path / "models").is_file()
    # made once
    before = (tmp_path / "models" / "large-packed" / "model.safetensors").stat().st_mtime_ns
    assert cpu_models.make("large", tmp_path / "models")["packed"].is_dir()
    assert (tmp_path / "models" / "large-packed" / "model.safetensors").stat().st_mtime_ns == before
    assert "packed" in capsys.readouterr().out
    models = bench_generate_cpu.load(cpu_models.make("large", tmp_path / "models"))
    prompts = torch.randint(1, 2048, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    timed = bench_generate_cpu.timed_generate(models["dense"], prompts, NEW)
    wanted = models["dense"].generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(timed.ids, wanted[:, PROMPT:]) and timed.ids.shape == (2, NEW)


def test_all_clients_are_counted_and_the_first_request_is_not(tmp_path, monkeypatch):
    asked, together = [], threading.Barrier(bench_serve_cpu.CLIENTS, timeout=30)

    def create(model, prompt, max_tokens, temperature):
        asked.append((model, prompt))
        if len(asked) > 1:
            # all clients are at work at once
            together.wait()
        return SimpleNamespace(usage=SimpleNamespace(completion_tokens=max_tokens))

    client = SimpleNamespace(completions=SimpleNamespace(create=create))
    served = []

    @contextlib.contextmanager
    def stub(folder, threads, options):
        served.append((folder, threads, options))
        yield client, 0

    monkeypatch.setattr(bench_serve_cpu, "_served", stub)
    found = bench_serve_cpu.measure(tmp_path, 2, True, 3)
    assert served == [(tmp_path, 2, ())]
    assert len(asked) == 1 + 8 * 3 and {model for model, _ in asked} == {str(tmp_path)}
    assert found["new"] == 8 * 3 * bench_serve_cpu.NEW
    assert found["tokens_per_second"] == pytest.approx(found["new"] / found["seconds"])
    asked.clear()
    bench_serve_cpu.measure(tmp_path, 2, False, 1)
    assert served[1] == (tmp_path, 2, ("--max-batch", "1"))
