"""What a simulated cluster looked like over time, and what it cost."""

from __future__ import annotations

from typing import NamedTuple

SAMPLE_S = 5.0


class Sample(NamedTuple):
    """One moment.

    Attributes:
        ready, starting, draining: replicas.
        running: requests at replicas; `queued` wait for one.
    """

    at_s: float
    ready: int
    starting: int
    draining: int
    running: int
    queued: int


class Timeline:
    """Samples, and the time for which each replica was there, from the decision to start it to its end."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._begun_s: dict[str, float] = {}
        self._ended_s = 0.0

    def begun(self, replica_id: str, now_s: float) -> None:
        """It takes its GPUs."""
        self._begun_s[replica_id] = now_s

    def gone(self, replica_id: str, now_s: float) -> None:
        """It gives them back."""
        self._ended_s += now_s - self._begun_s.pop(replica_id)

    def replica_s(self, now_s: float) -> float:
        """Seconds of all replicas together until now."""
        return self._ended_s + sum(now_s - begun_s for begun_s in self._begun_s.values())
