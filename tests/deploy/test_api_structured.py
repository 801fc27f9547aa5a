"""Structured outputs over HTTP: every malformed constraint is a 400 that names its field, and answers are what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from serving import WAIT_S, ScriptRunner, ServerThread

from quire.deploy.api import structured

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASK = {CHAT: {"messages": [{"role": "user", "content": "Who?"}]}, COMPLETION: {"prompt": "Who?"}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema_format(**changes: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA} | changes}}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": ["text"]}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    (schema_format(schema=None), "response_format.json_schema.schema"),
    (schema_format(schema="{}"), "response_format.json_schema.schema"),
    (schema_format(schema=[]), "response_format.json_schema.schema"),
    (schema_format(strict="yes"), "response_format.json_schema.strict"),
    (schema_format(description=5), "response_format.json_schema.description"),
    (schema_format(colour="red"), "response_format.json_schema.colour"),
    (schema_format(schema={"type": "colour"}), "response_format.json_schema.schema"),
    (schema_format(schema={"type": "array", "uniqueItems": True}), "response_format.json_schema.schema"),
    (schema_format(schema={"$ref": "#"}), "response_format.json_schema.schema"),
    (schema_format(schema={"$ref": "http://127.0.0.1/x"}), "response_format.json_schema.schema"),
    (schema_format(schema={"description": "a" * 70_000}), "response_format.json_schema.schema"),
    (schema_format(schema={"type": "string", "pattern": "("}), "response_format.json_schema.schema"),
    ({"structured_outputs": "json"}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"colour": "red"}}, "structured_outputs.colour"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "(a{1000}){1000}"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": "abc"}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": {"a": 1}}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [str(i) for i in range(10_000)]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": ["start"]}}, "structured_outputs.grammar"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_regex": "["}, "guided_regex"),
    ({"guided_choice": [""]}, "guided_choice"),
    ({"guided_grammar": "root: a"}, "guided_grammar"),
    ({**schema_format(), "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
]


@pytest.mark.parametrize("route", ASK)
@pytest.mark.parametrize(("wrong", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(scripted: ServerThread, route: str, wrong: dict[str, Any], param: str) -> None:
    answer = httpx.post(scripted.url + route, json={**ASK[route], **wrong}, timeout=WAIT_S)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert param.partition(".")[0] in error["message"]
    assert len(error["message"]) < 500
    assert not scripted.client.submitted._happened.acquire(blocking=False), "it was not queued"
    assert scripted.api.lifecycle.running == 0


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": None, "guided_json": None},
    ],
)
def test_no_constraint_at_all(scripted: ServerThread, asked: dict[str, Any]) -> None:
    for route, ask in ASK.items():
        assert httpx.post(scripted.url + route, json={**ask, **asked, "max_tokens": 1}, timeout=WAIT_S).status_code == 200
        assert scripted.client.latest is not None
        assert scripted.client.latest[0].params.grammar == ""


def test_what_is_asked_reaches_the_engine(scripted: ServerThread) -> None:
    both = [schema_format(strict=True, description=None), {"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"guided_json": SCHEMA}]
    grammars = set()
    for route, ask in ASK.items():
        for asked in both:
            assert httpx.post(scripted.url + route, json={**ask, **asked, "max_tokens": 1}, timeout=WAIT_S).status_code == 200
            assert scripted.client.latest is not None
            grammars.add(scripted.client.latest[0].params.grammar)
    assert len(grammars) == 1, "one constraint is one grammar, however it is asked for"


def test_an_engine_that_gives_a_grammar_up_blames_the_request(scripted: ServerThread, script: ScriptRunner, monkeypatch) -> None:
    sampled = script._sampled
    monkeypatch.setattr(script, "_sampled", lambda seq, end: sampled(seq, end)._replace(error="grammar: it is too complex"))
    answer = httpx.post(scripted.url + COMPLETION, json={"prompt": "a", "guided_regex": "a+"}, timeout=WAIT_S)
    assert answer.status_code == 400
    assert "too complex" in answer.json()["error"]["message"]


def test_too_many_to_compile_at_once(scripted: ServerThread, monkeypatch) -> None:
    monkeypatch.setattr(structured, "MOST_WAITING", 0)
    answer = httpx.post(scripted.url + COMPLETION, json={"prompt": "a", "guided_regex": "a+"}, timeout=WAIT_S)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert httpx.post(scripted.url + COMPLETION, json={"prompt": "a", "max_tokens": 1}, timeout=WAIT_S).status_code == 200


# --- the small real model, through OpenAI's client ---

ANN: Any = [{"role": "user", "content": "Ann is a doctor of 41 years. Answer with a JSON object that has her name, age and job."}]


@pytest.fixture
def client(real: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


class Person(BaseModel):
    name: str
    age: int
    job: Literal["doctor", "teacher", "smith"] | None


@pytest.mark.slow
def test_a_schema_through_the_sdk_whole_and_as_a_stream(client: openai.OpenAI, real: ServerThread) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True}}
    asked: Any = {"model": real.api.info.name, "messages": ANN, "temperature": 0, "max_tokens": 200, "response_format": format_}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "stop"
    person = Person.model_validate_json(whole.message.content or "")
    assert (person.name, person.age) == ("Ann", 41)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_parse_with_pydantic(client: openai.OpenAI, real: ServerThread) -> None:
    asked: Any = {"model": real.api.info.name, "messages": ANN, "temperature": 0, "max_tokens": 200, "response_format": Person}
    person = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(person, Person)
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == person


@pytest.mark.slow
def test_choice_regex_and_grammar_as_of_vllm(client: openai.OpenAI, real: ServerThread) -> None:
    def ask(question: str, **structured_outputs: Any) -> list[str]:
        answer = client.chat.completions.create(
            model=real.api.info.name,
            messages=[{"role": "user", "content": question}],
            max_tokens=60,
            n=3,
            seed=1,
            extra_body={"structured_outputs": structured_outputs},
        )
        assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
        return [choice.message.content or "" for choice in answer.choices]

    assert set(ask("Is the sky blue?", choice=["yes", "no", "may be"])) <= {"yes", "no", "may be"}
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) for text in ask("When did the war end?", regex=r"\d{4}-\d{2}-\d{2}"))
    grammar = 'start: "SELECT " column (", " column)? " FROM t"\ncolumn: "a" | "b"'
    assert all(re.fullmatch(r"SELECT [ab](, [ab])? FROM t", text) for text in ask("Write SQL", grammar=grammar))


@pytest.mark.slow
def test_completions_with_several_prompts_and_choices(real: ServerThread) -> None:
    body = {"prompt": ["A person: ", "Another: "], "n": 2, "max_tokens": 150, "seed": 3, **schema_format(), "logprobs": 1}
    answer = httpx.post(real.url + COMPLETION, json=body, timeout=WAIT_S).json()
    assert len(answer["choices"]) == 4
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        Draft202012Validator(SCHEMA).validate(json.loads(choice["text"]))
    assert len({choice["text"] for choice in answer["choices"]}) > 1


@pytest.mark.slow
def test_any_json_object(real: ServerThread) -> None:
    body = {"messages": ANN, "temperature": 0, "max_tokens": 200, "response_format": {"type": "json_object"}}
    answer = httpx.post(real.url + CHAT, json=body, timeout=WAIT_S).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert isinstance(json.loads(answer["message"]["content"]), dict)


@pytest.mark.slow
def test_a_grammar_too_complex_in_the_middle_ends_a_stream_with_an_error(real: ServerThread) -> None:
    rules = [f'r{i}: "a" r{i} | "b"' for i in range(1500)]
    grammar = "\n".join(["start: /[xy]{20}/ (" + " | ".join(f"r{i}" for i in range(1500)) + ")", *rules])
    body = {"prompt": "xyxyxy", "guided_grammar": grammar, "max_tokens": 60, "seed": 1}
    whole = httpx.post(real.url + COMPLETION, json=body, timeout=WAIT_S)
    assert whole.status_code == 400, whole.text
    assert whole.json()["error"]["code"] == "grammar_too_complex"
    streamed = httpx.post(real.url + COMPLETION, json={**body, "stream": True}, timeout=WAIT_S)
    assert streamed.status_code == 200
    last = [line for line in streamed.text.splitlines() if line.startswith("data: {")][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "invalid_request_error"
