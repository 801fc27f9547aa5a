"""What is written down of one generation request when it has ended: a line in the log, its tenant's figures, and a span where traces
are kept."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

from ...worker.logs import about
from ...worker.protocol import QuireError, SamplingParams
from ...worker.tracing import Tracing
from ..metrics import Metrics
from .errors import ApiError, as_api_error
from .generation import Generation

log = logging.getLogger(__name__)


class Called(NamedTuple):
    """Who asked for what."""

    request_id: str
    tenant: str
    route: str
    model: str
    params: SamplingParams
    traceparent: str  # as the client sent it; may be anything


class Account:
    """Entered when the request has been read, left when its last byte has gone. Lines logged between carry its id."""

    def __init__(self, called: Called, metrics: Metrics, tracing: Tracing | None) -> None:
        self._called = called
        self._metrics = metrics
        self._tracing = tracing
        self._began_s, self._began_ns = time.perf_counter(), time.time_ns()
        self._error: ApiError | None = None
        self._fields = ExitStack()
        self.generation: Generation | None = None
        self._span = tracing.begin(f"POST {called.route}", self._began_ns, called.traceparent, server=True) if tracing else None

    @property
    def traceparent(self) -> str:
        """What the replica's spans belong under; empty when nothing is traced."""
        return self._span.traceparent if self._span is not None else ""

    def failed(self, error: ApiError) -> None:
        """It ended with an error, which its client has been told."""
        self._error = error

    def __enter__(self) -> Account:
        self._fields.enter_context(about(request_id=self._called.request_id, tenant=self._called.tenant))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, QuireError):
            self.failed(as_api_error(error))
        elif isinstance(error, ApiError):
            self.failed(error)
        elif error is not None:
            self._error = ApiError(500, kind.__name__ if kind else "")
        status = self._error.status if self._error is not None else 200
        self._log(status)
        self._count(status)
        waited_s = self.generation.waited_s if self.generation is not None else None
        if self._tracing is not None and self.generation is not None:
            admitted_ns = time.time_ns() if waited_s is None else self._began_ns + int(waited_s * 1e9)
            about_it = {"gen_ai.response.id": self._called.request_id, "quire.tenant": self._called.tenant or None}
            self._tracing.record("admission", self._began_ns, admitted_ns, self.traceparent, about_it)
        if self._span is not None:
            self._end_span(status)
        self._fields.close()

    def _log(self, status: int) -> None:
        level = logging.WARNING if status >= 500 else logging.INFO
        if not log.isEnabledFor(level):
            return
        extra: dict[str, Any] = {"status": status, "duration_ms": _ms(time.perf_counter() - self._began_s)}
        if self.generation is not None:
            usage, ttft_s = self.generation.usage, self.generation.ttft_s
            extra |= {
                "prompt_tokens": usage.prompt_tokens,
                "output_tokens": usage.completion_tokens,
                "ttft_ms": _ms(ttft_s) if ttft_s is not None else None,
                "finish": ",".join(self.generation.finishes),
            }
        why = f": {self._error.message}" if self._error is not None else ""
        log.log(level, "POST %s%s", self._called.route, why, extra=extra)

    def _count(self, status: int) -> None:
        tenant = self._called.tenant
        self._metrics.count_generation(tenant, status)
        if self.generation is not None:
            usage = self.generation.usage
            self._metrics.count_prompt(tenant, usage.prompt_tokens, usage.cached_tokens, self.generation.ttft_s)

    def _end_span(self, status: int) -> None:
        called, generation = self._called, self.generation
        attributes: dict[str, Any] = {
            "http.request.method": "POST",
            "http.route": called.route,
            "http.response.status_code": status,
            "gen_ai.operation.name": "chat" if called.route.endswith("chat/completions") else "text_completion",
            "gen_ai.provider.name": "quire",
            "gen_ai.request.model": called.model,
            "gen_ai.response.id": called.request_id,
            "gen_ai.request.choice.count": called.params.n if called.params.n > 1 else None,
            "gen_ai.request.max_tokens": called.params.max_tokens,
            "gen_ai.request.temperature": called.params.temperature,
            "gen_ai.request.top_p": called.params.top_p,
            "quire.tenant": called.tenant or None,
        }
        if generation is not None:
            attributes |= {
                "gen_ai.response.model": called.model,
                "gen_ai.response.finish_reasons": generation.finishes,
                "gen_ai.usage.input_tokens": generation.usage.prompt_tokens,
                "gen_ai.usage.output_tokens": generation.usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": generation.usage.cached_tokens,
            }
        error = self._error
        if error is not None:
            attributes["error.type"] = error.code or str(error.status)
        # By the conventions a server's span has failed only when the fault is the server's.
        failed = error.message if error is not None and status >= 500 else None
        if self._span is not None:
            self._span.end(attributes, error=failed)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
