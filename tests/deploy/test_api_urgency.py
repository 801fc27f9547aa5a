"""Priority and deadline of a request: how they may be said, what is refused, and what a passed deadline looks like."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from serving import WAIT_S, ScriptRunner, ServerThread

from quire.deploy.api.urgency import Urgency
from quire.worker.protocol import DeadlineExceeded, Overloaded, QuireError

ROUTES = {"/v1/completions": {"prompt": "a"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}}


def post(server: ServerThread, headers: dict[str, str] | None = None, route: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(server.url + route, json={"max_tokens": 2, **ROUTES[route], **body}, headers=headers, timeout=60)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("body", "headers", "urgency"),
    [
        ({}, {}, Urgency(0, None)),
        ({"priority": None, "deadline_ms": None}, {}, Urgency(0, None)),
        ({"priority": -3, "deadline_ms": 60_000}, {}, Urgency(-3, 60_000)),
        ({"priority": "high"}, {}, Urgency(-1, None)),
        ({"priority": "normal"}, {}, Urgency(0, None)),
        ({"priority": "low"}, {}, Urgency(1, None)),
        ({}, {"X-Quire-Priority": "low", "X-Quire-Deadline-Ms": "60000"}, Urgency(1, 60_000)),
        ({}, {"x-quire-priority": "-7"}, Urgency(-7, None)),
        ({"priority": 0}, {"X-Quire-Priority": "high"}, Urgency(0, None)),
        ({"deadline_ms": 60_000}, {"X-Quire-Deadline-Ms": "1"}, Urgency(0, 60_000)),
    ],
)
def test_the_engine_hears_what_body_or_header_say(
    scripted: ServerThread, route: str, body: dict[str, Any], headers: dict[str, str], urgency: Urgency
) -> None:
    assert post(scripted, headers, route, **body).status_code == 200
    assert scripted.client.latest is not None
    request = scripted.client.latest[0]
    assert Urgency(request.priority, request.deadline_ms) == urgency


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        ({"priority": "urgent"}, {}, "priority"),
        ({"priority": 1.5}, {}, "priority"),
        ({"priority": True}, {}, "priority"),
        ({"priority": [1]}, {}, "priority"),
        ({"priority": 2**31}, {}, "priority"),
        ({"deadline_ms": 0}, {}, "deadline_ms"),
        ({"deadline_ms": -1}, {}, "deadline_ms"),
        ({"deadline_ms": "100"}, {}, "deadline_ms"),
        ({"deadline_ms": 1.5}, {}, "deadline_ms"),
        ({"deadline_ms": 2**31}, {}, "deadline_ms"),
        ({}, {"X-Quire-Priority": "urgent"}, "X-Quire-Priority"),
        ({}, {"X-Quire-Priority": ""}, "X-Quire-Priority"),
        ({}, {"X-Quire-Priority": "9" * 30}, "X-Quire-Priority"),
        ({}, {"X-Quire-Priority": "--1"}, "X-Quire-Priority"),
        ({}, {"X-Quire-Deadline-Ms": "soon"}, "X-Quire-Deadline-Ms"),
        ({}, {"X-Quire-Deadline-Ms": "0"}, "X-Quire-Deadline-Ms"),
        ({}, {"X-Quire-Deadline-Ms": "high"}, "X-Quire-Deadline-Ms"),
    ],
)
def test_what_is_no_priority_and_no_deadline(scripted: ServerThread, body: dict[str, Any], headers: dict[str, str], field: str) -> None:
    refused = post(scripted, headers, **body)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == field
    assert field in refused.json()["error"]["message"]


def test_a_header_that_is_given_twice_is_refused(scripted: ServerThread) -> None:
    twice = [("X-Quire-Priority", "1"), ("X-Quire-Priority", "2")]
    refused = httpx.post(scripted.url + "/v1/completions", json={"prompt": "a"}, headers=twice, timeout=WAIT_S)
    assert refused.json()["error"]["param"] == "X-Quire-Priority"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeadlineExceeded("it waited 5 s"), 504, "deadline_exceeded"),
        (Overloaded("the queue is full", 2.2), 429, "overloaded"),
        (QuireError("three replicas have died of it"), 500, "engine_error"),
    ],
)
def test_what_the_cluster_refuses(scripted: ServerThread, stream: bool, error: Exception, status: int, code: str) -> None:
    scripted.client.refuse_with = error
    answer = post(scripted, stream=stream, deadline_ms=5000)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert str(error) in answer.json()["error"]["message"]
    assert answer.headers.get("retry-after") == ("3" if status == 429 else None)


def test_a_deadline_that_passes_after_the_headers_is_an_error_event(scripted: ServerThread, script: ScriptRunner) -> None:
    script.hold(steps=1)
    body = {"prompt": "a", "max_tokens": 100, "stream": True, "n": 2}
    with httpx.stream("POST", scripted.url + "/v1/completions", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        assert scripted.client.latest is not None
        stream = scripted.client.latest[1]
        scripted.call(lambda: stream.journal.give_up(DeadlineExceeded("it waited too long")))
        *_, last = lines
    script.free()
    assert response.status_code == 200
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
