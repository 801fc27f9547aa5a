"""The cluster as its operators see it: what there is to know, and the little that they may do.

`cluster.ray_gateway` implements `AdminPort`; `deploy.admin` serves it over HTTP. Pure data, and how it is written as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..worker.protocol import QuireError


class UnknownReplica(QuireError):
    """There is no replica of that name."""


class UnknownRequest(QuireError):
    """No replica has a request of that id."""


class NotNow(QuireError):
    """It cannot be done as things stand; says why."""


class IngressStatus(NamedTuple):
    """One HTTP server process."""

    id: str
    pid: int


class RankStatus(NamedTuple):
    """One process of a replica; rank 0 leads it. `node` is Ray's id of the machine."""

    rank: int
    pid: int
    node: str


class PageCounts(NamedTuple):
    """Pages of one replica by what they hold; `host` are those in host memory."""

    total: int = 0
    free: int = 0
    cached: int = 0
    active: int = 0
    host: int = 0


class PageMaps(NamedTuple):
    """A byte for each page of a replica: f free, a active, s shared, c cached, r reserved for what is on its way, m on its way elsewhere.

    In host memory active pages are those of sequences that are swapped out, and m is whatever a move writes or reads there.
    """

    device: bytes
    host: bytes


class ReplicaRow(NamedTuple):
    """One replica. `state` is one of `cluster.controller.SHOWN_STATES`, `reason` why it is not ready, as far as that is known.

    `startup_s` is what each phase of its start has taken, by name. `model` is empty until the replica has said what it serves.
    `prompt_tokens` and `output_tokens` count from the start of this life of the replica; `epoch` names the life.
    """

    id: str
    epoch: int
    state: str
    model: str
    ranks: tuple[RankStatus, ...]
    pages: PageCounts
    running: int
    waiting: int
    prompt_tokens: int = 0
    output_tokens: int = 0
    reason: str = ""
    startup_s: tuple[tuple[str, float], ...] = ()


class RequestRow(NamedTuple):
    """One request that has not ended. `state` is `queued` (no replica yet), `waiting` or `running`."""

    id: str
    replica: str | None
    tenant: str
    prompt_tokens: int
    output_tokens: int
    state: str


class TenantRow(NamedTuple):
    """One tenant: its share, its requests that wait for a replica and those that have one, and the pages of the latter, counted from their
    tokens. `bounds` are (field, value) of `TenantLimits`, as far as they are set."""

    name: str
    weight: float
    waiting: int
    running: int
    pages: int
    bounds: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """What the controller counts. Counters start again when it does.

    Attributes:
        queue_requests, queue_tokens: requests that wait for a replica, and their prompt tokens.
        refused: (tenant, reason) -> requests refused.
        expired: requests whose deadline passed in the queue.
        served_tokens: tenant -> output tokens generated for it.
        deaths: replicas that died.
        restarts: replicas that were started again.
        migrations: (reason, outcome) -> migrations that the controller began and that have ended.
        migrations_under_way: those that have not.
        migrated_pages, migrated_bytes: that they sent.
        downtime_s: seconds that the requests which moved stood still for it, in all.
    """

    queue_requests: int = 0
    queue_tokens: int = 0
    refused: Mapping[tuple[str, str], int] = field(default_factory=dict)
    expired: int = 0
    served_tokens: Mapping[str, int] = field(default_factory=dict)
    deaths: int = 0
    restarts: int = 0
    migrations: Mapping[tuple[str, str], int] = field(default_factory=dict)
    migrations_under_way: int = 0
    migrated_pages: int = 0
    migrated_bytes: int = 0
    downtime_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScaleFigures:
    """The number of replicas.

    Attributes:
        target, ready, leaving: replicas that there are to be, those of them that are ready, and those that are being emptied to go.
        wanted: what the policy asked for last.
        gpus: that the target takes.
        decisions: why (`autoscaling_guard.Why`) -> decisions of the autoscaler, since the controller began.
    """

    target: int = 0
    ready: int = 0
    leaving: int = 0
    wanted: float = 0.0
    gpus: int = 0
    decisions: Mapping[str, int] = field(default_factory=dict)


class MoveRow(NamedTuple):
    """What came of one migration. `outcome` is `moved`, `refused`, `aborted` (it goes on at `source`) or `lost` (it is resumed from its
    journal); `cause` says why it was moved, `reason` why it was not.
    """

    request: str
    source: str
    destination: str
    cause: str
    outcome: str
    pages: int = 0
    bytes: int = 0
    downtime_ms: float = 0.0
    reason: str = ""


class Percentiles(NamedTuple):
    """Of a latency that was observed lately, in seconds."""

    p50: float
    p90: float
    p99: float


class Recent(NamedTuple):
    """What happens, and has happened lately.

    `moving` are migrations under way (their outcome is empty, and `pages` is what they will take), `moved` the last that have ended, oldest
    first, each with the seconds since then. `ttft_s` and `tpot_s` are of the HTTP server that is slowest at each percentile; None when
    nothing ended in its last half minute.
    """

    moving: tuple[MoveRow, ...] = ()
    moved: tuple[tuple[float, MoveRow], ...] = ()
    ttft_s: Percentiles | None = None
    tpot_s: Percentiles | None = None


class DrainStatus(NamedTuple):
    """How far a drain is: `state` as in `ReplicaRow`, requests that are left there, and what has moved since it began.

    `downtime_ms` is the longest that a request stood still.
    """

    replica: str
    state: str
    requests: int
    moved: int
    pages: int
    bytes: int
    downtime_ms: float


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All of it, at one moment."""

    controller_pid: int
    ingresses: tuple[IngressStatus, ...] = ()
    replicas: tuple[ReplicaRow, ...] = ()
    requests: tuple[RequestRow, ...] = ()
    tenants: tuple[TenantRow, ...] = ()
    figures: Figures = Figures()
    scale: ScaleFigures = ScaleFigures()

    def as_json(self) -> dict[str, Any]:
        """What `quire status --json` prints: a fixed schema, so other figures have other routes."""
        return {
            "controller": {"pid": self.controller_pid},
            "ingresses": [ingress._asdict() for ingress in self.ingresses],
            "replicas": [
                {
                    "id": replica.id,
                    "state": replica.state,
                    "model": replica.model,
                    "ranks": [rank._asdict() for rank in replica.ranks],
                    "pages": replica.pages._asdict(),
                    "running": replica.running,
                    "waiting": replica.waiting,
                }
                for replica in self.replicas
            ],
            "requests": [request._asdict() for request in self.requests],
        }


class AdminPort(Protocol):
    """The cluster behind the admin API. Each call has a time-out of its own.

    Every call raises ReplicaLost when the controller does not answer.
    """

    async def status(self) -> ClusterStatus:
        """How it stands."""
        ...

    async def page_maps(self) -> Mapping[str, PageMaps]:
        """Replica id -> the state of each of its pages. Only of ready replicas."""
        ...

    async def recent(self) -> Recent:
        """What moves, what has moved, and latencies."""
        ...

    async def decisions(self) -> Mapping[str, list[dict[str, Any]]]:
        """Replica id -> what it did lately when pages had run out, oldest first: step, request_id, choice, action, reason, pages,
        predicted_s, actual_s. Only of ready replicas."""
        ...

    async def restart(self, replica_id: str) -> None:
        """Ends this life of a replica and starts another; its streams go on elsewhere. Returns when that has begun.

        Raises:
            UnknownReplica: there is none of that id.
        """
        ...

    async def migrate(self, request_id: str, replica_id: str) -> MoveRow:
        """Moves a running request to a replica; returns when that is over.

        Raises:
            UnknownRequest, UnknownReplica: there is none of that id.
            NotNow: the request waits for a replica, moves already, or the replica is not ready.
        """
        ...

    async def drain(self, replica_id: str, undo: bool, wait_s: float) -> DrainStatus:
        """A replica takes nothing new, and what it has goes on elsewhere; with `undo` it takes requests again.

        Asking again is the same drain. Returns when the replica is empty, after `wait_s` at the latest.

        Raises:
            UnknownReplica: there is none of that id.
            NotNow: it is not ready.
        """
        ...

    async def rebalance(self) -> list[MoveRow]:
        """One round of all policies, now; returns when the moves are over."""
        ...

    async def scale(self, replicas: int | None) -> dict[str, Any]:
        """So many replicas from now on, until it is said again; None: as the autoscaler says. Returns what `autoscaling` returns.

        Raises:
            NotNow: so many may not be, or there is no autoscaler.
        """
        ...

    async def autoscaling(self) -> dict[str, Any]:
        """The number of replicas: autoscaler, by_hand, target, ready, not_ready (replica id -> why), leaving (replica id -> requests
        that have moved), stays_because (why too many are left), outdated (replicas that are to be replaced), limits, latest, and the last
        decisions with their inputs."""
        ...

    async def set_log_level(self, level: str) -> None:
        """`debug`, `info`, `warning` or `error`, in every process of the cluster."""
        ...
