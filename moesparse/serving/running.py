"""The texts of one request while they grow: whole or in chunks to who asked; who goes away frees their rows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moesparse.serving.answers import Chat, Collected, Completion, error_body, event, failed
from moesparse.serving.engine import Delta, Engine, Text
from moesparse.serving.requests import Refused

__all__ = ["Events", "Running", "chunks"]


class Running:
    """The texts of one request, in the engine."""

    def __init__(self, engine: Engine, texts: Sequence[Text]) -> None:
        self._engine = engine
        self.texts = texts

    async def deltas(self) -> AsyncIterator[Delta]:
        """What the texts gain, until all have ended.

        Raises:
            Refused: the model failed.
        """
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(delta: Delta) -> None:
            # the server may have ended meanwhile
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, delta)

        self._engine.submit(self.texts, emit)
        left = len(self.texts)
        while left:
            delta = await queue.get()
            if delta.error is not None:
                raise failed(delta.error)
            yield delta
            left -= delta.last

    async def collected(self, request: Request) -> list[Collected] | None:
        """All texts, whole; None where nobody waits for them any more."""
        found = [Collected() for _ in self.texts]

        async def collect() -> None:
            async for delta in self.deltas():
                found[delta.index].add(delta)

        return found if await self.unless_gone(collect(), request.receive) else None

    async def unless_gone(self, work: Any, receive: Callable[[], Any]) -> bool:
        """Do the work while somebody waits for it; False where nobody does any more. Texts that are left are ended."""
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                return False
            working.result()
            return True
        finally:
            working.cancel()
            watching.cancel()
            self._engine.cancel(self.texts)


async def _gone(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def chunks(running: Running, answer: Completion | Chat, prompt_tokens: int) -> AsyncIterator[bytes]:
    """The answer as server-sent events; an error is the last one where the model fails."""
    generated = [0] * len(running.texts)
    try:
        for text in running.texts:
            for chunk in answer.begin(text.index):
                yield event(chunk)
        async for delta in running.deltas():
            generated[delta.index] = delta.tokens
            for chunk in answer.parts(delta):
                yield event(chunk)
        last = answer.last(prompt_tokens, sum(generated))
        if last is not None:
            yield event(last)
        yield event(b"[DONE]")
    except Refused as error:
        yield event(error_body(error))


class Events(Response):
    """Server-sent events, until they end or nobody listens any more."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], running: Running) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._chunks, self._running = chunks, running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await self._running.unless_gone(write(), receive)
