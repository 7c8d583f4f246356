"""Distillation: the loss against its definition in float64, what trains and what does not, modes, refusals."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import moesparse
from moesparse.distillation import MODES, DistillWarning, Settings, distill
from moesparse.distillation.experts import Routed, StudentExperts, TeacherExperts, expert_loss
from moesparse.distillation.log import TrainingLog
from moesparse.distillation.matching import match
from moesparse.distillation.settings import check_mode, resolve_settings
from moesparse.distillation.training import windows_of_step
from moesparse.errors import MoESparseError, UsageError
from moesparse.evaluate import perplexity
from moesparse.experts.surgery import remove_experts
from moesparse.models.blocks import find_moe_blocks
from moesparse.models.experts_function import experts_run_by
from moesparse.progress import silent
from moesparse.testing import prune_by_magnitude, tiny_model

# transposed, biased and interleaved; no gate; a norm behind each expert; shared experts and a dense first layer
FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "gemma4_text", "deepseek_v3"]
FAST = Settings(learning_rate=3e-3, epochs=2, batch_size=4, micro_batch=2)


def windows(n=8, length=16, seed=0):
    return torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(seed))


def student_of(family="mixtral", pattern="2:4"):
    return prune_by_magnitude(tiny_model(family), pattern)


def expert_names(model):
    return {f"{block.name}.{matrix.name}" for block in find_moe_blocks(model) for matrix in block.matrices}


def calls_of(model, ids, **inputs):
    """(hidden, index, gates) of every block, from a forward of the model itself."""
    calls = {}
    handles = [
        block.experts.register_forward_pre_hook(
            lambda _m, args, kwargs, name=block.name: calls.update({name: (*args, *kwargs.values())}), with_kwargs=True
        )
        for block in find_moe_blocks(model)
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for handle in handles:
        handle.remove()
    return calls


def slow_expert(block, expert, x):
    """One expert's output before the gate, in float64."""
    up, down = block.matrices
    out = x @ up.weight[expert].double().T + (0 if up.bias is None else up.bias[expert].double())
    out = block.activation(out) @ down.weight[expert].double().T
    return block.post_expert_norm(out + (0 if down.bias is None else down.bias[expert].double()))


def slow_loss(student, teacher, call, ids=None, real=None):
    """Sum over the student's experts of the MSE on the teacher's tokens, token by token, in float64."""
    x, index, _ = call
    ids = list(range(teacher.num_experts)) if ids is None else ids
    total = 0.0
    for new, old in enumerate(ids):
        errors = [
            (slow_expert(student, new, row) - slow_expert(teacher, old, row)).square().mean()
            for t, row in enumerate(x.double())
            if (real is None or real[t]) and old in index[t].tolist()
        ]
        total += float(sum(errors) / len(errors)) if errors else 0.0
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_loss_is_its_definition(family):
    student, teacher, ids = student_of(family), tiny_model(family), windows(2)
    for pair, call in zip(match(student, teacher), calls_of(teacher, ids).values(), strict=True):
        experts = TeacherExperts(pair.teacher)
        with torch.no_grad():
            experts(*call)
            found = expert_loss(pair.student, experts.routed, pair.new_ids)
        assert float(found) == pytest.approx(slow_loss(pair.student, pair.teacher, call), rel=1e-4)


def test_padding_and_removed_experts_are_left_out_of_the_loss():
    teacher, ids = tiny_model("mixtral"), windows(2)
    student, kept = tiny_model("mixtral"), [[0, 2, 3, 5, 7], [1, 2, 3, 4, 6]]
    remove_experts(student, kept)
    real = torch.ones(32, dtype=torch.bool)
    real[:5] = False
    prune_by_magnitude(student)
    for pair, call, chosen in zip(match(student, teacher), calls_of(teacher, ids).values(), kept, strict=True):
        experts = TeacherExperts(pair.teacher)
        experts.token_mask = real
        with torch.no_grad():
            experts(*call)
            found = expert_loss(pair.student, experts.routed, pair.new_ids)
        assert float(found) == pytest.approx(slow_loss(pair.student, pair.teacher, call, chosen, real), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_trainable_experts_compute_what_the_model_does(family):
    model, ids = tiny_model(family), windows(2)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        want = model(ids).logits
        pairs = match(student_of(family), tiny_model(family))
        for block, pair in zip(find_moe_blocks(model), pairs, strict=True):
            experts = StudentExperts(dataclasses.replace(pair, student=block))
            with experts_run_by(block, experts):
                got = model(ids).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_empty_slots_give_nothing():
    block = find_moe_blocks(tiny_model("mixtral"))[0]
    hidden, gates = torch.randn(3, 32), torch.rand(3, 2)
    experts = TeacherExperts(block)
    full, empty = (experts(hidden, torch.tensor([[1, e], [2, e], [e, e]]), gates) for e in (3, 8))
    assert not empty[2].any()
    assert full[2].any()
    torch.testing.assert_close(empty[0], gates[0, 0] * slow_expert(block, 1, hidden[:1].double())[0].float())


def test_global_distillation_trains_the_kept_expert_weights_and_nothing_else():
    student, teacher, ids = student_of(), tiny_model("mixtral"), windows()
    before, dense = (copy.deepcopy(model.state_dict()) for model in (student, teacher))
    report = distill(student, teacher, ids, settings=FAST)
    names = expert_names(student)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in names), name
        if name in names:
            assert not tensor[before[name] == 0].any()
            assert tensor.dtype == before[name].dtype
    assert all(torch.equal(tensor, dense[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())
    assert report.zeros[0] == report.zeros[1] == report.weights // 2
    assert [row["step"] for row in report.rows] == [0, 1, 2, 3]
    rates = [row["learning_rate"] / FAST.learning_rate for row in report.rows]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])


def test_lambda_makes_both_parts_equal_at_step_0_and_ce_is_the_models_own():
    student, teacher, ids = student_of(), tiny_model("mixtral"), windows()
    settings = dataclasses.replace(FAST, batch_size=8, micro_batch=8)
    ce = math.log(perplexity(student, ids).perplexity)
    experts = sum(
        slow_loss(pair.student, pair.teacher, call)
        for pair, call in zip(match(student, teacher), calls_of(teacher, ids).values(), strict=True)
    )
    report = distill(student, teacher, ids, settings=settings)
    assert report.rows[0]["ce"] == pytest.approx(ce, rel=1e-5)
    assert report.rows[0]["experts"] == pytest.approx(experts, rel=1e-4)
    assert report.expert_weight == pytest.approx(ce / experts, rel=1e-4)
    assert report.rows[0]["loss"] == pytest.approx(2 * ce, rel=1e-4)
    given = distill(student_of(), teacher, ids, settings=dataclasses.replace(settings, expert_weight=0.25))
    assert given.expert_weight == 0.25


@pytest.mark.parametrize("train", ["experts", "all"])
def test_a_step_is_adamw_on_the_mean_of_its_forwards(train):
    """One step by hand: gradients of CE + lambda * expert loss from plain autograd, on a copy that is eager."""
    teacher, ids = tiny_model("mixtral"), windows(4)
    student, by_hand = student_of(), student_of()
    settings = Settings(1e-2, epochs=1, batch_size=4, micro_batch=2, expert_weight=0.3, train=train, max_grad_norm=0.5)
    report = distill(student, teacher, ids, settings=settings)
    by_hand.set_experts_implementation("eager")
    names = expert_names(by_hand)
    parameters = {name: p for name, p in by_hand.named_parameters() if train == "all" or name in names}
    masks = {name: p.detach() != 0 if name in names else torch.tensor(True) for name, p in parameters.items()}
    groups = [{"params": [p], "lr": 1e-2 if name in names else 1e-3} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for numbers in windows_of_step(0, 4, settings).split(2):
        batch = ids[numbers]
        loss = F.cross_entropy(by_hand(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        for block, dense, (x, index, _) in zip(
            find_moe_blocks(by_hand), find_moe_blocks(teacher), calls_of(teacher, batch).values(), strict=True
        ):
            up, down = (matrix.parameter for matrix in block.matrices)
            for expert in range(8):
                rows = x[(index == expert).any(-1)]
                if len(rows):
                    out = block.activation(rows @ up[expert].T) @ down[expert].T
                    loss = loss + 0.3 * F.mse_loss(out, slow_expert(dense, expert, rows.double()).float())
        (loss / 2).backward()
    for name, parameter in parameters.items():
        parameter.grad *= masks[name]
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
    assert report.rows[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    optimizer.step()
    trained = dict(student.named_parameters())
    for name, parameter in parameters.items():
        # a first step of Adam has the size of the rate whatever the gradient: signs of tiny ones may differ
        close = (trained[name] - parameter).abs() < 1e-4
        assert close.float().mean() > 0.999, name


def test_logits_stand_in_for_the_text():
    """CE, KL and the loss against the models' own logits in float64; padding is left out."""
    student, teacher, ids = student_of(), tiny_model("mixtral"), windows()
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    with torch.no_grad():
        ours, theirs = (
            model(ids, attention_mask=mask).logits[:, :11].double().log_softmax(-1) for model in (student, teacher)
        )
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    ce = -float(ours.gather(-1, ids[:, 1:12, None]).mean())
    settings = Settings(1e-2, epochs=8, batch_size=8, micro_batch=8, expert_weight=0.0, logit_share=0.75)
    report = distill(student, teacher, (ids, mask), settings=settings)
    first, last = report.rows[0], report.rows[-1]
    assert first["kl"] == pytest.approx(kl, rel=1e-4)
    assert first["ce"] == pytest.approx(ce, rel=1e-5)
    assert first["loss"] == pytest.approx(0.25 * ce + 0.75 * kl, rel=1e-4)
    assert first["experts"] == report.expert_weight == 0.0
    assert last["loss"] < 0.9 * first["loss"]
    assert report.zeros[0] == report.zeros[1]
    # lambda balances what stands in the place of CE
    student = student_of()
    report = distill(student, teacher, (ids, mask), settings=dataclasses.replace(settings, expert_weight=None))
    assert report.expert_weight * report.rows[0]["experts"] == pytest.approx(0.25 * ce + 0.75 * kl, rel=1e-4)
    alone = dataclasses.replace(settings, epochs=1, logit_share=1.0)
    assert distill(student_of(), teacher, (ids, mask), settings=alone).rows[0]["loss"] == pytest.approx(kl, rel=1e-4)


def test_gradient_checkpointing_changes_memory_only():
    rows = []
    for checkpointing in (False, True):
        report = distill(student_of(), tiny_model("mixtral"), windows(), settings=FAST, checkpointing=checkpointing)
        rows.append([(row["ce"], row["experts"], row["grad_norm"]) for row in report.rows])
    assert rows[0] == [pytest.approx(row, rel=1e-6) for row in rows[1]]


def test_a_bf16_student_trains_in_float32():
    """Steps far below bf16's resolution add up: with bf16 weights nothing would move."""
    student, teacher = student_of().bfloat16(), tiny_model("mixtral").bfloat16()
    before = copy.deepcopy(student.state_dict())
    settings = Settings(learning_rate=2e-4, epochs=16, batch_size=8, micro_batch=8)
    report = distill(student, teacher, windows(), settings=settings)
    assert all(tensor.dtype == torch.bfloat16 for tensor in student.state_dict().values())
    moved = [(student.state_dict()[name] != before[name]).float().mean() for name in expert_names(student)]
    assert min(moved) > 0.1
    assert report.rows[-1]["experts"] < report.rows[0]["experts"]


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_all_weights_train_and_zeros_of_the_experts_stay(family):
    """In bf16, which is what the model goes on computing in, and where steps this small must add up in float32."""
    student, teacher = student_of(family).bfloat16(), tiny_model(family).bfloat16()
    before = copy.deepcopy(student.state_dict())
    settings = Settings(learning_rate=2e-4, epochs=16, batch_size=8, micro_batch=8, logit_share=1.0, train="all")
    dtypes = set()
    student.get_output_embeddings().register_forward_pre_hook(lambda _m, args: dtypes.add(args[0].dtype))
    report = distill(student, teacher, windows(), settings=settings)
    assert dtypes == {torch.bfloat16}
    names, after = expert_names(student), student.state_dict()
    assert after.keys() == before.keys()
    for name, parameter in student.named_parameters():
        moved = after[name] != before[name]
        # steps are smaller than what bf16 resolves beside a one, and a router's bias has no gradient
        assert parameter.ndim == 1 or moved.any(), name
        assert name not in names or not moved[before[name] == 0].any()
        assert (parameter.dtype, parameter.requires_grad, parameter.grad) == (torch.bfloat16, True, None)
    assert report.rows[-1]["kl"] < report.rows[0]["kl"]
    assert report.zeros[0] == report.zeros[1]


def removed(kept=(0, 2, 3, 5, 6)):
    """A student with fewer experts, each with the teacher's weights."""
    student = tiny_model("mixtral")
    remove_experts(student, [list(kept)] * 2)
    return student


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_a_removal_costs_is_won_back_on_the_text(share):
    """Experts without a refit give what the teacher's give: their loss has no weight, and is not computed."""
    teacher, student = tiny_model("mixtral"), removed()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    settings = dataclasses.replace(FAST, logit_share=share, epochs=6)
    report = distill(student, teacher, windows(), settings=settings)
    assert report.expert_weight == 0 and {row["experts"] for row in report.rows} == {0}
    name = "kl" if share else "ce"
    assert report.rows[-1][name] < 0.9 * report.rows[0][name]
    changed = {name for name, tensor in student.state_dict().items() if not tensor.equal(before[name])}
    assert changed == expert_names(student)
    # it is what asking for no expert loss gives
    again = removed()
    same = distill(again, teacher, windows(), settings=dataclasses.replace(settings, expert_weight=0.0))
    assert same.rows == report.rows
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_blockwise_trains_every_block_on_the_teachers_tokens(family):
    student, teacher, ids = student_of(family), tiny_model(family), windows()
    before = copy.deepcopy(student.state_dict())
    settings = Settings(learning_rate=1e-2, epochs=10, batch_size=8, micro_batch=8)
    pairs = match(student, teacher)
    want = [
        slow_loss(pair.student, pair.teacher, call)
        for pair, call in zip(pairs, calls_of(teacher, ids).values(), strict=True)
    ]
    report = distill(student, teacher, ids, "blockwise", settings=settings)
    for pair, first in zip(pairs, want, strict=True):
        rows = [row for row in report.rows if row["block"] == pair.student.name]
        assert len(rows) == 10
        assert rows[0]["experts"] == pytest.approx(first, rel=1e-4)
        assert rows[-1]["experts"] < 0.8 * first
    names = expert_names(student)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in names), name
        assert not tensor[before[name] == 0].any() or name not in names
    assert report.expert_weight is None


def test_a_packed_student_is_packed_again():
    student, teacher = student_of(), tiny_model("mixtral")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    moesparse.pack(student)
    distill(student, teacher, windows(), settings=FAST)
    moesparse.unpack(student)
    for name in expert_names(student):
        tensor = student.state_dict()[name]
        assert not tensor[before[name] == 0].any()
        assert not torch.equal(tensor, before[name])


def test_every_window_is_seen_once_an_epoch_and_the_order_is_the_seeds():
    settings = Settings(batch_size=4, micro_batch=2, seed=1)
    epoch = [windows_of_step(step, 10, settings).tolist() for step in range(3)]
    assert sorted([*epoch[0], *epoch[1], *epoch[2]][:10]) == list(range(10))
    assert epoch[2][2:] == epoch[0][:2]
    assert [windows_of_step(step, 10, settings).tolist() for step in range(3, 6)] != epoch
    other = dataclasses.replace(settings, seed=2)
    assert windows_of_step(0, 10, other).tolist() != epoch[0]


class TestEarlyWarnings:
    def test_a_rate_that_moves_nothing(self):
        settings = Settings(learning_rate=1e-9, epochs=10, batch_size=8, micro_batch=8)
        with pytest.warns(DistillWarning, match=r"the expert loss went from .* within 10 steps: the learning rate"):
            report = distill(student_of(), tiny_model("mixtral"), windows(), settings=settings)
        assert len(report.warnings) == 1

    def test_logits_that_come_no_closer(self):
        settings = Settings(1e-9, epochs=10, batch_size=8, micro_batch=8, expert_weight=0.0, logit_share=1.0)
        with pytest.warns(DistillWarning, match=r"^KL went from .* within 10 steps: the learning rate"):
            distill(student_of(), tiny_model("mixtral"), windows(), settings=settings)

    def test_batches_that_differ_are_no_plateau(self):
        noise = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()
        flat, falling = TrainingLog(silent, 200, None, []), TrainingLog(silent, 200, None, [])
        for step, value in enumerate(noise):
            # two percent of difference between batches; a fall of a fifth in a hundred steps
            falling.add({"step": step, "block": "b", "experts": 10 - 0.02 * step + 0.2 * value}, tokens=1)
            falling.check(0, 200)
            flat.add({"step": step, "block": "b", "experts": 10 + 0.2 * value}, tokens=1)
        assert not falling.warnings
        with pytest.warns(DistillWarning, match="within 100 steps"):
            flat.check(0, 200)

    def test_a_perplexity_that_rises(self):
        rows = [{"step": n, "ce": 3.0 - 0.01 * n, "experts": 1.0 - 0.01 * n} for n in range(12)]
        journal = TrainingLog(silent, 20, None, [])
        for row in rows:
            journal.add(row, tokens=1)
            journal.check(0, 20)
        assert not journal.warnings
        for n in range(12, 20):
            journal.add({"step": n, "ce": 3.5, "experts": 1.0}, tokens=1)
        with pytest.warns(
            DistillWarning, match=r"rose from 18\.36 to 33\.12 by step 19: the learning rate is too high"
        ):
            journal.check(0, 20)
        journal.check(0, 20)
        assert len(journal.warnings) == 1

    def test_batches_that_differ_are_no_rise(self):
        losses = (2.6 + 0.17 * torch.randn(2000, generator=torch.Generator().manual_seed(0))).tolist()
        means = [sum(losses[i : i + 5]) / 5 for i in range(1996)]
        top = means.index(max(means))
        # half as much perplexity again, by chance; here at the end, where it is looked at
        assert max(means) - min(means) > math.log(1.5)
        journal = TrainingLog(silent, 2005, None, [])
        for step, value in enumerate(losses + losses[top : top + 5]):
            journal.add({"step": step, "ce": value, "experts": 1.0 / (1 + step)}, tokens=1)
        journal.check(0, 2005)
        assert not journal.warnings

    def test_a_run_that_goes_well_is_quiet(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DistillWarning)
            settings = Settings(learning_rate=3e-3, epochs=12, batch_size=8, micro_batch=8)
            assert not distill(student_of(), tiny_model("mixtral"), windows(), settings=settings).warnings


class TestRefusals:
    def test_students_that_do_not_match(self):
        teacher = tiny_model("mixtral")
        fewer = prune_by_magnitude(tiny_model("mixtral", num_hidden_layers=1))
        with pytest.raises(
            MoESparseError, match=r"the teacher's 2 MoE blocks, got 1; the first .* model\.layers\.1\.mlp"
        ):
            match(fewer, teacher)
        with pytest.raises(MoESparseError, match="must be of the teacher's family mixtral, got qwen3_moe"):
            match(student_of("qwen3_moe"), teacher)
        narrow = prune_by_magnitude(tiny_model("mixtral", intermediate_size=64))
        with pytest.raises(MoESparseError, match=r"experts\.gate_up_proj: .* shape \[192, 32\] .*, got \[128, 32\]"):
            match(narrow, teacher)
        small = prune_by_magnitude(tiny_model("mixtral", num_experts=6, num_local_experts=6))
        with pytest.raises(MoESparseError, match=r"experts: student must have the teacher's 8 experts, or say which"):
            match(small, teacher)
        with pytest.raises(
            MoESparseError, match="student must be pruned, got all of the teacher's experts and no zeros"
        ):
            match(tiny_model("mixtral"), teacher)

    def test_a_pattern_that_the_config_states_and_the_weights_do_not_hold(self):
        student = student_of(pattern="4:8")
        student.config.moesparse = {"recipe": {"weights": "2:4"}}
        with pytest.raises(MoESparseError, match=r"gate_up_proj: student must hold the pattern 2:4 that its config"):
            distill(student, tiny_model("mixtral"), windows())

    def test_a_teacher_that_has_pruned_what_the_student_keeps(self):
        teacher = prune_by_magnitude(tiny_model("mixtral", seed=1))
        with pytest.raises(
            MoESparseError, match=r"student's pattern must lie within the teacher's, got weights in exp"
        ):
            match(student_of(), teacher)
        # a teacher pruned less is one that the student can have been pruned from
        match(prune_by_magnitude(student_of(pattern="2:4"), "1:4"), student_of(pattern="2:4"))

    def test_removed_experts_of_another_teacher(self):
        student = tiny_model("mixtral")
        remove_experts(student, [[0, 1, 2, 3]] * 2)
        student.config.moesparse["kept_experts"]["model.layers.1.mlp.experts"] = [0, 1, 2, 9]
        with pytest.raises(
            MoESparseError, match=r"layers\.1\.mlp\.experts: .* 0 1 2 9, of which 9 is none of the teach"
        ):
            match(student, tiny_model("mixtral"))

    def test_experts_that_are_the_teachers_own_learn_nothing_block_by_block(self):
        student, teacher = removed(), tiny_model("mixtral")
        with pytest.raises(MoESparseError, match=r"student's experts must differ .* mode='global'"):
            distill(student, teacher, windows(), "blockwise")
        # one weight of one expert is enough
        with torch.no_grad():
            find_moe_blocks(student)[1].matrices[1].parameter[2, 0, 0] += 1
        distill(student, teacher, windows(), "blockwise", settings=FAST)

    def test_nothing_to_win_back(self):
        teacher = student_of()
        with pytest.raises(MoESparseError, match="student must differ from the teacher"):
            distill(copy.deepcopy(teacher), teacher, windows())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mode": "layerwise"}, "mode must be one of global, blockwise, got 'layerwise'"),
            ({"settings": "large"}, "settings must be Settings or one of paper, small, got 'large'"),
            ({"resume": True}, "resume must come with the state folder"),
            ({"mode": "blockwise", "checkpointing": True}, "belong to mode='global', got mode='blockwise'"),
            (
                {"mode": "blockwise", "settings": Settings(logit_share=0.5)},
                "logit_share must be 0 in blockwise mode, which has no logits, got 0.5",
            ),
            (
                {"mode": "blockwise", "settings": Settings(train="all")},
                "train must be 'experts' or 'routers' in blockwise mode, which runs nothing else, got 'all'",
            ),
            ({"settings": Settings(logit_share=1.0), "cache": "c"}, "cache must be None with logit_share 1.0, got c"),
            ({"save_every": 0}, "save_every must be at least 1, got 0"),
            ({"windows": torch.zeros(2, 1, dtype=torch.long)}, "at least 2 tokens"),
            ({"windows": torch.full((2, 8), 10**6)}, "token ids must lie in"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(UsageError, match=message):
            distill(student_of(), tiny_model("mixtral"), **({"windows": windows()} | arguments))

    def test_settings(self):
        for wrong, message in (
            ({"learning_rate": 0.0}, "learning_rate must be positive"),
            ({"epochs": 0}, "epochs must be at least 1"),
            ({"batch_size": 6, "micro_batch": 4}, "batch_size must be a multiple of micro_batch=4, got 6"),
            ({"expert_weight": -1.0}, "expert_weight must be at least 0"),
            ({"logit_share": 1.5}, "logit_share must be from 0 to 1, got 1.5"),
            ({"train": "router"}, "train must be one of experts, all, routers, got 'router'"),
        ):
            with pytest.raises(UsageError, match=message):
                Settings(**wrong)

    def test_presets(self):
        for mode in MODES:
            paper = resolve_settings("paper", mode)
            assert (paper.learning_rate, paper.epochs, paper.batch_size, paper.logit_share) == (2e-5, 3, 16, 0.0)
            check_mode(mode, resolve_settings("small", mode))
        small = resolve_settings("small", "global")
        assert (small.logit_share, small.expert_weight) == (1.0, 0.0)

    def test_a_loss_that_is_not_finite(self):
        student = student_of()
        with torch.no_grad():
            student.lm_head.weight[3, 4] = float("nan")
        with pytest.raises(MoESparseError, match=r"the loss must be finite, got CE nan .* for windows \["):
            distill(student, tiny_model("mixtral"), windows(), settings=FAST)
        assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in student.parameters())


def test_routed_is_what_the_model_was_called_with():
    teacher, ids = tiny_model("mixtral"), windows(2)
    block, call = find_moe_blocks(teacher)[0], next(iter(calls_of(teacher, ids).values()))
    experts = TeacherExperts(block)
    with torch.no_grad(), experts_run_by(block, experts):
        teacher(ids)
    assert isinstance(experts.routed, Routed)
    assert torch.equal(experts.routed.hidden, call[0])
    assert torch.equal(experts.routed.index, call[1])
