"""Chat and completions against a model that follows a script: exact texts, through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import WAIT_S, ScriptRunner, ServerThread

from quire.worker.text.tokenizer import Tokenizer

TEXT = "The rose is red, the violet's blue \N{ROSE}\N{EARTH GLOBE EUROPE-AFRICA}, and honey is sweet."
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(scripted: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=scripted.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def says(script: ScriptRunner, tokenizer: Tokenizer) -> list[int]:
    """Makes the model say TEXT, and then end; its tokens."""
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.eos_token_id is not None
    script.script = (*tokens, tokenizer.eos_token_id)
    return tokens


def events(scripted: ServerThread, route: str, **body: Any) -> list[dict[str, Any]]:
    """The JSON of a stream's events, `[DONE]` checked and left out."""
    with httpx.stream("POST", scripted.url + route, json={**body, "stream": True}, timeout=WAIT_S) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_chat_whole(client: openai.OpenAI, says: list[int], tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model="script", messages=HELLO)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    prompt = tokenizer.encode(tokenizer.apply_chat_template(HELLO), add_special_tokens=False)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(says) + 1
    assert answer.usage.total_tokens == len(prompt) + len(says) + 1


def test_chat_streamed(scripted: ServerThread, client: openai.OpenAI, says: list[int]) -> None:
    chunks = list(client.chat.completions.create(model="script", messages=HELLO, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(says) + 1
    assert len({chunk.id for chunk in chunks}) == 1
    assert "usage" not in events(scripted, "/v1/chat/completions", messages=HELLO)[0]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_usage_so_far_in_each_chunk(scripted: ServerThread, script: ScriptRunner, says: list[int], route: str) -> None:
    asked = {"messages": HELLO} if route.startswith("/v1/chat") else {"prompt": "Hello"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**asked, "stream": True, "stream_options": options, "max_tokens": 100}
    script.hold(steps=1)
    with httpx.stream("POST", scripted.url + route, json=body, timeout=WAIT_S) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        first = next(lines)
        script.free()
        usages = [json.loads(line.removeprefix("data: "))["usage"] for line in (first, *lines)]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] == len(says) + 1
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    silent = events(scripted, route, **asked, stream_options={"continuous_usage_stats": True}, max_tokens=2)
    assert not any("usage" in event for event in silent)


def test_the_first_chunk_comes_with_the_first_token_even_if_that_is_half_a_character(
    scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer
) -> None:
    script.script = tokenizer.encode("\N{EARTH GLOBE EUROPE-AFRICA}")
    assert len(script.script) > 1
    script.hold(steps=1)
    body = {"prompt": "a", "max_tokens": 2 * len(script.script), "stream": True}
    with httpx.stream("POST", scripted.url + "/v1/completions", json=body, timeout=WAIT_S) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == ""
        script.free()
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == 2 * "\N{EARTH GLOBE EUROPE-AFRICA}"


def test_the_id_is_also_a_header(scripted: ServerThread, says: list[int]) -> None:
    for stream in (False, True):
        answer = httpx.post(scripted.url + "/v1/completions", json={"prompt": "a", "stream": stream}, timeout=WAIT_S)
        assert answer.headers["x-request-id"].startswith("cmpl-")
        assert answer.headers["x-request-id"] in answer.text


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("violet", "The rose is red, the "),
        (["sweet.", "ed, the v"], "The rose is r"),
        ("\N{ROSE}", TEXT.partition("\N{ROSE}")[0]),
        ("is sweeter", TEXT),  # begins in the text, and must be shown in the end
        ("T", ""),
    ],
)
def test_stop_strings_wherever_tokens_are_cut(scripted: ServerThread, says: list[int], tokenizer: Tokenizer, stop: Any, shown: str) -> None:
    found = next((s for s in [stop] if isinstance(s, str)), "ed, the v") if shown != TEXT else None
    body = {"prompt": "a", "stop": stop, "max_tokens": 100}
    whole = httpx.post(scripted.url + "/v1/completions", json=body, timeout=WAIT_S).json()
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (shown, "stop", found)
    used = next((n for n in range(len(says) + 1) if found and found in tokenizer.decode(says[:n])), len(says) + 1)
    assert whole["usage"]["completion_tokens"] == used
    pieces = events(scripted, "/v1/completions", **body, stream_options={"include_usage": True})
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == shown
    assert pieces[-2]["choices"][0]["stop_reason"] == found
    assert pieces[-1]["usage"]["completion_tokens"] == used
    kept = httpx.post(scripted.url + "/v1/completions", json={**body, "include_stop_str_in_output": True}, timeout=WAIT_S).json()
    assert kept["choices"][0]["text"] == shown + (found or "")


def test_a_stop_string_ends_the_sequence_at_the_engine(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    script.script = tokenizer.encode(" never stops by itself")
    httpx.post(scripted.url + "/v1/completions", json={"prompt": "a", "stop": "itself never", "max_tokens": 4000}, timeout=WAIT_S)
    scripted.client.aborted.wait()
    scripted.client.wait_for(lambda stats: stats.running == 0 and stats.pages_active == 0)


def test_stop_tokens(scripted: ServerThread, says: list[int], tokenizer: Tokenizer) -> None:
    body = {"prompt": "a", "stop_token_ids": [says[3]], "max_tokens": 100}
    choice = httpx.post(scripted.url + "/v1/completions", json=body, timeout=WAIT_S).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (tokenizer.decode(says[:3]), "stop", says[3])
    kept = httpx.post(scripted.url + "/v1/completions", json={**body, "include_stop_str_in_output": True}, timeout=WAIT_S).json()[
        "choices"
    ][0]
    assert kept["text"] == tokenizer.decode(says[:4])
    on = httpx.post(scripted.url + "/v1/completions", json={**body, "min_tokens": 5}, timeout=WAIT_S).json()["choices"][0]
    assert on["text"] == TEXT


def test_max_tokens(scripted: ServerThread, says: list[int], tokenizer: Tokenizer) -> None:
    default = httpx.post(scripted.url + "/v1/completions", json={"prompt": "a"}, timeout=WAIT_S).json()
    assert default["usage"]["completion_tokens"] == 16
    for name in ("max_tokens", "max_completion_tokens"):
        answer = httpx.post(scripted.url + "/v1/chat/completions", json={"messages": HELLO, name: 3}, timeout=WAIT_S).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode(says[:3])
        body = {"prompt": "a", name: 3}
        assert httpx.post(scripted.url + "/v1/completions", json=body, timeout=WAIT_S).json()["usage"]["completion_tokens"] == 3


def test_special_tokens_are_shown_when_asked(scripted: ServerThread, script: ScriptRunner, tokenizer: Tokenizer) -> None:
    special = next(token for token in sorted(tokenizer.special_ids) if token != tokenizer.eos_token_id)
    word = tokenizer.encode("word")[0]
    script.script = (word, special, word)
    body = {"prompt": "a", "max_tokens": 3}
    assert httpx.post(scripted.url + "/v1/completions", json=body, timeout=WAIT_S).json()["choices"][0]["text"] == "wordword"
    shown = httpx.post(scripted.url + "/v1/completions", json={**body, "skip_special_tokens": False}, timeout=WAIT_S).json()
    assert shown["choices"][0]["text"] == f"word{tokenizer.token_text(special)}word"


def test_several_choices_and_prompts_in_order(scripted: ServerThread, client: openai.OpenAI, says: list[int], tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="script", prompt=["a", "b b b", "c"], n=2, max_tokens=100)
    Completion.model_validate(answer.model_dump(), strict=True)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert {choice.text for choice in answer.choices} == {TEXT}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in ("a", "b b b", "c"))
    assert answer.usage.completion_tokens == 6 * (len(says) + 1)
    texts, ends = dict.fromkeys(range(6), ""), []
    for event in events(scripted, "/v1/completions", prompt=[[1, 2], [3], [4, 5, 6]], n=2, max_tokens=100):
        choice = event["choices"][0]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert set(texts.values()) == {TEXT}
    assert sorted(ends) == list(range(6))
    chat = events(scripted, "/v1/chat/completions", messages=HELLO, n=3)
    roles = [event["choices"][0]["index"] for event in chat if event["choices"][0]["delta"].get("role")]
    assert sorted(roles) == [0, 1, 2]


def test_chat_logprobs(client: openai.OpenAI, says: list[int], tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model="script", messages=HELLO, logprobs=True, top_logprobs=2)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content
    assert content is not None
    assert b"".join(bytes(entry.bytes or ()) for entry in content[:-1]).decode() == TEXT
    assert [entry.logprob for entry in content] == [-0.25] * (len(says) + 1)
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [
        (tokenizer.token_text(says[0]), -0.25),
        (tokenizer.token_text(says[0] + 1), -9999.0),
    ]
    streamed = client.chat.completions.create(model="script", messages=HELLO, logprobs=True, stream=True)
    entries = [entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or ()]
    assert [entry.bytes for entry in entries] == [entry.bytes for entry in content]
    assert all(entry.top_logprobs == [] for entry in entries)


def test_no_alternatives_are_no_reason_to_ask_for_logprobs(scripted: ServerThread, says: list[int]) -> None:
    body = {"messages": HELLO, "logprobs": False, "top_logprobs": 0}
    assert httpx.post(scripted.url + "/v1/chat/completions", json=body, timeout=WAIT_S).json()["choices"][0]["logprobs"] is None


def test_completion_logprobs(scripted: ServerThread, client: openai.OpenAI, says: list[int], tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="script", prompt="a", logprobs=1, max_tokens=100)
    Completion.model_validate(answer.model_dump(), strict=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.token_logprobs or ()) == len(says) + 1
    for word, offset in zip(logprobs.tokens[:-1], logprobs.text_offset, strict=False):
        assert word.startswith("bytes:") or TEXT.startswith(word, offset)
    assert any(word.startswith("bytes:\\x") for word in logprobs.tokens), "TEXT has characters of several tokens"
    assert logprobs.text_offset[-1] == len(TEXT)
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {tokenizer.token_text(says[0]): -0.25}
    pieces = events(scripted, "/v1/completions", prompt="a", logprobs=1, max_tokens=100)
    parts = [piece["choices"][0]["logprobs"] for piece in pieces if piece["choices"][0]["logprobs"]]
    for name, whole in logprobs.model_dump().items():
        assert [item for part in parts for item in part[name]] == whole


def test_logprobs_end_where_a_stop_string_is_complete(scripted: ServerThread, says: list[int]) -> None:
    answer = httpx.post(
        scripted.url + "/v1/completions", json={"prompt": "a", "stop": "rose is", "logprobs": 0, "max_tokens": 50}, timeout=WAIT_S
    ).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] < len(says)


def test_echo(scripted: ServerThread, says: list[int]) -> None:
    prompt = "Once upon a time\N{EARTH GLOBE EUROPE-AFRICA}"
    for stream in (False, True):
        body = {"prompt": prompt, "echo": True, "max_tokens": 100, "n": 2}
        if stream:
            texts = ["", ""]
            for event in events(scripted, "/v1/completions", **body):
                texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        else:
            texts = [choice["text"] for choice in httpx.post(scripted.url + "/v1/completions", json=body, timeout=WAIT_S).json()["choices"]]
        assert texts == [prompt + TEXT] * 2
    alone = httpx.post(scripted.url + "/v1/completions", json={"prompt": [1, 2, 3], "echo": True, "max_tokens": 0}, timeout=WAIT_S).json()
    assert (
        alone["choices"][0]["text"] == httpx.post(scripted.url + "/detokenize", json={"tokens": [1, 2, 3]}, timeout=WAIT_S).json()["prompt"]
    )
    assert alone["choices"][0]["finish_reason"] == "length"
    assert alone["usage"]["completion_tokens"] == 0


def test_cached_tokens_are_told(scripted: ServerThread, says: list[int]) -> None:
    body = {"prompt": list(range(500, 600)), "max_tokens": 2}
    first, second = (httpx.post(scripted.url + "/v1/completions", json=body, timeout=WAIT_S).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["prompt_tokens_details"] == {"cached_tokens": 96}
