"""Which generation requests run, and how the server stops taking them.

`drain` is what SIGTERM does: new requests get 503, running ones get `grace_s` to finish, the rest are cut off with an
error that says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ApiError

CUT_TIMEOUT_S = 5.0


class Lifecycle:
    """One for an app; used from its event loop only."""

    def __init__(self) -> None:
        self.draining = False
        self.running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut = asyncio.Event()

    @contextmanager
    def track(self) -> Iterator[None]:
        """A generation request runs for as long as this is entered.

        Raises:
            ApiError: 503, the server is draining.
        """
        if self.draining:
            raise shutting_down()
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def drain(self, grace_s: float) -> bool:
        """Stops taking requests and waits for the running ones. True when they all finished by themselves.

        Another drain with less grace cuts the first one short.
        """
        self.draining = True
        if await _within(self._idle, grace_s):
            return not self._cut.is_set()
        self._cut.set()
        await _within(self._idle, CUT_TIMEOUT_S)
        return False

    async def cut(self) -> None:
        """Returns when running requests must stop: the grace time is over."""
        await self._cut.wait()  # bounded by the request that waits beside it


def shutting_down() -> ApiError:
    """What clients are told while the server drains."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


async def _within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
