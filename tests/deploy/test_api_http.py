"""What holds for every route, over real sockets: errors in OpenAI's shape, byte caps, smuggling, keys, health, metrics."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import WAIT_S, ScriptRunner, ServerThread, script_engine

from quire.deploy.api import chat, completions, http_server, info_routes, middleware, openapi, text_routes
from quire.worker.config import LimitOptions, ServerOptions
from quire.worker.text.chat_template import ChatTemplate
from quire.worker.text.tokenizer import Tokenizer


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert "Traceback" not in response.text
    return body["error"]


def raw(server: ServerThread, data: bytes) -> bytes:
    """Sends bytes and reads until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def test_unknown_routes_and_methods(scripted: ServerThread) -> None:
    unknown = httpx.get(scripted.url + "/v1/nothing", timeout=WAIT_S)
    assert unknown.status_code == 404
    assert "/v1/nothing" in error_of(unknown)["message"]
    wrong = httpx.get(scripted.url + "/v1/chat/completions", timeout=WAIT_S)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    error_of(wrong)
    for path in ("/docs", "/redoc", "/live/"):
        assert httpx.get(scripted.url + path, timeout=WAIT_S).status_code == 404


def test_models(scripted: ServerThread) -> None:
    listed = httpx.get(scripted.url + "/v1/models", timeout=WAIT_S).json()
    assert [model["id"] for model in listed["data"]] == ["script"]
    assert httpx.get(scripted.url + "/v1/models/script", timeout=WAIT_S).json() == listed["data"][0]
    for name in ("other", "org/other", "script/"):
        missing = httpx.get(f"{scripted.url}/v1/models/{name}", timeout=WAIT_S)
        assert missing.status_code == 404
        assert error_of(missing)["code"] == "model_not_found"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_every_post_refuses_what_is_no_json(scripted: ServerThread, route: str) -> None:
    for body in (b"", b"{", b"[]", b'{"a": NaN}', b"[" * 100_000, b'"\xff"'):
        answer = httpx.post(scripted.url + route, content=body, timeout=WAIT_S)
        assert answer.status_code == 400, body[:20]
        error_of(answer)
    form = httpx.post(scripted.url + route, files={"file": b"x"}, timeout=WAIT_S)
    assert form.status_code == 415
    error_of(form)
    packed = httpx.post(scripted.url + route, content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"}, timeout=WAIT_S)
    assert packed.status_code == 415
    assert "gzip" in error_of(packed)["message"]


def test_curl_without_a_content_type_works(scripted: ServerThread) -> None:
    body = b'{"prompt": "Hello"}'
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        assert httpx.post(scripted.url + "/tokenize", content=body, headers={"content-type": kind}, timeout=WAIT_S).status_code == 200


def test_a_body_that_declares_too_many_bytes_is_refused_unread(scripted: ServerThread) -> None:
    limit = scripted.api.options.max_body
    head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {limit + 1}\r\nConnection: close\r\n\r\n"
    assert raw(scripted, head.encode()).startswith(b"HTTP/1.1 413")
    answer = httpx.post(scripted.url + "/tokenize", content=b" " * (limit + 1), timeout=WAIT_S)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"
    assert httpx.post(scripted.url + "/tokenize", content=b'{"prompt": "a"}'.ljust(limit), timeout=WAIT_S).status_code == 200


def test_a_chunked_body_is_counted_while_it_comes(scripted: ServerThread) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(scripted.api.options.max_body // 2**16 + 1):
            yield b" " * 2**16

    answer = httpx.post(scripted.url + "/tokenize", content=chunks(), timeout=WAIT_S)
    assert answer.status_code == 413
    error_of(answer)


def test_a_body_that_never_comes_times_out(scripted: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.05)
    answer = raw(scripted, b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error"' in answer


@pytest.mark.parametrize(
    "headers",
    [
        b"Host: a\r\nHost: b\r\n",
        b"Host: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Host: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Host: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n",
        b"Host: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Host: a\r\nContent-Length: +4\r\n",
        b"Host: a\r\nContent-Length : 4\r\n",
        b"Host: a\r\nX: a\x00b\r\n",
    ],
)
def test_requests_that_two_servers_may_read_in_two_ways_are_refused(scripted: ServerThread, headers: bytes) -> None:
    answer = raw(scripted, b"GET /live HTTP/1.1\r\n" + headers + b"\r\n0\r\n\r\nGET /live HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1, "what follows must not be taken for a request"


@pytest.mark.parametrize(
    "line", [b"OPTIONS * HTTP/1.1", b"GET /\xff HTTP/1.1", b"GET http://[ HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"nonsense"]
)
def test_odd_request_lines_do_no_harm(scripted: ServerThread, line: bytes) -> None:
    answer = raw(scripted, line + b"\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 4")
    assert httpx.get(scripted.url + "/live", timeout=WAIT_S).status_code == 200


@pytest.mark.parametrize("piece", [b"A" * 2**14, b"x: " + b"y" * 200 + b"\r\n"])
def test_a_head_without_end_is_cut_off(scripted: ServerThread, piece: bytes) -> None:
    start = b"GET /live HTTP/1.1\r\nHost: a\r\n" + (b"X: " if b":" not in piece else b"")
    with socket.create_connection(("127.0.0.1", scripted.port), timeout=30) as connection:
        connection.sendall(start)
        sent = 0
        try:
            while sent < 1024 * http_server.MAX_HEAD_BYTES:
                sent += connection.send(piece)
        except ConnectionError:
            pass
    assert sent < 1024 * http_server.MAX_HEAD_BYTES, "the server read all of it"


def test_a_slow_head_is_cut_off(scripted: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    assert raw(scripted, b"GET /live HTTP/1.1\r\nHost:") == b""


@pytest.mark.parametrize(("request_head", "after"), [(b"", b"\r\n"), (b"Content-Length: 9\r\n", b"x")])
def test_what_is_no_request_does_not_keep_a_connection(
    scripted: ServerThread, monkeypatch: pytest.MonkeyPatch, request_head: bytes, after: bytes
) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", scripted.port), timeout=25) as connection:
        connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: a\r\n" + request_head + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(after)
        while connection.recv(65536):
            pass


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_http_2_is_declined_and_nothing_is_lost(scripted: ServerThread, chunked: bool, step: int) -> None:
    body = b'{"tokens": [81, 190, 82]}'
    length = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    asked = b"POST /detokenize HTTP/1.1\r\nHost: a\r\n" + H2C + length + b"\r\n" + sent
    last = b"GET /live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    data = asked + asked + b"GET /live HTTP/1.1\r\nHost: a\r\n" + H2C + b"\r\n" + last
    with socket.create_connection(("127.0.0.1", scripted.port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), step):
            connection.sendall(data[start : start + step])
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert received.count(b"HTTP/1.1 200") == 4, received
    assert received.count(b'{"prompt":"') == 2


def test_health_follows_the_engine(scripted: ServerThread) -> None:
    assert httpx.get(scripted.url + "/health", timeout=WAIT_S).status_code == 200
    try:
        scripted.client.clock_ahead_s = scripted.api.options.health_timeout_s + 1
        silent = httpx.get(scripted.url + "/health", timeout=WAIT_S)
        assert silent.status_code == 503
        assert error_of(silent)["code"] == "engine_silent"
        assert httpx.get(scripted.url + "/live", timeout=WAIT_S).status_code == 200
    finally:
        scripted.client.clock_ahead_s = 0.0


def test_tokenize_and_back(scripted: ServerThread, tokenizer: Tokenizer) -> None:
    text = "Shall I compare thee to a summer's day? \N{ROSE}"
    answer = httpx.post(scripted.url + "/tokenize", json={"prompt": text, "return_token_strs": True}, timeout=WAIT_S).json()
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == scripted.api.info.max_model_len
    assert httpx.post(scripted.url + "/detokenize", json={"tokens": answer["tokens"]}, timeout=WAIT_S).json() == {"prompt": text}
    messages = [{"role": "user", "content": "Hello"}]
    chat = httpx.post(scripted.url + "/tokenize", json={"messages": messages}, timeout=WAIT_S).json()
    assert chat["tokens"] == tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def test_the_chat_template_sees_the_values_that_are_given(
    scripted: ServerThread, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate("{{ messages[0].content }}{% if thinking %} {{ thinking }}{% endif %}", {})
    monkeypatch.setattr(tokenizer, "_template", template)
    asked = {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": {"thinking": "deeply"}}
    count = len(tokenizer.encode("Hello deeply", add_special_tokens=False))
    assert httpx.post(scripted.url + "/tokenize", json=asked, timeout=WAIT_S).json()["count"] == count
    answer = httpx.post(scripted.url + "/v1/chat/completions", json={**asked, "max_tokens": 1}, timeout=WAIT_S)
    assert answer.json()["usage"]["prompt_tokens"] == count
    wrong = httpx.post(scripted.url + "/tokenize", json={**asked, "chat_template_kwargs": {"thinking": [1]}}, timeout=WAIT_S)
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "chat_template_kwargs.thinking")


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"x": []}}, "chat_template_kwargs.x"),
        ("/tokenize", {"prompt": "a" * 1_000_000}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_text_requests(scripted: ServerThread, route: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(scripted.url + route, json=body, timeout=WAIT_S)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


def test_metrics_count_routes(scripted: ServerThread) -> None:
    httpx.get(scripted.url + "/live", timeout=WAIT_S)
    httpx.get(scripted.url + "/some/path/of/a/scanner", timeout=WAIT_S)
    text = httpx.get(scripted.url + "/metrics", timeout=WAIT_S).text
    assert 'quire_http_requests_total{ingress="ingress-0",route="/live",status="200"}' in text
    assert 'route="other",status="404"' in text
    assert "scanner" not in text
    assert 'quire_pages{replica="r0",state="free",tier="device"}' in text


def test_keys_guard_the_whole_server(tokenizer: Tokenizer) -> None:
    engine = script_engine(ScriptRunner(), tokenizer.vocab_size, 0)
    with ServerThread(engine, tokenizer, ServerOptions(port=0, api_key=("k1", "k2"), log_level="warning"), LimitOptions()) as server:
        paths = [route.path for module in (chat, completions, info_routes, openapi, text_routes) for route in module.router.routes]
        assert len(paths) == 11
        for path in [*paths, "/nothing"]:
            expected = 200 if path in ("/live", "/health") else 401
            for method in ("GET", "POST"):
                answer = httpx.request(method, server.url + path, timeout=WAIT_S)
                assert answer.status_code in (expected, 405) if expected == 200 else answer.status_code == 401, path
        refused = httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer k3"}, timeout=WAIT_S)
        assert error_of(refused)["code"] == "invalid_api_key"
        for key in ("k1", "k2"):
            assert httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=WAIT_S).status_code == 200
        # An absolute or odd target must reach the same decision as the router
        for target in (b"//live", b"/live/../v1/models", b"http://live/v1/models", b"/%6cive/..", b"/v1/models?/live", b"/live;/v1/models"):
            assert raw(server, b"GET " + target + b" HTTP/1.1\r\nHost: /live\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 401"), (
                target
            )


def test_a_bug_is_a_500_without_a_trace(scripted: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> float:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(scripted.client, "silent_s", broken)
    answer = httpx.get(scripted.url + "/health", timeout=WAIT_S)
    assert answer.status_code == 500
    assert "secret" not in json.dumps(error_of(answer))
    assert 'route="/health",status="500"' in httpx.get(scripted.url + "/metrics", timeout=WAIT_S).text
