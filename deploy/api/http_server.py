"""How the app is served by uvicorn: the one configuration that the product and the tests share.

httptools parses fast and refuses smuggling, but bounds neither the size of a request's head nor the time it takes, and loses the body of
a request that offers another protocol; uvicorn waits without end for a client that does not read. The protocol class here sees to it.
"""

from __future__ import annotations

import asyncio

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ...worker.config import ServerOptions

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 60.0


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
    """uvicorn's httptools protocol with a cap on the bytes of a request's head (431), on the time it may take, and on that for which a
    client may take nothing of what waits for it."""

    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _without_upgrade = b""  # a head that offered another protocol, without the offer
    _unread_bytes = 0
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=0)  # whatever the kernel does not take is a pause
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        self._stop_read_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            # A body that follows in the same read counts too, up to what one read holds; hence a read is granted on top.
            self._head_bytes += len(data)
            if self._head_bytes - len(data) > MAX_HEAD_BYTES:
                self._refuse_head()
                return
        self._feed(data)
        if not self._in_head and self._head_timer is None and self.cycle.response_complete:
            # Blank lines, or the rest of a body that nobody reads: uvicorn no longer counts the connection as idle.
            self._start_head_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:  # a further request on a connection that is kept alive
            self._head_bytes = 0
            self._await_head()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
            line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            self._without_upgrade = b"".join([line, *fields, b"\r\n"])
            return
        self._stop_head_timer()
        super().on_headers_complete()
        self._in_head = False

    def on_message_complete(self) -> None:
        if not self._without_upgrade:
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        """As uvicorn does, but for an offer of another protocol (Java's client and `curl --http2` make one with every first request):
        there the parser ends the message after its head, and the body would be lost. So it is parsed once more without the offer."""
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._without_upgrade:
                    return
                data = self._without_upgrade + data[upgrade.args[0] :]
                self._without_upgrade = b""
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            else:
                return

    def _await_head(self) -> None:
        self._in_head = True
        self._start_head_timer()

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _await_reader(self) -> None:
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(READ_TIMEOUT_S, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Gives a client up that has taken nothing; also one whose connection is closing, which would wait for it for ever."""
        if self.transport.get_write_buffer_size() < self._unread_bytes:
            self._await_reader()
        else:
            self.transport.abort()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _refuse_head(self) -> None:
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
