"""Read and write checkpoints: ordinary transformers folders, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.errors import CheckpointError
from moesparse.manifest import MANIFEST_FILE, write_manifest
from moesparse.shards import Shards, read_json
from moesparse.skeleton import check_layer_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

JOURNAL_FILE = "moesparse_journal.json"
"""In a folder that a run has not finished, see moesparse.run_folder."""

CONFIG_KEY = "moesparse"
"""Where a checkpoint's config.json says how it was pruned: {"version": ..., "recipe": {...}}."""

REPORT_FILE = "moesparse_report.json"
"""In a pruned checkpoint: the report of the run, as `moesparse.pruning.Report.to_dict` gives it."""

_PARTIAL = ".partial"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_OWN_FILES = ("config.json", "generation_config.json", "README.md", REPORT_FILE, MANIFEST_FILE)
_TEMPLATES = "additional_chat_templates"


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

    import moesparse.integrations.transformers  # noqa: F401, packed checkpoints too

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


def check_output_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder to write to: it must not exist yet, or be empty.

    Raises:
        CheckpointError: it is a file, holds files, or its parent cannot be written.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        what = "a file" if path.is_file() else "a folder that holds files"
        raise CheckpointError(f"OUT must be a new or empty folder, got {what}: {path}. Remove it or name another")
    check_writable("OUT", path)
    return path


def check_writable(name: str, path: Path) -> None:
    """Refuse a path at which nothing can be written; folders on the way to it may be missing.

    Args:
        name: of the argument.

    Raises:
        CheckpointError: it, or the folder it lies in, is read-only, or that is no folder.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise CheckpointError(f"{name} must lie in a folder that can be written, got {path}: {parent} is a file")
    for each in (parent, path):
        if each.exists() and not os.access(each, os.W_OK):
            raise CheckpointError(f"{name} must lie in a folder that can be written, got {path}: {each} is read-only")


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well and vanishes when it does not.

    Whatever stops the block (an error, a full disk, Ctrl-C), `folder` is left as it was. Files are flushed to the disk
    before the rename. What a killed process left behind is removed by the next one that writes the same folder.

    Raises:
        CheckpointError: the folder holds files already, or writing failed; the reason is named.
    """
    from safetensors import SafetensorError

    path = check_output_folder(folder)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    work, lock = _work_folder(path.absolute())
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors and mkdtemp make theirs private
                flush(file)
        flush(work)
        work.chmod(0o755)
        os.replace(work, path)
        flush(path.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}. Nothing was left there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _work_folder(path: Path) -> tuple[Path, int]:
    """A new temporary folder for `path`, and the descriptor that holds its lock.

    Those that were left by a process that was killed are removed: nobody holds their locks.
    """
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)  # a folder that another process has made and not yet locked is no leftover
        for old in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
            descriptor = os.open(old, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            os.close(descriptor)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
        lock = os.open(work, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return work, lock
    finally:
        os.close(parent)


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk when this returns."""
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


def copy_small_files(source: Path, folder: Path, leave: Collection[str]) -> None:
    """Copy what lies beside the weights (tokenizer, chat templates, licence) but for the names to leave.

    Hidden files, weights of any format and files that are there already are left out.

    Raises:
        CheckpointError: one is a link to a file elsewhere, which would be published with the copy.
    """
    templates = source / _TEMPLATES
    inside = [source.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")  # the hub's cache
    for file in [*source.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]:
        if (
            not file.is_file()
            or file.name in leave
            or file.name.startswith(".")
            or file.name.endswith(_WEIGHT_SUFFIXES)
        ):
            continue
        target = folder / file.relative_to(source)
        if target.exists():
            continue
        if not any(file.resolve().is_relative_to(place) for place in inside):
            raise CheckpointError(f"{file} must not lead out of its folder, got a link to {file.resolve()}; remove it")
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(file, target)
