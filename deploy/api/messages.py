"""Chat messages as clients send them, to what chat templates take: a role and one text, calls of tools, and what they gave.

Text parts are joined by newlines, and the arguments of calls are objects rather than JSON, as with vLLM and transformers. Templates come
from the model, never from a client, who only gives values to names.
"""

from __future__ import annotations

import json
from typing import Any

from ...worker.protocol import BadRequest
from .body import MOST_TOLD, known, no_constant

# developer: OpenAI's newer word
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
NOT_THERE = ("function_call", "audio", "refusal")  # answers sent back hold them as null or []
OF_ROLE = {"tool_calls": "assistant", "tool_call_id": "tool"}  # nobody else's message may have them
HARMLESS = ("name", "annotations", "reasoning", "reasoning_content")


def read_messages(raw: list[Any]) -> list[dict[str, Any]]:
    """Checked messages. Those of tools have a name, too, which some templates want: that of the call that they answer, or else their own.

    Raises:
        BadRequest: with the path of what is wrong, for example `messages.2.content.0.type`.
    """
    if not raw:
        raise BadRequest("messages", "must not be empty")
    messages = [_message(f"messages.{i}", message) for i, message in enumerate(raw)]
    called: dict[str, str] = {}
    for message in messages:
        called |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message.get("tool_call_id") in called:
            message["name"] = called[message["tool_call_id"]]
    return messages


def read_values(raw: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """What a template is to see by name, `enable_thinking` for example.

    Raises:
        BadRequest: a value that is more than a text, a number or a boolean.
    """
    for name, value in raw.items():
        if not isinstance(value, str | int | float) or (type(value) is int and value.bit_length() > 64):
            raise BadRequest(f"chat_template_kwargs.{name}"[:MOST_TOLD], "must be a string, a number or a boolean")
    return raw


def _message(path: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRequest(path, "must be an object")
    role = message.get("role")
    if role == "function":
        raise BadRequest(f"{path}.role", "function messages are not supported; use tool")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequest(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    for name, value in message.items():
        if name in NOT_THERE and value not in (None, []):
            raise BadRequest(f"{path}.{name}", "is not supported" + ("; use tool_calls" if name == "function_call" else ""))
        if name in OF_ROLE and OF_ROLE[name] != role and value not in (None, []):
            raise BadRequest(f"{path}.{name}", f"is only for messages of the role {OF_ROLE[name]}")
        if name not in ("role", "content", *NOT_THERE, *OF_ROLE, *HARMLESS) and value is not None:
            raise BadRequest(f"{path}.{name}"[:MOST_TOLD], "unknown field")
    read: dict[str, Any] = {
        "role": _ROLES[role],
        "content": _content(f"{path}.content", message.get("content"), optional=role == "assistant"),
    }
    if message.get("tool_calls") is not None and role == "assistant":
        calls = _calls(f"{path}.tool_calls", message["tool_calls"])
        return {**read, "tool_calls": calls} if calls else read
    if role == "tool":
        read["tool_call_id"] = _string(f"{path}.tool_call_id", message.get("tool_call_id"))
        if isinstance(message.get("name"), str):
            read["name"] = message["name"]
    return read


def _calls(path: str, raw: Any) -> list[dict[str, Any]]:
    """Calls that an earlier answer held."""
    if not isinstance(raw, list):
        raise BadRequest(path, "must be a list of calls")
    calls = []
    for i, item in enumerate(raw):
        of = f"{path}.{i}"
        call = known(of, item, ("id", "type", "function", "index"))  # answers put together from a stream hold the index, too
        if call.get("type", "function") != "function":
            raise BadRequest(f"{of}.type", "must be function")
        function = known(f"{of}.function", call.get("function"), ("name", "arguments"))
        name, written = (_string(f"{of}.function.{key}", function.get(key)) for key in ("name", "arguments"))
        id = _string(f"{of}.id", call.get("id"))
        calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": _arguments(written)}})
    return calls


def _arguments(written: str) -> Any:
    """The object that a model has written as JSON. What is none (an answer may have been cut off) stays as it is."""
    try:
        arguments = json.loads(written or "{}", parse_constant=no_constant)
        json.dumps(arguments, ensure_ascii=False).encode()  # no half of a surrogate pair, which no tokenizer takes
    except (ValueError, RecursionError):
        return written
    return arguments if isinstance(arguments, dict) else written


def _string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRequest(path, "must be a string")
    return value


def _content(path: str, content: Any, *, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list) or not content:
        raise BadRequest(path, "must be a string or a list of text parts")
    return "\n".join(_text(f"{path}.{i}", part) for i, part in enumerate(content))


def _text(path: str, part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRequest(path, "must be an object with a type")
    if part["type"] != "text":
        raise BadRequest(f"{path}.type", f"{part['type'][:32]!r} parts are not supported; only text is")
    return _string(f"{path}.text", part.get("text"))
