"""Experts removed from GGUF files: every other byte as it was, and llama.cpp computes what it does without them."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf_files import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    RANDOM,
    VOCABULARY,
    WRITTEN,
    Type,
    Writer,
    finish,
    gguf,
    log_probabilities,
    minimax,
    read,
    start,
    values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moesparse.checkpoints.gguf
from moesparse import Recipe, prune
from moesparse.checkpoints.gguf import GGUFFiles
from moesparse.errors import CalibrationError, CheckpointError, UnsupportedModelError, UsageError
from moesparse.experts.origin import Origin
from moesparse.experts.plan_file import ExpertPlan
from moesparse.experts.scores_file import ExpertScores
from moesparse.pruning.gguf import GGUFModel, plan_from_scores, prune_gguf
from moesparse.testing import tiny_model

KEPT = [[0, 1, 3, 4, 5, 6, 8, 9, 10, 12, 14, 15], [1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14]]
GONE = [[each for each in range(EXPERTS) if each not in kept] for kept in KEPT]
PROMPTS = np.random.default_rng(1).integers(1, VOCABULARY, (3, 20)).tolist()
CUT = ("exps.", "ffn_gate_inp.weight", "exp_probs_b.bias")


def plan_of(path, kept=KEPT, layers=None):
    model = GGUFModel(GGUFFiles(path))
    return ExpertPlan.of(model.origin(layers or model.layers), [torch.tensor(ids) for ids in kept], "reap", "a text")


def check_bytes(before, after, kept, values=("expert_count",)):
    """Of a cut model: all records and tensors but those that name experts are the source's, in its order."""
    (old, old_tensors), (new, new_tensors) = read(before), read(after)
    assert [key for key in new if not key.startswith("moesparse.")] == list(old)
    assert [key for key in old if old[key] != new[key]] == [f"minimax-m2.{key}" for key in values]
    assert list(new_tensors) == list(old_tensors)
    for name, (kind, shape, data) in new_tensors.items():
        if any(part in name for part in CUT):
            rows = np.frombuffer(old_tensors[name][2], np.uint8).reshape(EXPERTS, -1)
            ids = kept[int(name.split(".")[1])]
            assert (kind, shape) == (old_tensors[name][0], (len(ids), *old_tensors[name][1][1:])), name
            assert data == rows[ids].tobytes(), name
        else:
            assert old_tensors[name] == (kind, shape, data), name


@pytest.mark.parametrize("kind", [*WRITTEN, *RANDOM])
def test_llama_cpp_computes_what_it_does_with_the_removed_never_chosen(kind, tmp_path):
    source = minimax(tmp_path / "all.gguf", kind)
    minimax(tmp_path / "masked.gguf", kind, masked=GONE)
    report = prune_gguf(source, tmp_path / "kept.gguf", plan_of(source))
    assert (report.types, report.kept, report.layers, report.routers) == ([kind], 12, [0, 1], "compared")
    assert report.bytes_after == (tmp_path / "kept.gguf").stat().st_size < report.bytes_before
    check_bytes(source, tmp_path / "kept.gguf", KEPT)
    got, want, whole = (log_probabilities(tmp_path / f"{name}.gguf", PROMPTS) for name in ("kept", "masked", "all"))
    assert np.array_equal(got, want)
    assert np.abs(want - whole).max() > 0.1


def test_it_computes_what_transformers_does_with_the_pruned_model(tmp_path):
    # lm_head of its own and no tied weights; sizes of no block of any quantisation: the tensors are float32
    model = tiny_model("qwen3_moe", num_experts=16, num_local_experts=16, num_experts_per_tok=4, norm_topk_prob=True)
    state, config = {name: each.numpy() for name, each in model.state_dict().items()}, model.config
    writer = start(
        tmp_path / "all.gguf",
        "qwen3moe",
        hidden=32,
        expert_feed_forward_length=96,
        attention__key_length=8,
        attention__value_length=8,
        rope__dimension_count=8,
    )
    # of the config, in the place of that of `start`
    writer.kv_data[0]["qwen3moe.rope.freq_base"].value = config.rope_parameters["rope_theta"]
    named = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(LAYERS):
        here, there = f"blk.{layer}.", f"model.layers.{layer}."
        named |= {f"{here}attn_{each}": f"{there}self_attn.{each}_proj" for each in "qkv"}
        named |= {f"{here}attn_{each}_norm": f"{there}self_attn.{each}_norm" for each in "qk"}
        named |= {f"{here}attn_output": f"{there}self_attn.o_proj", f"{here}ffn_gate_inp": f"{there}mlp.gate"}
        named |= {f"{here}attn_norm": f"{there}input_layernorm", f"{here}ffn_norm": f"{there}post_attention_layernorm"}
        gate, up = np.split(state[f"{there}mlp.experts.gate_up_proj"], 2, axis=1)
        for name, each in (("gate", gate), ("up", up), ("down", state[f"{there}mlp.experts.down_proj"])):
            writer.add_tensor(f"{here}ffn_{name}_exps.weight", np.ascontiguousarray(each))
    for name, source in named.items():
        writer.add_tensor(f"{name}.weight", state[f"{source}.weight"])
    finish(writer)
    windows = torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(2))
    report = prune(model, windows, Recipe(weights=None, experts=0.25, update="none"))
    # the plan was made in transformers and fits the file, whose routers it knows again
    done = prune_gguf(tmp_path / "all.gguf", tmp_path / "kept.gguf", report.plan)
    assert (done.kept, done.routers, done.criterion) == (12, "compared", "reap")
    with torch.no_grad():
        want = model(torch.tensor(PROMPTS)).logits[:, -1].double().log_softmax(-1).numpy()
    got = log_probabilities(tmp_path / "kept.gguf", PROMPTS)
    whole = log_probabilities(tmp_path / "all.gguf", PROMPTS)
    # two programs' float32 sums, of values up to 10
    assert np.abs(got - want).max() < 1e-5
    assert np.abs(whole - want).max() > 0.1


def test_a_split_stays_one(tmp_path):
    source = minimax(tmp_path / "all.gguf", "Q8_0", split=9)
    whole = minimax(tmp_path / "one.gguf", "Q8_0")
    names = sorted(file.name for file in tmp_path.glob("all*"))
    assert not source.exists() and len(names) == 4
    # any of its files stands for it
    report = prune_gguf(tmp_path / names[2], tmp_path / "out" / "kept.gguf", plan_of(whole))
    assert [os.path.basename(file) for file in report.files] == [name.replace("all", "kept") for name in names]
    prune_gguf(whole, tmp_path / "kept.gguf", plan_of(whole))
    together = {}
    for name, file in zip(names, report.files, strict=True):
        (old, _), (new, tensors) = read(tmp_path / name), read(file)
        assert [key for key in old if old[key] != new[key]] == ["minimax-m2.expert_count"] * (name == names[0])
        together |= tensors
    assert together == read(tmp_path / "kept.gguf")[1]
    assert np.array_equal(
        log_probabilities(report.files[0], PROMPTS), log_probabilities(tmp_path / "kept.gguf", PROMPTS)
    )
    with pytest.raises(CheckpointError, match=r"OUT must be a new file, got .*kept-00001-of-00004.gguf"):
        prune_gguf(tmp_path / names[0], tmp_path / "out" / "kept.gguf", plan_of(whole))
    with pytest.raises(UsageError, match=r"OUT must be named NAME.gguf, the source has 4 files, got"):
        prune_gguf(tmp_path / names[0], tmp_path / "x-00001-of-00002.gguf", plan_of(whole))
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=r"got no .*all-00002-of-00004.gguf, the split that"):
        prune_gguf(tmp_path / names[0], tmp_path / "again.gguf", plan_of(whole))
    (tmp_path / names[0]).rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"must be named NAME-00001-of-00004.gguf with the others beside it"):
        prune_gguf(tmp_path / "alone.gguf", tmp_path / "again.gguf", plan_of(whole))


def test_groups_that_the_router_chooses_first(tmp_path):
    groups = {"expert_group_count": 4, "expert_group_used_count": 2}
    # of each group of four the second goes, or the last group as a whole
    for kept, count in (([0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15], 4), (list(range(12)), 3)):
        gone = [each for each in range(EXPERTS) if each not in kept]
        source, masked = minimax(tmp_path / "all.gguf", **groups), tmp_path / "masked.gguf"
        minimax(masked, masked=[gone, gone], **groups)
        out = tmp_path / f"kept-{count}.gguf"
        prune_gguf(source, out, plan_of(source, [kept, kept]))
        changed = ["expert_count"] if count == 4 else ["expert_count", "expert_group_count"]
        check_bytes(source, out, [kept, kept], changed)
        assert GGUFModel(GGUFFiles(out)).groups.count == count
        assert np.array_equal(log_probabilities(out, PROMPTS), log_probabilities(masked, PROMPTS))
    with pytest.raises(UsageError, match=r"kept of blk.0, .* must hold equally many of each group, got \[4, 3, 3, 2\]"):
        prune_gguf(source, tmp_path / "no.gguf", plan_of(source, [[*range(7), *range(8, 11), 12, 13]] * 2))


def test_biases_of_experts_and_router_go_with_them(tmp_path):
    """gpt-oss: a bias for each expert of each matrix, and for the router, by which the removed are masked here."""

    def write(path, masked=None):
        writer = start(path, "gpt-oss", attention__sliding_window=128)

        def add(name, *shape):
            writer.add_tensor(name, values("F32", shape, len(name)))

        matrices = {"q": (128, HIDDEN), "k": (64, HIDDEN), "v": (64, HIDDEN), "output": (HIDDEN, 128)}
        add("token_embd.weight", VOCABULARY, HIDDEN)
        add("output_norm.weight", HIDDEN)
        add("output.weight", VOCABULARY, HIDDEN)
        for layer in range(LAYERS):
            at = f"blk.{layer}."
            add(f"{at}attn_norm.weight", HIDDEN)
            add(f"{at}post_attention_norm.weight", HIDDEN)
            for name, (out, width) in matrices.items():
                add(f"{at}attn_{name}.weight", out, width)
                add(f"{at}attn_{name}.bias", out)
            add(f"{at}attn_sinks.weight", 4)
            add(f"{at}ffn_gate_inp.weight", EXPERTS, HIDDEN)
            bias = values("F32", (EXPERTS,), layer).copy()
            if masked:
                bias[masked[layer]] = -1e9
            writer.add_tensor(f"{at}ffn_gate_inp.bias", bias)
            for name in ("gate", "up", "down"):
                packed = values("MXFP4", (EXPERTS, HIDDEN, HIDDEN), len(name), 0.5)
                writer.add_tensor(f"{at}ffn_{name}_exps.weight", packed, raw_dtype=Type.MXFP4)
                add(f"{at}ffn_{name}_exps.bias", EXPERTS, HIDDEN)
        finish(writer)
        return path

    source, masked = write(tmp_path / "all.gguf"), write(tmp_path / "masked.gguf", GONE)
    prune_gguf(source, tmp_path / "kept.gguf", plan_of(source))
    _, tensors = read(tmp_path / "kept.gguf")
    biases = [name for name, (_, shape, _) in tensors.items() if name.endswith(".bias") and shape[0] == 12]
    assert len(biases) == LAYERS * 4
    got, want = (log_probabilities(path, PROMPTS) for path in (tmp_path / "kept.gguf", masked))
    assert np.array_equal(got, want)
    assert np.abs(want - log_probabilities(source, PROMPTS)).max() > 0.01


def strange(path, *names, arrays=(), family="minimax-m2", shape=(EXPERTS, 4), **more):
    """A file of one layer with experts, and tensors of other names."""
    writer = start(path, family, **more)
    for key, value in arrays:
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY)
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_down_exps.weight", *names):
        writer.add_tensor(name, values("F32", shape, len(name)))
    finish(writer)
    return path


def test_layers_that_predict_further_tokens(tmp_path):
    """Two of four layers: cut where the plan names them, else dropped with what the metadata says of them by layer."""
    ahead = [
        f"blk.{layer}.{name}.weight" for layer in (2, 3) for name in ("nextn.eh_proj", "ffn_up_exps", "ffn_gate_inp")
    ]
    by_layer = ("minimax-m2.attention.head_count_kv_by_layer", [2, 2, 1, 1])
    sizes = {"layers": 4, "nextn_predict_layers": 2}
    source = strange(
        tmp_path / "all.gguf",
        "blk.1.ffn_up_exps.weight",
        "blk.1.ffn_gate_inp.weight",
        *ahead,
        arrays=[by_layer],
        **sizes,
    )
    report = prune_gguf(source, tmp_path / "dropped.gguf", plan_of(source, KEPT))
    assert report.dropped == ahead
    files = GGUFFiles(tmp_path / "dropped.gguf")
    assert [files.own(key) for key in ("block_count", "nextn_predict_layers", "expert_count")] == [2, 0, 12]
    assert files.value(by_layer[0]) == [2, 2]
    assert not set(ahead) & files.tensors.keys()
    report = prune_gguf(source, tmp_path / "cut.gguf", plan_of(source, [*KEPT, *KEPT], layers=[0, 1, 2, 3]))
    assert report.dropped == [] and report.layers == [0, 1, 2, 3]
    files = GGUFFiles(tmp_path / "cut.gguf")
    assert [files.own(key) for key in ("block_count", "nextn_predict_layers", "expert_count")] == [4, 2, 12]
    assert files.tensors["blk.3.ffn_up_exps.weight"].shape.tolist() == [4, 12]
    assert files.tensors["blk.3.nextn.eh_proj.weight"].shape.tolist() == [4, 16]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.ffn_gate_tid2eid.weight", "minimax-m2: .*tid2eid.weight cannot be cut: a table sends tokens"),
        ("blk.0.ffn_up_chexps.weight", "ffn_up_chexps.weight cannot be cut: groups of its experts share further ones"),
        ("blk.0.exp_probs_b_vl.bias", "exp_probs_b_vl.bias cannot be cut: it has a second selection bias"),
        ("blk.0.ffn_up.3.weight", "ffn_up.3.weight is one expert alone, a form that llama.cpp no longer writes"),
        ("blk.0.ffn_lora_exps.weight", "ffn_lora_exps.weight has to do with experts in a way that is not known here"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name(name, message, tmp_path):
    with pytest.raises(UnsupportedModelError, match=message):
        GGUFModel(GGUFFiles(strange(tmp_path / "all.gguf", name)))


def test_the_package_names_no_table_of_experts_for_tokens():
    """DeepSeek-V4 has one, tid2eid; what llama.cpp calls it is not known, so it is refused and not rewritten."""
    from gguf.constants import TENSOR_NAMES

    assert not [name for name in TENSOR_NAMES.values() if "tid2eid" in name or "hash" in name]


def test_what_is_no_expert_stays(tmp_path):
    names = ["ffn_up_shexp", "ffn_gate_inp_shexp", "ffn_norm_exps", "attn_v_exps", "attn_q_norm"]
    names = [f"blk.0.{name}.weight" for name in names] + ["blk.0.ffn_gate_inp.scale", "blk.1.ffn_up.weight"]
    source = strange(tmp_path / "all.gguf", *names)
    prune_gguf(source, tmp_path / "kept.gguf", plan_of(source, [KEPT[0]]))
    (_, old), (_, new) = read(source), read(tmp_path / "kept.gguf")
    assert [name for name in old if old[name] == new[name]] == names


def test_models_that_are_not_to_be_cut(tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=r"must have its slowest dimension for 16 experts, got \[4, 15\] in F32"
    ):
        GGUFModel(GGUFFiles(strange(tmp_path / "a.gguf", shape=(15, 4))))
    writer = start(tmp_path / "b.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_gate_inp.weight", values("F32", (EXPERTS, 4), 0))
    finish(writer)
    with pytest.raises(UnsupportedModelError, match=r"must hold blk.N.ffn_\*_exps, got none"):
        GGUFModel(GGUFFiles(tmp_path / "b.gguf"))
    for name, count in (("none", None), ("a count for each layer", [16, 12])):
        writer = Writer(tmp_path / "c.gguf", "qwen3moe")
        if count:
            writer.add_array("qwen3moe.expert_count", count)
        writer.add_tensor("blk.0.ffn_up_exps.weight", values("F32", (EXPERTS, 4), 0))
        finish(writer)
        with pytest.raises(UnsupportedModelError, match=f"must have one qwen3moe.expert_count, got {name}"):
            GGUFModel(GGUFFiles(tmp_path / "c.gguf"))
    # one block of 32 would hold the values of several experts
    writer = start(tmp_path / "d.gguf", "qwen3moe", expert_count=32)
    writer.add_tensor("blk.0.exp_probs_b.bias", values("Q8_0", (32,), 0), raw_dtype=Type.Q8_0)
    finish(writer)
    with pytest.raises(UnsupportedModelError, match=r"for 32 experts, got \[32\] in Q8_0"):
        GGUFModel(GGUFFiles(tmp_path / "d.gguf"))


def test_damaged_files_are_refused_by_name(tmp_path):
    source = minimax(tmp_path / "all.gguf")
    (tmp_path / "short.gguf").write_bytes(source.read_bytes()[:-40_000])
    (tmp_path / "other.gguf").write_bytes(b"PK" + bytes(100))
    (tmp_path / "empty.gguf").write_bytes(b"")
    head = bytearray(source.read_bytes())
    head[8:16] = (2**60).to_bytes(8, "little")
    (tmp_path / "many.gguf").write_bytes(head)
    for name in ("short", "other", "empty", "many", "absent"):
        with pytest.raises(CheckpointError, match=f"{name}.gguf"):
            GGUFFiles(tmp_path / f"{name}.gguf")


def test_plans_that_do_not_fit(tmp_path):
    source, out = minimax(tmp_path / "all.gguf"), tmp_path / "kept.gguf"
    plan = plan_of(source)
    with pytest.raises(UsageError, match="in every layer of a GGUF model, got 12 in layer 0 and 11 in layer 1"):
        prune_gguf(source, out, plan_of(source, [KEPT[0], KEPT[1][:11]]))
    with pytest.raises(
        UsageError, match=r"at least the 4 experts that a token uses \(minimax-m2.expert_used_.*, got 3"
    ):
        prune_gguf(source, out, plan_of(source, [[0, 1, 2], [3, 4, 5]]))
    with pytest.raises(CalibrationError, match="the routers of layers 0-1 differ, by up to"):
        prune_gguf(minimax(tmp_path / "other.gguf", seed=7), out, plan)
    with pytest.raises(CalibrationError, match="layers with experts is 0-1 there and 0 here; the hidden size is 256"):
        prune_gguf(strange(tmp_path / "small.gguf"), out, plan)
    with pytest.raises(UsageError, match=r"OUT must be named NAME.gguf for a GGUF model, got .*folder"):
        prune_gguf(source, tmp_path / "folder", plan)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.gguf", "other.gguf", "small.gguf"]
    prune_gguf(source, out, plan)
    with pytest.raises(CalibrationError, match="the number of experts is 16 there and 12 here"):
        prune_gguf(out, tmp_path / "again.gguf", plan)


@pytest.mark.parametrize(("router", "said"), [("F16", ""), ("BF16", ""), ("Q8_0", ", quantised")])
def test_routers_are_known_again_in_other_types(router, said, tmp_path):
    plan = plan_of(minimax(tmp_path / "all.gguf"))
    copy = minimax(tmp_path / "copy.gguf", router=router)
    assert prune_gguf(copy, tmp_path / "kept.gguf", plan).routers == f"compared{said}"
    check_bytes(copy, tmp_path / "kept.gguf", KEPT)
    with pytest.raises(CalibrationError, match="the routers of layers 0-1 differ"):
        prune_gguf(minimax(tmp_path / "other.gguf", router=router, seed=7), tmp_path / "no.gguf", plan)


def test_the_note_names_experts_of_the_first_model(tmp_path):
    source = minimax(tmp_path / "all.gguf")
    prune_gguf(source, tmp_path / "twelve.gguf", plan_of(source))
    again = [[0, 1, 2, 3, 4, 5, 6, 11], [0, 2, 3, 4, 5, 6, 7, 8]]
    prune_gguf(tmp_path / "twelve.gguf", tmp_path / "eight.gguf", plan_of(tmp_path / "twelve.gguf", again))
    note = json.loads(GGUFFiles(tmp_path / "eight.gguf").value("moesparse.plan"))
    want = {str(layer): [KEPT[layer][each] for each in ids] for layer, ids in enumerate(again)}
    assert note == {"criterion": "reap", "statistics": "a text", "experts": 16, "kept": want}
    assert log_probabilities(tmp_path / "eight.gguf", PROMPTS).shape == (3, VOCABULARY)


def test_scores_of_a_file_choose(tmp_path):
    source = minimax(tmp_path / "all.gguf")
    model = GGUFModel(GGUFFiles(source))
    table = torch.stack([torch.arange(16.0), torch.arange(16.0).flip(0)]).double()
    scores = ExpertScores(model.origin(model.layers), {"reap": table})
    assert plan_from_scores(model, scores, "reap", remove=0.25).kept == (tuple(range(4, 16)), tuple(range(12)))
    eight = plan_from_scores(model, scores, "reap", remove=0.6, divisible_by=8)
    assert eight.kept == (tuple(range(8, 16)), tuple(range(8)))
    with pytest.raises(UsageError, match="at least 4 experts of a block must stay"):
        plan_from_scores(model, scores, "reap", keep=3)
    with pytest.raises(CalibrationError, match="scores must be of this model"):
        plan_from_scores(GGUFModel(GGUFFiles(minimax(tmp_path / "other.gguf", seed=7))), scores, "reap", keep=12)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = minimax(tmp_path / "all.gguf", split=9)
    source, plan = tmp_path / "all-00001-of-00004.gguf", plan_of(minimax(tmp_path / "one.gguf"))
    calls, copy = [], moesparse.checkpoints.gguf.copy_bytes

    def full(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        copy(*arguments)

    monkeypatch.setattr(moesparse.checkpoints.gguf, "copy_bytes", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"kept.*: No space left on device. Nothing was left there"):
        prune_gguf(source, tmp_path / "kept.gguf", plan)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_system_that_does_not_copy_by_itself(tmp_path, monkeypatch):
    source = minimax(tmp_path / "all.gguf")
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(moesparse.system.file_bytes, "_BUFFER", 1000)
    prune_gguf(source, tmp_path / "kept.gguf", plan_of(source))
    check_bytes(source, tmp_path / "kept.gguf", KEPT)


def test_a_killed_run_leaves_no_file_of_that_name_and_the_next_one_finds_room(tmp_path):
    source = minimax(tmp_path / "all.gguf")
    plan_of(source).save(tmp_path / "plan.json")
    code = (
        "import os, signal, sys\nimport moesparse.checkpoints.gguf as files\n"
        "from moesparse.pruning.gguf import prune_gguf\nfrom moesparse.experts.plan_file import ExpertPlan\n"
        "copy, calls = files.copy_bytes, []\n"
        "def dying(*arguments):\n    calls.append(1)\n    copy(*arguments)\n"
        "    if len(calls) == 15: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.copy_bytes = dying\nprune_gguf(sys.argv[1], sys.argv[2], ExpertPlan.load(sys.argv[3]))\n"
    )
    arguments = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("all.gguf", "kept.gguf", "plan.json"))]
    assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "kept.gguf").exists()
    prune_gguf(source, tmp_path / "kept.gguf", plan_of(source))
    check_bytes(source, tmp_path / "kept.gguf", KEPT)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.gguf", "kept.gguf", "plan.json"]


@given(
    kind=st.sampled_from([*WRITTEN, *RANDOM]),
    experts=st.integers(2, 9),
    rows=st.integers(1, 3),
    blocks=st.integers(1, 2),
    alignment=st.sampled_from([32, 64, 8]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_kept_has_the_values_it_had(kind, experts, rows, blocks, alignment, data, tmp_path_factory):
    """Against numpy on what the package dequantises: any type, count, choice, alignment, and metadata of any kind."""
    kept = sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1)))
    folder = tmp_path_factory.mktemp("any")
    writer = start(folder / "all.gguf", "qwen3moe", expert_count=experts, expert_used_count=1)
    writer.add_custom_alignment(alignment)
    writer.add_key_value("general.nothing", [], gguf.GGUFValueType.ARRAY)
    writer.add_key_value("general.bytes", b"\xff\xfe", gguf.GGUFValueType.STRING)
    shape = (experts, rows, 256 * blocks)
    writer.add_tensor("blk.3.ffn_up_exps.weight", values(kind, shape, 1), raw_dtype=Type[kind])
    writer.add_tensor("blk.3.ffn_up_exps.bias", values("F32", (experts, rows), 2))
    writer.add_tensor("blk.3.ffn_up_exps.scale", values("F32", (experts,), 3))
    writer.add_tensor("blk.3.ffn_up_exps.input_scale", values("F32", (1,), 3))
    writer.add_tensor("blk.3.ffn_gate_inp.weight", values("F32", (experts, 8), 4))
    writer.add_tensor("output.weight", values(kind, (3, 256), 5), raw_dtype=Type[kind])
    finish(writer)
    origin = Origin((3,), experts, 8, None, (None,))
    report = prune_gguf(folder / "all.gguf", folder / "kept.gguf", ExpertPlan(origin, (tuple(kept),), "reap"))
    assert report.routers == "not compared"
    old, new = gguf.GGUFReader(folder / "all.gguf"), gguf.GGUFReader(folder / "kept.gguf")
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert after.data_offset % alignment == 0
        want, got = (gguf.quants.dequantize(each.data, each.tensor_type) for each in (before, after))
        whole = before.name == "output.weight" or before.name.endswith("input_scale")
        np.testing.assert_array_equal(got, want if whole else want[kept])
    (records, _), (now, _) = read(folder / "all.gguf"), read(folder / "kept.gguf")
    differ = [key for key in records if records[key] != now[key]]
    assert differ == (["qwen3moe.expert_count"] if len(kept) < experts else [])
