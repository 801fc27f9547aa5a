"""The clock of a simulation: what happens next, and when."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable


class EventLoop:
    """Happenings in the order of their times; at the same time, in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._calendar: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when_s: float, happen: Callable[[], None]) -> None:
        """`happen` is called then, or now if that has passed."""
        heapq.heappush(self._calendar, (max(when_s, self.now_s), next(self._order), happen))

    def after(self, delay_s: float, happen: Callable[[], None]) -> None:
        """`happen` is called in so many seconds."""
        self.at(self.now_s + delay_s, happen)

    def run(self, until_s: float = math.inf) -> None:
        """All that happens until then, or until nothing is left."""
        while self._calendar and self._calendar[0][0] <= until_s:
            self.now_s, _, happen = heapq.heappop(self._calendar)
            happen()
