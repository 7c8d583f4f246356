"""SparseExperts: packed n:m experts in the place of a model's dense ones, with the same call and the same result.

The module takes over all that the dense experts hold but their two matrices: biases, norms, activation, flags, hooks.
Each matrix becomes two parameters of its name, `gate_up_proj` and `gate_up_proj_meta`: values and bitmask in the "row"
order of moesparse_kernels.layout, which is what state_dict gives and what a packed checkpoint stores. On a GPU, 2:4
weights of 16 bits are held in the order that its kernels read, "mma_sp" or "fragment"; they are reordered when the
module moves there, never in a forward, and only one order is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.errors import MoESparseError, UnsupportedModelError
from moesparse.models.blocks import MoEBlock
from moesparse_kernels import NMWeight, moe_nm
from moesparse_kernels.dispatch import order_on
from moesparse_kernels.layout import order_of
from moesparse_kernels.moe_reference import ACTIVATIONS

__all__ = ["META_SUFFIX", "PACKED_DTYPES", "MatrixLayout", "SparseExperts"]

META_SUFFIX = "_meta"
"""The bitmask of parameter `gate_up_proj` is the parameter `gate_up_proj_meta`."""

PACKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MatrixLayout:
    """One packed matrix: its dense shape (E, out, in), and that `n` of every `m` inputs are kept."""

    shape: tuple[int, int, int]
    n: int
    m: int

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}"

    def empty(self, dtype: torch.dtype, device: torch.device | str) -> NMWeight:
        """A packed weight of this layout with undefined content, in "row" order."""
        E, N, K = self.shape
        values = torch.empty(E, N, K // self.m * self.n, dtype=dtype, device=device)
        index = torch.empty(E, N, K // 8, dtype=torch.uint8, device=device)
        return NMWeight(values, index, self.shape, self.n, self.m, "row", dtype)


@dataclass(frozen=True)
class _Origin:
    """What it takes to call the dense module's own code and to make that module again."""

    dense_class: type[nn.Module]
    trainable: tuple[str, ...]
    activation: str | None


class SparseExperts(nn.Module):
    """The experts of one MoE block with packed n:m weights, for inference.

    Called as the dense experts are: (hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]. Expert
    ids outside 0..E-1 are dropped. The kernels read packed weights; on a CPU without the
    compiled ones, one expert at a time is unpacked.

    Casts between bf16, fp16 and fp32 give what casting the dense weights would. Attributes of the dense module
    (num_experts, config, has_gate, ...) are all there.

    Args:
        block: from find_moe_blocks; its experts module gives up nothing and can be dropped afterwards.
        weights: the packed weight of each of the block's matrices, [E, out, in] whatever the family stores.

    Raises:
        UnsupportedModelError: the experts are offloaded by accelerate hooks.
        ValueError: a packed weight is missing or has another shape than its matrix.
    """

    is_packed = True

    # set from the dense module
    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(self, block: MoEBlock, weights: Mapping[str, NMWeight]) -> None:
        super().__init__()
        dense = block.experts
        if "forward" in vars(dense):
            raise UnsupportedModelError(
                f"{block.name} must run on one device, its forward was replaced (accelerate's offloading does so); "
                "load the model without a device_map that offloads"
            )
        _check_weights(block, weights)
        vars(self).update(vars(dense))
        self._parameters: dict[str, nn.Parameter | None] = {}
        self._buffers, self._modules = dict(dense._buffers), dict(dense._modules)
        for name, parameter in dense._parameters.items():
            if name in weights:
                self._set(name, weights[name])
            else:
                self._parameters[name] = parameter
        self.layouts = {name: MatrixLayout(weight.shape, weight.n, weight.m) for name, weight in weights.items()}
        """Layout of each packed matrix by its parameter's name; gate_up_proj or up_proj first, then down_proj."""
        self._origin = _Origin(
            dense_class=type(dense),
            trainable=tuple(matrix.name for matrix in block.matrices if matrix.parameter.requires_grad),
            activation=block.activation_name if block.activation_name in ACTIVATIONS else None,
        )
        self._dtype = next(iter(weights.values())).dtype
        self.use_device_order()

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the dense weights."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices as they are held, padding of the GPU's order included."""
        return sum(self.weight(name).nbytes for name in self.layouts)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the matrices would take dense."""
        return sum(self.weight(name).dense_nbytes for name in self.layouts)

    def weight(self, name: str) -> NMWeight:
        """The packed weight of one matrix, [E, out, in], in the order it is held in; shares memory with the module."""
        layout = self.layouts[name]
        values, index = self.get_parameter(name).data, self.get_parameter(name + META_SUFFIX).data
        return NMWeight(values, index, layout.shape, layout.n, layout.m, order_of(values, index), self._dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise MoESparseError(
                "packed experts have no backward: call the model under torch.no_grad() or torch.inference_mode(), "
                "or moesparse.unpack(model) to train it"
            )
        up_name, down_name = self.layouts
        up, down = self.weight(up_name), self.weight(down_name)
        x = hidden_states.to(self._dtype)
        arguments: dict[str, Any] = {
            "activation": self._origin.activation or self._activation,
            "gated": self.has_gate,
            "gate_up_bias": getattr(self, f"{up_name}_bias", None),
            "down_bias": getattr(self, f"{down_name}_bias", None),
        }
        if not getattr(self, "has_post_expert_norm", False):
            return moe_nm(x, top_k_index, top_k_weights, up, down, **arguments).to(hidden_states.dtype)
        # the norm stands between an expert's output and its gate: every slot becomes a token with one expert
        slots = x.repeat_interleave(top_k_index.shape[1], dim=0)
        ones = torch.ones_like(top_k_weights).view(-1, 1)
        outputs = self.post_expert_norm(moe_nm(slots, top_k_index.reshape(-1, 1), ones, up, down, **arguments))
        weighted = outputs.float().unflatten(0, top_k_index.shape) * top_k_weights.float().unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        return self._origin.dense_class._apply_gate(self, gate_up_out)  # type: ignore[attr-defined]

    def _activation(self, up_out: Tensor) -> Tensor:
        return self._apply_gate(up_out) if self.has_gate else self.act_fn(up_out)

    def to_dense(self) -> nn.Module:
        """The experts as the module they were made from: its class, its parameters in order, the masked weights' bits.

        Pruned positions hold +0.0. Memory: the result.
        """
        dense_class = self._origin.dense_class
        dense = dense_class.__new__(dense_class)
        own = ("layouts", "_origin", "_dtype")
        vars(dense).update({name: value for name, value in vars(self).items() if name not in own})
        dense._parameters, dense._buffers, dense._modules = {}, dict(self._buffers), dict(self._modules)
        metas = {name + META_SUFFIX for name in self.layouts}
        for name, parameter in self._parameters.items():
            if name in self.layouts:
                trainable = name in self._origin.trainable
                dense._parameters[name] = nn.Parameter(self._dense_weight(name), requires_grad=trainable)
            elif name not in metas:
                dense._parameters[name] = parameter
        return dense

    def _dense_weight(self, name: str) -> Tensor:
        """The matrix as the family stores it."""
        weight = self.weight(name)
        E, N, K = weight.shape
        shape = (E, K, N) if self.is_transposed else (E, N, K)
        dense = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        for expert in range(E):
            if self.is_transposed:
                dense[expert] = weight.unpack_expert(expert).t()
            else:
                weight.unpack_expert(expert, out=dense[expert])
        return dense

    def use_device_order(self) -> None:
        """Hold each matrix in the order that its device's fastest code reads. Called whenever the module moves."""
        for name, layout in self.layouts.items():
            weight = self.weight(name)
            if weight.device.type == "cuda" and layout.pattern == "2:4" and weight.dtype.itemsize == 2:
                self._set(name, weight.to_order(order_on(weight.device, weight.dtype)))

    def use_row_order(self) -> None:
        """Hold each matrix in the order of the state dict."""
        for name in self.layouts:
            self._set(name, self.weight(name).to_order("row"))

    def _set(self, name: str, weight: NMWeight) -> None:
        self._parameters[name] = nn.Parameter(weight.values, requires_grad=False)
        self._parameters[name + META_SUFFIX] = nn.Parameter(weight.index, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseExperts:
        """What .to(), .cuda(), .half() and the like come down to; `fn` moves or casts one tensor."""
        first = self.get_parameter(next(iter(self.layouts)))
        dtype = fn(torch.empty(0, dtype=self._dtype, device=first.device)).dtype
        if dtype not in PACKED_DTYPES:
            raise MoESparseError(
                f"packed experts must be one of {', '.join(map(str, PACKED_DTYPES))}, got a cast to {dtype}; "
                "moesparse.unpack(model) first"
            )
        self.use_row_order()
        super()._apply(fn, recurse)
        self._dtype = dtype
        self.use_device_order()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.layouts:
            row = self.weight(name).to_order("row")
            destination[prefix + name] = row.values
            destination[prefix + name + META_SUFFIX] = row.index

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.use_row_order()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # assign=True brings the file's
        self._dtype = self.get_parameter(next(iter(self.layouts))).dtype
        error_msgs += [f"{prefix}{error}" for error in self.check()]
        self.use_device_order()

    def finish_loading(self) -> list[str]:
        """Take over tensors that a loader put into the parameters: check them, and hold them in the device's order.

        Returns:
            What is wrong, one sentence for each damaged matrix.
        """
        errors = self.check()
        if not errors:
            self.use_device_order()
        return errors

    def check(self) -> list[str]:
        """What is wrong with the packed tensors: shapes, or a group that does not hold n bits; reads every index."""
        errors = []
        for name in self.layouts:
            try:
                self.weight(name).validate()
            except ValueError as error:
                errors.append(f"{name}: {error}")
        return errors

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(layout.shape)} {layout.pattern}" for name, layout in self.layouts.items())


def _check_weights(block: MoEBlock, weights: Mapping[str, NMWeight]) -> None:
    names = [matrix.name for matrix in block.matrices]
    if list(weights) != names:
        raise ValueError(f"weights must hold {', '.join(names)} of {block.name}, got {', '.join(weights) or 'none'}")
    for matrix in block.matrices:
        weight = weights[matrix.name]
        if weight.shape != tuple(matrix.weight.shape):
            raise ValueError(
                f"weights[{matrix.name!r}] must be {tuple(matrix.weight.shape)} as [experts, out, in], "
                f"got {weight.shape}"
            )
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1:
        raise ValueError(f"weights must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
