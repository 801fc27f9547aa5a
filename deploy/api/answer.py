"""From an asked request to an HTTP answer: submit, wait while the client is there, send it whole or as it grows.

The first output is awaited before the response starts, so everything that goes wrong until then has its own status. From
then on errors are events. Whatever ends a request, its stream is closed, which frees its pages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ...worker.protocol import BadRequest, GenerateRequest, QuireError, SamplingParams
from .account import Account, Called
from .context import Api
from .errors import CLIENT_GONE, ApiError, as_api_error
from .generation import ChoiceDelta, Generation, Presentation
from .lifecycle import Lifecycle, shutting_down
from .reply import DONE, Reply, error_event
from .schemas import SamplingBody, ToldUsage
from .urgency import read_urgency

Result = TypeVar("Result")


class Asked(NamedTuple):
    """A request as the engine will see it, and what the front end must remember of it."""

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    options: SamplingBody
    names: Mapping[str, str]  # the engine's field -> the field that the client wrote
    shown: Presentation


def present(api: Api, body: SamplingBody, *, continues: bool = False, discard_output: bool = False) -> Presentation:
    """How `body` wants to be answered."""
    return Presentation(body.skip_special_tokens, body.include_stop_str_in_output, continues, discard_output, api.info.eos_token_ids)


async def answer(request: Request, asked: Asked, reply: Reply) -> Response:
    """Runs the request.

    Raises:
        ApiError, QuireError: it was refused, or failed before its first output; or the client left.
    """
    api: Api = request.app.state.api
    async with AsyncExitStack() as stack:
        stack.enter_context(api.lifecycle.track())
        account = stack.enter_context(_account(api, request, asked))
        account.generation = generation = await _submit(api, request, asked, account)
        stack.push_async_callback(generation.close)
        headers = {"X-Request-Id": asked.request_id}
        if asked.options.stream:
            first = await while_wanted(generation.__anext__(), request.receive, api.lifecycle)
            return EventStream(Begun(generation, first, account), reply, api.lifecycle, headers, stack.pop_all())
        await while_wanted(_collect(generation, reply), request.receive, api.lifecycle)
        return JSONResponse(reply.body(generation.usage), headers=headers)


def _account(api: Api, request: Request, asked: Asked) -> Account:
    route, tenant = request.scope["route"].path, request.scope["state"]["tenant"]
    traceparent = request.headers.get("traceparent", "")
    return Account(Called(asked.request_id, tenant, route, api.info.name, asked.params, traceparent), api.metrics, api.tracing)


async def _submit(api: Api, request: Request, asked: Asked, account: Account) -> Generation:
    started_s = time.perf_counter()
    urgency = read_urgency(asked.options, request.headers)
    choices = len(asked.prompts) * asked.params.n
    if choices > api.limits.max_choices:  # the door would say so, but what stands before it keeps books for each choice
        raise BadRequest(
            "n",
            f"{len(asked.prompts)} prompts x n = {asked.params.n} make {choices} sequences; at most {api.limits.max_choices} are allowed",
        )
    engine_request = GenerateRequest(
        asked.request_id,
        asked.prompts,
        asked.params,
        priority=urgency.priority,
        tenant=request.scope["state"]["tenant"],
        deadline_ms=urgency.deadline_ms,
        trace=account.traceparent,
    )
    try:
        stream = await api.client.submit(engine_request)
    except BadRequest as error:
        longest = max(map(len, asked.prompts)) + (asked.params.max_tokens or 1)
        if error.field in ("prompt", "max_tokens") and longest > api.info.max_model_len:
            named = BadRequest(_client_field(error.field, asked.names), error.message)
            raise ApiError(400, str(named), param=named.field, code="context_length_exceeded") from None
        raise BadRequest(_client_field(error.field, asked.names), error.message) from None
    return Generation(stream, engine_request, api.text.tokenizer, asked.shown, api.metrics.generation(started_s))


def _client_field(field: str, names: Mapping[str, str]) -> str:
    """The engine's field, in the client's words."""
    head, dot, rest = field.removeprefix("params.").replace("[", ".").replace("]", "").partition(".")
    return names.get(head, head) + dot + rest


async def _collect(generation: Generation, reply: Reply) -> None:
    async for delta in generation:
        reply.add(delta)


class Begun(NamedTuple):
    """A generation whose first output has come."""

    generation: Generation
    first: ChoiceDelta
    account: Account


class EventStream(Response):
    """The answer as server-sent events. Owns the generation from the moment it is made."""

    def __init__(
        self,
        begun: Begun,
        reply: Reply,
        lifecycle: Lifecycle,
        headers: dict[str, str],
        cleanup: AsyncExitStack,
    ) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._generation, self._first, self._account = begun
        self._reply = reply
        self._lifecycle = lifecycle
        self._cleanup = cleanup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._cleanup:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last: bytes | None
            try:
                await while_wanted(self._pump(send), receive, self._lifecycle)
                silent = self._reply.told_usage is ToldUsage.NEVER
                last = DONE if silent else self._reply.usage_event(self._generation.usage) + DONE
            except (ApiError, QuireError) as error:
                told = error if isinstance(error, ApiError) else as_api_error(error)
                self._account.failed(told)
                last = error_event(told.body()) if told.status != CLIENT_GONE else None
            if last is not None:
                await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pump(self, send: Send) -> None:
        """`send` waits for a client that reads slowly; the server bounds that."""
        await send({"type": "http.response.body", "body": self._events(self._first), "more_body": True})
        async for delta in self._generation:
            events = self._events(delta)
            if events:
                await send({"type": "http.response.body", "body": events, "more_body": True})

    def _events(self, delta: ChoiceDelta) -> bytes:
        return self._reply.events(delta, self._generation.usage if self._reply.told_usage is ToldUsage.ALWAYS else None)


async def while_wanted(work: Coroutine[Any, Any, Result], receive: Receive, lifecycle: Lifecycle) -> Result:
    """`work`, cancelled as soon as nobody wants it.

    Raises:
        ApiError: the client left (CLIENT_GONE), or the server's grace time is over (503).
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(receive))
    cut = asyncio.ensure_future(lifecycle.cut())
    try:
        await asyncio.wait((task, gone, cut), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise client_gone() if gone.done() else shutting_down()
    finally:
        for each in (task, gone, cut):
            each.cancel()
        await asyncio.gather(task, gone, cut, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def client_gone() -> ApiError:
    """Ends a request that nobody waits for."""
    return ApiError(CLIENT_GONE, "the client left")
