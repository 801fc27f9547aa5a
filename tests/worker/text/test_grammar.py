"""From constraints to grammars, and which of them are refused: at once, in words that help, and without much work."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from pydantic import BaseModel

from quire.worker.protocol import BadRequest
from quire.worker.text.grammar import COMPILED, MOST_TOLD, Grammars, grammar_of
from quire.worker.text.tokenizer import Tokenizer

SECONDS = 3.0  # far above what one takes, on any machine; without limits some of these take minutes


@pytest.fixture(scope="module")
def grammars(smollm2: Tokenizer) -> Grammars:
    assert smollm2.eos_token_id is not None
    return Grammars(smollm2, [smollm2.eos_token_id])


def fits(grammars: Grammars, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether the whole of `text` is what the grammar describes."""
    matcher = grammars.matcher(grammar)
    return matcher.consume_tokens(tokenizer.encode(text)) and matcher.is_accepting()


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (
            {"json_schema": PERSON},
            ['{"name": "Ann", "age": 3}', '{"name":"é\\n"}', '{\n  "name": ""\n}'],
            ['{"age": 3}', '{"name": 3}', "[]"],
        ),
        ({"json_schema": json.dumps(PERSON)}, ['{"name": "Ann"}'], ['{"name": "Ann", "colour": 1}']),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", '"a"', "{", '{"a": NaN}']),
        ({"regex": r"\d{3}-[a-c]+"}, ["123-ab"], ["12-a", "123-ab-", "x123-a"]),
        ({"regex": r"^(yes|no)/\w+$"}, ["yes/maybe"], ["yes"]),
        (
            {"choice": ["yes", "no", 'say "yes"', "a\\b\n", "\x7f", "Grüße 日本", "yes"]},
            ["yes", 'say "yes"', "a\\b\n", "\x7f", "Grüße 日本"],
            ["ye", ""],
        ),
        ({"lark": 'start: greeting ", " name\ngreeting: "Hello" | "Hi"\nname: /[A-Z][a-z]+/'}, ["Hi, Ann"], ["Hi, ann", "Ann"]),
        ({"lark": 'root ::= "a" digits\ndigits ::= [0-9]+ | "none"'}, ["a12", "anone"], ["a", "12"]),
        ({"lark": 'start: "n" %json {"type": "integer"}'}, ["n12"], ["n"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_fits_and_what_does_not(grammars, smollm2, constraint: dict[str, Any], good: list[str], bad: list[str]) -> None:
    grammar = grammar_of(**constraint)
    assert [text for text in good if not fits(grammars, smollm2, grammar, text)] == []
    assert [text for text in bad if fits(grammars, smollm2, grammar, text)] == []


def test_the_schema_of_a_pydantic_model(grammars, smollm2) -> None:
    class Step(BaseModel):
        text: str
        value: float | None = None

    class Answer(BaseModel):
        steps: list[Step]
        final: bool

    grammar = grammar_of(json_schema=Answer.model_json_schema())
    assert fits(grammars, smollm2, grammar, '{"steps": [{"text": "a", "value": 1.5}, {"text": "b"}], "final": true}')
    assert not fits(grammars, smollm2, grammar, '{"steps": [{"value": 1.5}], "final": true}')


def test_blanks_between_tokens_are_bounded(grammars, smollm2) -> None:
    grammar = grammar_of(json_schema={"type": "array", "items": {"type": "integer"}})
    assert fits(grammars, smollm2, grammar, "[" + " " * 40 + "1]")
    assert not fits(grammars, smollm2, grammar, "[" + " " * 41 + "1]")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "grammar"),
        ({"regex": "a", "choice": ["a"]}, "grammar"),
        ({"json_object": False}, "grammar"),
        ({"choice": []}, "choice"),
        ({"choice": [""]}, "choice"),
        ({"choice": "abc"}, "choice"),
        ({"choice": ["a", 3]}, "choice"),
        ({"choice": 3}, "choice"),
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"lark": " \n"}, "lark"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[1]"}, "json_schema"),
        ({"json_schema": True}, "json_schema"),
        ({"json_schema": {"const": float("nan")}}, "json_schema"),
        ({"json_schema": {"minimum": 10**400}}, "json_schema"),
        ({"json_schema": '{"a":' * 100_000}, "json_schema"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_has_not_the_form_of_a_constraint(given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        grammar_of(**given)
    assert refused.value.field == field
    assert len(str(refused.value)) < 2 * MOST_TOLD


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED = [
    {"regex": "("},
    {"regex": "(?=a)b"},
    {"regex": r"(a)\1"},
    {"regex": "(" * 5000 + "a" + ")" * 5000},
    {"regex": "(a{1000}){1000}"},
    {"regex": "(a?){500}a{500}"},
    {"json_schema": {"type": "colour"}},
    {"json_schema": {"type": "array", "uniqueItems": True}},
    {"json_schema": {"type": "string", "format": "colour"}},
    {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
    {"json_schema": {"$ref": "http://127.0.0.1:1/schema"}},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"enum": []}},
    {"json_schema": nested(300)},
    {"json_schema": {"type": "integer", "multipleOf": 10**9 + 7}},
    {"json_schema": {"allOf": [{"anyOf": [{"properties": {f"p{i}_{k}": {}}} for k in range(4)]} for i in range(12)]}},
    {"lark": "start: bar"},
    {"lark": 'root ::= "a" b'},
    {"lark": 'root ::= "a'},
    {"lark": "root ::= " + "(" * 3000},
    {"lark": 'root ::= "a"' + "\n" * 50_000},
    {"lark": "start: a\na: start"},
    {"lark": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
]


@pytest.mark.parametrize("constraint", REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_followed_is_refused_soon(grammars, constraint: dict[str, Any]) -> None:
    started_s = time.process_time()
    with pytest.raises(BadRequest) as refused:
        grammars.check(grammar_of(**constraint))
    assert time.process_time() - started_s < SECONDS
    assert refused.value.field in ("grammar", *constraint)
    assert 5 < len(refused.value.message) <= MOST_TOLD + 3


ODD = [
    {"regex": "(.*a){100}"},
    {"regex": ".{1,100000}"},
    {"regex": r"(\p{L}|\p{N}){5000}"},
    {"json_schema": {"type": "array", "items": {}, "minItems": 10**6}},
    {"json_schema": {"type": "string", "maxLength": 10**9}},
    {"json_schema": {"type": "object", "properties": {f"field{i}": {"type": "string"} for i in range(1500)}}},
    {"json_schema": {"enum": [f"value {i}" for i in range(4000)]}},
    {"lark": 'start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"'},
    {"lark": 'start: start start | "a" | '},
]


@pytest.mark.parametrize("constraint", ODD, ids=lambda value: str(value)[:50])
def test_what_is_large_comes_to_an_end_too(grammars, constraint: dict[str, Any]) -> None:
    """Whether it is taken is llguidance's business; that it costs little is ours, also for the first tokens."""
    started_s = time.process_time()
    try:
        matcher = grammars.matcher(grammar_of(**constraint))
        for _ in range(20):
            mask = matcher.compute_bitmask()
            token = next((i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1), None)
            if matcher.is_stopped() or token is None:
                break
            matcher.consume_token(token)
    except BadRequest:
        pass
    assert time.process_time() - started_s < SECONDS


def test_grammars_are_kept_and_the_oldest_let_go(smollm2: Tokenizer) -> None:
    grammars = Grammars(smollm2, [2])
    made = [grammar_of(regex=f"a{{{i}}}") for i in range(1, COMPILED + 2)]
    compiled: list[str] = []
    compile_one = grammars._compile
    grammars._compile = lambda grammar: compiled.append(grammar) or compile_one(grammar)  # type: ignore[method-assign,func-returns-value]
    for grammar in [*made[:COMPILED], made[0], made[COMPILED], made[0], made[1]]:
        grammars.matcher(grammar)
    assert compiled == [*made, made[1]]
    grammars.renew([made[1]])
    grammars.matcher(made[1])
    assert compiled[-1] == made[1]
    assert len(compiled) == COMPILED + 3


def test_matchers_of_one_grammar_do_not_move_each_other(grammars, smollm2) -> None:
    grammar = grammar_of(regex="[ab]+")
    one, two = grammars.matcher(grammar), grammars.matcher(grammar)
    assert one.consume_tokens(smollm2.encode("abab"))
    assert one.is_accepting()
    assert not two.is_accepting()


def test_messages_quote_neither_prompt_nor_much_else(grammars) -> None:
    with pytest.raises(BadRequest) as refused:
        grammars.check(grammar_of(regex="(" + "secret" * 1000))
    assert len(refused.value.message) <= MOST_TOLD + 3
    assert not re.search(r"/work|\.rs|\.py|0x", refused.value.message)


def test_a_model_without_an_end_is_told_of(smollm2: Tokenizer) -> None:
    for ends in ([], [10**9]):
        with pytest.raises(BadRequest, match="no end-of-sequence token"):
            Grammars(smollm2, ends)
