"""What `compare` says against whole models of transformers in float64, and that it goes on after a stop."""

import json
import math

import numpy as np
import pytest
import torch
from faults import at, kill, killed
from quantised_folders import whole_model, write_quantised
from small_text import make_tokenizer

import moesparse
from moesparse import demo, evaluate
from moesparse.errors import CheckpointError, MoESparseError, UsageError
from moesparse.evaluate import compare, divergence
from moesparse.evaluate.continuations import make_prompts
from moesparse.experts.surgery import remove_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.testing import has_family, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

# Mixtral plain; a head whose logits are scaled; sigmoid router with groups and a dense first layer; a gate beside a
# shared expert and a linear-attention layer
FAMILIES = ["mixtral", "granitemoe", "deepseek_v3", "qwen3_next"]
KEPT = [0, 2, 3, 5, 6, 7]
DOMAINS = ["law", "code", "law", "code", "law"]


def some_windows(n=5, t=24, seed=0):
    return torch.randint(3, 60, (n, t), generator=torch.Generator().manual_seed(seed))


def folders(root, family, **config):
    """A dense model and two pruned ones: experts gone, and experts of another seed."""
    dense = tiny_model(family, **config)
    dense.save_pretrained(root / "dense")
    groups = getattr(dense.config, "n_group", None) or 1
    kept = [0, 1, 2, 4, 5, 6] if groups > 1 else KEPT
    remove_experts(dense, [kept] * len(find_moe_blocks(dense)))
    dense.save_pretrained(root / "removed")
    changed = tiny_model(family, **config)
    with torch.no_grad():
        for block in find_moe_blocks(changed):
            for matrix in block.matrices:
                matrix.parameter.mul_(1 + 0.5 * torch.rand(matrix.parameter.shape))
    changed.save_pretrained(root / "changed")
    return kept


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixtral")
    folders(root, "mixtral")
    return root


@torch.no_grad()
def by_hand(root, name, windows, mask=None):
    """[n, t, V] float64 log-softmax of a whole model, and its choices by block [n, t, K], each window by itself."""
    model, _ = moesparse.load_pretrained(root / name)
    chosen = {block.name: [] for block in find_moe_blocks(model)}
    for block in find_moe_blocks(model):
        block.experts.register_forward_pre_hook(lambda _m, args, at=block.name: chosen[at].append(args[1].clone()))
    rows = []
    for number, window in enumerate(windows):
        real = slice(None) if mask is None else mask[number].bool()
        logits = model(window[real][None], use_cache=False).logits[0].double().log_softmax(-1)
        row = torch.full((len(window), logits.shape[-1]), math.nan, dtype=torch.float64)
        row[real] = logits
        rows.append(row)
    return torch.stack(rows), chosen


def figures_by_hand(dense, pruned, windows, where):
    """The figures of the tokens [n, t - 1] that are True in `where`, in plain loops."""
    kl, nll, top1, top5 = [], [], [], []
    for window, place in where.nonzero().tolist():
        p, q = dense[window, place], pruned[window, place]
        kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
        wanted = int(windows[window, place + 1])
        nll.append((-float(p[wanted]), -float(q[wanted])))
        best, others = p.argsort(descending=True)[:5].tolist(), q.argsort(descending=True)[:5].tolist()
        top1.append(best[0] == others[0])
        top5.append(len(set(best) & set(others)) / 5)
    mean = np.mean(nll, axis=0)
    return {
        "kl": {"mean": np.mean(kl), "p99": np.quantile(kl, 0.99)},
        "agreement": {"top1": np.mean(top1), "top5": np.mean(top5)},
        "perplexity": {"dense": math.exp(mean[0]), "pruned": math.exp(mean[1]), "ratio": math.exp(mean[1] - mean[0])},
        "tokens": len(kl),
    }


def assert_figures(found, wanted):
    assert found["tokens"] == wanted["tokens"]
    for name in ("kl", "agreement", "perplexity"):
        # float32 logits of size 10 carry an error of 1e-6 each, and there are 64 of them in a divergence
        assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_figures_are_those_of_whole_models_in_float64(tmp_path, family):
    if not has_family(family):
        pytest.skip(f"this transformers has no {family}")
    folders(tmp_path, family)
    windows = some_windows()
    (found,) = compare(tmp_path / "dense", tmp_path / "removed", windows, DOMAINS, batch_size=2)
    (dense, _), (pruned, _) = (by_hand(tmp_path, name, windows) for name in ("dense", "removed"))
    told, all_tokens = found.as_dict(), torch.ones(5, 23, dtype=torch.bool)
    wanted = figures_by_hand(dense, pruned, windows, all_tokens)
    assert_figures(told, wanted)
    assert wanted["kl"]["mean"] > 0.01, "the models must differ"
    for name in ("law", "code"):
        rows = torch.tensor([domain == name for domain in DOMAINS])
        assert_figures(told["domains"][name], figures_by_hand(dense, pruned, windows, all_tokens & rows[:, None]))
    assert [(row["from"], row["to"]) for row in told["positions"]] == [(1, 15), (16, 23)]
    late = all_tokens & (torch.arange(1, 24) >= 16)
    assert_figures(told["positions"][1], figures_by_hand(dense, pruned, windows, late))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_scored_nor_seen(mixtral, side):
    windows, mask = some_windows(3), torch.ones(3, 24, dtype=torch.int64)
    for row, pad in ((1, 5), (2, 11)):
        mask[row, slice(0, pad) if side == "left" else slice(24 - pad, 24)] = 0
    (found,) = compare(mixtral / "dense", mixtral / "removed", (windows.where(mask.bool(), 7), mask), batch_size=3)
    (dense, chosen), (pruned, others) = (by_hand(mixtral, name, windows, mask) for name in ("dense", "removed"))
    scored = (mask[:, 1:] & mask[:, :-1]).bool()
    assert_figures(found.as_dict(), figures_by_hand(dense, pruned, windows, scored))
    assert_routing(found.layers, chosen, others, KEPT)


def assert_routing(layers, chosen, others, kept):
    """Against sets, token by token."""
    assert [row["block"] for row in layers] == list(chosen)
    for row in layers:
        mine = [set(ids) for ids in torch.cat(chosen[row["block"]]).tolist()]
        theirs = [{kept[each] for each in ids} for ids in torch.cat(others[row["block"]]).tolist()]
        pairs = list(zip(mine, theirs, strict=True))
        assert row["chosen"] == pytest.approx(np.mean([len(a & b) / len(a) for a, b in pairs]))
        staying = [(a & set(kept), b) for a, b in pairs if a & set(kept)]
        assert row["kept"] == pytest.approx(np.mean([len(a & b) / len(a) for a, b in staying]))
        assert row["gone"] == pytest.approx(np.mean([len(a - set(kept)) / len(a) for a, _ in pairs]))
        assert [each["expert"] for each in row["taken_over"]] == [each for each in range(8) if each not in kept]
        for each in row["taken_over"]:
            its = [(a, b) for a, b in pairs if each["expert"] in a]
            assert each["tokens"] == len(its)
            for taker, share in each["by"]:
                wanted = sum((taker in b - a) / max(1, len(b - a)) for a, b in its) / len(its)
                assert share == pytest.approx(wanted, abs=5e-5)
            assert [share for _, share in each["by"]] == sorted((share for _, share in each["by"]), reverse=True)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_routers_are_compared_by_the_ids_of_the_dense_model(tmp_path, family):
    kept = folders(tmp_path, family)
    windows = some_windows()
    (found,) = compare(tmp_path / "dense", tmp_path / "removed", windows)
    (_, chosen), (_, others) = (by_hand(tmp_path, name, windows) for name in ("dense", "removed"))
    assert_routing(found.layers, chosen, others, kept)
    # the other way round no expert is missing, and the ids are those of the smaller model
    (back,) = compare(tmp_path / "removed", tmp_path / "dense", windows)
    assert all(row["gone"] == 0 and row["taken_over"] == [] for row in back.layers)
    for row, there in zip(back.layers, found.layers, strict=True):
        assert (row["chosen"] == 1) == (there["chosen"] == 1)


def test_without_a_note_of_what_was_kept_routers_are_not_guessed_at(mixtral, tmp_path):
    model, _ = moesparse.load_pretrained(mixtral / "removed")
    del model.config.moesparse
    model.save_pretrained(tmp_path / "bare")
    (found,) = compare(mixtral / "dense", tmp_path / "bare", some_windows(), [*"aabbb"])
    assert [(row["chosen"], row["gone"]) for row in found.layers] == [(None, None)] * 2
    assert found.overall.kl_mean > 0


def test_a_model_beside_itself_has_lost_nothing(mixtral):
    (found,) = compare(mixtral / "dense", mixtral / "dense", some_windows())
    told = found.as_dict()
    assert told["kl"] == {"mean": 0.0, "p99": 0.0}
    assert told["agreement"] == {"top1": 1.0, "top5": 1.0}
    assert told["perplexity"]["ratio"] == 1.0
    assert told["changed"] == [] and told["warnings"] == []
    assert all((row["chosen"], row["kept"], row["gone"]) == (1.0, 1.0, 0.0) for row in told["layers"])


def test_several_are_compared_as_each_alone_and_the_dense_one_runs_once(mixtral):
    windows, ran = some_windows(), []

    def told(event):
        if event.done < event.total:
            ran.append(event.stage)

    found = compare(mixtral / "dense", [mixtral / "removed", mixtral / "changed"], windows, progress=told)
    assert [ran.count(f"run {name}") for name in ("dense", "pruned-0", "pruned-1")] == [2, 2, 2]
    for name, each in zip(("removed", "changed"), found, strict=True):
        (alone,) = compare(mixtral / "dense", mixtral / name, windows)
        assert each.as_dict() == alone.as_dict()
    assert found[1].layers[0]["chosen"] == 1.0, "the first router is given the same"
    assert found[1].overall.kl_mean > 0


def test_slices_of_the_head_change_nothing(mixtral, monkeypatch):
    windows = some_windows()
    (whole,) = compare(mixtral / "dense", mixtral / "removed", windows)
    # seven tokens of 64 logits: 23 of a window are no multiple
    monkeypatch.setattr(divergence, "_CHUNK_LOGITS", 7 * 64)
    (sliced,) = compare(mixtral / "dense", mixtral / "removed", windows)
    assert_figures(sliced.as_dict(), whole.as_dict())


def test_the_tokens_that_changed_most_are_those_of_the_largest_divergence(mixtral):
    windows = some_windows()
    (dense, _), (pruned, _) = (by_hand(mixtral, name, windows) for name in ("dense", "removed"))
    kl = (dense.exp() * (dense - pruned)).sum(-1)[:, :-1]
    (found,) = compare(mixtral / "dense", mixtral / "removed", windows, DOMAINS)
    first = found.changed[0]
    window, at = divmod(int(kl.argmax()), 23)
    assert (first["window"], first["position"], first["domain"]) == (window, at + 1, DOMAINS[window])
    assert first["kl"] == pytest.approx(float(kl.max()), rel=1e-4)
    assert first["token"] == [int(windows[window, at + 1])]
    assert first["before"] + first["token"] + first["after"] == windows[window, max(0, at - 23) : at + 10].tolist()
    for side, log_p in (("dense", dense), ("pruned", pruned)):
        values, ids = log_p[window, at].exp().topk(5)
        assert [each for [each], _ in first[side]] == ids.tolist()
        assert [p for _, p in first[side]] == pytest.approx(values.tolist(), rel=1e-4)
    places = [(each["window"], each["position"]) for each in found.changed]
    assert all(abs(p - q) >= 16 for w, p in places for v, q in places if w == v and p != q)


def test_on_the_embedded_model_the_perplexities_are_those_of_eval(tmp_path):
    windows = torch.cat([demo.windows("heldout", name)[:3] for name in ("novel", "code")])
    model, tokenizer = moesparse.load_pretrained(demo.model_path())
    wanted = [evaluate.perplexity(model, windows).perplexity]
    remove_experts(model, [list(range(12))] * 4)
    wanted.append(evaluate.perplexity(model, windows).perplexity)
    moesparse.save_pretrained(model, tmp_path / "small", tokenizer=tokenizer)
    (found,) = compare("demo", tmp_path / "small", windows, ["novel"] * 3 + ["code"] * 3)
    told = found.as_dict()
    assert [told["perplexity"]["dense"], told["perplexity"]["pruned"]] == pytest.approx(wanted, rel=1e-6)
    first = told["changed"][0]
    assert tokenizer.decode(windows[first["window"], first["position"]]) == first["token"]
    assert set(told["scripts"]) == {"Latin", "Common"}
    assert sum(row["tokens"] for row in told["scripts"].values()) == told["tokens"]


@pytest.mark.parametrize("case", ["fp8 qwen", "mxfp4", "fp4 deepseek", "gptq"])
def test_quantised_folders_are_read_as_they_are(tmp_path, case):
    folder, windows = write_quantised(tmp_path / "quantised", case), some_windows(2)
    model = whole_model(folder)
    with torch.no_grad():
        for block in find_moe_blocks(model):
            block.matrices[1].parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "changed")
    (found,) = compare(folder, tmp_path / "changed", windows)
    nll = math.log(evaluate.perplexity(whole_model(folder), windows).perplexity)
    # bfloat16 layers, one by one and in the whole model
    assert found.overall.dense_nll == pytest.approx(nll, rel=1e-3)
    assert found.overall.pruned_nll == pytest.approx(math.log(evaluate.perplexity(model, windows).perplexity), rel=1e-3)
    assert found.overall.kl_mean > 1e-3 and found.layers[0]["chosen"] == 1.0


def test_packed_folders_are_read_as_they_are(tmp_path):
    dense, windows = tiny_model("mixtral"), some_windows(2)
    dense.save_pretrained(tmp_path / "dense")
    moesparse.prune(dense, windows, moesparse.Recipe(weights="2:4", saliency="magnitude", update="none"))
    moesparse.save_pretrained(dense, tmp_path / "pruned")
    moesparse.save_pretrained(dense, tmp_path / "packed", packed=True)
    pruned, packed = compare(tmp_path / "dense", [tmp_path / "pruned", tmp_path / "packed"], windows)
    assert packed.overall == pruned.overall and pruned.overall.kl_mean > 0


LONG = {"marks": pytest.mark.long}
STOPS = [
    pytest.param("progress check dense", 1, id="before anything", **LONG),
    pytest.param("progress run dense", 2, id="in the dense model", **LONG),
    pytest.param("rename work/dense-states-00001", 1, id="before the second layer has its name", **LONG),
    pytest.param("write work/moesparse_journal.json", 5, id="with the states of two layers"),
    pytest.param("progress run pruned-0", 2, id="in the first pruned model", **LONG),
    pytest.param("progress compare pruned-0", 2, id="at the logits"),
    pytest.param("progress run pruned-1", 2, id="in the second pruned model", **LONG),
    pytest.param("progress load pruned-0", 1, id="at the continuations"),
]


WINDOWS = some_windows(6)


def compare_two(root, progress=None, **more):
    """All that a run does, to be stopped; as JSON."""
    prompts = make_prompts(WINDOWS, ["all"] * 6, count=2, length=8, new_tokens=64, temperature=1.0, context=128)
    more |= {"prompts": prompts, "load": lambda folder: moesparse.load_pretrained(folder)[0], "batch_size": 4}
    found = compare(root / "dense", [root / "removed", root / "changed"], WINDOWS, progress=progress, **more)
    return [json.dumps(each.as_dict()) for each in found]


@pytest.fixture(scope="module")
def undisturbed(mixtral):
    return compare_two(mixtral)


@pytest.mark.parametrize(("place", "count"), STOPS)
def test_killed_at_a_named_step_it_goes_on_to_the_same(mixtral, undisturbed, tmp_path, place, count):
    work = tmp_path / "work"
    killed(lambda progress: compare_two(mixtral, progress, work=work), at(place, kill, count))
    ran = []
    assert compare_two(mixtral, lambda event: ran.append(event.stage), work=work, resume=True) == undisturbed
    assert not work.exists()
    # what was finished is not run again
    assert ("run dense" in ran) == ("pruned" not in place)


def test_another_run_is_not_gone_on_with(mixtral, tmp_path):
    def stop(event):
        if event.stage == "run pruned-0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(mixtral / "dense", mixtral / "removed", some_windows(), work=tmp_path / "work", progress=stop)
    again = {"work": tmp_path / "work"}
    with pytest.raises(CheckpointError, match=r"holds an unfinished run, \d parts done: .*resume=True"):
        compare(mixtral / "dense", mixtral / "removed", some_windows(), **again)
    with pytest.raises(CheckpointError, match="with another windows"):
        compare(mixtral / "dense", mixtral / "removed", some_windows(seed=1), **again, resume=True)
    with pytest.raises(CheckpointError, match="with another pruned"):
        compare(mixtral / "dense", mixtral / "changed", some_windows(), **again, resume=True)


def test_what_cannot_be_is_refused(mixtral, tmp_path):
    dense, pruned = mixtral / "dense", mixtral / "removed"
    with pytest.raises(UsageError, match="pruned must name at least one folder, got none"):
        compare(dense, [], some_windows())
    with pytest.raises(UsageError, match="domains must name that of each of 5 windows, got 1"):
        compare(dense, pruned, some_windows(), ["law"])
    with pytest.raises(UsageError, match="windows must hold at least 2 tokens"):
        compare(dense, pruned, some_windows(5, 1))
    with pytest.raises(UsageError, match="windows must hold text besides that of languages, got none"):
        compare(dense, pruned, some_windows(), ["fr"] * 5, languages=["fr"])
    prompts = make_prompts(some_windows(), DOMAINS, count=2, length=8, new_tokens=64, temperature=1.0, context=128)
    with pytest.raises(UsageError, match="load must say how a folder becomes a model"):
        compare(dense, pruned, some_windows(), prompts=prompts)
    tiny_model("mixtral", vocab_size=65).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="pruned must have the vocabulary of dense, 64 tokens, got 65"):
        compare(dense, tmp_path / "other", some_windows())
    tiny_model("mixtral", vocab_size=320).save_pretrained(tmp_path / "one")
    tiny_model("mixtral", vocab_size=320).save_pretrained(tmp_path / "two")
    make_tokenizer().save_pretrained(tmp_path / "one")
    other = make_tokenizer()
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "two")
    with pytest.raises(UsageError, match=r"pruned must have the tokenizer of dense, got another vocabulary in .*two"):
        compare(tmp_path / "one", tmp_path / "two", some_windows())


def test_logits_that_are_not_finite_are_named(mixtral, tmp_path):
    model, _ = moesparse.load_pretrained(mixtral / "dense")
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    model.save_pretrained(tmp_path / "spoiled")
    with pytest.raises(MoESparseError, match="both models must give finite logits, got others at token 1 of window 0"):
        compare(mixtral / "dense", tmp_path / "spoiled", some_windows())


def test_languages_are_reported_by_themselves(mixtral):
    windows, mask = some_windows(6), torch.ones(6, 24, dtype=torch.bool)
    mask[5, 10:] = False
    names = ["law", "law", "code", "French", "French", "German"]
    # in batches of three those of the text are the same in both runs
    models, size = (mixtral / "dense", mixtral / "removed"), {"batch_size": 3}
    (found,) = compare(*models, (windows, mask), names, languages=["French", "German"], **size)
    (alone,) = compare(*models, windows[:3], names[:3], **size)
    told, wanted = found.as_dict(), alone.as_dict()
    assert set(told["domains"]) == {"law", "code"} and set(told["languages"]) == {"French", "German"}
    assert told["languages"]["German"]["tokens"] == 9
    for name in ("kl", "agreement", "perplexity", "tokens", "domains", "positions", "layers", "changed"):
        assert told[name] == wanted[name], name
