"""Several models behind one address: an ASGI application that hands each request to the application of the model that it names.

Keys, limits and errors are those of the applications; whatever names no model, or one that is not here, goes to the first of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import middleware
from .errors import ApiError

_MODELS = "/v1/models"


class ByModel:
    """The whole server.

    Args:
        apps: name -> application. They come and go; a request stays with the one that it began with. The first one answers what names none.
        max_body: the largest body in bytes.
        on_shutdown: awaited once, when the server ends.
    """

    def __init__(self, apps: Mapping[str, FastAPI], max_body: int, on_shutdown: Callable[[], Awaitable[None]]) -> None:
        self.max_body = max_body
        self._apps = apps
        self._on_shutdown = on_shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        path = scope.get("path", "")
        if not self._apps:
            await ApiError(503, "no model is ready", code="engine_silent").response()(scope, receive, send)
        elif scope["type"] != "http" or len(self._apps) == 1:
            await self._first(scope, receive, send)
        elif path in (_MODELS, "/health"):
            await self._all(scope, receive, send)
        elif scope["method"] == "POST":
            try:
                async with asyncio.timeout(middleware.BODY_TIMEOUT_S):
                    body, rest = await _read(receive, self.max_body)
            except TimeoutError:
                await middleware.body_too_slow().response()(scope, receive, send)
            else:
                await self._named(_model_of(body))(scope, _replay(body, rest, receive), send)
        else:
            asked = path.removeprefix(f"{_MODELS}/") if path.startswith(f"{_MODELS}/") else _query(scope)
            await self._named(asked)(scope, receive, send)

    @property
    def _first(self) -> FastAPI:
        return next(iter(self._apps.values()))

    def _named(self, name: Any) -> ASGIApp:
        return self._apps.get(name, self._first) if isinstance(name, str) else self._first

    async def _all(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The models of all; or the first answer that is not 200."""
        data: list[Any] = []
        start: Message = {}
        content = b""
        for app in list(self._apps.values()):
            start, content = await _answer(app, scope, receive)
            if start["status"] != 200:
                break
            data += json.loads(content).get("data", ())
        else:
            if scope["path"] == _MODELS:
                content = json.dumps({"object": "list", "data": data}).encode()
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(content)).encode())]})
        await send({"type": "http.response.body", "body": content})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._on_shutdown()
        await send({"type": "lifespan.shutdown.complete"})


async def _answer(app: ASGIApp, scope: Scope, receive: Receive) -> tuple[Message, bytes]:
    """The head and the body of what an application answers."""
    messages: list[Message] = []

    async def keep(message: Message) -> None:
        messages.append(message)

    await app({**scope, "state": dict(scope.get("state", {}))}, receive, keep)
    return messages[0], b"".join(message.get("body", b"") for message in messages[1:])


async def _read(receive: Receive, most: int) -> tuple[bytes, Message | None]:
    """The body; with the message that was read instead of its end, when it is longer or the client has left."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body), message
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body), None
        if len(body) > most:
            return bytes(body), {"type": "http.request", "body": b"", "more_body": True}


def _replay(body: bytes, rest: Message | None, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": rest is not None}, *([rest] if rest else [])]

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again


def _model_of(body: bytes) -> Any:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the application says what is wrong with it
    return told.get("model") if isinstance(told, dict) else None


def _query(scope: Scope) -> str:
    """The `model` of the query, by which /metrics of each model are asked for."""
    query: bytes = scope.get("query_string", b"")
    return parse_qs(query.decode("latin-1")).get("model", [""])[-1]
