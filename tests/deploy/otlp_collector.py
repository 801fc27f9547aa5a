"""An OpenTelemetry collector in this process: real HTTP, real protobuf."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

WAIT_S = 120.0


class Collector:
    """Keeps the spans that were sent to it, by name."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self._news = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = outer._take(self.path, body)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="collector")

    def wait_for(self, count: int) -> dict[str, Any]:
        """The spans by name, once there are so many."""
        with self._news:
            if not self._news.wait_for(lambda: len(self.spans) >= count, WAIT_S):
                raise TimeoutError(f"only {[span.name for span in self.spans]} came")
            return {span.name: span for span in self.spans}

    def wait_for_trace(self, response_id: str, names: set[str]) -> list[Any]:
        """The spans of one request, once all of `names` are there."""

        def whole() -> bool:
            return {span.name for span in mine()} >= names

        def mine() -> list[Any]:
            return [span for span in self.spans if attributes(span).get("gen_ai.response.id") == response_id]

        with self._news:
            if not self._news.wait_for(whole, WAIT_S):
                raise TimeoutError(f"only {[span.name for span in mine()]} came")
            return mine()

    def _take(self, path: str, body: bytes) -> int:
        if path != "/v1/traces":
            return 404
        request = ExportTraceServiceRequest.FromString(body)
        with self._news:
            for resource in request.resource_spans:
                self.resources.append({a.key: a.value.string_value for a in resource.resource.attributes})
                for scope in resource.scope_spans:
                    self.spans += scope.spans
            self._news.notify_all()
        return 200

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(WAIT_S)
        self._server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    """A span's attributes as Python values."""
    return {a.key: _value(a.value) for a in span.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)
