"""The embedded model: a small Mixtral, trained on six domains of text that ship beside it.

Everything is read from the installed package; nothing is downloaded. benchmarks/demo_model holds the recipe, NOTICE the
origin and the licence of each text.

    >>> import moesparse
    >>> model, tokenizer = moesparse.demo.load()
    >>> windows = moesparse.demo.windows("calibration")
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moesparse.errors import UsageError

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

__all__ = ["DOMAINS", "SPLITS", "load", "model_path", "text", "text_path", "windows"]

DOMAINS = ("scripture", "novel", "play", "dictionary", "code", "manual")
SPLITS = ("calibration", "heldout")

_ROOT = Path(__file__).parent


def model_path() -> Path:
    """Folder of the checkpoint: a standard Mixtral one, as `AutoModelForCausalLM.from_pretrained` reads it."""
    return _ROOT / "model"


def text_path(split: str, domain: str) -> Path:
    """File of one domain's text.

    Args:
        split: "calibration", about 30 kB cut from the training text, or "heldout", about 100 kB of whole documents that
            were neither trained on nor share 60 characters in a row with what was.
        domain: one of DOMAINS.

    Raises:
        UsageError, a ValueError: there is no such split or domain.
    """
    if split not in SPLITS:
        raise UsageError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if domain not in DOMAINS:
        raise UsageError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    return _ROOT / "text" / split / f"{domain}.txt"


def text(split: str, domain: str) -> str:
    """Text of one domain; arguments and errors as for `text_path`."""
    return text_path(split, domain).read_text(encoding="utf-8")


def load(dtype: torch.dtype | None = None) -> tuple[MixtralForCausalLM, PreTrainedTokenizerFast]:
    """Load the model, in eval mode on the CPU, and its tokenizer.

    Args:
        dtype: of the parameters; None is fp32, which CPUs run fastest. The checkpoint holds bf16.

    Returns:
        (model, tokenizer).
    """
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(model_path(), dtype=dtype or torch.float32, local_files_only=True)
    return model.eval(), _tokenizer()


def windows(split: str, domain: str | None = None, length: int = 256) -> torch.Tensor:
    """Tokens of a split, cut into windows that do not overlap.

    Each domain is packed by itself, so that no window mixes two; what is left over at its end is dropped.

    Args:
        split: "calibration" or "heldout".
        domain: one of DOMAINS, or None for all of them, one after the other in that order.
        length: tokens in a window. The model was trained on 256.

    Returns:
        int64 (n, length).

    Raises:
        UsageError, a ValueError: no such split or domain, or `length` is not within what the text of a domain holds.
    """
    packed = [_tokens(split, name) for name in (DOMAINS if domain is None else (domain,))]
    longest = min(len(tokens) for tokens in packed)
    if not 1 <= length <= longest:
        raise UsageError(f"length must be between 1 and {longest}, got {length}")
    return torch.cat([tokens[: len(tokens) // length * length].view(-1, length) for tokens in packed])


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)  # type: ignore[return-value]


@cache
def _tokens(split: str, domain: str) -> torch.Tensor:
    """All tokens of a domain, int64 (tokens,)."""
    # verbose=False: a text longer than the model's context is meant here
    ids = _tokenizer()(text(split, domain), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
