"""The line that every generation request leaves in the log, with its id and its tenant, and never its text or its key."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from serving import WAIT_S, ScriptRunner, ServerThread

from quire.deploy.api import account
from quire.worker.logs import JsonFormatter, TextFormatter, about
from quire.worker.protocol import DeadlineExceeded


class Kept(logging.Handler):
    """Lines as the JSON formatter writes them, made on the thread that logs."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter({"ingress": "ingress-0"}))
        self.lines: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler = Kept()
    account.log.addHandler(handler)
    account.log.setLevel(logging.INFO)
    yield handler
    account.log.setLevel(logging.NOTSET)
    account.log.removeHandler(handler)


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request(scripted: ServerThread, kept: Kept, stream: bool) -> None:
    body = {"prompt": "secret words", "max_tokens": 3, "ignore_eos": True, "stream": stream, "n": 2}
    answer = httpx.post(scripted.url + "/v1/completions", json=body, timeout=60)
    scripted.on_loop(scripted.api.lifecycle._idle.wait())
    (line,) = kept.lines
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["level"], line["message"], line["ingress"], line["status"]) == ("info", "POST /v1/completions", "ingress-0", 200)
    assert (line["output_tokens"], line["finish"]) == (6, "length,length")
    assert line["prompt_tokens"] == 2
    assert 0 <= line["ttft_ms"] <= line["duration_ms"]  # type: ignore[operator]
    assert "secret" not in json.dumps(line)


def test_a_refused_request_and_a_failed_one(scripted: ServerThread, script: ScriptRunner, kept: Kept) -> None:
    scripted.client.refuse_with = DeadlineExceeded("it waited 5 s")
    assert httpx.post(scripted.url + "/v1/completions", json={"prompt": "a"}, timeout=WAIT_S).status_code == 504
    scripted.client.refuse_with = None
    assert httpx.post(scripted.url + "/v1/completions", json={"prompt": "a", "n": 0}, timeout=WAIT_S).status_code == 400
    script.script = (1000, -1)
    httpx.post(scripted.url + "/v1/completions", json={"prompt": "a", "max_tokens": 5, "stream": True}, timeout=60)
    scripted.on_loop(scripted.api.lifecycle._idle.wait())
    assert [(line["level"], line["status"]) for line in kept.lines] == [("warning", 504), ("info", 400), ("warning", 500)]
    assert kept.lines[0]["message"] == "POST /v1/completions: it waited 5 s"
    assert all(str(line["request_id"]).startswith("cmpl-") for line in kept.lines)


def test_text_and_json_say_the_same() -> None:
    record = logging.LogRecord("quire.x", logging.WARNING, __file__, 1, "%s died", ("it",), None)
    record.replica, record.epoch = "replica-1", 7
    with about(request_id="cmpl-1", tenant=""):
        text, line = TextFormatter({"rank": 0}).format(record), json.loads(JsonFormatter({"rank": 0}).format(record))
    assert text.endswith(" WARNING quire.x: it died [request_id=cmpl-1 replica=replica-1 epoch=7 rank=0]")
    about_it = {"request_id": "cmpl-1", "replica": "replica-1", "epoch": 7, "rank": 0}
    assert line == {"time": line["time"], "level": "warning", "logger": "quire.x", "message": "it died", **about_it}
    assert "request_id" not in TextFormatter().format(record)  # the block has ended
