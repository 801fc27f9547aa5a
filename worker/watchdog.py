"""Notices a step that never ends: a rank that hangs, or a kernel that does."""

from __future__ import annotations

import threading
from collections.abc import Callable

LOOKS = 20  # within one limit


class Watchdog:
    """Calls `die` with a message, once and from a thread of its own, when a step has taken longer than `limit_s`.

    Args:
        limit_s: for one step.
        step_s: how long the step has taken so far that is being computed now; 0.0 when there is none. Called from that thread.
        die: ends what hangs.
    """

    def __init__(self, limit_s: float, step_s: Callable[[], float], die: Callable[[str], None]) -> None:
        self._limit_s = limit_s
        self._step_s = step_s
        self._die = die
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._limit_s / LOOKS, 1.0)):
            if self._step_s() > self._limit_s:
                self._die(f"a step has taken longer than {self._limit_s:g} s: something hangs")
                return
