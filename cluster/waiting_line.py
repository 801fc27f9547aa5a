"""Requests that wait for a replica: one line for each tenant, counts of what stands in front, and who expires when. Pure.

Lines are sorted lists: finding a place takes O(log n) comparisons, and moving a few thousand pointers takes a microsecond.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .messages import AdmitRequest

RESUMED_RANK = float("-inf")


class Key(NamedTuple):
    """The order within a tenant: what a replica has lost, then by priority, then by arrival."""

    rank: float
    arrived_s: float
    number: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue; `expires_s` is None when it waits for ever."""

    request: AdmitRequest
    key: Key
    expires_s: float | None


class Backlog:
    """How many requests, and prompt tokens, wait at each rank."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._ranks: dict[float, tuple[int, int]] = {}

    def add(self, rank: float, requests: int, tokens: int) -> None:
        """Counts them in; negative ones out."""
        self.requests += requests
        self.tokens += tokens
        before = self._ranks.get(rank, (0, 0))
        after = (before[0] + requests, before[1] + tokens)
        if after[0]:
            self._ranks[rank] = after
        else:
            self._ranks.pop(rank, None)

    def up_to(self, rank: float) -> tuple[int, int]:
        """(requests, tokens) that a newcomer of `rank` finds in front of it."""
        counts = [count for r, count in self._ranks.items() if r <= rank]
        return sum(requests for requests, _ in counts), sum(tokens for _, tokens in counts)


class Line:
    """One tenant's requests, in order."""

    def __init__(self) -> None:
        self.backlog = Backlog()
        self._keys: list[Key] = []
        self._waiting: dict[Key, Waiting] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def head(self) -> Waiting:
        """Who is next in this line."""
        return self._waiting[self._keys[0]]

    def from_the_end(self) -> Iterator[Waiting]:
        """All of them, the last one first."""
        return (self._waiting[key] for key in reversed(self._keys))

    def add(self, waiting: Waiting) -> None:
        insort(self._keys, waiting.key)
        self._waiting[waiting.key] = waiting
        self.backlog.add(waiting.key.rank, 1, waiting.request.prompt_tokens)

    def remove(self, waiting: Waiting) -> None:
        del self._keys[bisect_left(self._keys, waiting.key)]
        del self._waiting[waiting.key]
        self.backlog.add(waiting.key.rank, -1, -waiting.request.prompt_tokens)


class WaitingLines:
    """Everything that waits. `backlog` counts all of it; `len` is the number of requests."""

    def __init__(self) -> None:
        self.backlog = Backlog()
        self._lines: dict[str, Line] = {}  # of tenants that have one
        self._by_id: dict[str, Waiting] = {}
        self._expiries: list[tuple[float, str]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, request_id: str) -> Waiting | None:
        return self._by_id.get(request_id)

    def line(self, tenant: str) -> Line | None:
        """The tenant's line, when it has one."""
        return self._lines.get(tenant)

    def lines(self) -> dict[str, Line]:
        """Tenant -> line, none of them empty."""
        return self._lines

    def all(self) -> list[Waiting]:
        """Everything that waits, in the order of joining."""
        return list(self._by_id.values())

    def add(self, request: AdmitRequest, now_s: float) -> None:
        """Puts it where its priority and arrival belong. A request that a replica has lost had begun: its deadline is met."""
        rank = RESUMED_RANK if request.resumed else float(request.priority)
        self._number += 1
        key = Key(rank, now_s - request.waited_s, self._number)
        expires_s = None if request.deadline_s is None or request.resumed else now_s + request.deadline_s
        waiting = self._by_id[request.request_id] = Waiting(request, key, expires_s)
        self._lines.setdefault(request.tenant, Line()).add(waiting)
        self.backlog.add(rank, 1, request.prompt_tokens)
        if expires_s is not None:
            insort(self._expiries, (expires_s, request.request_id))

    def remove(self, waiting: Waiting) -> None:
        """It waits no longer."""
        request = waiting.request
        del self._by_id[request.request_id]
        line = self._lines[request.tenant]
        line.remove(waiting)
        if not line:
            del self._lines[request.tenant]
        self.backlog.add(waiting.key.rank, -1, -request.prompt_tokens)
        if waiting.expires_s is not None:
            del self._expiries[bisect_left(self._expiries, (waiting.expires_s, request.request_id))]

    def next_expiry_s(self) -> float | None:
        """When the first of them expires."""
        return self._expiries[0][0] if self._expiries else None

    def expired(self, now_s: float) -> list[Waiting]:
        """Those whose deadline has passed, still in the lines."""
        count = bisect_right(self._expiries, now_s, key=lambda expiry: expiry[0])
        return [self._by_id[request_id] for _, request_id in self._expiries[:count]]
