"""How the app is served by uvicorn: the one configuration that the product and the tests share.

httptools parses fast and refuses smuggling, but bounds neither the size of a request's head nor the time it takes. The
protocol class here does.
"""

from __future__ import annotations

import asyncio

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ...worker.config import ServerOptions

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 20.0


def server_config(app: FastAPI, options: ServerOptions) -> uvicorn.Config:
    """uvicorn's configuration: no websockets, no proxy headers, no Server header, bounded heads."""
    return uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=BoundedHttp,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="debug" if options.log_level == "debug" else "warning",  # its start and stop are ours to tell
        access_log=options.log_level == "debug",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
    )


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's httptools protocol with a cap on the bytes of a request's head (431), and on the time it may take."""

    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            # A body that follows in the same read counts too, up to what one read holds; hence a read is granted on top.
            self._head_bytes += len(data)
            if self._head_bytes - len(data) > MAX_HEAD_BYTES:
                self._refuse_head()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:  # a further request on a connection that is kept alive
            self._head_bytes = 0
            self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._in_head = True
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse_head(self) -> None:
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
