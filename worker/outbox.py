"""Frames of one ingress, on their way from the engine thread to the event loop that sends them.

The engine thread never waits for an ingress. One that reads slowly gets several frames at a time; one that falls too far
behind, or no longer renews its lease, is given up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from .protocol import ReplicaLost

MAX_BYTES = 64 * 2**20
LEASE_S = 15.0


class ReaderGivenUp(Exception):
    """The ingress reads too slowly, or has not renewed its lease; the replica goes on without it."""


class Outbox:
    """Written by one thread, read by one coroutine.

    Args:
        loop: where `take` is awaited.
        clock: seconds, monotonic; called on both sides.
        give_up: called once, on the engine thread, when the ingress is given up.
        max_bytes: what may lie here unread.
        lease_s: how long after the last `renew` the ingress is held to be gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        give_up: Callable[[], None],
        max_bytes: int = MAX_BYTES,
        lease_s: float = LEASE_S,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._give_up = give_up
        self._max_bytes = max_bytes
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._frames: list[bytes] = []
        self._bytes = 0
        self._end: Exception | None = None
        self._filled = asyncio.Event()
        self.renew()

    def renew(self) -> None:
        """The ingress is alive."""
        self._renewed_s = self._clock()

    def put(self, frame: bytes) -> None:
        """Takes a frame, on the engine thread. Never blocks."""
        late_s = self._clock() - self._renewed_s
        with self._lock:
            if self._end is not None:
                return
            if self._bytes + len(frame) > self._max_bytes:
                reason = f"more than {self._max_bytes} bytes of frames lie unread"
            elif late_s > self._lease_s:
                reason = f"the lease was not renewed for {late_s:.1f} s"
            else:
                self._frames.append(frame)
                self._bytes += len(frame)
                if len(self._frames) == 1:
                    self._wake()
                return
        self._close(ReaderGivenUp(reason))
        self._give_up()

    def close(self, reason: str) -> None:
        """The replica is gone: `take` raises ReplicaLost. From any thread."""
        self._close(ReplicaLost(reason))

    def _close(self, end: Exception) -> None:
        with self._lock:
            self._end = self._end or end
            self._frames.clear()
            self._bytes = 0
            self._wake()

    async def take(self, timeout_s: float) -> list[bytes]:
        """All frames that lie here, oldest first; waits for the first one.

        Raises:
            ReplicaLost: the outbox was closed.
            ReaderGivenUp: see there.
            TimeoutError: no frame came.
        """
        async with asyncio.timeout(timeout_s):
            await self._filled.wait()
        with self._lock:
            self._filled.clear()
            if self._end is not None:
                raise self._end
            frames, self._frames, self._bytes = self._frames, [], 0
        return frames

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._filled.set)
