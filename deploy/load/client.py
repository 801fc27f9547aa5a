"""Sends the requests of a load test, in a closed or an open loop, and notes when things came back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from .http import HttpError, Server, error_message
from .workload import LoadRequest

PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are seconds; `start_s` counts from the start of the run.

    Attributes:
        ttft_s: from sending to the first event with a choice; None when none came.
        latency_s: from sending to the last event with a choice (for a failed request: to the failure).
        input_tokens, output_tokens, cached_tokens: as the server counts them (`usage`).
        error: a short kind such as "HTTP 429", or None.
        message: the server's words for the error.
    """

    start_s: float
    ttft_s: float | None
    latency_s: float
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What goes into the body of every request beside the prompt and the length."""

    model: str
    temperature: float = 0.0
    seed: int | None = None
    priority: str | None = None
    deadline_ms: int | None = None


class LoadRun:
    """One run against one server. `done` hears of each request as it ends."""

    def __init__(self, server: Server, sampling: Sampling, done: Callable[[Outcome], None]) -> None:
        self._server = server
        self._sampling = sampling
        self._done = done
        self._begin_s = time.perf_counter()

    async def closed(self, requests: Sequence[LoadRequest], concurrency: int) -> list[Outcome]:
        """All of `requests`, `concurrency` of them at any time; outcomes in the order of `requests`."""
        self._begin_s = time.perf_counter()
        queue = iter(enumerate(requests))
        outcomes: dict[int, Outcome] = {}

        async def worker() -> None:
            for index, request in queue:
                outcomes[index] = await self._one(request)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(worker())
        return [outcomes[index] for index in range(len(requests))]

    async def open(self, requests: Sequence[LoadRequest], times_s: Sequence[float]) -> list[Outcome]:
        """Each of `requests` at its own time, however many are still running."""
        self._begin_s = time.perf_counter()

        async def at(request: LoadRequest, due_s: float) -> Outcome:
            await asyncio.sleep(self._begin_s + due_s - time.perf_counter())
            return await self._one(request)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(at(request, due_s)) for request, due_s in zip(requests, times_s, strict=True)]
        return [task.result() for task in tasks]

    async def _one(self, request: LoadRequest) -> Outcome:
        outcome = await _send(self._server, body_of(request, self._sampling), self._begin_s)
        self._done(outcome)
        return outcome


def body_of(request: LoadRequest, sampling: Sampling) -> dict[str, Any]:
    """The JSON body of one request."""
    body: dict[str, Any] = {
        "model": sampling.model,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": sampling.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    more = {"seed": sampling.seed, "priority": sampling.priority, "deadline_ms": sampling.deadline_ms}
    body |= {name: value for name, value in more.items() if value is not None}
    if request.exact:
        body["ignore_eos"] = True
    return body


async def _send(server: Server, body: dict[str, Any], begin: float) -> Outcome:
    start = time.perf_counter()
    first = last = None
    tail = b"{}"
    try:
        async with aclosing(server.events(PATH, body)) as events:
            async for event in events:
                tail = event.data
                if b'"error"' in tail and (error := json.loads(tail).get("error")):
                    raise HttpError("error event", error_message(error))
                # The event with the usage has no choice. Nothing else is parsed while tokens come.
                if b'"choices":[]' not in tail.replace(b" ", b""):
                    first = first if first is not None else event.at_s
                    last = event.at_s
    except HttpError as error:
        end = time.perf_counter()
        return Outcome(start - begin, first and first - start, end - start, error=error.kind, message=str(error))
    usage = json.loads(tail).get("usage")
    if first is None or last is None or not usage:
        return Outcome(start - begin, None, time.perf_counter() - start, error="no usage", message="the stream had no token or no usage")
    return Outcome(
        start - begin,
        first - start,
        last - start,
        usage["prompt_tokens"],
        usage["completion_tokens"],
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )
