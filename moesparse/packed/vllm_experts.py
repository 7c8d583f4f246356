"""Packed experts in vLLM: what its model builder asks for the layers of a packed folder, and how they are run.

vLLM asks the quantization config for a method for every layer. Expert layers whose block the folder's
quantization_config names get `PackedExpertsMethod`; every other layer, experts left dense included, gets vLLM's own
unquantized method. Per expert the folder holds `...weight` and `...weight_meta`, which vLLM's expert loader carries to
`w13_weight` and `w13_weight_meta` (gate and up) and to `w2_weight` and `w2_weight_meta` (down), as it would dense rows:
values and bitmask are in the "row" order of moesparse_kernels.layout, so a tensor-parallel slice of one is the slice of
the other. The layer itself is one torch op, `torch.ops.moesparse.moe_nm`, for CUDA graphs and torch.compile.

Written against vLLM 0.32 and 0.33, whose quantization interface is not a stable API; tests/vllm is the contract.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform

from moesparse.errors import CheckpointError, UnsupportedModelError, UsageError
from moesparse.packed.experts import META_SUFFIX, MatrixLayout
from moesparse.packed.quantizer import METHOD, MoESparseConfig
from moesparse_kernels import NMWeight, moe_nm
from moesparse_kernels.dispatch import order_on
from moesparse_kernels.layout import order_of

__all__ = ["MoESparseQuantization", "PackedExpertsMethod"]

# vLLM's names of the activations that the kernels run
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
_NO_GATE = "_no_mul"
_UP, _DOWN = "w13_weight", "w2_weight"

Loader = Callable[..., bool | None]


class MoESparseQuantization(QuantizationConfig):
    """`quantization_config` of a packed folder, in vLLM's terms.

    Args:
        config: what config.json says.

    Raises:
        CheckpointError: two packed blocks are in one decoder layer, or a block is in none.
        UnsupportedModelError: the blocks lie in the wrapper of a model for images: vLLM loads those in ways of its own.
    """

    def __init__(self, config: MoESparseConfig) -> None:
        super().__init__()
        self.config = config
        self._block_of_layer: dict[int, str] = {}
        for block in config.blocks:
            # vLLM and transformers agree on the number of a decoder layer, not on what stands before and behind it
            layer = _layer_number(block)
            if "language_model" in block.split("."):
                raise UnsupportedModelError(
                    f"packed experts in vLLM do not run inside a wrapper for images, got {block}: serve the dense "
                    "folder that moesparse unpack makes"
                )
            if layer is None or layer in self._block_of_layer:
                raise CheckpointError(
                    f"quantization_config must name one block of experts in each packed decoder layer, got {block}"
                )
            self._block_of_layer[layer] = block

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        # fp32 runs through torch's products expert by expert, which waits for a GPU and so cannot be captured
        return [torch.bfloat16, torch.float16, *([torch.float32] if current_platform.is_cpu() else [])]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoESparseQuantization:
        return cls(MoESparseConfig(**config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not isinstance(layer, RoutedExperts):
            return None
        number = _layer_number(prefix)
        if number is None:
            raise UnsupportedModelError(f"vLLM's expert layer {prefix!r} must lie in a numbered decoder layer")
        block = self._block_of_layer.get(number)
        return None if block is None else PackedExpertsMethod(layer.moe_config, self.config, block)


def _layer_number(name: str) -> int | None:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


class PackedExpertsMethod(FusedMoEMethodBase):
    """Creates, loads and runs one expert layer on packed n:m weights.

    On a GPU, 2:4 weights of 16 bits are reordered for the kernels once, after loading; other patterns stay in row order
    and are made dense, layer by layer, in a scratch. On a CPU the compiled kernels read row order.

    Args:
        moe: vLLM's description of the layer.
        config: patterns of all blocks.
        block: name of this layer's block in `config`.
    """

    def __init__(self, moe: Any, config: MoESparseConfig, block: str) -> None:
        super().__init__(moe)
        self._config = config
        self._block = block
        self._layouts: dict[str, MatrixLayout] = {}
        self._dtype = torch.get_default_dtype()

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters for this rank's experts, rows and columns.

        Raises:
            UnsupportedModelError: the layer has what packed experts do not run: LoRA, biases, another activation, ...
            CheckpointError: the folder's pattern is none, or does not divide the matrices.
            UsageError: tensor parallelism would cut a group or an index byte of the down projection.
        """
        self._check_layer(layer, hidden_size)
        self._dtype = params_dtype
        gated = self.moe.is_act_and_mul
        H, I, I_of_rank = hidden_size, self.moe.intermediate_size, intermediate_size_per_partition
        up_name, up_rows = ("gate_up_proj", 2) if gated else ("up_proj", 1)
        up = self._config.layout(self._block, up_name, (num_experts, up_rows * I, H))
        down = self._config.layout(self._block, "down_proj", (num_experts, H, I))
        self._layouts = {
            _UP: replace(up, shape=(num_experts, up_rows * I_of_rank, H)),
            _DOWN: replace(down, shape=(num_experts, H, I_of_rank)),
        }
        self._check_slice(I)
        load = extra_weight_attrs.pop("weight_loader")
        for name, stored_shape in ((_UP, (I, H)), (_DOWN, (H, I))):
            self._register(layer, name, stored_shape, load, extra_weight_attrs)

    def _register(
        self, layer: RoutedExperts, name: str, stored_shape: tuple[int, int], load: Loader, attributes: dict[str, Any]
    ) -> None:
        """Add values and index of one matrix to the layer; `stored_shape` is that of one expert's dense matrix."""
        layout = self._layouts[name]
        E, N, K = layout.shape
        rows, columns = stored_shape
        # NaN and empty groups are in no checkpoint, so that what was not loaded is found afterwards
        values = torch.full((E, N, K // layout.m * layout.n), math.nan, dtype=self._dtype)
        index = torch.zeros(E, N, K // 8, dtype=torch.uint8)
        parts = {
            name: (values, (rows, columns // layout.m * layout.n)),
            name + META_SUFFIX: (index, (rows, columns // 8)),
        }
        for part, (tensor, stored) in parts.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(part, parameter)
            loader = _checked(load, f"{self._block}, {part}", stored, is_index=tensor is index)
            set_weight_attrs(parameter, {**attributes, "weight_loader": loader})
        byte = _index_byte(layout)
        if byte is not None:
            set_weight_attrs(layer.get_parameter(name + META_SUFFIX), {"dummy_weight_value": byte})

    def _check_layer(self, layer: RoutedExperts, hidden_size: int) -> None:
        moe, activation = self.moe, self.moe.activation.value
        known = activation.removesuffix(_NO_GATE) in _ACTIVATIONS
        clamped = any(getattr(layer, f"swiglu_{name}", None) is not None for name in ("limit", "alpha", "beta"))
        padded = hidden_size != moe.hidden_dim_unpadded
        refused = {
            "LoRA; start vLLM without --enable-lora": moe.is_lora_enabled,
            "biases": moe.has_bias,
            f"the activation {activation}; they run {', '.join(_ACTIVATIONS)}": not known,
            "a clamped activation": clamped,
            "gates that scale an expert's input": layer.apply_router_weight_on_input,
            "shared experts fused into the routed ones": layer.expert_map_manager.num_fused_shared_experts > 0,
            f"hidden states padded to {hidden_size}; choose another --all2all-backend": padded,
        }
        for what, found in refused.items():
            if found:
                raise UnsupportedModelError(f"{self._block}: packed experts in vLLM do not run {what}")

    def _check_slice(self, I: int) -> None:
        """Every rank must get whole groups and whole index bytes of the down projection's columns."""
        layout = self._layouts[_DOWN]
        step, I_of_rank = math.lcm(layout.m, 8), layout.shape[2]
        if I_of_rank % step:
            fitting = [ranks for ranks in range(1, I // step + 1) if I % (ranks * step) == 0]
            raise UsageError(
                f"--tensor-parallel-size must leave each rank a multiple of {step} columns of {self._block}.down_proj "
                f"({layout.pattern}, whole index bytes), got {I} columns over {I // I_of_rank} ranks; "
                f"{', '.join(map(str, fitting))} fit, or split whole experts with --enable-expert-parallel"
            )

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check that every expert came, and hold the weights in the order that the device's fastest code reads.

        Raises:
            CheckpointError: an expert's values or bitmask are missing or damaged.
        """
        for name, layout in self._layouts.items():
            weight = self._weight(layer, name)
            for expert, values in enumerate(weight.values if weight.order == "row" else ()):
                if bool(values.isnan().any()):
                    raise CheckpointError(
                        f"{self._block}: {name} of expert {expert} on this rank holds NaN: "
                        "the folder lacks it, or it is damaged"
                    )
            try:
                weight.validate()
            except ValueError as error:
                raise CheckpointError(
                    f"{self._block}: {name}{META_SUFFIX} is missing in the folder or damaged: {error}"
                ) from error
            if weight.device.type == "cuda" and layout.pattern == "2:4" and weight.dtype.itemsize == 2:
                reordered = weight.to_order(order_on(weight.device, weight.dtype))
                replace_parameter(layer, name, reordered.values)
                replace_parameter(layer, name + META_SUFFIX, reordered.index)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The routed experts' output [T, H] for x [T, H]; vLLM runs shared experts itself."""
        if layer.expert_map is not None:
            # with expert parallelism ids count all experts; those of other ranks map to -1, which the op drops
            topk_ids = torch.where(topk_ids < 0, -1, layer.expert_map[topk_ids.long()])
        return moe_nm(
            x,
            topk_ids,
            topk_weights,
            self._weight(layer, _UP),
            self._weight(layer, _DOWN),
            activation=self.moe.activation.value.removesuffix(_NO_GATE),
            gated=self.moe.is_act_and_mul,
        )

    def _weight(self, layer: RoutedExperts, name: str) -> NMWeight:
        layout = self._layouts[name]
        values, index = getattr(layer, name), getattr(layer, name + META_SUFFIX)
        return NMWeight(values, index, layout.shape, layout.n, layout.m, order_of(values, index), self._dtype)


def _index_byte(layout: MatrixLayout) -> int | None:
    """A byte that, repeated, is a valid index: for `--load-format dummy`. None: no single byte is."""
    bits = layout.n * 8 // layout.m
    if layout.m == 4:
        return ((1 << layout.n) - 1) * 0x11
    return (1 << bits) - 1 if bits * layout.m == layout.n * 8 else None


def _checked(load: Loader, name: str, shape: tuple[int, int], is_index: bool) -> Loader:
    """vLLM's loader of one expert's tensor, which by itself takes a smaller tensor than it has room for.

    Args:
        load: RoutedExperts.weight_loader.
        name: of the parameter, for the message.
        shape: of an expert's tensor in the folder, before any slicing.
        is_index: it is a bitmask.
    """

    @functools.wraps(load)
    def checked(param: nn.Parameter, loaded_weight: Tensor, weight_name: str, *args: Any, **kwargs: Any) -> bool | None:
        dtype_fits = loaded_weight.dtype == torch.uint8 if is_index else loaded_weight.is_floating_point()
        if tuple(loaded_weight.shape) != shape or not dtype_fits:
            raise CheckpointError(
                f"{name} of an expert must be {'uint8' if is_index else 'floating point'} of shape {shape} in the "
                f"folder, as its quantization_config says, got {loaded_weight.dtype} of shape "
                f"{tuple(loaded_weight.shape)}"
            )
        return load(param, loaded_weight, weight_name, *args, **kwargs)

    return checked
