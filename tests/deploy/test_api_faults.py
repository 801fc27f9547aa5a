"""When something ends badly: what the client is told, and that the engine is left clean."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import openai
import pytest
from serving import WAIT_S, Count, ScriptRunner, ServerThread, script_engine

from quire.deploy.api import http_server
from quire.worker.config import LimitOptions, ServerOptions
from quire.worker.text.tokenizer import Tokenizer

LONG = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}


def is_clean(server: ServerThread) -> None:
    """Nothing runs, and no page is in use."""
    server.on_loop(server.api.lifecycle._idle.wait())
    assert server.client.table.live() == []
    stats = server.client.wait_for(lambda stats: stats.running == 0 and stats.waiting == 0 and stats.pages_active == 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def post(server: ServerThread, stream: bool, **body: Any) -> httpx.Response:
    return httpx.post(server.url + "/v1/completions", json={**body, "stream": stream}, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_frees_its_place(scripted: ServerThread, script: ScriptRunner, stream: bool) -> None:
    body = json.dumps({**LONG, "n": 3, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    script.hold()  # not even a first token comes
    with socket.create_connection(("127.0.0.1", scripted.port)) as connection:
        connection.sendall(head + body)
        scripted.client.submitted.wait()
    scripted.client.aborted.wait()
    script.permits.release(2)
    is_clean(scripted)
    counts = httpx.get(scripted.url + "/metrics", timeout=WAIT_S).text
    assert 'quire_http_requests_total{ingress="ingress-0",route="/v1/completions",status="499"}' in counts


def test_a_client_that_leaves_in_mid_stream_frees_its_pages_in_two_steps(scripted: ServerThread, script: ScriptRunner) -> None:
    script.hold(steps=3)
    with httpx.stream("POST", scripted.url + "/v1/completions", json={**LONG, "stream": True}, timeout=WAIT_S) as response:
        assert next(response.iter_lines()).startswith("data: ")
    scripted.client.aborted.wait()
    script.permits.release(2)
    is_clean(scripted)


@pytest.fixture
def lost(scripted: ServerThread, monkeypatch: pytest.MonkeyPatch) -> Count:
    """Connections that the server has let go; it gives clients up quickly, and the kernel keeps little for them."""
    count, super_lost = Count(), http_server.BoundedHttp.connection_lost

    def connection_lost(self: http_server.BoundedHttp, error: Exception | None) -> None:
        super_lost(self, error)
        count.add()

    monkeypatch.setattr(http_server, "READ_TIMEOUT_S", 0.05)
    monkeypatch.setattr(http_server.BoundedHttp, "connection_lost", connection_lost)
    scripted.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of every connection from now on
    return count


def ask_and_do_not_read(server: ServerThread, connection: socket.socket, route: str, body: bytes, more_head: str = "") -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(f"POST {route} HTTP/1.1\r\nHost: x\r\n{more_head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def test_a_client_that_stops_reading_is_given_up(scripted: ServerThread, lost: Count, caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({**LONG, "n": 64, "logprobs": 2, "stream": True}).encode()
    with socket.socket() as connection:
        ask_and_do_not_read(scripted, connection, "/v1/completions", body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        lost.wait()
        is_clean(scripted)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("more_head", ["", "Connection: close\r\n"])
def test_a_client_that_never_reads_a_whole_answer_is_given_up(scripted: ServerThread, lost: Count, more_head: str) -> None:
    with socket.socket() as connection:
        ask_and_do_not_read(scripted, connection, "/detokenize", json.dumps({"tokens": [1000] * 100_000}).encode(), more_head)
        lost.wait()


def test_a_lost_replica_before_the_first_token_is_a_503(scripted: ServerThread, script: ScriptRunner) -> None:
    for stream in (False, True):
        script.hold()
        with httpx.Client(timeout=WAIT_S) as client:
            answers: list[httpx.Response] = []

            def ask(client: httpx.Client = client, answers: list[httpx.Response] = answers, stream: bool = stream) -> None:
                answers.append(client.post(scripted.url + "/v1/completions", json={**LONG, "stream": stream}, timeout=60))

            with scripted.meanwhile(ask):
                scripted.client.submitted.wait()
                scripted.call(scripted.client.lose_replica)
        script.free()
        scripted.call(scripted.client.connect)
        assert answers[0].status_code == 503
        assert "retry-after" in answers[0].headers
        assert answers[0].json()["error"]["code"] == "replica_lost"
        is_clean(scripted)


def test_a_lost_replica_in_mid_stream_is_an_error_event(scripted: ServerThread, script: ScriptRunner) -> None:
    script.hold(steps=3)
    with openai.OpenAI(base_url=scripted.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="script", prompt="a", max_tokens=4000, stream=True)
        assert next(stream).choices[0].text
        scripted.call(scripted.client.lose_replica)
        with pytest.raises(openai.APIError, match="replica is gone"):
            list(stream)
    script.free()
    scripted.call(scripted.client.connect)
    is_clean(scripted)


@pytest.mark.parametrize("stream", [False, True])
def test_a_sequence_that_cannot_be_computed(scripted: ServerThread, script: ScriptRunner, stream: bool) -> None:
    script.script = (-1,)
    at_once = post(scripted, stream, **LONG)
    assert at_once.status_code == 500
    assert at_once.json()["error"]["code"] == "engine_error"
    is_clean(scripted)
    script.script = (1000, 1000, 1000, -1)
    later = post(scripted, stream, **LONG, n=2)
    if stream:
        assert events_of(later)[-1]["error"]["message"] == "the logits are not finite"
    else:
        assert later.status_code == 500
    is_clean(scripted)


def test_a_full_queue_is_a_429(tokenizer: Tokenizer) -> None:
    runner = ScriptRunner((1000,))
    runner.hold()
    engine = script_engine(runner, tokenizer.vocab_size, 0, max_running=2, max_waiting=2)
    with ServerThread(engine, tokenizer, ServerOptions(port=0, log_level="warning"), LimitOptions()) as server:
        server.client.on_submit = runner.permits.release  # the engine answers between steps, so each request is granted one
        with server.meanwhile(lambda: post(server, False, **LONG, n=4)):
            server.client.submitted.wait()
            for stream in (False, True):
                refused = post(server, stream, **LONG)
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
            too_many = post(server, False, **LONG, n=5)
            assert too_many.status_code == 400
            assert too_many.json()["error"]["param"] == "n"
            runner.free()
        is_clean(server)


def test_draining_finishes_what_runs_refuses_what_comes_and_then_cuts_off(tokenizer: Tokenizer) -> None:
    runner = ScriptRunner((1000,))
    engine = script_engine(runner, tokenizer.vocab_size, 0)
    with ServerThread(engine, tokenizer, ServerOptions(port=0, log_level="warning"), LimitOptions()) as server:
        runner.hold(steps=2)
        with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, timeout=WAIT_S) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.api.lifecycle.draining = True
            refused = post(server, False, prompt="a")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert httpx.get(server.url + "/health", timeout=WAIT_S).status_code == 503
            assert httpx.get(server.url + "/live", timeout=WAIT_S).status_code == 200
            assert server.on_loop(server.api.lifecycle.drain(0.0)) is False
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        runner.free()
        is_clean(server)
