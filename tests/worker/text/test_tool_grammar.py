"""What grammars of calls let a model write, token by token, in each family's format; and that hostile tools cost little."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from random_schemas import random_schema
from tool_models import FAMILIES, family

from quire.worker.protocol import BadRequest
from quire.worker.text.grammar import Grammars
from quire.worker.text.tokenizer import Tokenizer
from quire.worker.text.tool_format import ToolFormat
from quire.worker.text.tool_grammar import MOST_CALLS, ToolSchema, arguments_schema, calls_grammar
from quire.worker.text.tool_parser import Arguments, Call, CallReading, Content, ToolParser

SECONDS = 5.0  # far above what one takes
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}}, "required": ["city"]}
TOOLS = [ToolSchema("get_weather", CITY), ToolSchema("f", {}), ToolSchema("none", {"properties": {}})]
GOOD = [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city":"é","days":3}'), ("f", '{"x": [1]}'), ("none", "{}")]
BAD = [
    ("get_weather", "{}"),
    ("get_weather", '{"city": 5}'),
    ("get_weather", '{"city": "a", "x": 1}'),
    ("none", '{"x": 1}'),
    ("g", "{}"),
    ("f", "[]"),
]


class Model:
    """One family's tokenizer, format and grammars."""

    def __init__(self, name: str, smollm2: Tokenizer) -> None:
        self.tokenizer = family(name, smollm2)
        assert self.tokenizer.tool_format is not None
        self.format: ToolFormat = self.tokenizer.tool_format
        found = {marker: self.tokenizer.special_id(marker) for marker in self.format.markers}
        self.special = {marker: token for marker, token in found.items() if token is not None}
        assert self.tokenizer.eos_token_id is not None
        self.end = self.tokenizer.eos_token_id
        self.grammars = Grammars(self.tokenizer, [self.end])

    def fits(self, grammar: str, text: str) -> bool:
        matcher = self.grammars.matcher(grammar)
        return matcher.consume_tokens(self.tokenizer.encode(text)) and matcher.is_accepting()

    def written(self, *calls: tuple[str, str]) -> str:
        bodies = [f'{{"name": "{name}", "{self.format.arguments}": {arguments}}}' for name, arguments in calls]
        return self.format.opening[0] + (self.format.between or "").join(bodies) + self.format.closing

    def grammar(self, tools: list[ToolSchema] = TOOLS, **options: Any) -> str:
        return calls_grammar(self.format, tools, self.special, **options)

    def walk(self, grammar: str, draw: random.Random, most: int = 400) -> str:
        """A text at random, of tokens that the grammar allows."""
        matcher, tokens = self.grammars.matcher(grammar), list[int]()
        while len(tokens) < most:
            bits = np.unpackbits(self.grammars.masks([matcher])[0].view(np.uint8), bitorder="little")
            token = int(draw.choice(np.flatnonzero(bits)))
            if token == self.end:
                break
            tokens.append(token)
            matcher.consume_token(token)
        return self.tokenizer.decode(tokens, False)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, smollm2: Tokenizer) -> Model:
    return Model(request.param, smollm2)


def read(model: Model, text: str) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(CallReading(model.format, frozenset(tool.name for tool in TOOLS)))
    content, calls = "", list[tuple[str, str]]()
    for piece in parser.push(text) + parser.finish():
        match piece:
            case Content(said):
                content += said
            case Call(_, name):
                calls.append((name, ""))
            case Arguments(_, said):
                calls[-1] = (calls[-1][0], calls[-1][1] + said)
    return content, calls


def test_calls_and_nothing_else(model: Model) -> None:
    grammar = model.grammar()
    for call in GOOD:
        assert model.fits(grammar, model.written(call)), call
        assert read(model, model.written(call)) == ("", [call])
    for call in BAD:
        assert not model.fits(grammar, model.written(call)), call
    for text in ("", "Hello", "Hello " + model.written(GOOD[0]), model.written(GOOD[0]) + " so"):
        assert not model.fits(grammar, text), text
    assert model.fits(grammar, model.written(*GOOD)) is (model.format.between is not None)
    assert not model.fits(model.grammar(single=True), model.written(*GOOD[:2]))
    assert not model.fits(grammar, model.written(*(GOOD[3:] * (MOST_CALLS + 1))))


def test_what_is_forced_is_written_in_the_model_s_own_tokens(model: Model) -> None:
    matcher, forced = model.grammars.matcher(model.grammar(TOOLS[:1])), list[int]()
    while (allowed := np.flatnonzero(np.unpackbits(model.grammars.masks([matcher])[0].view(np.uint8), bitorder="little"))).size == 1:
        forced.append(int(allowed[0]))
        matcher.consume_token(forced[-1])
    if model.format.name == "mistral":
        assert forced == [model.special["[TOOL_CALLS]"]], "what follows may begin with a space"
    else:
        own = model.tokenizer.encode(model.written(("get_weather", '{"')))
        assert len(forced) > 8
        assert forced == own[: len(forced)]


def test_text_or_calls(model: Model) -> None:
    grammar = model.grammar(or_text=True)
    assert all(model.fits(grammar, text) for text in ("", "Hello\nworld", "a < b [ {", model.written(GOOD[0])))
    assert not any(model.fits(grammar, model.written(call)) for call in BAD)
    if not model.format.bare:
        assert model.fits(grammar, "Let me see.\n" + model.written(GOOD[0]))
        assert not model.fits(grammar, f"a {model.format.marker} b")
        assert model.fits(grammar, model.written(*GOOD[:2]) + "\nDone.")


def test_json_or_calls(model: Model) -> None:
    grammar = model.grammar(or_json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert model.fits(grammar, '{"a": 5}')
    assert model.fits(grammar, model.written(GOOD[0]))
    assert not any(model.fits(grammar, text) for text in ("Hello", '{"a": "b"}', model.written(BAD[0])))
    any_object = model.grammar(or_json={"type": "object"})
    for text in ('{"name": "Ann"}', '{\n"name": "f"}', '{"name" :  "f", "x":1}', '{"name":"f"}', '{ "a":{}}', model.written(GOOD[0])):
        assert model.fits(any_object, text), text


def test_whatever_it_lets_write_is_calls_of_the_tools(model: Model) -> None:
    draw = random.Random(5)
    for _ in range(12):
        names = ["get_weather", "f", "none"]
        schemas = {
            name: {"type": "object", "properties": {"x": random_schema(draw), 'ключ "': random_schema(draw)}, "required": ["x"]}
            for name in names
        }
        tools = [ToolSchema(name, schema) for name, schema in schemas.items()]
        content, calls = read(model, model.walk(model.grammar(tools, single=True), draw))
        assert content == ""
        ((name, arguments),) = calls
        Draft202012Validator({**schemas[name], "additionalProperties": False}).validate(json.loads(arguments))


def test_schemas_of_arguments() -> None:
    def plain(schema: dict[str, Any]) -> dict[str, Any]:
        made = arguments_schema(schema)
        del made["x-guidance"]
        return made

    assert plain({}) == {"type": "object"}
    assert plain({"properties": {"a": {}}}) == {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
    for said in (
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"type": "object", "properties": {}, "patternProperties": {"^x": {}}},
        {"type": "object", "properties": {}, "allOf": [{"properties": {"b": {}}}]},
    ):
        assert plain(said) == said
    own = {"x-guidance": {"whitespace_flexible": False}}
    assert arguments_schema(own) == {"type": "object", **own}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, list[ToolSchema]] = {
    "many": [ToolSchema(f"tool_{i}", CITY) for i in range(1000)],
    "deep": [ToolSchema("f", nested(300))],
    "deeper": [ToolSchema("f", nested(100_000))],
    "wide": [ToolSchema("f", {"properties": {f"p{i}": {"type": "string"} for i in range(2000)}})],
    "alternatives": [ToolSchema("f", {"allOf": [{"anyOf": [{"properties": {f"p{i}_{k}": {}}} for k in range(4)]} for i in range(12)]})],
    "names": [ToolSchema("f", {"properties": {'%json { } "\n\\ ::= 日本 \x7f <[5]> /': {"enum": ['"]}', "start: a\n", "é"]}}})],
    "endless": [ToolSchema("f", {"$ref": "#"})],
    "recursive": [ToolSchema("f", {"properties": {"next": {"$ref": "#"}}})],
    "patterns": [ToolSchema("f", {"properties": {"a": {"type": "string", "pattern": "(a{1000}){1000}"}}})],
    "elsewhere": [ToolSchema("f", {"$ref": "http://127.0.0.1:1/schema"})],
    "unsatisfiable": [ToolSchema("f", {"properties": {"a": False}, "required": ["a"]})],
    "odd keywords": [ToolSchema("f", {"x-guidance": 5, "properties": 7, "required": {}})],
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("or_text", [False, True])
def test_hostile_tools_cost_little(model: Model, hostile: str, or_text: bool) -> None:
    """Whether they are taken is llguidance's business."""
    began_s = time.process_time()
    try:
        matcher = model.grammars.matcher(model.grammar(HOSTILE[hostile], or_text=or_text))
        for token in model.tokenizer.encode(model.written(("f", "{"))):
            matcher.compute_bitmask()
            matcher.consume_token(token)
    except BadRequest:
        pass
    assert time.process_time() - began_s < SECONDS


def test_names_cannot_break_out_of_the_grammar(model: Model) -> None:
    (key,) = HOSTILE["names"][0].schema["properties"]
    grammar = model.grammar(HOSTILE["names"])
    for value in ('"]}', "start: a\n", "é"):
        assert model.fits(grammar, model.written(("f", json.dumps({key: value}, ensure_ascii=False))))
    assert not model.fits(grammar, model.written(("f", '{"a": 1}')))
