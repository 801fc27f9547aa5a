"""Chat messages as clients send them, to what chat templates take: a role and one text.

Text parts are joined by newlines, as vLLM does. Templates come from the model, never from a client, who only gives values to names.
"""

from __future__ import annotations

from typing import Any

from ...worker.protocol import BadRequest
from .body import MOST_TOLD

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # developer: OpenAI's newer word
NOT_THERE = ("tool_calls", "function_call", "audio", "refusal")  # answers sent back hold them as null or []
HARMLESS = ("name", "annotations", "reasoning", "reasoning_content")


def read_messages(raw: list[Any]) -> list[dict[str, str]]:
    """Checked messages.

    Raises:
        BadRequest: with the path of what is wrong, for example `messages.2.content.0.type`.
    """
    if not raw:
        raise BadRequest("messages", "must not be empty")
    return [_message(f"messages.{i}", message) for i, message in enumerate(raw)]


def read_values(raw: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """What a template is to see by name, `enable_thinking` for example.

    Raises:
        BadRequest: a value that is more than a text, a number or a boolean.
    """
    for name, value in raw.items():
        if not isinstance(value, str | int | float) or (type(value) is int and value.bit_length() > 64):
            raise BadRequest(f"chat_template_kwargs.{name}"[:MOST_TOLD], "must be a string, a number or a boolean")
    return raw


def _message(path: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRequest(path, "must be an object")
    role = message.get("role")
    if role in ("tool", "function"):
        raise BadRequest(f"{path}.role", f"{role} messages are not supported")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequest(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    for name, value in message.items():
        if name in NOT_THERE and value not in (None, []):
            raise BadRequest(f"{path}.{name}", "is not supported")
        if name not in ("role", "content", *NOT_THERE, *HARMLESS) and value is not None:
            raise BadRequest(f"{path}.{name}"[:MOST_TOLD], "unknown field")
    return {"role": _ROLES[role], "content": _content(f"{path}.content", message.get("content"), optional=role == "assistant")}


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
    if not isinstance(part.get("text"), str):
        raise BadRequest(f"{path}.text", "must be a string")
    text: str = part["text"]
    return text
