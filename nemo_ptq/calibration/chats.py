# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Samples of calibration data: texts, and chats in the common forms. Imports nothing heavy."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import parse_json

# A chat message: a "role", and "content" or, of an assistant, "tool_calls".
Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A chat that is more than its messages.

    Attributes:
        messages: See :data:`Message`.
        tools: Tools that the assistant may call, as OpenAI's API describes them.
        may_be_plain: Whether it is written as plain text for a tokenizer without a chat template.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    may_be_plain: bool = False


# A text, a chat, or a list of messages alone.
Sample = Union[str, list[Message], Chat]

_COLUMNS = ("text", "messages", "conversations")
_WANTED = 'a "text" string or a "messages" list of role and content'
# Roles of a ShareGPT conversation, which names them "from".
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bot", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_sample(record: Any, where: str, column: str | None = None) -> Sample:
    """Makes a sample of a row of a data set.

    Args:
        record: The row. "text" holds a text; "messages" and "conversations" hold a chat, in OpenAI's form or
            ShareGPT's, and "tools" its tools.
        where: Name of the row in error messages.
        column: Which key holds the text or the chat; None takes the first of those above.

    Raises:
        PtqError: If the row holds neither.
    """
    if not isinstance(record, Mapping):
        raise PtqError(f'{where}: needs an object with "text" or "messages", not {type(record).__name__}')
    names = _COLUMNS if column is None else (column,)
    for name in names:
        value = record.get(name)
        if isinstance(value, str):
            written = None if name == "text" else _messages_in_json(value)
            if written is None:
                return _sound_text(value, where)
            value = written
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            messages = [_message(message, where) for message in value]
            tools = _tools(record.get("tools"), where)
            if isinstance(record.get("system"), str) and record["system"] and name == "conversations":
                messages.insert(0, {"role": "system", "content": _sound_text(record["system"], where)})
            return Chat(messages, tools) if tools else messages
    present = [name for name in names if name in record]
    if present and all(record[name] is None for name in present):
        return ""  # as tables have it for a row without a text
    if present:
        kind = type(record[present[0]]).__name__
        raise PtqError(f"{where}: {present[0]} is of type {kind}, and must be a text, or a list of messages")
    found = ", ".join(sorted(map(str, record))) or "none"
    if column is not None:
        raise PtqError(f"{where}: has no text and no messages in column {column}; found keys: {found}")
    raise PtqError(f"{where}: needs {_WANTED}; found keys: {found}; ,column=NAME behind the data set names another")


def _messages_in_json(text: str) -> list[Any] | None:
    """The messages in a text that is JSON, as tables often store them; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = parse_json(text, finite=False)
    except ValueError:
        return None
    is_chat = isinstance(found, list) and all(isinstance(one, dict) and {"role", "from"} & one.keys() for one in found)
    return found if is_chat and found else None


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise PtqError(f"{where}: a message must be an object with role and content, not {type(message).__name__}")
    if "role" not in message and "from" in message:
        role = _SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None or not isinstance(message.get("value"), str):
            raise PtqError(
                f"{where}: a message from {message['from']!r} is not known: it must have a text as value, and be from "
                f"{', '.join(_SHAREGPT_ROLES)}"
            )
        text = _sound_text(message["value"], where)
        if str(message["from"]).lower() == "function_call":
            called = _parsed(text, f"{where}: a message from 'function_call'")
            functions = called if isinstance(called, list) else [called]
            made = [_tool_call({"type": "function", "function": function}, where) for function in functions]
            return {"role": role, "content": "", "tool_calls": made}
        return {"role": role, "content": text}
    role, calls = message.get("role"), message.get("tool_calls") or None
    if calls is None and message.get("function_call"):  # the older form of OpenAI's API
        calls = [{"type": "function", "function": message["function_call"]}]
    if calls is not None and (isinstance(calls, str | Mapping) or not isinstance(calls, Sequence)):
        raise PtqError(f"{where}: tool_calls must be a list of calls, not {type(calls).__name__}")
    if not isinstance(role, str) or ("content" not in message and not calls):
        keys = ", ".join(sorted(map(str, message))) or "none"
        raise PtqError(f"{where}: a message needs role and content; found keys: {keys}")
    # Data sets with columns have every key in every message.
    kept = {key: value for key, value in message.items() if value is not None}
    kept["content"] = _content(message.get("content"), where)
    for name in ("tool_calls", "function_call"):
        kept.pop(name, None)
    if calls:
        kept["tool_calls"] = [_tool_call(call, where) for call in calls]
    return kept


def _content(content: Any, where: str) -> str:
    """The text of a message, which may be a list of parts, or missing beside tool calls."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _sound_text(content, where)
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return _sound_text("".join(part["text"] for part in content), where)
    raise PtqError(
        f"{where}: the content of a message must be a text, or a list of parts with texts; take the sample out"
    )


def _tool_call(call: Any, where: str) -> Any:
    """A tool call with its arguments as an object, which templates write as JSON; OpenAI's API has JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PtqError(f"{where}: a tool call needs a function with a name")
    arguments = function.get("arguments")
    return {**call, "function": {**function, "arguments": _parsed(arguments, f"{where}: arguments of a tool call")}}


def _tools(tools: Any, where: str) -> Sequence[Mapping[str, Any]] | None:
    found = _parsed(tools, f"{where}: tools")
    if not found:
        return None
    if not isinstance(found, Sequence) or not all(isinstance(tool, Mapping) for tool in found):
        raise PtqError(f"{where}: tools must be a list of objects")
    return found


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, finite=False) if value.strip() else None
    except ValueError as error:
        raise PtqError(f"{what}: not JSON ({error})") from error


def _sound_text(text: str, where: str) -> str:
    if half := _SURROGATE.search(text):
        raise PtqError(
            f"{where}: the text has half of a character ({half[0]!a} at character {half.start()}), which no "
            "tokenizer takes: write the file again in UTF-8"
        )
    return text


def plain_text(messages: Iterable[Message]) -> str:
    """Writes a chat as plain text, for a tokenizer without a chat template."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def with_system_in_first_turn(messages: Sequence[Message]) -> list[Message] | None:
    """Puts the system's text before the user's first message, as model families without a system role do.

    Returns:
        None where the chat does not begin with a system's message and a user's.
    """
    if [message.get("role") for message in messages[:2]] != ["system", "user"]:
        return None
    system, first, *others = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
