"""Layers behind the last one that predict tokens further ahead (MTP), which transformers leaves in the folder.

Such a layer is a decoder layer of the model's own class. At position t it is given the embedding of token t + 1 and
the hidden state that the model computed there, behind its final norm, each normed and joined by a projection
(DeepSeek-V3, arXiv 2412.19437, section 2.2; vLLM's deepseek_mtp.py, glm4_moe_mtp.py, hy_v3_mtp.py, qwen3_next_mtp.py
and qwen3_5_mtp.py, Megatron and transformers' MtpModel all give the state behind the norm and put the embedding first;
vLLM alone sets the embedding at the first position to zero, which training does not).

They are found by what the folder holds and built here as copies of the decoder layer whose tensors they have. Then they
are further layers of the model to everyone but its own forward.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moesparse.errors import UnsupportedModelError
from moesparse.models.blocks import MoEBlock, decoder_layers, find_moe_blocks
from moesparse.models.keys import checkpoint_views, layers_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "NEXT_TOKEN_COUNTS",
    "Behind",
    "NextTokenLayer",
    "NextTokenLayers",
    "attach",
    "attached",
    "check_runs",
    "find_next_token_layers",
    "is_next_token",
]

NEXT_TOKEN_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys of config.json that say how many there are: DeepSeek and GLM, Qwen3.5, transformers."""

_COMPONENT = re.compile(r"(?:^|\.)(?:mtp|mtp_\w+|nextn\w*)\.")
_NUMBERED = re.compile(r"((?:.*\.)?mtp\.layers\.)(\d+)\.")
_EXPERTS = re.compile(r"\bexperts\b")

# what joins embedding and hidden state: beside the layer's own tensors, or in front of all layers
_ENTRY = {"enorm": "enorm.weight", "hnorm": "hnorm.weight", "eh_proj": "eh_proj.weight"}
_SHARED_ENTRY = {
    "enorm": "pre_fc_norm_embedding.weight",
    "hnorm": "pre_fc_norm_hidden.weight",
    "eh_proj": "fc.weight",
}
# behind the layer, or the trunk's own once more: they do not change what its experts see
_TAIL = re.compile(r"(?:embed_tokens|shared_head(?:\.\w+)?|final_layernorm|post_norm|norm)\.weight")


@dataclass(frozen=True)
class NextTokenLayer:
    """One layer with experts.

    Attributes:
        number: its place in the list of decoder layers, behind the last.
        name: in the model, "model.layers.61".
        stored: what its tensors' names in the folder begin with: "model.layers.61.", "mtp.layers.0.".
        template: the decoder layer that it is built like.
        experts: name of the experts module in it, "mlp.experts".
        form: of its experts in the folder: "own", as the family's other layers; "single" or "stacked" where not.
        entry: "enorm", "hnorm" and "eh_proj" -> name in the folder; empty where that is not understood.
        problem: why no text can be run through it; "" where it can.
    """

    number: int
    name: str
    stored: str
    template: int
    experts: str
    form: str
    entry: Mapping[str, str]
    problem: str

    def views(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`checkpoint_views` of its tensors, by the names that they have in the folder."""
        entry = {f"{self.name}.{part}.weight": key for part, key in self.entry.items()}
        own = {name: tensor for name, tensor in state.items() if name not in entry}
        found = {f"{self.stored}{key}": view for key, view in _forms(model, self.name, self.experts, own, self.form)}
        return found | {key: state[name] for name, key in entry.items() if name in state}

    def expert_keys(self, model: PreTrainedModel) -> list[str]:
        """Names of its experts' matrices in the folder."""
        prefix = f"{self.name}.{self.experts}."
        own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{self.name}.")}
        weights = {own[name].untyped_storage()._cdata for name in own if name.startswith(prefix)}
        return [key for key, view in self.views(model, own).items() if view.untyped_storage()._cdata in weights]


@dataclass(frozen=True)
class NextTokenLayers:
    """All of a folder that have experts.

    Attributes:
        layers: in order.
        trunk: decoder layers of the model itself.
        list: name of the list that holds those.
        norm: name of the module that norms the last one's output; "" where it is not known.
    """

    layers: tuple[NextTokenLayer, ...]
    trunk: int
    list: str
    norm: str


@dataclass(frozen=True, eq=False)
class Behind:
    """What a stream of text needs to go on behind the last decoder layer; of one layer, see `check_runs`.

    Attributes:
        layer: that is next.
        template: position of the decoder layer whose other arguments it is called with.
        embedding: of the model.
        norm: on the last decoder layer's output.
    """

    layer: nn.Module
    template: int
    embedding: nn.Module
    norm: nn.Module

    def shifted(self, ids: Tensor) -> Tensor:
        """The embedding [n, t, H] of each position's next token; any at the last, which has none."""
        return self.embedding(ids.roll(-1, dims=1).to(next(self.embedding.parameters()).device))

    def token_mask(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """[n * t] bool, True where a token and its next are real; `mask` [n * t] is the text's own, or None."""
        real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.view(ids.shape).cpu()
        both = real & real.roll(-1, dims=1)
        both[:, -1] = False
        return both.flatten()


class _Joining(nn.Module):
    """In front of a decoder layer's own forward."""

    enorm: nn.Module
    hnorm: nn.Module
    eh_proj: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, next_embeddings: Tensor, **kwargs: Any) -> Any:
        joined = torch.cat((self.enorm(next_embeddings), self.hnorm(hidden_states)), dim=-1)
        return super().forward(self.eh_proj(joined), *args, **kwargs)  # type: ignore[misc]


def attached(model: nn.Module) -> NextTokenLayers | None:
    """Those that `attach` has given to a model."""
    return vars(model).get("_next_token_layers")


def attach(model: nn.Module, found: NextTokenLayers) -> None:
    """Give a model the layers, on the meta device; its config and its own forward do not know of them."""
    layers: Any = model.get_submodule(found.list)
    norm: Any = model.get_submodule(found.norm) if found.norm else None
    for layer in found.layers:
        template = layers[layer.template]
        configs = [config for module in template.modules() if (config := vars(module).get("config")) is not None]
        new = copy.deepcopy(template, {id(config): config for config in configs})
        if layer.entry:
            new.__class__ = type(f"NextToken{type(template).__name__}", (_Joining, type(template)), {})
            new.enorm, new.hnorm = (copy.deepcopy(norm).to_empty(device="meta") for _ in range(2))
            H, dtype = norm.weight.shape[0], next(template.parameters()).dtype
            new.eh_proj = nn.Linear(2 * H, H, bias=False, device="meta", dtype=dtype)
        layers.append(new.eval())
    vars(model)["_next_token_layers"] = found


def is_next_token(name: str, prefix: str, trunk: int) -> bool:
    """Whether a tensor of a folder belongs to layers that predict further tokens, with experts or without.

    Args:
        name: of the tensor.
        prefix: `layers_prefix` of the model.
        trunk: its decoder layers.
    """
    number = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
    return int(number[1]) >= trunk if number else bool(_COMPONENT.search(name))


def find_next_token_layers(model: PreTrainedModel, tensors: Mapping[str, tuple[int, ...]]) -> NextTokenLayers | None:
    """The layers with experts in a folder that predict further tokens; None where there are none.

    Args:
        model: of the folder, without them.
        tensors: name in the folder -> shape.

    Raises:
        UnsupportedModelError: one is like no decoder layer of the model; named.
    """
    blocks = find_moe_blocks(model)
    layers, where = decoder_layers(model, blocks)
    prefix, trunk = layers_prefix(model, blocks[0]), len(layers)
    norm = _final_norm(model, where)
    stored: dict[str, int] = {}
    for name in tensors:
        if is_next_token(name, prefix, trunk) and _EXPERTS.search(name):
            numbered = _NUMBERED.match(name) or re.match(rf"({re.escape(prefix)})(\d+)\.", name)
            if numbered is None:
                raise UnsupportedModelError(
                    f"{name} must lie in a layer such as {prefix}{trunk} or mtp.layers.0 to be pruned with the layers "
                    "that predict further tokens: it is not known how it is run"
                )
            stored.setdefault(numbered[0], int(numbered[2]))
    found = [
        _understood(model, blocks, tensors, start, where, place, norm)
        for place, start in enumerate(sorted(stored, key=lambda start: stored[start]))
    ]
    return NextTokenLayers(tuple(found), trunk, where, norm) if found else None


def check_runs(found: NextTokenLayers) -> None:
    """Refuse layers that no text can be run through.

    Raises:
        UnsupportedModelError: names the layer, and what of it is not understood.
    """
    problem = next((f"{layer.stored[:-1]} {layer.problem}" for layer in found.layers if layer.problem), "")
    if not problem and len(found.layers) > 1:
        problem = (
            f"{found.layers[1].stored[:-1]} is the second layer that predicts further tokens: with or without a norm, "
            "engines do not agree on what of the first one it is given"
        )
    if problem:
        raise UnsupportedModelError(
            f"{problem}. So no text is run through it: prune by magnitude without an update, which needs none, or "
            "leave these layers out with mtp='drop'"
        )


def _final_norm(model: nn.Module, where: str) -> str:
    """Name of the one norm beside the list of layers."""
    parent = where.rpartition(".")[0]
    names = [name for name, _ in model.get_submodule(parent).named_children() if "norm" in name]
    return f"{parent}.{names[0]}".lstrip(".") if len(names) == 1 else ""


def _understood(
    model: PreTrainedModel,
    blocks: list[MoEBlock],
    tensors: Mapping[str, tuple[int, ...]],
    stored: str,
    where: str,
    place: int,
    norm: str,
) -> NextTokenLayer:
    """One layer, by the decoder layers whose tensors it has."""
    held = {key.removeprefix(stored): shape for key, shape in tensors.items() if key.startswith(stored)}
    misses: dict[int, str] = {}
    fits: dict[int, tuple[MoEBlock, str, set[str]]] = {}
    for block in blocks:
        template = int(block.layer.rpartition(".")[2])
        experts = block.name.removeprefix(f"{block.layer}.")
        state = {key: each for key, each in model.state_dict().items() if key.startswith(f"{block.layer}.")}
        state = {key: torch.empty_like(each, device="meta") for key, each in state.items()}
        for form in ("own", "single", "stacked"):
            wanted = {key: tuple(view.shape) for key, view in _forms(model, block.layer, experts, state, form)}
            wrong = [key for key, shape in wanted.items() if held.get(key) != shape]
            if wanted and not wrong:
                fits[template] = (block, form, held.keys() - wanted)
                break
            if form == "own":
                key = wrong[0]
                misses[template] = (
                    f"{key} must be {list(wanted[key])}, got {list(held[key]) if key in held else 'none'}"
                )
    if not fits:
        raise UnsupportedModelError(
            f"{stored[:-1]}, which predicts further tokens, must be like a decoder layer of the model to be pruned: "
            f"compared with {blocks[-1].layer}, {misses[max(misses)]}"
        )
    template, problem = _template(model, list(fits), place)
    block, form, rest = fits[template]
    entry, problem_of_entry = _entry(stored, tensors, rest)
    if entry and not norm:
        entry, problem_of_entry = {}, "is given hidden states behind a norm that is not known"
    experts = block.name.removeprefix(f"{block.layer}.")
    number = len(model.get_submodule(where)) + place  # type: ignore[arg-type]
    return NextTokenLayer(
        number, f"{where}.{number}", stored, template, experts, form, entry, problem or problem_of_entry
    )


def _template(model: PreTrainedModel, fits: list[int], place: int) -> tuple[int, str]:
    """Which of the decoder layers with the same tensors a layer is like, and what speaks against all of them."""
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    own = getattr(config, "mtp_layer_types", None)
    if not kinds or len({kinds[each] for each in fits}) == 1:
        return fits[-1], ""
    if own and place < len(own):
        alike = [each for each in fits if kinds[each] == own[place]]
        if alike:
            return alike[-1], ""
    named = ", ".join(sorted({kinds[each] for each in fits}))
    return fits[-1], f"may be any of {named}: its config does not say which (mtp_layer_types)"


def _entry(stored: str, tensors: Collection[str], rest: Collection[str]) -> tuple[dict[str, str], str]:
    """Names of what joins embedding and hidden state, and what is not understood."""
    entry = {part: f"{stored}{key}" for part, key in _ENTRY.items()}
    outside = stored[: stored.rindex("layers.")]
    shared = {part: f"{outside}{key}" for part, key in _SHARED_ENTRY.items()}
    found = next((each for each in (entry, shared) if all(key in tensors for key in each.values())), {})
    strange = [key for key in sorted(rest) if not _TAIL.fullmatch(key) and key not in _ENTRY.values()]
    if strange:
        return {}, f"holds {strange[0]}, of which it is not known what it does"
    either = f"{', '.join(_ENTRY.values())} beside it, or {', '.join(_SHARED_ENTRY.values())}"
    return found, "" if found else f"must have {either}, got neither"


def _forms(
    model: PreTrainedModel, layer: str, experts: str, state: Mapping[str, Tensor], form: str
) -> Iterator[tuple[str, Tensor]]:
    """Name behind the layer's own and view, of a decoder layer's tensors as a folder stores them.

    A family may store the experts of these layers in another form than those of all others: one by one where the others
    are stacked (Qwen3.5), or stacked. Nothing where the form is one that the family's matrices do not have.
    """
    views: dict[str, Tensor] = {}
    for key, view in checkpoint_views(model, state).items():
        views[key[key.index(f".{layer.rpartition('.')[2]}.") :].split(".", 2)[2]] = view
    if form == "own":
        yield from views.items()
        return
    module: Any = model.get_submodule(f"{layer}.{experts}")
    plain = module.has_gate and module.is_concatenated and not (module.is_transposed or module.has_bias)
    up, down = (state.get(f"{layer}.{experts}.{name}") for name in ("gate_up_proj", "down_proj"))
    if not plain or up is None or down is None:
        return
    weights = {each.untyped_storage()._cdata for each in (up, down)}
    inside = [key for key, view in views.items() if view.untyped_storage()._cdata in weights]
    base = inside[0][: inside[0].index("experts.") + len("experts.")]
    yield from ((key, view) for key, view in views.items() if key not in inside)
    if form == "stacked":
        yield f"{base}gate_up_proj", up
        yield f"{base}down_proj", down
        return
    for expert in range(len(up)):
        gate, rest = up[expert].chunk(2)
        for name, view in (("gate_proj", gate), ("up_proj", rest), ("down_proj", down[expert])):
            yield f"{base}{expert}.{name}.weight", view
