"""Rows of a batch against the same texts alone: logits of each step, as rows come and go.

A family of every kind of cache; MOESPARSE_EVERY_WAY=1 takes all families.
"""

import os

import pytest
import torch

from moesparse.serving.batch import Batch
from moesparse.testing import MOE_FAMILIES, WRAPPERS, has_family, tiny_model

# their caches hold compressed keys, an index, or a class of their own: these continue one text at a time
ALONE = {"deepseek_v4", "hy_v4", "minimax"}
# no head for text
NO_TEXT = {"openai_privacy_filter"}
KINDS = {
    *ALONE,
    "deepseek_v3",  # latent attention
    "gemma4_text",  # sliding and full in turn
    "glm4v_moe",  # a wrapper for images
    "gpt_oss",  # sliding, with sinks
    "granitemoehybrid",  # Mamba-2 states and full
    "jamba",  # Mamba states and full
    "kimi_linear",  # three convolutions a layer
    "lfm2_moe",  # convolutions alone
    "minimax_m3_vl_text",
    "mixtral",
    "nemotron_h",  # layers without a cache
    "qwen3_next",  # gated delta rule
    "qwen3_vl_moe",
    "zaya",  # both kinds in one layer
}
FAMILIES = {*MOE_FAMILIES, *WRAPPERS} - NO_TEXT if os.environ.get("MOESPARSE_EVERY_WAY") == "1" else KINDS
# no window: transformers would cut this family's keys by it and not its attention
CHANGED = {"qwen3_vl_moe": {"sliding_window": None}}


def texts():
    """A short one; one past the sliding window of 16; one token; one of the first's length."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 50, (length,), generator=generator).tolist() for length in (4, 19, 1, 4)]


class Follower:
    """A batch, the texts of its rows, and what each row's text gives when it is read at once without a cache."""

    def __init__(self, model):
        self.model, self.batch, self.rows, self.worst = model, Batch(model), [], 0.0
        self.numbers = torch.Generator().manual_seed(5)

    @torch.no_grad()
    def compare(self, logits, rows):
        for found, text in zip(logits, rows, strict=True):
            wanted = self.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(found, wanted, rtol=0, atol=float(1e-4 * wanted.abs().max()))

    def add(self, text, copies=1):
        self.rows += [list(text) for _ in range(copies)]
        self.compare(self.batch.add(text, copies), [text])

    def step(self):
        tokens = torch.randint(3, 50, (len(self.rows),), generator=self.numbers).tolist()
        for text, token in zip(self.rows, tokens, strict=True):
            text.append(token)
        self.compare(self.batch.step(tokens), self.rows)
        assert self.batch.lengths == [len(text) for text in self.rows]

    def keep(self, *rows):
        self.rows = [self.rows[row] for row in rows]
        self.batch.keep(rows)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_that_come_and_go_get_what_each_text_gets_alone(family):
    if family in MOE_FAMILIES and not has_family(family):
        pytest.skip("not in this transformers")
    model = tiny_model(family, **CHANGED.get(family, {}))
    if model.get_output_embeddings() is None:
        pytest.skip("transformers has no language model of it, only the text part of a wrapper")
    short, longer, one, same = texts()
    follow = Follower(model)
    assert follow.batch.joinable() == (family not in ALONE)
    follow.add(short)
    follow.step()
    if family in ALONE:
        return
    follow.add(longer)  # the row before is padded on the left
    follow.step()
    follow.add(one, copies=2)  # the new rows are
    follow.step()
    follow.keep(3, 0)  # the longest goes: what is padding in all rows is cut
    follow.step()
    follow.add(same)
    follow.step()
    follow.keep()
    follow.add(longer)
    follow.step()
