"""SparseExperts: the same call, the same result and the same bits as the masked dense experts it replaces."""

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

from moesparse.errors import MoESparseError, UnsupportedModelError
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.packed.experts import SparseExperts
from moesparse.testing import MOE_FAMILIES, assert_within_budget, has_family, prune_by_magnitude, tiny_model
from moesparse.weights.patterns import Pattern
from moesparse_kernels import NMWeight, moe_dense

# plain; no gate; clamped, interleaved, biased and transposed; a clamp alone; a norm behind each expert
KINDS = ("mixtral", "nemotron_h", "gpt_oss", "deepseek_v4", "muse_spark_text")

_models: dict[tuple[str, str], nn.Module] = {}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.ERROR)


def block_of(family: str, pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> MoEBlock:
    """The last block of the family's pruned tiny model, to be changed at will."""
    if not has_family(family):
        pytest.skip(f"this transformers release has no {family} behind ExpertsInterface")
    if (family, pattern) not in _models:
        _models[family, pattern] = prune_by_magnitude(tiny_model(family), pattern)
    return find_moe_blocks(copy.deepcopy(_models[family, pattern]).to(dtype))[-1]


def packed(block: MoEBlock, *patterns: str) -> SparseExperts:
    """The block's experts packed; one pattern for both matrices, or one for each."""
    groups = [Pattern.parse(pattern).group for pattern in patterns or ("2:4",)]
    pairs = zip(block.matrices, groups * 2 if len(groups) == 1 else groups, strict=True)
    return SparseExperts(block, {matrix.name: NMWeight.pack(matrix.weight, n=n, m=m) for matrix, (n, m) in pairs})


def routed(block: MoEBlock, tokens: int = 11, top_k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct experts and gates; the last expert gets no token unless top_k is E."""
    generator = torch.Generator().manual_seed(0)
    top_k = top_k or block.top_k or 2
    experts = max(block.num_experts - 1, top_k)
    dtype = block.matrices[0].weight.dtype
    hidden = torch.randn(tokens, block.hidden_size, generator=generator).to(dtype)
    index = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=-1).indices
    return hidden, index, (torch.rand(tokens, top_k, generator=generator) + 0.1).to(dtype)


def eager(block: MoEBlock, *inputs: Tensor) -> Tensor:
    block.experts.config._experts_implementation = "eager"
    return block.experts(*inputs)


def check_against_dense(block: MoEBlock, sparse: SparseExperts, inputs: tuple[Tensor, ...]) -> None:
    hidden, index, gates = inputs
    same_dtype = eager(block, *inputs)
    wide = copy.deepcopy(block.experts).double()
    wide.config._experts_implementation = "batched_mm"  # some families cast to fp32 in their own loop
    assert_within_budget(sparse(*inputs), same_dtype, wide(hidden.double(), index, gates.double()), block.name)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@torch.no_grad()
def test_every_family_gives_what_its_dense_experts_give(family: str):
    block = block_of(family)
    check_against_dense(block, packed(block), routed(block))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_half_precision_within_budget(family: str, dtype: torch.dtype):
    block = block_of(family, dtype=dtype)
    sparse = packed(block)
    assert sparse(*routed(block)).dtype == dtype
    check_against_dense(block, sparse, routed(block, tokens=64))


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (0, 2), (11, 1), (11, 8)], ids=["one", "none", "top1", "all"])
@torch.no_grad()
def test_shapes_at_the_edge(tokens: int, top_k: int):
    block = block_of("mixtral")
    inputs = routed(block, tokens, top_k)
    if tokens:
        check_against_dense(block, packed(block), inputs)
    else:
        assert packed(block)(*inputs).shape == (0, block.hidden_size)


@torch.no_grad()
def test_all_tokens_on_one_expert_and_strided_input():
    block = block_of("mixtral")
    hidden, index, gates = routed(block, top_k=1)
    strided = torch.cat([hidden, hidden], dim=1)[:, : block.hidden_size]
    assert not strided.is_contiguous()
    check_against_dense(block, packed(block), (strided, torch.full_like(index, 3), gates))


@pytest.mark.parametrize("family", [family for family in KINDS if family != "muse_spark_text"])
@torch.no_grad()
def test_exactly_what_the_same_code_gives_on_dense_weights(family: str):
    block = block_of(family)
    up, down = block.matrices
    expected = moe_dense(
        *routed(block),
        up.weight.contiguous(),
        down.weight.contiguous(),
        activation=block.activation_name or block.activation,
        gated=block.has_gate,
        gate_up_bias=up.bias,
        down_bias=down.bias,
    )
    assert torch.equal(packed(block)(*routed(block)), expected)


@torch.no_grad()
def test_expert_ids_outside_are_dropped():
    block = block_of("muse_spark_text") if has_family("muse_spark_text") else block_of("mixtral")
    hidden, index, gates = routed(block)
    shard = index.clone()
    shard[:, 0] = block.num_experts
    expected = eager(block, hidden, index[:, 1:], gates[:, 1:])
    torch.testing.assert_close(packed(block)(hidden, shard, gates), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "6:8", "5:16", "8:32"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_round_trip_is_bit_for_bit(family: str, pattern: str):
    block = block_of(family, pattern, torch.bfloat16)
    before = {name: value.clone() for name, value in block.experts.state_dict().items()}
    back = packed(block, pattern).to_dense()
    assert type(back) is type(block.experts)
    assert list(back.state_dict()) == list(before)
    for name, value in back.state_dict().items():
        assert torch.equal(value.view(torch.int16), before[name].view(torch.int16)), name
        assert value.stride() == before[name].stride()
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in block.experts.parameters()]
    assert set(vars(back)) == set(vars(block.experts))
    with torch.no_grad():
        inputs = routed(block)
        assert torch.equal(back(*inputs), block.experts(*inputs))


@torch.no_grad()
def test_two_patterns_in_one_block():
    block = block_of("mixtral", "1:4")
    check_against_dense(block, packed(block, "2:4", "1:4"), routed(block))


def test_attributes_are_those_of_the_dense_module():
    block = block_of("gpt_oss")
    sparse = packed(block)
    for name, value in vars(block.experts).items():
        if not name.startswith("_"):
            assert getattr(sparse, name) is value, name
    assert torch.equal(sparse.gate_up_proj_bias, block.experts.gate_up_proj_bias)
    assert sparse.dtype == torch.float32
    assert "gate_up_proj=[8, 192, 32] 2:4" in repr(sparse)
    assert sparse.nbytes == sparse.dense_nbytes // 2 + sparse.dense_nbytes // 32


def test_state_dict_has_values_and_bitmask_in_row_order():
    block = block_of("gpt_oss")
    sparse = packed(block)
    state = sparse.state_dict()
    assert list(state) == [
        "gate_up_proj",
        "gate_up_proj_meta",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_meta",
        "down_proj_bias",
    ]
    assert state["gate_up_proj"].shape == (8, 192, 16)
    assert state["gate_up_proj_meta"].shape == (8, 192, 4)
    other = packed(find_moe_blocks(prune_by_magnitude(tiny_model("gpt_oss", seed=1)))[-1])
    other.load_state_dict(state)
    inputs = routed(block)
    with torch.no_grad():
        assert torch.equal(other(*inputs), sparse(*inputs))


def test_a_bitmask_that_does_not_fit_is_refused():
    sparse = packed(block_of("mixtral"))
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    state["down_proj_meta"][3, 2, 1] = 0x37
    message = "down_proj: index must keep exactly 2 of every 4 columns, got 3 in expert 3, row 2, group 2"
    with pytest.raises(RuntimeError, match=message):
        sparse.load_state_dict(state)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_are_independent_and_equal(again):
    block = block_of("gpt_oss")
    sparse = packed(block)
    inputs = routed(block)
    expected = sparse(*inputs)
    twin = again(sparse)
    assert torch.equal(twin(*inputs), expected)
    twin.gate_up_proj.zero_()
    assert torch.equal(sparse(*inputs), expected)
    assert not torch.equal(twin(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_cast_equals_the_cast_of_the_dense_weights(dtype: torch.dtype):
    block = block_of("gpt_oss")
    sparse = packed(block).to(dtype)
    assert sparse.dtype == dtype
    assert sparse.gate_up_proj_meta.dtype == torch.uint8
    back = sparse.to_dense()
    for name, value in copy.deepcopy(block.experts).to(dtype).state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_cast_to_float64_is_refused():
    sparse = packed(block_of("mixtral"))
    with pytest.raises(MoESparseError, match=r"packed experts must be one of .*, got a cast to torch.float64"):
        sparse.double()
    assert sparse.dtype == torch.float32


def test_grad_is_refused_with_the_cure():
    block = block_of("mixtral")
    hidden, index, gates = routed(block)
    with pytest.raises(MoESparseError, match=r"no backward: call the model under torch.no_grad\(\)"):
        packed(block)(hidden.requires_grad_(), index, gates)
    assert all(not p.requires_grad for name, p in packed(block).named_parameters())


@torch.no_grad()
def test_input_of_another_dtype_keeps_it():
    block = block_of("mixtral", dtype=torch.bfloat16)
    hidden, index, gates = routed(block)
    sparse = packed(block)
    out = sparse(hidden.float(), index, gates.float())
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), sparse(hidden, index, gates.float()))


@torch.no_grad()
def test_hooks_of_the_dense_module_stay():
    block = block_of("mixtral")
    calls: list[int] = []
    handle = block.experts.register_forward_hook(lambda *_: calls.append(1))
    sparse = packed(block)
    sparse(*routed(block))
    handle.remove()
    sparse(*routed(block))
    assert calls == [1]


def test_offloaded_experts_are_refused():
    block = block_of("mixtral")
    block.experts.forward = block.experts.forward
    with pytest.raises(UnsupportedModelError, match=r"experts must run on one device, its forward was replaced"):
        packed(block)


def test_weights_that_do_not_fit_are_refused():
    block = block_of("mixtral")
    weights = {matrix.name: NMWeight.pack(matrix.weight) for matrix in block.matrices}
    with pytest.raises(ValueError, match=r"weights must hold gate_up_proj, down_proj of .*, got down_proj"):
        SparseExperts(block, {"down_proj": weights["down_proj"]})
    with pytest.raises(ValueError, match=r"weights\['down_proj'\] must be \(8, 32, 96\)"):
        SparseExperts(block, weights | {"down_proj": weights["gate_up_proj"]})
    half = NMWeight.pack(block.matrices[1].weight.half())
    with pytest.raises(ValueError, match="weights must have one dtype"):
        SparseExperts(block, weights | {"down_proj": half})


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_compiles_as_one_graph(family: str):
    block = block_of(family)
    sparse = packed(block)
    inputs = routed(block)
    compiled = torch.compile(sparse, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), sparse(*inputs))


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_only_the_kernel_order_is_held():
    block = block_of("mixtral", dtype=torch.bfloat16)
    sparse = packed(block)
    state = sparse.state_dict()
    inputs = routed(block)
    expected = sparse(*inputs)
    moved = copy.deepcopy(sparse).cuda()
    assert all(moved.weight(name).order == "fragment" for name in moved.layouts)
    for name, value in moved.state_dict().items():
        assert torch.equal(value.cpu(), state[name]), name
    out = moved(*(value.cuda() for value in inputs))
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(value, state[name]) for name, value in moved.cpu().state_dict().items())
    assert moved.half().dtype == torch.float16
