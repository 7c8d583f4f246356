"""MODEL of a command, opened once: its layers on the disk or in memory, its tokenizer, its calibration text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesparse.cli.job import joined, saying_what_is_left
from moesparse.cli.options import model_source
from moesparse.cli.voice import shown_progress
from moesparse.errors import NotInPiecesError
from moesparse.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moesparse.cli.text import CalibrationText, TextOptions

__all__ = ["ModelOnDisk", "WholeModel", "at_work"]


class ModelOnDisk:
    """A checkpoint that is read layer by layer; a hub id is downloaded first.

    Attributes:
        source: what errors call it.
        folder: it lies in.
        layers: of which config.json alone has been read.
        network: the model of the layers, without weights.
    """

    def __init__(self, name: str, output_dtype: str | None = None) -> None:
        from moesparse.checkpoints.hub import local_folder
        from moesparse.models.on_disk import LayersOnDisk

        self.folder = local_folder(model_source(name))
        self.source = str(self.folder)
        self.layers = LayersOnDisk(self.folder, output_dtype=output_dtype)
        self.network = self.layers.model

    def check_headers(self) -> None:
        """Refuse, for a plan, what a run would refuse when it opens the shards."""
        with _naming_the_whole():
            self.layers.check_headers()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the folder, for who reads text; refused where it has none."""
        from moesparse.models.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def read(self, text: TextOptions, progress: Progress = silent) -> CalibrationText:
        """Calibration text for it."""
        return text.read(self.tokenizer, self.source, self.network, progress)


class WholeModel:
    """A model that is loaded at once, packed or not; a hub id is downloaded first.

    Attributes:
        source: the folder it lies in.
        network: the model.
    """

    def __init__(self, name: str) -> None:
        from moesparse.checkpoints.hub import local_folder
        from moesparse.checkpoints.pretrained import load_model

        self.folder = local_folder(model_source(name))
        self.source = str(self.folder)
        self.network = load_model(self.folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the folder, for who reads text; refused where it has none."""
        from moesparse.models.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def read(self, text: TextOptions, progress: Progress = silent) -> CalibrationText:
        """Calibration text for it."""
        return text.read(self.tokenizer, self.source, self.network, progress)


@contextlib.contextmanager
def at_work(out: Path, kept: Callable[[], str], device: Any, *, whole: bool) -> Iterator[Progress]:
    """What every long command is wrapped in: the job of torchrun, a last word on Ctrl-C, progress.

    Args:
        out: the result; where a whole model is loaded it appears at once, and until then nobody else may make it.
        kept: says what a stopped run has left; "" when nothing.
        device: to work on, or None.
        whole: the model is loaded at once, by one process.
    """
    from moesparse.system.run_folder import claimed

    with contextlib.ExitStack() as stack:
        if not whole:
            stack.enter_context(joined(device))
        stack.enter_context(saying_what_is_left(kept))
        stack.enter_context(claimed(out) if whole else _naming_the_whole())
        yield stack.enter_context(shown_progress())


@contextlib.contextmanager
def _naming_the_whole() -> Iterator[None]:
    """A checkpoint that cannot be read layer by layer may still be one that can be loaded: the error says how."""
    try:
        yield
    except NotInPiecesError as error:
        raise NotInPiecesError(
            f"{error}. So it is not read layer by layer; --whole loads it at once, as transformers does, if it fits in "
            "memory"
        ) from error
