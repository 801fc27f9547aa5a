"""What the controller counts for operators. Pure. The counts start again with the controller."""

from __future__ import annotations

from collections import Counter

from ..worker.protocol import BadRequest, DeadlineExceeded, EventFrame, Overloaded, QuireError
from .admin import Figures
from .tenants import CountedTenants, RateLimited

REFUSALS = ("rate", "overloaded", "too_large")  # by a limit of the tenant's, by the cluster's load, by size


class Tally:
    """Counters that only grow."""

    def __init__(self) -> None:
        self.deaths = 0
        self.restarts = 0
        self._refused: Counter[tuple[str, str]] = Counter()  # (tenant, reason)
        self._expired = 0
        self._served: Counter[str] = Counter()  # tenant -> tokens
        self._tenants = CountedTenants()
        self._lives: dict[tuple[str, int], dict[str, int]] = {}  # life -> tenant -> tokens, as its latest frame said

    def refused(self, tenant: str, error: QuireError) -> None:
        """A request was not let in, or not in time."""
        match error:
            case RateLimited():
                self._refused[self._tenants.name(tenant), "rate"] += 1
            case Overloaded():
                self._refused[self._tenants.name(tenant), "overloaded"] += 1
            case BadRequest():
                self._refused[self._tenants.name(tenant), "too_large"] += 1
            case DeadlineExceeded():
                self._expired += 1

    def served(self, frame: EventFrame) -> None:
        """What a replica has generated, by tenant. Its counts are of its life; a tenant that has been idle for long may be missing."""
        known = self._lives.setdefault((frame.replica_id, frame.epoch), {})
        for tenant, tokens in frame.served.items():
            self._served[self._tenants.name(tenant)] += max(tokens - known.get(tenant, 0), 0)
        self._lives[frame.replica_id, frame.epoch] = dict(frame.served)

    def ended(self, replica_id: str, epoch: int) -> None:
        """A life is over."""
        self._lives.pop((replica_id, epoch), None)

    def figures(self, queue_requests: int, queue_tokens: int) -> Figures:
        """All counts, and the queue as it is."""
        return Figures(queue_requests, queue_tokens, dict(self._refused), self._expired, dict(self._served), self.deaths, self.restarts)
