"""How fast the queue drains, and so how long it takes to get through it. Pure; times are arguments."""

from __future__ import annotations

from math import exp

WINDOW_S = 30.0  # what lies further back hardly counts
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0


class DrainRate:
    """Requests and prompt tokens that leave the queue for replicas, over the time in which the replicas let some wait.

    Only that time counts: what leaves an empty queue says how much is asked for, not how much can be served. Everything fades
    with the age of the evidence (e-fold in `WINDOW_S`), so after a pause nothing is known, and nothing is predicted.
    """

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._draining = False
        self._seconds = 0.0
        self._requests = 0.0
        self._tokens = 0.0

    def advance(self, now_s: float) -> None:
        """The time is `now_s`."""
        if self._at_s is not None and now_s > self._at_s:
            keep = exp((self._at_s - now_s) / WINDOW_S)
            self._seconds = self._seconds * keep + (WINDOW_S * (1 - keep) if self._draining else 0.0)
            self._requests *= keep
            self._tokens *= keep
        self._at_s = now_s if self._at_s is None else max(now_s, self._at_s)

    def left(self, tokens: int) -> None:
        """A request of so many prompt tokens has left for a replica, now."""
        if self._draining:
            self._requests += 1
            self._tokens += tokens

    def set_draining(self, draining: bool) -> None:
        """Whether, from now on, requests wait because the replicas can take none."""
        self._draining = draining

    def wait_s(self, requests: float, tokens: float) -> float:
        """Seconds until so many requests, of so many prompt tokens together, have left.

        Half of a request's share is the same for all, half goes by its prompt. One request is taken to be about to leave: with
        little evidence the answer is too small rather than too large.
        """
        seconds_each = self._seconds / (self._requests + 1)
        by_requests = requests * seconds_each
        if not self._tokens:
            return by_requests
        by_tokens = tokens * seconds_each * self._requests / self._tokens
        return (by_requests + by_tokens) / 2

    def retry_after_s(self, requests: float, tokens: float) -> float:
        """When to come again, behind so much: `wait_s` within sensible bounds."""
        return min(max(self.wait_s(requests, tokens), LEAST_RETRY_S), MOST_RETRY_S)
