"""The routes: who may ask, what is asked, and texts for the engine that answer it."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from moesparse.errors import reason_of
from moesparse.serving.answers import Chat, Completion, dump, error_body, failed
from moesparse.serving.engine import Engine, Text
from moesparse.serving.requests import Asked, Refused, read_chat, read_completion, read_json
from moesparse.serving.running import Events, Running, chunks
from moesparse.text import encode_document

__all__ = ["Served", "make_app"]

MOST_BYTES = 16 << 20
"""Of a request's body."""

MOST_WAITING = 512
"""Texts that may wait for a row."""

_DEFAULT_TOKENS = 16
"""Of a completion, as OpenAI has it; a chat's answer ends by itself or with the context."""


@dataclass(frozen=True)
class Served:
    """The one model of a server.

    Attributes:
        name: what clients call it.
        vocabulary: token ids are below it.
        context: tokens of a prompt and its continuation together.
        chat_template: in the place of the tokenizer's own; None leaves that.
        api_key: clients must send it; None asks for none.
    """

    name: str
    engine: Engine
    tokenizer: Any
    vocabulary: int
    context: int
    chat_template: str | None = None
    api_key: str | None = None

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template or getattr(self.tokenizer, "chat_template", None))


def make_app(served: Served) -> Starlette:
    """The application.

    It answers /v1/completions, /v1/chat/completions, /v1/models, /v1/models/NAME and /health.
    """
    started = int(time.time())
    card = {"id": served.name, "object": "model", "created": started, "owned_by": "moesparse"}

    async def completions(request: Request) -> Response:
        return await _answered(request, served, _completion)

    async def chat(request: Request) -> Response:
        return await _answered(request, served, _chat)

    async def models(request: Request) -> Response:
        _check_key(request, served)
        return _json({"object": "list", "data": [card | {"max_model_len": served.context}]})

    async def model(request: Request) -> Response:
        _check_key(request, served)
        _check_name(request.path_params["name"], served)
        return _json(card | {"max_model_len": served.context})

    async def health(_request: Request) -> Response:
        active, waiting = served.engine.load
        return _json({"status": "ok", "texts": active, "waiting": waiting})

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
    ]
    handlers: dict[Any, Callable[..., Any]] = {Refused: _refusal, HTTPException: _not_here, Exception: _failure}
    return Starlette(routes=routes, exception_handlers=handlers)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status, headers, media_type="application/json")


async def _refusal(_request: Request, error: Refused) -> Response:
    return _json(error_body(error), error.status)


async def _not_here(request: Request, error: HTTPException) -> Response:
    said = Refused(f"{error.detail}: {request.method} {request.url.path}", status=error.status_code)
    return _json(error_body(said), error.status_code, dict(error.headers or {}))


async def _failure(_request: Request, error: Exception) -> Response:
    return _json(error_body(failed(error)), 500)


def _check_key(request: Request, served: Served) -> None:
    if served.api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), served.api_key.encode()):
        raise Refused(
            "the Authorization header must be 'Bearer KEY' with this server's key", None, "invalid_api_key", 401
        )


def _check_name(name: Any, served: Served) -> None:
    if name is None:
        raise Refused("model must be given, got none", "model", "missing_required_parameter")
    if name != served.name:
        raise Refused(
            f"model must be {served.name!r}, which is served here, got {name!r}", "model", "model_not_found", 404
        )


async def _body(request: Request) -> bytes:
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            if len(found) > MOST_BYTES:
                raise Refused(f"the body must be at most {MOST_BYTES} bytes, got more", status=413)
    except ClientDisconnect as error:
        raise Refused("the body must be sent whole, got a part of it") from error
    return bytes(found)


Prepared = tuple[Asked, list[list[int]], "Completion | Chat"]


async def _answered(
    request: Request, served: Served, prepare: Callable[[dict[str, Any], Served], Prepared]
) -> Response:
    _check_key(request, served)
    body = read_json(await _body(request))
    _check_name(body.get("model"), served)
    # tokenizers take a while over long texts, and let other threads run meanwhile
    asked, prompts, answer = await run_in_threadpool(prepare, body, served)
    waiting = served.engine.load[1]
    count = len(prompts) * asked.count
    if waiting + count > MOST_WAITING:
        raise Refused(f"{waiting} texts wait already: try again later", None, "rate_limit_exceeded", 429)
    running = Running(served.engine, _texts(asked, prompts, served, isinstance(answer, Completion)))
    prompt_tokens = sum(map(len, prompts))
    if asked.stream:
        return Events(chunks(running, answer, prompt_tokens), running)
    texts = await running.collected(request)
    # nobody reads the second
    return Response(status_code=499) if texts is None else _json(answer.whole(texts, prompt_tokens))


def _completion(body: dict[str, Any], served: Served) -> Prepared:
    asked = read_completion(body, served.vocabulary)
    tokenizer = served.tokenizer
    prompts = [
        encode_document(tokenizer, prompt, ends=False) if isinstance(prompt, str) else prompt
        for prompt in asked.prompts
    ]
    for ids in prompts:
        _check_length(ids, asked, served, "prompt")
    echoes = [_echo(prompt, tokenizer) if asked.echo else "" for prompt in asked.prompts for _ in range(asked.count)]
    return asked, prompts, Completion(served.name, asked.alternatives is not None, asked.usage, echoes)


def _echo(prompt: str | list[int], tokenizer: Any) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=True)


def _chat(body: dict[str, Any], served: Served) -> Prepared:
    asked = read_chat(body, served.vocabulary)
    ids = served.tokenizer(_rendered(asked, served), add_special_tokens=False, verbose=False)["input_ids"]
    _check_length(ids, asked, served, "messages")
    return asked, [ids], Chat(served.name, asked.alternatives is not None, asked.usage)


def _rendered(asked: Asked, served: Served) -> str:
    """The messages as the chat template writes them."""
    if not served.has_chat_template:
        raise Refused(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template plain or a "
            "template file"
        )
    ours = {"chat_template": served.chat_template, "add_generation_prompt": True, "tokenize": False}
    taken = {*ours, "conversation", "tools", "documents", "return_tensors", "return_dict", "continue_final_message"}
    if strange := sorted(taken & {*(asked.template or {})}):
        raise Refused(f"chat_template_kwargs must leave out {', '.join(strange)}", "chat_template_kwargs")
    try:
        return served.tokenizer.apply_chat_template(list(asked.messages), **ours, **(asked.template or {}))
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"the chat template refuses these messages: {reason_of(error)}", "messages") from error


def _check_length(ids: Sequence[int], asked: Asked, served: Served, param: str) -> None:
    if not ids:
        raise Refused(f"{param} must hold at least one token, got none", param)
    least = 1 if asked.most is None else asked.most
    if len(ids) + least > served.context:
        wanted = "" if asked.most is None else f" and {asked.most} to generate"
        raise Refused(
            f"this model's context holds {served.context} tokens, got {len(ids)} in {param}{wanted}",
            param,
            "context_length_exceeded",
        )


def _texts(asked: Asked, prompts: Sequence[list[int]], served: Served, joined: bool) -> list[Text]:
    """Those that a request asks for; `joined` to their prompts, as completions are."""
    found = []
    for place, ids in enumerate(prompts):
        room = served.context - len(ids)
        left_out = min(_DEFAULT_TOKENS, room) if joined else room
        found += [
            Text(
                prompt=ids,
                most=left_out if asked.most is None else asked.most,
                sampling=asked.sampling,
                index=place * asked.count + copy,
                stop=asked.stop,
                joined=joined,
                alternatives=asked.alternatives,
                score_prompt=asked.echo and asked.alternatives is not None,
            )
            for copy in range(asked.count)
        ]
    return found
