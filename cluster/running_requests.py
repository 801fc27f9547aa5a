"""What has been sent to replicas and has not ended: whose it is, where it is, and what it has been served. Pure.

It is told what is sent, and learns the rest from the replicas' event frames: what has started and ended, and how many output
tokens each tenant got. After a controller's restart it knows only what the replicas say they have, and that is enough. It keeps
the tenants' counts of running requests and of pages.

A request that migrates is the same attempt, and is counted once: from when its source says that it has moved until its destination
says that it runs there, or the other way round, whichever is heard first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..worker.protocol import EventFrame, LiveRequest
from .messages import AdmitRequest, Route
from .tenants import Tenant

START_TIMEOUT_S = 30.0  # what has been sent and does not start in that time has not arrived, and will not
KEPT_COUNTS = 2048  # tenants that a replica no longer names, of which its last count is remembered: more than the replica does


@dataclass(slots=True)
class _Request:
    """`attempt` is -1 when only a replica's word is known of it.

    `named` are other replicas that say they have it: it may have migrated there, or be left there from an earlier attempt. `left` is
    its output when the replica of `route` said that it had moved, and nobody was known to have it; `over` that another one has ended it.
    """

    tenant: str
    attempt: int
    route: Route
    pages: int
    named: list[Route] = field(default_factory=list)
    left: int | None = None
    over: bool = False


@dataclass(slots=True)
class _Life:
    """One life of a replica. `outputs` are tokens that running requests have generated there, as far as is known, by tenant."""

    epoch: int
    next: int = -1  # of the latest frame; -1 before the first
    steps: int = 0
    lost: bool = False
    requests: dict[str, None] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)  # longest unnamed first


class RunningRequests:
    """The table.

    Args:
        tenant: finds a tenant's state by its name.
    """

    def __init__(self, tenant: Callable[[str], Tenant]) -> None:
        self._tenant = tenant
        self._requests: dict[str, _Request] = {}
        self._lives: dict[str, _Life] = {}
        self._unstarted: dict[str, float] = {}  # when it was sent, oldest first
        self._changed: set[str] = set()

    def changed(self) -> set[str]:
        """The tenants whose counts have changed since this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def known(self, request_id: str) -> tuple[int, Route] | None:
        """The attempt that was sent (-1: unknown), and where to."""
        request = self._requests.get(request_id)
        return (request.attempt, request.route) if request else None

    def send(self, request: AdmitRequest, route: Route, now_s: float) -> None:
        """The request goes to that replica now."""
        self.release(request.request_id)  # a replica may have named an earlier attempt of it since it was queued
        pages = self._tenant(request.tenant).pages_for(request.prompt_tokens, request.sequences)
        self._enter(request.request_id, _Request(request.tenant, request.attempt, route, pages))
        self._unstarted[request.request_id] = now_s

    def release(self, request_id: str, output_tokens: int = 0) -> None:
        """It runs no longer, and had so many output tokens."""
        request = self._requests.get(request_id)
        if request is None:
            return
        self._take_out(request_id, request, output_tokens or request.left or 0)
        del self._requests[request_id]
        self._changed.add(request.tenant)
        tenant = self._tenant(request.tenant)
        tenant.running -= 1
        tenant.prompt_pages -= request.pages

    def take(self, frame: EventFrame, now_s: float) -> dict[str, int]:
        """What the replica reports: tenant -> output tokens that are new. Frames of an ended life, and overtaken ones, say nothing.

        The first frame of a life only says from where to count: what it was before, somebody else has charged.
        """
        life = self._lives.get(frame.replica_id)
        if life is None or frame.epoch > life.epoch:
            life = self._begin(frame.replica_id, frame.epoch)
        if life.lost or frame.epoch < life.epoch or frame.next < life.next or frame.load.steps < life.steps:
            return {}
        first = life.next < 0
        life.next, life.steps = frame.next, frame.load.steps
        served = {} if first else self._newly_served(life, frame.served)
        for tenant, tokens in served.items():
            self._grow(life, tenant, tokens)
        self._count_from(life, frame.served)
        if frame.dump:
            self._drop_unnamed(life, frame)
        for request_id, output_tokens in frame.ended:  # before what has started: an id in both lives again
            self._end(frame, request_id, output_tokens, now_s)
        for live in frame.started:
            self._start(frame, life, live)
        if frame.dump:
            self._recount(life, frame.started)
        return served

    def lost(self, replica_id: str, epoch: int) -> None:
        """That life has ended, and what ran there runs no longer."""
        life = self._lives.get(replica_id)
        if life is None or life.epoch <= epoch:
            self._begin(replica_id, epoch).lost = True  # frames that are still under way change nothing

    def never_arrived(self, now_s: float) -> list[str]:
        """What was sent `START_TIMEOUT_S` ago and has not started."""
        ids = []
        for request_id, sent_s in self._unstarted.items():
            if sent_s + START_TIMEOUT_S > now_s:
                break
            ids.append(request_id)
        return ids

    def next_timeout_s(self) -> float | None:
        """When `never_arrived` may next have something."""
        return next(iter(self._unstarted.values())) + START_TIMEOUT_S if self._unstarted else None

    def _begin(self, replica_id: str, epoch: int) -> _Life:
        before = self._lives.get(replica_id)
        for request_id in list(before.requests) if before else ():
            self._leave(request_id, 0)
        life = self._lives[replica_id] = _Life(epoch)
        return life

    def _enter(self, request_id: str, request: _Request) -> None:
        self._put_in(request_id, request, 0)
        self._requests[request_id] = request
        tenant = self._tenant(request.tenant)
        self._changed.add(request.tenant)
        tenant.running += 1
        tenant.prompt_pages += request.pages

    def _put_in(self, request_id: str, request: _Request, output_tokens: int) -> None:
        """It stands in the life of its route, with so much output."""
        route = request.route
        life = self._lives.get(route.replica_id)
        if life is None or life.epoch < route.epoch:
            life = self._begin(route.replica_id, route.epoch)
        life.requests[request_id] = None
        life.running[request.tenant] = life.running.get(request.tenant, 0) + 1
        self._grow(life, request.tenant, output_tokens)

    def _take_out(self, request_id: str, request: _Request, output_tokens: int) -> int:
        """The inverse of `_put_in`; how much of the output had been counted."""
        self._unstarted.pop(request_id, None)
        life = self._lives[request.route.replica_id]
        del life.requests[request_id]
        counted = min(output_tokens, life.outputs.get(request.tenant, 0))
        life.running[request.tenant] -= 1
        if life.running[request.tenant]:
            self._grow(life, request.tenant, -counted)
        else:  # whatever has been miscounted ends here
            self._grow(life, request.tenant, -life.outputs.get(request.tenant, 0))
            del life.running[request.tenant]
            life.outputs.pop(request.tenant, None)
        return counted

    def _leave(self, request_id: str, output_tokens: int) -> None:
        """Its replica has it no longer: it is where another one says it is, or nowhere."""
        request = self._requests[request_id]
        others = [r for r in request.named if (life := self._lives[r.replica_id]).epoch == r.epoch and not life.lost]
        if others:
            self._go_on(request_id, request, others[-1], output_tokens)
        else:
            self.release(request_id, output_tokens)

    def _go_on(self, request_id: str, request: _Request, route: Route, output_tokens: int) -> None:
        """It has migrated. Its tenant's counts stay what they are."""
        counted = self._take_out(request_id, request, output_tokens)
        request.route, request.left, request.over = route, None, False
        request.named = [r for r in request.named if r != route]
        self._put_in(request_id, request, counted)

    def _start(self, frame: EventFrame, life: _Life, live: LiveRequest) -> None:
        known, route = self._requests.get(live.request_id), Route(frame.replica_id, frame.epoch)
        if known is None:
            tenant = self._tenant(live.tenant)
            self._enter(live.request_id, _Request(live.tenant, -1, route, tenant.pages_for(live.prompt_tokens, live.sequences)))
        elif known.route == route:
            known.left = None  # it may have come back
            self._unstarted.pop(live.request_id, None)
        elif known.left is not None:
            self._go_on(live.request_id, known, route, known.left)
        elif route not in known.named:
            known.named.append(route)

    def _end(self, frame: EventFrame, request_id: str, output_tokens: int, now_s: float) -> None:
        known, route = self._requests.get(request_id), Route(frame.replica_id, frame.epoch)
        if known is None:
            return
        moved = request_id in frame.moved
        if known.route != route and known.left is not None and not moved:
            self.release(request_id, known.left)  # it went there, and ended before that was told
        elif known.route != route:
            known.over |= not moved
            known.named = [r for r in known.named if r != route]
        elif not moved:
            self.release(request_id, output_tokens)
        elif known.named or known.over:
            self._leave(request_id, output_tokens)
        else:
            known.left = output_tokens
            self._unstarted.pop(request_id, None)
            self._unstarted[request_id] = now_s  # as if it had been sent

    def _drop_unnamed(self, life: _Life, frame: EventFrame) -> None:
        """A dump names all that live: what had started and is not in it has ended, or moved."""
        named, route = {live.request_id for live in frame.started}, Route(frame.replica_id, frame.epoch)
        for request_id in [r for r in life.requests if r not in named and r not in self._unstarted]:
            self._leave(request_id, 0)
        for request_id, request in self._requests.items():
            if request_id not in named and route in request.named:
                request.named.remove(route)

    def _recount(self, life: _Life, lives: tuple[LiveRequest, ...]) -> None:
        """A dump says exactly what the running requests have generated."""
        outputs = dict.fromkeys(life.running, 0)
        for live in lives:
            if live.tenant in outputs:
                outputs[live.tenant] += live.output_tokens
        for tenant, tokens in outputs.items():
            self._grow(life, tenant, tokens - life.outputs.get(tenant, 0))

    def _newly_served(self, life: _Life, served: dict[str, int]) -> dict[str, int]:
        # A count that is smaller than before has started again: the replica had forgotten the tenant.
        known = {tenant: life.served.get(tenant, 0) for tenant in served}
        new = {tenant: tokens - known[tenant] if tokens >= known[tenant] else tokens for tenant, tokens in served.items()}
        return {tenant: tokens for tenant, tokens in new.items() if tokens}

    def _count_from(self, life: _Life, served: dict[str, int]) -> None:
        for tenant, tokens in served.items():
            life.served.pop(tenant, None)
            life.served[tenant] = tokens
        for _ in range(len(life.served) - len(served) - KEPT_COUNTS):
            del life.served[next(iter(life.served))]

    def _grow(self, life: _Life, tenant: str, tokens: int) -> None:
        if tenant not in life.running:
            return
        before = life.outputs.get(tenant, 0)
        after = life.outputs[tenant] = max(before + tokens, 0)
        self._changed.add(tenant)
        self._tenant(tenant).output_tokens += after - before
