"""Bodies of requests, read as OpenAI's API reference describes them: a parameter is honoured or refused by name.

A parameter that is null is as if it were left out. What would ask for something that is not done here (tools, audio, a
format of the answer) is refused unless its value asks for nothing; what is no parameter at all is refused too. Labels
by which OpenAI keeps books (`user`, `metadata` and the like) change no answer and are accepted. Two are not OpenAI's:
`top_k`, and in chat `chat_template_kwargs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesparse.serving.sampling import Sampling

__all__ = ["Asked", "Refused", "read_chat", "read_completion", "read_json"]

MOST_TEXTS = 128
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
_SAMPLING = {"temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "logit_bias", "seed"}
_SHARED = {"model", "max_tokens", "n", "stop", "stream", "stream_options", "logprobs"} | _SAMPLING | _LABELS
_COMPLETION = _SHARED | {"prompt", "echo", "best_of"}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
_NOT_DONE: dict[str, Sequence[Any]] = {
    # of completions
    "suffix": (),
    # of chat; the values that ask for nothing
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class Refused(Exception):
    """A request that is not answered, in the form of OpenAI's errors."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Asked:
    """A request in our words.

    Attributes:
        prompts: of a completion: texts, or token ids; of chat: nothing.
        messages: of chat: role and content of each.
        most: tokens to generate at most; None where the request does not say.
        count: texts for each prompt.
        alternatives: likeliest tokens in each place; None asks for no log-probabilities.
        template: keyword arguments for the chat template.
    """

    prompts: Sequence[str | list[int]]
    messages: Sequence[dict[str, str]]
    sampling: Sampling
    most: int | None
    count: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    alternatives: int | None = None
    echo: bool = False
    template: Mapping[str, Any] | None = None


def read_json(body: bytes) -> dict[str, Any]:
    """The one object of a body.

    Raises:
        Refused: it is no JSON, or another value.
    """

    def no_number(word: str) -> float:
        raise ValueError(f"{word} is no number of JSON")

    try:
        found = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body must be JSON, got what cannot be read as it: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"the body must be a JSON object, got {_kind(found)}")
    return {name: value for name, value in found.items() if value is not None}


def read_completion(body: dict[str, Any], vocabulary: int) -> Asked:
    """A body of /v1/completions.

    Args:
        vocabulary: token ids are below it.

    Raises:
        Refused: names the parameter.
    """
    _check_known(body, _COMPLETION)
    count = _whole(body, "n", 1, 1, MOST_TEXTS)
    best = _whole(body, "best_of", count, 1, MOST_TEXTS)
    if best != count:
        raise Refused(f"best_of must be left out or equal to n = {count}, got {best}", "best_of", "unsupported_value")
    prompts = _prompts(body, vocabulary)
    if len(prompts) * count > MOST_TEXTS:
        raise Refused(
            f"prompt times n must ask for at most {MOST_TEXTS} texts, got {len(prompts)} times {count}", "prompt"
        )
    alternatives = _whole(body, "logprobs", 0, 0, 5) if "logprobs" in body else None
    return Asked(
        prompts=prompts,
        messages=(),
        most=_whole(body, "max_tokens", 0, 0) if "max_tokens" in body else None,
        count=count,
        alternatives=alternatives,
        echo=_flag(body, "echo"),
        **_shared(body, vocabulary),
    )


def read_chat(body: dict[str, Any], vocabulary: int) -> Asked:
    """A body of /v1/chat/completions; see `read_completion`."""
    _check_known(body, _CHAT)
    most = {_whole(body, name, 0, 1) for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(most) > 1:
        raise Refused("max_completion_tokens must not differ from max_tokens", "max_completion_tokens")
    noted = _flag(body, "logprobs")
    if "top_logprobs" in body and not noted:
        raise Refused("top_logprobs must be given with logprobs = true", "top_logprobs")
    top = _whole(body, "top_logprobs", 0, 0, 20)
    template = body.get("chat_template_kwargs", {})
    if not isinstance(template, dict):
        raise _wrong("chat_template_kwargs", "an object", template)
    return Asked(
        prompts=(),
        messages=_messages(body),
        most=next(iter(most), None),
        count=_whole(body, "n", 1, 1, MOST_TEXTS),
        alternatives=top if noted else None,
        template=template,
        **_shared(body, vocabulary),
    )


def _shared(body: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    stream = _flag(body, "stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not {*options} <= {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", "an object with include_usage", options)
    if options and not stream:
        raise Refused("stream_options must be given with stream = true", "stream_options")
    if _flag(options, "include_obfuscation", "stream_options."):
        raise Refused("stream_options.include_obfuscation is not done here", "stream_options", "unsupported_value")
    sampling = Sampling(
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
        top_k=_top_k(body),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_bias(body, vocabulary),
        seed=_whole(body, "seed", 0, -(1 << 63), (1 << 63) - 1) if "seed" in body else None,
    )
    usage = _flag(options, "include_usage", "stream_options.")
    return {"sampling": sampling, "stop": _stop(body), "stream": stream, "usage": usage}


def _check_known(body: dict[str, Any], known: Collection[str]) -> None:
    for name, value in body.items():
        if name in known:
            continue
        if name not in _NOT_DONE:
            raise Refused(f"unrecognized request argument supplied: {name}", name, "unknown_parameter")
        if not any(value == nothing and type(value) is type(nothing) for nothing in _NOT_DONE[name]):
            raise Refused(f"{name} must be left out: it is not done here", name, "unsupported_parameter")


def _prompts(body: dict[str, Any], vocabulary: int) -> list[str | list[int]]:
    given = body.get("prompt")
    if given is None:
        raise Refused("prompt must be given, got none", "prompt", "missing_required_parameter")
    many = isinstance(given, list) and given and not all(_is_whole(each) for each in given)
    prompts = given if many else [given]
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_text(prompt, "prompt")
        elif not isinstance(prompt, list) or not all(_is_whole(each) for each in prompt):
            raise _wrong("prompt", "a string, an array of strings, of token ids, or of arrays of token ids", given)
        elif not all(0 <= each < vocabulary for each in prompt):
            raise Refused(f"prompt must hold token ids in 0..{vocabulary - 1}, got others", "prompt")
    return prompts


def _messages(body: dict[str, Any]) -> list[dict[str, str]]:
    given = body.get("messages")
    if given is None:
        raise Refused("messages must be given, got none", "messages", "missing_required_parameter")
    if not isinstance(given, list) or not given:
        raise _wrong("messages", "an array of at least one message", given)
    return [_message(message, f"messages[{place}]") for place, message in enumerate(given)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _wrong(where, "an object with role and content", message, "messages")
    for name, value in message.items():
        if name not in ("role", "content", "name", "refusal") and value not in (None, []):
            raise Refused(f"{where}.{name} must be left out: it is not done here", "messages", "unsupported_parameter")
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise Refused(f"{where}.role must be system, developer, user or assistant, got {_shown(role)}", "messages")
    # what OpenAI calls developer is system to the templates of models
    found = {"role": "system" if role == "developer" else role, "content": _content(message.get("content"), where)}
    if message.get("name") is not None:
        if not isinstance(message["name"], str):
            raise _wrong(f"{where}.name", "a string", message["name"], "messages")
        _check_text(message["name"], "messages")
        found["name"] = message["name"]
    return found


def _content(content: Any, where: str) -> str:
    """The text of a message; of several parts one behind the other."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise _wrong(f"{where}.content", "a string or an array of text parts", content, "messages")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            got = f"a part of type {_shown(kind)}" if isinstance(kind, str) and kind != "text" else _shown(part)
            raise Refused(f"{where}.content must hold text parts only, got {got}", "messages", "unsupported_value")
        _check_text(part["text"], "messages")
        texts.append(part["text"])
    return "".join(texts)


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    given = body.get("stop", [])
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("stop", "a string or an array of at most 4 strings, none of them empty", given)
    return tuple(stops)


def _bias(body: dict[str, Any], vocabulary: int) -> dict[int, float]:
    given = body.get("logit_bias", {})
    if not isinstance(given, dict):
        raise _wrong("logit_bias", "an object of token ids and numbers", given)
    found = {}
    for name in given:
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
        if not 0 <= token < vocabulary:
            raise Refused(f"logit_bias must name token ids in 0..{vocabulary - 1}, got {_shown(name)}", "logit_bias")
        found[token] = _number(given, name, 0.0, -100.0, 100.0, "logit_bias.")
    return found


def _top_k(body: dict[str, Any]) -> int:
    # other servers write "all" as -1
    return max(0, _whole(body, "top_k", 0, -1))


def _flag(values: dict[str, Any], name: str, where: str = "") -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(f"{where}{name}", "true or false", value)
    return value


def _whole(values: dict[str, Any], name: str, default: int, least: int, most: int | None = None) -> int:
    value = values.get(name, default)
    if not _is_whole(value) or value < least or (most is not None and value > most):
        raise _wrong(
            name, f"an integer of {least} or more" if most is None else f"an integer in {least}..{most}", value
        )
    return value


def _number(values: dict[str, Any], name: str, default: float, least: float, most: float, where: str = "") -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _wrong(f"{where}{name}", f"a number in {least:g}..{most:g}", value)
    # JSON's 1e999 is inf, which the bounds refuse
    assert math.isfinite(value)
    return float(value)


def _check_text(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{param} must be valid Unicode, got half a surrogate pair", param) from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, wanted: str, got: Any, param: str | None = None) -> Refused:
    return Refused(f"{name} must be {wanted}, got {_shown(got)}", param or name.partition(".")[0], "invalid_value")


def _shown(value: Any) -> str:
    """A value in an error: short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{_kind(value)} of {len(text)} characters"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
