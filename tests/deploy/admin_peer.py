"""A live admin API over a cluster that is made up, for the tests of the API and of the commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from quire.cluster.admin import (
    ClusterStatus,
    Figures,
    IngressStatus,
    PageCounts,
    RankStatus,
    ReplicaRow,
    RequestRow,
    UnknownReplica,
)
from quire.deploy.admin.server import RunningAdmin, start_admin
from quire.worker.config import AdminOptions
from quire.worker.protocol import ReplicaLost

STATUS = ClusterStatus(
    controller_pid=100,
    ingresses=(IngressStatus("ingress-0", 200),),
    replicas=(
        ReplicaRow(
            "replica-0",
            7,
            "ready",
            "tiny",
            (RankStatus(0, 300, "node-a"), RankStatus(1, 301, "node-a")),
            PageCounts(total=64, free=32, cached=16, active=16, host=0),
            running=2,
            waiting=1,
            prompt_tokens=500,
            output_tokens=1000,
        ),
        ReplicaRow("replica-1", 8, "starting", "", (), PageCounts(), 0, 0, reason="waiting for 1 GPU"),
    ),
    requests=(
        RequestRow("cmpl-1", "replica-0", "search", 12, 34, "running"),
        RequestRow("cmpl-2", None, "batch", 56, 0, "queued"),
    ),
    figures=Figures(3, 170, {"queue": 4, "rate": 5}, 6, {"search": 900, "batch": 100}, deaths=2, restarts=1),
)


@dataclass
class FakePort:
    """An `AdminPort` that remembers what it was told."""

    now: ClusterStatus = STATUS
    lost: bool = False
    calls: list[tuple[str, str]] = field(default_factory=list)

    async def status(self) -> ClusterStatus:
        if self.lost:
            raise ReplicaLost("the controller does not answer")
        return self.now

    async def page_maps(self) -> Mapping[str, bytes]:
        return {"replica-0": b"a" * 12 + b"s" * 4 + b"c" * 16 + b"f" * 32}

    async def restart(self, replica_id: str) -> None:
        if replica_id not in {replica.id for replica in self.now.replicas}:
            raise UnknownReplica(replica_id)
        self.calls.append(("restart", replica_id))

    async def set_log_level(self, level: str) -> None:
        self.calls.append(("log-level", level))


@contextmanager
def running_admin(token: str | None = None) -> Iterator[tuple[FakePort, RunningAdmin]]:
    """The API on a free port."""
    port = FakePort()
    running = start_admin(port, AdminOptions(admin_port=0, admin_token=token))
    try:
        yield port, running
    finally:
        running.stop()
