"""The thread that owns the model: texts wait for a row of the batch, every pass gives each row one token.

A text that comes joins at the next pass, one that ends or is cancelled leaves before it. Between two passes one prompt
at most is read, so that long prompts hold up the texts under way once each.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moesparse.serving.batch import Batch
from moesparse.serving.products import serve_few_rows
from moesparse.serving.sampling import Sampler, Sampling, log_probabilities
from moesparse.serving.words import Writer, token_bytes, token_text

__all__ = ["Delta", "Ended", "Engine", "Text", "TokenNote"]

_logger = logging.getLogger(__name__)


class Ended(Exception):
    """The engine was told to end before a text had."""


@dataclass(frozen=True)
class TokenNote:
    """A token and how likely the model held it.

    Attributes:
        text: what it adds to the text, see `token_text`.
        bytes: of the token, None where unknown.
        logprob: natural logarithm; None for the first token of a prompt, which nothing predicts.
        top: the likeliest tokens in its place, the likeliest first.
        offset: where it begins, in characters of its text.
    """

    text: str
    bytes: list[int] | None
    logprob: float | None
    top: tuple[TokenNote, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Delta:
    """What a text gained.

    Attributes:
        index: the text's place in its request.
        text: characters that are settled now.
        notes: of the tokens that begin in them, where the request asks for log-probabilities.
        prompt: notes of the prompt's tokens, once, where the request asks for them.
        finish: "stop" or "length" with the last one, else None.
        tokens: generated so far, one that ended the text among them.
        error: why the text cannot go on; it is the last one then.
    """

    index: int
    text: str = ""
    notes: tuple[TokenNote, ...] = ()
    prompt: tuple[TokenNote, ...] = ()
    finish: str | None = None
    tokens: int = 0
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Text:
    """One text to be continued.

    Args:
        prompt: its token ids.
        most: tokens to generate at most; 0 only reads the prompt.
        sampling: how they are chosen.
        index: its place in its request.
        stop: sequences of characters before which it ends.
        joined: whether the text goes on from its prompt's characters, as a completion does and an answer does not.
        alternatives: likeliest tokens in each place; None asks for no log-probabilities.
        score_prompt: log-probabilities of the prompt's tokens too.
    """

    prompt: Sequence[int]
    most: int
    sampling: Sampling
    index: int = 0
    stop: Sequence[str] = ()
    joined: bool = False
    alternatives: int | None = None
    score_prompt: bool = False
    cancelled: bool = field(default=False, init=False)
    emit: Callable[[Delta], None] = field(init=False)


class Engine:
    """Continues texts with a model, several in each pass.

    Args:
        model: a transformers causal language model in eval mode, on one device; its linear layers take the faster of
            two products from here on (products.py).
        tokenizer: its tokenizer.
        rows: texts continued together at most; 1 where the model's cache cannot be cut into rows.

    Attributes:
        rows: as it is.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: int) -> None:
        serve_few_rows(model)
        self._batch = Batch(model)
        self._tokenizer = tokenizer
        self.rows = rows if rows == 1 or self._batch.joinable() else 1
        self._ends = _end_tokens(model, tokenizer)
        self._waiting: deque[Text] = deque()
        self._active: list[_Row] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="moesparse-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """How many texts are continued, and how many wait."""
        return len(self._active), len(self._waiting)

    def submit(self, texts: Sequence[Text], emit: Callable[[Delta], None]) -> None:
        """Queue texts; their turn comes in this order. `emit` gets every Delta of them, in the engine's thread."""
        for text in texts:
            text.emit = emit
        with self._changed:
            closed = self._closed
            if not closed:
                self._waiting.extend(texts)
                self._changed.notify()
        if closed:
            self._give_up(texts, Ended())

    def cancel(self, texts: Sequence[Text]) -> None:
        """End texts without another word; what already ended stays so."""
        with self._changed:
            for text in texts:
                text.cancelled = True
            self._changed.notify()

    def end(self) -> None:
        """End all texts after the pass that is under way, those that come as well, and the thread; does not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self, seconds: float) -> bool:
        """`end`, and wait; False where the pass takes longer than this."""
        self.end()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
                if self._closed:
                    break
                self._waiting = deque(text for text in self._waiting if not text.cancelled)
                joining = self._next_texts()
            self._leave(lambda row: not row.text.cancelled)
            if joining:
                with self._guarded(joining):
                    self._join(joining)
            if self._active:
                with self._guarded([row.text for row in self._active]):
                    self._choose(self._active, self._batch.step([row.token for row in self._active]))

        self._give_up([*(row.text for row in self._active), *self._waiting], Ended())

    @staticmethod
    def _give_up(texts: Iterable[Text], error: Exception) -> None:
        for text in texts:
            text.emit(Delta(text.index, error=error))

    def _next_texts(self) -> list[Text]:
        """The first that waits, and those behind it with the same prompt, as many as there are rows for."""
        joining: list[Text] = []
        free = self.rows - sum(not row.text.cancelled for row in self._active)
        while self._waiting and len(joining) < free:
            first = self._waiting[0]
            if joining and (first.prompt is not joining[0].prompt or first.score_prompt != joining[0].score_prompt):
                break
            joining.append(self._waiting.popleft())
        return joining

    @contextmanager
    def _guarded(self, texts: Sequence[Text]) -> Iterator[None]:
        """A pass that fails (memory, most likely) ends the texts in it, not the server."""
        try:
            yield
        except Exception as error:
            _logger.exception("a pass of the model failed")
            # a prompt that failed while its row was joined takes the other rows with it
            lost = {*texts, *(row.text for row in self._active if not self._batch.lengths)}
            self._give_up(lost, error)
            self._leave(lambda row: row.text not in lost)

    def _leave(self, stays: Callable[[_Row], bool]) -> None:
        kept = [place for place, row in enumerate(self._active) if stays(row)]
        if len(kept) < len(self._active):
            self._active = [self._active[place] for place in kept]
            self._batch.keep(kept)

    def _join(self, texts: Sequence[Text]) -> None:
        first = texts[0]
        logits = self._batch.add(first.prompt, len(texts) if first.most else 0, whole=first.score_prompt)
        rows = [_Row(text, self._tokenizer) for text in texts]
        if first.most:
            self._active += rows
        if first.score_prompt:
            for row in rows:
                row.note_prompt(logits)
        if first.most:
            self._choose(rows, logits[-1:].expand(len(rows), -1))
            return
        for row in rows:
            row.end("length")

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Give each row its next token; rows that end with it leave."""
        likeliest = logits.argmax(-1).tolist()
        for row, values, token in zip(rows, logits, likeliest, strict=True):
            row.take(token if row.sampler.plain else row.sampler.choose(values), values, self._ends)
        self._leave(lambda row: not row.finished)


class _Row:
    """A text under way."""

    def __init__(self, text: Text, tokenizer: Any) -> None:
        self.text = text
        self.sampler = Sampler(text.sampling, text.index)
        self.token = -1
        self.finished = False
        self._tokenizer = tokenizer
        self._writer = Writer(tokenizer, text.prompt if text.joined else (), text.stop)
        self._tokens: list[int] = []
        self._notes: list[TokenNote] = []
        self._prompt: tuple[TokenNote, ...] = ()
        self._told = 0

    def take(self, token: int, logits: Tensor, ends: frozenset[int]) -> None:
        """The next token, and the logits [vocabulary] it was chosen from."""
        self.token = token
        self._tokens.append(token)
        self.sampler.count(token)
        if token in ends:
            self.end("stop")
            return
        self._writer.add(token)
        if self.text.alternatives is not None:
            before = self._tokens[-2:-1] or list(self.text.prompt[-1:])
            self._notes.append(self._note(token, logits, before, self._writer.offsets[-1]))
        if self._writer.stopped:
            self.end("stop")
        elif len(self._tokens) == self.text.most:
            self.end("length")
        else:
            self._tell(None)

    def end(self, finish: str) -> None:
        self.finished = True
        self._writer.end()
        self._tell("stop" if self._writer.stopped else finish)

    def note_prompt(self, logits: Tensor) -> None:
        """Notes of the prompt's tokens, from the logits [length, vocabulary] of all of them."""
        prompt, notes, offset = list(self.text.prompt), [], 0
        for place, token in enumerate(prompt):
            before = prompt[max(0, place - 1) : place]
            if place:
                note = self._note(token, logits[place - 1], before, offset)
            else:
                text = token_text(self._tokenizer, token)
                note = TokenNote(text, token_bytes(self._tokenizer, token, text), None)
            notes.append(note)
            # a special token has a name, and no place in the text
            offset += 0 if token in self._tokenizer.all_special_ids else len(note.text)
        self._prompt = tuple(notes)

    def _tell(self, finish: str | None) -> None:
        settled = self._writer.text
        # a token is told with the text it begins in; one that begins behind a stop sequence never is
        reach = len(settled) + (finish is not None and not self._writer.stopped)
        fresh = tuple(note for note in self._notes if note.offset < reach)
        self._notes = self._notes[len(fresh) :]
        piece, self._told = settled[self._told :], len(settled)
        prompt, self._prompt = self._prompt, ()
        if piece or fresh or prompt or finish:
            self.text.emit(Delta(self.text.index, piece, fresh, prompt, finish, len(self._tokens)))

    def _note(self, token: int, logits: Tensor, before: Sequence[int], offset: int) -> TokenNote:
        own, top = log_probabilities(logits, token, self.text.alternatives or 0)
        return self._named(token, own, before, offset, tuple(self._named(each, value, before) for each, value in top))

    def _named(
        self, token: int, logprob: float, before: Sequence[int], offset: int = 0, top: tuple[TokenNote, ...] = ()
    ) -> TokenNote:
        text = token_text(self._tokenizer, token, before)
        return TokenNote(text, token_bytes(self._tokenizer, token, text), logprob, top, offset)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: those of the generation config, and the tokenizer's own."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(said if isinstance(said, list | tuple) else [said]), tokenizer.eos_token_id]
    return frozenset(token for token in found if token is not None)
