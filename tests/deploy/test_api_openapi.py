"""/openapi.json says what there is: every route, the door's own bounds, and answers of the shapes that are sent."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from serving import WAIT_S, ScriptRunner, ServerThread, script_engine
from starlette.datastructures import Headers

from quire.deploy.api import chat, completions, info_routes, openapi, text_routes
from quire.deploy.api.body import parse
from quire.deploy.api.errors import ApiError
from quire.deploy.api.schemas import ChatBody, CompletionBody
from quire.deploy.api.urgency import read_urgency
from quire.worker.config import LimitOptions, ServerOptions
from quire.worker.door import Door
from quire.worker.protocol import BadRequest, GenerateRequest, SamplingParams
from quire.worker.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, tuple[type[ChatBody] | type[CompletionBody], dict[str, Any]]] = {
    CHAT: (ChatBody, {"messages": HELLO}),
    COMPLETION: (CompletionBody, {"prompt": [1]}),
}


def document(server: ServerThread) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(server.url + "/openapi.json", timeout=WAIT_S).json()
    return found


def asked(server: ServerThread, route: str) -> dict[str, Any]:
    schema: dict[str, Any] = document(server)["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    Draft202012Validator.check_schema(schema)
    return schema


def check_answer(server: ServerThread, answer: httpx.Response, route: str) -> None:
    """The answer's status, type and body are those of the document."""
    told = document(server)
    responses = told["paths"][route][answer.request.method.lower()]["responses"]
    assert str(answer.status_code) in responses, answer.text
    content = responses[str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content
    if kind == "application/json":
        check_shape(told, content[kind]["schema"], answer.json())


def check_shape(told: dict[str, Any], schema: dict[str, Any], body: Any) -> None:
    Draft202012Validator({**schema, "components": told["components"]}).validate(body)


def test_every_route_stands_in_it(scripted: ServerThread) -> None:
    there = {
        (route.path.replace(":path", ""), method.lower())
        for module in (chat, completions, info_routes, openapi, text_routes)
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert there == {(path, method) for path, operations in document(scripted)["paths"].items() for method in operations}


def takes(server: ServerThread, route: str, **fields: Any) -> bool:
    """Whether the door lets a request with these fields in."""
    of, least = BODIES[route]
    try:
        body = parse(json.dumps({**least, **fields}).encode(), of)
        params = body.sampling(SamplingParams(), max_tokens=body.longest(None, server.api.context), logprobs=None)
        read_urgency(body, Headers())
        Door.of(server.api.info, LimitOptions()).check(GenerateRequest("r", ((1,),), params))
    except (ApiError, BadRequest):
        return False
    return True


@pytest.mark.parametrize("route", BODIES)
def test_its_bounds_are_those_of_the_door(scripted: ServerThread, route: str) -> None:
    seen = 0
    for name, schema in asked(scripted, route)["properties"].items():
        form = schema.get("anyOf", [schema])[0]
        form = form.get("anyOf", [form])[0]
        if form.get("type") not in ("integer", "number") or name in ("logprobs", "top_logprobs"):
            continue
        seen += 1
        more = {"max_tokens": form["maximum"]} if name == "min_tokens" else {}
        least = form.get("minimum", form.get("exclusiveMinimum"))
        least += 1 if route == COMPLETION and name in ("max_tokens", "max_completion_tokens") else 0  # 0 is for echo alone
        assert takes(scripted, route, **{**more, name: form["maximum"]}), name
        assert takes(scripted, route, **{name: least}) is ("minimum" in form), name
        for beyond in (form["maximum"] + 1, least - 1):
            assert not takes(scripted, route, **{**more, name: beyond}), (name, beyond)
    assert seen >= 12


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": None, "stop": None, "colour": None, "stream_options": None},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stop": "a"},
        {"stop": ["a", "b"], "stop_token_ids": [0, 5]},
        {"logit_bias": {"5": -1.5}, "seed": -1, "priority": "high", "deadline_ms": 5},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": None, "schema": {"type": "object"}}}},
        {"structured_outputs": {"json": '{"type": "integer"}', "regex": None, "choice": None}},
        {"structured_outputs": {"choice": ["a", "b"]}, "response_format": {"type": "text"}},
        {"guided_json": {"type": "array"}},
        {"guided_grammar": 'start: "a"'},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}},
    ],
)
@pytest.mark.parametrize("route", BODIES)
def test_what_is_taken_is_of_the_documented_shape(scripted: ServerThread, route: str, fields: dict[str, Any]) -> None:
    assert takes(scripted, route, **fields)
    Draft202012Validator(asked(scripted, route)).validate({**BODIES[route][1], **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"colour": "blue"},
        {"n": 0},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"logit_bias": {"x": 1}},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        {"response_format": {"type": "json_object", "colour": 1}},
        {"structured_outputs": {"json_object": True, "regex": "a"}},
        {"structured_outputs": {}},
        {"guided_choice": []},
        {"guided_regex": ""},
        {"priority": "urgent"},
        {"stream": True, "stream_options": {"colour": True}},
        {"messages": None, "prompt": None},
        {"messages": [], "prompt": []},
        {"stream_options": {"include_usage": True}},
        {"top_logprobs": 1, "max_tokens": 0},
    ],
)
@pytest.mark.parametrize("route", BODIES)
def test_what_is_refused_is_not(scripted: ServerThread, route: str, fields: dict[str, Any]) -> None:
    body = {**BODIES[route][1], **fields}
    assert httpx.post(scripted.url + route, json=body, timeout=WAIT_S).status_code == 400
    assert not Draft202012Validator(asked(scripted, route)).is_valid(body)


def test_messages(scripted: ServerThread) -> None:
    shape = Draft202012Validator(asked(scripted, CHAT)["properties"]["messages"])
    parts = [{"type": "text", "text": "a", "cache_control": {}}]
    assert shape.is_valid([{"role": "system", "content": "a"}, {"role": "developer", "content": parts, "name": "x"}])
    assert shape.is_valid([{"role": "assistant", "content": None, "tool_calls": [], "audio": None, "colour": None}])
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "tool_calls": [call, {**call, "type": None, "index": 1}]}
    answered = {"role": "tool", "tool_call_id": "1", "content": parts}
    assert shape.is_valid([called, answered])
    assert httpx.post(scripted.url + CHAT, json={"messages": [called, answered], "max_tokens": 1}, timeout=WAIT_S).status_code == 200
    for wrong in (
        {"role": "tool", "tool_call_id": 5, "content": "a"},
        {"role": "user", "content": "a", "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [{**call, "id": None}]},
        {"role": "assistant", "tool_calls": [{**call, "function": {"name": "f", "arguments": {}}}]},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "tool", "content": "a"},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "assistant", "content": "a", "tool_calls": [{}]},
        {"role": "user", "content": "a", "colour": 1},
    ):
        assert not shape.is_valid([wrong]), wrong
        assert httpx.post(scripted.url + CHAT, json={"messages": [wrong]}, timeout=WAIT_S).status_code == 400


def test_tools(scripted: ServerThread) -> None:
    shape = Draft202012Validator(asked(scripted, CHAT))
    tool: dict[str, Any] = {
        "type": "function",
        "function": {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": True},
    }
    named = {"type": "function", "function": {"name": "f"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    choices = ({"tool_choice": choice} for choice in ("required", allowed, None))
    for fields in ({}, *choices, {"tool_choice": named, "parallel_tool_calls": False}):
        body = {"messages": HELLO, "tools": [tool], "max_tokens": 1, **fields}
        assert httpx.post(scripted.url + CHAT, json=body, timeout=WAIT_S).status_code == 200
        shape.validate(body)
    for wrong in (
        {"tools": [{**tool, "type": "custom"}]},
        {"tools": [{**tool, "colour": 1}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        {"tools": [tool] * 129},
        {"tools": [tool], "tool_choice": "always"},
        {"tools": [tool], "tool_choice": {"type": "function"}},
        {"tools": [tool], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
    ):
        assert httpx.post(scripted.url + CHAT, json={"messages": HELLO, **wrong}, timeout=WAIT_S).status_code == 400
        assert not shape.is_valid({"messages": HELLO, **wrong}), wrong


def test_calls_are_of_the_documented_shape(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    script.script = (*tokenizer.encode('So:<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'), tokenizer.eos_token_id or 0)
    told = document(scripted)
    for more in ({}, {"logprobs": True, "top_logprobs": 1}):
        body = {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}], **more}
        whole = httpx.post(scripted.url + CHAT, json=body, timeout=WAIT_S)
        assert whole.json()["choices"][0]["message"]["tool_calls"]
        check_answer(scripted, whole, CHAT)
        streamed = httpx.post(scripted.url + CHAT, json={**body, "stream": True}, timeout=WAIT_S)
        lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert any("tool_calls" in line for line in lines)
        for line in lines:
            check_shape(told, told["components"]["schemas"]["ChatCompletionChunk"], json.loads(line))


def test_answers_are_of_the_documented_shape(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    script.script = (*tokenizer.encode("A rose \N{ROSE}, and a"), tokenizer.eos_token_id or 0)
    told = document(scripted)
    for route, more, event in (
        (CHAT, {"logprobs": True, "top_logprobs": 2}, "ChatCompletionChunk"),
        (COMPLETION, {"logprobs": 2, "echo": True, "stop": "rose", "n": 2}, "Completion"),
    ):
        for extra in ({}, more, {"n": "x"}, {"model": "other"}, {"max_tokens": 5000}):
            check_answer(scripted, httpx.post(scripted.url + route, json={**BODIES[route][1], **extra}, timeout=WAIT_S), route)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            streamed = httpx.post(scripted.url + route, json={**BODIES[route][1], **extra, **options}, timeout=WAIT_S)
            check_answer(scripted, streamed, route)
            lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
            assert bool(lines) is (streamed.status_code == 200)
            for line in lines:
                check_shape(told, told["components"]["schemas"][event], json.loads(line))
        check_answer(scripted, httpx.post(scripted.url + route, content=b"{", timeout=WAIT_S), route)
        check_answer(scripted, httpx.post(scripted.url + route, data={"a": "b"}, timeout=WAIT_S), route)
    for body in ({"prompt": "a"}, {"messages": HELLO, "return_token_strs": True}, {}):
        check_answer(scripted, httpx.post(scripted.url + "/tokenize", json=body, timeout=WAIT_S), "/tokenize")
    check_answer(scripted, httpx.post(scripted.url + "/detokenize", json={"tokens": [1, 2]}, timeout=WAIT_S), "/detokenize")
    for path in ("/v1/models", "/live", "/health", "/metrics", "/version", "/openapi.json"):
        check_answer(scripted, httpx.get(scripted.url + path, timeout=WAIT_S), path)
        silent = httpx.head(scripted.url + path, timeout=WAIT_S)
        assert (silent.status_code, silent.content) == (200, b"")
        assert int(silent.headers["content-length"]) > 0
    for name in ("script", "other"):
        check_answer(scripted, httpx.get(f"{scripted.url}/v1/models/{name}", timeout=WAIT_S), "/v1/models/{name}")


def test_with_keys_it_says_who_needs_one(tokenizer: Tokenizer) -> None:
    engine = script_engine(ScriptRunner(), tokenizer.vocab_size, 0)
    with ServerThread(engine, tokenizer, ServerOptions(port=0, api_key=("k1",), log_level="warning"), LimitOptions()) as server:
        assert httpx.get(server.url + "/openapi.json", timeout=WAIT_S).status_code == 401
        told = httpx.get(server.url + "/openapi.json", headers={"Authorization": "Bearer k1"}, timeout=WAIT_S).json()
    assert told["security"] == [{"key": []}]
    for path, operations in told["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) is (path not in ("/live", "/health")) is ("security" not in operation)
