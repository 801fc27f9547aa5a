"""Spans as a collector gets them, decoded from the bytes that were sent."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from otlp_collector import Collector, attributes

from quire.worker.protocol import FinishReason, GenerateRequest, SamplingParams, SequenceOutput
from quire.worker.tracing import SequenceSpans, Tracing, check_tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REQUEST = GenerateRequest("cmpl-1", ((1, 2, 3),), SamplingParams(n=2), trace=PARENT)


def test_the_stages_of_every_sequence_hang_below_the_request() -> None:
    with Collector() as collector:
        tracing = Tracing(collector.endpoint, {"service.instance.id": "replica-0"})
        spans = SequenceSpans(tracing)
        before_ns = time.time_ns()
        spans.submitted(REQUEST, {10: 0, 11: 1})
        spans.stepped([10], [SequenceOutput("cmpl-1", 0, 0, (5,))], 0.001)
        spans.stepped([], [SequenceOutput("cmpl-1", 0, 1, (6, 7), FinishReason.LENGTH)], 0.001)
        spans.stepped([], [SequenceOutput("cmpl-1", 1, 0, (), FinishReason.ABORT)], 0.0)  # it never ran
        tracing.close()
        collector.wait_for(4)
        after_ns = time.time_ns()
    assert collector.resources[0]["service.name"] == "quire"
    assert collector.resources[0]["service.instance.id"] == "replica-0"
    of = {choice: [span for span in collector.spans if attributes(span)["quire.choice"] == choice] for choice in (0, 1)}
    assert [span.name for span in of[0]] == ["queue", "prefill", "decode"]
    assert [span.name for span in of[1]] == ["queue"]
    for span in collector.spans:
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
        assert attributes(span)["gen_ai.response.id"] == "cmpl-1"
        assert before_ns <= span.start_time_unix_nano <= span.end_time_unix_nano <= after_ns
    queue, prefill, decode = of[0]
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert attributes(prefill)["gen_ai.usage.input_tokens"] == 3
    assert attributes(decode)["gen_ai.usage.output_tokens"] == 3
    assert attributes(decode)["gen_ai.response.finish_reasons"] == ["length"]
    assert not spans._by_choice
    assert not spans._waiting


def test_a_request_without_a_trace_leaves_nothing() -> None:
    spans = SequenceSpans(None)  # type: ignore[arg-type]
    spans.submitted(GenerateRequest("cmpl-1", ((1,),)), {0: 0})
    spans.stepped([0], [SequenceOutput("cmpl-1", 0, 0, (5,), FinishReason.LENGTH)], 0.0)
    assert not spans._by_choice
    assert not spans._waiting


def test_what_a_parent_decides_holds() -> None:
    with Collector() as collector:
        tracing = Tracing(collector.endpoint + "/", {})
        unsampled = tracing.begin("unsampled", 1, PARENT[:-2] + "00")
        fresh = tracing.begin("fresh", 1, "nonsense")
        assert unsampled.traceparent.endswith("-00")
        assert unsampled.traceparent[:36] == PARENT[:36]
        assert int(fresh.traceparent[-2:], 16) & 1  # sampled
        assert PARENT.split("-")[1] not in fresh.traceparent
        unsampled.end({})
        fresh.end({"one": 1, "none": None}, error="it broke")
        tracing.close()
        spans = collector.wait_for(1)
    assert spans.keys() == {"fresh"}
    assert attributes(spans["fresh"]) == {"one": 1}
    assert spans["fresh"].status.message == "it broke"
    assert spans["fresh"].parent_span_id == b""


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://x", "http://", ""])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(ValueError, match="is not a URL"):
        check_tracing(endpoint)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'quire\[otel\]'"):
        check_tracing("http://127.0.0.1:4318")


def test_nobody_pays_for_it_who_does_not_trace() -> None:
    code = "import sys, quire.worker.tracing, quire.deploy.api.app; print([m for m in sys.modules if m.startswith('opentelemetry.sdk')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr
