"""Read and write checkpoints: ordinary transformers folders, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.errors import CheckpointError
from moesparse.models.meta import check_layer_counts
from moesparse.packed.model import state_in_form
from moesparse.system.folders import atomic_folder, copy_small_files
from moesparse.system.manifest import MANIFEST_FILE, write_manifest
from moesparse.system.run_folder import JOURNAL_FILE
from moesparse.system.shards import Shards, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


CONFIG_KEY = "moesparse"
"""Where a checkpoint's config.json says how it was pruned: {"version": ..., "recipe": {...}}."""

REPORT_FILE = "moesparse_report.json"
"""In a pruned checkpoint: the report of the run, as `moesparse.pruning.report.Report.to_dict` gives it."""

_OWN_FILES = ("config.json", "generation_config.json", "README.md", REPORT_FILE, MANIFEST_FILE)


def load_pretrained(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model and its tokenizer onto the CPU, or say in one sentence why not.

    Args:
        source: a local folder, or a model id on the hub. Only safetensors weights are read and no code is run.
        dtype: of the weights; "auto" takes the checkpoint's own.

    Returns:
        The model in eval mode, and the tokenizer (None when the folder has none).

    Raises:
        CheckpointError: the folder or id is unknown, a shard or tensor is missing, or a shape differs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import moesparse.packed.quantizer  # noqa: F401, packed checkpoints too

    folder = Path(source)
    if folder.is_dir():
        check_model_folder(folder)
    elif folder.exists():
        raise CheckpointError(f"MODEL must be a folder or a hub id, got the file {folder}")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        # transformers raises OSError, ValueError, RuntimeError or safetensors' own errors, often over many lines
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"MODEL must be a local folder or a hub id with a causal language model, got {os.fspath(source)!r}: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    model, loading = loaded
    for what, keys in (
        ("lacks", loading["missing_keys"]),
        ("holds with another shape", loading["mismatched_keys"]),
        ("holds but the model has no place for", loading["unexpected_keys"]),
    ):
        if keys:
            names = sorted(key[0] if isinstance(key, tuple) else key for key in keys)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"the checkpoint {os.fspath(source)} {what} {', '.join(names[:3])}{more}")
    return model.eval(), load_tokenizer(source)


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a local folder or a hub id; None when it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def check_model_folder(folder: Path) -> None:
    """Look at a local checkpoint before anything of it is loaded: config.json, the index and the headers.

    Raises:
        CheckpointError: a file is missing, damaged or hostile.
    """
    config = folder / "config.json"
    if (folder / JOURNAL_FILE).exists():
        raise CheckpointError(
            f"MODEL must be a finished checkpoint, got {folder}, which an unfinished run left: give that run's command "
            "again with --resume"
        )
    if not config.exists():
        raise CheckpointError(f"MODEL must be a folder with a config.json, got {folder} without one")
    check_layer_counts(read_json(config), folder, len(Shards.open(folder).tensors))


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    packed: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | os.PathLike[str] | None = None,
    recipe: dict[str, Any] | None = None,
    card: str | None = None,
    report: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model as a transformers checkpoint, with standard key names and in shards.

    Args:
        model: a transformers model, pruned or not, packed or not; it is left as it is.
        folder: a new or empty folder; it appears whole or not at all.
        packed: False: dense with zeros, which any program reads. True: n:m blocks packed (the others dense), which
            transformers reads once moesparse is imported.
        tokenizer: saved beside the weights.
        source: the folder the model came from: its other small files (chat template, licence) are copied.
        recipe: how the model was pruned; written to config.json under "moesparse".
        card: text of README.md.
        report: of the run that pruned it; written to moesparse_report.json, where `moesparse report` finds it.
        max_shard_size: of one safetensors file, as in transformers.

    Raises:
        CheckpointError: the folder holds files or cannot be written.
        UnsupportedModelError: the checkpoints of this family cannot hold packed experts.
        MoESparseError: packed, and no block holds an n:m pattern.
    """
    from moesparse.packed.quantizer import packed_metadata

    if recipe is not None:
        note_recipe(model, recipe)
    with atomic_folder(folder) as work:
        state, blocks = state_in_form(model, packed)
        with packed_metadata(model, blocks):  # type: ignore[arg-type]
            model.save_pretrained(work, state_dict=state, max_shard_size=max_shard_size)  # type: ignore[operator]
        write_companions(work, tokenizer=tokenizer, source=source, card=card, report=report)
        write_manifest(work, list(work.glob("*.safetensors")))


def note_recipe(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Say in the model's config how it was pruned."""
    # removing experts noted there which ones are left
    noted = getattr(model.config, CONFIG_KEY, None) or {}
    setattr(model.config, CONFIG_KEY, {**noted, "version": __version__, "recipe": recipe})


def write_companions(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str | os.PathLike[str] | None,
    card: str | None,
    report: dict[str, Any] | None,
) -> None:
    """Write what stands beside weights and config in a checkpoint; the arguments are those of `save_pretrained`."""
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library gives a full disk no type of its own
            raise error if isinstance(error, OSError) else OSError(f"the tokenizer: {error}") from error
    if source is not None and Path(source).is_dir():
        copy_small_files(Path(source), folder, leave=_OWN_FILES)
    if card is not None:
        (folder / "README.md").write_text(card)
    if report is not None:
        (folder / REPORT_FILE).write_text(json.dumps(report))
