"""What the forward of a model is called with: token ids, and what a processor made of images beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesparse.errors import UsageError

__all__ = ["attention_mask_of", "forward_inputs"]


def attention_mask_of(mask: Tensor | None) -> Tensor | None:
    """The mask that a forward needs: none where all padding lies behind, where causal layers never look.

    With one a family makes [t, t] values a window of it, at 16384 tokens 268 MB.

    Args:
        mask: [b, t], nonzero where a token is real, or None.
    """
    if mask is None or not (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
        return None
    return mask


def forward_inputs(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
    numbers: Iterable[int] = (),
) -> dict[str, Any]:
    """Arguments of a forward that computes no cache.

    Args:
        model: that is called; tensors of floating dtype become its dtype.
        ids: [b, t], on the device to run on.
        mask: [b, t], or None.
        inputs: of every window, see `ImageWindows`. Their padding lies behind.
        numbers: of the batch's windows among them.

    Raises:
        UsageError: inputs of the batch that cannot be joined.
    """
    if inputs is None:
        return {"input_ids": ids, "attention_mask": attention_mask_of(mask), "use_cache": False}
    parts: dict[str, list[Tensor]] = {}
    numbers = list(numbers)
    for number in numbers:
        for name, tensor in inputs[number].items():
            parts.setdefault(name, []).append(tensor)
    try:
        joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    except RuntimeError as error:
        raise UsageError(
            f"records of images must be of one form to run together, got others in windows {numbers}: give batch_size=1"
        ) from error
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return {"input_ids": ids, "use_cache": False} | {
        name: tensor.to(ids.device, dtype if tensor.is_floating_point() else None) for name, tensor in joined.items()
    }
