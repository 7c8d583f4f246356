"""Tokens as text: a text that grows token by token and ends at a stop sequence, and single tokens by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["Writer", "token_bytes", "token_text"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""Tokens of a prompt that are decoded with the first ones of its continuation: enough for a space or a character that
two of them share."""

_LONGEST = 16
"""Tokens that may wait for a character to become whole; what is not by then is broken."""


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Writer:
    """The text of tokens that come one at a time.

    Args:
        tokenizer: a transformers tokenizer.
        before: tokens that the text goes on from; a space that follows them belongs to the text.
        stop: where one of these begins, the text ends.

    Attributes:
        text: all that is settled: whole characters, and nothing that may become a stop sequence.
        offsets: where in the text each token begins, in characters.
        stopped: whether a stop sequence was met.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens = list(before[-_CONTEXT:])
        # decoded together: the text of tokens from `_start` on, of which those before `_done` are in `_written`
        self._start, self._done = 0, len(self._tokens)
        self._written = ""
        self.text = ""
        self.offsets: list[int] = []
        self.stopped = False

    def add(self, token: int) -> None:
        """Take one more token."""
        self.offsets.append(len(self._written))
        self._tokens.append(token)
        known = _decode(self._tokenizer, self._tokens[self._start : self._done])
        now = _decode(self._tokenizer, self._tokens[self._start :])
        whole = not now.endswith(_BROKEN) or len(self._tokens) - self._done > _LONGEST
        if not whole or len(now) <= len(known):
            # a character whose other bytes are to come, or a token without text
            return
        self._take(now[len(known) :])
        self._start, self._done = self._done, len(self._tokens)

    def end(self) -> None:
        """No token follows: what was held back is text too."""
        if self.stopped:
            return
        known = _decode(self._tokenizer, self._tokens[self._start : self._done])
        self._take(_decode(self._tokenizer, self._tokens[self._start :])[len(known) :])
        if not self.stopped:
            self.text = self._written

    def _take(self, piece: str) -> None:
        before = len(self._written)
        self._written += piece
        found = [self._written.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        cuts = [place for place in found if place >= 0]
        if cuts:
            self.stopped = True
            self.text = self._written[: min(cuts)]
        else:
            self.text = self._written[: len(self._written) - self._held()]

    def _held(self) -> int:
        """Characters at the end that begin a stop sequence."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        ends = (self._written[-count:] for count in range(min(longest, len(self._written)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)


def token_text(tokenizer: Any, token: int, before: Sequence[int] = ()) -> str:
    """What a token adds to those before it; a special one by its name. Bytes that are no whole character are U+FFFD."""
    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token))
    known = _decode(tokenizer, before[-1:])
    both = _decode(tokenizer, [*before[-1:], token])
    # a character that the two share has no text of either alone
    return both[len(known) :] if both.startswith(known) and len(both) > len(known) else _decode(tokenizer, [token])


def token_bytes(tokenizer: Any, token: int, text: str) -> list[int] | None:
    """The bytes of a token: of its text where that is whole, else those its vocabulary names; None if it names none."""
    if _BROKEN not in text:
        return list(text.encode())
    name = str(tokenizer.convert_ids_to_tokens(token))
    found = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
    if found:
        return [int(found[1], 16)]
    return [_BYTES[character] for character in name] if all(character in _BYTES for character in name) else None


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with (Radford et al., 2019, GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
