"""Tools and their calls in a conversation, as chat templates take them; and for templates that know of no tools, in words."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

Message = dict[str, Any]

# What Hermes and Qwen models are told of tools, so that those trained on it, or on an imitation, know what is meant.
_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query. Their signatures, in JSON, are:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and its arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-as-a-JSON-object>}}
</tool_call>"""


def uses_tools(messages: Iterable[Mapping[str, Any]], tools: Sequence[Any]) -> bool:
    """Whether a template has to know of tools for this conversation."""
    return bool(tools) or any(message.get("role") == "tool" or message.get("tool_calls") for message in messages)


def in_words(messages: Sequence[Message], tools: Sequence[Any], has_system: bool = True) -> list[Message]:
    """The conversation with Hermes' words for tools: in the system's message what there are, in the assistant's what it has called, and
    what came back as a message of the user's.

    Args:
        messages: every content must be a text.
        tools: that may be called.
        has_system: the template takes a message of the system's; otherwise the user's first one tells of the tools.
    """
    said: list[Message] = []
    for answers, group in groupby(messages, lambda message: message["role"] == "tool"):
        if answers:
            texts = [f"<tool_response>\n{message['content']}\n</tool_response>" for message in group]
            said.append({"role": "user", "content": "\n".join(texts)})
        else:
            said += map(_spoken, group)
    if tools:
        told = _INSTRUCTIONS.format(tools="\n".join(_json(tool) for tool in tools))
        first = said[0]["role"] if said else ""
        if first == "system":
            said[0]["content"] = f"{said[0]['content']}\n\n{told}".lstrip()
        elif first == "user" and not has_system:
            said[0]["content"] = f"{told}\n\n{said[0]['content']}"
        else:
            said.insert(0, {"role": "system" if has_system else "user", "content": told})
    return said


def with_short_ids(messages: Sequence[Message], length: int) -> list[Message]:
    """The conversation with ids of calls that have so many letters and digits, each the same for the same id."""

    def short(id: Any) -> str:
        text = str(id)
        if len(text) == length and text.isascii() and text.isalnum():
            return text
        return base64.b32encode(hashlib.blake2b(text.encode()).digest()).decode()[:length]

    def changed(message: Message) -> Message:
        calls = [{**call, "id": short(call.get("id"))} for call in message.get("tool_calls") or ()]
        answers = {"tool_call_id": short(message["tool_call_id"])} if "tool_call_id" in message else {}
        return {**message, **answers, **({"tool_calls": calls} if calls else {})}

    return [changed(message) for message in messages]


def _spoken(message: Message) -> Message:
    if not message.get("tool_calls"):
        return dict(message)
    texts = [message["content"], *(_call(each["function"]) for each in message["tool_calls"])]
    return {"role": message["role"], "content": "\n".join(filter(None, texts))}


def _call(function: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{_json({'name': function['name'], 'arguments': function['arguments']})}\n</tool_call>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
