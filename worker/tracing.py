"""OpenTelemetry spans, where a collector is configured: made here, sent in batches by a thread of the SDK.

Everything of OpenTelemetry is imported when a `Tracing` is made, so that nobody else needs it or waits for it. What travels
between processes is a W3C `traceparent`. Attribute names are those of the semantic conventions where they have one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .protocol import GenerateRequest, SequenceOutput

FLUSH_MS = 2000
Attributes = Mapping[str, Any]


def check_tracing(endpoint: str) -> None:
    """Refuses what could not work.

    Raises:
        ValueError: not an HTTP URL, or OpenTelemetry is not installed.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--otlp-endpoint: {endpoint!r} is not a URL such as http://127.0.0.1:4318")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--otlp-endpoint needs OpenTelemetry: pip install 'quire[otel]' ({error})") from None


class Tracing:
    """The spans of one process.

    Args:
        endpoint: the collector; `/v1/traces` is added to a URL without a path.
        process: attributes of the resource: who in the cluster this is.

    Raises:
        ValueError: as `check_tracing` does.
    """

    def __init__(self, endpoint: str, process: Attributes) -> None:
        check_tracing(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "quire", **process}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url), schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("quire")

    def begin(self, name: str, start_ns: int, parent: str = "", *, server: bool = False) -> OpenSpan:
        """A span that began at `start_ns` (time.time_ns) below `parent` (a traceparent; what is none begins a trace)."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {}, context=Context())
        return OpenSpan(self._tracer.start_span(name, context, SpanKind.SERVER if server else SpanKind.INTERNAL, start_time=start_ns))

    def record(self, name: str, start_ns: int, end_ns: int, parent: str, attributes: Attributes) -> None:
        """A span that is over."""
        span = self.begin(name, start_ns, parent)
        span.end(attributes, end_ns=end_ns)

    def close(self) -> None:
        """Sends what is left, for at most `FLUSH_MS`; blocks."""
        self._provider.force_flush(FLUSH_MS)


class OpenSpan:
    """A span that has not ended."""

    def __init__(self, span: Any) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What makes another span its child, also in another process."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def end(self, attributes: Attributes, *, error: str | None = None, end_ns: int | None = None) -> None:
        """The span is over; `error` says what went wrong."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end(end_ns)


@dataclass(slots=True)
class _Stages:
    """When a sequence came, was first computed, and had its first token (time.time_ns)."""

    request: GenerateRequest
    choice: int
    came_ns: int
    started_ns: int | None = None
    first_ns: int | None = None
    tokens: int = 0


class SequenceSpans:
    """Queue, prefill and decode of every sequence of a replica whose request is traced. Belongs to the engine's thread."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._by_choice: dict[tuple[str, int], _Stages] = {}
        self._waiting: dict[int, _Stages] = {}  # by number of the sequence: not computed yet

    def submitted(self, request: GenerateRequest, choices: Mapping[int, int]) -> None:
        """A request has come; `choices` are number -> choice of its sequences."""
        now_ns = time.time_ns()
        for seq, choice in choices.items() if request.trace else ():
            self._waiting[seq] = self._by_choice[request.request_id, choice] = _Stages(request, choice, now_ns)

    def stepped(self, started: Iterable[int], outputs: Iterable[SequenceOutput], took_s: float) -> None:
        """A step of so many seconds, which has ended now, took the sequences `started` (numbers) in, and gave `outputs`."""
        if not self._by_choice:
            return
        now_ns = time.time_ns()
        for seq in started if self._waiting else ():
            stages = self._waiting.pop(seq, None)
            if stages is not None:
                stages.started_ns = max(stages.came_ns, now_ns - int(took_s * 1e9))
        for output in outputs:
            found = self._by_choice.get((output.request_id, output.choice))
            if found is not None:
                found.tokens += len(output.tokens)
                if output.tokens and found.first_ns is None:
                    found.first_ns = now_ns
                if output.finish is not None:
                    self._end(found, output, now_ns)

    def _end(self, stages: _Stages, last: SequenceOutput, now_ns: int) -> None:
        del self._by_choice[last.request_id, stages.choice]
        self._waiting = {seq: other for seq, other in self._waiting.items() if other is not stages}
        request = stages.request
        about = {"gen_ai.response.id": request.request_id, "quire.choice": stages.choice, "quire.attempt": request.attempt}
        self._tracing.record("queue", stages.came_ns, stages.started_ns or now_ns, request.trace, about)
        if stages.started_ns is not None:
            prompt = len(request.prompts[stages.choice // request.params.n])
            self._tracing.record(
                "prefill", stages.started_ns, stages.first_ns or now_ns, request.trace, {**about, "gen_ai.usage.input_tokens": prompt}
            )
        if stages.first_ns is not None:
            ended = {"gen_ai.usage.output_tokens": stages.tokens, "gen_ai.response.finish_reasons": [str(last.finish)]}
            self._tracing.record("decode", stages.first_ns, now_ns, request.trace, {**about, **ended})
