"""Draws against transformers' warpers, penalties against OpenAI's published formula, log-probabilities against math."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moesparse.serving.sampling import Sampler, Sampling, log_probabilities

V = 37


def logits(seed):
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 2


def distribution(monkeypatch, scores, **sampling):
    """token -> probability that `choose` draws from, as it hands them to torch.multinomial."""
    found = {}
    with monkeypatch.context() as patch:
        for place in range(len(scores)):
            caught = []

            def first(weights, count, generator, place=place, caught=caught):
                caught.append(weights)
                return torch.tensor([min(place, len(weights) - 1)])

            patch.setattr(torch, "multinomial", first)
            token = Sampler(Sampling(**sampling)).choose(scores)
            weights = caught[0] / caught[0].sum()
            if place < len(weights):
                found[token] = float(weights[place])
    return found


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (5, 0.7), (1, 1.0), (0, 1e-6), (99, 0.999)])
def test_tokens_are_drawn_from_what_the_warpers_of_transformers_leave(monkeypatch, temperature, top_k, top_p):
    scores = logits(1)
    warped = TemperatureLogitsWarper(temperature)(None, scores[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    wanted = warped[0].double().softmax(-1)
    found = distribution(monkeypatch, scores, temperature=temperature, top_k=top_k, top_p=top_p)
    assert sorted(found) == torch.nonzero(wanted).flatten().tolist()
    for token, probability in found.items():
        assert probability == pytest.approx(float(wanted[token]), rel=1e-5)


def test_draws_have_the_frequencies_of_the_softmax():
    scores = torch.tensor([0.0, 1.0, 2.0])
    sampler, draws = Sampler(Sampling(seed=4)), 4000
    counts = torch.zeros(3)
    for _ in range(draws):
        counts[sampler.choose(scores)] += 1
    wanted = scores.double().softmax(-1)
    # five standard deviations of a binomial count
    assert ((counts - draws * wanted).abs() < 5 * (draws * wanted * (1 - wanted)).sqrt()).all()


def test_temperature_zero_takes_the_first_of_the_largest_and_tiny_ones_do_as_well():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert Sampler(Sampling(temperature=0)).choose(scores) == 1
    assert {Sampler(Sampling(temperature=1e-9, seed=seed)).choose(scores) for seed in range(20)} == {1, 3}
    assert {Sampler(Sampling(temperature=1e-300, top_k=1, seed=seed)).choose(scores) for seed in range(5)} == {1}
    assert {Sampler(Sampling(top_p=0.0, seed=seed)).choose(scores) for seed in range(5)} == {1}


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.lists(st.integers(0, V - 1), max_size=12),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=4),
)
def test_penalties_and_bias_are_those_of_the_published_formula(tokens, presence, frequency, bias):
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, and the bias added."""
    sampling = Sampling(temperature=0, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
    sampler, scores = Sampler(sampling), logits(2)
    for token in tokens:
        sampler.count(token)
    wanted = []
    for token, score in enumerate(scores.tolist()):
        count = tokens.count(token)
        wanted.append(score - count * frequency - (count > 0) * presence + bias.get(token, 0.0))
    chosen = sampler.choose(scores)
    # float32 sums of numbers up to 100
    assert wanted[chosen] >= max(wanted) - 1e-4


def test_equal_seeds_draw_alike_and_texts_of_a_request_differ():
    scores = logits(3)

    def draws(seed, index=0):
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), index)
        return [sampler.choose(scores) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(7) != draws(7, index=1)
    assert draws(None) != draws(None)
    assert draws(-(1 << 63)) and draws((1 << 63) - 1, index=5)


def test_log_probabilities_are_the_models_own():
    scores = logits(5)
    total = math.log(sum(math.exp(score) for score in scores.tolist()))
    own, top = log_probabilities(scores, 9, 3)
    assert own == pytest.approx(float(scores[9]) - total, abs=1e-5)
    order = sorted(range(V), key=lambda token: -float(scores[token]))[:3]
    assert [token for token, _ in top] == order
    for token, value in top:
        assert value == pytest.approx(float(scores[token]) - total, abs=1e-5)
    assert log_probabilities(scores, 9, 0)[1] == []
