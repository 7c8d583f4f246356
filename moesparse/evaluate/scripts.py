"""Which script each token of a text is written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

__all__ = ["COMMON", "script_of", "token_scripts"]

COMMON = "Common"
"""Of text without letters: digits, punctuation, spaces."""

_NAMES = {"Cjk": "Han", "Hiragana": "Kana", "Katakana": "Kana"}
# what stands for bytes that are no whole character yet
_INCOMPLETE = "\ufffd"
# bytes of a character in UTF-8, and a token more that may begin before it
_LONGEST = 5


def script_of(text: str) -> str:
    """The Unicode script of most letters of a text, as their character names begin ("Latin", "Cyrillic", "Han").

    Both Japanese syllabaries are "Kana"; text without letters is COMMON.
    """
    counts = Counter(_script(character) for character in text if character.isalpha())
    return counts.most_common(1)[0][0] if counts else COMMON


def token_scripts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The script of every token of a window; tokens that are parts of one character have the script of it.

    Args:
        ids: of the tokens.
        decode: ids to text.
    """
    found: list[str] = []
    waiting: list[int] = []
    for each in ids:
        waiting.append(each)
        text = decode(waiting)
        if _INCOMPLETE not in text or len(waiting) == _LONGEST:
            found += [script_of(text)] * len(waiting)
            waiting = []
    return found + [COMMON] * len(waiting)


def _script(letter: str) -> str:
    name = unicodedata.name(letter, COMMON).split(" ")[0].split("-")[0].capitalize()
    return _NAMES.get(name, name)
