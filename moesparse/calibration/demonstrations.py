"""Let a model write its own calibration text: it continues prompts, and is calibrated on prompt and continuation.

A model's own outputs show which experts a task needs better than other people's text of the same task does (EASY-EP,
arXiv 2504.06792).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesparse.errors import UsageError
from moesparse.models.modes import let_experts_run, placed
from moesparse.progress import ProgressEvent, ProgressLike, reporting

__all__ = ["check_new_tokens", "continue_prompts"]


def check_new_tokens(new_tokens: int, length: int, temperature: float = 0.0) -> None:
    """Raise UsageError unless windows of `length` tokens leave a prompt before `new_tokens`."""
    if not 0 < new_tokens < length:
        raise UsageError(
            f"demonstrations from the model must leave a prompt in each window: give 1 to {length - 1} of its {length} "
            f"tokens to the model, got {new_tokens}"
        )
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature must be 0 (the likeliest token) or positive, got {temperature}")


@torch.no_grad()
def continue_prompts(
    model: Any,
    prompts: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    device: torch.device | None = None,
    progress: ProgressLike = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Prompts with what the model writes after them.

    Args:
        model: a transformers causal language model; the state of the random generators is left as it was.
        prompts: [n, t] int64, without padding.
        new_tokens: tokens to write after each.
        temperature: 0 takes the likeliest token; above, tokens are drawn by the seed.
        seed: of the draws.
        batch_size: prompts continued together.
        device: where to run; the model is moved there and back. None runs it where it is.
        progress: as in `moesparse.prune`; a function is called before every batch.

    Returns:
        ids [n, t + new_tokens] int64 on the CPU and a mask of the same shape, 0 behind an end-of-text token, or None
        where no text ended.

    Raises:
        UsageError: no tokens to write, no prompt, or a temperature below 0.
    """
    if prompts.ndim != 2 or not prompts.numel():
        raise UsageError(f"prompts must be [n, t] with at least one token, got {list(prompts.shape)}")
    check_new_tokens(new_tokens, prompts.shape[1] + new_tokens, temperature)
    ends = _end_tokens(model)
    pad = ends[0] if ends else 0
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    rows, masks = [], []
    let_experts_run(model)
    with (
        reporting(progress) as told,
        placed(model, device) as place,
        torch.random.fork_rng(devices=[place] if place.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        for first in range(0, len(prompts), batch_size):
            told(ProgressEvent("write demonstrations", first, len(prompts), "window"))
            batch = prompts[first : first + batch_size].to(place)
            written = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=new_tokens,
                pad_token_id=pad,
                **({"do_sample": False} | drawing),
            ).cpu()
            missing = batch.shape[1] + new_tokens - written.shape[1]
            written = torch.nn.functional.pad(written, (0, missing), value=pad)
            ended = torch.isin(written[:, batch.shape[1] :], torch.tensor(ends, dtype=torch.int64))
            # the end token itself is the model's; what lies behind the first one is padding
            after = ended.cumsum(1) - ended.long() > 0
            rows.append(written)
            masks.append(torch.cat((torch.ones_like(batch.cpu(), dtype=torch.bool), ~after), dim=1))
    mask = torch.cat(masks)
    return torch.cat(rows), None if bool(mask.all()) else mask


def _end_tokens(model: Any) -> list[int]:
    """Ids at which `generate` stops."""
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)
