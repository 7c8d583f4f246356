"""Read and write checkpoints: ordinary transformers folders, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG_KEY = "moesparse"
"""Where a checkpoint's config.json says how it was pruned: {"version": ..., "recipe": {...}}."""

REPORT_FILE = "moesparse_report.json"
"""In a pruned checkpoint: the report of the run, as `moesparse.pruning.Report.to_dict` gives it."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_OWN_FILES = ("config.json", "generation_config.json", "README.md", REPORT_FILE)


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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import moesparse.integrations.transformers  # noqa: F401, packed checkpoints too

    folder = Path(source)
    if folder.is_dir():
        check_model_folder(folder)
    elif folder.exists():
        raise CheckpointError(f"MODEL must be a folder or a hub id, got the file {folder}")
    try:
        config = AutoConfig.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        tokenizer = None
    return model.eval(), tokenizer


def check_model_folder(folder: Path) -> None:
    """Look at a local checkpoint before anything of it is loaded.

    Raises:
        CheckpointError: it has no valid config.json, or a shard is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"MODEL must be a folder with a config.json, got {folder} without one")
    try:
        json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config} must be valid JSON, got {error}") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} must hold a weight_map, got {error!r}") from error
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"the checkpoint {folder} must hold {', '.join(missing)}, got a folder without it")


def check_output_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder to write to: it must not exist yet, or be empty.

    Raises:
        CheckpointError: it is a file, holds files, or its parent cannot be written.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "a file" if path.is_file() else "a folder that holds files"
        raise CheckpointError(f"OUT must be a new or empty folder, got {what}: {path}. Remove it or name another")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"OUT must lie in a folder that can be written, got {path}")
    return path


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well and vanishes when it does not.

    Whatever stops the block (an error, a full disk, Ctrl-C), `folder` is left as it was. Files are flushed to the disk
    before the rename.

    Raises:
        CheckpointError: the folder holds files already, or writing failed; the reason is named.
    """
    from safetensors import SafetensorError

    path = check_output_folder(folder)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent))
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors and mkdtemp make theirs private
                _flush(file)
        _flush(work)
        work.chmod(0o755)
        os.replace(work, path)
        _flush(path.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}. Nothing was left there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    from moesparse.integrations.transformers import packed_metadata
    from moesparse.packing import state_in_form

    if recipe is not None:
        # removing experts noted there which ones are left
        noted = getattr(model.config, CONFIG_KEY, None) or {}
        setattr(model.config, CONFIG_KEY, {**noted, "version": __version__, "recipe": recipe})
    with atomic_folder(folder) as work:
        state, blocks = state_in_form(model, packed)
        with packed_metadata(model, blocks):  # type: ignore[arg-type]
            model.save_pretrained(work, state_dict=state, max_shard_size=max_shard_size)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if source is not None and Path(source).is_dir():
            for file in Path(source).iterdir():
                skip = file.name in _OWN_FILES or file.name.startswith(".") or file.name.endswith(_WEIGHT_SUFFIXES)
                if file.is_file() and not skip and not (work / file.name).exists():
                    shutil.copy2(file, work / file.name)
        if card is not None:
            (work / "README.md").write_text(card)
        if report is not None:
            (work / REPORT_FILE).write_text(json.dumps(report))
