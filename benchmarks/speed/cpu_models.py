"""The models whose tokens a second are measured on a CPU, in the forms that are compared; made once, in build/models.

large      three layers of Qwen3-30B-A3B (128 experts of 768, top-8, attention whole) with 9,496 words, which is 3/48
           of its vocabulary, so that the output takes the share of the time that it has in the model: 3.8 GB in
           bf16, random weights, 2:4 by magnitude
embedded   the small model of the package, float32, 2:4 by magnitude
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import moesparse
from benchmarks.speed.gguf_model import random_qwen3, write_gguf

__all__ = ["FOLDER", "LARGE", "MODELS", "gguf_file", "make"]

FOLDER = Path(__file__).parents[2] / "build" / "models"
MODELS = ("large", "embedded")
LARGE = {
    "layers": 3,
    "vocabulary": 9496,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


def gguf_file(folder: Path) -> Path:
    """The large model for llama.cpp, in BF16."""
    return folder / "large.gguf"


def _build(name: str, sizes: dict[str, int]) -> tuple[Any, Any]:
    model, tokenizer = moesparse.demo.load()
    # its tokenizer serves both: a smaller vocabulary is enough to ask for tokens
    if name == "large":
        model = random_qwen3(**sizes)
    else:
        # to generate as many tokens as are asked for
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    moesparse.prune(model, None, moesparse.Recipe(weights="2:4", saliency="magnitude", update="none"))
    return model, tokenizer


def make(name: str, folder: Path = FOLDER, sizes: dict[str, int] | None = None) -> dict[str, Path]:
    """The folders of a model, "dense" and "packed", made where they are not there yet.

    Args:
        name: one of MODELS.
        folder: where they lie.
        sizes: of the large model; LARGE when left out.
    """
    forms = {form: folder / f"{name}-{form}" for form in ("dense", "packed")}
    wanted = [*forms.values(), *([gguf_file(folder)] if name == "large" else [])]
    if not all(path.exists() for path in wanted):
        for path in forms.values():
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        model, tokenizer = _build(name, sizes or LARGE)
        if name == "large":
            write_gguf(model, gguf_file(folder))
        moesparse.save_pretrained(model, forms["dense"], tokenizer=tokenizer)
        moesparse.save_pretrained(model, forms["packed"], tokenizer=tokenizer, packed=True)
    return forms
