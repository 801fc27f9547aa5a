"""A small OpenAI-like server on a free port: what the load client and `quire chat` talk to in their tests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


class Peer:
    """An ASGI app. A completion has `max_tokens` tokens; the prompt "429", "cut", "error", "silent", "html", or "hold" makes it fail
    in that way, or wait until `release` is set."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_running = 0
        self._running = 0
        self._changed = threading.Condition()
        self.closed_early = threading.Event()
        self.holding = threading.Event()
        self.separator = "\n\n"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if scope["path"] == "/v1/models":
            await _reply(send, 200, json.dumps({"data": [{"id": "tiny", "max_model_len": 64}, {"id": "other"}]}))
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        request = json.loads(body)
        self.bodies.append(request)
        self._count(1)
        try:
            if scope["path"] == "/v1/completions":
                await self._complete(request, receive, send)
            else:
                await self._chat(request, receive, send)
        finally:
            self._count(-1)

    def wait_running(self, count: int, timeout_s: float = 60) -> bool:
        """Blocks until `count` requests are being answered; False when that does not happen."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running >= count, timeout_s)

    def _count(self, change: int) -> None:
        with self._changed:
            self._running += change
            self.most_running = max(self.most_running, self._running)
            self._changed.notify_all()

    async def _complete(self, request: dict[str, Any], receive: Any, send: Any) -> None:
        prompt, count = request["prompt"], request["max_tokens"]
        if prompt == "429":
            await _reply(send, 429, json.dumps({"error": {"message": "the queue is full"}}))
            return
        if prompt == "html":
            await _reply(send, 502, "<html>bad gateway</html>")
            return
        await _start(send, "text/event-stream")
        for index in range(count):
            await self._event(send, {"choices": [{"index": 0, "text": f" {index}"}]})
            await asyncio.sleep(0)
            if prompt == "cut":
                await send({"type": "http.response.body", "body": b""})
                return
            if prompt == "error":
                await self._event(send, {"error": {"message": "the engine died"}})
                await self._wait_for_leaving(receive)
                return
            if prompt in ("silent", "hold"):
                self.holding.set()
                await self._wait_for_leaving(receive)
                return
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}
        await self._event(send, {"choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": f"data: [DONE]{self.separator}".encode()})

    async def _chat(self, request: dict[str, Any], receive: Any, send: Any) -> None:
        last = request["messages"][-1]["content"]
        if last == "429":
            await _reply(send, 429, json.dumps({"error": {"message": "the queue is full"}}))
            return
        await _start(send, "text/event-stream")
        await self._event(send, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in ("you", " said ", last):
            await self._event(send, {"choices": [{"delta": {"content": word}}]})
        if last == "hold":
            self.holding.set()
            await self._wait_for_leaving(receive)
            return
        await self._event(send, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        await send({"type": "http.response.body", "body": f"data: [DONE]{self.separator}".encode()})

    async def _event(self, send: Any, data: dict[str, Any]) -> None:
        text = f"data: {json.dumps(data)}{self.separator}".encode()
        # In two packets, so that a reader who takes a packet for an event fails.
        await send({"type": "http.response.body", "body": text[:7], "more_body": True})
        await send({"type": "http.response.body", "body": text[7:], "more_body": True})

    async def _wait_for_leaving(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.closed_early.set()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextmanager
def running_peer() -> Iterator[Peer]:
    """The peer, listening; stopped at the end."""
    peer = Peer()
    server = _Server(uvicorn.Config(peer, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    if not server.listening.wait(20):
        raise RuntimeError("the peer does not start")
    port = server.servers[0].sockets[0].getsockname()[1]
    peer.url = f"http://127.0.0.1:{port}"
    try:
        yield peer
    finally:
        server.should_exit = True
        thread.join(20)


async def _start(send: Any, kind: str, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})


async def _reply(send: Any, status: int, body: str) -> None:
    await _start(send, "application/json", status)
    await send({"type": "http.response.body", "body": body.encode()})
