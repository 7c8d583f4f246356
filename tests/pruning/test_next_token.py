"""Layers that predict further tokens (MTP): pruned with the others, kept or dropped; refused where they cannot be."""

import json
import re
from pathlib import Path

import further_tokens
import pytest
import torch
from further_tokens import DEEPSEEK, QWEN, checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moesparse
from moesparse.calibration.windows import check_windows
from moesparse.checkpoints.against import compare_folders
from moesparse.checkpoints.pretrained import REPORT_FILE, load_pretrained, save_pretrained
from moesparse.cli import app
from moesparse.errors import CalibrationError, UnsupportedModelError, UsageError
from moesparse.models.layers import RunOptions
from moesparse.models.on_disk import LayersOnDisk

WINDOWS = torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(1))
STYLES = {"deepseek_v3": DEEPSEEK, "qwen3_next": QWEN}
MAGNITUDE = {"saliency": "magnitude", "update": "none"}


def further(tensors: dict, style: str = DEEPSEEK) -> dict:
    prefix = style.format(layers=2) if style == DEEPSEEK else "mtp."
    return {key: value for key, value in tensors.items() if key.startswith(prefix)}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def whole(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def last_states(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return whole(folder).model(ids).last_hidden_state


def edit(folder: Path, **tensors) -> Path:
    """Change tensors of a checkpoint, "__" for a dot; None takes one away."""
    file = folder / "model.safetensors"
    held = load_file(file)
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=sorted(STYLES))
def source(request, tmp_path_factory):
    family = request.param
    return family, checkpoint(tmp_path_factory.mktemp(family) / "source", family, STYLES[family])


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("deepseek") / "source", "deepseek_v3")


def test_masks_are_those_of_the_layer_in_plain_torch(source, tmp_path):
    """moe-pruner, arXiv 2410.12013: |W| * sqrt(sum of gate^2 x^2), from the pruned trunk and the next tokens."""
    family, folder = source
    out = tmp_path / "out"
    recipe = moesparse.Recipe(saliency="moe-pruner", update="none", mtp="prune")
    report = moesparse.prune_checkpoint(folder, out, WINDOWS, recipe)
    before, after = tensors_of(folder), tensors_of(out)
    stored = STYLES[family].format(layers=2)
    found = further_tokens.routed(folder, family, last_states(out, WINDOWS), WINDOWS)
    K, windows = found.index.shape[1], len(WINDOWS)
    tokens = report.blocks[-1].tokens_per_expert
    assert tokens == torch.bincount(found.index.flatten(), minlength=8).tolist()
    assert sum(tokens) == K * windows * (WINDOWS.shape[1] - 1)
    checked = 0
    for expert in range(8):
        token, slot = (found.index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up, down = further_tokens.expert(before, stored, expert)
        squares = found.gates[token, slot, None].square()
        x = found.x[token]
        pruned = further_tokens.expert(after, stored, expert)
        inner = further_tokens.activation(x, gate, up)
        for want, got, inputs in zip((gate, up, down), pruned, (x, x, inner), strict=True):
            score = want.abs() * (squares * inputs.square()).sum(0).sqrt()
            groups = score.unflatten(-1, (-1, 4)).sort(-1).values
            # float32 of the model against float64 here: where two scores are nearly one either may stay
            clear = (groups[..., 2] - groups[..., 1] > 1e-4 * groups[..., 3])[..., None]
            kept = (score.unflatten(-1, (-1, 4)) >= groups[..., 2:3]) & clear
            assert clear.float().mean() > 0.99
            assert torch.equal((got.unflatten(-1, (-1, 4)) != 0) & clear, kept)
            assert torch.equal(torch.where(got == 0, 0, want), got)
            checked += 1
    assert checked >= 12


def test_experts_are_chosen_by_the_scores_of_the_layer_in_plain_torch(source, tmp_path):
    """REAP, arXiv 2510.13999: the mean of gate * |f| over an expert's tokens."""
    family, folder = source
    out = tmp_path / "out"
    recipe = moesparse.Recipe(weights=None, update="none", keep_experts=4, mtp="prune")
    report = moesparse.prune_checkpoint(folder, out, WINDOWS, recipe)
    before, after = tensors_of(folder), tensors_of(out)
    stored = STYLES[family].format(layers=2)
    found = further_tokens.routed(folder, family, last_states(folder, WINDOWS), WINDOWS)
    scores = []
    for expert in range(8):
        token, slot = (found.index == expert).nonzero(as_tuple=True)
        gate, up, down = further_tokens.expert(before, stored, expert)
        f = further_tokens.activation(found.x[token], gate, up) @ down.T
        norms = found.gates[token, slot] * f.norm(dim=1)
        scores.append(float(norms.mean()) if len(token) else None)
    assert report.experts["scores"][-1] == pytest.approx(scores, rel=1e-4)
    kept = report.experts["blocks"][-1]["kept"]
    want = torch.tensor([-1.0 if score is None else score for score in scores])
    groups = 2 if family == "deepseek_v3" else 1
    best = want.view(groups, -1).topk(4 // groups).indices + torch.arange(groups)[:, None] * (8 // groups)
    assert kept == sorted(best.flatten().tolist())

    for new, old in enumerate(kept):
        for name in ("gate", "up", "down"):
            key = "{}mlp.experts.{}.{}_proj.weight"
            assert after[key.format(stored, new, name)].equal(before[key.format(stored, old, name)])
    assert after[f"{stored}mlp.gate.weight"].equal(before[f"{stored}mlp.gate.weight"][kept])
    if family == "deepseek_v3":
        bias = f"{stored}mlp.gate.e_score_correction_bias"
        assert after[bias].equal(before[bias][kept])
    assert after.keys() == {key for key in before if not re.search(r"\bexperts\.[4-7]\.", key)}
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and config["moesparse"]["recipe"]["mtp"] == "prune"
    assert compare_folders(out, folder).problems == []


@pytest.mark.parametrize("recipe", [{"update": "none"}, {"weights": None, "keep_experts": 4}, {"keep_experts": 4}])
def test_the_trunk_is_what_it_is_without(deepseek, recipe, tmp_path):
    """And the result of both steps is the folder that either leaves."""
    recipe = {"weights": "2:4", **recipe}
    report = moesparse.prune_checkpoint(deepseek, tmp_path / "with", WINDOWS, moesparse.Recipe(**recipe, mtp="prune"))
    if report.experts is not None:
        # refitted on the tokens that have a next one
        tokens = [fit["tokens"] for fit in report.experts["refit"]]
        assert tokens == [WINDOWS.numel(), WINDOWS.numel() - len(WINDOWS)]
    moesparse.prune_checkpoint(deepseek, tmp_path / "out", WINDOWS, moesparse.Recipe(**recipe, mtp="drop"))
    found, trunk = tensors_of(tmp_path / "with"), tensors_of(tmp_path / "out")
    assert found.keys() - further(found).keys() == trunk.keys()
    assert all(found[key].equal(trunk[key]) for key in trunk)
    comparison = compare_folders(tmp_path / "with", deepseek)
    assert comparison.problems == []
    source = tensors_of(deepseek)
    assert all(found[key].dtype == source[key].dtype for key in further(found))


@pytest.mark.parametrize(("family", "style"), [("deepseek_v3", DEEPSEEK), ("glm4_moe", DEEPSEEK), ("mellum", QWEN)])
def test_transformers_runs_what_is_left(family, style, tmp_path):
    """Its own class for these layers, where it has one, is a second opinion on names, shapes and on the forward."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers runs no such layers")
    from transformers.cache_utils import MtpCache

    kinds = {"layer_types": ["full_attention", "sliding_attention"]} if family == "mellum" else {}
    folder = checkpoint(tmp_path / "source", family, style, num_nextn_predict_layers=1, **kinds)
    out = tmp_path / "out"
    moesparse.prune_checkpoint(folder, out, WINDOWS, moesparse.Recipe(keep_experts=4, mtp="prune"))
    model = whole(out)
    # transformers knows the layer by the number that a released checkpoint has
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."] if style == DEEPSEEK else [r"^mtp\."]
    theirs = layers.MtpModel.from_pretrained(model).eval()

    on_disk = LayersOnDisk(out)
    on_disk.add_next_token_layers(run=True)
    stream = on_disk.stream(*check_windows(WINDOWS), RunOptions())
    for position in range(2):
        with on_disk.hold(position):
            list(stream.run(position, keep=True))
    with on_disk.hold(2):
        list(stream.run(2, keep=True))
    with torch.no_grad():
        states = model.model(WINDOWS).last_hidden_state[:, :-1]
        positions = torch.arange(1, WINDOWS.shape[1])[None].expand(len(WINDOWS), -1)
        cache = MtpCache(config=model.config.get_mtp_config())
        want = theirs.forward_layer(0, states, positions, cache, input_ids=WINDOWS[:, 1:])
        got = theirs.layers[0].post_norm(stream.hidden[0][:, :-1])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # and speculative decoding with it gives what the model gives alone
    prompt = WINDOWS[:1, :8]
    alone = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."] if style == DEEPSEEK else [r"^mtp\."]
    together = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, use_mtp=True)
    assert together.equal(alone)


def test_padding_is_neither_a_token_nor_a_next_one(deepseek, tmp_path):
    """The last real token of a window has no next one."""
    mask = torch.ones_like(WINDOWS)
    mask[0, 10:], mask[1, :5] = 0, 0
    recipe = moesparse.Recipe(saliency="moe-pruner", update="none", mtp="prune")
    report = moesparse.prune_checkpoint(deepseek, tmp_path / "out", (WINDOWS, mask), recipe)
    real = mask.sum(1)
    assert sum(report.blocks[-1].tokens_per_expert) == 2 * int((real - 1).sum())
    assert sum(report.blocks[0].tokens_per_expert) == 2 * int(real.sum())


@pytest.mark.parametrize("stop", ["calibrate model.layers.2", "remove experts"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(deepseek, stop, tmp_path):
    removes = stop == "remove experts"
    recipe = moesparse.Recipe(weights=None if removes else "2:4", keep_experts=4 if removes else None, mtp="prune")
    moesparse.prune_checkpoint(deepseek, tmp_path / "whole", WINDOWS, recipe)

    def stopped(event) -> None:
        if event.stage.startswith(stop) and (not removes or event.done == 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moesparse.prune_checkpoint(deepseek, tmp_path / "out", WINDOWS, recipe, progress=stopped)
    moesparse.prune_checkpoint(deepseek, tmp_path / "out", WINDOWS, recipe, resume=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("family", "form", "removes"), [("hy_v4", "single", False), ("glm4_moe", "stacked", True)])
def test_experts_may_be_stored_in_another_form_than_the_trunks(family, form, removes, tmp_path):
    """Stacked in a family that stores them one by one, and the other way: the values are the same."""
    folder = checkpoint(tmp_path / "source", family)
    recipe, data = moesparse.Recipe(**MAGNITUDE, mtp="prune"), None
    if removes:
        recipe = moesparse.Recipe(weights="2:4", saliency="wanda", update="none", keep_experts=4, mtp="prune")
        data = WINDOWS
    moesparse.prune_checkpoint(folder, tmp_path / "own", data, recipe)
    held = tensors_of(folder)
    _restore(held, form)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    moesparse.prune_checkpoint(folder, tmp_path / "out", data, recipe)
    want, got = tensors_of(tmp_path / "own"), tensors_of(tmp_path / "out")
    _restore(want, form)
    assert got.keys() == want.keys() and all(got[key].equal(want[key]) for key in want)
    assert any(key.endswith("experts.gate_up_proj") for key in further(got)) == (form == "stacked")
    found = compare_folders(tmp_path / "out", folder)
    assert found.problems == [] and any(key in found.tensors["pruned"] for key in further(got))


def _restore(held: dict, form: str) -> None:
    """Store the experts of model.layers.2 in a form."""
    base = "model.layers.2.mlp.experts."
    mine = {key.removeprefix(base): held.pop(key) for key in list(held) if key.startswith(base)}
    if "gate_up_proj" not in mine:
        E = 1 + max(int(key.split(".")[0]) for key in mine)
        up = [torch.cat([mine[f"{e}.gate_proj.weight"], mine[f"{e}.up_proj.weight"]]) for e in range(E)]
        down = [mine[f"{e}.down_proj.weight"] for e in range(E)]
        mine = {"gate_up_proj": torch.stack(up), "down_proj": torch.stack(down)}
    if form == "single":
        for number, (up, down) in enumerate(zip(mine.pop("gate_up_proj"), mine.pop("down_proj"), strict=True)):
            gate, rest = up.chunk(2)
            mine |= {f"{number}.{name}.weight": each.clone() for name, each in _named(gate, rest, down)}
    held |= {f"{base}{key}": value for key, value in mine.items()}


def _named(gate, up, down):
    return ("gate_proj", gate), ("up_proj", up), ("down_proj", down)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("choice", "removes", "stays"),
    [
        (None, False, True),
        ("keep", False, True),
        ("drop", False, False),
        (None, True, False),
        ("drop", True, False),
    ],
)
def test_kept_or_dropped(deepseek, choice, removes, stays, loaded, tmp_path):
    recipe = {"weights": None, "update": "none", "keep_experts": 4} if removes else MAGNITUDE
    recipe, data = moesparse.Recipe(**recipe, mtp=choice), WINDOWS if removes else None
    out = tmp_path / "out"
    if loaded:
        model = whole(deepseek)
        report = moesparse.prune(model, data, recipe)
        noted = {"recipe": report.recipe, "report": report.to_dict(), "card": "# a card\n"}
        surplus = save_pretrained(model, out, source=deepseek, **noted)
    else:
        card = lambda report: "# a card\n"  # noqa: E731
        surplus = moesparse.prune_checkpoint(deepseek, out, data, recipe, card=card).surplus
    before, after = further(tensors_of(deepseek)), further(tensors_of(out))
    config = json.loads((out / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == int(stays)
    assert config["moesparse"]["recipe"].get("mtp") == choice
    assert surplus.keys() == {"mtp" if stays else "dropped"}
    assert set(next(iter(surplus.values()))) == before.keys()
    assert json.loads((out / REPORT_FILE).read_text())["surplus"] == surplus
    assert "predict tokens further ahead (MTP)" in (out / "README.md").read_text()
    if stays:
        assert after.keys() == before.keys() and all(after[key].equal(before[key]) for key in before)
    else:
        assert not after
    found = compare_folders(out, deepseek)
    assert found.problems == [] and len(found.tensors.get("dropped", [])) == (0 if stays else len(before))
    load_pretrained(out)


def test_kept_where_the_config_can_say_two_counts(deepseek, tmp_path):
    """As nemotron_h_puzzle does in vLLM: mtp_n_routed_experts."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in deepseek.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mtp_n_routed_experts": 8}))
    for choice, count in ((None, 8), ("keep", 8), ("prune", 4)):
        out = tmp_path / str(choice)
        recipe = moesparse.Recipe(weights=None, update="none", keep_experts=4, mtp=choice)
        moesparse.prune_checkpoint(folder, out, WINDOWS, recipe)
        held = json.loads((out / "config.json").read_text())
        assert (held["n_routed_experts"], held["mtp_n_routed_experts"]) == (4, count)
        assert held["num_nextn_predict_layers"] == 1
        experts = {key.split("experts.")[1].split(".")[0] for key in further(tensors_of(out)) if ".experts." in key}
        assert len(experts) == count
        assert compare_folders(out, folder).problems == []


@pytest.mark.parametrize(
    ("first", "second", "mtp", "stays"),
    [
        ({**MAGNITUDE, "mtp": "prune"}, {"weights": None, "update": "none", "keep_experts": 4}, None, False),
        ({"weights": None, "update": "none", "keep_experts": 4, "mtp": "prune"}, MAGNITUDE, "prune", True),
        ({**MAGNITUDE, "mtp": "drop"}, MAGNITUDE, "drop", False),
    ],
)
def test_a_folder_that_is_pruned_again_is_explained(deepseek, first, second, mtp, stays, tmp_path):
    """Against the folder that the first command read."""
    for number, (folder, recipe) in enumerate(((deepseek, first), (tmp_path / "0", second))):
        data = WINDOWS if recipe.get("keep_experts") else None
        report = moesparse.prune_checkpoint(
            folder, tmp_path / str(number), data, moesparse.Recipe(**recipe), allow_pruned=True
        )
    out = tmp_path / "1"
    assert bool(further(tensors_of(out))) == stays
    assert json.loads((out / "config.json").read_text())["moesparse"]["recipe"].get("mtp") == mtp
    found = compare_folders(out, deepseek)
    assert found.problems == [] and ("dropped" in found.tensors) == (not stays)
    said = json.loads((out / REPORT_FILE).read_text())["surplus"]
    assert said.keys() == ({"mtp", "mtp pruned"} if stays else {"dropped"})
    assert report.surplus.keys() <= said.keys()


def test_what_is_not_understood_is_refused_by_name(tmp_path):
    """By data; by magnitude it is no matter what the layer computes."""
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    cases = {
        r"model\.layers\.2 holds side\.weight, of which it is not known": {
            "model__layers__2__side__weight": torch.ones(3)
        },
        r"model\.layers\.2 must have enorm\.weight": {"model__layers__2__enorm__weight": None},
    }
    for number, (match, change) in enumerate(cases.items()):
        folder = edit(checkpoint(tmp_path / str(number), "deepseek_v3"), **change)
        seen = []
        for recipe in ({"update": "none"}, {"weights": None, "keep_experts": 4}):
            with pytest.raises(UnsupportedModelError, match=match):
                moesparse.prune_checkpoint(
                    folder, tmp_path / "out", WINDOWS, moesparse.Recipe(**recipe, mtp="prune"), progress=seen.append
                )
        assert not seen and not (tmp_path / "out").exists()
        moesparse.prune_checkpoint(
            folder, tmp_path / f"magnitude{number}", None, moesparse.Recipe(**MAGNITUDE, mtp="prune")
        )
        pruned = tensors_of(tmp_path / f"magnitude{number}")[name]
        assert (pruned == 0).sum() * 2 == pruned.numel()
    folder = edit(checkpoint(tmp_path / "count", "deepseek_v3"), model__layers__2__mlp__gate__weight=torch.ones(16, 32))
    with pytest.raises(
        UnsupportedModelError, match=r"compared with model\.layers\.1, mlp\.gate\.weight must be \[8, 32\]"
    ):
        moesparse.prune_checkpoint(folder, tmp_path / "out", None, moesparse.Recipe(**MAGNITUDE, mtp="prune"))
    two = checkpoint(tmp_path / "two", "deepseek_v3")
    more = {key.replace("layers.2.", "layers.3."): value.clone() for key, value in further(tensors_of(two)).items()}
    edit(two, **{key.replace(".", "__"): value for key, value in more.items()})
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.3 is the second layer .*mtp='drop'"):
        moesparse.prune_checkpoint(two, tmp_path / "out", WINDOWS, moesparse.Recipe(mtp="prune"))
    report = moesparse.prune_checkpoint(two, tmp_path / "out", None, moesparse.Recipe(**MAGNITUDE, mtp="prune"))
    assert [block.name for block in report.blocks][1:] == ["model.layers.2.mlp.experts", "model.layers.3.mlp.experts"]
    assert compare_folders(tmp_path / "out", two).problems == []


def test_which_attention_the_layer_has_must_be_said(tmp_path):
    """Full and sliding attention have the same tensors; mellum's config says which one these layers have."""
    folder = checkpoint(tmp_path / "source", "mellum", QWEN, layer_types=["full_attention", "sliding_attention"])
    on_disk = LayersOnDisk(folder)
    on_disk.add_next_token_layers(run=True)
    assert on_disk.behind.template == 1
    silent = checkpoint(tmp_path / "silent", "glm4_moe")
    held = json.loads((silent / "config.json").read_text())
    (silent / "config.json").write_text(json.dumps(held | {"layer_types": ["full_attention", "sliding_attention"]}))
    with pytest.raises(UnsupportedModelError, match=r"may be any of full_attention, sliding_attention"):
        LayersOnDisk(silent).add_next_token_layers(run=True)


def test_choices_that_cannot_be_are_refused(deepseek, tmp_path):
    from moesparse.testing import tiny_model

    def run(folder, data, **recipe):
        moesparse.prune_checkpoint(folder, tmp_path / "out", data, moesparse.Recipe(**recipe))

    with pytest.raises(UsageError, match=r"mtp must be one of prune, keep, drop, got 'yes'"):
        moesparse.Recipe(mtp="yes")
    with pytest.raises(
        UsageError, match=r"mtp must be 'prune' or 'drop' .* got 'keep': its config\.json has one count"
    ):
        run(deepseek, WINDOWS, weights=None, keep_experts=4, mtp="keep")
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "none")
    for choice in ("prune", "keep", "drop"):
        with pytest.raises(UsageError, match=rf"mtp must be left out for .*none, got '{choice}': it has no layers"):
            run(tmp_path / "none", None, **MAGNITUDE, mtp=choice)
    dense = checkpoint(tmp_path / "dense", "deepseek_v3")
    held = {key: value for key, value in tensors_of(dense).items() if not key.startswith("model.layers.2.mlp")}
    save_file(held, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"got 'prune': its layers that predict further tokens have no experts"):
        run(dense, None, **MAGNITUDE, mtp="prune")
    moesparse.prune_checkpoint(
        dense, tmp_path / "kept", WINDOWS, moesparse.Recipe(weights=None, update="none", keep_experts=4, mtp="keep")
    )
    assert further(tensors_of(tmp_path / "kept")).keys() == further(held).keys()
    statistics = moesparse.calibrate(whole(deepseek), WINDOWS)
    with pytest.raises(CalibrationError, match=r"must be windows .*mtp='prune'.* they hold no sums of such layers"):
        run(deepseek, statistics, weights=None, update="none", keep_experts=4, mtp="prune")
    with pytest.raises(UsageError, match=r"must be 'keep', 'drop' or left out where the whole model is loaded"):
        moesparse.prune(whole(deepseek), WINDOWS, moesparse.Recipe(mtp="prune"))
    assert not (tmp_path / "out").exists()


def test_a_spoiled_expert_of_the_layer_is_named(deepseek, tmp_path):
    moesparse.prune_checkpoint(deepseek, tmp_path / "out", None, moesparse.Recipe(**MAGNITUDE, mtp="prune"))
    found = compare_folders(tmp_path / "out", deepseek)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    assert found.problems == [] and name in found.tensors["pruned"]
    for file in (tmp_path / "out").glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name] *= 2
            save_file(held, file, metadata={"format": "pt"})
    (problem,) = compare_folders(tmp_path / "out", deepseek).problems
    assert problem == f"the tensor {name} is not what the source holds, and nothing says why"


def test_the_command_says_what_became_of_them(deepseek, tmp_path):
    def run(*words: object):
        return CliRunner().invoke(app, ["prune", str(deepseek), *map(str, words)])

    quick = ["--saliency", "magnitude", "--update", "none"]
    done = run(tmp_path / "a", *quick, "--mtp", "prune")
    assert done.exit_code == 0, done.output
    assert "pruned like the others; they predict tokens further ahead (MTP)" in " ".join(done.output.split())
    done = run(tmp_path / "b", *quick, "--mtp", "drop", "--whole")
    assert done.exit_code == 0 and "with the layers that predict tokens further ahead (MTP)" in done.output
    for words in (["--mtp", "prune", "--whole"], ["--mtp", "keep", "--keep-experts", "4", "--whole"]):
        refused = run(tmp_path / "c", *words)
        assert refused.exit_code != 0 and isinstance(refused.exception, UsageError)
    planned = run(tmp_path / "c", *quick, "--mtp", "prune", "--dry-run", "--json")
    assert json.loads(planned.output)["blocks"] == 2
    assert not (tmp_path / "c").exists()
