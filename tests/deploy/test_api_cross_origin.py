"""Browsers: which pages may call the API, also where a key is needed or something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from serving import WAIT_S, ScriptRunner, ServerThread, script_engine

from quire.deploy.api.cross_origin import allow
from quire.worker.config import LimitOptions, ServerOptions
from quire.worker.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
APP, OTHER = "https://app.example.com", "https://evil.example.com"
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module", params=[(APP, "http://127.0.0.1:3000"), ("*",)], ids=["named", "any"])
def server(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[ServerThread]:
    options = ServerOptions(port=0, api_key=("k1",), allowed_origin=request.param, log_level="warning")
    with ServerThread(script_engine(ScriptRunner((1000,)), tokenizer.vocab_size, 2), tokenizer, options, LimitOptions()) as server:
        yield server


def preflight(server: ServerThread, origin: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.options(server.url + CHAT, headers=asked, timeout=WAIT_S)


def call(server: ServerThread, origin: str, key: str = "k1", **body: object) -> httpx.Response:
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, **body}
    return httpx.post(server.url + CHAT, json=asked, headers={"Origin": origin, "Authorization": f"Bearer {key}"}, timeout=WAIT_S)


def test_an_allowed_page(server: ServerThread) -> None:
    any_page = server.api.options.allowed_origin == ("*",)
    answer = preflight(server, APP)
    assert answer.status_code == 200, "a browser asks without a key"
    assert answer.headers[ALLOWED] == ("*" if any_page else APP)
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    for stream in (False, True):
        answer = call(server, APP, stream=stream)
        assert answer.status_code == 200
        assert answer.headers[ALLOWED] == ("*" if any_page else APP)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    for answer in (call(server, APP, key="wrong"), call(server, APP, n=0)):
        assert answer.status_code in (400, 401)
        assert ALLOWED in answer.headers, "a page may read what is wrong"


def test_another_page(server: ServerThread) -> None:
    any_page = server.api.options.allowed_origin == ("*",)
    assert (preflight(server, OTHER).status_code == 200) is any_page
    assert (ALLOWED in call(server, OTHER).headers) is any_page


def test_no_page_is_allowed_by_default(scripted: ServerThread) -> None:
    assert preflight(scripted, APP).status_code == 405
    answer = call(scripted, APP)
    assert answer.status_code == 200
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    "wrong", ["", "app.example.com", "https://app.example.com/", "https://a b", "null", "ftp://a", "https://*.example.com"]
)
def test_what_is_no_origin_is_refused_at_the_start(wrong: str) -> None:
    with pytest.raises(ValueError, match="--allowed-origin"):
        allow(FastAPI(), [APP, wrong])
