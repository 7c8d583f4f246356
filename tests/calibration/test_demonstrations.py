"""A model that writes its own calibration text."""

from __future__ import annotations

import pytest
import torch

from moesparse.calibration.demonstrations import continue_prompts
from moesparse.calibration.whole import calibrate
from moesparse.errors import UsageError
from moesparse.testing import tiny_model

PROMPTS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    model = tiny_model("mixtral")
    model.generation_config.eos_token_id = None
    return model


def test_the_likeliest_tokens_follow_the_prompt(model):
    ids, mask = continue_prompts(model, PROMPTS, 6, batch_size=2)
    assert mask is None
    assert torch.equal(ids[:, :8], PROMPTS)
    with torch.no_grad():
        best = model(ids).logits.argmax(-1)
    assert torch.equal(ids[:, 8:], best[:, 7:-1])


def test_draws_follow_the_seed_and_leave_the_generator_alone(model):
    before = torch.get_rng_state()
    first, _ = continue_prompts(model, PROMPTS, 6, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, continue_prompts(model, PROMPTS, 6, temperature=1.0, seed=1)[0])
    assert not torch.equal(first, continue_prompts(model, PROMPTS, 6, temperature=1.0, seed=2)[0])


@pytest.mark.parametrize("batch_size", [1, 3])  # alone, a text that ended comes back shorter
def test_what_lies_behind_the_end_is_padding(model, batch_size):
    whole, _ = continue_prompts(model, PROMPTS, 6)
    model.generation_config.eos_token_id = end = int(whole[0, 10])
    ids, mask = continue_prompts(model, PROMPTS, 6, batch_size=batch_size)
    assert mask is not None
    assert ids.shape == mask.shape == whole.shape
    for row, keep in zip(ids[:, 8:], mask[:, 8:], strict=True):
        ends = (row == end).nonzero().flatten().tolist()
        assert int(keep.sum()) == (ends[0] + 1 if ends else 6)
    assert calibrate(model, (ids, mask)).tokens == int(mask.sum())


def test_what_cannot_be(model):
    with pytest.raises(UsageError, match="got 0"):
        continue_prompts(model, PROMPTS, 0)
    with pytest.raises(UsageError, match="temperature must be 0"):
        continue_prompts(model, PROMPTS, 4, temperature=-0.5)
    with pytest.raises(UsageError, match="at least one token"):
        continue_prompts(model, PROMPTS[:, :0], 4)
