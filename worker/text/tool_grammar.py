"""The grammar of calls: a model that follows it writes them in its own format, of tools that there are, with arguments of their schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .grammar import BLANKS, from_lark
from .tool_format import ToolFormat

MOST_CALLS = 16  # in one answer; without a bound a weak model may call until `max_tokens`

# With one of these a schema may name properties elsewhere than in its own `properties`.
_ELSEWHERE = frozenset("$ref $dynamicRef allOf anyOf oneOf if then else dependentSchemas patternProperties unevaluatedProperties".split())
_TEXT = r"TEXT: /(.|\n)*/"


class ToolSchema(NamedTuple):
    """A tool's name, and the JSON schema of its arguments."""

    name: str
    schema: Mapping[str, Any]


def calls_grammar(
    format: ToolFormat,
    tools: Sequence[ToolSchema],
    special: Mapping[str, int],
    *,
    single: bool = False,
    or_text: bool = False,
    or_json: Mapping[str, Any] | None = None,
) -> str:
    """The grammar (`SamplingParams.grammar`) of one or more calls.

    Args:
        format: how the model writes calls.
        tools: what can be called; one at least.
        special: the markers of the format that are special tokens.
        single: of one call.
        or_text: of any text, in which what opens calls is followed by calls.
        or_json: of calls, or else of JSON of this schema.
    """
    if or_text and format.bare:
        # What begins like a call is one. The marker is a special token, which text has none of, or text like any other.
        start = [r"start: calls | TEXT?", r"TEXT: /[ \t\r\n]*[^{ \t\r\n](.|\n)*/"]
    elif or_text:
        start = ["start: (head calls)* TEXT", _TEXT, _head(format.marker, special)]
    elif or_json is not None:
        start = ["start: calls | answer", f"answer: %json {_json(_guided(or_json))}"]
    else:
        start = ["start: calls"]
    opened = or_text and not format.bare
    opening = " | ".join(_written(each.removeprefix(format.marker) if opened else each, special) for each in format.opening)
    several = format.between is not None and not single and not (opened and format.end)  # there each has a head of its own
    more = f" ({_written(format.between or '', special)} call){{0,{MOST_CALLS - 1}}}" if several else ""
    rules = [
        f"calls: ({opening}) call{more} {_written(format.closing, special)}",
        f'call: {_quoted(chr(123) + _json("name") + ": ")} ({" | ".join(f"tool_{i}" for i in range(len(tools)))}) "}}"',
    ]
    for i, tool in enumerate(tools):
        begun = f"{_json(tool.name)}, {_json(format.arguments)}: "
        rules.append(f"tool_{i}: {_quoted(begun)} %json {_json(arguments_schema(tool.schema))}")
    return from_lark("\n".join([*start, *rules]))


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema as one of JSON: an object that, like a function, has the parameters that are named and no others, unless the schema
    says otherwise."""
    closed = "properties" in schema and not _ELSEWHERE.intersection(schema)
    return _guided({"type": "object", **({"additionalProperties": False} if closed else {}), **schema})


def _guided(schema: Mapping[str, Any]) -> dict[str, Any]:
    """With the same blanks as in every JSON here, unless it has its own settings."""
    return {"x-guidance": {"whitespace_pattern": BLANKS}, **schema}


def _head(marker: str, special: Mapping[str, int]) -> str:
    """Text up to the marker that opens calls."""
    return f"head: TEXT {_written(marker, special)}" if marker in special else f"head[lazy]: TEXT {_quoted(marker)}"


def _written(text: str, special: Mapping[str, int]) -> str:
    """A text in Lark's notation; special tokens in it as their ids."""
    if not text:
        return '""'
    pattern = "|".join(map(re.escape, special))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else _quoted(part) for part in parts if part)


def _quoted(text: str) -> str:
    return json.dumps(text)  # Lark's strings are written as JSON's


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
