"""Scripts of tokens and the texts of twenty languages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import make_tokenizer

from moesparse.evaluate.languages import language_texts, language_windows
from moesparse.evaluate.routing import agreement, original_ids
from moesparse.evaluate.scripts import COMMON, script_of, token_scripts


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("naïve", "Latin"),
        ("Привет", "Cyrillic"),
        ("世界人权", "Han"),
        ("ひらがな", "Kana"),
        ("カタカナ", "Kana"),
        ("한국어", "Hangul"),
        ("שלום", "Hebrew"),
        ("مرحبا", "Arabic"),
        ("नमस्ते", "Devanagari"),
        ("สวัสดี", "Thai"),
        ("x世界", "Han"),
        ("12, 3!", COMMON),
        ("", COMMON),
    ],
)
def test_a_script_is_that_of_most_letters(text, script):
    assert script_of(text) == script


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["fox ", "世", "é", "🎉", "ж", "12", "ส"]), max_size=12))
def test_parts_of_a_character_have_its_script(parts):
    tokenizer = make_tokenizer()
    ids = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    wanted = [
        script_of(part) if not part.startswith("fox") else None
        for part in parts
        for _ in tokenizer(part, add_special_tokens=False)["input_ids"]
    ]
    found = token_scripts(ids, tokenizer.decode)
    assert len(found) == len(ids)
    assert all(name == known for name, known in zip(found, wanted, strict=True) if known is not None)


def test_twenty_languages_are_small_and_in_their_scripts():
    texts = language_texts()
    assert len(texts) == 20
    assert sum(len(text.encode()) for text in texts.values()) < 60_000
    scripts = {name: script_of(text) for name, text in texts.items()}
    wanted = {"Russian": "Cyrillic", "Greek": "Greek", "Arabic": "Arabic", "Hebrew": "Hebrew", "Hindi": "Devanagari"}
    wanted |= {"Chinese": "Han", "Korean": "Hangul", "Thai": "Thai"}
    assert {name: scripts.pop(name) for name in wanted} == wanted
    assert scripts.pop("Japanese") in ("Kana", "Han")
    assert set(scripts.values()) == {"Latin"}


def test_their_windows_hold_every_token_once():
    tokenizer = make_tokenizer()
    ids, mask, names = language_windows(tokenizer, 50)
    assert set(names) == set(language_texts())
    for name, text in language_texts().items():
        whole = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        rows = torch.tensor([each == name for each in names])
        found = ids[rows][mask[rows]].tolist()
        assert whole[: len(found)] == found and len(whole) - len(found) <= 1
    assert (mask.long().diff(dim=1) <= 0).all(), "padding lies behind"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_router_agreement_is_that_of_sets(data):
    experts = data.draw(st.integers(2, 9))
    kept = sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1)))
    K, L = data.draw(st.integers(1, experts)), data.draw(st.integers(1, len(kept)))
    T = data.draw(st.integers(1, 12))
    mine = torch.tensor([data.draw(st.permutations(range(experts)))[:K] for _ in range(T)], dtype=torch.int16)
    theirs = torch.tensor([data.draw(st.permutations(range(len(kept))))[:L] for _ in range(T)], dtype=torch.int16)
    found = agreement(mine, theirs, original_ids(experts, None, len(kept), kept))
    pairs = [({*a}, {kept[each] for each in b}) for a, b in zip(mine.tolist(), theirs.tolist(), strict=True)]
    assert found["chosen"] == pytest.approx(sum(len(a & b) / len(a) for a, b in pairs) / T)
    gone = sum(len(a - {*kept}) for a, _ in pairs)
    assert found["gone"] == pytest.approx(gone / (T * K))
    assert [each["expert"] for each in found["taken_over"]] == [each for each in range(experts) if each not in kept]
    assert sum(each["tokens"] for each in found["taken_over"]) == gone


def test_experts_of_two_cut_models_meet_in_one_numbering():
    # the dense one was cut to 0 2 4 5 of 6 before, the other one further, to 2 and 5
    ids = original_ids(4, [0, 2, 4, 5], 2, [2, 5])
    found = agreement(torch.tensor([[1, 3], [0, 2]]), torch.tensor([[0, 1], [0, 1]]), ids)
    assert (found["chosen"], found["gone"]) == (0.5, 0.5)
    shared = [[1, 0.5], [3, 0.5]]
    assert [(each["expert"], each["by"]) for each in found["taken_over"]] == [(0, shared), (2, shared)]
    assert original_ids(4, None, 3, None) is None
    assert original_ids(4, None, 3, [0, 1]) is None
    mine, theirs = original_ids(4, None, 4, None)
    assert mine.tolist() == theirs.tolist() == [0, 1, 2, 3]
