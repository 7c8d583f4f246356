"""What tells models apart: a hash of config, names, shapes and a sample of the values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.models.blocks import MoEBlock

__all__ = ["fingerprint_sample", "model_fingerprint", "room_for_samples", "router_sketch", "router_weight"]

# Elements hashed per tensor: 16 per expert with 256 experts, so one changed expert is seen.
_SAMPLES = 4096

# Written by the machine that loads or saves the model; none of them changes what the model computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def model_fingerprint(
    model: nn.Module, samples: Mapping[str, Tensor] | None = None, beside: tuple[str, ...] = ()
) -> str:
    """32 hex digits that tell models apart: config, names and shapes of all tensors, and a sample of their values.

    Of each parameter and saved buffer about 4096 evenly strided elements are hashed (as float32, so the same values in
    another dtype give the same fingerprint). Pruning, removing experts or fine-tuning changes some of them with near
    certainty; a change of a few single weights may pass unseen. Costs milliseconds and reads only the sample. Config
    keys that name folders, versions and dtypes are left out.

    Args:
        model: its tensors may be on the meta device where `samples` holds them.
        samples: name of a tensor -> its `fingerprint_sample`, taken while it was in memory.
        beside: what the names of tensors begin with that are left out.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        entries = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(vars(config))
        digest.update(json.dumps(_stable(entries), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or name.startswith(beside):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        sample = samples[name] if samples and name in samples else fingerprint_sample(tensor)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _stable(entries: Any) -> Any:
    """A config without its volatile keys, at every depth."""
    if isinstance(entries, Mapping):
        return {str(key): _stable(value) for key, value in entries.items() if key not in _VOLATILE_CONFIG}
    if isinstance(entries, list | tuple):
        return [_stable(value) for value in entries]
    return entries


def fingerprint_sample(tensor: Tensor) -> Tensor:
    """About _SAMPLES evenly strided elements as float32 on the CPU."""
    # a copy even where dtype and device are these: a view would hold all of the tensor
    return tensor.detach().reshape(-1)[:: _sample_stride(tensor)].to("cpu", torch.float32, copy=True)


def _sample_stride(tensor: Tensor) -> int:
    # odd, or with widths that are powers of two every sample would lie in the same few columns
    return max(1, tensor.numel() // _SAMPLES) | 1


def room_for_samples(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for the `fingerprint_sample` of each of these tensors, which may be on the meta device, in one piece.

    Samples that are made while large tensors come and go would lie between them, and what was freed around them could
    not be used again: the memory of a process grew with the number of layers.
    """
    sizes = [len(range(0, tensor.numel(), _sample_stride(tensor))) for tensor in tensors.values()]
    return dict(zip(tensors, torch.empty(sum(sizes)).split(sizes), strict=True)) if sizes else {}


def router_weight(block: MoEBlock) -> Tensor | None:
    """The matrix of a block's router with a row for each expert, [E, H]; None where no single one is.

    Rows behind those of the experts, which a few routers have, are left out.
    """
    named = [] if block.router is None else block.router.named_parameters()
    found = [each.detach() for _, each in named if each.ndim == 2 and each.shape[0] >= block.num_experts]
    exact = [each for each in found if each.shape[0] == block.num_experts]
    return next((each[: block.num_experts] for each in exact or found), None)


def router_sketch(weight: Tensor) -> Tensor:
    """One number for each expert that tells routers apart, and copies of one in other dtypes not: <w, s> / |w|.

    s are signs that depend on H alone, drawn by SHAKE-256. Between unrelated rows the numbers differ by about 1.4. A
    copy whose entries are rounded by at most a share u differs by more than t in an expert with a probability of at
    most 2 exp(-t^2 / 2u^2) over the signs (Hoeffding 1963).

    Args:
        weight: [E, H], any float dtype.

    Returns:
        [E] float64 on the CPU; 0 for a row of zeros.
    """
    width = weight.shape[1]
    drawn = hashlib.shake_256(f"moesparse router sketch {width}".encode()).digest(-(-width // 8))
    bits = (torch.frombuffer(bytearray(drawn), dtype=torch.uint8)[:, None] >> torch.arange(8)) & 1
    signs = 1.0 - 2.0 * bits.flatten()[:width].double()
    rows = weight.detach().to("cpu", torch.float64)
    return (rows @ signs) / rows.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
