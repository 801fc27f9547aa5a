"""What a command line uses of the cluster: Ray itself, the controller and a lease on it."""

from __future__ import annotations

import logging
import os
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from ...worker.config import QuireOptions
from ...worker.protocol import ReplicaLost
from ..autoscaling_setup import most_replicas
from ..controller import ReplicaState
from ..tenants import TenantLimits
from ..upgrading import shared
from .calls import CALL_TIMEOUT_S, CONTROLLER_NAME, first_line, ray_, remote_class
from .controller_actor import MAX_CONCURRENCY, ControllerActor

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 150 * 2**20  # nothing large goes through it
CONTROLLER_TIMEOUT_S = 60.0  # to be placed and started
RELEASE_TIMEOUT_S = 30.0  # to end all replicas
BECOME_POLL_S = 0.2
LOCAL_STARTS = 3  # of Ray, which gives its own node 30 s and then up: too few on a machine with too much to do
LOCAL_CPUS = 4  # at least; they are only Ray's bookkeeping
HASH_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """How one replica stands."""

    replica_id: str
    epoch: int
    state: ReplicaState
    reason: str
    loaded: int
    to_load: int
    phases: dict[str, float]


@dataclass(frozen=True, slots=True)
class ClusterView:
    """How the replicas stand.

    Attributes:
        replicas: each of them.
        settled: each is ready, or has failed to become so.
        hopeless: why none can be started; empty while there is hope.
    """

    replicas: tuple[ReplicaView, ...]
    settled: bool
    hopeless: str


class Lease:
    """The controller of a namespace, started if there is none, and somebody's lease on it. Blocking calls, each with a time-out.

    Args:
        options: of the model's cluster.
        tenants: who may use how much.
        holder: whose lease it is.
    """

    def __init__(self, options: QuireOptions, tenants: tuple[TenantLimits, ...], holder: str) -> None:
        self._options = options
        self._tenants = tenants
        self._holder = holder
        actor = remote_class(
            ControllerActor,
            name=CONTROLLER_NAME,
            namespace=options.cluster.namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=MAX_CONCURRENCY,
        )
        self._controller = actor.remote(options, tenants, secrets.token_bytes(HASH_KEY_BYTES))

    def check(self) -> None:
        """Waits for the controller.

        Raises:
            ValueError: a controller of this namespace was there already, and serves something else.
        """
        theirs: QuireOptions = ray.get(self._controller.options.remote(), timeout=CONTROLLER_TIMEOUT_S)
        if not same_service(theirs, self._options):
            raise ValueError(f"namespace {self._options.cluster.namespace!r} of this Ray cluster already serves another configuration")

    def become(self) -> None:
        """Makes the controller, if it was there already, go by these options; running streams go on. Returns when it does.

        Raises:
            ValueError: it serves what these options do not; says what changes.
            ReplicaLost: it did not take them over in time.
        """
        deadline_s = time.monotonic() + CONTROLLER_TIMEOUT_S
        while True:
            try:
                why = ray.get(self._controller.become.remote(self._options, self._tenants), timeout=CALL_TIMEOUT_S)
                if why:
                    raise ValueError(f"namespace {self._options.cluster.namespace!r} of this Ray cluster serves what this is not: {why}")
                theirs: QuireOptions = ray.get(self._controller.options.remote(), timeout=CALL_TIMEOUT_S)
                if shared(theirs) == shared(self._options):
                    return
                error = "it still goes by other options"
            except RayError as failed:  # it starts, or starts again
                error = first_line(failed)
            if time.monotonic() > deadline_s:
                raise ReplicaLost(f"the controller does not take the options over: {error}")
            time.sleep(BECOME_POLL_S)

    def view(self) -> ClusterView:
        """The replicas, at last word. Renews the lease.

        Raises:
            ReplicaLost: the controller does not answer.
        """
        try:
            raw: dict[str, Any] = ray.get(self._controller.view.remote(self._holder), timeout=CALL_TIMEOUT_S)
        except RayError as error:
            raise ReplicaLost(f"the controller does not answer: {first_line(error)}") from error
        rows = tuple(ReplicaView(id_, epoch, ReplicaState(state), *rest) for id_, epoch, state, *rest in raw["replicas"])
        return ClusterView(rows, raw["settled"], raw["hopeless"])

    def release(self) -> None:
        """Ends the lease, and takes away replicas and controller if nobody else holds one."""
        try:
            if ray.get(self._controller.release.remote(self._holder), timeout=RELEASE_TIMEOUT_S):
                ray.kill(self._controller)
        except RayError as error:
            log.warning("the controller could not be told to stop: %s", first_line(error))


class Cluster:
    """Ray and a lease on the controller, from the driver's side. Blocking calls, each with a time-out."""

    def __init__(self, options: QuireOptions, tenants: tuple[TenantLimits, ...] = ()) -> None:
        """Starts a local Ray, or joins the one at `ray_address`. From the main thread: Ray's processes die with the thread."""
        options = with_threads(options, len(os.sched_getaffinity(0)))
        start_ray(options)
        self.lease = Lease(options, tenants, f"{os.uname().nodename}-{os.getpid()}")

    def close(self) -> None:
        """Takes away what this driver brought: replicas and controller if nobody else holds them, and a local Ray."""
        self.lease.release()
        ray.shutdown()


def serves(namespace: str) -> QuireOptions | None:
    """The options of the controller in a namespace; None when there is none. Waits for one that starts again.

    Raises:
        ReplicaLost: it does not answer.
    """
    deadline_s = time.monotonic() + CONTROLLER_TIMEOUT_S
    while True:
        try:
            controller = ray.get_actor(CONTROLLER_NAME, namespace)
            theirs: Any = ray.get(controller.options.remote(), timeout=CONTROLLER_TIMEOUT_S)
        except ValueError:
            return None
        except RayError as error:
            if time.monotonic() > deadline_s:
                raise ReplicaLost(f"the controller of {namespace} does not answer: {first_line(error)}") from error
            time.sleep(BECOME_POLL_S)
        else:
            return theirs if isinstance(theirs, QuireOptions) else None


def namespaces() -> list[str]:
    """Where there is a controller on this Ray cluster."""
    return sorted(row["namespace"] for row in ray_.util.list_named_actors(all_namespaces=True) if row["name"] == CONTROLLER_NAME)


def same_service(one: QuireOptions, other: QuireOptions) -> bool:
    """Whether two command lines may share a controller. They may differ in how they reach Ray, and in what is each ingress's own."""
    return _served(one) == _served(other)


def _served(options: QuireOptions) -> QuireOptions:
    model = replace(options.engine.model, threads=None)
    return shared(replace(options, engine=replace(options.engine, model=model)))


def with_threads(options: QuireOptions, cores: int) -> QuireOptions:
    """The ranks of a local Ray share the cores of this machine: more threads than cores would slow each other down many times."""
    model = options.engine.model
    if options.cluster.ray_address is not None or model.threads is not None:
        return options
    ranks = most_replicas(options) * options.engine.parallel.tp
    shared = replace(model, threads=max(1, cores // ranks))
    return replace(options, engine=replace(options.engine, model=shared)) if ranks > 1 else options


def join(options: QuireOptions) -> None:
    """Makes this process a driver of the cluster at `ray_address`, and no more than that. A process of that cluster is left as it is.

    Raises:
        ConnectionError: there is none.
    """
    if not ray.is_initialized():
        ray.init(address=options.cluster.ray_address, namespace=options.cluster.namespace, logging_level=logging.WARNING)


def start_ray(options: QuireOptions) -> None:
    """Makes this process a driver of a new local Ray, or of the cluster at `ray_address`.

    Local means local: a Ray that happens to run on this machine is left alone. Token authentication is Ray's default
    there; a cluster's own settings decide for a cluster.
    """
    if options.cluster.ray_address is not None:
        join(options)
        return
    for left in reversed(range(LOCAL_STARTS)):
        try:
            ray.init(
                address="local",
                namespace=options.cluster.namespace,
                num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1, most_replicas(options) * options.engine.parallel.tp),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start in the time that it gives itself; it is started again")
