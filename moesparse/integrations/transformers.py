"""Packed checkpoints in transformers: the quantizer "moesparse", and the experts function "moesparse".

Importing this module registers both. `import moesparse` sees to it as soon as transformers is in use
(moesparse/_register.py), so that `AutoModelForCausalLM.from_pretrained(packed_folder)` just works.

A packed checkpoint has the standard keys of its family: for each expert matrix `...weight` holds the kept values and
`...weight_meta` the bitmask, in the row order of moesparse_kernels.layout. `quantization_config` in config.json says
which blocks are packed and how. transformers' own converters, which merge the experts of a layer into one parameter,
work on both tensors as they do on dense ones, since they only stack and join rows.

The weight converters are not public API of transformers; tests/test_integration_transformers.py is the contract.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moesparse.blocks import find_moe_blocks
from moesparse.errors import CheckpointError, UnsupportedModelError, UsageError
from moesparse.masks import Pattern
from moesparse.modules import META_SUFFIX, MatrixLayout, SparseExperts
from moesparse_kernels import moe_dense

__all__ = [
    "FORMAT_VERSION",
    "METHOD",
    "MoESparseConfig",
    "MoESparseQuantizer",
    "attach",
    "detach",
    "experts_forward",
    "packed_metadata",
]

METHOD = "moesparse"
FORMAT_VERSION = 1

# an end of name that transformers takes off again where a pattern becomes a name, as it does with any lookahead
_END = r"(?!\w)"

Patterns = Mapping[str, Mapping[str, str]]
"""Block name -> parameter name -> "n:m"."""


class MoESparseConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    Args:
        blocks: name of each packed block in the model -> parameter name -> "n:m". Blocks not named are dense.
        format_version: of the packed tensors.
        recipe: how the model was pruned, or None.

    Raises:
        CheckpointError: a format this release does not know, or blocks that are no such table.
    """

    def __init__(
        self,
        blocks: dict[str, dict[str, str]] | None = None,
        format_version: int = FORMAT_VERSION,
        recipe: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.blocks = blocks or {}
        self.recipe = recipe
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config must have format_version {FORMAT_VERSION}, got {format_version!r}; "
                "a newer moesparse wrote it"
            )
        if not isinstance(self.blocks, dict) or not all(isinstance(block, dict) for block in self.blocks.values()):
            raise CheckpointError("quantization_config must hold blocks: {block name: {parameter: pattern}}")

    def layout(self, block: str, matrix: str, shape: tuple[int, int, int]) -> MatrixLayout:
        """Layout of one packed matrix [E, out, in].

        Raises:
            CheckpointError: the pattern is missing, none, or does not divide the matrix.
        """
        text = self.blocks[block].get(matrix)
        try:
            pattern = Pattern.parse(text if isinstance(text, str) else "")
            pattern.check_matrix(f"{block}.{matrix}", shape[-1])
        except UsageError as error:
            raise CheckpointError(f"quantization_config of {block}.{matrix}: {error}") from error
        if pattern.group is None:
            raise CheckpointError(f"quantization_config of {block}.{matrix} must be n:m, got {text!r}")
        return MatrixLayout(shape, *pattern.group)


class MoESparseQuantizer(HfQuantizer):
    """Puts SparseExperts into the model before its weights are loaded, and checks them afterwards."""

    # it never quantizes on the fly: what it loads is packed
    requires_calibration = True

    def __init__(self, quantization_config: MoESparseConfig, serializable: bool = True, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._serializable = serializable
        self._dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        blocks = {block.name: block for block in find_moe_blocks(model)}
        for name in self.quantization_config.blocks:
            if name not in blocks:
                raise CheckpointError(f"quantization_config names the block {name}, which this model does not have")
            block = blocks[name]
            weights = {}
            for matrix in block.matrices:
                E, N, K = matrix.weight.shape
                layout = self.quantization_config.layout(name, matrix.name, (E, N, K))
                weights[matrix.name] = layout.empty(matrix.weight.dtype, "meta")
            # the skeleton is built with "meta" as the default device, where an activation cannot be told by its values
            with torch.device("cpu"):
                model.set_submodule(name, SparseExperts(block, weights))
        if not hasattr(HfQuantizer, "get_new_dtype"):
            # older releases leave the file's dtype to every tensor that a quantizer may have renamed
            from transformers.core_model_loading import build_glob_alternation

            plan = model._get_dtype_plan(torch.get_default_dtype())
            kept = build_glob_alternation(list(plan))[0] if plan else None
            self._dtypes = {
                name: torch.float32 if kept and kept.search(name) else tensor.dtype
                for name, tensor in _tensors(model)
                if tensor.is_floating_point()
            }

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        # older releases do not hand in the model; the names are enough
        return packed_conversions(weight_conversions, self.quantization_config.blocks)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, tensor in _tensors(model):
            if name in self._dtypes:
                tensor.data = tensor.data.to(self._dtypes[name])
        for name, module in model.named_modules():
            if isinstance(module, SparseExperts):
                errors = module.finish_loading()
                if errors:
                    raise CheckpointError(f"the checkpoint holds a damaged {name}.{errors[0]}")
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseExperts):
                model.set_submodule(name, module.to_dense())
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return self._serializable

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def packed_conversions(conversions: Sequence[WeightTransform], blocks: Patterns) -> list[WeightTransform]:
    """Converters that load and save the bitmasks beside the values.

    A converter that merges the experts of a packed matrix gets a twin for `_meta`, and both are anchored at the end of
    the name, so that neither takes the other's keys.

    Raises:
        UnsupportedModelError: the family's checkpoints store these matrices in a way that packed ones cannot follow
            (transposed or renamed on loading).
    """
    names = [f"{block}.{matrix}" for block, matrices in blocks.items() for matrix in matrices]
    result: list[WeightTransform] = []
    for transform in conversions:
        targets = [pattern.removesuffix(_END) for pattern in transform._original_target_patterns]
        sources = [pattern.removesuffix(_END) for pattern in transform._original_source_patterns]
        if not isinstance(transform, WeightConverter) or not _makes(targets, names):
            result.append(transform)
            continue
        if not all(isinstance(operation, MergeModulelist | Concatenate) for operation in transform.operations):
            raise UnsupportedModelError(
                f"{names[0]}: this family's checkpoints must store experts as [out, in] matrices to be packed, got "
                f"{' and '.join(type(operation).__name__ for operation in transform.operations)} on loading"
            )
        for suffix in ("", META_SUFFIX):
            twin = WeightConverter(
                [f"{source}{suffix}{_END}" for source in sources],
                [f"{target}{suffix}{_END}" for target in targets],
                operations=list(transform.operations),
                force_cpu=transform.force_cpu,
            )
            twin.scope_prefix, twin.base_model_prefix = transform.scope_prefix, transform.base_model_prefix
            result.append(twin)
    _check_renamings(result, names)
    return result


def _makes(targets: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one of the target patterns is the end of one of the parameter names."""
    return any(re.search(f"{target}$", name) for target in targets for name in names)


def _check_renamings(conversions: Sequence[WeightTransform], names: Sequence[str]) -> None:
    """A packed matrix keeps its own name on disk, so that the bitmask's is the weight's with `_meta` behind it."""
    renamings = [t.reverse_transform() for t in conversions if isinstance(t, WeightRenaming)]
    for name in names:
        stored = name
        for renaming in renamings:
            stored = renaming.rename_source_key(stored)[0]
        if stored.rpartition(".")[2] != name.rpartition(".")[2]:
            raise UnsupportedModelError(
                f"{name}: this family's checkpoints call it {stored}, a name that cannot be given to a packed matrix"
            )


def conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """The model's converters: those it was loaded with, else its family's."""
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        return list(loaded)
    # a prefix is only ever taken off while loading
    family = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in family if not isinstance(transform, PrefixChange)]


def attach(model: nn.Module, blocks: Patterns) -> None:
    """Make `model.save_pretrained` write a model with packed blocks as a packed checkpoint, or refuse to.

    It refuses where the family cannot be stored packed; the model can still be run, and saved by
    `moesparse.save_pretrained(model, folder)` as a dense one.
    """
    if not isinstance(model, PreTrainedModel):
        return
    config = _config(model, blocks)
    try:
        model._weight_conversions = packed_conversions(conversions_of(model), blocks) or None
        serializable = True
    except UnsupportedModelError:
        serializable = False
    model.config.quantization_config = config
    model.hf_quantizer = MoESparseQuantizer(config, serializable)
    model.quantization_method = METHOD


def detach(model: nn.Module) -> None:
    """Undo `attach`, or what loading a packed checkpoint leaves on a model. The converters serve dense models too."""
    if isinstance(model, PreTrainedModel) and isinstance(getattr(model, "hf_quantizer", None), MoESparseQuantizer):
        model.hf_quantizer.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False


@contextlib.contextmanager
def packed_metadata(model: PreTrainedModel, blocks: Patterns | None) -> Iterator[None]:
    """Config and converters for saving a model in another form than it has in memory; put back afterwards.

    Args:
        model: any model.
        blocks: the packed blocks of the form to save; None for a dense one.
    """
    names = ("_weight_conversions", "hf_quantizer")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    config = vars(model.config).pop("quantization_config", None)
    try:
        for name in names:
            vars(model).pop(name, None)
        if "_weight_conversions" in before:
            model._weight_conversions = before["_weight_conversions"]
        if blocks is not None:
            model._weight_conversions = packed_conversions(conversions_of(model), blocks) or None
            model.config.quantization_config = _config(model, blocks)
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)
        vars(model.config).pop("quantization_config", None)
        if config is not None:
            model.config.quantization_config = config


def _config(model: PreTrainedModel, blocks: Patterns) -> MoESparseConfig:
    pruned = getattr(model.config, "moesparse", None)
    recipe = pruned.get("recipe") if isinstance(pruned, dict) else None
    return MoESparseConfig({name: dict(matrices) for name, matrices in blocks.items()}, recipe=recipe)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function "moesparse": dense experts through this package's grouped GEMMs.

    `model.set_experts_implementation("moesparse")` chooses it for the blocks that pruning left dense; packed blocks
    need no choosing. What it does not cover (gradients, transposed weights, a norm behind each expert) goes to
    transformers' own grouped_mm, or batched_mm where that cannot run.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or self.down_proj.requires_grad)
    if needs_grad or self.is_transposed or getattr(self, "has_post_expert_norm", False):
        forward = batched_mm_experts_forward if hidden_states.shape[0] == 1 else grouped_mm_experts_forward
        return forward(self, hidden_states, top_k_index, top_k_weights)
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    return moe_dense(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(self, up_name),
        self.down_proj,
        activation=self._apply_gate if self.has_gate else self.act_fn,
        gate_up_bias=getattr(self, f"{up_name}_bias", None),
        down_bias=getattr(self, "down_proj_bias", None),
    )


# a second import (a reload, a copy of the package) finds the names taken
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(MoESparseQuantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(MoESparseConfig)
ExpertsInterface.register(METHOD, experts_forward)
