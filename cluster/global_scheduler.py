"""The cluster's waiting line: who gets in, who is next, and where to. Pure; times are arguments.

Requests wait here, not at the replicas, so this is where priority, fairness, deadlines and limits act. In order:

    what a replica has lost  >  priority  >  the tenant served least (fair) or the earliest arrival (fcfs)  >  arrival

Whoever is next is sent when the router finds room, and until then nobody passes it. Only a tenant that is at its own limit of
running requests or pages is passed over: that is not for others to wait for.

Whoever can never be served, or not in time, is told so at once: too large, too fast, behind a full queue, or behind so many that
the measured drain rate does not get to it well within its deadline, or within `max_wait_s`.
"""

from __future__ import annotations

from typing import NamedTuple

from ..worker.protocol import BadRequest, DeadlineExceeded, EventFrame, QuireError
from .drain_rate import DrainRate
from .fairness import VirtualTokenCounters
from .messages import AdmitRequest, Route
from .queue_gate import QueueGate, QueueLimits
from .routing import Choice, Router
from .running_requests import RunningRequests
from .tenants import Tenant, TenantTable
from .waiting_line import Waiting, WaitingLines

__all__ = ["Decision", "GlobalScheduler", "QueueLimits", "TenantStatus"]


class Decision(NamedTuple):
    """What has become of a request: where it goes, or why it goes nowhere."""

    request_id: str
    attempt: int
    outcome: Route | QuireError


class TenantStatus(NamedTuple):
    """A tenant as it stands. `served` is its virtual token counter: only differences mean anything. `bounds`: `TenantLimits.bounds`."""

    name: str
    weight: float
    served: float
    waiting: int
    running: int
    pages: int
    bounds: tuple[tuple[str, float], ...] = ()


class GlobalScheduler:
    """Queue, tenants and what runs, over a router.

    A request that has been let in once is not refused for load again, and pays nothing again: a later attempt of it, after a stale
    route or a loss, goes by the books only.

    Args:
        router: finds the places.
        tenants: limits and use of each tenant.
        limits: of the queue.
        order: "fair" or "fcfs".
    """

    def __init__(self, router: Router, tenants: TenantTable, limits: QueueLimits, order: str) -> None:
        self._router = router
        self._tenants = tenants
        self._fair = order == "fair"
        self._lines = WaitingLines()
        self._counters = VirtualTokenCounters(tenants.weight)
        self._running = RunningRequests(self._tenant)
        self._drain = DrainRate()
        self._gate = QueueGate(self._lines, self._counters if self._fair else None, self._drain, tenants, limits)
        self._decided: dict[str, Decision] = {}  # told with the next dispatch
        self._stuck: AdmitRequest | None = None
        self._now_s = 0.0

    # --- what comes in ---

    def offer(self, request: AdmitRequest, now_s: float) -> None:
        """Queues a request; `dispatch` is to follow. A later attempt replaces an earlier one.

        The same attempt again changes nothing; when it has been sent already, the next `dispatch` tells its route again.

        Raises:
            BadRequest: it can never run: larger than any replica, or than its tenant's pages.
            Overloaded: its tenant's rate is used up, the queue is full, or it would wait too long.
            DeadlineExceeded: its deadline has passed on the way.
        """
        self._at(now_s)
        known = self._known_attempt(request.request_id)
        if known is not None and request.attempt <= known:
            running = self._running.known(request.request_id)
            if running is not None and running[0] == request.attempt:
                self._decided[request.request_id] = Decision(request.request_id, request.attempt, running[1])
            return
        self.withdraw(request.request_id)
        self._check_size(request)
        if _is_new(request):
            self._let_in(request)
        self._lines.add(request, now_s)
        self._settle(request.tenant)

    def withdraw(self, request_id: str) -> None:
        """Nobody wants it any more, wherever it is."""
        waiting = self._lines.find(request_id)
        if waiting is not None:
            self._leave(waiting)
        if self._running.known(request_id) is not None:
            self._running.release(request_id)
            self._router.forget(request_id)
        self._decided.pop(request_id, None)
        self._settle_changed()

    def events(self, frame: EventFrame, now_s: float) -> None:
        """Takes in what a replica reports, for the router, too."""
        self._at(now_s)
        self._router.events(frame, now_s)
        for tenant, tokens in self._running.take(frame, now_s).items():
            self._counters.charge_output(tenant, tokens)
            self._tenant(tenant).use_tokens(tokens, now_s)
        self._settle_changed()

    def replica_lost(self, replica_id: str, epoch: int, now_s: float) -> None:
        """That life has ended. Its requests come back as later attempts, if anybody still wants them."""
        self._at(now_s)
        self._router.remove(replica_id, epoch)
        self._running.lost(replica_id, epoch)
        self._settle_changed()

    # --- what goes out ---

    def dispatch(self, now_s: float) -> list[Decision]:
        """Everything that can be decided now, in the order in which it was decided."""
        self._at(now_s)
        for late in self._lines.expired(now_s):
            self._refuse(late, _expired(late, now_s))
        for request_id in self._running.never_arrived(now_s):
            self.withdraw(request_id)
        decisions, self._decided = list(self._decided.values()), {}
        largest, stuck = self._router.largest_tokens(), False
        self._stuck = None
        while not stuck and (waiting := self._next()) is not None:
            request = waiting.request
            if 0 < largest < request.longest_tokens:  # the replica that could hold it is gone
                self._leave(waiting)
                decisions.append(Decision(request.request_id, request.attempt, _too_large(request, largest)))
            elif (choice := self._router.choose(request, now_s)) is not None:
                decisions.append(self._send(waiting, choice))
            else:
                stuck, self._stuck = True, request
        self._drain.set_draining(stuck and largest > 0)
        return decisions

    def next_s(self, now_s: float) -> float | None:
        """Seconds until `dispatch` has something to do even if nothing happens until then; None when it has not."""
        if self._decided:
            return 0.0
        times = [at_s for at_s in (self._lines.next_expiry_s(), self._running.next_timeout_s()) if at_s is not None]
        return max(min(times) - now_s, 0.0) if times else None

    # --- what there is ---

    def stuck(self) -> AdmitRequest | None:
        """Who was next when the latest `dispatch` found no place for it."""
        return self._stuck

    def where(self, request_id: str) -> tuple[int, Route] | None:
        """The attempt and the replica of a request that has been sent (attempt -1: unknown)."""
        return self._running.known(request_id)

    def waiting(self) -> list[AdmitRequest]:
        """The queue, in the order of joining."""
        return [waiting.request for waiting in self._lines.all()]

    def queued_tokens(self) -> int:
        """Prompt tokens in the queue."""
        return self._lines.backlog.tokens

    def tenants(self) -> list[TenantStatus]:
        """Every tenant that has an entry of its own, waits, runs, or has used anything lately."""
        return [self._status(name) for name in self._tenants.names()]

    # --- letting in ---

    def _check_size(self, request: AdmitRequest) -> None:
        largest = self._router.largest_tokens()
        if 0 < largest < request.longest_tokens:
            raise _too_large(request, largest)
        if _is_new(request):
            self._tenant(request.tenant).check_size(request)
        if request.deadline_s is not None and request.deadline_s <= 0 and not request.resumed:
            raise DeadlineExceeded(_late(request.waited_s, request.waited_s + request.deadline_s))

    def _let_in(self, request: AdmitRequest) -> None:
        tenant = self._tenant(request.tenant)
        tenant.check_rates(request, self._now_s)
        self._gate.check_wait(request)
        for victim in self._gate.victims(request):
            self._refuse(victim, self._gate.full())
        tenant.take_rates(request, self._now_s)

    # --- choosing ---

    def _next(self) -> Waiting | None:
        heads = ((tenant, self._lines.lines()[tenant].head()) for tenant in self._counters.active())
        if self._fair:
            best = min(heads, key=lambda head: (head[1].key.rank, self._counters.served(head[0]), head[1].key), default=None)
        else:
            best = min(heads, key=lambda head: head[1].key, default=None)
        return best[1] if best else None

    def _send(self, waiting: Waiting, choice: Choice) -> Decision:
        request, route = waiting.request, Route(choice.replica_id, choice.epoch)
        if _is_new(request):
            self._counters.charge_input(request.tenant, max(request.prompt_tokens - choice.cached_tokens, 0))
        self._drain.left(request.prompt_tokens)
        self._running.send(request, route, self._now_s)
        self._leave(waiting)
        return Decision(request.request_id, request.attempt, route)

    # --- the books ---

    def _at(self, now_s: float) -> None:
        self._now_s = now_s
        self._drain.advance(now_s)

    def _tenant(self, name: str) -> Tenant:
        return self._tenants.tenant(name, self._now_s)

    def _known_attempt(self, request_id: str) -> int | None:
        waiting = self._lines.find(request_id)
        if waiting is not None:
            return waiting.request.attempt
        running = self._running.known(request_id)
        return running[0] if running else None

    def _refuse(self, waiting: Waiting, error: QuireError) -> None:
        self._leave(waiting)
        request = waiting.request
        self._decided[request.request_id] = Decision(request.request_id, request.attempt, error)

    def _leave(self, waiting: Waiting) -> None:
        self._lines.remove(waiting)
        self._settle(waiting.request.tenant)
        self._settle_changed()

    def _settle_changed(self) -> None:
        for tenant in self._running.changed():
            self._settle(tenant)

    def _settle(self, tenant: str) -> None:
        """Whether the tenant takes part: it has a request, and may run it."""
        line = self._lines.line(tenant)
        if line and self._tenant(tenant).may_run(line.head().request):
            self._counters.join(tenant)
        else:
            self._counters.leave(tenant)

    def _status(self, name: str) -> TenantStatus:
        tenant, line = self._tenant(name), self._lines.line(name)
        waiting, served, limits = len(line) if line else 0, self._counters.served(name), tenant.limits
        return TenantStatus(name, limits.weight, served, waiting, tenant.running, tenant.pages, limits.bounds())


def _is_new(request: AdmitRequest) -> bool:
    """Whether it has not been sent anywhere before: then it is checked against loads and limits, and pays."""
    return request.attempt == 0 and not request.resumed


def _too_large(request: AdmitRequest, largest: int) -> BadRequest:
    return BadRequest("max_tokens", f"prompt and output of {request.longest_tokens} tokens; a replica can hold {largest}")


def _late(waited_s: float, had_s: float) -> str:
    return f"deadline_ms: the request has waited {waited_s * 1000:.0f} ms for its turn; it had {had_s * 1000:.0f} ms"


def _expired(waiting: Waiting, now_s: float) -> DeadlineExceeded:
    arrived_s = waiting.key.arrived_s
    return DeadlineExceeded(_late(now_s - arrived_s, (waiting.expires_s or now_s) - arrived_s))
