"""Every Ray call of the cluster: Ray itself, the controller's and the replicas' actors, and the ports of a client."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..worker.actor import CONCURRENCY_GROUPS, ReplicaActor, raise_reply
from ..worker.actor import start_actor_logging as start_actor_logging  # noqa: PLC0414 (the ingress's actor takes it from here)
from ..worker.config import QuireOptions
from ..worker.protocol import EngineStats, ModelInfo, ReplicaLost
from .controller import Controller, ReplicaState, Report, missing_resources
from .messages import Route
from .remote_client import RemoteEngineClient, Serving
from .stream import Owner

log = logging.getLogger(__name__)

_ray: Any = ray  # for its functions without annotations

CONTROLLER_NAME = "controller"
OBJECT_STORE_BYTES = 150 * 2**20  # nothing large goes through it
CALL_TIMEOUT_S = 5.0
CONTROLLER_TIMEOUT_S = 60.0  # to be placed and started
SUBMIT_TIMEOUT_S = 65.0  # above the replica's own
SILENCE_S = 600.0  # a replica sends twice a second between steps; no step may last longer
POLL_S = 0.25
LEASE_S = 30.0
UNREAD_ITEMS = 16  # frames that Ray may hold for an ingress; more wait, and are joined, in the replica's outbox


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A row of `Cluster.status`."""

    replica_id: str
    state: ReplicaState
    reason: str
    pid: int
    loaded: int
    to_load: int
    phases: dict[str, float]


# --- the controller's actor ---


class ControllerActor:
    """Feeds a `Controller` with what the replicas report, and starts and stops them.

    All state belongs to one event loop and every call is short, hence no concurrency groups. After a restart by Ray it
    finds the replicas by name and learns the rest from them.
    """

    def __init__(self, options: QuireOptions) -> None:
        start_actor_logging(options.server.log_level)
        self._options = options
        self._controller = Controller()
        self._hash_key = secrets.token_bytes(32)
        self._controller.renew("start", time.monotonic() + LEASE_S)
        self._handles: dict[str, Any] = {}
        self._started_s = time.monotonic()
        self._waits_for = ""
        self._looked = asyncio.Event()  # for replicas that a controller before this one has started
        self._task: asyncio.Task[None] | None = None

    async def options(self) -> QuireOptions:
        """What it was started with."""
        return self._options

    async def pid(self) -> int:
        """Its process."""
        return os.getpid()

    async def admit(self, sequences: int) -> tuple[str, int] | None:
        """A route, or None when no replica is ready."""
        await self._running()
        try:
            route = self._controller.admit(sequences)
        except ReplicaLost:
            return None
        return route.replica_id, route.epoch

    async def serving(self) -> list[tuple[str, int, tuple[Any, ...]]]:
        """(replica id, epoch, ModelInfo's fields) of every ready replica."""
        await self._running()
        ready = (r for r in self._controller.replicas() if r.state is ReplicaState.READY)
        return [(r.replica_id, r.epoch, tuple(r.report.info)) for r in ready if r.report and r.report.info]

    async def status(self, holder: str) -> list[dict[str, Any]]:
        """Fields of `ReplicaStatus` for every replica; renews the lease of `holder`."""
        await self._running()
        self._controller.renew(holder, time.monotonic() + LEASE_S)
        rows = []
        for r in self._controller.replicas():
            report = r.report
            rows.append(
                {
                    "replica_id": r.replica_id,
                    "state": r.state.value,
                    "reason": r.reason or self._waits_for,
                    "pid": report.pid if report else 0,
                    "loaded": report.loaded if report else 0,
                    "to_load": report.to_load if report else 0,
                    "phases": report.phases if report else {},
                }
            )
        return rows

    async def release(self, holder: str) -> bool:
        """`holder` leaves. True when it was the last one: the replicas are gone, and the controller may go."""
        self._controller.release("start")
        self._controller.release(holder)
        if self._controller.wanted(time.monotonic()):
            return False
        self._stop_replicas()
        return True

    async def _running(self) -> None:
        """Starts the loop on the first call; returns when the table tells what there is."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(_start_over)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await self._looked.wait()

    async def _run(self) -> None:
        if not await self._find("replica-0"):
            await self._start("replica-0")
        while self._controller.wanted(time.monotonic()):
            await asyncio.gather(*(self._poll(replica_id, handle) for replica_id, handle in list(self._handles.items())))
            await asyncio.sleep(POLL_S)
        log.warning("nobody has renewed a lease for %g s: stopping the replicas", LEASE_S)
        self._stop_replicas()
        _ray.actor.exit_actor()

    async def _find(self, replica_id: str) -> bool:
        """Whether the replica runs already; then it is adopted."""
        try:
            handle = _ray.get_actor(replica_id, self._options.cluster.namespace)
            self._controller.reported(_report(await _answer(handle.report.remote())))
            self._handles[replica_id] = handle
        except (ValueError, ReplicaLost):
            return False
        finally:
            self._looked.set()
        return True

    async def _start(self, replica_id: str) -> None:
        """A new life of a replica."""
        epoch = self._controller.begin(replica_id, time.time_ns() // 10**6)
        demand = _demand(self._options)
        try:
            self._remove_groups(replica_id)
            actor = remote_class(
                ReplicaActor,
                name=replica_id,
                namespace=self._options.cluster.namespace,
                lifetime="detached",
                num_cpus=demand["CPU"],
                num_gpus=demand.get("GPU", 0),
                max_restarts=0,  # a new life needs a new epoch, which only the controller gives
                concurrency_groups=CONCURRENCY_GROUPS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(await self._place(f"{replica_id}-{epoch}", demand), 0),
            )
            self._handles[replica_id] = actor.remote(replica_id, epoch, self._options.engine, self._hash_key, self._options.server.log_level)
        except (TimeoutError, RayError, ValueError) as error:
            self._controller.died(replica_id, epoch, f"could not be started: {_first_line(error)}")

    async def _place(self, name: str, demand: dict[str, float]) -> PlacementGroup:
        """A placement group that holds `demand`.

        Raises:
            TimeoutError: the cluster did not have it in time; says what is missing.
        """
        group: PlacementGroup = placement_group([demand], strategy="STRICT_PACK", name=self._group_name(name), lifetime="detached")
        deadline_s = time.monotonic() + self._options.cluster.start_timeout_s
        while not await asyncio.to_thread(group.wait, POLL_S):
            missing = missing_resources(demand, [node["Resources"] for node in _ray.nodes() if node["Alive"]])
            self._waits_for = f"waiting for {missing or 'resources that are taken: ' + str(demand)}"
            local = self._options.cluster.ray_address is None  # such a cluster does not grow
            if time.monotonic() > deadline_s or (local and missing):
                remove_placement_group(group)
                raise TimeoutError(f"the Ray cluster has no place for it: {missing or f'{demand} are taken by others'}")
        self._waits_for = ""
        return group

    async def _poll(self, replica_id: str, handle: Any) -> None:
        replica = next(r for r in self._controller.replicas() if r.replica_id == replica_id)
        if replica.state is ReplicaState.DEAD:
            return
        try:
            self._controller.reported(_report(await _value(handle.report.remote(), CALL_TIMEOUT_S)))
        except ActorDiedError as error:
            self._controller.died(replica_id, replica.epoch, f"the process has died ({_first_line(error)})")
        except (RayError, TimeoutError) as error:
            log.warning("%s does not report: %s", replica_id, _first_line(error))
        limit_s = self._options.cluster.start_timeout_s
        if replica.state is ReplicaState.STARTING and time.monotonic() - self._started_s > limit_s:
            self._controller.died(replica_id, replica.epoch, f"was not ready within {limit_s:g} s")

    def _stop_replicas(self) -> None:
        for replica_id, handle in self._handles.items():
            ray.kill(handle)
            self._remove_groups(replica_id)
        self._handles.clear()

    def _remove_groups(self, replica_id: str) -> None:
        """Placement groups of this replica, whichever life and whichever controller made them."""
        for group_id, row in ray.util.placement_group_table().items():
            if row["name"].startswith(self._group_name(f"{replica_id}-")) and row["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))

    def _group_name(self, of: str) -> str:
        return f"{self._options.cluster.namespace}-{of}"


# --- what the command line uses ---


class Cluster:
    """Ray, the controller and the lease on it, from the driver's side. Blocking calls, each with a time-out."""

    def __init__(self, options: QuireOptions) -> None:
        """Starts a local Ray, or joins the one at `ray_address`. From the main thread: Ray's processes die with the thread."""
        self._options = options
        self._holder = f"{os.uname().nodename}-{os.getpid()}"
        start_ray(options)
        actor = remote_class(
            ControllerActor,
            name=CONTROLLER_NAME,
            namespace=options.cluster.namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
        )
        self._controller = actor.remote(options)

    def check(self) -> None:
        """Waits for the controller.

        Raises:
            ValueError: a controller of this namespace was there already, and serves something else.
        """
        theirs: QuireOptions = ray.get(self._controller.options.remote(), timeout=CONTROLLER_TIMEOUT_S)
        if theirs.engine != self._options.engine:
            raise ValueError(f"namespace {self._options.cluster.namespace!r} of this Ray cluster already serves another configuration")

    def status(self) -> list[ReplicaStatus]:
        """The replicas, at last word. Renews this driver's lease.

        Raises:
            ReplicaLost: the controller does not answer.
        """
        try:
            rows: list[dict[str, Any]] = ray.get(self._controller.status.remote(self._holder), timeout=CALL_TIMEOUT_S)
        except RayError as error:
            raise ReplicaLost(f"the controller does not answer: {_first_line(error)}") from error
        return [ReplicaStatus(**{**row, "state": ReplicaState(row["state"])}) for row in rows]

    def close(self) -> None:
        """Takes away what this driver brought: replicas and controller if nobody else holds them, and a local Ray."""
        try:
            if ray.get(self._controller.release.remote(self._holder), timeout=CALL_TIMEOUT_S):
                ray.kill(self._controller)
        except RayError as error:
            log.warning("the controller could not be told to stop: %s", _first_line(error))
        ray.shutdown()


def start_ray(options: QuireOptions) -> None:
    """Makes this process a driver of a new local Ray, or of the cluster at `ray_address`.

    Local means local: a Ray that happens to run on this machine is left alone. Token authentication is Ray's default
    there; a cluster's own settings decide for a cluster.
    """
    if options.cluster.ray_address is not None:
        ray.init(address=options.cluster.ray_address, namespace=options.cluster.namespace, logging_level=logging.WARNING)
        return
    ray.init(
        address="local",
        namespace=options.cluster.namespace,
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )


# --- what an ingress uses ---


def connect(namespace: str) -> RemoteEngineClient:
    """The engine of a namespace, for the event loop that calls `start` on it.

    Raises:
        ValueError: there is no controller.
    """
    controller = ray.get_actor(CONTROLLER_NAME, namespace)

    def replica(owner: Owner) -> _Replica:
        return _Replica(ray.get_actor(owner.replica_id, namespace), owner.epoch)

    return RemoteEngineClient(_ControllerPort(controller), replica, time.monotonic)


class _ControllerPort:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def serving(self) -> list[Serving]:
        rows = await _answer(self._handle.serving.remote())
        return [Serving(replica_id, epoch, ModelInfo(*info)) for replica_id, epoch, info in rows]

    async def admit(self, sequences: int) -> Route:
        route = await _answer(self._handle.admit.remote(sequences))
        if route is None:
            raise ReplicaLost("no replica is ready")
        return Route(*route)


class _Replica:
    def __init__(self, handle: Any, epoch: int) -> None:
        self._handle = handle
        self._epoch = epoch

    async def frames(self, connection: str) -> AsyncIterator[list[bytes]]:
        stream: Any = self._handle.frames.options(num_returns="streaming", _generator_backpressure_num_objects=UNREAD_ITEMS).remote(
            connection
        )
        try:
            while True:
                try:
                    ref = await asyncio.wait_for(anext(stream), SILENCE_S)
                except StopAsyncIteration:
                    return
                yield await _answer(ref)
        except TimeoutError:
            raise ReplicaLost(f"no frame came for {SILENCE_S:g} s") from None
        finally:
            ray.cancel(stream)

    async def submit(self, connection: str, data: bytes) -> None:
        raise_reply(await _answer(self._handle.submit.remote(connection, self._epoch, data), SUBMIT_TIMEOUT_S))

    def abort(self, request_id: str, choice: int | None) -> None:
        self._handle.abort.remote(self._epoch, request_id, choice)

    def renew(self, connection: str) -> None:
        self._handle.renew.remote(connection)


# --- small things ---


def remote_class(cls: type, **options: Any) -> Any:
    """An undecorated class as an actor class with these options."""
    return _ray.remote(**options)(cls)


def _start_over(loop: asyncio.Task[None]) -> None:
    """Ends the controller's process when its loop has failed: Ray starts another, which learns all from the replicas."""
    if not loop.cancelled() and loop.exception() is not None:
        log.critical("the controller's loop has failed", exc_info=loop.exception())
        os._exit(1)


async def _value(ref: Any, timeout_s: float) -> Any:
    async with asyncio.timeout(timeout_s):
        return await ref


async def _answer(ref: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """The value of a call; ReplicaLost when it failed or took too long."""
    try:
        return await _value(ref, timeout_s)
    except TimeoutError:
        raise ReplicaLost(f"no answer within {timeout_s:g} s") from None
    except RayError as error:
        raise ReplicaLost(_first_line(error)) from error


def _report(raw: dict[str, Any]) -> Report:
    info, stats = raw["info"], raw["stats"]
    return Report(**{**raw, "info": ModelInfo(*info) if info else None, "stats": EngineStats(*stats) if stats else None})


def _demand(options: QuireOptions) -> dict[str, float]:
    """Resources of one replica."""
    gpus = _ray.cluster_resources().get("GPU", 0.0)
    wants_gpu = options.engine.model.device == "cuda" or (options.engine.model.device == "auto" and gpus > 0)
    return {"CPU": 1.0, "GPU": 1.0} if wants_gpu else {"CPU": 1.0}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
