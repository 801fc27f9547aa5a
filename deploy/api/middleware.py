"""Pure ASGI middleware around every route: what HTTP forbids, a cap on body bytes, and the count of requests."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..metrics import Metrics
from .errors import CLIENT_GONE, ApiError

BODY_TIMEOUT_S = 60.0


class StrictRequest:
    """Refuses what proxies and servers may read in two ways: several Host headers, and a length beside a transfer encoding."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names = [name for name, _ in scope["headers"]]
            twice = next((name for name in (b"host", b"content-length", b"transfer-encoding") if names.count(name) > 1), None)
            if twice is not None or (b"content-length" in names and b"transfer-encoding" in names):
                what = f"several {twice.decode()} headers" if twice else "content-length and transfer-encoding together"
                await ApiError(400, what, headers={"Connection": "close"}).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """413 for a body of more than `max_bytes`, said at once where Content-Length tells, else while counting; 408 for a
    body that takes longer than BODY_TIMEOUT_S to arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit():
            await ApiError(400, "content-length is not a number").response()(scope, receive, send)
            return
        if int(declared[:32]) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
        seen = 0
        complete = False

        async def counted() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise body_too_slow() from None
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if seen > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request body is larger than {self._max_bytes} bytes", code="body_too_large")


def body_too_slow() -> ApiError:
    """For a body that has taken longer than BODY_TIMEOUT_S."""
    return ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", headers={"Connection": "close"})


class CountRequests:
    """Counts finished HTTP requests by route and status. Routes come from the router, so there are only so many."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE  # when no response is ever started, the client has left

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            route = scope.get("route")
            self._metrics.count_request(getattr(route, "path", "other"), status)
