"""Which replicas there are, which of them are to be started, and who still wants them: the controller's table of lives.

Pure: no ray, no clock (times are passed in), no randomness. `cluster.ray_gateway` runs it inside an actor, feeds it what
the replicas report, and acts on what it says. It holds nothing that the replicas could not report again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import NamedTuple

from ..worker.protocol import EngineStats, ModelInfo, ReplicaLoad
from .backoff import Backoff

SUSPECT_S = 5.0  # of silence: it is marked
SILENCE_S = 30.0  # of silence: it is given up (a hung rank is found by the step watchdog of the replica itself)
START_ATTEMPTS = 3  # failed starts in a row after which a replica counts as one that cannot be started


DRAINING, DRAINED = "draining", "drained"
SHOWN_STATES = ("starting", "ready", "suspect", "dead", DRAINING, DRAINED)


class ReplicaState(StrEnum):
    """STARTING -> READY <-> SUSPECT -> DEAD, or straight to DEAD. The next life is STARTING again, with a new epoch."""

    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    DEAD = "dead"


class Report(NamedTuple):
    """What a replica says of itself (`worker.actor.ReplicaActor.report`)."""

    replica_id: str
    epoch: int
    pid: int
    node: str
    loaded: int
    to_load: int
    phases: dict[str, float]
    failure: str | None
    info: ModelInfo | None
    stats: EngineStats | None
    draining: bool = False


class Rank(NamedTuple):
    """The process of one tensor-parallel rank."""

    rank: int
    pid: int
    node: str


@dataclass(slots=True)
class Replica:
    """One replica, in its latest life."""

    replica_id: str
    epoch: int = 0  # before the first life
    state: ReplicaState = ReplicaState.STARTING
    reason: str = ""  # why it is dead, or what its start waits for
    report: Report | None = None
    load: ReplicaLoad | None = None  # as its latest event frame said
    ranks: dict[int, Rank] = field(default_factory=dict)
    since_s: float = 0.0  # of this state
    heard_s: float = 0.0  # its last word
    start_at_s: float | None = 0.0  # when its next life is due
    failed_starts: int = 0  # in a row
    version: str = ""  # of the options that its latest life was started with; empty when that is not known
    draining: bool = False  # it is wanted empty
    leaving: bool = False  # and is to go for good then
    missing_s: float | None = None  # since when it has not been there
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def shown(self) -> str:
        """Its state as operators see it: one that is ready may be `draining`, and `drained` when it holds no request any more."""
        if not self.draining or self.state is not ReplicaState.READY:
            return self.state.value
        return DRAINED if self.load is not None and self.load.running + self.load.waiting == 0 else DRAINING


class Controller:
    """The replica table.

    Args:
        replicas: how many there are to be at first, `replica-0` and so on.
        start_timeout_s: that a life may take to become ready.
        version: of the options that lives are started with.
    """

    def __init__(self, replicas: int, start_timeout_s: float, version: str = "") -> None:
        self._replicas = {name: Replica(name) for name in (f"replica-{i}" for i in range(replicas))}
        self._start_timeout_s = start_timeout_s
        self._version = version
        self._served = False  # some replica was ready once
        self._leases: dict[str, float] = {}  # holder -> when it ends

    # --- lives ---

    def due(self, now_s: float) -> list[str]:
        """The replicas whose next life is to be started now."""
        return [r.replica_id for r in self._replicas.values() if r.start_at_s is not None and r.start_at_s <= now_s and not r.leaving]

    def begin(self, replica_id: str, now_ms: int, now_s: float) -> int:
        """A new life of a replica starts; its epoch.

        Epochs grow from life to life, also across a controller that forgot them: they are milliseconds of wall time, or
        one more than the last.
        """
        replica = self._replicas[replica_id]
        self._new_life(replica, max(now_ms, replica.epoch + 1), now_s)
        replica.version = self._version
        return replica.epoch

    def adopt(self, replica_id: str, epoch: int, now_s: float) -> bool:
        """A life that another controller has started is found. False when it is none of ours, or a stale one: it must go."""
        replica = self._replicas.get(replica_id)
        if replica is None or epoch <= replica.epoch:
            return False
        self._new_life(replica, epoch, now_s)
        return True

    def reported(self, report: Report, now_s: float) -> bool:
        """Takes a replica's word; a stale one is ignored. True when the replica has just become ready."""
        replica = self._alive(report.replica_id, report.epoch)
        if replica is None:
            return False
        replica.report = report
        replica.ranks[0] = Rank(0, report.pid, report.node)
        self.heard(report.replica_id, report.epoch, now_s)
        if report.failure is not None:
            self.died(report.replica_id, report.epoch, report.failure, now_s, final=True)
        elif report.info is not None and replica.state is ReplicaState.STARTING:
            self._become(replica, ReplicaState.READY, now_s)
            replica.reason = ""
            replica.draining = report.draining  # as a controller before this one has told it
            self._served = True
            return True
        return False

    def rank_reported(self, replica_id: str, epoch: int, rank: Rank) -> None:
        """Who runs a rank of this life."""
        replica = self._alive(replica_id, epoch)
        if replica is not None:
            replica.ranks[rank.rank] = rank

    def heard(self, replica_id: str, epoch: int, now_s: float, load: ReplicaLoad | None = None) -> None:
        """The replica has answered."""
        replica = self._alive(replica_id, epoch)
        if replica is None:
            return
        replica.heard_s = now_s
        replica.load = load or replica.load
        if replica.state is ReplicaState.SUSPECT:
            self._become(replica, ReplicaState.READY, now_s)

    def waits(self, replica_id: str, epoch: int, what_for: str) -> None:
        """What the start of this life waits for; empty when for nothing."""
        replica = self._alive(replica_id, epoch)
        if replica is not None and replica.state is ReplicaState.STARTING:
            replica.reason = what_for

    def silent(self, now_s: float) -> None:
        """Marks who has been silent for long, and gives up who has been for too long, or has not become ready in time."""
        for r in self._replicas.values():
            quiet_s = now_s - r.heard_s
            if r.state is ReplicaState.STARTING and r.epoch and now_s - r.since_s > self._start_timeout_s:
                self.died(r.replica_id, r.epoch, f"was not ready within {self._start_timeout_s:g} s{_because(r.reason)}", now_s, final=True)
            elif r.state is ReplicaState.READY and quiet_s > SUSPECT_S:
                self._become(r, ReplicaState.SUSPECT, now_s)
            elif r.state is ReplicaState.SUSPECT and quiet_s > SILENCE_S:
                self.died(r.replica_id, r.epoch, f"did not answer for {quiet_s:.0f} s", now_s)

    def died(self, replica_id: str, epoch: int, reason: str, now_s: float, final: bool = False) -> bool:
        """A life has ended: the next one is due after the backoff. False when that was known; the first reason stays.

        Args:
            final: when it never became ready, and no replica ever did: another attempt would end alike.
        """
        replica = self._alive(replica_id, epoch)
        if replica is None:
            return False
        started = replica.state is not ReplicaState.STARTING
        replica.failed_starts = 0 if started else replica.failed_starts + (START_ATTEMPTS if final and not self._served else 1)
        replica.start_at_s = now_s + replica.backoff.delay_s(now_s - replica.since_s if started else 0.0)
        replica.reason = reason
        replica.load = None
        replica.draining = False
        replica.ranks.clear()
        self._become(replica, ReplicaState.DEAD, now_s)
        return True

    def drain(self, replica_id: str, on: bool) -> bool:
        """Whether its present life is to be empty. False when it is not ready."""
        replica = self._replicas.get(replica_id)
        if replica is None or replica.state not in (ReplicaState.READY, ReplicaState.SUSPECT):
            return False
        replica.draining = on
        return True

    def draining(self) -> list[str]:
        """The replicas that are to be empty."""
        return [r.replica_id for r in self._replicas.values() if r.draining]

    def hurry(self, replica_id: str, now_s: float) -> None:
        """The next life of a dead replica is due at once."""
        replica = self._replicas[replica_id]
        if replica.state is ReplicaState.DEAD:
            replica.start_at_s = now_s

    # --- how many there are to be ---

    def staying(self) -> list[Replica]:
        """All but those that are to go."""
        return [r for r in self._replicas.values() if not r.leaving]

    def leaving(self) -> list[Replica]:
        """Those that are to go as soon as they are empty."""
        return [r for r in self._replicas.values() if r.leaving]

    def add(self, now_s: float) -> str:
        """One more, which starts at once: under the lowest number that is free, and with an epoch above all that had it before."""
        name = next(name for name in map("replica-{}".format, count()) if name not in self._replicas)
        self._replicas[name] = Replica(name, start_at_s=now_s)
        self._replicas = dict(sorted(self._replicas.items(), key=lambda row: int(row[0].rpartition("-")[2])))
        return name

    def leave(self, replica_id: str, leaving: bool = True) -> None:
        """It is to go, or is to stay after all."""
        self._replicas[replica_id].leaving = leaving

    def remove(self, replica_id: str) -> None:
        """It is no longer one of ours; what is left of its life is to end."""
        self._replicas.pop(replica_id, None)

    def outdated(self, replica: Replica) -> bool:
        """Whether it runs with options that are no longer those of new lives."""
        return replica.version not in ("", self._version)

    def restore(self, replicas: Iterable[str], leaving: Iterable[str], versions: Mapping[str, str]) -> None:
        """The replicas that a controller before this one had, with their versions, none of them known yet."""
        going = set(leaving)
        self._replicas = {name: Replica(name, leaving=name in going, version=versions.get(name, "")) for name in (*replicas, *going)}

    def unready_s(self, now_s: float) -> float:
        """For how long the one of those that stay has been missing that has been for longest. To be asked now and then."""
        for r in self._replicas.values():
            there = r.state in (ReplicaState.READY, ReplicaState.SUSPECT)
            r.missing_s = None if there else now_s if r.missing_s is None else r.missing_s
        return max((now_s - r.missing_s for r in self.staying() if r.missing_s is not None), default=0.0)

    # --- what there is ---

    def replicas(self) -> list[Replica]:
        """The table, in the order of the replicas' numbers."""
        return list(self._replicas.values())

    def replica(self, replica_id: str) -> Replica | None:
        """One row of it."""
        return self._replicas.get(replica_id)

    def lives(self, replica_id: str, epoch: int) -> bool:
        """Whether this life goes on, as far as is known."""
        return self._alive(replica_id, epoch) is not None

    def serving(self) -> list[Replica]:
        """Those that take requests, and those that are suspected of not doing so: their streams may yet go on."""
        return [r for r in self._replicas.values() if r.state in (ReplicaState.READY, ReplicaState.SUSPECT)]

    def settled(self) -> bool:
        """Every replica has become ready, or has failed to."""
        return all(r.state is not ReplicaState.STARTING or r.failed_starts for r in self._replicas.values())

    def hopeless(self) -> str:
        """Why no replica can be started any more; empty while one runs, or is still worth an attempt."""
        if any(r.state in (ReplicaState.READY, ReplicaState.SUSPECT) or r.failed_starts < START_ATTEMPTS for r in self._replicas.values()):
            return ""
        return next((f"{r.replica_id}: {r.reason}" for r in self._replicas.values() if r.state is ReplicaState.DEAD), "")

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

    # --- inside ---

    def _alive(self, replica_id: str, epoch: int) -> Replica | None:
        replica = self._replicas.get(replica_id)
        ours = replica is not None and replica.epoch == epoch and replica.state is not ReplicaState.DEAD
        return replica if ours else None

    def _new_life(self, replica: Replica, epoch: int, now_s: float) -> None:
        replica.epoch = epoch
        replica.reason = ""
        replica.report = replica.load = None
        replica.draining = False
        replica.ranks.clear()
        replica.start_at_s = None
        self._become(replica, ReplicaState.STARTING, now_s)

    def _become(self, replica: Replica, state: ReplicaState, now_s: float) -> None:
        if ReplicaState.SUSPECT not in (state, replica.state) or state is ReplicaState.DEAD:  # a suspicion does not end health
            replica.since_s = now_s
        replica.state = state


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
