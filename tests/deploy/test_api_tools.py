"""Tools over HTTP, through the official client: what is refused, what the model is told, and calls whole and streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import WAIT_S, ScriptRunner, ServerThread, script_engine
from tool_models import FAMILIES, family

from quire.deploy.api.tool_calls import ToolCalls
from quire.worker.config import LimitOptions, ServerOptions
from quire.worker.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"]}


def tool(name: str = "get_weather", parameters: Any = CITY, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER, TIME = tool(description="Weather of a city"), tool("get_time", {"type": "object", "properties": {}})
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
PARIS = '{"city": "Paris"}'


def allowed(mode: str, *tools: Any) -> Any:
    """`tool_choice` of some among the tools."""
    listed = [{**each, "function": {"name": each["function"]["name"]}} if "function" in each else each for each in tools]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}


def hermes(name: str = "get_weather", arguments: str = PARIS) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def says(script: ScriptRunner, tokenizer: Tokenizer, text: str) -> list[int]:
    """Makes the model say this, and then end; its tokens."""
    tokens = tokenizer.encode(text)
    script.script = (*tokens, tokenizer.eos_token_id or 0)
    return tokens


def ask(server: ServerThread, **body: Any) -> httpx.Response:
    return httpx.post(server.url + CHAT, json={"messages": ASK, **body}, timeout=WAIT_S)


def prompt(server: ServerThread) -> str:
    """What the model was told last."""
    assert server.client.latest is not None
    return server.api.text.tokenizer.decode(server.client.latest[0].prompts[0], False)


def grammar(server: ServerThread) -> str:
    assert server.client.latest is not None
    return server.client.latest[0].params.grammar


@pytest.fixture
def client(scripted: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=scripted.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


# --- what is refused ---

DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": "f"}, "tools"),
    ({"tools": ["f"]}, "tools.0"),
    ({"tools": [WEATHER, {"function": {"name": "f"}}]}, "tools.1.type"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [{**WEATHER, "colour": 1}]}, "tools.0.colour"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "f", "colour": 1}}]}, "tools.0.function.colour"),
    ({"tools": [tool("")]}, "tools.0.function.name"),
    ({"tools": [tool("a b")]}, "tools.0.function.name"),
    ({"tools": [tool("a.b")]}, "tools.0.function.name"),
    ({"tools": [tool("wetter_é")]}, "tools.0.function.name"),
    ({"tools": [tool("a\n")]}, "tools.0.function.name"),
    ({"tools": [tool("a" * 65)]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ({"tools": [WEATHER, TIME, WEATHER]}, "tools.2.function.name"),
    ({"tools": [tool(description=5)]}, "tools.0.function.description"),
    ({"tools": [tool(strict="yes")]}, "tools.0.function.strict"),
    ({"tools": [tool(parameters=[])]}, "tools.0.function.parameters"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools.0.function.parameters.type"),
    ({"tools": [tool(parameters={"type": ["object", "null"]})]}, "tools.0.function.parameters.type"),
    ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
    ({"tools": [tool(parameters={"description": "a" * 700_000})]}, "tools"),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": ["auto"]}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_time"}}}, "tool_choice.function.name"),
    ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    ({"tools": [WEATHER], "tool_choice": allowed("always", WEATHER)}, "tool_choice.allowed_tools.mode"),
    ({"tools": [WEATHER], "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
    ({"tools": [WEATHER], "tool_choice": allowed("auto", WEATHER, TIME)}, "tool_choice.allowed_tools.tools.1.function.name"),
    ({"tools": [WEATHER], "tool_choice": allowed("auto", {"type": "mcp"})}, "tool_choice.allowed_tools.tools.0.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice.function.name"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"tools": [WEATHER], "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ({"tools": [WEATHER], "tool_choice": "required", "guided_json": {}}, "guided_json"),
    ({"tools": [WEATHER], "response_format": {"type": "xml"}}, "response_format.type"),
    *(
        (asked, "tools.1.function.parameters")
        for schema in ({"properties": {"a": {"type": "colour"}}}, {"properties": {"a": {"type": "array", "uniqueItems": True}}}, DEEP)
        for asked in (
            {"tools": [WEATHER, tool("f", schema)], "tool_choice": "required"},
            {"tools": [WEATHER, tool("f", schema, strict=True)]},
            {"tools": [WEATHER, tool("f", schema, strict=True)], "response_format": {"type": "json_object"}},
        )
    ),
    (
        {"tools": [WEATHER], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "colour"}}}},
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.parametrize(("wrong", "param"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(scripted: ServerThread, wrong: dict[str, Any], param: str) -> None:
    answer = ask(scripted, **wrong)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    assert not scripted.client.submitted._happened.acquire(blocking=False), "it was not queued"
    assert scripted.api.lifecycle.running == 0


def test_grammars_that_are_too_long_together_name_the_tools(scripted: ServerThread) -> None:
    long = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 700}}}
    answer = ask(
        scripted, tools=[tool(f"f{i}", long) for i in range(100)], tool_choice="required", messages=[{"role": "user", "content": "a"}]
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("tools", "messages")


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": None, "tool_choice": None, "parallel_tool_calls": None},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"parallel_tool_calls": False},
    ],
)
def test_without_tools_all_is_as_ever(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer, asked: dict[str, Any]) -> None:
    says(script, tokenizer, "a " + hermes())
    choice = ask(scripted, **asked).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "a " + hermes(), "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert "# Tools" not in prompt(scripted)
    assert grammar(scripted) == ""


# --- what the model is told ---


def test_the_model_is_told_of_tools_and_of_what_they_gave(scripted: ServerThread) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21 C"},
    ]
    assert ask(scripted, messages=messages, tools=[tool(strict=True), TIME], max_tokens=1).status_code == 200
    told = prompt(scripted)
    assert '"name": "get_weather"' in told
    assert '"name": "get_time"' in told
    assert "strict" not in told
    given = "<tool_response>\n21 C\n</tool_response>"
    assert told.endswith(f"assistant\n{hermes()}<|im_end|>\n<|im_start|>user\n{given}<|im_end|>\n<|im_start|>assistant\n")
    tokens = httpx.post(scripted.url + "/tokenize", json={"messages": messages, "tools": [WEATHER, TIME]}, timeout=WAIT_S).json()["tokens"]
    assert ask(scripted, messages=messages, tools=[WEATHER, TIME], max_tokens=1).status_code == 200
    assert scripted.client.latest is not None
    assert list(scripted.client.latest[0].prompts[0]) == tokens


def test_what_reaches_the_engine_as_a_grammar(scripted: ServerThread) -> None:
    def of(**asked: Any) -> str:
        assert ask(scripted, max_tokens=1, **asked).status_code == 200
        return grammar(scripted)

    assert of(tools=[WEATHER, TIME]) == ""
    both, one = of(tools=[WEATHER, TIME], tool_choice="required"), of(tools=[WEATHER, TIME], tool_choice=NAMED)
    assert "get_time" in both
    assert "get_time" not in one
    assert of(tools=[WEATHER], tool_choice=NAMED) == one
    assert of(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False) == one
    assert of(tools=[WEATHER], tool_choice="required", response_format={"type": "json_object"}) == of(
        tools=[WEATHER], tool_choice="required"
    )
    strict = of(tools=[tool(strict=True), TIME])
    assert "city" in strict
    assert "TEXT" in strict
    odd = tool("f", {"properties": {"a": {"type": "array", "uniqueItems": True}}})
    assert of(tools=[odd]) == "", "whose schema nobody follows"
    assert "uniqueItems" not in of(tools=[tool(strict=True), odd])
    assert "answer" in of(tools=[WEATHER], response_format={"type": "json_object"})


# --- calls, in the words of the default model ---


def test_a_call_whole(client: openai.OpenAI, scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    tokens = says(script, tokenizer, hermes())
    answer = client.chat.completions.create(model="script", messages=ASK, tools=[WEATHER, TIME])
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", PARIS)
    assert call.id.startswith("call_")
    assert len(call.id) == 29
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(tokens) + 1


def test_a_call_streamed_as_openai_does(client: openai.OpenAI, scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    tokens = says(script, tokenizer, "Let me see.\n" + hermes() + "\n" + hermes("get_time", "{}"))
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="script", messages=ASK, tools=[WEATHER, TIME], stream=True, stream_options=options))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokens) + 1
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", None)
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert all(not delta.tool_calls or (len(delta.tool_calls) == 1 and delta.content is None) for delta in deltas)
    pieces = [call for delta in deltas for call in delta.tool_calls or ()]
    names = [piece.function.name for piece in pieces if piece.function]
    assert [name for name in names if name] == ["get_weather", "get_time"]
    for index, arguments in enumerate((PARIS, "{}")):
        first, *rest = [piece for piece in pieces if piece.index == index]
        assert first.function is not None
        assert (first.type, first.function.arguments) == ("function", "")
        assert (first.id or "").startswith("call_")
        assert all(piece.id is None and piece.type is None and piece.function and piece.function.name is None for piece in rest)
        assert "".join(piece.function.arguments or "" for piece in rest if piece.function) == arguments
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["tool_calls"]


def test_arguments_come_as_they_are_written(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    tokens = says(script, tokenizer, hermes())
    some = next(n for n in range(len(tokens)) if '{"city' in tokenizer.decode(tokens[:n]))
    script.hold(steps=some)
    body = {"messages": ASK, "tools": [WEATHER], "stream": True}
    with httpx.stream("POST", scripted.url + CHAT, json=body, timeout=WAIT_S) as response:
        events = (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: {"))
        calls = (call["function"]["arguments"] for event in events for call in event["choices"][0]["delta"].get("tool_calls", ()))
        assert next(calls) == ""
        begun = next(calls)
        script.free()
        assert len(begun) < len(PARIS)
        assert begun + "".join(calls) == PARIS


def test_the_client_s_own_helper_puts_a_stream_together(
    client: openai.OpenAI, script: ScriptRunner, tokenizer: Tokenizer, scripted
) -> None:
    says(script, tokenizer, hermes())
    with client.chat.completions.stream(model="script", messages=ASK, tools=[tool(strict=True)]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content is None
    (call,) = message.tool_calls or ()
    assert call.function.parsed_arguments == {"city": "Paris"}


def test_no_call_is_text_whole(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    for text in ("It is <tool_call", hermes("get_wind"), "<tool_call>\n{}\n</tool_call>"):
        says(script, tokenizer, text)
        choice = ask(scripted, tools=[WEATHER]).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == "stop"


def test_a_named_function_ends_with_stop_as_openai_does(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    says(script, tokenizer, hermes())
    for choice, finish in ((NAMED, "stop"), ("required", "tool_calls")):
        answered = ask(scripted, tools=[WEATHER], tool_choice=choice).json()["choices"][0]
        assert answered["finish_reason"] == finish
        assert answered["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": PARIS}


def test_only_allowed_tools_are_called(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    says(script, tokenizer, hermes() + hermes("get_time", "{}"))
    choice = ask(scripted, tools=[WEATHER, TIME], tool_choice=allowed("auto", TIME)).json()["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_time"]
    assert choice["message"]["content"] == hermes(), "is no call then"
    assert grammar(scripted) == ""
    assert '"get_weather"' in prompt(scripted), "the model is told of all, so that what it has cached of them can be used"
    ask(scripted, tools=[WEATHER, TIME], tool_choice=allowed("required", TIME))
    assert "get_time" in grammar(scripted)
    assert "get_weather" not in grammar(scripted)


def test_not_in_parallel_ends_with_the_first_call(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    script.script = tokenizer.encode(hermes())  # over and over
    answer = ask(scripted, tools=[WEATHER], parallel_tool_calls=False, max_tokens=500, n=2).json()
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [PARIS]
    used = next(n for n in range(len(script.script) + 1) if PARIS + "}" in tokenizer.decode(script.script[:n]))
    assert answer["usage"]["completion_tokens"] == 2 * used, "what the engine has written meanwhile does not count"
    scored = ask(scripted, tools=[WEATHER], parallel_tool_calls=False, max_tokens=500, logprobs=True).json()
    assert len(scored["choices"][0]["logprobs"]["content"]) == scored["usage"]["completion_tokens"] == used
    scripted.client.aborted.wait()
    scripted.client.wait_for(lambda stats: stats.running == 0 and stats.pages_active == 0)


def test_cut_off_by_max_tokens(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    tokens = says(script, tokenizer, hermes())
    whole = ask(scripted, tools=[WEATHER], max_tokens=len(tokens) - 12).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    written = whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert PARIS.startswith(written)
    assert written != PARIS
    few = {choice: ask(scripted, tools=[WEATHER], tool_choice=choice, max_tokens=6).json()["choices"][0] for choice in ("auto", "required")}
    assert few["auto"]["message"]["content"] == tokenizer.decode(tokens[:6]), "nothing is lost"
    assert few["required"]["message"] == {"role": "assistant", "content": "", "refusal": None}
    assert {choice["finish_reason"] for choice in few.values()} == {"length"}


def test_several_choices_with_log_probabilities(
    client: openai.OpenAI, script: ScriptRunner, tokenizer: Tokenizer, scripted: ServerThread
) -> None:
    tokens = says(script, tokenizer, "Well: " + hermes())
    asked: Any = {"model": "script", "messages": ASK, "tools": [WEATHER], "n": 3, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    ids = set()
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or ()) == len(tokens) + 1
        assert choice.message.content == "Well:"
        ids |= {call.id for call in choice.message.tool_calls or ()}
    assert len(ids) == 3
    counts = [0, 0, 0]
    for chunk in client.chat.completions.create(**asked, stream=True):
        (part,) = chunk.choices
        counts[part.index] += len((part.logprobs and part.logprobs.content) or ())
    assert counts == [len(tokens) + 1] * 3


def test_a_stop_string_inside_a_call(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    says(script, tokenizer, hermes() + " and more")
    choice = ask(scripted, tools=[WEATHER], stop=["</tool_call>"]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["stop_reason"] == "</tool_call>"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == PARIS


# --- models of other families, whose markers are special tokens ---


@pytest.fixture(scope="module", params=FAMILIES)
def other(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[tuple[ServerThread, ScriptRunner, Tokenizer]]:
    own, runner = family(request.param, tokenizer), ScriptRunner()
    engine = script_engine(runner, own.vocab_size, own.eos_token_id or 0)
    with ServerThread(engine, own, ServerOptions(port=0, log_level="warning"), LimitOptions()) as server:
        yield server, runner, own


def test_calls_of_every_family(other: tuple[ServerThread, ScriptRunner, Tokenizer]) -> None:
    server, script, tokenizer = other
    format = server.api.tool_calls.format
    assert format is not None
    body = f'{{"name": "get_weather", "{format.arguments}": {PARIS}}}'
    written = format.opening[-1] + body + format.closing
    calls = [written] if not format.bare else [written, format.marker + written]
    for text in calls:
        says(script, tokenizer, text)
        for choice in ("auto", "required"):
            message = ask(server, tools=[WEATHER, TIME], tool_choice=choice).json()["choices"][0]["message"]
            assert message["content"] is None
            assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": PARIS}
            lines = ask(server, tools=[WEATHER, TIME], tool_choice=choice, stream=True).text.splitlines()
            deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
            assert all(delta.get("content") is None for delta in deltas)
            pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
            assert "".join(piece["function"]["arguments"] for piece in pieces) == PARIS


def test_special_tokens_are_not_shown(other: tuple[ServerThread, ScriptRunner, Tokenizer]) -> None:
    server, script, tokenizer = other
    special = [token for token in sorted(tokenizer.special_ids) if token != tokenizer.eos_token_id]
    script.script = (*tokenizer.encode("so"), *special, *tokenizer.encode(" it is"), tokenizer.eos_token_id or 0)
    for asked in ({}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "none"}):
        assert ask(server, **asked).json()["choices"][0]["message"]["content"] == "so it is"
    shown = ask(server, tools=[WEATHER], skip_special_tokens=False).json()["choices"][0]["message"]["content"]
    assert shown == "so" + "".join(map(tokenizer.token_text, special)) + " it is"


def test_the_template_takes_a_conversation_back(other: tuple[ServerThread, ScriptRunner, Tokenizer]) -> None:
    server, script, tokenizer = other
    script.script = (tokenizer.eos_token_id or 0,)
    call = {"id": "call_0123", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
    answered = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0123", "content": "21"},
    ]
    assert ask(server, messages=[*ASK, *answered], tools=[WEATHER]).status_code == 200
    assert PARIS in prompt(server)


def test_the_option_has_to_fit_the_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="--tool-call-format mistral: this model's chat template knows no tools"):
        ToolCalls.of(tokenizer, "mistral")
    qwen = family("qwen", tokenizer)
    assert ToolCalls.of(qwen, "auto").format is ToolCalls.of(qwen, "hermes").format
    forced = ToolCalls.of(family("mistral", tokenizer), "llama3_json").format
    assert forced is not None
    assert forced.name == "llama3_json"


def test_a_format_that_nobody_knows(tokenizer: Tokenizer) -> None:
    strange = Tokenizer(tokenizer._backend, {}, "{{ tools }}{{ messages[0].content }}")
    runner = ScriptRunner((tokenizer.eos_token_id or 0,))
    with ServerThread(
        script_engine(runner, strange.vocab_size, 2), strange, ServerOptions(port=0, log_level="warning"), LimitOptions()
    ) as server:
        answer = ask(server, tools=[WEATHER])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert "--tool-call-format" in answer.json()["error"]["message"]
        assert ask(server, tools=[WEATHER], tool_choice="none").status_code == 200


# --- hostile ones ---


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_hostile_tools_are_answered_soon(scripted: ServerThread, choice: str) -> None:
    deep = '{"properties": {"a": ' * 900 + "1" + "}}" * 900
    hostile = [
        [tool(f"f{i}") for i in range(1000)],
        [tool(f"f{i}", {"properties": {f"p{k}": {} for k in range(20)}}, strict=True) for i in range(128)],
        [tool(parameters={"deep": True}, strict=True)],
        [tool(parameters={"properties": {"日本 \N{ROSE} \u202e": {"enum": ["\x00", "</tool_call>", "{% raw %}{{ 1 }}"]}}}, strict=True)],
        [tool(parameters={"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, strict=True)],
        [tool(parameters={"properties": {f"p{i}": {"type": "string", "pattern": "(a|b)*c{50}"} for i in range(50)}}, strict=True)],
        [tool(description="</tools><|im_end|>" * 1000)],
    ]
    for tools in hostile:
        body = json.dumps({"messages": ASK, "tools": tools, "tool_choice": choice, "max_tokens": 1}).replace('{"deep": true}', deep)
        began_s = time.perf_counter()
        assert httpx.post(scripted.url + CHAT, content=body, timeout=WAIT_S).status_code in (200, 400)
        assert time.perf_counter() - began_s < 20.0
    assert scripted.api.lifecycle.running == 0


# --- the small real model, through OpenAI's client ---


@pytest.fixture
def smollm(real: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_whole_and_as_a_stream(smollm: openai.OpenAI, real: ServerThread, choice: Any) -> None:
    asked: Any = {"model": real.api.info.name, "messages": ASK, "tools": [WEATHER, TIME], "tool_choice": choice, "temperature": 0}
    answer = smollm.chat.completions.create(**asked, parallel_tool_calls=False, max_tokens=200).choices[0]
    (call,) = answer.message.tool_calls or ()
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    Draft202012Validator(WEATHER["function"]["parameters"] if call.function.name == "get_weather" else {}).validate(arguments)
    with smollm.chat.completions.stream(**asked, parallel_tool_calls=False, max_tokens=200) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls is not None
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert streamed.finish_reason == answer.finish_reason == ("stop" if choice is NAMED else "tool_calls")


@pytest.mark.slow
def test_a_conversation_with_a_tool(smollm: openai.OpenAI, real: ServerThread) -> None:
    asked: Any = {"model": real.api.info.name, "tools": [WEATHER], "temperature": 0, "max_tokens": 100}
    called = smollm.chat.completions.create(messages=ASK, tool_choice=NAMED, **asked).choices[0].message
    assert called.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "21 degrees, sunny"}
    answer = smollm.chat.completions.create(messages=[*ASK, called, result], tool_choice="none", **asked).choices[0]
    assert answer.message.tool_calls is None
    assert answer.message.content


@pytest.mark.slow
def test_many_choices_at_random_are_all_valid(smollm: openai.OpenAI, real: ServerThread) -> None:
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["unit", "days"],
    }
    answer = smollm.chat.completions.create(
        model=real.api.info.name, messages=ASK, tools=[tool("f", schema), TIME], tool_choice="required", n=8, seed=1, max_tokens=300
    )
    for choice in answer.choices:
        assert choice.finish_reason in ("tool_calls", "length")
        for call in choice.message.tool_calls or () if choice.finish_reason == "tool_calls" else ():
            assert call.type == "function"
            Draft202012Validator(schema if call.function.name == "f" else {"maxProperties": 0}).validate(
                json.loads(call.function.arguments)
            )
    assert any(choice.finish_reason == "tool_calls" for choice in answer.choices)
