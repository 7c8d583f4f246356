"""Run text through a dense model once and keep the sums that the recorders of its blocks make."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moesparse.calibration.angles import measure_angles
from moesparse.calibration.data import text_of
from moesparse.calibration.given_text import Text, tokenised
from moesparse.calibration.recorder import Recorder, record, window_sums
from moesparse.calibration.statistics import ModelStatistics, check_moments, memory_needed
from moesparse.calibration.windows import Windows
from moesparse.errors import CalibrationError, UsageError
from moesparse.models.blocks import MoEBlock, find_moe_blocks
from moesparse.models.fingerprint import model_fingerprint
from moesparse.models.inputs import forward_inputs
from moesparse.models.look import check_dense
from moesparse.models.modes import evaluating, placed
from moesparse.progress import ProgressEvent, ProgressLike, reporting
from moesparse.system.cpu_products import fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    windows: Windows | Text,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    moments: str = "none",
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: ProgressLike = "auto",
    allow_pruned: bool = False,
    seed: int = 0,
    by_window: dict[str, Tensor] | None = None,
) -> ModelStatistics:
    """Statistics of every MoE block from one dense pass over `windows`.

    The language-model head does not run. The model is left as it was found: training flags, device, experts functions.

    Args:
        model: a transformers MoE model.
        windows: LongTensor [n, t] of token ids, or (ids, attention_mask) with mask [n, t], 0 where there is padding, or
            `ImageWindows`; or text, strings or a `datasets` object, of which windows are made.
        tokenizer: for text; None takes that of the folder which the model was loaded from.
        moments: second moments to collect as well: "none", "plain", "gated" or "both". For all blocks at once they take
            `memory_needed(find_moe_blocks(model), moments)` bytes; the first progress event says so.
        batch_size: windows per forward pass; also the unit in which float32 sums are added up in float64.
        device: where to run; the model is moved there and back. None runs it where it is.
        progress: as in `moesparse.prune`; a function is called before the first and after every batch.
        allow_pruned: calibrate a model that already carries zeroed or masked experts, which is refused otherwise.
        seed: the seed the windows were drawn with, kept in the result; the pass itself draws nothing.
        by_window: a dict to fill with `window_sums`: the expert sums of every window by itself.

    Returns:
        ModelStatistics on the CPU. The same windows, batch size and machine give the same bits.

    Raises:
        UsageError: an argument that does not fit, token ids outside the vocabulary.
        UnsupportedModelError: no experts, or experts that do not fit.
        CalibrationError: a pruned model, moments that do not fit in memory, an activation that is not finite.
    """
    check_moments(moments)
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    blocks = find_moe_blocks(model)
    text = text_of(tokenised(windows, model, tokenizer, "windows"), model)
    ids, mask = text.ids, text.mask
    if not allow_pruned:
        check_dense(blocks)
    needed = _check_memory(blocks, moments)
    fingerprint = model_fingerprint(model)
    body = _body(model, blocks)
    (n, length), tokens, began = ids.shape, 0, time.perf_counter()

    with (
        reporting(progress) as told,
        placed(model, device) as place,
        evaluating(model),
        torch.inference_mode(),
        record(blocks, moments, moments_device=_moments_device(place, needed)) as recorders,
        measure_angles(model, recorders),
        fast_products(model),
    ):
        if by_window is not None:
            for recorder in recorders:
                recorder.window_sums = {}

        def tell(done: int) -> None:
            seconds = time.perf_counter() - began
            told(ProgressEvent("calibrate", done, n, "window", tokens, seconds, memory=needed))

        tell(0)
        for first in range(0, n, batch_size):
            batch = ids[first : first + batch_size].to(place)
            batch_mask = None if mask is None else mask[first : first + batch_size].to(place)
            for recorder in recorders:
                recorder.aim(None if batch_mask is None else batch_mask.flatten(), first, length)
            attention_mask = None if batch_mask is None else batch_mask.long()
            body(**forward_inputs(body, batch, attention_mask, text.inputs, range(first, first + len(batch))))
            tokens += batch.numel() if batch_mask is None else int(batch_mask.sum())
            tell(min(first + batch_size, n))
    _check_called(recorders)
    if by_window is not None:
        by_window |= window_sums([recorder.window_sums or {} for recorder in recorders], n)
    return ModelStatistics(
        blocks={recorder.block.name: recorder.statistics.to("cpu") for recorder in recorders},
        fingerprint=fingerprint,
        text_hash=text.text_hash,
        seed=seed,
        tokens=tokens,
    )


def _check_called(recorders: Sequence[Recorder]) -> None:
    for recorder in recorders:
        if not recorder.calls:
            raise CalibrationError(
                f"the model must run its experts through ExpertsInterface, {recorder.block.name} was never called: its "
                "forward was replaced (a compiled or kernelized model?)"
            )


def _body(model: nn.Module, blocks: Sequence[MoEBlock]) -> nn.Module:
    """The model without its head, when all blocks are in there."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    return body if all(id(block.experts) in inside for block in blocks) else model


def _check_memory(blocks: Sequence[MoEBlock], moments: str) -> int:
    """Bytes of second moments; CalibrationError when they exceed what the machine has."""
    needed = memory_needed(blocks, moments)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    if installed is not None and needed > installed:
        raise CalibrationError(
            f"second moments must fit in memory, moments={moments!r} takes {needed / 2**30:.1f} GiB for {len(blocks)} "
            f"blocks and the machine has {installed / 2**30:.1f} GiB: prune block by block, which holds one block's "
            "moments at a time, or use moments='none'"
        )
    return needed


def _moments_device(place: torch.device, needed: int) -> torch.device | None:
    """CPU memory when the second moments would take more than half of what is free on a GPU."""
    if place.type == "cuda" and needed > torch.cuda.mem_get_info(place)[0] // 2:
        return torch.device("cpu")
    return None
