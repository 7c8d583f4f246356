"""Packed checkpoints in transformers: the quantizer "moesparse", and the experts function "moesparse".

Importing this module registers both, and what builds layers of different counts (models/layer_counts.py). `import
moesparse` sees to it as soon as transformers is in use (moesparse/_register.py), so that
`AutoModelForCausalLM.from_pretrained(packed_folder)` just works.

A packed checkpoint has the standard keys of its family: for each expert matrix `...weight` holds the kept values and
`...weight_meta` the bitmask, in the row order of moesparse_kernels.layout. `quantization_config` in config.json says
which blocks are packed and how. transformers' own converters, which merge the experts of a layer into one parameter,
work on both tensors as they do on dense ones, since they only stack and join rows (conversions.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moesparse.errors import CheckpointError, UnsupportedModelError, UsageError
from moesparse.models import layer_counts
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.packed.conversions import LoadPlan, Patterns, conversions_of, packed_conversions, plan_loading
from moesparse.packed.experts import META_SUFFIX, PACKED_DTYPES, MatrixLayout, SparseExperts
from moesparse.system.shards import Shards
from moesparse.weights.patterns import Pattern
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


class MoESparseConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint.

    Args:
        blocks: name of each packed block in the model -> parameter name -> "n:m". Blocks not named are dense.
        format_version: of the packed tensors.
        recipe: how the model was pruned, or None.
        turned: "block.parameter" of matrices that the dense checkpoint held the other way round than the family's
            parameters, which transformers allows in a few: unpacking turns them back. None where there are none.

    Raises:
        CheckpointError: a format this release does not know, or blocks that are no such table.
    """

    def __init__(
        self,
        blocks: dict[str, dict[str, str]] | None = None,
        format_version: int = FORMAT_VERSION,
        recipe: dict[str, Any] | None = None,
        turned: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.blocks = blocks or {}
        self.recipe = recipe
        if turned:
            self.turned = list(turned)
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
    quantization_config: MoESparseConfig

    def __init__(self, quantization_config: MoESparseConfig, serializable: bool = True, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._serializable = serializable
        self._dtypes: dict[str, torch.dtype] = {}
        self._stored: dict[str, torch.dtype] = {}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if isinstance(device_map, dict):
            _check_device_map(device_map)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        insert_packed(model, self.quantization_config)
        if checkpoint_files:
            shards = Shards([Path(file) for file in checkpoint_files])
            loading = check_packed(model, get_model_conversion_mapping(model, None, self), shards)
            for name, target in loading.targets.items():
                found = {shards.tensors[key].torch_dtype for key in target.keys}
                dtype = found.pop() if len(found) == 1 else None
                if dtype is not None and dtype.is_floating_point:
                    self._stored[name] = dtype
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
        _check_device_map(getattr(model, "hf_device_map", {}))
        for name, tensor in _tensors(model):
            if name in self._dtypes:
                tensor.data = tensor.data.to(self._dtypes[name])
        for name, module in model.named_modules():
            if isinstance(module, SparseExperts):
                errors = module.finish_loading()
                if errors:
                    raise CheckpointError(f"the checkpoint holds a damaged {name}.{errors[0]}")
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What transformers writes: a tensor that it holds wider than the model is written as the file had it.

        One whose values have changed since, so that the file's dtype has no room for them, stays as it is.
        """
        state = model.state_dict()
        for name, dtype in self._stored.items():
            tensor = state.get(name)
            if tensor is None or tensor.dtype in (dtype, model.dtype):
                continue
            narrow = tensor.to(dtype)
            if torch.equal(narrow.to(tensor.dtype), tensor):
                state[name] = narrow
        return state, {}

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


def insert_packed(model: PreTrainedModel, config: MoESparseConfig) -> list[MoEBlock]:
    """Put empty SparseExperts, on the "meta" device, in the place of the blocks that a checkpoint holds packed.

    Returns:
        The blocks of the dense model, all of them.

    Raises:
        CheckpointError: the config names a block that the model does not have, or a pattern that does not fit.
    """
    blocks = find_moe_blocks(model)
    by_name = {block.name: block for block in blocks}
    for name in config.blocks:
        if name not in by_name:
            raise CheckpointError(f"quantization_config names the block {name}, which this model does not have")
        block = by_name[name]
        weights = {}
        for matrix in block.matrices:
            E, N, K = matrix.weight.shape
            weights[matrix.name] = config.layout(name, matrix.name, (E, N, K)).empty(matrix.weight.dtype, "meta")
        # the skeleton is built with "meta" as the default device, where an activation cannot be told by its values
        with torch.device("cpu"):
            model.set_submodule(name, SparseExperts(block, weights))
    return blocks


def check_packed(model: PreTrainedModel, conversions: Sequence[WeightTransform], shards: Shards) -> LoadPlan:
    """Refuse a packed checkpoint whose tensors do not make the model, before any of them is read.

    Args:
        model: with SparseExperts in place, on the "meta" device.
        conversions: those that it will be loaded with.
        shards: the checkpoint's.

    Returns:
        Which tensors make the model.

    Raises:
        CheckpointError: a tensor of a packed block is missing, or of another shape or dtype than it must be; or more is
            missing than is there, which loading would fill with random numbers. Names the first.
    """
    plan = plan_loading(model, conversions, {name: info.shape for name, info in shards.tensors.items()})
    state = model.state_dict()
    for name, module in model.named_modules():
        if not isinstance(module, SparseExperts):
            continue
        for key in (f"{name}.{matrix}{suffix}" for matrix in module.layouts for suffix in ("", META_SUFFIX)):
            if key not in plan.targets:
                raise CheckpointError(f"the checkpoint must hold {key}, which quantization_config calls packed")
            wanted = (torch.uint8,) if key.endswith(META_SUFFIX) else PACKED_DTYPES
            for source in plan.targets[key].keys:
                if shards.tensors[source].torch_dtype not in wanted:
                    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
                    raise CheckpointError(f"{source} must be {names} to be packed, got {shards.tensors[source].dtype}")
    for name, target in plan.targets.items():
        if target.problem:
            raise CheckpointError(f"the checkpoint does not fit its config.json: {name} {target.problem}")
    lacking = sum(state[name].nbytes for name in plan.missing)
    if lacking > shards.nbytes:
        raise CheckpointError(
            f"the checkpoint does not fit its config.json: {plan.missing[0]} and more are missing, {lacking:,} bytes "
            f"where {shards.nbytes:,} are there"
        )
    return plan


def _check_device_map(device_map: dict[str, Any]) -> None:
    """One device or several, but no offloading: its hooks move tensors of a module behind the module's back.

    Raises:
        UnsupportedModelError: says which part would be offloaded and what to do instead.
    """
    devices = {str(device) for device in device_map.values()}
    offloaded = {"disk"} if "disk" in devices else devices & {"cpu"} if len(devices) > 1 else set()
    if offloaded:
        name = next(name for name, device in device_map.items() if str(device) in offloaded)
        raise UnsupportedModelError(
            f"device_map must keep a packed model in memory on its devices, got {name or 'all'} on "
            f"{device_map[name]}: offloading is not supported. Give one device, or several with enough memory"
        )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def attach(model: nn.Module, blocks: Patterns) -> None:
    """Make `model.save_pretrained` write a model with packed blocks as a packed checkpoint, or refuse to.

    It refuses where the family cannot be stored packed; the model can still be run, and saved by
    `moesparse.save_pretrained(model, folder)` as a dense one.
    """
    if not isinstance(model, PreTrainedModel):
        return
    config = packed_config(model, blocks)
    # what transformers' loader sets on a model, its class does not declare
    target: Any = model
    try:
        target._weight_conversions = packed_conversions(conversions_of(model), blocks) or None
        serializable = True
    except UnsupportedModelError:
        serializable = False
    target.config.quantization_config = config
    target.hf_quantizer = MoESparseQuantizer(config, serializable)
    target.quantization_method = METHOD


def detach(model: nn.Module) -> None:
    """Undo `attach`, or what loading a packed checkpoint leaves on a model. The converters serve dense models too."""
    if isinstance(model, PreTrainedModel) and isinstance(getattr(model, "hf_quantizer", None), MoESparseQuantizer):
        quantizer: Any = model.hf_quantizer
        quantizer.remove_quantization_config(model)
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
            vars(model)["_weight_conversions"] = before["_weight_conversions"]
        if blocks is not None:
            vars(model)["_weight_conversions"] = packed_conversions(conversions_of(model), blocks) or None
            model.config.quantization_config = packed_config(model, blocks)
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)
        vars(model.config).pop("quantization_config", None)
        if config is not None:
            model.config.quantization_config = config


def packed_config(model: PreTrainedModel, blocks: Patterns) -> MoESparseConfig:
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
layer_counts.register()
