"""What the controller counts for operators. Pure. The counts start again with the controller."""

from __future__ import annotations

from collections import Counter

from ..worker.protocol import BadRequest, DeadlineExceeded, EventFrame, Overloaded, QuireError
from .admin import Figures

KEPT_TENANTS = 1024  # beyond it, further tenants are counted together


class Tally:
    """Counters that only grow."""

    def __init__(self) -> None:
        self.deaths = 0
        self.restarts = 0
        self._refused: Counter[str] = Counter()
        self._expired = 0
        self._served: Counter[str] = Counter()
        self._lives: dict[tuple[str, int], dict[str, int]] = {}  # life -> tenant -> tokens, as its latest frame said

    def refused(self, error: QuireError) -> None:
        """A request was not let in, or not in time."""
        match error:
            case Overloaded():
                self._refused["overloaded"] += 1
            case BadRequest():
                self._refused["too_large"] += 1
            case DeadlineExceeded():
                self._expired += 1

    def served(self, frame: EventFrame) -> None:
        """What a replica has generated, by tenant. Its counts are of its life; a tenant that has been idle for long may be missing."""
        known = self._lives.setdefault((frame.replica_id, frame.epoch), {})
        for tenant, tokens in frame.served.items():
            name = tenant if tenant in self._served or len(self._served) < KEPT_TENANTS else "others"
            self._served[name] += max(tokens - known.get(tenant, 0), 0)
        self._lives[frame.replica_id, frame.epoch] = dict(frame.served)

    def ended(self, replica_id: str, epoch: int) -> None:
        """A life is over."""
        self._lives.pop((replica_id, epoch), None)

    def figures(self, queue_requests: int, queue_tokens: int) -> Figures:
        """All counts, and the queue as it is."""
        return Figures(queue_requests, queue_tokens, dict(self._refused), self._expired, dict(self._served), self.deaths, self.restarts)
