"""A small HTTP/1.1 client for event streams: one connection a request, arrival times taken where the bytes arrive.

General clients cost as much CPU for an event as a small model needs for a token, and on a shared machine that shows in
the figures. This one parses with httptools in the protocol callback and wakes its reader once a packet.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools

_CONNECT_TIMEOUT_S = 10.0
_MAX_BODY_BYTES = 64 * 2**20  # of an answer that is read whole


class HttpError(Exception):
    """No usable answer. `kind` is short and the same for like causes, so that errors can be counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Event(NamedTuple):
    """The `data:` of one server-sent event, and when its last byte arrived (`time.perf_counter`)."""

    data: bytes
    at_s: float


@dataclass(frozen=True, slots=True)
class Server:
    """Where to send requests, and with which key.

    `timeout_s` bounds the silence between two packets.
    """

    url: str
    api_key: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"{self.url!r} is not a URL such as http://127.0.0.1:8000")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("an API key must be printable ASCII")

    async def get(self, path: str) -> Any:
        """The JSON that a GET answers.

        Raises:
            HttpError: no connection, no answer in time, a status other than 200, or no JSON.
        """
        answer = await self._send("GET", path, b"")
        return await _json(answer)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that a POST of `body` answers.

        Raises:
            HttpError: as `get` does.
        """
        return await _json(await self._send("POST", path, json.dumps(body).encode()))

    async def models(self) -> dict[str, dict[str, Any]]:
        """Name -> entry of `/v1/models`, in the server's order; at least one.

        Raises:
            HttpError: as `get` does, or the server has no model or another API.
        """
        answer = await self.get("/v1/models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        models = {entry["id"]: entry for entry in entries or () if isinstance(entry, dict) and "id" in entry}
        if not models:
            raise HttpError("no model", f"{self.url} names no model at /v1/models")
        return models

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Event, None]:
        """POST `body` and yield the events of the answer; ends after `[DONE]`. Leaving early closes the connection.

        Raises:
            HttpError: no connection, silence, a status other than 200, or a stream that ends without `[DONE]`.
        """
        answer = await self._send("POST", path, json.dumps(body).encode())
        try:
            if await answer.status() != 200:
                await _json(answer)
            buffer = b""
            while packet := await answer.packet():
                buffer += packet.data
                *whole, buffer = buffer.replace(b"\r\n", b"\n").split(b"\n\n")
                for block in whole:
                    data = _event_data(block)
                    if data == b"[DONE]":
                        return
                    if data:
                        yield Event(data, packet.at_s)
            raise HttpError("stream cut", "the answer ended before [DONE]")
        finally:
            answer.close()

    async def _send(self, method: str, path: str, body: bytes) -> _Answer:
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                transport, answer = await loop.create_connection(lambda: _Answer(self.timeout_s), host, port, ssl=tls)
        except TimeoutError:
            raise HttpError("connect", f"{self.url} does not accept a connection within {_CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise HttpError("connect", f"no server answers at {self.url}: {error.strerror or error}") from None
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}", "Connection: close"]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        return answer


class _Answer(asyncio.Protocol):
    """One response as it arrives. The parser calls the `on_*` methods."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._packets: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._status: int | None = None
        self._complete = False
        self._lost: HttpError | None = None

    async def status(self) -> int:
        while self._status is None:
            await self._wait()
        return self._status

    async def packet(self) -> Event | None:
        """The next piece of the body; None when the answer is complete."""
        while not self._packets:
            if self._complete:
                return None
            await self._wait()
        return self._packets.popleft()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._lost is not None:
            raise self._lost
        self._arrived.clear()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._arrived.wait()
        except TimeoutError:
            self.close()
            raise HttpError("timeout", f"nothing came for {self._timeout_s:g} s") from None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lost = HttpError("not HTTP", f"the answer is not HTTP: {error}")
            self.close()
        self._arrived.set()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._complete and self._lost is None:
            self._lost = HttpError("connection lost", f"the server closed the connection{f': {error}' if error else ''}")
        self._arrived.set()

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._packets.append(Event(body, time.perf_counter()))

    def on_message_complete(self) -> None:
        self._complete = True


async def _json(answer: _Answer) -> Any:
    """The whole body as JSON when the status is 200, else HttpError with the server's own words."""
    try:
        status, body = await answer.status(), b""
        while (packet := await answer.packet()) and len(body) < _MAX_BODY_BYTES:
            body += packet.data
    finally:
        answer.close()
    try:
        parsed = json.loads(body)
    except ValueError:
        raise HttpError(f"HTTP {status}", f"HTTP {status}, and no JSON: {body[:200].decode(errors='replace')}") from None
    if status != 200:
        raise HttpError(f"HTTP {status}", f"HTTP {status}: {error_message(parsed)}")
    return parsed


def error_message(body: Any) -> str:
    """The message in an error of OpenAI's shape, or the body itself."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)


def _event_data(block: bytes) -> bytes:
    return b"\n".join(line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))
