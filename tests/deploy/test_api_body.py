"""Bytes to checked bodies: every wrong one is a 400 with the field's path."""

import json
from typing import Any

import pytest

from quire.deploy.api.body import parse
from quire.deploy.api.completions import read_prompts
from quire.deploy.api.errors import ApiError
from quire.deploy.api.messages import read_messages
from quire.deploy.api.schemas import ChatBody, CompletionBody, ToldUsage
from quire.deploy.api.unsupported import IGNORED, NEUTRAL
from quire.worker.protocol import BadRequest, SamplingParams

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields: object) -> ChatBody:
    return parse(json.dumps({"messages": HELLO, **fields}).encode(), ChatBody)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"prompt": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_what_is_not_json_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        parse(raw, CompletionBody)
    assert caught.value.status == 400


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse(b'{"prompt": "\\ud83d\\ude00"}', CompletionBody).prompt == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("n", 1.5),
        ("n", "1"),
        ("n", 2**63),
        ("max_tokens", 10**30),
        ("temperature", True),
        ("temperature", "0.5"),
        ("seed", 0.5),
        ("stream", 1),
        ("logprobs", 3),
        ("top_logprobs", True),
        ("stop", [1]),
        ("stop", {"a": "b"}),
        ("stop_token_ids", "5"),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"9" * 30: 1}),
        ("messages", "Hello"),
        ("messages", None),
        ("stream_options", {"include_usage": True}),  # without stream
        ("colour", "blue"),
    ],
)
def test_a_wrong_type_names_its_field(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**{field: value}).sampling(SamplingParams(), max_tokens=None, logprobs=None)
    assert caught.value.field == field


def test_the_path_of_a_nested_field_is_named() -> None:
    with pytest.raises(BadRequest) as caught:
        chat(stream=True, stream_options={"include_usage": "yes"})
    assert caught.value.field == "stream_options.include_usage"
    with pytest.raises(BadRequest) as caught:
        chat(logit_bias={"5": True})
    assert caught.value.field == "logit_bias.5"


def test_the_lower_of_two_bounds_counts() -> None:
    for bounds, longest, name in (
        ({}, 9, "max_tokens"),
        ({"max_tokens": 5}, 5, "max_tokens"),
        ({"max_completion_tokens": 5}, 5, "max_completion_tokens"),
        ({"max_tokens": 6, "max_completion_tokens": 5}, 5, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 5, "max_tokens"),
    ):
        body = chat(**bounds)
        assert (body.longest(9, 100), body.names) == (longest, {"max_tokens": name})


def test_a_whole_number_may_have_a_point() -> None:
    body = parse(
        b'{"prompt": [1.0, 2], "max_tokens": 16.0, "n": 2e0, "seed": -3.0, "temperature": 0.0, "length_penalty": 1.0}', CompletionBody
    )
    assert (body.prompt, body.max_tokens, body.n, body.seed, body.temperature) == ([1, 2], 16, 2, -3, 0)
    assert type(body.max_tokens) is int


def test_a_long_name_is_not_told_whole() -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**{"x" * 10_000: 1})
    assert len(str(caught.value)) < 300
    with pytest.raises(BadRequest) as caught:
        read_messages([{**HELLO[0], "x" * 10_000: 1}])
    assert len(str(caught.value)) < 300


def test_numbers_that_overflow_are_refused() -> None:
    for number in (b"1e999", b"1" + b"0" * 400):
        with pytest.raises(BadRequest) as caught:
            parse(b'{"prompt": "a", "temperature": ' + number + b"}", CompletionBody)
        assert caught.value.field == "temperature"


def test_null_means_not_given_even_for_unknown_fields() -> None:
    body = chat(
        temperature=None, tools=None, colour=None, stop=None, seed=None, stream=True, stream_options={"include_usage": None, "x": None}
    )
    assert body.told_usage is ToldUsage.NEVER
    own = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    assert body.sampling(own, max_tokens=None, logprobs=None) == own


@pytest.mark.parametrize("field", sorted(NEUTRAL.keys() - ChatBody.model_fields))
def test_what_is_not_there_is_refused_by_name(field: str) -> None:
    with pytest.raises(BadRequest, match="not supported") as caught:
        chat(**{field: {"something": 1}})
    assert caught.value.field == field
    for neutral in NEUTRAL[field]:
        chat(**{field: neutral})


def test_false_is_not_zero_in_the_neutral_values() -> None:
    with pytest.raises(BadRequest):
        chat(use_beam_search=0)


def test_best_of_must_equal_n() -> None:
    chat(n=2, best_of=2)
    with pytest.raises(BadRequest) as caught:
        chat(best_of=2)
    assert caught.value.field == "best_of"


def test_a_field_that_another_route_has_is_still_not_there() -> None:
    with pytest.raises(BadRequest, match="not supported") as caught:
        parse(b'{"prompt": "a", "tools": [{"type": "function"}]}', CompletionBody)
    assert caught.value.field == "tools"
    parse(b'{"prompt": "a", "tools": [], "tool_choice": "none", "parallel_tool_calls": "x"}', CompletionBody)
    for field, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        with pytest.raises(BadRequest, match=f"use {instead}"):
            chat(**{field: {"name": "f"}})


@pytest.mark.parametrize("field", sorted(IGNORED - ChatBody.model_fields.keys()))
def test_what_changes_nothing_is_taken(field: str) -> None:
    chat(**{field: "anything"})


def test_sampling_parameters_arrive() -> None:
    body = chat(
        n=2, temperature=0, top_p=0.5, top_k=3, min_p=0.1, stop="x", logit_bias={"7": -1}, stop_token_ids=[5], min_tokens=2, ignore_eos=True
    )
    assert body.sampling(SamplingParams(), max_tokens=9, logprobs=4) == SamplingParams(
        n=2,
        max_tokens=9,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        stop=("x",),
        logit_bias={7: -1.0},
        stop_token_ids=(5,),
        logprobs=4,
        ignore_eos=True,
    )


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("Hello", "messages.0"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": []}, "messages.0.content"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "wizard", "content": "x"}, "messages.0.role"),
        ({"role": ["user"], "content": "x"}, "messages.0.role"),
        ({"role": "function", "content": "x", "name": "f"}, "messages.0.role"),
        ({"role": "tool", "content": "x"}, "messages.0.tool_call_id"),
        ({"role": "tool", "tool_call_id": "1"}, "messages.0.content"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages.0.tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages.0.tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": CALL}, "messages.0.tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": ["f"]}, "messages.0.tool_calls.0"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls.0.function"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": 1}]}, "messages.0.tool_calls.0.id"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "messages.0.tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [{**CALL, "colour": 1}]}, "messages.0.tool_calls.0.colour"),
        ({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": 1}}]}, "messages.0.tool_calls.0.function.name"),
        (
            {"role": "assistant", "tool_calls": [CALL, {**CALL, "function": {"name": "f", "arguments": {}}}]},
            "messages.0.tool_calls.1.function.arguments",
        ),
        ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}, "messages.0.function_call"),
        ({"role": "user", "content": "x", "mood": "gay"}, "messages.0.mood"),
        ({"role": "user", "content": ["x"]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}]},
            "messages.0.content.1.type",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages.0.content.0.type"),
    ],
)
def test_a_wrong_message_names_the_place(message: object, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_messages([message])
    assert caught.value.field == field


def test_calls_and_what_they_gave() -> None:
    def called(arguments: str) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": arguments}}]}

    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "5"}]
    answers = [
        {"role": "tool", "content": parts, "tool_call_id": "call_1"},
        {"role": "tool", "content": "", "tool_call_id": "x", "name": "g"},
    ]
    assert read_messages([called('{"a": [1]}'), *answers]) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}],
        },
        {"role": "tool", "content": "4\n5", "tool_call_id": "call_1", "name": "f"},
        {"role": "tool", "content": "", "tool_call_id": "x", "name": "g"},
    ]
    for written, read in {
        "": {},
        '{"a": "\\ud83c\\udf39"}': {"a": "\N{ROSE}"},
        '{"city": "Par': '{"city": "Par',  # cut off
        "[1]": "[1]",
        '{"a": NaN}': '{"a": NaN}',
        '{"a": "\\ud83c"}': '{"a": "\\ud83c"}',
        '{"a":' * 100_000: '{"a":' * 100_000,
    }.items():
        assert read_messages([called(written)])[0]["tool_calls"][0]["function"]["arguments"] == read


def test_messages_become_role_and_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {
        "role": "assistant",
        "content": "c",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
    }
    assert read_messages([{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "Ada"}, answer]) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
    ]
    with pytest.raises(BadRequest):
        read_messages([])


def test_the_four_forms_of_a_prompt() -> None:
    assert read_prompts("a", 4) == ["a"]
    assert read_prompts(["a", "b"], 4) == ["a", "b"]
    assert read_prompts([1, 2], 4) == [(1, 2)]
    assert read_prompts([[1, 2], [3]], 4) == [(1, 2), (3,)]


@pytest.mark.parametrize(
    "raw", [[], [[]], [1, "a"], ["a", [1]], ["a", 1], [[1], "a"], [True], [1.0], [[1.5]], {"a": 1}, 5, [-1], [2**70], [[None]]]
)
def test_a_prompt_in_no_form_is_refused(raw: object) -> None:
    with pytest.raises(BadRequest) as caught:
        read_prompts(raw, 4)
    assert caught.value.field.startswith("prompt")


def test_too_many_prompts_are_refused_before_they_are_tokenized() -> None:
    with pytest.raises(BadRequest, match="at most 4"):
        read_prompts(["a"] * 5, 4)
