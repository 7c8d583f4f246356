"""What a calibration reads: token ids in windows of one length, with images or without, their checks and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesparse.errors import UsageError

__all__ = ["ImageWindows", "Windows", "add_hashes", "check_windows", "ordered_hash", "windows_hash"]


@dataclass(frozen=True, eq=False)
class ImageWindows:
    """Records of text and images, as the processor of a model gives them; `moesparse.calibration.images` reads them.

    Attributes:
        ids: [n, t] int64, padded behind.
        mask: [n, t] bool, True where a token is real.
        inputs: what the model is called with besides, for each record: name -> tensor. One record's and the next one's
            are joined along the first dim. It may make them when it is asked for them, the same each time.
        marks: a hash of the inputs of each record.
        stands_in: [n, t] bool, True where a token stands for a part of an image.
        images: in all records.
    """

    ids: Tensor
    mask: Tensor
    inputs: Sequence[Mapping[str, Tensor]]
    marks: Sequence[str]
    stands_in: Tensor
    images: int


Windows = Tensor | tuple[Tensor, Tensor | None] | ImageWindows
"""Token ids [n, t] int64, or those and an attention mask [n, t], or records with images."""


def check_windows(windows: Windows, vocabulary: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The token ids [n, t] and the mask [n, t] bool, or None without padding, that `windows` stands for.

    Raises:
        UsageError: no LongTensor [n, t] with n, t > 0; ids outside [0, vocabulary); a mask of another shape, with
            values other than 0 and 1, or with a window of padding only.
    """
    if isinstance(windows, ImageWindows):
        windows = (windows.ids, windows.mask)
    ids, mask = windows if isinstance(windows, tuple) else (windows, None)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2 or not ids.numel():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UsageError(f"windows must be a LongTensor [n, t] with at least one token, got {got}")
    if vocabulary is not None and (ids.min() < 0 or ids.max() >= vocabulary):
        raise UsageError(
            f"token ids must lie in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}: "
            "were the windows made with another tokenizer?"
        )
    if mask is None:
        return ids, None
    if mask.shape != ids.shape:
        raise UsageError(
            f"attention_mask must have the shape of the windows, {list(ids.shape)}, got {list(mask.shape)}"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise UsageError("attention_mask must hold 0 and 1 only")
    mask = mask.bool()
    if not mask.any(dim=1).all():
        empty = int((~mask.any(dim=1)).nonzero()[0])
        raise UsageError(f"every window must hold a token, got only padding in window {empty}")
    return ids, None if mask.all() else mask


def windows_hash(windows: Tensor, attention_mask: Tensor | None = None, marks: Sequence[str] | None = None) -> str:
    """32 hex digits for a set of windows: the sum, modulo 2^128, of the SHA-256 of each window's tokens.

    Padding is left out. Being a sum it does not depend on order or batching, and `add_hashes` of two parts is the hash
    of the whole.

    Args:
        windows: [n, t] integer token ids.
        attention_mask: [n, t], non-zero where there is a token; None means no padding.
        marks: of the images of each window, where there are any.
    """
    rows = windows.cpu().to(torch.int64)
    keep = None if attention_mask is None else attention_mask.cpu().bool()
    hashes = []
    for index, row in enumerate(rows):
        tokens = row if keep is None else row[keep[index]]
        mark = marks[index].encode() if marks is not None else b""
        hashes.append(hashlib.sha256(tokens.numpy().astype("<i8").tobytes() + mark).hexdigest()[:32])
    return add_hashes(hashes)


def ordered_hash(windows: Tensor, attention_mask: Tensor | None = None, marks: Sequence[str] | None = None) -> str:
    """32 hex digits for windows in their order: what a run whose batches must be the same again is known by."""
    digest = hashlib.sha256(str(tuple(windows.shape)).encode())
    digest.update(windows.cpu().numpy().astype("<i8").tobytes())
    if attention_mask is not None:
        digest.update(attention_mask.cpu().bool().numpy().tobytes())
    for mark in marks or ():
        digest.update(mark.encode())
    return digest.hexdigest()[:32]


def add_hashes(hashes: Sequence[str]) -> str:
    """The `windows_hash` of all windows together from the hashes of disjoint parts."""
    return f"{sum(int(value, 16) for value in hashes) % 2**128:032x}"
