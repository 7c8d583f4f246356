"""transformers' OpenAI-compatible server, for packed and dense checkpoints alike.

The server is `transformers serve` itself, with every option it has. Around it: a checkpoint that was packed loads, the
model goes by the name the user gave, a request that cannot be answered gets a 400 with a reason, and Ctrl-C ends it.

`transformers.cli.serve.Serve` is not public API; tests/packed/test_serve.py is the contract.
"""

from __future__ import annotations

import inspect
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.cli.serve import Serve

import moesparse.packed.quantizer  # noqa: F401, packed checkpoints too
from moesparse.errors import CheckpointError, MoESparseError, UsageError, reason_of
from moesparse.models.modes import let_experts_run

__all__ = ["PLAIN_TEMPLATE", "Server", "bind", "serve_signature"]

GRACE_SECONDS = 1
"""Given to requests under way once the server was told to end; a generation that takes longer is dropped."""

PLAIN_TEMPLATE = (
    "{% set text = messages | map(attribute='content') | join('\n') %}"
    "{{ text if text | trim else raise_exception('messages must hold text, got none') }}"
)
"""The messages' texts, line after line: the model goes on from the last one, as a base model does."""

_NO_TEMPLATE = (
    "{{ raise_exception('this model has no chat template: use /v1/completions, or start the server with "
    "--chat-template plain or a template file') }}"
)

_logger = logging.getLogger(__name__)


class Server(Serve):
    """One model behind transformers' server.

    Args:
        name: what clients call the model.
        source: folder or hub id it is loaded from.
        listener: a bound socket; requests are taken from it once the model is loaded.
        chat_template: for chat; None leaves the model its own, or refuses chat where it has none.
        options: those of `transformers serve`.

    Raises:
        CheckpointError: transformers cannot load the model, or an option is out of range.
    """

    def __init__(
        self, name: str, source: str, listener: socket.socket, chat_template: str | None = None, **options: Any
    ) -> None:
        # Serve loads the model and, when it should not block, calls start_server, which here only makes ready
        try:
            super().__init__(force_model=source, non_blocking=True, **options)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            # the last where the processor of a model for images needs a package that is not there
            unknown = "unknown value " if isinstance(error, KeyError) else ""
            raise CheckpointError(f"cannot serve {name!r}: {unknown}{reason_of(error)}") from error
        manager: Any = self._model_manager
        loaded = manager.loaded_models.pop(manager.process_model_name(source))
        manager.loaded_models[manager.process_model_name(name)] = loaded
        let_experts_run(loaded.model)
        manager.force_model = name
        listed = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "moesparse"}
        manager.get_gen_models = lambda: [listed]
        self.has_chat_template = bool(chat_template or getattr(loaded.processor, "chat_template", None))
        if chat_template or not self.has_chat_template:
            loaded.processor.chat_template = chat_template or _NO_TEMPLATE
        self._listener = listener

    def start_server(self) -> None:
        """Answer a request that cannot be served with 400 instead of an internal error."""
        import jinja2

        app: Any = self.server.config.app
        for error in (ValueError, TypeError, KeyError, jinja2.TemplateError):
            app.add_exception_handler(error, _bad_request)
        handler: Any = self._completion_handler
        complete = handler.handle_request

        async def check_and_complete(body: dict[str, Any], request_id: str) -> Any:
            # no tokens at all would end the worker of continuous batching, and every request after
            [loaded] = self._model_manager.loaded_models.values()
            tokenizer: Any = getattr(loaded.processor, "tokenizer", loaded.processor)
            if not body.get("prompt") and not tokenizer("")["input_ids"]:
                raise ValueError("prompt must hold at least one token, got none")
            return await complete(body, request_id)

        handler.handle_request = check_and_complete

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM. A generation that is under way then may still run in its thread afterwards."""
        self.server.config.timeout_graceful_shutdown = GRACE_SECONDS
        try:
            self.server.run(sockets=[self._listener])
        except KeyboardInterrupt:
            # uvicorn ended in good order and raises what ended it again
            pass
        finally:
            # the lifespan of transformers' app leaves the thread of continuous batching running
            self._generation_state.shutdown()
            self._model_manager.shutdown()


def _bad_request(_request: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    reason = f"the request must have the field {error}" if isinstance(error, KeyError) else str(error)
    _logger.warning("request refused: %s", reason, exc_info=error if os.environ.get("MOESPARSE_TRACEBACK") else None)
    body = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=400)


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


def serve_signature(run: Callable[..., None]) -> Callable[..., None]:
    """Give a command `run(model, chat_template, **options)` the options of `transformers serve` beside its own."""
    theirs = inspect.signature(Serve.__init__, eval_str=True).parameters
    skip = {"self", "force_model", "non_blocking", "model_timeout"}
    own = {
        "model": Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo' for the embedded model.")],
        "chat_template": Annotated[
            str | None,
            typer.Option(help="For chat: a file with a Jinja template, or 'plain': the messages' texts as they are."),
        ],
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("model", kind, annotation=own["model"]),
        *(one.replace(kind=kind) for name, one in theirs.items() if name not in skip),
        inspect.Parameter("chat_template", kind, annotation=own["chat_template"], default=None),
    ]
    command: Any = run
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
