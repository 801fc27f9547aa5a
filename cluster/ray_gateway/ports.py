"""What an ingress and the admin API call: the controller and the replicas behind the ports that pure code is written against."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import ray

from ...worker.actor import raise_reply
from ...worker.config import QuireOptions
from ...worker.protocol import ModelInfo, ReplicaLost
from ..admin import (
    ClusterStatus,
    DrainStatus,
    Figures,
    IngressStatus,
    MoveRow,
    NotNow,
    PageCounts,
    PageMaps,
    Percentiles,
    RankStatus,
    Recent,
    ReplicaRow,
    RequestRow,
    ScaleFigures,
    TenantRow,
    UnknownReplica,
    UnknownRequest,
)
from ..admissions import ADMIT_POLL_S
from ..messages import AdmitRequest, Route
from ..remote_client import IngressOptions, RemoteEngineClient, Serving, ServingNow
from ..succession import Owner
from .calls import CALL_TIMEOUT_S, CONTROLLER_NAME, LifeName, answer

SUBMIT_TIMEOUT_S = 65.0  # above the replica's own
MOVES_TIMEOUT_S = 60.0  # for migrations to end; they go on when nobody waits for them
SILENCE_S = 600.0  # a replica sends twice a second between steps; no step may last longer
UNREAD_ITEMS = 16  # frames that Ray may hold for an ingress; more wait, and are joined, in the replica's outbox


def connect(options: QuireOptions, ingress_id: str) -> RemoteEngineClient:
    """The engine of a namespace as an ingress sees it, for the event loop that calls `start` on it.

    Raises:
        ValueError: there is no controller.
    """
    namespace, engine = options.cluster.namespace, options.engine
    ingress = IngressOptions(ingress_id, engine.model.seed, engine.limits, engine.cache.prefix_cache)

    def replica(owner: Owner) -> _ReplicaPort:
        try:
            return _ReplicaPort(ray.get_actor(str(LifeName(owner.replica_id, owner.epoch)), namespace), owner.epoch)
        except ValueError:
            raise ReplicaLost(f"{owner.replica_id} is gone") from None

    return RemoteEngineClient(_ControllerPort(_controller(namespace)), replica, time.monotonic, ingress)


class Registration:
    """An ingress, as the controller knows it."""

    def __init__(self, namespace: str, ingress_id: str, pid: int) -> None:
        """Raises ValueError when there is no controller."""
        self._handle = _controller(namespace)
        self._who = (ingress_id, pid)

    async def renew(self, ttft_s: Percentiles | None = None, tpot_s: Percentiles | None = None) -> str:
        """The ingress is alive, and has seen such latencies lately. Returns how much it is to log.

        Raises:
            ReplicaLost: the controller does not answer.
        """
        level: str = await answer(self._handle.register.remote(*self._who, *(tuple(seen) if seen else None for seen in (ttft_s, tpot_s))))
        return level


class AdminPort:
    """`cluster.admin.AdminPort` of a namespace."""

    def __init__(self, namespace: str) -> None:
        """Raises ValueError when there is no controller."""
        self._handle = _controller(namespace)

    async def status(self) -> ClusterStatus:
        """As the protocol says; so below."""
        raw = await answer(self._handle.status.remote())
        return ClusterStatus(
            raw["controller_pid"],
            tuple(IngressStatus(*row) for row in raw["ingresses"]),
            tuple(_replica_row(*row) for row in raw["replicas"]),
            tuple(RequestRow(*row) for row in raw["requests"]),
            tuple(TenantRow(*row) for row in raw["tenants"]),
            Figures(**raw["figures"]),
            ScaleFigures(**raw["scale"]),
        )

    async def page_maps(self) -> dict[str, PageMaps]:
        """Replica id -> a byte for each page."""
        return {replica_id: PageMaps(*maps) for replica_id, maps in (await answer(self._handle.page_maps.remote())).items()}

    async def recent(self) -> Recent:
        """What moves, what has moved, and latencies."""
        moving, moved, ttft_s, tpot_s = await answer(self._handle.recent.remote())
        return Recent(
            tuple(MoveRow(*row) for row in moving),
            tuple((ago_s, MoveRow(*row)) for ago_s, row in moved),
            Percentiles(*ttft_s) if ttft_s else None,
            Percentiles(*tpot_s) if tpot_s else None,
        )

    async def decisions(self) -> dict[str, list[dict[str, Any]]]:
        """Replica id -> what it did lately when pages had run out."""
        rows: dict[str, list[dict[str, Any]]] = await answer(self._handle.decisions.remote())
        return rows

    async def restart(self, replica_id: str) -> None:
        """Ends this life of a replica and starts another."""
        if not await answer(self._handle.restart.remote(replica_id)):
            raise UnknownReplica(replica_id)

    async def migrate(self, request_id: str, replica_id: str) -> MoveRow:
        """Moves a running request to a replica."""
        return MoveRow(*_told(await answer(self._handle.migrate.remote(request_id, replica_id), MOVES_TIMEOUT_S)))

    async def drain(self, replica_id: str, undo: bool, wait_s: float) -> DrainStatus:
        """A replica is to be empty, or is to take requests again."""
        return DrainStatus(*_told(await answer(self._handle.drain.remote(replica_id, undo, wait_s), wait_s + CALL_TIMEOUT_S)))

    async def rebalance(self) -> list[MoveRow]:
        """One round of all policies."""
        return [MoveRow(*row) for row in await answer(self._handle.rebalance.remote(), MOVES_TIMEOUT_S)]

    async def scale(self, replicas: int | None) -> dict[str, Any]:
        """So many replicas from now on."""
        view: dict[str, Any] = _told(await answer(self._handle.scale.remote(replicas)))
        return view

    async def autoscaling(self) -> dict[str, Any]:
        """How the number of replicas stands, and the last decisions."""
        view: dict[str, Any] = await answer(self._handle.autoscaling.remote())
        return view

    async def set_log_level(self, level: str) -> None:
        """In every process of the cluster."""
        await answer(self._handle.set_log_level.remote(level))


class _ControllerPort:
    """`cluster.remote_client.ControllerPort`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def serving(self) -> ServingNow:
        key, rows, asleep = await answer(self._handle.serving.remote())
        serving = [Serving(replica_id, epoch, ModelInfo(*info)) for replica_id, epoch, info in rows]
        return ServingNow(key, serving, ModelInfo(*asleep) if asleep else None)

    async def admit(self, request: AdmitRequest) -> Route | None:
        reply = await answer(self._handle.admit.remote(tuple(request)), ADMIT_POLL_S + CALL_TIMEOUT_S)
        match reply:
            case ("queued",):
                return None
            case ("route", str(replica_id), int(epoch)):
                return Route(replica_id, epoch)
        raise_reply(reply)
        raise ReplicaLost(f"the controller said {reply!r}")

    def withdraw(self, request_id: str) -> None:
        self._handle.withdraw.remote(request_id)


class _ReplicaPort:
    """`cluster.remote_client.ReplicaPort`."""

    def __init__(self, handle: Any, epoch: int) -> None:
        self._handle = handle
        self._epoch = epoch

    async def frames(self, connection: str) -> AsyncGenerator[list[bytes], None]:
        stream: Any = self._handle.frames.options(num_returns="streaming", _generator_backpressure_num_objects=UNREAD_ITEMS).remote(
            connection
        )
        try:
            while True:
                try:
                    ref = await asyncio.wait_for(anext(stream), SILENCE_S)
                except StopAsyncIteration:
                    return
                yield await answer(ref)
        except TimeoutError:
            raise ReplicaLost(f"no frame came for {SILENCE_S:g} s") from None
        finally:
            ray.cancel(stream)

    async def submit(self, connection: str, data: bytes) -> None:
        raise_reply(await answer(self._handle.submit.remote(connection, self._epoch, data), SUBMIT_TIMEOUT_S))

    def abort(self, request_id: str, attempt: int, choice: int | None) -> None:
        self._handle.abort.remote(self._epoch, request_id, choice, attempt)

    def renew(self, connection: str) -> None:
        self._handle.renew.remote(connection)


def _controller(namespace: str) -> Any:
    return ray.get_actor(CONTROLLER_NAME, namespace)


def _told(said: tuple[str, Any]) -> Any:
    """What `ControllerActor` answers, or the error that it tells of."""
    kind, what = said
    if kind == "ok":
        return what
    raise {"UnknownReplica": UnknownReplica, "UnknownRequest": UnknownRequest, "NotNow": NotNow}.get(kind, ReplicaLost)(what)


def _replica_row(*fields: Any) -> ReplicaRow:
    row = ReplicaRow(*fields)
    return row._replace(ranks=tuple(RankStatus(*rank) for rank in row.ranks), pages=PageCounts(*row.pages))
