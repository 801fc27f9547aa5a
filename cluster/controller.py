"""Which replicas there are, which of them takes a request, and who still wants them: the controller's decisions.

Pure: no ray, no clock (times are passed in), no randomness. `cluster.ray_gateway` runs it inside an actor, feeds it what
the replicas report, and acts on what it says. It holds nothing that the replicas could not report again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ..worker.protocol import EngineStats, ModelInfo, ReplicaLost
from .messages import Route


class ReplicaState(StrEnum):
    """STARTING -> READY -> DEAD, or straight to DEAD. A new life has a new epoch."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class Report(NamedTuple):
    """What a replica says of itself (`worker.actor.ReplicaActor.report`)."""

    replica_id: str
    epoch: int
    pid: int
    loaded: int
    to_load: int
    phases: dict[str, float]
    failure: str | None
    info: ModelInfo | None
    stats: EngineStats | None


@dataclass(slots=True)
class Replica:
    """One life of one replica, as the controller knows it."""

    replica_id: str
    epoch: int
    state: ReplicaState = ReplicaState.STARTING
    reason: str = ""  # why it is dead
    report: Report | None = None
    sent: int = 0  # sequences routed to it that no report counts yet


class Controller:
    """The replica table."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._leases: dict[str, float] = {}  # holder -> when it ends

    # --- replicas ---

    def begin(self, replica_id: str, now_ms: int) -> int:
        """A new life of a replica starts; its epoch.

        Epochs grow from life to life, also across a controller that forgot them: they are milliseconds of wall time, or
        one more than the last.
        """
        before = self._replicas.get(replica_id)
        epoch = max(now_ms, before.epoch + 1 if before else 0)
        self._replicas[replica_id] = Replica(replica_id, epoch)
        return epoch

    def reported(self, report: Report) -> None:
        """Takes a replica's word. An unknown replica, or a later life of a known one, is adopted; a stale one is ignored."""
        replica = self._replicas.get(report.replica_id)
        if replica is None or report.epoch > replica.epoch:
            replica = self._replicas[report.replica_id] = Replica(report.replica_id, report.epoch)
        if report.epoch < replica.epoch or replica.state is ReplicaState.DEAD:
            return
        replica.report = report
        replica.sent = 0
        if report.failure is not None:
            self.died(report.replica_id, report.epoch, report.failure)
        elif report.info is not None:
            replica.state = ReplicaState.READY

    def died(self, replica_id: str, epoch: int, reason: str) -> None:
        """A life has ended. The first reason stays."""
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.epoch == epoch and replica.state is not ReplicaState.DEAD:
            replica.state = ReplicaState.DEAD
            replica.reason = reason

    def replicas(self) -> list[Replica]:
        """The table, in the order of first appearance."""
        return list(self._replicas.values())

    # --- requests ---

    def admit(self, sequences: int) -> Route:
        """Routes a request of so many sequences to the replica with the fewest of them running, waiting or under way.

        Raises:
            ReplicaLost: no replica is ready.
        """
        ready = [r for r in self._replicas.values() if r.state is ReplicaState.READY]
        if not ready:
            raise ReplicaLost("no replica is ready")
        chosen = min(ready, key=_load)
        chosen.sent += sequences
        return Route(chosen.replica_id, chosen.epoch)

    # --- leases ---

    def renew(self, holder: str, until_s: float) -> None:
        """`holder` wants the cluster until then, unless it renews again."""
        self._leases[holder] = until_s

    def release(self, holder: str) -> None:
        """`holder` wants it no longer."""
        self._leases.pop(holder, None)

    def wanted(self, now_s: float) -> bool:
        """Whether anybody holds a lease; when not, the replicas are to go. Expired leases are forgotten."""
        self._leases = {holder: until_s for holder, until_s in self._leases.items() if until_s > now_s}
        return bool(self._leases)


def missing_resources(demand: dict[str, float], nodes: list[dict[str, float]]) -> str:
    """Which resource keeps `demand` from fitting on one of `nodes` (what each has in all), in words.

    Empty when one of the nodes is large enough: then the resource is there, but taken.
    """
    if any(all(node.get(name, 0.0) >= amount for name, amount in demand.items()) for node in nodes):
        return ""
    lacks = [
        f"{amount:g} {name} (the largest node has {max((node.get(name, 0.0) for node in nodes), default=0.0):g})"
        for name, amount in demand.items()
        if all(node.get(name, 0.0) < amount for node in nodes)
    ]
    return ", ".join(lacks) or "one node with " + ", ".join(f"{amount:g} {name}" for name, amount in demand.items())


def _load(replica: Replica) -> int:
    stats = replica.report.stats if replica.report else None
    return replica.sent + (stats.running + stats.waiting if stats else 0)
