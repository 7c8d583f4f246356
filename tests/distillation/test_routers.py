"""Routers alone learn: what changes, what it is trained on, and from folder to folder with quantised experts too."""

import copy
import json
import sys

import pytest
import torch
from quantised_folders import raw, write_quantised

from moesparse import Recipe, prune, prune_checkpoint
from moesparse.checkpoints.against import compare_folders
from moesparse.cli import main
from moesparse.distillation import Settings, distill
from moesparse.distillation.run import distill_checkpoint
from moesparse.distillation.training import Trainer, router_parameters
from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.modes import placed
from moesparse.testing import tiny_model

WINDOWS = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))
KD = Settings(2e-2, epochs=6, batch_size=4, micro_batch=2, logit_share=1.0, train="routers")
BLOCKWISE = Settings(5e-3, epochs=12, batch_size=8, micro_batch=4, train="routers")


def pruned(family, dtype=torch.float32, **recipe):
    teacher = tiny_model(family).to(dtype)
    student = copy.deepcopy(teacher)
    prune(student, WINDOWS, Recipe(**{"weights": None, "experts": 0.5, "update": "none"} | recipe))
    return student, teacher


def divergence(student, teacher):
    """Mean KL(teacher || student) over all tokens that have a next one, in float64."""
    with torch.no_grad():
        ours, theirs = (m(WINDOWS).logits[:, :-1].double().log_softmax(-1) for m in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


# one matrix; sigmoid with a correction, groups and shared experts; a bias and transposed experts
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_routers_change_and_the_next_token_comes_nearer(family, dtype):
    student, teacher = pruned(family, dtype)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    far = divergence(student, teacher)
    report = distill(student, teacher, WINDOWS, "global", settings=KD, progress=None)
    # of the first four of eight windows
    assert report.rows[0]["kl"] == pytest.approx(far, rel=0.5)
    assert report.expert_weight == 0
    assert divergence(student, teacher) < far
    moved = {name for name, tensor in student.state_dict().items() if not tensor.equal(before[name])}
    routers = {f"{block.router_name}.{end}" for block in find_moe_blocks(student) for end in ("weight", "bias")}
    assert moved and moved <= routers
    assert {name for name in routers if name.endswith("weight")} <= moved
    assert {name: tensor.dtype for name, tensor in student.state_dict().items()} == {
        n: t.dtype for n, t in before.items()
    }


def test_the_first_step_is_that_of_a_plain_loop():
    """Gradient of KL by autograd through the model as it stands, and one step of AdamW, by hand."""
    student, teacher = pruned("mixtral")
    plain = copy.deepcopy(student)
    settings = Settings(
        1e-2, epochs=1, batch_size=8, micro_batch=8, logit_share=1.0, train="routers", max_grad_norm=1e9
    )
    names = list(router_parameters(find_moe_blocks(plain)))
    parameters = [plain.get_parameter(name) for name in names]
    ours, theirs = plain(WINDOWS).logits, teacher(WINDOWS).logits.detach()
    logs, wanted = ours[:, :-1].log_softmax(-1), theirs[:, :-1].log_softmax(-1)
    loss = (wanted.exp() * (wanted - logs)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, parameters)
    report = distill(student, teacher, WINDOWS, "global", settings=settings, progress=None)
    assert report.rows[0]["kl"] == pytest.approx(float(loss), rel=1e-4)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        # the first step of Adam is the rate times g / (|g| + eps)
        want = parameter - 1e-2 * gradient / (gradient.abs() + 1e-8)
        large = gradient.abs() > 1e-5
        assert large.float().mean() > 0.5
        torch.testing.assert_close(student.get_parameter(name)[large], want[large], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_block_by_block_the_output_of_the_dense_block_is_learnt(family):
    student, teacher = pruned(family, expert_method="m-smoe")
    before = copy.deepcopy(student)
    given = {}
    for block in find_moe_blocks(teacher):
        block.moe.register_forward_hook(lambda _m, x, y, name=block.name: given.__setitem__(name, (x[0], y)))
    with torch.no_grad():
        teacher(WINDOWS)

    def error(model):
        found = []
        for block in find_moe_blocks(model):
            hidden, output = given[block.name]
            output = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                ours = block.moe(hidden)
            ours = ours[0] if isinstance(ours, tuple) else ours
            found.append(float((ours - output).double().square().sum() / output.double().square().sum()))
        return found

    far = error(student)
    report = distill(student, teacher, WINDOWS, "blockwise", settings=BLOCKWISE, progress=None)
    near = error(student)
    assert all(b < a for a, b in zip(far, near, strict=True))
    first = [row["experts"] for row in report.rows if row["step"] == 0]
    assert first == pytest.approx(far, rel=1e-4)
    for name, tensor in student.state_dict().items():
        moved = not tensor.equal(before.state_dict()[name])
        assert not moved or any(f"{block.router_name}." in name for block in find_moe_blocks(student)), name


def test_a_killed_blockwise_run_goes_on(tmp_path):
    student, teacher = pruned("mixtral")
    want = copy.deepcopy(student)
    distill(want, teacher, WINDOWS, "blockwise", settings=BLOCKWISE, progress=None)
    step, calls = Trainer.step, []

    def stopping(self):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return step(self)

    again, how = copy.deepcopy(student), {"settings": BLOCKWISE, "state": tmp_path / "state", "progress": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distill(again, teacher, WINDOWS, "blockwise", save_every=1, **how)
    distill(student, teacher, WINDOWS, "blockwise", save_every=1, resume=True, **how)
    for (name, one), other in zip(want.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("case", ["fp8 qwen", "int4", "mxfp4"])
def test_quantised_experts_keep_their_bytes(case, tmp_path):
    source = write_quantised(tmp_path / "dense", case)
    prune_checkpoint(source, tmp_path / "pruned", WINDOWS, Recipe(weights=None, experts=0.25, update="none"))
    report = distill_checkpoint(tmp_path / "pruned", source, tmp_path / "out", WINDOWS, settings=BLOCKWISE)
    before, after = raw(tmp_path / "pruned"), raw(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name] != after[name]}
    assert moved and all(".gate." in name or ".router." in name for name in moved)
    assert all(before[name][:2] == after[name][:2] for name in moved)
    assert len(report.rows) == 12 * len({row["block"] for row in report.rows})
    assert compare_folders(tmp_path / "out", tmp_path / "pruned").problems == []
    assert compare_folders(tmp_path / "out", source).problems == []
    noted = json.loads((tmp_path / "out" / "config.json").read_text())["moesparse"]["recipe"]["distillation"]
    assert (noted["mode"], noted["train"]) == ("blockwise", "routers")


def test_the_folder_is_what_training_in_memory_gives(tmp_path):
    student, teacher = pruned("qwen3_moe")
    teacher.save_pretrained(tmp_path / "dense")
    recipe = Recipe(weights=None, experts=0.5, update="none")
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", WINDOWS, recipe)
    distill_checkpoint(tmp_path / "pruned", tmp_path / "dense", tmp_path / "out", WINDOWS, settings=BLOCKWISE)
    distill(student, teacher, WINDOWS, "blockwise", settings=BLOCKWISE, progress=None)
    from transformers import AutoModelForCausalLM

    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for (name, one), other in zip(student.named_parameters(), got.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_command_takes_the_teachers_logits(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["moesparse", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    text = ("--samples", 12, "--length", 32)
    code, _, err = run("prune", "demo", tmp_path / "half", "--experts", 0.5, "--update", "none", *text)
    assert code == 0, err
    how = ("--teacher", "demo", "--train", "routers", "--epochs", 1, "--json", *text)
    code, out, err = run("distill", tmp_path / "half", "-o", tmp_path / "out", *how)
    assert code == 0, err
    report = json.loads(out)
    assert (report["settings"]["train"], report["settings"]["logit_share"]) == ("routers", 1.0)
    assert report["expert_weight"] == 0 and "kl" in report["rows"][0]
    code, _, err = run("distill", tmp_path / "half", "-o", tmp_path / "no", *how, "--lambda", 2)
    assert code == 2 and "--lambda must be 0 or" in err


@pytest.mark.parametrize(
    ("settings", "mode", "message"),
    [
        ({"train": "gates"}, "global", "train must be one of experts, all, routers, got 'gates'"),
        ({"train": "routers", "expert_weight": 1.0}, "global", "expert_weight must be 0 or None with train='routers'"),
        ({"train": "routers", "logit_share": 1.0}, "blockwise", "logit_share must be 0 in blockwise mode"),
        ({"train": "all"}, "blockwise", "train must be 'experts' or 'routers' in blockwise mode"),
    ],
)  # fmt: skip
def test_what_routers_cannot_be_trained_by(settings, mode, message):
    model = tiny_model("mixtral")
    with pytest.raises(UsageError, match=message):
        distill(model, model, WINDOWS, mode, settings=Settings(**settings))


def test_a_router_in_the_layer_itself_is_refused():
    student, teacher = pruned("gemma4_text")
    with placed(student, None), pytest.raises(UnsupportedModelError, match="must lie in a module with its router"):
        distill(student, teacher, WINDOWS, "blockwise", settings=BLOCKWISE, progress=None)
