"""Answers in the forms of OpenAI's API: a completion or a chat, whole or in chunks, and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesparse.errors import reason_of
from moesparse.serving.engine import Delta, Ended, TokenNote
from moesparse.serving.requests import Refused

__all__ = ["Chat", "Collected", "Completion", "dump", "error_body", "event", "failed"]

_LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""

_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def dump(value: Any) -> bytes:
    """JSON; half surrogate pairs of a request, which come back in an error, as escapes."""
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else dump(value)) + b"\n\n"


def error_body(error: Refused) -> dict[str, Any]:
    kind = _KINDS.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def failed(error: Exception) -> Refused:
    """What a client is told of a defect, of memory that did not suffice, or of a server that ends."""
    if isinstance(error, Ended):
        return Refused("the server ends", status=503)
    return Refused(f"the server failed: {type(error).__name__}: {reason_of(error)}", status=500)


def _usage_of(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


@dataclass
class Collected:
    """A text as its deltas make it."""

    text: str = ""
    notes: list[TokenNote] = field(default_factory=list)
    prompt: list[TokenNote] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.notes += delta.notes
        self.prompt += delta.prompt
        self.finish = delta.finish
        self.tokens = delta.tokens


class _Answer:
    """What the two kinds share.

    Args:
        model: its name.
        noted: whether log-probabilities are asked for.
        usage: whether the last chunk is to hold the usage.
    """

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, model: str, noted: bool, usage: bool) -> None:
        self.noted, self._usage = noted, usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[Collected], prompt_tokens: int) -> dict[str, Any]:
        usage = _usage_of(prompt_tokens, sum(text.tokens for text in texts))
        choices = [self.choice(index, text) for index, text in enumerate(texts)]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        rest: dict[str, Any] = {"usage": None} if self._usage else {}
        return self._head | {"object": self.chunk_object, "choices": [choice]} | rest

    def last(self, prompt_tokens: int, generated: int) -> dict[str, Any] | None:
        """The chunk that holds no text but the usage, where it is asked for."""
        if not self._usage:
            return None
        return self._head | {
            "object": self.chunk_object,
            "choices": [],
            "usage": _usage_of(prompt_tokens, generated),
        }

    def choice(self, index: int, text: Collected) -> dict[str, Any]:
        raise NotImplementedError


class Completion(_Answer):
    """A text_completion.

    Args:
        echoes: the prompt's text in front of each text, or "".
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, noted: bool, usage: bool, echoes: Sequence[str]) -> None:
        super().__init__(model, noted, usage)
        self._echoes = echoes
        self._begun: set[int] = set()

    def choice(self, index: int, text: Collected) -> dict[str, Any]:
        # of chunks only the first one begins with the prompt
        echo = "" if index in self._begun else self._echoes[index]
        notes = _legacy([*text.prompt, *text.notes], len(text.prompt), len(self._echoes[index])) if self.noted else None
        return {"index": index, "text": echo + text.text, "logprobs": notes, "finish_reason": text.finish}

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Chunks before the first of a text."""
        return []

    def parts(self, delta: Delta) -> list[dict[str, Any]]:
        """Chunks of what a text gained."""
        text = Collected()
        text.add(delta)
        found = [self.chunk(self.choice(delta.index, text))]
        self._begun.add(delta.index)
        return found


class Chat(_Answer):
    """A chat.completion, or chunks of one."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: Collected) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        return self._named(index, text.notes, text.finish) | {"message": message}

    def begin(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self.chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})]

    def parts(self, delta: Delta) -> list[dict[str, Any]]:
        found = []
        if delta.text or delta.notes:
            found.append(self.chunk(self._named(delta.index, delta.notes, None) | {"delta": {"content": delta.text}}))
        if delta.finish:
            found.append(self.chunk(self._named(delta.index, (), delta.finish) | {"delta": {}}))
        return found

    def _named(self, index: int, notes: Sequence[TokenNote], finish: str | None) -> dict[str, Any]:
        content = [_entry(note) | {"top_logprobs": [_entry(each) for each in note.top]} for note in notes]
        logprobs = {"content": content, "refusal": None} if self.noted and (content or finish is None) else None
        return {"index": index, "logprobs": logprobs, "finish_reason": finish}


def _entry(note: TokenNote) -> dict[str, Any]:
    return {"token": note.text, "logprob": _finite(note.logprob), "bytes": note.bytes}


def _legacy(notes: Sequence[TokenNote], of_prompt: int, shift: int) -> dict[str, Any]:
    """Log-probabilities as completions have them. The first `of_prompt` are the prompt's, `shift` characters long."""
    tops = []
    for note in notes:
        named: dict[str, float | None] = {}
        for each in (*note.top, note):
            named.setdefault(each.text, _finite(each.logprob))
        tops.append(None if note.logprob is None else named)
    return {
        "tokens": [note.text for note in notes],
        "token_logprobs": [_finite(note.logprob) for note in notes],
        "top_logprobs": tops,
        "text_offset": [note.offset + (0 if place < of_prompt else shift) for place, note in enumerate(notes)],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, _LEAST_LOGPROB)
