"""Chat records laid out by a tokenizer's own chat template: thinking, tool calls and tools as that template takes them.

A record is a chat by one of these keys, looked for in this order:
    "messages"                   {"role", "content", ...}, with "tools" beside them
    "conversations"              {"from", "value"} (ShareGPT), with "system" and "tools" beside them
    "instruction" and "output"   one question and its answer (Alpaca), with "input" below the question
    "query" and "answers"        a question and the calls that answer it (xLAM), with "tools" beside them

What files keep as JSON in a string, because their columns cannot hold it, is read: messages, tools, answers, and the
"arguments" of a call, which templates take as an object. Text that is given in parts is joined by line ends. Thinking
is handed on under the name that the template reads. All other keys of a message reach the template as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moesparse.errors import MoESparseError, reason_of

__all__ = ["CHAT_COLUMNS", "CHAT_KEYS", "ChatTemplate", "chat_key", "without_nulls"]

CHAT_KEYS = ("messages", "conversations", "instruction", "query")
"""Keys that a record is known to be a chat by."""

CHAT_COLUMNS = (*CHAT_KEYS, "input", "output", "answers", "system", "tools")
"""All keys of a record that are looked at."""

# what stands beside a key whose value is no list of messages
_ANSWER = {"instruction": "output", "query": "answers"}
# who speaks, as ShareGPT calls them
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_ROLES = {"system", "developer", "user", "assistant", "tool"}
# names of what was thought before an answer; the first that a template reads is taken
_THINKING = ("reasoning_content", "thinking", "reasoning")


def chat_key(record: Any) -> str | None:
    """The key by which a record is a chat; None where it is none."""
    if not isinstance(record, Mapping):
        return None
    for key in CHAT_KEYS:
        value = record.get(key)
        if key in _ANSWER:
            if isinstance(value, str) and isinstance(record.get(_ANSWER[key]), str | list):
                return key
        elif isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[")):
            return key
    return None


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers.

    Attributes:
        sha256: of the template.

    Raises:
        MoESparseError: it has none.
    """

    tokenizer: Any
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            whose = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise MoESparseError(
                f"chat records (chat=True) need a tokenizer with a chat template, got {whose} without one: put the "
                'chat_template.jinja of the chat model beside its tokenizer, or give text in "text" without chat=True'
            )
        said = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
        self.sha256 = hashlib.sha256(said.encode()).hexdigest()
        self._reads = [name for name in _THINKING if re.search(rf"\b{name}\b", said)]

    def lay_out(self, record: Mapping[str, Any], key: str, where: str) -> tuple[str, bool]:
        """The text of a record, with all special tokens that the template gives it.

        Args:
            record: a chat.
            key: by which it is one, see `chat_key`.
            where: the record lies, for errors.

        Returns:
            The text, and whether the template has left out all thinking, all calls or all tools of the record.

        Raises:
            MoESparseError: the messages are none, or none that the template takes; says which record.
        """
        messages = [self._named(each) for each in _messages(record, key, where)]
        system, tools = record.get("system"), _unpacked(record.get("tools"))
        if isinstance(system, str) and system:
            messages.insert(0, {"role": "system", "content": system})
        if tools is not None and not isinstance(tools, list):
            raise MoESparseError(f'{where} must have a list of "tools" or none, got a {type(tools).__name__}')
        if not messages:
            raise MoESparseError(f'{where} must have messages in "{key}", got an empty list')
        try:
            text = self.tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        # jinja's errors, and whatever a template says to messages it was not written for
        except Exception as error:
            raise MoESparseError(
                f"{where} must be a chat that the tokenizer's template takes: {reason_of(error)}"
            ) from error
        assert isinstance(text, str)
        return text, any(found and not any(each in text for each in found) for found in _parts(messages, tools or []))

    def _named(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its thinking under a name that the template reads."""
        thought = next((message[name] for name in _THINKING if isinstance(message.get(name), str)), None)
        if thought is None or not self._reads or any(name in message for name in self._reads):
            return message
        return {**message, self._reads[0]: thought}


def without_nulls(value: Any) -> Any:
    """A value of a table without the keys that have none: there every row has the keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _messages(record: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The messages of a record as templates take them."""
    if key == "instruction":
        question = "\n\n".join(each for each in (record[key], record.get("input")) if each)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    if key == "query":
        calls = [{"type": "function", "function": each} for each in _listed(record["answers"], "answers", where)]
        called = {"role": "assistant", "content": "", "tool_calls": calls}
        return [{"role": "user", "content": record[key]}, _message(called, where)]
    return [_message(each, where) for each in _listed(record[key], key, where)]


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message as templates take it."""
    message = {key: each for key, each in value.items() if each is not None} if isinstance(value, Mapping) else {}
    if not isinstance(message.get("role"), str):
        if not isinstance(message.get("from"), str) or "value" not in value:
            raise MoESparseError(f'{where} must have messages with "role" and "content", got {_shown(str(value))}')
        role = _SPEAKERS.get(message["from"], message["from"])
        if role not in _ROLES:
            known = ", ".join([*_SPEAKERS, *sorted(_ROLES)])
            raise MoESparseError(f"{where} must have messages from {known}, got {role!r}")
        more = {name: each for name, each in message.items() if name not in ("from", "value")}
        message = {"role": role, "content": value["value"], **more}
    calls, content = message.get("tool_calls"), message.get("content")
    if isinstance(content, list) and content and all(map(_is_text, content)):
        message["content"] = "\n".join(part["text"] for part in content)
    if calls:
        # OpenAI's null, which few templates look for
        message.setdefault("content", "")
        message["tool_calls"] = [_call(each) for each in calls] if isinstance(calls, list) else calls
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any) -> Any:
    """A call whose arguments are an object, also where it has them as JSON."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"])}
    given = _unpacked(call.get("arguments"))
    return {**call, "arguments": given} if isinstance(given, Mapping) else call


def _parts(messages: list[dict[str, Any]], tools: list[Any]) -> Iterator[list[str]]:
    """What is looked for in the text of a record: its thinking, the names of its calls, and those of its tools."""
    yield [each[name].strip() for each in messages for name in _THINKING if isinstance(each.get(name), str)]
    calls = [call for each in messages if isinstance(each.get("tool_calls"), list) for call in each["tool_calls"]]
    for described in (calls, tools):
        inner = [each.get("function", each) for each in described if isinstance(each, Mapping)]
        yield [str(each["name"]) for each in inner if isinstance(each, Mapping) and "name" in each]


def _listed(value: Any, key: str, where: str) -> list[Any]:
    """A list, also where it is given as JSON."""
    found = _unpacked(value)
    if not isinstance(found, list):
        raise MoESparseError(f'{where} must have a list in "{key}", got {_shown(str(value))}')
    return found


def _unpacked(value: Any) -> Any:
    """What a string says in JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
