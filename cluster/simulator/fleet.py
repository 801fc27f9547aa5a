"""How many simulated replicas there are, and why: the real autoscaler on the simulation's clock, starts that take time, and drains.

As `ray_gateway.scaler` does it: what is missing is started, who is too many is emptied by migration and goes when it has held nothing for a
moment; one that leaves comes back before a new one is started.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..arrivals import ArrivalWindow
from ..autoscaling import AutoscalingContext, ReplicaFigures
from ..autoscaling_guard import Autoscaler, ScaleDecision
from ..controller import DRAINED, Replica, ReplicaState
from ..messages import Route
from ..scale_in import cheapest_to_empty, idle
from .jobs import Job

if TYPE_CHECKING:
    from .simulation import Simulation

DECIDE_S = 1.0  # between two decisions
LINGER_S = 1.0  # of having held nothing, before a replica goes
LATELY_S = 10.0  # requests that ended so long ago count for the latencies that are seen
MIDNIGHT_S = 1_700_006_400.0  # unix time at which a simulation begins: 2023-11-15 00:00 UTC


class Fleet:
    """The replicas of a simulation.

    Args:
        simulation: whose.
        autoscaler: None: there are as many as at the beginning.
        replicas: at the beginning.
    """

    def __init__(self, simulation: Simulation, autoscaler: Autoscaler | None, replicas: int) -> None:
        self.decisions: list[ScaleDecision] = []  # those that changed something
        self.arrivals = ArrivalWindow()
        self._sim = simulation
        self._autoscaler = autoscaler
        self._target = replicas
        self._speed = 0.0
        self._lately: deque[tuple[float, float, float | None]] = deque()  # (when it ended, TTFT, TPOT)
        self._empty_since_s: dict[str, float] = {}

    # --- what happens ---

    def begin(self) -> None:
        """The first replicas are ready at once."""
        for replica_id in self._sim.table.due(0.0):
            self._start(replica_id, 0.0)
        if self._autoscaler is not None:
            self._round()

    def ended(self, job: Job) -> None:
        """A request has had its answer."""
        if job.first_s is not None and job.last_s is not None and job.ttft_s is not None:
            tpot_s = (job.last_s - job.first_s) / (job.output_tokens - 1) if job.output_tokens > 1 else None
            self._lately.append((job.last_s, job.ttft_s, tpot_s))

    # --- rounds ---

    def _round(self) -> None:
        if self._autoscaler is None or not self._sim.running:
            return
        ctx = self._context()
        self._speed = ctx.speed
        decision = self._autoscaler.decide(ctx)
        if decision.target != self._target:
            self.decisions.append(decision)
        self._target = decision.target
        self._settle()
        self._sim.loop.after(DECIDE_S, self._round)

    def _settle(self) -> None:
        """Brings the table to the target, and those that leave to their end."""
        table, now_s = self._sim.table, self._sim.loop.now_s
        while len(table.staying()) < self._target:
            back = next(iter(table.leaving()), None)
            if back is not None:
                table.leave(back.replica_id, False)
                self._empty(back.replica_id, False)
            else:
                self._start(table.add(now_s), self._sim.options.profile.replica.startup_s)
        while len(table.staying()) > self._target and (victim := self._victim()) is not None:
            if victim.state is ReplicaState.STARTING:
                self._remove(victim)
            else:
                table.leave(victim.replica_id)
                self._empty(victim.replica_id, True)
        for replica in table.leaving():
            self._see_off(replica)

    def _see_off(self, replica: Replica) -> None:
        model = self._sim.replicas[Route(replica.replica_id, replica.epoch)]
        on_its_way = any(shot.sent.sequences for shot in self._sim.router.snapshots() if shot.replica_id == replica.replica_id)
        if replica.shown != DRAINED or not model.idle() or on_its_way:
            self._empty_since_s.pop(replica.replica_id, None)
        elif self._sim.loop.now_s - self._empty_since_s.setdefault(replica.replica_id, self._sim.loop.now_s) >= LINGER_S:
            self._remove(replica)

    def _victim(self) -> Replica | None:
        """Who goes: what has not come yet, the latest first, else the cheapest to empty."""
        table = self._sim.table
        coming = [r for r in table.staying() if r.state is ReplicaState.STARTING]
        if coming:
            return coming[-1]
        places = self._sim.places()
        place = cheapest_to_empty(places) or (idle(places) if self._target == 0 else None)
        return None if place is None else table.replica(place.route.replica_id)

    # --- lives ---

    def _start(self, replica_id: str, takes_s: float) -> None:
        sim = self._sim
        route = Route(replica_id, sim.table.begin(replica_id, int(1000 * sim.loop.now_s) + 1, sim.loop.now_s))
        sim.timeline.begun(replica_id, sim.loop.now_s)

        def ready() -> None:
            if sim.table.lives(*route):
                sim.ready(route)

        if takes_s:
            sim.loop.after(takes_s, ready)
        else:
            ready()

    def _empty(self, replica_id: str, on: bool) -> None:
        self._sim.table.drain(replica_id, on)
        self._sim.books.drain(replica_id, on)
        self._sim.steer()

    def _remove(self, replica: Replica) -> None:
        sim = self._sim
        sim.table.remove(replica.replica_id)
        sim.timeline.gone(replica.replica_id, sim.loop.now_s)
        sim.books.drain(replica.replica_id, False)
        self._empty_since_s.pop(replica.replica_id, None)
        sim.gone(Route(replica.replica_id, replica.epoch))

    # --- what there is ---

    def _context(self) -> AutoscalingContext:
        sim, now_s = self._sim, self._sim.loop.now_s
        while self._lately and self._lately[0][0] < now_s - LATELY_S:
            self._lately.popleft()
        ready = {r.replica_id for r in sim.table.staying() if r.state is ReplicaState.READY and not r.draining}
        shots = [shot for shot in sim.router.snapshots() if shot.replica_id in ready]
        shape = sim.options.profile.replica
        return AutoscalingContext(
            now_s=now_s,
            current_time=MIDNIGHT_S + now_s,
            target_num_replicas=self._target,
            replicas=tuple(map(ReplicaFigures.of, shots)),
            unready_s=sim.table.unready_s(now_s),
            queued_requests=len(sim.scheduler.waiting()),
            queued_tokens=sim.scheduler.queued_tokens(),
            arrivals=self.arrivals.figures(now_s),
            usual_prefill_tokens_per_s=self._speed,
            ttft_s=_high([ttft_s for _, ttft_s, _ in self._lately]),
            tpot_s=_high([tpot_s for _, _, tpot_s in self._lately if tpot_s is not None]),
            start_s=shape.startup_s,
            page_size=shape.page_size,
            batch_tokens=shape.max_batch_tokens,
        )


def _high(values: list[float]) -> float | None:
    """The 99th percentile (nearest rank)."""
    return sorted(values)[min(int(0.99 * len(values)), len(values) - 1)] if values else None
