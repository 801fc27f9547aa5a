"""As many replicas as there are to be: asks the autoscaler, starts what is missing, and empties and ends what is too many.

Who leaves is emptied like any drain, by migration; its life ends when it has held nothing for `LINGER_S`, so that its last words have been
read. One that is asked for again before that stays. What has no place yet is a pending placement group, which Ray's autoscaler and KubeRay
see; nothing waits for it here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from ...worker.config import QuireOptions
from ...worker.protocol import ModelInfo, ReplicaLost
from ..admin import NotNow, Percentiles, ScaleFigures, UnknownReplica
from ..arrivals import ArrivalWindow
from ..autoscaling import AutoscalingContext, ReplicaFigures
from ..autoscaling_guard import ScaleDecision, Why
from ..autoscaling_setup import autoscaler_of, limits_of, replicas_at_first
from ..controller import DRAINED, Controller, Replica, ReplicaState
from ..global_scheduler import GlobalScheduler
from ..messages import AdmitRequest
from ..routing import Router
from ..scale_in import cheapest_to_empty, idle, least_held
from ..upgrading import PLACE_PATIENCE_S, Fleet, Step, next_step, number_after
from .calls import LifeName
from .memory import Memory, Remembered
from .movers import Movers

log = logging.getLogger(__name__)

ROUND_S = 1.0  # between two decisions
QUICK_ROUND_S = 0.1  # between two looks at what leaves
LINGER_S = 1.0
LOOK_AROUND_S = 15.0
KEPT = 256  # decisions
NOTABLE = (Why.BUDGET, Why.NO_ROOM, Why.STALLED, Why.FAILED)  # also when nothing changes
LATENCY_AGE_S = 10.0  # beyond it, what an ingress said of latencies counts no more


class Scaler:
    """The number of replicas of one model.

    Args:
        options: of the cluster.
        table: the replicas.
        router, scheduler: loads and the queue.
        movers: empties who leaves.
        memory: where the table is kept.
    """

    def __init__(
        self, options: QuireOptions, table: Controller, router: Router, scheduler: GlobalScheduler, movers: Movers, memory: Memory
    ) -> None:
        self._limits = limits_of(options)
        self._autoscaler = autoscaler_of(options)
        self._table = table
        self._router = router
        self._scheduler = scheduler
        self._movers = movers
        self._memory = memory
        self._engine = options.engine
        self._target = replicas_at_first(options)
        self._by_hand = False
        self._model: ModelInfo | None = None
        self._arrivals = ArrivalWindow()
        self._speed = 0.0
        self._latencies: dict[str, tuple[float, Percentiles | None, Percentiles | None]] = {}  # ingress -> when, TTFT, TPOT
        self._kept: deque[ScaleDecision] = deque(maxlen=KEPT)
        self._latest: ScaleDecision | None = None
        self._counts: Counter[str] = Counter()
        self._told: set[LifeName] = set()  # to be empty
        self._empty_since_s: dict[LifeName, float] = {}
        self._why_not = ""
        self._begun_s: float | None = None

    # --- what happens ---

    def restore(self) -> None:
        """Goes on where a controller before this one has stopped. Blocks."""
        found = self._memory.load()
        if found is not None:
            self._table.restore(found.staying, found.leaving, dict(found.versions))
            self._target, self._by_hand = found.target, found.by_hand
            self._model = ModelInfo(*found.model) if found.model else None

    def hand_over(self, options: QuireOptions, become: QuireOptions) -> None:
        """Saves the table for a controller that goes by other options. Blocks."""
        self._target, self._by_hand = number_after(options, become, self._target, self._by_hand)
        self._memory.save(self._to_remember())

    def came(self, request: AdmitRequest, now_s: float) -> None:
        """A request has come."""
        if request.attempt == 0 and not request.resumed:
            self._arrivals.came(request.prompt_tokens, now_s)

    def saw(self, ingress_id: str, ttft_s: Percentiles | None, tpot_s: Percentiles | None) -> None:
        """What an ingress has seen lately."""
        self._latencies[ingress_id] = (time.monotonic(), ttft_s, tpot_s)

    def latencies(self, now_s: float) -> tuple[Percentiles | None, Percentiles | None]:
        """TTFT and TPOT of the ingress that is slowest at each percentile."""
        self._latencies = {name: row for name, row in self._latencies.items() if now_s - row[0] < LATENCY_AGE_S}
        return _worst(ttft_s for _, ttft_s, _ in self._latencies.values()), _worst(tpot_s for _, _, tpot_s in self._latencies.values())

    # --- what operators ask ---

    def scale(self, replicas: int | None) -> None:
        """So many from now on; None: as the autoscaler says.

        Raises:
            NotNow: so many may not be, or there is no autoscaler.
        """
        if replicas is None:
            if self._autoscaler is None:
                raise NotNow("there is no autoscaler (--autoscaler)")
            self._by_hand = False
            return
        if not self._limits.min_replicas <= replicas <= self._limits.most:
            raise NotNow(f"{replicas} replicas: must be from {self._limits.min_replicas} to {self._limits.most}")
        before, self._target, self._by_hand = self._target, replicas, True
        ctx = self._context(time.monotonic())
        self._note(ScaleDecision(ctx.now_s, ctx.current_time, "", replicas, before, replicas, Why.OPERATOR, "", ctx.as_inputs()))

    def view(self) -> dict[str, Any]:
        """What `GET /admin/autoscaling` answers."""
        waits = {r.replica_id: r.reason for r in self._table.staying() if r.state is not ReplicaState.READY}
        return {
            "autoscaler": self._autoscaler.name if self._autoscaler else None,
            "by_hand": self._by_hand,
            "target": self._target,
            "ready": len(self._ready()),
            "not_ready": waits,
            "leaving": {r.replica_id: self._movers.books.drained(r.replica_id).moves for r in self._table.leaving()},
            "stays_because": self._why_not,
            "outdated": [r.replica_id for r in self._table.staying() if self._table.outdated(r)],
            "limits": {"min": self._limits.min_replicas, "max": self._limits.most, "gpu_budget": self._limits.gpu_budget},
            "latest": self._latest.as_json() if self._latest else None,
            "decisions": [decision.as_json() for decision in self._kept],
        }

    def figures(self) -> ScaleFigures:
        """What is exported."""
        latest = self._latest
        wanted = latest.wanted if latest else float(self._target)
        gpus = self._limits.gpus_per_replica
        return ScaleFigures(self._target, len(self._ready()), len(self._table.leaving()), wanted, self._target * gpus, dict(self._counts))

    def asleep(self) -> ModelInfo | None:
        """What would be served, while no replica is to be; None when one is, or it is not known."""
        return self._model if self._target == 0 else None

    # --- rounds ---

    async def run(self) -> None:
        """For ever."""
        decide_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s >= decide_s:
                decide_s = now_s + ROUND_S
                self._decide(now_s)
            await self._settle(now_s)
            await asyncio.sleep(QUICK_ROUND_S)

    def _decide(self, now_s: float) -> None:
        ctx = self._context(now_s)
        self._speed = ctx.speed
        if self._autoscaler is None or self._by_hand:
            return
        decision = self._autoscaler.decide(ctx)
        if decision.target < self._target and not self._knows(now_s):
            return
        self._target = decision.target
        self._note(decision)

    def _knows(self, now_s: float) -> bool:
        """Whether enough is known to do with fewer: what is served, and, when a controller has just begun anew, who runs what."""
        if self._begun_s is None:
            self._begun_s = now_s
        return self._model is not None and (self._table.settled() or now_s - self._begun_s > LOOK_AROUND_S)

    def _note(self, decision: ScaleDecision) -> None:
        """Counts it; keeps and logs it when it changes something, or is one that an operator may have to do something about."""
        before, self._latest = self._latest, decision
        self._counts[decision.why.value] += 1
        again = before is not None and (decision.why, decision.detail) == (before.why, before.detail)
        news = before is None or decision.target != decision.before or (decision.why in NOTABLE and not again)
        if news:
            self._kept.append(decision)
        log.log(logging.INFO if news else logging.DEBUG, "replicas: %s", json.dumps(decision.as_json()))

    async def _settle(self, now_s: float) -> None:
        """Brings the table to the target, and to one version, and those that leave to their end."""
        step = self._step(now_s)
        wanted = len(self._table.staying()) + step.come
        while len(self._table.staying()) < wanted:
            back = next((r for r in self._table.leaving() if r.state is ReplicaState.READY and not self._table.outdated(r)), None)
            if back is None:
                log.info("%s is to come", self._table.add(now_s))
            else:
                self._table.leave(back.replica_id, False)
        if step.go == 0:
            self._why_not = ""
        for _ in range(step.go):
            replica = self._victim(step) if self._knows(now_s) else None
            if replica is None:
                break
            self._why_not = ""
            log.info("%s is to go", replica.replica_id)
            if replica.state in (ReplicaState.STARTING, ReplicaState.DEAD):
                self._table.remove(replica.replica_id)
            else:
                self._table.leave(replica.replica_id)
        for replica in self._table.staying():
            if LifeName(replica.replica_id, replica.epoch) in self._told:
                await self._empty(replica.replica_id, False)
        await self._see_off(now_s)
        await asyncio.to_thread(self._memory.save, self._to_remember())

    async def _see_off(self, now_s: float) -> None:
        """Tells who leaves to be empty, and removes who is."""
        for replica in self._table.leaving():
            life = LifeName(replica.replica_id, replica.epoch)
            if replica.state is ReplicaState.DEAD or not replica.epoch:
                self._remove(life)
            elif replica.state is ReplicaState.STARTING:  # another controller has started it: it will say how it is
                continue
            elif life not in self._told:
                if await self._empty(replica.replica_id, True):
                    self._told.add(life)
            elif replica.shown == DRAINED and not self._on_its_way(replica.replica_id):
                if now_s - self._empty_since_s.setdefault(life, now_s) >= LINGER_S:
                    self._remove(life)
            else:
                self._empty_since_s.pop(life, None)

    def _step(self, now_s: float) -> Step:
        """How many come and go."""
        staying = self._table.staying()
        new = [r for r in staying if not self._table.outdated(r)]
        if len(new) == len(staying):
            return Step(max(self._target - len(new), 0), max(len(new) - self._target, 0), if_it_fits=True)
        ready = sum(r.state in (ReplicaState.READY, ReplicaState.SUSPECT) for r in new)
        waits = any(r.state is ReplicaState.STARTING and r.reason and now_s - r.since_s > PLACE_PATIENCE_S for r in new)
        budget, each = self._limits.gpu_budget, self._limits.gpus_per_replica
        most = None if budget is None else budget // each
        fleet = Fleet(self._target, most, ready, len(new) - ready, len(staying) - len(new), len(self._table.leaving()), waits)
        return next_step(fleet)

    def _victim(self, step: Step) -> Replica | None:
        """Who goes, of the outdated ones if there are any: what has not come yet, the latest first, else the cheapest to empty."""
        staying = self._table.staying()
        staying = [r for r in staying if self._table.outdated(r)] or staying
        absent = [r for r in staying if r.state in (ReplicaState.STARTING, ReplicaState.DEAD)]
        if absent:
            return absent[-1]
        leaving = {r.replica_id for r in self._table.leaving()}
        places = [p._replace(draining=p.draining or p.route.replica_id in leaving) for p in self._movers.places()]
        among = {r.replica_id for r in staying}
        place = cheapest_to_empty(places, among) or (idle(places) if self._target == 0 else None)
        if place is None and not step.if_it_fits:  # there are others instead; what does not fit there ends where it is
            place = least_held(places, among)
        self._why_not = "" if place else "what runs would not fit into the others"
        return self._table.replica(place.route.replica_id) if place else None

    async def _empty(self, replica_id: str, on: bool) -> bool:
        """Tells a replica that it is to be empty, or not. False when it could not be told."""
        try:
            await self._movers.drain(replica_id, not on, 0.0)
        except (ReplicaLost, NotNow, UnknownReplica) as error:
            log.warning("%s could not be told: %s", replica_id, error)
            return False
        if not on:
            self._told = {life for life in self._told if life.replica_id != replica_id}
        return True

    def _remove(self, life: LifeName) -> None:
        self._table.remove(life.replica_id)
        self._router.remove(*life)
        self._told.discard(life)
        self._empty_since_s.pop(life, None)
        moved = self._movers.books.drained(life.replica_id)
        self._movers.books.drain(life.replica_id, False)
        log.info("%s goes; %d requests have moved (%d pages)", life, moved.moves, moved.pages)

    # --- what there is ---

    def _ready(self) -> list[str]:
        return [r.replica_id for r in self._table.staying() if r.state is ReplicaState.READY and not r.draining]

    def _on_its_way(self, replica_id: str) -> bool:
        return any(shot.sent.sequences for shot in self._router.snapshots() if shot.replica_id == replica_id)

    def _context(self, now_s: float) -> AutoscalingContext:
        ready = set(self._ready())
        shots = [shot for shot in self._router.snapshots() if shot.replica_id in ready]
        self._model = shots[0].info if shots else self._model
        ttft_s, tpot_s = self.latencies(now_s)
        starts = [sum(r.report.phases.values()) for r in self._table.staying() if r.report and r.report.phases]
        return AutoscalingContext(
            now_s=now_s,
            current_time=time.time(),
            target_num_replicas=self._target,
            replicas=tuple(map(ReplicaFigures.of, shots)),
            unready_s=self._table.unready_s(now_s),
            queued_requests=len(self._scheduler.waiting()),
            queued_tokens=self._scheduler.queued_tokens(),
            arrivals=self._arrivals.figures(now_s),
            usual_prefill_tokens_per_s=self._speed,
            ttft_s=ttft_s.p99 if ttft_s else None,
            tpot_s=tpot_s.p99 if tpot_s else None,
            start_s=max(starts, default=0.0),
            page_size=self._engine.cache.page_size,
            batch_tokens=self._engine.scheduler.max_batch_tokens,
        )

    def _to_remember(self) -> Remembered:
        staying = tuple(r.replica_id for r in self._table.staying())
        leaving = tuple(r.replica_id for r in self._table.leaving())
        versions = tuple((r.replica_id, r.version) for r in self._table.replicas())
        return Remembered(self._target, staying, leaving, self._by_hand, tuple(self._model) if self._model else None, versions)


def _worst(seen: Iterable[Percentiles | None]) -> Percentiles | None:
    known = [percentiles for percentiles in seen if percentiles is not None]
    return Percentiles(*map(max, zip(*known, strict=True))) if known else None
