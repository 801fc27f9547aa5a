"""Follows one life of a replica, from its start to its death: its reports, its events (`cluster.polling`), its ranks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorDiedError, RayError

from ...worker.protocol import EngineStats, EventFrame, ModelInfo, ReplicaLost, unpack_events
from ..controller import Controller, Rank, Report
from ..polling import EVENT_WAIT_S, pause_s
from ..routing import Router
from .calls import CALL_TIMEOUT_S, first_line, value
from .lives import Life

log = logging.getLogger(__name__)

START_POLL_S = 0.25
RANK_POLL_S = 0.5


class Watch:
    """Feeds the table with what replicas say, and the router with who takes requests.

    Args:
        events: takes each event frame.
    """

    def __init__(self, table: Controller, router: Router, events: Callable[[EventFrame], None]) -> None:
        self._table = table
        self._router = router
        self._take = events

    async def follow(self, life: Life) -> None:
        """Returns never.

        Raises:
            ReplicaLost: the life has ended; says why.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_leader(life))
                for rank, actor in life.ranks.items():
                    group.create_task(self._follow_rank(life, rank, actor))
        except ExceptionGroup as errors:
            first = next(e for e in errors.exceptions)
            if not isinstance(first, ReplicaLost):
                raise
            raise ReplicaLost(str(first)) from None

    async def _follow_leader(self, life: Life) -> None:
        while not await self._report(life):  # noqa: ASYNC110 (the replica has no other way to say it)
            await asyncio.sleep(START_POLL_S)
        while True:
            self._take_requests(life)
            try:
                frame = unpack_events(await self._events(life))
            except RayError as error:
                log.warning("%s: %s", life.name, first_line(error))
                await self._report(life)  # which raises, in the replica's own words when it has some
                await asyncio.sleep(START_POLL_S)
                continue
            self._table.heard(*life.name, time.monotonic(), frame.load)
            self._take(frame)
            await asyncio.sleep(pause_s(len(self._table.replicas())))

    def _take_requests(self, life: Life) -> None:
        replica = self._table.replica(life.name.replica_id)
        if replica is not None and replica.epoch == life.name.epoch and replica.report is not None and replica.report.info is not None:
            self._router.add(*life.name, replica.report.info)

    async def _events(self, life: Life) -> bytes:
        """The next event frame. It comes between two steps, so a replica that keeps us waiting is asked how it is meanwhile."""
        call = asyncio.ensure_future(_awaited(life.leader.events.remote(self._router.resync_point(*life.name), EVENT_WAIT_S)))
        try:
            while not (await asyncio.wait([call], timeout=EVENT_WAIT_S + CALL_TIMEOUT_S))[0]:
                await self._report(life)
            frame: bytes = await call
            return frame
        finally:
            call.cancel()

    async def _report(self, life: Life) -> bool:
        """One report. True when the life is ready, whoever was the first to hear it.

        Raises:
            ReplicaLost: the life has ended.
        """
        try:
            report = report_of(await value(life.leader.report.remote(), CALL_TIMEOUT_S))
        except ActorDiedError as error:
            raise ReplicaLost(f"the process has died ({first_line(error)})") from error
        except (RayError, TimeoutError) as error:
            log.warning("%s does not report: %s", life.name, first_line(error))
            self._router.remove(*life.name)  # takes nothing new until it does; what runs there goes on, for as long as the table waits
            return False
        self._table.reported(report, time.monotonic())
        if report.failure is not None:
            raise ReplicaLost(report.failure)
        return report.info is not None

    async def _follow_rank(self, life: Life, rank: int, actor: Any) -> None:
        while True:
            try:
                report = await value(actor.report.remote(), CALL_TIMEOUT_S)
            except TimeoutError:
                log.warning("%s does not answer", life.name.rank(rank))  # if it hangs, the leader's watchdog finds out
            except ActorDiedError as error:
                raise ReplicaLost(f"the process of rank {rank} has died ({first_line(error)})") from error
            except RayError as error:
                log.warning("%s: %s", life.name.rank(rank), first_line(error))
            else:
                self._table.rank_reported(life.name.replica_id, life.name.epoch, Rank(rank, report["pid"], report["node"]))
                if report["failure"] is not None:
                    why = f"rank {rank}: {report['failure']}"
                    self._table.died(*life.name, why, time.monotonic(), final=True)
                    raise ReplicaLost(why)
            await asyncio.sleep(RANK_POLL_S)


async def _awaited(ref: Any) -> Any:
    return await ref


def report_of(raw: dict[str, Any]) -> Report:
    """What `ReplicaActor.report` returns, as the table takes it."""
    info, stats = raw["info"], raw["stats"]
    known = {name: raw[name] for name in Report._fields}
    return Report(**{**known, "info": ModelInfo(*info) if info else None, "stats": EngineStats(*stats) if stats else None})
