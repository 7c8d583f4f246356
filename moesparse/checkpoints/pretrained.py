"""Read and write checkpoints: ordinary transformers folders, written whole or not at all."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moesparse._version import __version__
from moesparse.checkpoints.edit import CONFIG_KEY, SourceFolder, Surplus, say_surplus, surplus
from moesparse.checkpoints.history import (
    EARLIER,
    REPORT_FILE,
    card_after,
    following,
    joined_surplus,
    noted_with,
    read_report,
)
from moesparse.checkpoints.skeleton import open_skeleton
from moesparse.errors import CheckpointError, UnsupportedModelError
from moesparse.models.keys import checkpoint_tensors
from moesparse.models.meta import check_causal, check_layer_counts, read_config
from moesparse.packed.model import packed_blocks, state_in_form
from moesparse.system.folders import JOURNAL_FILE, atomic_folder, copy_companions
from moesparse.system.manifest import MANIFEST_FILE, write_manifest
from moesparse.system.shards import INDEX_FILE, Shards, read_json, write_shards
from moesparse.system.sizes import parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_pretrained(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model and its tokenizer onto the CPU, or say in one sentence why not.

    Args:
        source: a local folder, or a model id on the hub. Only safetensors weights are read and no code is run.
        dtype: of the weights; "auto" takes the checkpoint's own.

    Returns:
        The model in eval mode, and the tokenizer (None when the folder has none). A warning names tensors that the
        model has no place for.

    Raises:
        CheckpointError: the folder or id is unknown, a shard or tensor is missing, or a shape differs.
    """
    from transformers import AutoModelForCausalLM

    import moesparse.packed.quantizer  # noqa: F401, packed checkpoints too

    folder = Path(source)
    if folder.is_dir():
        check_model_folder(folder)
    elif folder.exists():
        raise CheckpointError(f"MODEL must be a folder or a hub id, got the file {folder}")
    config = read_config(source)
    check_causal(config)
    try:
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
    whose = f"the checkpoint {os.fspath(source)}"
    for what, keys in (("lacks", "missing_keys"), ("holds with another shape", "mismatched_keys")):
        if loading[keys]:
            strange = loading["unexpected_keys"]
            besides = f", but {_some(strange)}, which the model has no place for" if strange else ""
            raise CheckpointError(f"{whose} {what} {_some(loading[keys])}{besides}")
    if loading["unexpected_keys"]:
        warnings.warn(
            f"{whose} holds what the model has no place for: {_some(loading['unexpected_keys'])}", stacklevel=2
        )
    return model.eval(), load_tokenizer(source)


def _some(keys: Collection[Any]) -> str:
    """The first of a loading's keys; of another shape they come with both shapes."""
    names = sorted(key[0] if isinstance(key, tuple) else key for key in keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    index = folder / INDEX_FILE
    if index.exists() and not isinstance(read_json(index).get("metadata"), dict):
        raise CheckpointError(f'{index} must hold "metadata", as transformers asks for, got none: add "metadata": {{}}')


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
) -> Surplus:
    """Write a model as a checkpoint: as the folder it came from, edited, or as transformers writes one.

    With a `source` whose tensors are the model's, every file and every tensor of it is in the result as it was, but for
    what was pruned, trained or removed: tensors keep their dtypes, config.json its text, and what the model has no
    place for is carried over. Packed, and without such a source, config and tensors are as transformers writes them.

    Args:
        model: a transformers model, pruned or not, packed or not; it is left as it is.
        folder: a new or empty folder; it appears whole or not at all.
        packed: False: dense with zeros, which any program reads. True: n:m blocks packed (the others dense), which
            transformers reads once moesparse is imported.
        tokenizer: saved beside the weights where the source has none.
        source: the folder the model came from.
        recipe: how the model was pruned; written to config.json under "moesparse".
        card: text of README.md.
        report: of the run that pruned it; written to moesparse_report.json, where `moesparse report` finds it.
        max_shard_size: of one safetensors file, as in transformers.

    Returns:
        Tensors of the source that the model has no place for, by what became of them: "carried" over, "dropped", or
        "left" out of what transformers writes.

    Raises:
        CheckpointError: the folder holds files or cannot be written, or a file of the source is a link out of it.
        UnsupportedModelError: the checkpoints of this family cannot hold packed experts.
        MoESparseError: packed, and no block holds an n:m pattern.
    """
    from moesparse.packed.quantizer import packed_metadata

    if report is not None and source is not None:
        report = following(read_report(source), report)
    if recipe is not None:
        note_recipe(model, recipe, report)
    found: Surplus = {}
    with atomic_folder(folder) as work:
        state, blocks = state_in_form(model, packed)
        edited = None if packed else _source_of(model, source)  # type: ignore[arg-type]
        tensors = {} if edited is None else _tensors_of(model, state, edited.shards)  # type: ignore[arg-type]
        if edited is None or edited.missing(tensors, edited.kept()):
            with packed_metadata(model, blocks):  # type: ignore[arg-type]
                model.save_pretrained(work, state_dict=state, max_shard_size=max_shard_size)  # type: ignore[operator]
            found = surplus([], [], _without_place(source))
        else:
            known = {*tensors, *(getattr(model, "all_tied_weights_keys", None) or {})}
            found = _write_edited(work, edited, tensors, known, parse_size(max_shard_size))
        write_companions(work, tokenizer=tokenizer, source=source, card=card, report=report, surplus=found)
        write_manifest(work, list(work.glob("*.safetensors")))
    return found


def _source_of(model: PreTrainedModel, source: str | os.PathLike[str] | None) -> SourceFolder | None:
    """The folder a model came from; None where it is none, or one of the two is packed."""
    folder = None if source is None else Path(source)
    if folder is None or not (folder / "config.json").is_file() or any(packed_blocks(model)):
        return None
    if read_json(folder / "config.json").get("quantization_config") is not None:
        return None
    return SourceFolder(folder, model, read_config(folder))


def _tensors_of(model: PreTrainedModel, state: Mapping[str, Tensor], shards: Shards) -> dict[str, Tensor]:
    """Key in a checkpoint -> tensor of a model; a tied weight comes once, or twice where the shards hold it twice."""

    def is_twin(name: str, other: str) -> bool:
        both = name in shards.tensors and other in shards.tensors
        return both and torch.equal(shards.read(name), shards.read(other))

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    left = {name: each for name, each in state.items() if name not in tied or is_twin(name, tied[name])}
    return checkpoint_tensors(model, left)


def _write_edited(
    folder: Path, source: SourceFolder, tensors: Mapping[str, Tensor], known: Collection[str], max_shard_bytes: int
) -> Surplus:
    """Write weights and config; the keys that the model knows may be more than its tensors."""
    kept = source.kept()
    changed = source.changed(tensors, kept)
    copies, dropped = source.others(changed, kept)
    write_shards(folder, changed, max_shard_bytes, (copies, source.shards)).write_index()
    (folder / "config.json").write_text(source.config(dropped=bool(dropped)), encoding="utf-8")
    return surplus([name for key, name in copies.items() if key not in known], dropped, [])


def _without_place(source: str | os.PathLike[str] | None) -> list[str]:
    """Tensors of a folder that its model takes nothing from; none where there is no folder that we can open."""
    try:
        skeleton = None if source is None or not Path(source).is_dir() else open_skeleton(source)
    except (CheckpointError, UnsupportedModelError):
        return []
    if skeleton is None:
        return []
    taken = {key for target in skeleton.plan.targets.values() for key in target.keys}
    return [name for name in skeleton.shards.tensors if name not in taken]


def note_recipe(model: nn.Module, recipe: dict[str, Any], report: dict[str, Any] | None) -> None:
    """Say in the model's config how it was pruned: by this recipe, and by those that it names already."""
    # removing experts noted there which ones are left
    noted = getattr(model.config, CONFIG_KEY, None) or {}
    setattr(model.config, CONFIG_KEY, noted_with(noted, recipe, report, __version__))


def write_companions(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str | os.PathLike[str] | None,
    card: str | None,
    report: dict[str, Any] | None,
    surplus: Surplus,
) -> None:
    """Write what stands beside weights and config in a checkpoint; the arguments are those of `save_pretrained`.

    Report and card name the tensors that the model has no place for. Where the report is of several steps, the card of
    the source stands behind the last one's.
    """
    origin = Path(source) if source is not None and Path(source).is_dir() else None
    if tokenizer is not None and not (origin and any((origin / name).is_file() for name in _TOKENIZER_FILES)):
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library gives a full disk no type of its own
            raise error if isinstance(error, OSError) else OSError(f"the tokenizer: {error}") from error
    if origin is not None:
        copy_companions(origin, folder, leave=("config.json", REPORT_FILE, MANIFEST_FILE))
    found = joined_surplus((report or {}).get("surplus"), surplus)
    if card is not None:
        if report is not None and report.get(EARLIER) and origin is not None and (origin / "README.md").is_file():
            card = card_after(card, (origin / "README.md").read_text(errors="replace"))
        # the card of the step before may have said it
        said = "".join(f"\n{sentence}\n" for sentence in say_surplus(found) if sentence not in card)
        (folder / "README.md").write_text(card + said)
    if report is not None:
        (folder / REPORT_FILE).write_text(json.dumps(report | ({"surplus": found} if found else {})))
