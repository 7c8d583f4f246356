"""Read and write checkpoints: ordinary transformers folders, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesparse._version import __version__
from moesparse.checkpoints.against import check_written
from moesparse.checkpoints.config_text import CONFIG_KEY
from moesparse.checkpoints.edit import Surplus, surplus
from moesparse.checkpoints.history import (
    EARLIER,
    REPORT_FILE,
    card_after,
    card_naming,
    following,
    joined_surplus,
    noted_with,
    read_report,
)
from moesparse.checkpoints.hub import local_folder, unread_weights
from moesparse.checkpoints.origin import (
    EditedModel,
    edited_model,
    is_packed,
    other_dtype,
    stores_other_dtypes,
)
from moesparse.checkpoints.repack import pack_folder, unpack_folder
from moesparse.checkpoints.skeleton import open_skeleton
from moesparse.errors import CheckpointError, NotInPiecesError, UnsupportedModelError, reason_of
from moesparse.experts.plan_file import PLAN_FILE, ExpertPlan
from moesparse.experts.surgery import KEPT_KEY
from moesparse.models.formats.stored import StoredWeights
from moesparse.models.meta import check_layer_counts, folder_of, quantization_of, read_config
from moesparse.models.modes import let_experts_run
from moesparse.models.on_disk import LayersOnDisk
from moesparse.models.opener import opener
from moesparse.models.tokenizer import find_tokenizer, tokenizer_files
from moesparse.packed.model import state_in_form
from moesparse.system.folders import (
    JOURNAL_FILE,
    atomic_folder,
    check_output_folder,
    companions,
    copy_companions,
    kept_aside,
    scratch_folder,
)
from moesparse.system.manifest import MANIFEST_FILE, write_manifest
from moesparse.system.shards import INDEX_FILE, Shards, read_json
from moesparse.system.sizes import parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# what transformers reads of it is not all that a weight is
_READ_HERE = "compressed-tensors"
_GENERATION = "generation_config.json"
_EDITED = "as its source folder, edited"
_WRITTEN_ANEW = "as transformers writes a model"


def load_pretrained(
    source: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a language model and its tokenizer onto the CPU, or say in one sentence why not.

    A model for images and text comes as the wrapper that its config.json names, with all its towers.

    Args:
        source: a local folder, or a model id on the hub. Only safetensors weights are read and no code is run. Weights
            that are stored as compressed-tensors does are plain in the model.
        dtype: of the weights; "auto" takes the checkpoint's own.

    Returns:
        The model in eval mode, and the tokenizer: None when the folder has none, and with a warning when it has one
        that cannot be loaded. A warning names tensors that the model has no place for.

    Raises:
        CheckpointError: the folder or id is unknown, a shard or tensor is missing, or a shape differs.
    """
    folder = local_folder(source)
    model = load_model(folder, dtype=dtype)
    try:
        return model, find_tokenizer(folder)
    except CheckpointError as error:
        warnings.warn(f"no tokenizer: {error}", stacklevel=2)
        return model, None


def load_model(source: Path, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of a local folder; see `load_pretrained`."""
    import moesparse.packed.quantizer  # noqa: F401, packed checkpoints too

    config = check_model_folder(source)
    if quantization_of(config) == _READ_HERE:
        with contextlib.suppress(NotInPiecesError):
            return _dequantised(source, dtype)
    kind = opener(config)
    try:
        loaded: Any = kind.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        # transformers raises OSError, ValueError, RuntimeError or safetensors' own errors, often over many lines
        method = quantization_of(config)
        wanted = f"{source} must be a checkpoint that transformers can load here, "
        if method is None:
            raise CheckpointError(f"{wanted}and it says: {reason_of(error)}") from error
        raise CheckpointError(
            f"{wanted}got one quantised by {method!r}, to which it says: {reason_of(error)}; give it what it "
            "asks for, or take the model in bf16"
        ) from error
    model, loading = loaded
    whose = f"the checkpoint {source}"
    for what, keys in (("lacks", "missing_keys"), ("holds with another shape", "mismatched_keys")):
        if loading[keys]:
            strange = loading["unexpected_keys"]
            besides = f", but {_some(strange)}, which the model has no place for" if strange else ""
            raise CheckpointError(f"{whose} {what} {_some(loading[keys])}{besides}")
    if quantization_of(config) is None:
        weights = StoredWeights.of_folder(source, model.dtype)
        weights.check_plain(name for name in weights.tensors if name not in loading["unexpected_keys"])
    _warn_of_surplus(whose, loading["unexpected_keys"])
    let_experts_run(model)
    return model.eval()


def _dequantised(source: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of a quantised folder with plain weights, layer by layer; its config says nothing of how they were.

    transformers would leave out of experts what it has no place for: zero points, and the global scale of NVFP4.
    """
    from transformers import GenerationConfig

    wanted = None if dtype == "auto" else str(dtype).removeprefix("torch.")
    layers = LayersOnDisk(source, output_dtype=wanted)
    model = layers.whole_model()
    _warn_of_surplus(f"the checkpoint {source}", layers.surplus)
    if (source / _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    let_experts_run(model)
    return model.eval()


def _warn_of_surplus(whose: str, names: Collection[Any]) -> None:
    if names:
        warnings.warn(f"{whose} holds what the model has no place for: {_some(names)}", stacklevel=3)


def _some(keys: Collection[Any]) -> str:
    """The first of a loading's keys; of another shape they come with both shapes."""
    names = sorted(key[0] if isinstance(key, tuple) else key for key in keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_model_folder(folder: Path) -> PreTrainedConfig:
    """Look at a local checkpoint before anything of it is loaded: config.json, the index and the headers.

    Raises:
        CheckpointError: a file is missing, damaged or hostile.
        UnsupportedModelError: not a causal language model of transformers.
    """
    if (folder / JOURNAL_FILE).exists():
        raise CheckpointError(
            f"MODEL must be a finished checkpoint, got {folder}, which an unfinished run left: give that run's command "
            "again with resume=True"
        )
    config = read_config(folder)
    opener(config)
    check_layer_counts(read_json(folder / "config.json"), folder, len(Shards.open(folder).tensors))
    index = folder / INDEX_FILE
    if index.exists() and not isinstance(read_json(index).get("metadata"), dict):
        raise CheckpointError(f'{index} must hold "metadata", as transformers asks for, got none: add "metadata": {{}}')
    return config


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
    plan: ExpertPlan | None = None,
    max_shard_size: str = "5GB",
) -> Surplus:
    """Write a model as a checkpoint: as the folder it came from, edited, or as transformers writes one.

    The folder is `source`, or the local one that the model was loaded from, where that still holds its tensors, and in
    the dtype that the model is in. Every file and every tensor of it is in the result as it was, but for what was
    pruned, trained, packed or removed: tensors keep their dtypes, config.json its text, and what the model has no place
    for is carried over. A model that came from nowhere, or from a folder that holds other tensors, is as transformers
    writes it; of the second a warning says why. The report says which it was, under "written".

    Args:
        model: a transformers model, pruned or not, packed or not; it is left as it is.
        folder: a new or empty folder; it appears whole or not at all.
        packed: False: dense with zeros, which any program reads. True: n:m blocks packed (the others dense), which
            transformers reads once moesparse is imported.
        tokenizer: saved beside the weights where the source has none.
        source: the folder the model came from; None is where it was loaded from.
        recipe: how the model was pruned; written to config.json under "moesparse". Those of the source, which was
            pruned before, stay there. Its "mtp" says what becomes of layers of the source that predict further tokens.
        card: text of README.md; that of a source that was pruned before stands behind it.
        report: of the run that pruned it; written to moesparse_report.json, where `moesparse report` finds it, with
            those of the source.
        plan: by which experts were removed, `Report.plan`; written to moesparse_plan.json.
        max_shard_size: of one safetensors file, as in transformers.

    Returns:
        Tensors of the source that the model has no place for, by what became of them: "carried" over, or "left" out of
        what transformers writes, and of layers that predict further tokens "mtp" (carried over) or "dropped"; and
        under "formats" weight files of it that were not copied.

    Raises:
        CheckpointError: the folder holds files or cannot be written, or a file of the source is a link out of it.
        UnsupportedModelError: the checkpoints of this family cannot hold packed experts, or transformers cannot save
            the model.
        MoESparseError: packed, and no block holds an n:m pattern.
        ResultError: what was written is not the source with the changes that were meant; it is kept beside `folder`.
    """
    origin = folder_of(model) if source is None else Path(source)
    if source is not None and Path(source).is_dir():
        companions(Path(source))
    # the values would be rounded to the folder's dtype, and nobody asked for it
    other = other_dtype(origin, model.dtype) if source is None and origin is not None else None  # type: ignore[arg-type]
    what = _Beside(tokenizer, recipe, card, report, plan, parse_size(max_shard_size))
    out = Path(folder)
    if origin is not None and not other and (packed or is_packed(origin)) and stores_other_dtypes(origin, model.dtype):  # type: ignore[arg-type]
        return _save_in_stored_dtypes(model, out, packed, origin, what)
    return _save(model, out, packed, origin, what, other=other, named=source is not None, kept_as=out)


@dataclass(frozen=True)
class _Beside:
    """What is written with a model; see `save_pretrained`."""

    tokenizer: PreTrainedTokenizerBase | None
    recipe: dict[str, Any] | None
    card: str | None
    report: dict[str, Any] | None
    plan: ExpertPlan | None
    max_shard_bytes: int


def _save(
    model: nn.Module,
    folder: Path,
    packed: bool,
    origin: Path | None,
    what: _Beside,
    *,
    other: str | None = None,
    named: bool = True,
    kept_as: Path,
) -> Surplus:
    """`save_pretrained` into one folder.

    Args:
        origin: the folder the model came from, or None.
        other: why that is not edited; None where nothing is known that speaks against it.
        named: by the caller, who wants its files also when it is not edited.
        kept_as: the folder beside which a result that fails its check is kept.
    """
    from moesparse.packed.quantizer import packed_metadata

    report = what.report
    with atomic_folder(folder) as work:
        state, blocks = state_in_form(model, packed)
        with packed_metadata(model, blocks):  # type: ignore[arg-type]
            mtp = (what.recipe or {}).get("mtp")
            edited = None if origin is None else other or edited_model(model, state, blocks, origin, mtp)  # type: ignore[arg-type]
        if isinstance(edited, str):
            warnings.warn(f"{origin} is not edited, for {edited}: the model is written {_WRITTEN_ANEW}", stacklevel=3)
            origin = origin if named else None
        if report is not None and origin is not None:
            report = following(read_report(origin), report)
        if what.recipe is not None:
            note_recipe(model, what.recipe, report)
        with packed_metadata(model, blocks):  # type: ignore[arg-type]
            if isinstance(edited, EditedModel):
                found = edited.write(work, what.max_shard_bytes)
            else:
                _save_anew(model, work, state, what.max_shard_bytes)
                found = surplus(left=_without_place(origin))
        if origin is not None and (formats := unread_weights(origin)):
            found["formats"] = formats
        files: dict[str, Any] = {"card": what.card, "report": report, "surplus": found, "plan": what.plan}
        files["written"] = _EDITED if isinstance(edited, EditedModel) else _WRITTEN_ANEW
        write_companions(work, tokenizer=what.tokenizer, source=origin, **files)
        if what.plan is None and _lost_experts(model, origin):
            # the source's own tells of an earlier removal only
            (work / PLAN_FILE).unlink(missing_ok=True)
        write_manifest(work, list(work.glob("*.safetensors")))
        if isinstance(edited, EditedModel):
            with kept_aside(work, kept_as):
                check_written(work, edited.source)
    return found


def _save_anew(model: Any, folder: Path, state: dict[str, Any], max_shard_bytes: int) -> None:
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_bytes)
    except (NotImplementedError, ValueError) as error:
        # it keeps the steps by which quantised weights were loaded, and cannot go all of them back
        raise UnsupportedModelError(
            f"{type(model).__name__} must be a model that transformers can save, and it says: {reason_of(error)}. One "
            "that was loaded from quantised weights is pruned from its folder (moesparse.prune_checkpoint)"
        ) from error


def _lost_experts(model: nn.Module, source: Path | None) -> bool:
    """Whether experts of a model were removed since it was read from its folder, as the notes in both configs say."""
    file = None if source is None else source / "config.json"
    then = read_json(file).get(CONFIG_KEY) if file is not None and file.is_file() else None
    now = getattr(getattr(model, "config", None), CONFIG_KEY, None)
    return (now or {}).get(KEPT_KEY) != (then or {}).get(KEPT_KEY)


def _save_in_stored_dtypes(model: nn.Module, folder: Path, packed: bool, source: Path, what: _Beside) -> Surplus:
    """Save a model by way of dense folders: values packed in the model's dtype are not those that the source stores."""
    check_output_folder(folder)
    with scratch_folder(folder) as scratch:
        if is_packed(source):
            unpack_folder(source, scratch / "source")
            source = scratch / "source"
        out = scratch / "dense" if packed else folder
        found = _save(model, out, False, source, what, kept_as=folder)
        if packed:
            pack_folder(out, folder, max_shard_bytes=what.max_shard_bytes)
    return found


def _without_place(source: Path | None) -> list[str]:
    """Tensors of a folder that its model takes nothing from; none where there is no folder that we can open."""
    try:
        skeleton = None if source is None or not source.is_dir() else open_skeleton(source)
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
    written: str = _EDITED,
    plan: ExpertPlan | None = None,
) -> None:
    """Write what stands beside weights and config in a checkpoint; the arguments are those of `save_pretrained`.

    Report and card name the tensors that the model has no place for. Where the report is of several steps, the card of
    the source stands behind the last one's.

    Args:
        written: said by the report: whether the folder is the source's, edited, or one that transformers wrote.
    """
    origin = Path(source) if source is not None and Path(source).is_dir() else None
    if tokenizer is not None and not (origin and tokenizer_files(origin)):
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
        (folder / "README.md").write_text(card_naming(card, found))
    if report is not None:
        described = report | {"written": written} | ({"surplus": found} if found else {})
        (folder / REPORT_FILE).write_text(json.dumps(described))
    if plan is not None:
        plan.save(folder / PLAN_FILE)
