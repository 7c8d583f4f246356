"""Calibration text, with images or without, as the options of a command name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from moesparse.cli.console import console
from moesparse.errors import MissingFileError, UsageError
from moesparse.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from moesparse.calibration.windows import ImageWindows
    from moesparse.documents import SourceRead
    from moesparse.text import TextSource

EMBEDDED_LENGTH = 256
"""Window of the embedded model's own figures; it was trained on it."""

__all__ = [
    "EMBEDDED_LENGTH",
    "CalibrationText",
    "TextOptions",
    "calibration_windows",
    "check_sources",
    "check_without_shares",
    "embedded_texts",
    "held_out_texts",
    "tell_embedded",
    "tell_read",
]


@dataclass(frozen=True)
class CalibrationText:
    """Windows to calibrate on.

    Attributes:
        ids, mask: [n, t]; the mask may be None.
        domains: of each window.
        found: what was read for them.
        seen: the windows with their images, where there are any.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    domains: list[str]
    found: list[SourceRead]
    seen: ImageWindows | None = None

    @property
    def windows(self) -> Any:
        """What everything that takes windows takes."""
        if self.seen is not None:
            return self.seen
        return self.ids if self.mask is None else (self.ids, self.mask)

    @property
    def noted(self) -> dict[str, Any]:
        """What was read, for a report."""
        return {"sources": [asdict(note) for note in self.found]}


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
    chat: bool = False
    pack: bool = True

    def __post_init__(self) -> None:
        from moesparse.presets import PRESETS
        from moesparse.text import named_sources
        from moesparse.text.sampling import check_shares

        if self.temperature and self.from_model is None:
            raise UsageError(
                f"--temperature must come with --demonstrations-from-model, got {self.temperature} without it"
            )
        if self.from_model is not None and not self.pack:
            raise UsageError("--no-pack must be left out with --demonstrations-from-model, got both")
        named = named_sources(self.sources)
        check_sources("--calibration", named, f", a published mix ({', '.join(PRESETS)})")
        check_shares([one.share for one in named])
        for name, preset in PRESETS.items():
            if preset.chats and not self.chat and any(one.path == preset.datasets[0].name for one in named):
                raise UsageError(f"--chat must come with --calibration {name}, whose records are chats")

    def check(self, source: str) -> None:
        """Refuse to go without text, and say when text that nobody named takes its place: before any work.

        Args:
            source: the folder of the model.
        """
        _named_or_embedded(self.sources, source)
        if not self.sources:
            tell_embedded("--calibration", source)

    def read(
        self, tokenizer: PreTrainedTokenizerBase, source: str, network: Any, progress: Progress = silent
    ) -> CalibrationText:
        """The windows of a run; with `from_model` the model writes that many tokens of each itself."""
        from moesparse.calibration.demonstrations import check_new_tokens, continue_prompts
        from moesparse.models.meta import context_length

        context = context_length(network)
        if self._names_images(network):
            return self._read_images(source, context, progress)
        found: list[SourceRead] = []
        wanted: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "context": context}
        wanted |= {"chat": self.chat, "pack": self.pack, "found": found}
        if self.from_model is None:
            ids, mask, domains = calibration_windows(self.sources, tokenizer, source, length=self.length, **wanted)
            return CalibrationText(ids, mask, domains, found)
        length = min(self.length, context or self.length)
        check_new_tokens(self.from_model, length, self.temperature)
        prompts, _, domains = calibration_windows(
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
        return CalibrationText(ids, mask, domains, found)

    def _names_images(self, network: Any) -> bool:
        """Whether a source holds images, for a model that takes some."""
        from moesparse import text
        from moesparse.calibration.images import holds_images
        from moesparse.models.opener import towers

        named = [one.path for one in text.named_sources(self.sources)]
        return "vision" in towers(network) and any(map(holds_images, named))

    def _read_images(self, source: str, context: int, progress: Progress) -> CalibrationText:
        from moesparse import text
        from moesparse.calibration.images import image_windows
        from moesparse.checkpoints.processor import load_processor

        if self.from_model is not None:
            raise UsageError("--demonstrations-from-model must be left out with images in --calibration, got both")
        if not self.pack:
            raise UsageError("--no-pack must be left out with images in --calibration, whose records are never packed")
        named = text.named_sources(self.sources)
        if any(one.share is not None for one in named):
            raise UsageError("shares must be left out with images in --calibration, of which each source gives as many")
        found: list[SourceRead] = []
        seen, domains = image_windows(
            named,
            load_processor(Path(source)),
            samples=self.samples,
            length=min(self.length, context),
            seed=self.seed,
            chat=self.chat,
            found=found,
            progress=progress,
        )
        tell_read(found)
        return CalibrationText(seen.ids, seen.mask, domains, found, seen)


def calibration_windows(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    context: int | None,
    chat: bool,
    pack: bool,
    found: list[SourceRead],
) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    """Calibration windows, their mask and domains: the given texts, or the embedded text for the embedded model."""
    from moesparse import text

    named = text.named_sources(_named_or_embedded(sources, source))
    options: dict[str, Any] = {"samples": samples, "length": length, "seed": seed}
    options |= {"max_length": context, "chat": chat, "found": found}
    mask: torch.Tensor | None = None
    if pack:
        ids, domains = text.domain_windows(named, tokenizer, **options)
    else:
        ids, mask, domains = text.record_windows(named, tokenizer, **options)
    if sources:
        tell_read(found)
    else:
        for note, one in zip(found, named, strict=True):
            note.source = f"embedded {one.domain}"
    return ids, mask, domains


def _named_or_embedded(sources: Sequence[str], source: str) -> Sequence[str]:
    """The texts that were named, or those of the embedded model for what has its tokenizer.

    Raises:
        UsageError: neither.
    """
    texts = sources or embedded_texts("calibration", source)
    if not texts:
        raise UsageError(
            "--calibration must name text for this model (.txt, .jsonl, .parquet or a datasets name), got none; "
            "only the embedded model brings its own. Example: --calibration c4.jsonl --samples 128 --length 2048"
        )
    return texts


def check_sources(option: str, sources: Sequence[TextSource], also: str = "") -> None:
    """Refuse a text that is not there, before any work.

    Args:
        option: that names them.
        sources: named.
        also: what else it may name, for the error.

    Raises:
        MissingFileError: names the option and the text.
    """
    from moesparse.documents import is_dataset

    for one in sources:
        path = Path(one.path)
        if path.is_dir():
            raise UsageError(f"{option} must be a file or a datasets name, got the folder {path}: name the files in it")
        if not path.exists() and not is_dataset(one.path):
            raise MissingFileError(
                f"{option} must be a file{also} or a datasets name such as NAME:SPLIT, got {one.path!r}: there is no "
                "such file"
            )


def held_out_texts(text: Sequence[str] | None, source: str) -> list[TextSource]:
    """What --text names, or the embedded held-out texts where they fit the tokenizer of a folder.

    Raises:
        UsageError: no text, or one that is no file and no datasets name.
    """
    from moesparse.text import parse_source

    sources = [parse_source(argument) for argument in text or embedded_texts("heldout", source)]
    if not sources:
        raise UsageError("--text must name a text (.txt, .jsonl, .parquet or a datasets name), got none")
    # a wrong name should not cost the loading of a model
    check_without_shares("--text", sources)
    check_sources("--text", sources)
    return sources


def check_without_shares(option: str, sources: Sequence[TextSource]) -> None:
    """Refuse shares where everything that is named is read whole.

    Raises:
        UsageError: names the option.
    """
    for one in sources:
        if one.share is not None:
            raise UsageError(f"{option} must be FILE or FILE=DOMAIN, got a share of {one.share:g} for {one.path}")


def tell_embedded(option: str, source: str) -> None:
    """Say that the embedded text is taken, for a folder that is not the embedded model itself."""
    from moesparse import demo

    if Path(source).resolve() == demo.model_path().resolve():
        return
    console.print(
        f"[yellow]no {option}:[/] the embedded texts are taken ({', '.join(demo.DOMAINS)}), because {escape(source)} "
        f"has the tokenizer of the embedded model; for text of your own give {option} FILE",
        highlight=False,
        soft_wrap=True,
    )


def tell_read(found: Sequence[SourceRead]) -> None:
    """Say what was read of each source, and drawn from it."""
    from moesparse.documents import SourceSampled

    for note in found:
        chats = f", {note.chats:,} of them chats laid out by the tokenizer's template" if note.chats else ""
        counted = f"{note.documents:,} document{'s' if note.documents != 1 else ''}"
        if isinstance(note, SourceSampled):
            chats += f"; {note.windows:,} windows of it, {note.tokens:,} tokens"
            chats += f", {note.cut:,} cut at their end" if note.cut else ""
        console.print(f"read {note.source}: {counted}{chats}", highlight=False, markup=False, soft_wrap=True)
        if note.left_out:
            console.print(
                f"the template leaves out all thinking, all calls of tools or all tools of {note.left_out:,} of them",
                highlight=False,
                soft_wrap=True,
            )


def embedded_texts(split: str, source: str) -> list[str]:
    """Paths of the text that ships with the package, when `source` is the embedded model or made from it."""
    from moesparse import demo

    tokenizer = Path(source) / "tokenizer.json"
    own = demo.model_path() / "tokenizer.json"
    if not tokenizer.is_file() or tokenizer.read_bytes() != own.read_bytes():
        return []
    return [f"{demo.text_path(split, domain)}={domain}" for domain in demo.DOMAINS]
