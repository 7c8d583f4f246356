"""A model behind a socket, from loading to Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import uvicorn

from moesparse.errors import MoESparseError, UsageError
from moesparse.models.meta import context_length, vocabulary_size
from moesparse.serving.app import Served, make_app
from moesparse.serving.engine import Engine
from moesparse.text import encode_document

__all__ = ["PLAIN_TEMPLATE", "Server", "bind", "chat_template"]

GRACE_SECONDS = 1
"""Given to requests under way once the server was told to end."""

_PASS_SECONDS = 5
"""Given to the pass of the model that is under way then."""

PLAIN_TEMPLATE = (
    "{% set text = messages | map(attribute='content') | join('\n') %}"
    "{{ text if text | trim else raise_exception('messages must hold text, got none') }}"
)
"""The messages' texts, line after line: the model goes on from the last one, as a base model does."""


class Server:
    """One model and its clients.

    Args:
        name: what clients call the model.
        model: in eval mode, on the device it works on.
        tokenizer: its tokenizer.
        listener: a bound socket; requests are taken from it once the server runs.
        rows: texts continued together at most.
        chat_template: in the place of the tokenizer's own; None leaves that.
        max_context: tokens of a prompt and its continuation; None takes the model's own bound.
        api_key: clients must send it; None asks for none.
        log_level: uvicorn's: critical, error, warning, info (a line a request) or debug.

    Attributes:
        rows: as it is: 1 where the model's cache cannot be cut into rows.
        has_chat_template: whether chat is answered.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        listener: socket.socket,
        *,
        rows: int,
        chat_template: str | None = None,
        max_context: int | None = None,
        api_key: str | None = None,
        log_level: str = "info",
    ) -> None:
        own = min(context_length(model), int(tokenizer.model_max_length))
        if max_context is not None and max_context > own:
            raise UsageError(
                f"--max-context must be at most the model's own context of {own} tokens, got {max_context}"
            )
        vocabulary = vocabulary_size(model)
        assert vocabulary is not None
        self._listener = listener
        # once before threads share it: a tokenizer sets itself up at its first call
        encode_document(tokenizer, "a")
        self._engine = Engine(model, tokenizer, rows)
        self.rows = self._engine.rows
        served = Served(name, self._engine, tokenizer, vocabulary, max_context or own, chat_template, api_key)
        self.has_chat_template = served.has_chat_template
        # the rest is for a pass of the model, and for clients that do not take what they are told
        seconds = GRACE_SECONDS + _PASS_SECONDS
        config = uvicorn.Config(make_app(served), log_level=log_level, timeout_graceful_shutdown=seconds)
        self._uvicorn = _Uvicorn(config, self._engine)

    def run(self) -> bool:
        """Serve until SIGINT or SIGTERM.

        Returns:
            Whether all work has ended; a pass of the model that takes long cannot be stopped.
        """
        # uvicorn ends in good order and raises what ended it again
        with contextlib.suppress(KeyboardInterrupt):
            self._uvicorn.run(sockets=[self._listener])
        return self._engine.close(_PASS_SECONDS)


class _Uvicorn(uvicorn.Server):
    """A server that tells its clients when it ends."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._engine.end)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to host and port, not listening yet: clients are refused, not kept waiting, while a model loads.

    Args:
        host: a name or address; of a name with both, its IPv4 address is taken.
        port: 0 takes a free one.

    Raises:
        UsageError: the host is unknown, or the port out of range.
        MoESparseError: the port is taken, or may not be used.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be between 0 and 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--host must be a name or address of this machine, got {host!r}") from error
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise MoESparseError(
            f"--port must be one that can be bound, got {port} on {host}: {error.strerror}. Name another with --port"
        ) from error
    return listener


def chat_template(option: str | None) -> str | None:
    """Text of --chat-template.

    Raises:
        UsageError: neither "plain" nor a file of UTF-8 text.
    """
    if option is None or option == "plain":
        return option and PLAIN_TEMPLATE
    try:
        return Path(option).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template must be 'plain' or a file with a Jinja template, got {option!r}") from error
