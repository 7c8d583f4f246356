"""Mixtral checkpoints with random weights, of any size, written one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import MixtralConfig

__all__ = ["VOCABULARY", "make_checkpoint", "make_config", "random_windows"]

VOCABULARY = 1000


def make_config(
    folder: Path,
    layers: int,
    hidden: int,
    intermediate: int,
    *,
    experts: int = 8,
    top_k: int = 2,
    heads: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> MixtralConfig:
    """Write the config.json of a Mixtral.

    Args:
        folder: new.
        layers: of the decoder.
        hidden: size, a multiple of `heads`.
        intermediate: size of an expert.
        experts: of a layer.
        top_k: of them work on a token.
        heads: of the attention, a quarter of them for keys and values.
        dtype: of the weights.
    """
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        dtype=dtype,
        architectures=["MixtralForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    return config


def make_checkpoint(
    folder: Path,
    layers: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    **sizes: int,
) -> None:
    """Write a Mixtral; the arguments are those of `make_config`, and the same ones give the same weights."""
    from transformers import AutoModelForCausalLM

    from moesparse.models.keys import checkpoint_views
    from moesparse.system.shard_writer import ShardWriter
    from moesparse.system.shards import TensorSpec

    config = make_config(folder, layers, hidden, intermediate, dtype=dtype, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    views = checkpoint_views(model, model.state_dict())
    random = torch.Generator().manual_seed(0)
    specs = [TensorSpec.of(key, view.dtype, view.shape) for key, view in views.items()]
    with ShardWriter(folder, specs, 500 * 10**6) as writer:
        for key, view in views.items():
            tensor = torch.ones(view.shape) if view.ndim == 1 else 0.02 * torch.randn(view.shape, generator=random)
            writer.write(key, tensor.to(dtype))
    writer.write_index()


def random_windows(count: int, length: int) -> torch.Tensor:
    """Token ids [count, length], the same every time."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
