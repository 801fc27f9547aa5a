"""Every bad input gets its 4xx with the field's name, in both forms of answer, and the server goes on serving."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from serving import WAIT_S, ScriptRunner, ServerThread

MESSAGES = [{"role": "user", "content": "Hello"}]
MANY = 10_000

SHARED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": MANY}, "n"),
    ({"n": 2**62}, "n"),
    ({"n": 1.5}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": MANY}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"min_tokens": 2**62}, "min_tokens"),
    ({"stop": ["a"] * MANY}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": "a" * MANY}, "stop"),
    ({"stop_token_ids": [0] * MANY}, "stop_token_ids"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"logit_bias": {str(i): 1 for i in range(MANY)}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"999999999": 1}}, "logit_bias"),
    ({"seed": 2**64}, "seed"),
    ({"priority": 2**40}, "priority"),
    ({"stream_options": {"include_usage": True, "colour": 1}, "stream": True}, "stream_options.colour"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"logit_processors": ["x"]}, "logit_processors"),
    ({"model": 5}, "model"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": MANY}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": MANY, "max_tokens": 5}, "max_completion_tokens"),
]
CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": "a " * 200_000}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a " * 6_000}]}, "messages"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"prompt": "a"}, "prompt"),
]
COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": ["a"] * MANY}, "prompt"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [1] * MANY}, "prompt"),
    ({"prompt": "a " * 200_000}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 3}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1, "echo": True}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"suffix": "x"}, "suffix"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"best_of": 3}, "best_of"),
    ({"echo": "yes"}, "echo"),
]


def label(case: object) -> str | None:
    return str(case)[:40] if isinstance(case, (dict, str)) else None


def refused(server: ServerThread, route: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(server.url + route, json=body, timeout=WAIT_S)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.partition(".")[0] in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    ok = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=WAIT_S)
    assert ok.status_code == 200
    assert server.api.lifecycle.running == 0


@pytest.mark.parametrize(("wrong", "param"), SHARED + CHAT, ids=label)
def test_bad_chat(scripted: ServerThread, wrong: dict[str, Any], param: str) -> None:
    refused(scripted, "/v1/chat/completions", {"messages": MESSAGES, **wrong}, param)
    refused(scripted, "/v1/chat/completions", {"messages": MESSAGES, **wrong, "stream": True}, param)


@pytest.mark.parametrize(("wrong", "param"), SHARED + COMPLETIONS, ids=label)
def test_bad_completions(scripted: ServerThread, wrong: dict[str, Any], param: str) -> None:
    refused(scripted, "/v1/completions", {"prompt": "a", **wrong}, param)
    refused(scripted, "/v1/completions", {"prompt": "a", **wrong, "stream": True}, param)


def test_an_unknown_model_is_a_404(scripted: ServerThread) -> None:
    for route, body in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
    ):
        answer = httpx.post(scripted.url + route, json={**body, "model": "gpt"}, timeout=WAIT_S)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_a_prompt_that_is_too_long_says_so_by_code(scripted: ServerThread, script: ScriptRunner) -> None:
    for prompt in ([1] * MANY, "a " * 200_000, "a " * 6_000):
        answer = httpx.post(scripted.url + "/v1/completions", json={"prompt": prompt}, timeout=WAIT_S)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
