"""Removing experts: the result is the whole model with the removed experts masked, bit for bit, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moesparse.errors import UnsupportedModelError, UsageError
from moesparse.experts.router_groups import router_groups
from moesparse.experts.surgery import plan_removal, remove_experts
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.testing import MOE_FAMILIES, tiny_model

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class _MaskLogits(TorchFunctionMode):
    """Within it, every linear output as wide as the router has -inf in the columns of removed experts.

    The other columns are computed alone, and so is their softmax: BLAS rounds a product of 6 columns unlike one of 8,
    and a CPU whose vectors hold 8 numbers adds up 8 in another order than 6.
    """

    def __init__(self, widths: tuple[int, ...], removed: Tensor):
        super().__init__()
        self.widths, self.removed = widths, set(removed.tolist())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (F.linear, *_SOFTMAX) or out.shape[-1] not in self.widths:
            return out
        rows = [row for row in range(out.shape[-1]) if row not in self.removed]
        if func in _SOFTMAX:
            shares = torch.zeros_like(out)
            shares[..., rows] = func(args[0][..., rows], *args[1:], **(kwargs or {}))
            return shares
        hidden, weight, *bias = args
        masked = torch.full_like(out, -torch.inf)
        masked[..., rows] = F.linear(hidden, weight[rows], *(None if b is None else b[rows] for b in bias))
        return masked


@contextmanager
def masked(blocks: list[MoEBlock], kept: list[Tensor]) -> Iterator[None]:
    """The whole model with the removed experts' router logits, and selection biases, at -inf."""
    with ExitStack() as stack:
        for block, ids in zip(blocks, kept, strict=True):
            removed = torch.tensor([e for e in range(block.num_experts) if e not in ids.tolist()], dtype=torch.int64)
            assert block.router is not None
            widths = (block.num_experts, block.num_experts + 1)
            mode = _MaskLogits(widths, removed)
            stack.enter_context(_around(block.router, mode))
            owned = dict(block.moe.named_parameters(recurse=False)) | dict(block.moe.named_buffers(recurse=False))
            owned |= dict(block.router.named_parameters()) | dict(block.router.named_buffers())
            for name, tensor in owned.items():
                if name.endswith(("bias", "biases")) and tensor.shape[-1] in widths:
                    stack.enter_context(_filled(tensor, removed))
        yield


@contextmanager
def _around(module: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    # a hook that returns something replaces the input
    before = module.register_forward_pre_hook(lambda *_: (mode.__enter__(), None)[1])
    after = module.register_forward_hook(lambda *_: mode.__exit__(None, None, None))
    yield
    before.remove()
    after.remove()


@contextmanager
def _filled(tensor: Tensor, removed: Tensor) -> Iterator[None]:
    old = tensor.detach().clone()
    with torch.no_grad():
        tensor[..., removed] = -torch.inf
    yield
    with torch.no_grad():
        tensor.copy_(old)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    if tokens is None:
        tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=tokens, use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state


def keep_some(model: nn.Module, count: int, seed: int = 0) -> list[Tensor]:
    """Different experts in every block, equally many of each router group."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for block in find_moe_blocks(model):
        groups = router_groups(block)
        parts = 1 if groups is None else groups.count
        size = block.num_experts // parts
        chosen = [torch.randperm(size, generator=generator)[: count // parts] + g * size for g in range(parts)]
        kept.append(torch.cat(chosen).sort().values)
    return kept


@pytest.fixture(autouse=True)
def _quiet():
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_removing_equals_masking_the_router_bit_for_bit(family):
    pytest.importorskip("transformers")
    model = _tiny(family)
    kept = keep_some(model, 6)
    for block, ids in zip(find_moe_blocks(model), kept, strict=True):
        if hasattr(block.router, "tid2eid"):
            _fill_table(block.router.tid2eid, ids)
    dense = logits(model)
    with masked(find_moe_blocks(model), kept):
        want = logits(model)
    assert not torch.equal(want, dense), "masking changed nothing: the oracle is blind here"
    remove_experts(model, kept)
    assert torch.equal(logits(model), want)


# Softmax renormalised or not, sigmoid with selection bias and groups, router and expert biases, transposed experts,
# per-expert scales, shared experts, a shared-expert sink in the router, a hash table, experts without a gate.
SAVED = (
    "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "gemma4_text", "glm4_moe", "gpt_oss",
    "granitemoe", "hunyuan_v1_moe", "hy_v3", "inkling_text", "lfm2_moe", "minimax_m2", "mixtral", "nemotron_h", "olmoe",
    "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip


@pytest.mark.parametrize("family", SAVED)
def test_a_saved_folder_loads_in_plain_transformers_with_the_same_bits(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = _tiny(family)
    model.save_pretrained(tmp_path / "dense")
    report = remove_experts(model, keep_some(model, 6))
    want = logits(model)
    model.save_pretrained(tmp_path / "pruned")

    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(logits(loaded), want)

    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("dense", "pruned")]
    removed = sum(_bytes(before) - _bytes(after) for block in report.blocks for before, after in block.tensors.values())
    assert report.bytes_before - report.bytes_after == removed
    # the header of a safetensors file shrinks a little too
    assert 0 <= (sizes[0] - sizes[1]) - removed < 20_000


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


def test_kept_tensors_are_copies_and_ascend():
    model = tiny_model("mixtral")
    block = find_moe_blocks(model)[0]
    dense = block.experts.down_proj.detach().clone()
    report = remove_experts(model, [torch.tensor([6, 1, 3])] * 2)
    down = block.experts.down_proj
    assert report.blocks[0].kept == (1, 3, 6)
    assert report.blocks[0].removed == (0, 2, 4, 5, 7)
    assert torch.equal(down, dense[[1, 3, 6]])
    assert down.untyped_storage().nbytes() == down.numel() * 4
    assert isinstance(down, nn.Parameter)
    assert down.requires_grad
    assert find_moe_blocks(model)[0].num_experts == 3
    assert model.config.num_local_experts == 3
    assert (block.experts.num_experts, block.router.num_experts, model.num_experts) == (3, 3, 3)


def test_the_index_map_reaches_back_to_the_dense_model():
    model = tiny_model("olmoe")
    name = find_moe_blocks(model)[0].name
    remove_experts(model, [[0, 2, 3, 5, 7], [1, 2, 3, 4, 5]])
    assert model.config.moesparse["kept_experts"][name] == [0, 2, 3, 5, 7]
    remove_experts(model, [[1, 2, 4], [0, 1, 2]])
    assert model.config.moesparse["kept_experts"][name] == [2, 3, 7]


def test_keeping_every_expert_changes_nothing():
    model = tiny_model("qwen3_moe")
    want = logits(model)
    report = remove_experts(model, [range(8), range(8)])
    assert torch.equal(logits(model), want)
    assert report.bytes_before == report.bytes_after
    assert report.config == {}


def test_whole_router_groups_may_go():
    model = tiny_model("deepseek_v3", n_group=4, topk_group=2)
    kept = [torch.tensor([2, 3, 4, 5])] * len(find_moe_blocks(model))
    with masked(find_moe_blocks(model), kept):
        want = logits(model)
    report = remove_experts(model, kept)
    assert report.config == {"n_routed_experts": (8, 4), "n_group": (4, 2)}
    assert torch.equal(logits(model), want)


def test_a_token_table_gets_the_most_similar_kept_expert():
    model = tiny_model("deepseek_v4")
    block = find_moe_blocks(model)[0]
    router = block.router
    with torch.no_grad():
        router.weight[7] = 2 * router.weight[3]
        router.weight[6] = router.weight[3] + 0.01 * router.weight[5]
    router.tid2eid.copy_(torch.tensor([1, 7]))
    router.tid2eid[5] = torch.tensor([3, 7])
    report = remove_experts(model, [[1, 2, 3, 4, 5, 6]] * 2)
    # old 3 is new 2; for token 5 it is taken, and old 6, new 5, comes next
    assert router.tid2eid[0].tolist() == [0, 2]
    assert router.tid2eid[5].tolist() == [2, 5]
    assert report.blocks[0].rerouted == len(router.tid2eid)


@pytest.mark.parametrize(
    ("family", "kept", "message"),
    [
        ("mixtral", [[0, 1]], "each of the 2 blocks, got 1"),
        ("mixtral", [[], [0, 1]], "experts from 0 to 7, got none"),
        ("mixtral", [[0, 8], [0, 1]], "experts from 0 to 7, got 0 to 8"),
        ("mixtral", [[0, 0, 1], [0, 1, 2]], r"name each expert once, got \[0, 0, 1\]"),
        ("mixtral", [[0], [0]], "at least the 2 experts each token uses"),
        ("mixtral", [[0, 1, 2], [0, 1]], "every block unless allow_non_uniform=True, got 2 to 3"),
        ("mixtral", [torch.tensor([True, False]), [0, 1]], "1-D tensor of expert ids, got torch.bool"),
        ("deepseek_v3", [[0, 1, 2, 4, 5]], r"equally many of each group, got \[3, 2\]"),
    ],
)
def test_what_cannot_be_kept_is_a_usage_error_and_changes_nothing(family, kept, message):
    model = tiny_model(family)
    want, config = logits(model), model.config.to_dict()
    with pytest.raises(UsageError, match=message):
        remove_experts(model, kept)
    assert torch.equal(logits(model), want)
    assert model.config.to_dict() == config


def test_too_few_experts_for_the_groups_a_token_uses():
    model = tiny_model("deepseek_v3", num_experts_per_tok=3)
    with pytest.raises(UsageError, match="must hold at least 6 experts, got 4"):
        remove_experts(model, [[0, 1, 4, 5]])


def test_deepseek_v2_without_group_routing_has_no_groups():
    assert router_groups(find_moe_blocks(tiny_model("deepseek_v2"))[0]) is None
    limited = tiny_model("deepseek_v2", topk_method="group_limited_greedy", topk_group=2)
    groups = router_groups(find_moe_blocks(limited)[0])
    assert groups is not None
    assert (groups.count, groups.top, groups.ranked_by) == (2, 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("extra", r"mixtral: model.layers.0.mlp.scale must be absent as built from the config, got \(8,\)"),
        ("table", "mixtral: model.layers.0.mlp.gate.ids holds int64 values beside the experts"),
        ("rows", "model.layers.0.mlp.gate.weight .* becomes .* which of its rows belong to which expert is not known"),
        ("no key", "no key of its config was found to set the number of experts"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name_before_anything_changes(change, message, monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    if change in ("table", "rows"):
        build = modeling_mixtral.MixtralTopKRouter.__init__

        def init(self: Any, config: Any) -> None:
            build(self, config)
            if change == "table":
                self.register_buffer("ids", torch.zeros(8, dtype=torch.int64))
            else:
                self.weight = nn.Parameter(torch.zeros(2 * config.num_local_experts + 1, config.hidden_size))

        monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "__init__", init)
    model = tiny_model("mixtral")
    if change == "extra":
        model.model.layers[0].mlp.scale = nn.Parameter(torch.ones(8))
    elif change == "no key":
        monkeypatch.setattr("moesparse.experts.surgery.config_settings", lambda *_: [])
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=message):
        remove_experts(model, [[0, 1, 2], [0, 1, 2]])
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before
    assert model.config.num_local_experts == 8
    assert model.num_experts == 8


def test_blocks_applied_one_by_one_give_the_same_model():
    at_once, stepwise = tiny_model("gpt_oss"), tiny_model("gpt_oss")
    kept = keep_some(at_once, 5)
    remove_experts(at_once, kept)
    plan = plan_removal(stepwise, kept)
    for position in (1, 0):
        plan.apply_block(position)
    plan.finish()
    assert torch.equal(logits(stepwise), logits(at_once))
    assert stepwise.config.to_dict() == at_once.config.to_dict()


def _tiny(family: str) -> nn.Module:
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {family}")
    return tiny_model(family)


def _fill_table(table: Tensor, ids: Tensor) -> None:
    """Every token goes to top_k different experts of `ids`."""
    generator = torch.Generator().manual_seed(2)
    for row in table:
        row.copy_(ids[torch.randperm(len(ids), generator=generator)[: len(row)]])
