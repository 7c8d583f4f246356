"""Perplexity, bits per byte and greedy generation for any causal language model.

Protocol: windows are scored independently of each other; the first token of a window has no context and is not scored;
log-probabilities are computed from fp32 logits and summed in fp64. Figures of different windows, strides or texts are
not comparable, so every result for files states its protocol.

The logits of a batch are never held whole in fp32: where the head (`get_output_embeddings()`) is the last thing the
model does, its input is caught and the head is applied to a few hundred rows at a time; where something follows it (a
soft cap, a scale), the model's own logits are used, in batches of few enough windows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moesparse.calibration.windows import ImageWindows, Windows
from moesparse.documents import PathLike, SourceRead, check_chats
from moesparse.errors import MoESparseError, UsageError
from moesparse.models.meta import context_length
from moesparse.models.modes import evaluating
from moesparse.progress import ProgressEvent, ProgressLike, reporting
from moesparse.system.cpu_products import fast_products
from moesparse.text import DEFAULT_LENGTH, adds_bos, encode_document, evaluation_windows

# fp32 logits held at a time (256 MiB), and logits that a model may return at a time (512 MiB in bf16)
_CHUNK_LOGITS = 1 << 26
_BATCH_LOGITS = 1 << 28


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text. `a + b` is the figure over both texts.

    Attributes:
        nll: negative log-likelihood of the scored tokens, summed, in nats.
        tokens: how many tokens were scored.
        byte_count: UTF-8 bytes these tokens stand for, None when unknown.
    """

    nll: float
    tokens: int
    byte_count: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); depends on the tokenizer."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """nll / ln 2 / bytes; comparable between tokenizers. None when the bytes are unknown."""
        return self.nll / math.log(2) / self.byte_count if self.byte_count else None

    def __add__(self, other: Perplexity) -> Perplexity:
        known = self.byte_count is not None and other.byte_count is not None
        count = (self.byte_count or 0) + (other.byte_count or 0) if known else None
        return Perplexity(self.nll + other.nll, self.tokens + other.tokens, count)

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens}


@dataclass(frozen=True)
class Protocol:
    """What a figure was measured with.

    Attributes:
        window: tokens a window.
        stride: tokens from the start of a window to the start of the next.
        bos: whether every document begins with BOS; windows after its first have none.
    """

    window: int
    stride: int
    bos: bool

    def __str__(self) -> str:
        bos = "BOS once a document" if self.bos else "no BOS"
        return f"windows of {self.window} tokens, stride {self.stride}, scored independently, {bos}"


@dataclass(frozen=True)
class FilesPerplexity:
    """Perplexity of every file, and over all their tokens together (not a mean of the files' figures).

    Attributes:
        files: by name.
        protocol: of all of them.
        found: what was read of each.
    """

    files: dict[str, Perplexity]
    protocol: Protocol
    found: Sequence[SourceRead] = ()

    @property
    def overall(self) -> Perplexity:
        first, *rest = self.files.values()
        return sum(rest, start=first)

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON: over all files, then a list of the files, then the protocol."""
        read = {note.source: asdict(note) for note in self.found}
        files = [{"file": name, **result.as_dict()} for name, result in self.files.items()]
        for row in files:
            row |= {key: value for key, value in read.get(row["file"], {}).items() if key != "source"}
        protocol = {"window": self.protocol.window, "stride": self.protocol.stride, "bos": self.protocol.bos}
        return {**self.overall.as_dict(), "files": files, "protocol": protocol}


def perplexity(
    model: nn.Module,
    windows: Windows,
    *,
    attention_mask: torch.Tensor | None = None,
    batch_size: int = 8,
    byte_count: int | None = None,
    context: int = 0,
    progress: ProgressLike = "auto",
    name: str = "",
) -> Perplexity:
    """Score token windows.

    Args:
        model: a causal language model: `model(input_ids)` gives logits [b, t, vocabulary] or has them as `.logits`.
            It is scored in eval mode, where it is, and left in the mode it was in.
        windows: [n, t] int64 with t >= 2, or (windows, attention_mask).
        attention_mask: [n, t], 1 at tokens and 0 at padding on either side; padding is neither scored nor a context.
            Only where windows are given without one.
        batch_size: windows a forward pass; fewer are taken where their logits would not fit.
        byte_count: UTF-8 bytes that the scored tokens stand for; gives bits per byte.
        context: leading tokens of every window but the first that are not scored again: length - stride when windows
            overlap, see `moesparse.text.evaluation_windows`.
        progress: as in `moesparse.prune`; a function is called before the first and after every batch.
        name: what the windows are, for progress.

    Returns:
        The summed figures; nll accumulates in fp64.

    Raises:
        UsageError: windows have no shape [n, t], ids the model does not know, or nothing to score.
        MoESparseError: the model gives a loss that is not finite; names the window.
    """
    if isinstance(windows, tuple) and attention_mask is not None:
        raise UsageError("attention_mask must be left out where windows bring their own, got both")
    if isinstance(windows, ImageWindows):
        raise UsageError("windows must be text alone to be scored, got records with images")
    ids, mask = windows if isinstance(windows, tuple) else (windows, attention_mask)
    _check_windows(ids, mask, batch_size)
    scored = torch.ones(ids[:, 1:].shape, dtype=torch.bool)
    if mask is not None:
        scored = (mask[:, 1:].bool() & mask[:, :-1].bool()).cpu()
    if context > 1:
        scored[1:, : context - 1] = False
    tokens = int(scored.sum())
    if not tokens:
        raise UsageError("windows must leave a token to score, got none: attention_mask or context covers them all")

    nll = 0.0
    stage = f"score {os.path.basename(name)}".rstrip()
    began = time.perf_counter()

    with reporting(progress) as told, evaluating(model), torch.no_grad(), fast_products(model):

        def report(done: int) -> None:
            seconds = time.perf_counter() - began
            told(ProgressEvent(stage, done, len(ids), "window", done * ids.shape[1], seconds, name))

        report(0)
        device = _input_device(model)
        scorer = _Scorer(model, device)
        scorer.check_ids(ids)
        step = min(batch_size, scorer.most_windows(ids.shape[1]))
        for start in range(0, len(ids), step):
            rows = slice(start, start + step)
            keep = scored[rows]
            per_token = torch.zeros(keep.shape, dtype=torch.float64)
            per_token[keep] = scorer.losses(ids[rows].to(device), None if mask is None else mask[rows].to(device), keep)
            per_window = per_token.sum(1)
            if not per_window.isfinite().all():
                worst = int((~per_window.isfinite()).nonzero()[0])
                place = int((~per_token[worst].isfinite()).nonzero()[0]) + 1
                raise MoESparseError(
                    f"the model must give a finite loss, got {per_token[worst, place - 1].item()} "
                    f"at token {place} of window {start + worst}"
                )
            nll += float(per_window.sum())
            report(min(start + step, len(ids)))
    return Perplexity(nll, tokens, byte_count)


def perplexity_of_files(
    model: nn.Module,
    tokenizer: Any,
    files: Sequence[PathLike],
    length: int = DEFAULT_LENGTH,
    stride: int | None = None,
    *,
    join: str | None = None,
    chat: bool = False,
    batch_size: int = 8,
    progress: ProgressLike = "auto",
) -> FilesPerplexity:
    """Score whole files, each on its own.

    Args:
        model: a causal language model, see `perplexity`.
        tokenizer: its transformers tokenizer.
        files: files or `datasets` names; see `moesparse.text`.
        length: tokens a window; lowered to the model's context where that is shorter.
        stride: tokens from the start of a window to the start of the next; `length` when None.
        join, chat: see `moesparse.text.evaluation_windows`.
        batch_size: windows a forward pass.
        progress: as in `perplexity`; events carry the file's name.

    Raises:
        UsageError: there is no file, or a number is out of range.
        MoESparseError: a file cannot be read, is shorter than a window, or the loss is not finite.
    """
    length = min(length, context_length(model), tokenizer.model_max_length)
    stride = length if stride is None else stride
    # every text is read before the first is scored: a wrong name should not cost a long run
    cut, found = read_files(files, tokenizer, length, stride, join=join, chat=chat)
    results = {}
    with reporting(progress) as told:
        for name, (windows, byte_count) in cut.items():
            try:
                results[name] = perplexity(
                    model,
                    windows,
                    batch_size=batch_size,
                    byte_count=byte_count,
                    context=length - stride,
                    progress=told,
                    name=name,
                )
            except UsageError:
                raise
            except MoESparseError as error:
                raise MoESparseError(f"{name}: {error}") from error
    return FilesPerplexity(results, Protocol(length, stride, adds_bos(tokenizer)), found)


def read_files(
    files: Sequence[PathLike],
    tokenizer: Any,
    length: int,
    stride: int,
    *,
    join: str | None = None,
    chat: bool = False,
) -> tuple[dict[str, tuple[torch.Tensor, int | None]], list[SourceRead]]:
    """File -> what `moesparse.text.evaluation_windows` cuts of it, and what was read.

    Arguments are those of `perplexity_of_files`.

    Raises:
        UsageError: there is no file, or a number is out of range. MoESparseError: a file cannot be read, or is shorter
            than a window.
    """
    if not files:
        raise UsageError("files must name at least one text, got none")
    found: list[SourceRead] = []
    how: dict[str, Any] = {"join": join, "max_length": length, "chat": chat, "found": found}
    cut = {os.fspath(file): evaluation_windows(file, tokenizer, length, stride, **how) for file in files}
    if chat:
        check_chats(found)
    return cut, found


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 48) -> list[str]:
    """Continue each prompt greedily, one at a time, so that no padding can change an answer.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; BOS goes in front of a prompt where the tokenizer puts one.
        prompts: texts to go on from.
        max_new_tokens: tokens added at most; EOS ends a text earlier.

    Returns:
        The continuations, without their prompts.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = []
    with evaluating(model), torch.no_grad():
        for prompt in prompts:
            ids = encode_document(tokenizer, prompt, ends=False)
            if not ids:
                raise UsageError(f"a prompt must hold at least one token, got {prompt!r}")
            inputs = torch.tensor([ids], device=_input_device(model))
            # a checkpoint's own generation config may ask for sampling: greedy says no to each of its knobs
            output = model.generate(  # type: ignore[operator]
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
            )
            texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return texts


class _Scorer:
    """Per-token losses of one model; finds out once whether its head may be applied to a few rows at a time."""

    def __init__(self, model: Any, device: torch.device):
        self.model = model
        self.head: nn.Module | None = None
        head = model.get_output_embeddings() if _is_transformers(model) else None
        calls: list[tuple[tuple, torch.Tensor]] = []
        handles: list[Any] = []
        if head is not None:
            handles = [head.register_forward_hook(lambda _module, args, output: calls.append((args, output)))]
        probe = torch.zeros(1, 2, dtype=torch.int64, device=device)
        try:
            logits = _logits(model, probe)
        finally:
            for handle in handles:
                handle.remove()
        self.vocabulary = logits.shape[-1]
        if len(calls) == 1:
            args, output = calls[0]
            # the head is the model's last step if what it gave are the logits, bit for bit
            if len(args) == 1 and args[0].shape[:2] == probe.shape and torch.equal(output.float(), logits.float()):
                self.head = head

    def check_ids(self, ids: torch.Tensor) -> None:
        embedded = self.model.get_input_embeddings().weight.shape[0] if _is_transformers(self.model) else math.inf
        known = min(self.vocabulary, embedded)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= known:
            raise UsageError(
                f"windows must hold token ids in 0..{known - 1}, got {low if low < 0 else high}; "
                "the tokenizer is not this model's"
            )

    def most_windows(self, length: int) -> int:
        """Windows of `length` tokens a forward pass may take."""
        return max(1, _BATCH_LOGITS // (length * self.vocabulary)) if self.head is None else 1 << 30

    def losses(self, ids: torch.Tensor, mask: torch.Tensor | None, scored: torch.Tensor) -> torch.Tensor:
        """[scored tokens] fp64 on the CPU: the loss where `scored` [b, t - 1] is True, row by row."""
        states = _logits(self.model, ids, mask) if self.head is None else self._head_input(self.head, ids, mask)
        rows = max(1, _CHUNK_LOGITS // self.vocabulary)
        losses = []
        for window, state, keep in zip(ids, states, scored, strict=True):
            targets = window[1:].cpu()[keep]
            for part, wanted in zip(state[:-1][keep.to(state.device)].split(rows), targets.split(rows), strict=True):
                logits = part if self.head is None else self.head(part)
                losses.append(F.cross_entropy(logits.float(), wanted.to(logits.device), reduction="none"))
        return torch.cat([loss.double().cpu() for loss in losses])

    def _head_input(self, head: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[b, t, H]: what the model hands to its head; the head itself sees the last position only."""
        caught: list[torch.Tensor] = []

        def catch(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            caught.append(args[0])
            return (args[0][:, -1:], *args[1:])

        handle = head.register_forward_pre_hook(catch)
        try:
            _logits(self.model, ids, mask)
        finally:
            handle.remove()
        return caught[0]


def _logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    keywords: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    # a cache of keys and values is never read here
    if _is_transformers(model):
        keywords["use_cache"] = False
    output = model(ids, **keywords)
    return output if isinstance(output, torch.Tensor) else output.logits


def _check_windows(ids: torch.Tensor, mask: torch.Tensor | None, batch_size: int) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise UsageError(f"windows must be integers [n >= 1, t >= 2], got {ids.dtype} {list(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise UsageError(f"attention_mask must have the shape {list(ids.shape)} of windows, got {list(mask.shape)}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")


def _input_device(model: Any) -> torch.device:
    if _is_transformers(model):
        return model.get_input_embeddings().weight.device
    return next((p.device for p in model.parameters()), torch.device("cpu"))
