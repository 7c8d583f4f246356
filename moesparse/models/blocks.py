"""Find the experts of any transformers model: the only room that knows how a model is laid out.

transformers dispatches the experts of nearly every family through one function, `ExpertsInterface`:
`experts(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])` over fused 3-D parameters. The decorator that
does so leaves flags on the module (`has_gate`, `has_bias`, `is_transposed`, `is_concatenated`); they are all that is
read here, so that no family is named in the code that finds. What does not fit is refused by name, never skipped.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesparse.errors import UnsupportedModelError, UsageError

__all__ = ["ExpertMatrix", "MoEBlock", "check_coverage", "check_module", "decoder_layers", "find_moe_blocks"]

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ROUTER_NAMES = ("router", "gate")
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")

# "experts", "routed_experts", "expert_3", but neither "shared_experts" nor "pre_expert_proj".
_EXPERTS_NAME = re.compile(r"(?!\w*shared)(?:\w+_)?experts|experts?_\d+")
_EXPERT_COUNT_NAME = re.compile(r"(?:\w+_)?experts(?:_num)?")

# Only words for the refusal: that a model does not fit is found from its modules.
_WHY_NOT = {
    "dbrx": "the weights of all experts are stacked in 2-D tensors",
    "jetmoe": "its attention heads are experts too, and both kinds take their tokens already sorted",
    "llama4": "the gate scales the input of its experts, not their output",
    "llama4_text": "the gate scales the input of its experts, not their output",
    "longcat_flash": "some of its experts compute nothing (zero experts) and have no weights of their own",
    "nllb-moe": "every expert is a module of its own, with biases and token dropout",
    "switch_transformers": "every expert is a module of its own",
}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True, eq=False)
class ExpertMatrix:
    """One weight of every expert in a block: a 3-D parameter and the layout it is stored in.

    Attributes:
        name: parameter name in the experts module: "gate_up_proj", "up_proj" or "down_proj".
        input: "hidden" when it multiplies the block's input, "activation" when it multiplies act(gate) * up.
        experts: the module that owns the parameter.
        transposed: the parameter is [E, in, out], as in gpt_oss; `weight` is [E, out, in] either way.
    """

    name: str
    input: Literal["hidden", "activation"]
    experts: nn.Module = field(repr=False)
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, read from the module each time: it survives `to_empty` and replacement."""
        return getattr(self.experts, self.name)

    @property
    def weight(self) -> Tensor:
        """[E, out, in], the parameter's dtype: a detached view, so that writing to it in place changes the model."""
        weight = self.parameter.detach()
        return weight.transpose(1, 2) if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """[E, out], a detached view like `weight`; None in families without expert biases."""
        return getattr(self.experts, f"{self.name}_bias").detach() if self.experts.has_bias else None

    def project(self, expert: int, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[n, out] of rows x [n, in], by one expert's matrix, or by that of another `weight` [E, out, in]."""
        out = F.linear(x, (self.weight if weight is None else weight)[expert])
        bias = self.bias
        # added after the product, as the model's loop does; F.linear's own bias rounds once less
        return out if bias is None else out + bias[expert]


@dataclass(frozen=True, eq=False)
class MoEBlock:
    """The experts of one layer, and what is needed to call, score and rewrite them.

    Attributes:
        name: qualified name of the experts module, "model.layers.0.mlp.experts".
        layer: qualified name of the decoder layer that holds it, "model.layers.0".
        index: position among the model's blocks, 0 first in forward order.
        experts: called as `experts(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`.
        moe: its parent, which also holds the router and the shared experts; the layer itself in gemma4.
        moe_name: qualified name of `moe`.
        router: the module that chooses the experts, None when it cannot be told apart.
        router_name: qualified name of `router`, or None.
        num_experts: E.
        hidden_size: H, the width of the experts' input and output; smaller than the model's in latent MoEs.
        intermediate_size: I, the width between an expert's two matrices.
        top_k: experts per token, None when neither router nor config says.
        has_gate: two projections in, gate and up; else up only.
        has_bias: both matrices have a bias per expert.
        is_transposed: the parameters are [E, in, out].
        is_concatenated: gate and up are halves of the output; else they alternate.
        has_post_expert_norm: each expert's output is normed before the gate weight multiplies it.
        matrices: (gate_up_proj or up_proj, down_proj).
    """

    name: str
    layer: str
    index: int
    experts: nn.Module = field(repr=False)
    moe: nn.Module = field(repr=False)
    moe_name: str
    router: nn.Module | None = field(repr=False)
    router_name: str | None
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int | None
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    has_post_expert_norm: bool
    matrices: tuple[ExpertMatrix, ...]

    def activation(self, up_out: Tensor) -> Tensor:
        """What the model does between an expert's two matrices.

        Args:
            up_out: [R, 2I], the output of gate_up_proj with its bias; [R, I], of up_proj, in families without a gate.

        Returns:
            [R, I], the input of down_proj.
        """
        experts: Any = self.experts
        return experts._apply_gate(up_out) if self.has_gate else experts.act_fn(up_out)

    def activation_of(self, expert: int, x: Tensor) -> Tensor:
        """[n, I]: what one expert's down projection is given, for rows x [n, H] of the block's input."""
        return self.activation(self.matrices[0].project(expert, x))

    def output_of(self, expert: int, activation: Tensor) -> Tensor:
        """[n, H]: what the expert gives before its gate weight multiplies it, from its `activation_of`."""
        return self.post_expert_norm(self.matrices[1].project(expert, activation))

    def post_expert_norm(self, down_out: Tensor) -> Tensor:
        """The norm on each expert's output [R, H], before its gate weight multiplies it; the identity without one."""
        experts: Any = self.experts
        return experts.post_expert_norm(down_out) if self.has_post_expert_norm else down_out

    @cached_property
    def activation_name(self) -> str | None:
        """Name of the f in `f(gate) * up` on concatenated halves, or in `f(up)` without a gate; "swigluoai" for what
        gpt-oss computes of alternating columns; None if neither.

        Decided by what `activation` computes, so that a clamp or another order of the halves is never taken for silu.
        """
        return _name_activation(self)


def find_moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The MoE blocks of a transformers model, in forward order.

    Args:
        model: any transformers model, on any device ("meta" too) in a floating dtype.

    Returns:
        One block for each experts module; every expert parameter of the model is in exactly one of them.

    Raises:
        UsageError: it is no model. UnsupportedModelError: it has no experts, or some that do not fit or are packed
            already; names the parameter and what it lacks.
    """
    check_module(model)
    blocks: list[MoEBlock] = []
    names: dict[nn.Module, str] = {}
    for name, experts in model.named_modules(remove_duplicate=False):
        if getattr(experts, "is_packed", False):
            raise UnsupportedModelError(
                f"{_family(model)}: {name} is already packed; moesparse.unpack(model) makes its experts dense again"
            )
        if not _goes_through_interface(experts):
            continue
        if experts in names:
            raise UnsupportedModelError(
                f"{_family(model)}: {name} is the same module as {names[experts]}; "
                "every layer must have experts of its own"
            )
        names[experts] = name
        blocks.append(_block(model, name, experts, index=len(blocks)))
    check_coverage(model, blocks)
    if not blocks:
        raise UnsupportedModelError(
            f"model must have experts, got {type(model).__name__} (model type {_family(model)}), which is dense; "
            "moesparse prunes Mixture-of-Experts models"
        )
    return blocks


def check_module(model: object) -> None:
    """Refuse what is no model in memory, such as the name of one.

    Raises:
        UsageError: says what loads one.
    """
    if isinstance(model, nn.Module):
        return
    got = repr(os.fspath(model)) if isinstance(model, str | os.PathLike) else type(model).__name__
    raise UsageError(
        f"model must be a model of transformers in memory, got {got}: model, tokenizer = "
        "moesparse.load_pretrained(NAME) gives one, and moesparse.prune_checkpoint prunes from folder to folder"
    )


def check_coverage(model: nn.Module, blocks: list[MoEBlock]) -> None:
    """Prove that every expert parameter of the model is in exactly one block.

    A parameter is an expert's when its path says so ("experts.3.w1"; shared experts are not meant), when it is a 3-D
    stack as long as its module's, or its MoE block's, number of experts, or when it lies in a list of that many equal
    modules. Convolutions are never experts.

    Raises:
        UnsupportedModelError: names the first expert parameter that no block holds, or that two hold, and says why.
    """
    owners: dict[int, str] = {}
    for block in blocks:
        for matrix in block.matrices:
            for key in (matrix.name, f"{matrix.name}_bias") if block.has_bias else (matrix.name,):
                parameter, name = block.experts.get_parameter(key), f"{block.name}.{key}"
                if id(parameter) in owners:
                    raise UnsupportedModelError(
                        f"{_family(model)}: {name} is the same tensor as {owners[id(parameter)]}; "
                        "every block must have experts of its own"
                    )
                owners[id(parameter)] = name
    for name, tensor, holder_name in _expert_tensors(model, blocks):
        if id(tensor) not in owners:
            raise UnsupportedModelError(_why_uncovered(model, name, tensor, holder_name))


def decoder_layers(model: nn.Module, blocks: list[MoEBlock]) -> tuple[nn.ModuleList, str]:
    """The list of layers that holds the blocks, for running the model one layer at a time.

    Args:
        model: the model that `blocks` were found in.
        blocks: at least one.

    Returns:
        The list and its qualified name, such as "model.layers".

    Raises:
        UnsupportedModelError: the blocks lie in several lists (an encoder and a decoder, say); names them.
    """
    names = list(dict.fromkeys(block.layer.rpartition(".")[0] for block in blocks))
    if len(names) != 1:
        raise UnsupportedModelError(
            f"{_family(model)}: the blocks must lie in one list of layers, got {', '.join(names) or 'no blocks'}"
        )
    layers = model.get_submodule(names[0])
    assert isinstance(layers, nn.ModuleList)
    return layers, names[0]


def _goes_through_interface(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS) and hasattr(module, "_apply_gate")


def _block(model: nn.Module, name: str, experts: nn.Module, index: int) -> MoEBlock:
    has_gate, has_bias, is_transposed, is_concatenated = (getattr(experts, flag) for flag in _FLAGS)
    family = _family(model)
    if getattr(experts, "_is_expert_parallel", False):
        raise UnsupportedModelError(f"{family}: {name} must hold all experts, got an expert-parallel shard of them")
    if not _takes_routed_tokens(experts):
        raise UnsupportedModelError(
            f"{family}: {name} must be called with (hidden_states, top_k_index, top_k_weights), "
            f"its forward takes {_arguments(experts)}"
        )
    if not has_gate and not callable(getattr(experts, "act_fn", None)):
        raise UnsupportedModelError(f"{family}: {name} has no gate and no act_fn, so its activation is unknown")

    up_name = "gate_up_proj" if has_gate else "up_proj"
    matrices = (
        ExpertMatrix(up_name, "hidden", experts, is_transposed),
        ExpertMatrix("down_proj", "activation", experts, is_transposed),
    )
    for matrix in matrices:
        _check_parameter(family, name, experts, matrix.name, ndim=3)
        if has_bias:
            _check_parameter(family, name, experts, f"{matrix.name}_bias", ndim=2)
    up, down = (matrix.weight for matrix in matrices)
    num_experts, hidden_size, intermediate_size = down.shape
    wanted = (num_experts, intermediate_size * (2 if has_gate else 1), hidden_size)
    if tuple(up.shape) != wanted:
        raise UnsupportedModelError(
            f"{family}: {name}.{up_name} must be {list(wanted)} as [experts, out, in] to fit "
            f"down_proj {list(down.shape)}, got {list(up.shape)}"
        )

    moe_name = name.rpartition(".")[0]
    moe = model.get_submodule(moe_name)
    router_name = _router_name(moe, moe_name, experts, num_experts)
    router = None if router_name is None else model.get_submodule(router_name)
    return MoEBlock(
        name=name,
        layer=_layer_name(model, name),
        index=index,
        experts=experts,
        moe=moe,
        moe_name=moe_name,
        router=router,
        router_name=router_name,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        top_k=_top_k(router, moe, getattr(experts, "config", None), num_experts),
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        has_post_expert_norm=bool(getattr(experts, "has_post_expert_norm", False)),
        matrices=matrices,
    )


def _check_parameter(family: str, block: str, experts: nn.Module, name: str, ndim: int) -> None:
    parameter = experts._parameters.get(name)
    if parameter is None:
        raise UnsupportedModelError(
            f"{family}: {block}.{name} must be a parameter of {type(experts).__name__}, and is missing or was "
            "replaced; load the model without quantisation or adapters"
        )
    if parameter.dtype not in _WEIGHT_DTYPES:
        raise UnsupportedModelError(f"{family}: {block}.{name} {_quantised(parameter)}")
    if parameter.ndim != ndim:
        raise UnsupportedModelError(f"{family}: {block}.{name} must be {ndim}-D, got {list(parameter.shape)}")


def _layer_name(model: nn.Module, name: str) -> str:
    """The outermost list element on the way to the experts: a decoder layer, whatever lists lie inside it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    raise UnsupportedModelError(
        f"{_family(model)}: {name} must lie in a list of layers (nn.ModuleList), and is in none"
    )


def _router_name(moe: nn.Module, moe_name: str, experts: nn.Module, num_experts: int) -> str | None:
    """The sibling called router or gate; else the only sibling that has a row per expert."""
    siblings = {name: child for name, child in moe.named_children() if child is not experts and "shared" not in name}
    found = [name for name in _ROUTER_NAMES if name in siblings]
    if not found:
        found = [
            name
            for name, child in siblings.items()
            if any(parameter.ndim == 2 and parameter.shape[0] == num_experts for parameter in child.parameters())
        ]
    if len(found) != 1:
        return None
    return f"{moe_name}.{found[0]}" if moe_name else found[0]


def _top_k(router: nn.Module | None, moe: nn.Module, config: object, num_experts: int) -> int | None:
    # A config's own "top_k" may be a sampling parameter left there by an old release.
    for source, names in ((router, ("top_k", *_TOP_K_NAMES)), (moe, ("top_k", *_TOP_K_NAMES)), (config, _TOP_K_NAMES)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and 1 <= value <= num_experts:
                return value
    return None


@torch.no_grad()
def _name_activation(block: MoEBlock) -> str | None:
    act_fn = getattr(block.experts, "act_fn", None)
    if isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters()):
        return None
    # Small values tell the curves apart, large ones show a clamp; fp64 tells gelu from its tanh form.
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 2.0, 8.0, 1e3], dtype=torch.float64).repeat_interleave(64)[:, None]
    probe = torch.randn(256, 32 if block.has_gate else 16, generator=generator, dtype=torch.float64) * scale
    try:
        actual = block.activation(probe)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    for name, function in _ACTIVATIONS.items():
        if block.has_gate:
            gate, up = probe.chunk(2, dim=-1)
            expected = function(gate) * up
        else:
            expected = function(probe)
        if actual.shape == expected.shape and torch.allclose(actual.double(), expected, rtol=1e-6, atol=1e-7):
            return name
    if block.has_gate and torch.allclose(actual.double(), _swigluoai(probe), rtol=1e-6, atol=1e-7):
        return "swigluoai"
    return None


def _swigluoai(x: Tensor) -> Tensor:
    """gpt-oss's gate with the constants that its models were trained with; another alpha or limit is another curve."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _expert_tensors(model: nn.Module, blocks: list[MoEBlock]) -> Iterator[tuple[str, Tensor, str]]:
    """Name, tensor and the module that holds the experts, for all that is theirs by the rules of check_coverage.

    Buffers count too: packed experts may keep their values in them.
    """
    modules = dict(model.named_modules())
    lists = [name for name, module in modules.items() if _is_expert_list(module, modules[name.rpartition(".")[0]])]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts = name.split(".")[:-1]
        owner_name = ".".join(parts)
        owner = modules[owner_name]
        if tensor.ndim < 2 or isinstance(owner, nn.modules.conv._ConvNd):
            continue
        depth = next((i for i, part in enumerate(parts, start=1) if _EXPERTS_NAME.fullmatch(part)), None)
        in_list = next((holder for holder in lists if name.startswith(f"{holder}.")), None)
        if depth is not None:
            yield name, tensor, ".".join(parts[:depth])
        elif "shared" in name:
            continue
        elif in_list is not None:
            yield name, tensor, in_list
        elif tensor.ndim == 3 and (_counts_experts(owner, len(tensor)) or _stacks_experts(blocks, owner_name, tensor)):
            yield name, tensor, owner_name


def _stacks_experts(blocks: list[MoEBlock], owner_name: str, tensor: Tensor) -> bool:
    """Whether the tensor lies beside a block's experts and has an entry for each.

    Where the parent of the experts is the layer (gemma4), attention lies below it too: only its own tensors count.
    """
    return any(
        len(tensor) == block.num_experts
        and (
            owner_name == block.moe_name
            or (block.moe_name != block.layer and owner_name.startswith(f"{block.moe_name}."))
        )
        for block in blocks
    )


def _counts_experts(module: nn.Module, count: int) -> bool:
    """Whether the module says, in an attribute such as num_experts, that it has so many experts."""
    return any(
        isinstance(value, int) and value == count and "shared" not in name and _EXPERT_COUNT_NAME.fullmatch(name)
        for name, value in vars(module).items()
    )


def _is_expert_list(module: nn.Module, parent: nn.Module) -> bool:
    """Whether these are an older model's experts: as many equal modules as the parent says it has experts."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not _counts_experts(parent, len(module)):
        return False
    shapes = [[(key, p.shape) for key, p in child.named_parameters()] for child in module.children()]
    return all(shape == shapes[0] for shape in shapes)


def _why_uncovered(model: nn.Module, name: str, tensor: Tensor, holder_name: str) -> str:
    """One sentence: which expert parameter, where it lies, and what it lacks."""
    family = _family(model)
    if tensor.dtype not in _WEIGHT_DTYPES:
        return f"{family}: {name} {_quantised(tensor)}"
    holder = model.get_submodule(holder_name)
    where = f"{family}: {name} {list(tensor.shape)} belongs to experts"
    if _goes_through_interface(holder):
        return f"{where}, but is none of the weights and biases that ExpertsInterface reads from {holder_name}"
    if family in _WHY_NOT:
        reason = _WHY_NOT[family]
    elif isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
        reason = "every expert is a module of its own, where one 3-D parameter for all is needed"
    elif not _takes_routed_tokens(holder):
        reason = f"its forward takes {_arguments(holder)}, not (hidden_states, top_k_index, top_k_weights)"
    else:
        reason = "its class is not decorated with use_experts_implementation"
    return f"{where}, but {holder_name} ({type(holder).__name__}) does not go through ExpertsInterface: {reason}"


def _quantised(tensor: Tensor) -> str:
    return (
        f"holds {str(tensor.dtype).removeprefix('torch.')} values: experts that are already packed or quantised "
        "cannot be pruned; load the model in bfloat16 or another floating type"
    )


def _takes_routed_tokens(module: nn.Module) -> bool:
    """Whether `module(tokens, indices, weights)` is a call its forward accepts."""
    try:
        inspect.signature(module.forward).bind(None, None, None)
    except TypeError:
        return False
    return True


def _arguments(module: nn.Module) -> str:
    return f"({', '.join(inspect.signature(module.forward).parameters)})"


def _family(model: nn.Module) -> str:
    """The name a user knows the model by: its config's model_type, else its class."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
