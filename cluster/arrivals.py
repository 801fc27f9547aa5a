"""How much has come lately: a window over new requests. Pure; times are arguments."""

from __future__ import annotations

from collections import deque
from math import ceil

from .autoscaling import Arrivals

WINDOW_S = 30.0
MOST = 20_000  # requests that are remembered


class ArrivalWindow:
    """The new requests of the last `window_s`."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._came: deque[tuple[float, float]] = deque(maxlen=MOST)  # (when, tokens)
        self._begun_s: float | None = None

    def came(self, tokens: float, now_s: float) -> None:
        """A new request, with so many prompt tokens."""
        if self._begun_s is None:
            self._begun_s = now_s
        self._came.append((now_s, tokens))

    def figures(self, now_s: float) -> Arrivals:
        """What the window holds. At the beginning, and when more came than is remembered, it is as long as what is known."""
        full = len(self._came) == MOST
        since_s = self._came[0][0] if full else max(now_s - self._window_s, self._begun_s or 0.0)
        while self._came and self._came[0][0] <= now_s - self._window_s:
            self._came.popleft()
        if not self._came:
            return Arrivals()
        sizes = sorted(tokens for _, tokens in self._came)
        n, total = len(sizes), sum(sizes)
        mean = total / n
        variance = sum((size - mean) ** 2 for size in sizes) / n
        span_s = max(now_s - since_s, 1.0)
        high = sizes[ceil(0.99 * n) - 1]
        return Arrivals(n / span_s, total / span_s, mean, high, variance / mean**2 if mean else 1.0)
