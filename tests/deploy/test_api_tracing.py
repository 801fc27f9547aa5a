"""A trace from the client through the ingress to the replica's steps, as a collector gets it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from otlp_collector import Collector, attributes
from serving import WAIT_S, ScriptRunner, ServerThread, script_engine

from quire.worker.config import LimitOptions, ServerOptions
from quire.worker.protocol import DeadlineExceeded
from quire.worker.text.tokenizer import Tokenizer
from quire.worker.tracing import SequenceSpans, Tracing

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
Traced = tuple[Collector, ServerThread]


@pytest.fixture
def traced(tokenizer: Tokenizer) -> Iterator[Traced]:
    with Collector() as collector:
        engine = script_engine(ScriptRunner((1000,)), tokenizer.vocab_size, 0)
        engine.spans = SequenceSpans(Tracing(collector.endpoint, {"service.instance.id": "replica-0"}))
        options = ServerOptions(port=0, log_level="warning", otlp_endpoint=collector.endpoint)
        with ServerThread(engine, tokenizer, options, LimitOptions()) as server:
            yield collector, server


@pytest.mark.parametrize("stream", [False, True])
def test_the_chain_is_whole(traced: Traced, stream: bool) -> None:
    collector, server = traced
    answer = httpx.post(
        server.url + "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "temperature": 0, "stream": stream},
        headers={"traceparent": f"00-{TRACE}-{CALLER}-01"},
        timeout=60,
    )
    assert answer.status_code == 200
    spans = collector.wait_for(5)
    assert spans.keys() == {"POST /v1/chat/completions", "admission", "queue", "prefill", "decode"}
    request = spans.pop("POST /v1/chat/completions")
    assert (request.trace_id.hex(), request.parent_span_id.hex(), request.kind) == (TRACE, CALLER, 2)  # 2: server
    for span in spans.values():
        assert (span.trace_id.hex(), span.parent_span_id) == (TRACE, request.span_id)
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert attributes(span)["gen_ai.response.id"] == answer.headers["x-request-id"]
    said = attributes(request)
    usage = {"input": said["gen_ai.usage.input_tokens"], "output": said["gen_ai.usage.output_tokens"]}
    assert usage == {"input": attributes(spans["prefill"])["gen_ai.usage.input_tokens"], "output": 3}
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "script",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.response.id": answer.headers["x-request-id"],
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert {name: said[name] for name in expected} == expected
    assert {r["service.instance.id"].partition("-")[0] for r in collector.resources} == {"ingress", "replica"}


def test_a_refusal_is_in_the_trace_and_only_a_fault_of_ours_is_an_error(traced: Traced) -> None:
    collector, server = traced
    ask = {"prompt": "a", "max_tokens": 1}
    assert httpx.post(server.url + "/v1/completions", json={**ask, "n": 0}, timeout=WAIT_S).status_code == 400
    spans = collector.wait_for(1)
    assert attributes(spans["POST /v1/completions"])["http.response.status_code"] == 400
    assert spans["POST /v1/completions"].status.code == 0
    collector.spans.clear()
    server.client.refuse_with = DeadlineExceeded("it waited 5 s")
    assert httpx.post(server.url + "/v1/completions", json=ask, timeout=WAIT_S).status_code == 504
    spans = collector.wait_for(1)
    assert attributes(spans["POST /v1/completions"])["error.type"] == "deadline_exceeded"
    assert (spans["POST /v1/completions"].status.code, spans["POST /v1/completions"].status.message) == (2, "it waited 5 s")
    assert spans["POST /v1/completions"].parent_span_id == b""  # a trace of its own: the client sent none
