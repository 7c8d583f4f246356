"""Questions about the embedded held-out text, for lm-eval's task files beside this module.

They are made from the text when a task is loaded, the same ones every time: one from each of as many equal stretches
of a domain, at a place drawn by the domain's name. No file of questions can go out of step with the text.
"""

from __future__ import annotations

import random
import re
from typing import Any

from moesparse import demo

QUESTIONS = 100
"""Of each kind, in each domain."""

CHOICES = 4
_CONTEXT = 300
_CONTINUATION = 60
_PIECE = 2000

# a single space between two words, so that " " may be lm-eval's delimiter
_GAP = re.compile(r"(?<=\S) (?=\S)")
_WORD = re.compile(r"(?<=\S )[A-Za-z_]{5,}(?![A-Za-z_])")


def continuation(domain: str, **_: Any) -> dict[str, Any]:
    """Which of four stretches of about 60 characters goes on a text of about 300? The others are from the same domain.

    Returns:
        {"test": rows of context, choices [4], answer (its index)}; chance is a quarter.
    """
    rng = random.Random(domain)
    text = demo.text("heldout", domain)
    pairs = []
    for stretch in _stretches(text, QUESTIONS):
        gaps = [gap for gap in _GAP.finditer(stretch) if _CONTEXT <= gap.start() < len(stretch) - 2 * _CONTINUATION]
        gap = rng.choice(gaps)
        end = _GAP.search(stretch, gap.end() + _CONTINUATION)
        last = end.start() if end else len(stretch)
        pairs.append((_tail(stretch[: gap.start()]), stretch[gap.end() : last].rstrip()))
    rows = []
    for number, (context, real) in enumerate(pairs):
        others = [pairs[other][1] for other in rng.sample([n for n in range(len(pairs)) if n != number], CHOICES - 1)]
        rows.append(_choice(rng, context, real, others))
    return _test_split(rows)


def last_word(domain: str, **_: Any) -> dict[str, Any]:
    """Which of four words ends a passage of about 300 characters? All have five letters or more and occur in it before.

    The words of LAMBADA (Paperno et al. 2016, arXiv 1606.06031) mostly did, too; there the word is to be guessed, which
    is beyond a model of this size.

    Returns:
        {"test": rows of context, choices [4], answer (its index)}; chance is a quarter.
    """
    rng = random.Random(domain)
    rows = []
    for stretch in _stretches(demo.text("heldout", domain), QUESTIONS):
        found: list[tuple[str, str, list[str]]] = []
        for place in _WORD.finditer(stretch, _CONTEXT):
            context = _tail(stretch[: place.start() - 1])
            seen = sorted(set(_WORD.findall(context)))
            if place[0] in seen and len(seen) >= CHOICES:
                found.append((context, place[0], seen))
        if found:
            context, word, seen = rng.choice(found)
            others = rng.sample([one for one in seen if one != word], CHOICES - 1)
            rows.append(_choice(rng, context, word, others))
    return _test_split(rows)


def pieces(domain: str, **_: Any) -> dict[str, Any]:
    """The whole text in pieces of about 2000 characters, cut after line ends.

    Returns:
        {"test": rows of text}.
    """
    text = demo.text("heldout", domain)
    rows, start = [], 0
    while start < len(text):
        cut = text.find("\n", start + _PIECE) + 1 or len(text)
        rows.append({"text": text[start:cut]})
        start = cut
    return _test_split(rows)


def _stretches(text: str, count: int) -> list[str]:
    return [text[number * len(text) // count : (number + 1) * len(text) // count] for number in range(count)]


def _tail(context: str) -> str:
    """The last characters of a context, from the start of a word."""
    return context[-_CONTEXT:].split(None, 1)[-1]


def _choice(rng: random.Random, context: str, real: str, others: list[str]) -> dict[str, Any]:
    answer = rng.randrange(CHOICES)
    return {"context": context, "choices": [*others[:answer], real, *others[answer:]], "answer": answer}


def _test_split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list(rows)}
