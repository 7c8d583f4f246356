"""The README.md of a pruned checkpoint."""

from __future__ import annotations

import re

PLAIN_LOADS = "Plain transformers loads the folder"
STORED_DENSE = ": its weights are stored dense with zeros"
FAKE_QUANTISED = (
    "Its values are fake-quantised: rounded to what their format can say and stored in the dtype of the model, so the "
    "files are not smaller."
)
STORED_CODES = (
    "Its experts are stored as codes and scales, which moesparse reads everywhere, and programs that know the format "
    "(`quantization_config` of config.json) where they have it for experts."
)
STORED_PACKED = " after `import moesparse`: its experts are stored packed"

TEMPLATE = """---
library_name: transformers
tags: [moesparse, mixture-of-experts, pruned, {tag}]
{base_model}---
# {base}, {what}

The experts of `{base}` were pruned one-shot with moesparse {version}. Attention, norms, embeddings and shared experts
are unchanged{router}. {recipe} {loads}{rounded}

| | |
|---|---|
{rows}
"""


def base_of_card(card: str) -> str | None:
    """The hub's name of the model that a card of ours says it was made of; None where it is not ours or says none."""
    head = re.match(r"---\n(.*?)^---$", card, re.DOTALL | re.MULTILINE)
    if head is None or "tags: [moesparse," not in head[1]:
        return None
    named = re.search(r"^base_model: (\S+)$", head[1], re.MULTILINE)
    return None if named is None else named[1]


def is_packed_form(card: str) -> bool:
    """Whether a card says that the weights beside it are packed."""
    return STORED_PACKED in card


def card_in_form(card: str, packed: bool) -> str:
    """A card that `model_card` wrote, for a checkpoint that was packed or unpacked; other cards stay the same."""
    return card.replace(STORED_DENSE, STORED_PACKED) if packed else card.replace(STORED_PACKED, STORED_DENSE)
