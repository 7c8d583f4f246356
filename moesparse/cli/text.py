"""Calibration text as the options of a command name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesparse.errors import CalibrationError, UsageError
from moesparse.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["CalibrationText", "TextOptions", "calibration_windows", "embedded_texts"]


@dataclass(frozen=True)
class CalibrationText:
    """Windows to calibrate on, [n, t] ids and a mask or None, and the domain of each."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    domains: list[str]

    @property
    def windows(self) -> Any:
        """What everything that takes windows takes."""
        return self.ids if self.mask is None else (self.ids, self.mask)


@dataclass(frozen=True)
class TextOptions:
    """What the options of a command say of its calibration text."""

    sources: Sequence[str]
    samples: int
    length: int
    seed: int
    from_model: int | None = None
    temperature: float = 0.0
    batch_size: int = 8
    device: Any = None

    def __post_init__(self) -> None:
        if self.temperature and self.from_model is None:
            raise UsageError(
                f"--temperature must come with --demonstrations-from-model, got {self.temperature} without it"
            )

    def read(
        self, tokenizer: PreTrainedTokenizerBase | None, source: str, network: Any, progress: Progress = silent
    ) -> CalibrationText:
        """The windows of a run; with `from_model` the model writes that many tokens of each itself."""
        from moesparse.calibration.demonstrations import check_new_tokens, continue_prompts
        from moesparse.models.meta import context_length

        context = context_length(network)
        wanted: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "context": context}
        if self.from_model is None:
            ids, domains = calibration_windows(self.sources, tokenizer, source, length=self.length, **wanted)
            return CalibrationText(ids, None, domains)
        length = min(self.length, context or self.length)
        check_new_tokens(self.from_model, length, self.temperature)
        prompts, domains = calibration_windows(
            self.sources, tokenizer, source, length=length - self.from_model, **wanted
        )
        ids, mask = continue_prompts(
            network,
            prompts,
            self.from_model,
            temperature=self.temperature,
            seed=self.seed,
            batch_size=self.batch_size,
            device=self.device,
            progress=progress,
        )
        return CalibrationText(ids, mask, domains)


def calibration_windows(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    context: int | None,
) -> tuple[torch.Tensor, list[str]]:
    """Calibration windows and their domains: the given texts, or the embedded text for the embedded model."""
    from moesparse import text

    if tokenizer is None:
        raise CalibrationError(
            f"MODEL must hold a tokenizer that transformers can load, to read text, got {source} without one"
        )
    if not sources:
        sources = embedded_texts("calibration", source)
        if not sources:
            raise CalibrationError(
                "--calibration must name text for this model (.txt, .jsonl, .parquet or a datasets name), got none; "
                "only the embedded model brings its own. Example: --calibration c4.jsonl --samples 128 --length 2048"
            )
    named = [text.parse_source(argument) for argument in sources]
    return text.domain_windows(named, tokenizer, samples=samples, length=length, seed=seed, max_length=context)


def embedded_texts(split: str, source: str) -> list[str]:
    """Paths of the text that ships with the package, when `source` is the embedded model or made from it."""
    from moesparse import demo

    tokenizer = Path(source) / "tokenizer.json"
    own = demo.model_path() / "tokenizer.json"
    if not tokenizer.is_file() or tokenizer.read_bytes() != own.read_bytes():
        return []
    return [f"{demo.text_path(split, domain)}={domain}" for domain in demo.DOMAINS]
