"""The grammar of calls: a model that follows it writes them in its own format, of tools that there are, with arguments of their schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..protocol import BadRequest
from .grammar import BLANKS, from_lark
from .tool_format import ToolFormat

MOST_CALLS = 16  # in one answer; without a bound a weak model may call until `max_tokens`

# With one of these a schema may name properties elsewhere than in its own `properties`.
_ELSEWHERE = frozenset("$ref $dynamicRef allOf anyOf oneOf if then else dependentSchemas patternProperties unevaluatedProperties".split())


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

    Raises:
        BadRequest: a schema is nested too deeply.
    """
    headed = or_text and not format.bare
    rules = [*_start(format, special, or_text, or_json), _calls(format, special, headed, single)]
    return from_lark("\n".join(rules + _call(format, tools)))


def _start(format: ToolFormat, special: Mapping[str, int], or_text: bool, or_json: Mapping[str, Any] | None) -> list[str]:
    """What the whole answer is."""
    if or_json is not None:
        return ["start: calls | answer", f"answer: %json {_json(_guided(or_json))}"]
    if not or_text:
        return ["start: calls"]
    if format.bare:  # what begins like a call is one
        return ["start: calls | TEXT?", r"TEXT: /[ \t\r\n]*[^{ \t\r\n](.|\n)*/"]
    if format.marker in special:  # which text has none of
        head = f"head: TEXT {_written(format.marker, special)}"
    else:
        head = f"head[lazy]: TEXT {_quoted(format.marker)}"
    return ["start: (head calls)* TEXT", r"TEXT: /(.|\n)*/", head]


def _calls(format: ToolFormat, special: Mapping[str, int], headed: bool, single: bool) -> str:
    """The calls with what stands around them; `headed`: behind the marker."""
    opening = " | ".join(_written(each.removeprefix(format.marker) if headed else each, special) for each in format.opening)
    more = ""
    if format.between is not None and not single and not (headed and format.end):  # there each has a head of its own
        more = f"({_written(format.between, special)} call){{0,{MOST_CALLS - 1}}}"
    return f"calls: ({opening}) call {more} {_written(format.closing, special)}"


def _call(format: ToolFormat, tools: Sequence[ToolSchema]) -> list[str]:
    """A call's own JSON, as models were trained to write it. In the lexemes of JSON, so that it can be told from another one late."""
    name, arguments = (_quoted(_json(key)) for key in ("name", format.arguments))
    rules = [f'call: "{{" {name} ":" " " ({" | ".join(f"tool_{i}" for i in range(len(tools)))}) "}}"']
    for i, tool in enumerate(tools):
        rules.append(f'tool_{i}: {_quoted(_json(tool.name))} "," " " {arguments} ":" " " %json {_json(arguments_schema(tool.schema))}')
    return rules


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema as one of JSON: an object that, like a function, has the parameters that are named and no others, unless the schema
    says otherwise."""
    closed = "properties" in schema and not _ELSEWHERE.intersection(schema)
    return _guided({"type": "object", **({"additionalProperties": False} if closed else {}), **schema})


def _guided(schema: Mapping[str, Any]) -> dict[str, Any]:
    """With the same blanks as in every JSON here, unless it has its own settings."""
    return {"x-guidance": {"whitespace_pattern": BLANKS}, **schema}


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
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise BadRequest("grammar", "is nested too deeply") from None
