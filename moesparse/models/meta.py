"""A model without its weights: built from its config on the meta device, and what can be asked of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesparse.demo import model_path
from moesparse.errors import CheckpointError, UnsupportedModelError, UsageError, reason_of
from moesparse.models.formats.said import formats_of, said_of
from moesparse.models.opener import opener
from moesparse.system.shards import INDEX_FILE, SINGLE_FILE, Shards, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "LAYER_COUNT",
    "bare_model",
    "check_layer_counts",
    "context_length",
    "dtype_of",
    "folder_of",
    "kept_experts",
    "meta_model",
    "quantization_of",
    "read_config",
    "source_of",
    "vocabulary_size",
]

_FEW_LAYERS = 1000

# a model by this name is the small one inside the package
_EMBEDDED = "demo"

SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Types that transformers lacks -> what it has for the same model; it reads the text model of Kimi-K2.5 so itself."""

LAYER_COUNT = re.compile(r"layers?$|blocks?$|depth$")


def meta_model(folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model as from_pretrained makes it, with its parameters and saved buffers on the meta device.

    Args:
        folder: holds a config.json.
        dtype: of the weights; "auto" takes that of the config, then that of the shards where there are any.

    Raises:
        CheckpointError: no config that transformers knows. UnsupportedModelError: quantised in a way that is not known.
            UsageError: a dtype that is none.
    """
    config = read_config(folder)
    formats_of(said_of(Path(folder)))
    if quantization_of(config) is not None:
        # the weights are dequantised when they are read
        del config.quantization_config
    if dtype == "auto":
        dtype = dtype_of(folder, config)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"dtype must be a torch.dtype or 'auto', got {dtype!r}")
    model = _on_meta(config, dtype=dtype)
    # the few tensors that transformers keeps in float32 whatever the checkpoint's dtype
    for pattern, wanted in model._get_dtype_plan(dtype).items():
        matches = re.compile(pattern.replace("*", r".*"))
        for name, tensor in model.state_dict(keep_vars=True).items():
            if matches.search(name):
                tensor.data = tensor.data.to(wanted)
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    # computes the buffers that no checkpoint holds, such as rotary tables
    model.initialize_weights()
    return model.eval()


def bare_model(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """The model that a config.json describes, quantized or not, all of it on the meta device: for names and shapes.

    Raises:
        CheckpointError: no config that transformers can build a model of.
    """
    return _on_meta(read_config(folder))


def read_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a folder or a hub id. No code that lies there is run, and nobody is asked to.

    Raises:
        CheckpointError: there is none, or it is not one that transformers can read.
        UnsupportedModelError: of a kind of model that this transformers does not have.
    """
    import transformers

    file = Path(source) / "config.json"
    if file.parent.is_dir():
        _check_config(file)
    try:
        if file.is_file() and (held := read_json(file))["model_type"] in SAME_AS:
            kind = SAME_AS[held["model_type"]]
            return transformers.CONFIG_MAPPING[kind].from_dict({**held, "model_type": kind})
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, and whatever a config class says to a value
        raise CheckpointError(
            f"MODEL must be a local folder or a hub id with a language model, got {os.fspath(source)!r}: "
            f"{reason_of(error)}"
        ) from error


def _check_config(file: Path) -> None:
    """Look at a config.json before transformers does.

    Raises:
        CheckpointError: it is missing or no JSON, names no type, or a dtype that torch lacks.
        UnsupportedModelError: it names a type that transformers lacks.
    """
    import transformers

    if not file.exists():
        raise CheckpointError(f"MODEL must be a folder with a config.json, got {file.parent} without one")
    config = read_json(file)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{file} must name its model_type, got {kind!r}: take the config.json of the original model"
        )
    if kind not in transformers.CONFIG_MAPPING and kind not in SAME_AS:
        raise UnsupportedModelError(
            f"{file} must name a model_type that transformers {transformers.__version__} has, got {kind!r}: take a "
            "transformers that has it, or a checkpoint converted to a type it has; code that lies beside a "
            "checkpoint is never run"
        )
    parts = [config, *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            if isinstance(name, str) and not isinstance(getattr(torch, name, None), torch.dtype):
                raise CheckpointError(
                    f"{file} must name a dtype of torch, which transformers asks for, got {key} = {name!r}: name that "
                    f"of the weights, such as bfloat16, or remove {key}"
                )


def source_of(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Folder or hub id of a model as a caller names it: "demo" is the embedded one, unless a folder is called that."""
    return model_path() if name == _EMBEDDED and not Path(name).exists() else name


def folder_of(model: Any) -> Path | None:
    """The local folder that a model was loaded from, where it still is a checkpoint."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    folder = Path(name) if isinstance(name, str) and name else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def quantization_of(config: PreTrainedConfig | None) -> str | None:
    """By what a model is quantised or packed, as its config says it; None where it is neither."""
    method = getattr(config, "quantization_config", None)
    if method is None:
        return None
    return str(method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method))


def _on_meta(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    kind = opener(config)
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # whatever a model says to a config
        raise CheckpointError(
            f"config.json must describe a model that transformers can build, got one of type {config.model_type!r}, to "
            f"which it says: {reason_of(error)}"
        ) from error


def dtype_of(folder: str | os.PathLike[str], config: PreTrainedConfig) -> torch.dtype:
    """In which transformers loads a folder that is asked for in "auto"."""
    found = config.dtype or _stored_dtype(Path(folder))
    assert isinstance(found, torch.dtype)
    return found


def _stored_dtype(folder: Path) -> torch.dtype:
    """What transformers takes for "auto" where the config names none; float32 where there are no shards to read.

    That of the index, where it has one, or of the first tensor of floating point in the first file, by its name.
    """
    from transformers.modeling_utils import get_state_dict_dtype, load_state_dict

    try:
        shards = Shards.open(folder)
    except CheckpointError:
        return torch.float32
    if len(shards.files) > 1 or shards.files[0].name != SINGLE_FILE:
        noted = read_json(folder / INDEX_FILE).get("metadata")
        named = getattr(torch, str(noted.get("dtype")), None) if isinstance(noted, dict) else None
        if isinstance(named, torch.dtype):
            return named
    found = get_state_dict_dtype(load_state_dict(shards.files[0], map_location="meta"))
    # codes of 8 bits are no dtype to calculate in
    return found if found.itemsize > 1 else torch.bfloat16


def check_layer_counts(config: dict[str, Any], folder: Path, tensors: int) -> None:
    """Refuse a config.json that asks for more layers than the checkpoint has tensors: building them would not end.

    Raises:
        CheckpointError: names the key.
    """
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        for key, value in part.items() if isinstance(part, dict) else ():
            if LAYER_COUNT.search(key) and isinstance(value, int) and value > max(tensors, _FEW_LAYERS):
                raise CheckpointError(
                    f"{folder / 'config.json'} must not ask for more layers than there are tensors, got {key} = "
                    f"{value} and {tensors} tensors"
                )


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the input embedding; None where the model has none."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    return getattr(embedding, "num_embeddings", None)


def kept_experts(model: nn.Module) -> dict[str, list[int]]:
    """Block name -> what the experts of a model that lost some were called before, position = id now; {} of others."""
    noted = getattr(getattr(model, "config", None), "moesparse", None) or {}
    return noted.get("kept_experts") or {}


def context_length(model: nn.Module) -> int:
    """Tokens a model can take at once, from its config; 2**30 where the config sets no bound."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else 1 << 30
