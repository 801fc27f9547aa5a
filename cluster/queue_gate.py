"""Whether one more request may wait, and who has to go for it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..worker.protocol import Overloaded
from .drain_rate import DrainRate
from .fairness import VirtualTokenCounters
from .messages import AdmitRequest
from .tenants import TenantTable
from .waiting_line import Line, Waiting, WaitingLines

# Of a deadline, that the predicted wait may take: predictions err, and the replica needs time for the first step, too.
DEADLINE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of the queue, cluster-wide.

    Attributes:
        max_requests: that may wait.
        max_tokens: prompt tokens that may wait. One request may wait alone, whatever its size.
        max_wait_s: a request that would wait longer, as the queue drains now, is refused. So is one that would for much of its deadline.
    """

    max_requests: int
    max_tokens: int
    max_wait_s: float = 60.0


@dataclass(frozen=True, slots=True)
class QueueGate:
    """Decides over the queue's books, and changes none of them.

    Attributes:
        lines: what waits.
        counters: whose turn it is; None when all go by arrival.
        drain: how fast it gets shorter.
        tenants: their weights.
        limits: the bounds.
    """

    lines: WaitingLines
    counters: VirtualTokenCounters | None
    drain: DrainRate
    tenants: TenantTable
    limits: QueueLimits

    def check_wait(self, request: AdmitRequest) -> None:
        """Raises:
        Overloaded: the request would not have its turn well within its deadline, or not within `max_wait_s`.
        """
        requests, tokens = self._ahead_of(request)
        wait_s = self.drain.wait_s(requests, tokens)
        if request.deadline_s is not None and wait_s > DEADLINE_SHARE * request.deadline_s:
            limit = f"too long for a deadline in {request.deadline_s:.1f} s"
        elif wait_s > self.limits.max_wait_s:
            limit = f"longer than {self.limits.max_wait_s:.1f} s"
        else:
            return
        raise Overloaded(f"the request would wait about {wait_s:.1f} s for its turn, {limit}", self.drain.retry_after_s(requests, tokens))

    def victims(self, request: AdmitRequest) -> list[Waiting]:
        """Who has to go so that `request` fits into the queue: nobody, while there is room.

        When the queue is full, the last in the longest line make room for a tenant whose line stays shorter all the same, or for a
        higher priority: a tenant that floods the queue keeps nobody else out of it. What a replica has lost stays.

        Raises:
            Overloaded: nobody has to.
        """
        requests = len(self.lines) + 1 - self.limits.max_requests
        tokens = self.lines.backlog.tokens + request.prompt_tokens - self.limits.max_tokens
        if not self.lines or (requests <= 0 and tokens <= 0):
            return []
        longest, line = max(self.lines.lines().items(), key=lambda entry: self._share(*entry))
        own_share = self._share(request.tenant, self.lines.line(request.tenant), 1)
        victims: list[Waiting] = []
        for waiting in line.from_the_end():
            less_urgent = request.priority < waiting.key.rank
            in_turn = self.counters is not None and request.priority <= waiting.key.rank
            if not less_urgent and not (in_turn and own_share < self._share(longest, line, -len(victims))):
                break
            victims.append(waiting)
            requests -= 1
            tokens -= waiting.request.prompt_tokens
            if requests <= 0 and tokens <= 0:
                return victims
        raise self.full()

    def full(self) -> Overloaded:
        """What whoever does not fit is told: to come again when what waits now has gone."""
        backlog = self.lines.backlog
        what = f"the queue is full: {backlog.requests} requests with {backlog.tokens} prompt tokens wait"
        return Overloaded(what, self.drain.retry_after_s(backlog.requests, backlog.tokens))

    def _ahead_of(self, request: AdmitRequest) -> tuple[float, float]:
        """(requests, prompt tokens) that will go before it: no more than all that wait, and where tenants take turns, no more than
        their turns while its own tenant's line is served."""
        requests, tokens = self.lines.backlog.up_to(request.priority)
        if self.counters is None:
            return requests, tokens
        line = self.lines.line(request.tenant)
        own_requests, own_tokens = line.backlog.up_to(request.priority) if line else (0, 0)
        weight = self.tenants.weight(request.tenant)
        others = self.counters.active_weight() - (weight if self.counters.is_active(request.tenant) else 0.0)
        turns = 1 + others / weight
        return min(requests, own_requests * turns), min(tokens, own_tokens * turns)

    def _share(self, tenant: str, line: Line | None, more: int = 0) -> float:
        return ((len(line) if line else 0) + more) / self.tenants.weight(tenant)
