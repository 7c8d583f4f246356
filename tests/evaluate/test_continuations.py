"""Loops against a plain search, planted ones, what is counted of continuations, and what is warned of."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesparse import demo
from moesparse.errors import UsageError
from moesparse.evaluate.compared import Comparison
from moesparse.evaluate.continuations import (
    Prompts,
    chance,
    compare_written,
    ends_in_loop,
    make_prompts,
    write,
)
from moesparse.evaluate.divergence import Figures
from moesparse.evaluate.warning_signs import warning_signs

RNG = random.Random(0)
PROSE = [RNG.randrange(1000) for _ in range(200)]


def loops_by_hand(tokens):
    """The definition, stretch by stretch, from the end."""
    for period in range(1, len(tokens) + 1):
        stretch = tokens[len(tokens) - period :]
        repeats = 1
        while tokens[: len(tokens) - repeats * period][-period:] == stretch and repeats * period < len(tokens):
            repeats += 1
        # the piece before the first whole repeat belongs to the loop too
        more = 0
        while (
            more < len(tokens) - repeats * period
            and tokens[-repeats * period - 1 - more] == stretch[-1 - more % period]
        ):
            more += 1
        if repeats >= 4 and repeats * period + more >= 64:
            return True
    return False


PLANTED = [
    pytest.param([7] * 64, True, id="one token 64 times"),
    pytest.param([7] * 63, False, id="one token 63 times"),
    pytest.param(PROSE + [7] * 64, True, id="behind prose"),
    pytest.param([7] * 100 + PROSE[:1], False, id="a loop that was left"),
    pytest.param(PROSE + PROSE[:16] * 4, True, id="sixteen tokens 4 times"),
    pytest.param(PROSE + PROSE[:40] * 4, True, id="forty tokens 4 times"),
    pytest.param(PROSE + PROSE[:40] * 3, False, id="forty tokens 3 times"),
    pytest.param(PROSE[:40] * 3 + PROSE[:39], False, id="forty tokens not quite 4 times"),
    pytest.param(PROSE + PROSE[:3] * 21 + PROSE[:1], True, id="a loop that ends in the middle of a stretch"),
    pytest.param(PROSE, False, id="prose"),
    pytest.param([], False, id="nothing"),
]


@pytest.mark.parametrize(("tokens", "loops"), PLANTED)
def test_planted_loops_are_found_and_nothing_else(tokens, loops):
    assert ends_in_loop(tokens) is loops
    assert loops_by_hand(tokens) is loops


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 2), min_size=1, max_size=24),
    st.integers(0, 40),
    st.integers(0, 23),
)
def test_a_loop_is_what_a_plain_search_finds(before, stretch, repeats, cut):
    tokens = before + stretch * repeats + stretch[:cut]
    assert ends_in_loop(tokens) is loops_by_hand(tokens)


def written(*rows, width=80):
    return torch.tensor([list(row) + [-1] * (width - len(row)) for row in rows])


def test_what_is_counted_is_what_was_planted():
    loop, prose, ended = [7] * 80, PROSE[:80], [*PROSE[80:110], 2]
    looped_and_ended = [7] * 79 + [2]
    dense = {"greedy": written(prose, prose), "sampled": written(ended, loop)}
    pruned = {"greedy": written(prose[:50] + loop[:30], loop), "sampled": written(looped_and_ended, loop)}
    figures, rows = compare_written(dense, pruned, [2])
    assert figures["greedy"]["dense"] == {"loops": 0, "looping": 0, "distinct": 1, "length": 80, "stopped": 0}
    # 77 4-grams of one kind; 30 sevens after 50 other tokens: 50 of 77 differ and one more is all sevens
    assert figures["greedy"]["pruned"] == pytest.approx(
        {"loops": 0.5, "looping": 1, "distinct": (51 / 77 + 1 / 77) / 2, "length": 80, "stopped": 0}
    )
    assert figures["sampled"]["dense"] == pytest.approx(
        {"loops": 0.5, "looping": 1, "distinct": (1 + 1 / 77) / 2, "length": (31 + 80) / 2, "stopped": 0.5}
    )
    assert figures["sampled"]["pruned"]["looping"] == 1, "what came to an end is no loop"
    assert [row["first_divergence"] for row in rows["greedy"]] == [50, 0]
    assert figures["greedy"]["first_divergence"] == 50
    assert rows["sampled"][0]["dense"]["tokens"] == ended


def test_prompts_are_spread_over_the_domains_and_their_windows():
    windows = torch.arange(10)[:, None] * 100 + torch.arange(32)
    domains = ["law"] * 7 + ["code"] * 3
    made = make_prompts(windows, domains, count=6, length=24, new_tokens=500, temperature=0.7, context=128)
    assert made.domains == ["law"] * 3 + ["code"] * 3
    assert made.ids[:, 0].tolist() == [0, 200, 400, 700, 800, 900]
    # half a window, and what the context leaves
    assert made.describe() == {"prompts": 6, "prompt_tokens": 16, "new_tokens": 112, "temperature": 0.7}
    # a domain gives no window twice
    few = make_prompts(windows, domains, count=20, length=8, new_tokens=64, temperature=0.7, context=128)
    assert few.domains.count("code") == 3


def test_prompts_that_cannot_be_are_refused():
    windows = torch.zeros(4, 64, dtype=torch.int64)
    how = {"count": 2, "length": 32, "new_tokens": 64, "temperature": 1.0, "context": 128}
    with pytest.raises(
        UsageError, match="new_tokens must be at least 64, the length of a loop, got 32 behind 32 tokens"
    ):
        make_prompts(windows, ["all"] * 4, **how | {"context": 64})
    with pytest.raises(UsageError, match="the temperature above 0, got 2 and 0"):
        make_prompts(windows, ["all"] * 4, **how | {"temperature": 0})


def test_continuations_are_those_of_transformers(monkeypatch):
    model, _ = demo.load()
    windows = demo.windows("heldout", "novel")[:2]
    ids = windows[:, :16]
    found = write(model, Prompts(ids, ["novel"] * 2, 64, 0.8), None, lambda _event: None)
    again = write(model, Prompts(ids, ["novel"] * 2, 64, 0.8, batch_size=1), None, lambda _event: None)
    assert torch.equal(found["greedy"], again["greedy"])
    tokens = ids[:1]
    with torch.no_grad():
        for _ in range(20):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    assert found["greedy"][0, :20].tolist() == tokens[0, 16:].tolist()
    assert not torch.equal(found["greedy"], found["sampled"])


def test_chance_is_fishers_exact_test():
    scipy = pytest.importorskip("scipy.stats")
    for few, many, count in ((0, 3, 10), (2, 9, 48), (0, 0, 5), (4, 5, 5)):
        table = [[many, count - many], [few, count - few]]
        assert chance(few, many, count) == pytest.approx(scipy.fisher_exact(table, alternative="greater").pvalue)


def of(kl, tokens=1000):
    return Figures(tokens, kl, 2 * kl, 0.9, 0.9, 2.0, 2.1)


def comparison(**more):
    named = {"domains": {"law": of(0.1)}, "languages": {}, "scripts": {}, "positions": [], "layers": [], "changed": []}
    return Comparison("dense", "pruned", of(0.1), window=64, **named | more)


def sides(dense, pruned):
    return {"dense": {"looping": dense, "loops": dense / 10}, "pruned": {"looping": pruned, "loops": pruned / 10}}


def test_what_stands_out_is_named_and_what_does_not_is_not():
    quiet = {"law": of(0.1), "code": of(0.29, 10)}
    assert warning_signs(comparison(domains=quiet)) == []
    # the mean is that of the other text: with two domains none could be three times the mean of all
    loud = {"law": of(0.1), "news": of(0.2, 3000), "code": of(0.6)}
    assert warning_signs(comparison(domains=loud)) == [
        "domain code: KL 0.600 is 3.4 times the mean of the other text, 0.175"
    ]
    assert warning_signs(comparison(domains={"law": of(1e-4), "code": of(9e-3)})) == [], "too small to be of use"
    scripts = {"Latin": of(0.1), "Han": of(0.4), "Common": of(3.0)}
    assert [sign.split(":")[0] for sign in warning_signs(comparison(scripts=scripts))] == ["script Han"]
    languages = {"French": of(0.31), "German": of(0.29)}
    (sign,) = warning_signs(comparison(languages=languages))
    assert (
        sign == "language French: KL 0.310 is 3.1 times that of the text, 0.100; its perplexity goes from 7.39 to 8.17"
    )


def test_more_loops_are_named_with_what_chance_gives():
    more = comparison(generation={"prompts": 10, "greedy": sides(1, 5), "sampled": sides(0, 2)})
    (sign,) = warning_signs(more)
    assert sign.startswith("loops: 7 of 20 continuations of the pruned model end in a loop, 1 of the dense one; ")
    assert sign.endswith(f"in {chance(1, 7, 20):.1%} of such draws")
    assert more.loops == pytest.approx({"dense": 0.05, "pruned": 0.35})
    fewer = dataclasses.replace(more, generation={"prompts": 10, "greedy": sides(3, 1), "sampled": sides(0, 2)})
    assert warning_signs(fewer) == []
