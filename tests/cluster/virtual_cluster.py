"""A cluster in virtual time: the real queue and the real router over replicas that only count tokens.

A replica steps like the real one: decodes first, then prompts in order, under a budget of tokens; a step takes `STEP_S` and
`TOKEN_S` for each token. Routes and submissions take no time, and a replica reports after each step.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.cluster.fairness import INPUT_PRICE, OUTPUT_PRICE
from quire.cluster.global_scheduler import GlobalScheduler
from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.queue_gate import QueueLimits
from quire.cluster.routing import Router
from quire.cluster.tenants import TenantLimits, TenantTable
from quire.worker.protocol import EventFrame, LiveRequest, ModelInfo, Overloaded, QuireError, ReplicaLoad

PAGE, PAGES = 16, 4096
BUDGET_TOKENS, SEATS = 512, 32
STEP_S, TOKEN_S = 0.005, 0.0002


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share stays within (nearest rank)."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


@dataclass
class Load:
    """One request, and what became of it. Times are seconds of the run."""

    request_id: str
    tenant: str
    at_s: float
    prompt: int
    output: int
    deadline_s: float | None = None
    computed: int = 0
    generated: int = 0
    sent_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    error: QuireError | None = None
    error_s: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.at_s


def poisson(tenant: str, per_s: float, until_s: float, prompt: int, output: int, deadline_s: float | None = None) -> list[Load]:
    """Requests of one tenant at random times; the same for the same arguments."""
    draw, at_s, loads = random.Random(f"{tenant}:{per_s}"), 0.0, []
    while (at_s := at_s + draw.expovariate(per_s)) < until_s:
        loads.append(Load(f"{tenant}-{len(loads)}", tenant, at_s, prompt, output, deadline_s))
    return loads


@dataclass
class Replica:
    """Counts tokens."""

    replica_id: str
    held: list[Load] = field(default_factory=list)
    started: list[Load] = field(default_factory=list)
    ended: list[Load] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    events: int = 0
    busy: bool = False

    def step(self) -> tuple[float, list[Load]]:
        """How long it takes, and who gains a token at its end."""
        running, budget = self.held[:SEATS], BUDGET_TOKENS
        gaining = [load for load in running if load.computed == load.prompt]
        budget -= len(gaining)
        for load in running:
            if load.computed < load.prompt and budget:
                count = min(load.prompt - load.computed, budget)
                load.computed += count
                budget -= count
                if load.computed == load.prompt:
                    gaining.append(load)
        return STEP_S + TOKEN_S * (BUDGET_TOKENS - budget), gaining

    def finish(self, gaining: list[Load], now_s: float) -> None:
        self.steps += 1
        for load in gaining:
            load.generated += 1
            self.served[load.tenant] += 1
            load.first_s = now_s if load.first_s is None else load.first_s
            if load.generated == load.output:
                load.last_s = now_s
                self.held.remove(load)
                self.ended.append(load)

    def frame(self, dump: bool = False) -> EventFrame:
        """What happened since the last one."""
        running = self.held[:SEATS]
        pages = sum(-(-(load.computed + load.generated) // PAGE) for load in running)
        pending = sum(load.prompt - load.computed for load in self.held)
        free = PAGES - pages
        waiting = len(self.held) - len(running)
        load = ReplicaLoad(len(running), waiting, PAGES, free, 0, pages, 0, 0, pending, 0, 1 / TOKEN_S, STEP_S, self.steps)
        after, self.events = self.events, self.events + len(self.started) + len(self.ended)
        started = tuple(LiveRequest(x.request_id, x.tenant, 0, "running", 1, x.prompt, 0, 1) for x in self.started if x in self.held)
        ended = tuple((x.request_id, x.generated) for x in self.ended)
        self.started, self.ended = [], []
        return EventFrame(self.replica_id, 1, after, self.events, dump, (), (), started, ended, dict(self.served), load)


class VirtualCluster:
    """Replicas, queue and clients. `service` is what each tenant got, in token prices."""

    def __init__(
        self,
        tenants: tuple[TenantLimits, ...] = (),
        *,
        order: str = "fair",
        replicas: int = 1,
        limits: QueueLimits = QueueLimits(10**6, 10**9, 10**6),  # noqa: B008
    ) -> None:
        self.router = Router("cost")
        self.scheduler = GlobalScheduler(self.router, TenantTable(tenants, PAGE), limits, order)
        self.replicas = {f"r{i}": Replica(f"r{i}") for i in range(replicas)}
        self.service: Counter[str] = Counter()
        self.waiting_most = 0
        for name, replica in self.replicas.items():
            self.router.add(name, 1, ModelInfo("m", "", 4096, 100, (), 0, PAGE, PAGE * PAGES, 1024, SEATS))
            self.scheduler.events(replica.frame(dump=True), 0.0)

    def run(self, loads: list[Load], until_s: float, watch: Callable[[dict[str, int]], None] | None = None) -> list[Load]:
        """Plays `loads` until `until_s`; `watch` hears after everything that happens how many wait of each tenant."""
        by_id = {load.request_id: load for load in loads}
        calendar: list[tuple[float, int, Load | tuple[str, list[Load]] | None]] = []
        for number, load in enumerate(loads):
            heapq.heappush(calendar, (load.at_s, number, load))
        number, alarm_s = len(loads), math.inf
        while calendar and calendar[0][0] <= until_s:
            now_s, _, what = heapq.heappop(calendar)
            if isinstance(what, Load):
                self._offer(what, now_s)
            elif what is not None:
                name, gaining = what
                replica = self.replicas[name]
                replica.busy = False
                replica.finish(gaining, now_s)
                for load in gaining:
                    self.service[load.tenant] += OUTPUT_PRICE
                self.scheduler.events(replica.frame(), now_s)
            for decision in self.scheduler.dispatch(now_s):
                load = by_id[decision.request_id]
                if isinstance(decision.outcome, Route):
                    load.sent_s = now_s
                    self.service[load.tenant] += INPUT_PRICE * load.prompt
                    replica = self.replicas[decision.outcome.replica_id]
                    replica.held.append(load)
                    replica.started.append(load)
                else:
                    load.error, load.error_s = decision.outcome, now_s
            lines = {status.name: status.waiting for status in self.scheduler.tenants()}
            self.waiting_most = max(self.waiting_most, sum(lines.values()))
            for name, replica in self.replicas.items():
                if replica.held and not replica.busy:
                    replica.busy = True
                    took_s, gaining = replica.step()
                    number += 1
                    heapq.heappush(calendar, (now_s + took_s, number, (name, gaining)))
            alarm_s = math.inf if alarm_s <= now_s else alarm_s
            if (next_s := self.scheduler.next_s(now_s)) is not None and now_s + next_s < alarm_s:
                alarm_s, number = now_s + next_s, number + 1
                heapq.heappush(calendar, (alarm_s, number, None))
            if watch is not None:
                watch(lines)
        return loads

    def _offer(self, load: Load, now_s: float) -> None:
        longest = load.prompt + load.output
        asked = AdmitRequest(load.request_id, 0, load.tenant, 0, 0.0, load.deadline_s, 1, load.prompt, load.output, longest)
        try:
            self.scheduler.offer(asked, now_s)
        except Overloaded as error:
            load.error, load.error_s = error, now_s
