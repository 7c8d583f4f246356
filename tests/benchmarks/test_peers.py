"""benchmarks/peers, without a peer's environment: the baselines choose what moesparse chooses; rows, goals, audit."""

import json

import pytest
import torch
from torch import nn

import moesparse
from benchmarks.peers import __main__ as command
from benchmarks.peers import environment, plain, table
from benchmarks.peers.audit import experts_shared, load, mask_difference, zeros_by_part
from benchmarks.peers.clock import Clock
from benchmarks.peers.contenders import CONTENDERS, Contender
from benchmarks.peers.llm_compressor import causal
from benchmarks.results import ResultFile
from benchmarks.speed.synthetic import make_checkpoint, random_windows
from moesparse.system.memory import return_free_memory
from moesparse.weights.mask_rules import choose_masks
from moesparse.weights.patterns import Pattern
from moesparse.weights.weight_rules import update_weights


class Sums:
    """Of one matrix's inputs, as the rules of moesparse read them."""

    def __init__(self, rows):
        self.tokens = torch.tensor([len(rows)])
        self.energy = {"hidden": (rows.double() ** 2).sum(0)[None]}
        self.moment = {"hidden": (rows.double().T @ rows.double())[None]}
        self.gated_energy, self.gated_moment = self.energy, self.moment


@pytest.fixture(scope="module")
def matrix():
    """160 x 192, wider than a block of 128 columns, and 1000 correlated inputs."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 192, generator=random) @ torch.randn(192, 192, generator=random)
    return torch.randn(160, 192, generator=random), rows


def pruned_plainly(kind, weight, rows, keep, of):
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data.copy_(weight)
    sums = kind(linear)
    for part in rows.split(300):
        sums.add(part)
    sums.prune(keep, of)
    return linear.weight.data


@pytest.mark.parametrize(("pattern", "keep", "of"), [(Pattern(n=2, m=4), 2, 4), (Pattern(ratio=0.25), 144, 0)])
def test_plain_wanda_is_moesparse_wanda(matrix, pattern, keep, of):
    weight, rows = matrix
    mask = choose_masks(weight[None], "wanda", pattern, Sums(rows), "hidden").mask[0]
    assert torch.equal(pruned_plainly(plain.NormSum, weight, rows, keep, of), weight.masked_fill(~mask, 0))


def test_plain_sparsegpt_is_moesparse_sparsegpt(matrix):
    weight, rows = matrix
    pattern, stats = Pattern(n=2, m=4), Sums(rows)
    mask = choose_masks(weight[None], "sparsegpt", pattern, stats, "hidden").mask
    update = update_weights(weight[None], mask, "obs", stats, "hidden", gate="plain").weight[0]
    found = pruned_plainly(plain.HessianSum, weight, rows, 2, 4)
    assert ((found != 0) != mask[0]).sum() == 0
    # the baseline inverts in float32
    assert (found - update).abs().max() < 1e-3 * update.abs().max()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(folder, 2, 64, 96, dtype=torch.float32)
    return folder


def test_a_whole_model_pruned_plainly_has_the_same_zeros(tiny):
    windows = random_windows(6, 48)
    ours, theirs = load(tiny).model, load(tiny).model
    moesparse.prune(ours, windows, moesparse.Recipe(saliency="wanda", update="none"), batch_size=4)
    plain.prune(theirs, windows, "wanda", batch_size=4)
    found = mask_difference(ours, theirs)
    assert found["expert_weights"] == 2 * 8 * 3 * 64 * 96
    # sums in another order, so that a near tie may fall the other way
    assert found["differing"] <= 8
    assert zeros_by_part(theirs) == {"experts": 0.5}


def test_the_audit_names_parts_and_finds_missing_weights(tiny, tmp_path):
    found = load(tiny)
    assert not found.missing and not found.unexpected and zeros_by_part(found.model) == {}
    model = found.model
    model.lm_head.weight.data[:, ::4] = 0
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    zeros = zeros_by_part(model)
    assert zeros.keys() == {"head", "attention"} and zeros["head"] == 0.25
    assert experts_shared(model, load(tiny).model) == {"shared": 32, "matrices": 32}
    model.model.layers[1].mlp.experts.down_proj.data[5] += 1
    assert experts_shared(model, load(tiny).model) == {"shared": 31, "matrices": 32}
    # the experts under names that transformers does not know
    state = {name.replace(".experts.", ".others."): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "renamed", state_dict=state)
    assert len(load(tmp_path / "renamed").missing) == 4


def test_the_clock_counts_memory_and_the_part_between():
    return_free_memory()  # what earlier tests have left free would serve, and no peak be seen
    clock = Clock()
    held = clock.prune(lambda: torch.ones(16 << 20))  # 64 MB
    del held
    row = clock.row()
    assert 60e6 < row["peak_bytes"] < 120e6
    assert row["prune_seconds"] <= row["seconds"] and row["prune_cpu_seconds"] <= row["cpu_seconds"]


def test_attention_in_both_directions_sees_the_last_token(tmp_path):
    causal.build("mixtral", tmp_path)
    model, windows = load(tmp_path).model, causal.pairs()
    assert (windows[0::2] != windows[1::2]).sum(0).tolist() == [0] * (causal.LENGTH - 1) + [4]
    with torch.no_grad():
        masked, both_ways = (
            model.model(windows, attention_mask=mask, output_hidden_states=True).hidden_states[1]
            for mask in (None, torch.zeros(8, 1, causal.LENGTH, causal.LENGTH))
        )
    assert causal.sees(masked) < 1e-6 and causal.sees(both_ways) > 0.1


class CountingPart:
    """Runs nothing; fails where it is told to."""

    name, shape = "cost", "synthetic"

    def __init__(self):
        self.ran, self.broken = [], {"plain sparsegpt"}

    def windows(self, seed):
        return torch.zeros(2, 8, dtype=torch.int64)

    def run(self, contender, seed):
        self.ran.append((contender.name, seed))
        if contender.name in self.broken:
            raise command.Failed("no memory")
        return {"seconds": 2.0, "peak_bytes": 5e6}

    def looked_at(self, contender, seed):
        return {"missing": 0, "zeros": {}}


def test_rows_are_kept_and_failed_ones_are_tried_again(tmp_path):
    chosen = [each for each in CONTENDERS if each.name in ("dense", "plain wanda", "plain sparsegpt")]
    record = {"commit": "abc"}
    part = CountingPart()
    command.measure_part(part, chosen, 2, ResultFile(tmp_path / "peers.json", record), again=False)
    assert part.ran == [(name, seed) for seed in (0, 1) for name in ("plain wanda", "plain sparsegpt")]
    part.ran, part.broken = [], set()
    file = ResultFile(tmp_path / "peers.json", record)
    assert "cost plain sparsegpt failed: no memory" in table.show(file.rows)
    command.measure_part(part, chosen, 2, file, again=False)
    assert part.ran == [("plain sparsegpt", 0), ("plain sparsegpt", 1)]
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 4 and rows[0]["tokens"] == 16 and rows[0]["commit"] == "abc"


def rows(seconds, peaks=None, perplexities=None):
    made = [
        {"part": "cost", "contender": name, "status": "ok", "task": "2:4", "seed": seed, "zeros": {}}
        | {"seconds": 100.0, "cpu_seconds": value}
        | ({"peak_bytes": peaks[name]} if peaks else {})
        for name, values in seconds.items()
        for seed, value in enumerate(values)
    ]
    return made + [
        {"part": "quality", "contender": name, "status": "ok", "task": "2:4", "zeros": {}, "missing": 0, "seed": seed}
        | {"perplexity": value}
        for name, values in (perplexities or {}).items()
        for seed, value in enumerate(values)
    ]


def test_goals_are_met_or_missed_by_medians_and_means():
    fair = "llm-compressor wanda, experts, routed"
    found = rows(
        {table.OURS: [10.0, 30.0, 11.0], fair: [22.0]},
        {table.OURS: 100, fair: 200},
        {"moesparse default": [18.0, 19.0], fair: [20.0, 22.0], "llm-compressor sparsegpt, defaults": [19.0]},
    )
    aimed = {goal["goal"]: (goal["value"], goal["met"]) for goal in table.goals(found)}
    assert aimed == {
        f"2:4, times as fast as {fair}": (2.0, False),
        f"2:4, a part of the peak memory of {fair}": (2.0, True),
        "2:4, perplexity of llm-compressor sparsegpt, defaults over that of moesparse default": (19 / 18, True),
    }


def test_the_table_has_a_line_for_each_contender(tmp_path):
    found = rows({table.OURS: [1.25, 1.75]}, {table.OURS: 3_000_000}, {"plain wanda": [20.0, 21.0]})
    found[-1]["zeros"] = found[-2]["zeros"] = {"experts": 0.5, "attention": 0.001}
    found[-2]["like"] = {"contender": "moesparse wanda", "differing": 5, "expert_weights": 1000}
    for row in found:
        row |= {"cpu": "a CPU", "torch": "2", "commit": "abc"}
    lines = table.show(found).splitlines()
    assert "| plain wanda | 20.50 ± 0.71 | experts 50% | 0.500% of the masks |  |" in lines
    assert f"| {table.OURS} | 1.2 to 1.8 |  | 100.0 | 3 |  |" in lines
    table.draw(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_an_environment_is_made_once_and_torch_comes_first(monkeypatch, tmp_path):
    commands = []

    def run(words, check):
        commands.append(words)
        (tmp_path / ".venv-peers-llm-compressor").mkdir(exist_ok=True)
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment.subprocess, "run", run)
    python = environment.python_of("llm-compressor")
    assert python == str(tmp_path / ".venv-peers-llm-compressor" / "bin" / "python")
    assert [words[-1] for words in commands[1:2]] == ["torch"] and len(commands) == 3
    assert environment.python_of("llm-compressor") == python and len(commands) == 3
    (tmp_path / ".venv-peers-llm-compressor" / ".installed").write_text("other versions")
    environment.python_of("llm-compressor")
    assert len(commands) == 6


def test_every_contender_is_named_once_and_those_alike_exist():
    names = [each.name for each in CONTENDERS]
    assert len(set(names)) == len(names)
    assert {each.like for each in CONTENDERS if each.like} <= set(names)
    assert all(isinstance(each, Contender) and set(each.parts) <= {"quality", "cost"} for each in CONTENDERS)


def test_a_quick_run_measures_one_contender(tmp_path, capsys):
    with pytest.raises(SystemExit, match="--quick needs --results"):
        command.main(["--quick"])
    command.main(["--quick", "--results", str(tmp_path), "--parts", "cost", "--contenders", "moesparse moe-pruner"])
    (row,) = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert row["status"] == "ok", row
    assert row["zeros"]["experts"] == 0.5 and row["missing"] == 0
    assert row["seconds"] > 0 and row["versions"]["moesparse"] == moesparse.__version__
    assert "| moesparse moe-pruner |" in capsys.readouterr().out
