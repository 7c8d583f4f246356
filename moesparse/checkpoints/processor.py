"""The processor of a checkpoint: what makes the inputs of a model from text and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesparse.errors import CheckpointError, reason_of

__all__ = ["load_processor"]


def load_processor(folder: Path) -> Any:
    """The processor of a local folder. No code that lies there is run, and nobody is asked to.

    Raises:
        CheckpointError: it has none, or one that needs a package which is missing.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise CheckpointError(
            f"the processor of {folder}, which images go through, must be loaded, and lacks a package: "
            f"{reason_of(error).partition('. ')[0]}; pip install 'moesparse[images]'"
        ) from error
    except Exception as error:  # whatever transformers says to a folder without one
        raise CheckpointError(
            f"MODEL must hold the processor that it reads images with, got {folder} without one that transformers can "
            f"load: {reason_of(error)}"
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise CheckpointError(
            f"MODEL must hold the processor that it reads images with (processor_config.json, or "
            f"preprocessor_config.json), got {folder} with a {type(processor).__name__} alone"
        )
    return processor
