"""A live admin API over a cluster that is made up, for the tests of the API and of the commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quire.cluster.admin import (
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
            startup_s=(("import torch", 1.5), ("load model", 8.0)),
        ),
        ReplicaRow("replica-1", 8, "starting", "", (), PageCounts(), 0, 0, reason="waiting for 1 GPU"),
    ),
    requests=(
        RequestRow("cmpl-1", "replica-0", "search", 12, 34, "running"),
        RequestRow("cmpl-2", None, "batch", 56, 0, "queued"),
    ),
    tenants=(
        TenantRow("batch", 1.0, 1, 0, 0),
        TenantRow(
            "search",
            2.0,
            0,
            1,
            4,
            (("requests_per_s", 10.0), ("tokens_per_min", 6000.0), ("max_concurrent", 8), ("max_pages", 512)),
        ),
    ),
    figures=Figures(
        3,
        170,
        {("search", "overloaded"): 4, ("batch", "rate"): 5},
        6,
        {"search": 900, "batch": 100},
        deaths=2,
        restarts=1,
        migrations={("drain", "moved"): 5, ("rebalance", "refused"): 2},
        migrations_under_way=1,
        migrated_pages=40,
        migrated_bytes=4096,
        downtime_s=0.25,
    ),
    scale=ScaleFigures(3, 1, 1, 3.5, 6, {"policy": 4, "down_cooldown": 7}),
)
MOVED = MoveRow("cmpl-1", "replica-0", "replica-1", "operator", "moved", 3, 300, 12.5)


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

    async def page_maps(self) -> Mapping[str, PageMaps]:
        return {"replica-0": PageMaps(b"a" * 12 + b"s" * 4 + b"c" * 16 + b"f" * 32, b"aacf")}

    async def recent(self) -> Recent:
        moving = MoveRow("cmpl-3", "replica-0", "replica-1", "drain", "", 5)
        return Recent((moving,), ((9.0, MOVED), (2.0, MOVED._replace(cause="drain"))), Percentiles(0.05, 0.1, 0.25), None)

    async def decisions(self) -> Mapping[str, list[dict[str, Any]]]:
        return {"replica-0": [{"step": 9, "action": "swap", "reason": "cheapest", "predicted_s": 0.5, "actual_s": 0.25}]}

    async def restart(self, replica_id: str) -> None:
        if replica_id not in {replica.id for replica in self.now.replicas}:
            raise UnknownReplica(replica_id)
        self.calls.append(("restart", replica_id))

    async def migrate(self, request_id: str, replica_id: str) -> MoveRow:
        if request_id == "cmpl-2":
            raise NotNow("cmpl-2 waits for a replica")
        if request_id != "cmpl-1":
            raise UnknownRequest(request_id)
        if replica_id not in {replica.id for replica in self.now.replicas}:
            raise UnknownReplica(replica_id)
        self.calls.append(("migrate", f"{request_id} {replica_id}"))
        stays = MOVED._replace(destination="replica-0", outcome="refused", pages=0, bytes=0, downtime_ms=0.0, reason="no seat")
        return MOVED if replica_id == "replica-1" else stays

    async def drain(self, replica_id: str, undo: bool, wait_s: float) -> DrainStatus:
        if replica_id not in {replica.id for replica in self.now.replicas}:
            raise UnknownReplica(replica_id)
        if replica_id == "replica-1":
            raise NotNow("replica-1 is starting")
        self.calls.append(("drain", f"{replica_id} {undo} {wait_s:g}"))
        asked = sum(call[0] == "drain" for call in self.calls)
        state = "ready" if undo else "drained" if asked > 1 else "draining"
        return DrainStatus(replica_id, state, 0 if asked > 1 else 2, 5, 40, 4096, 12.5)

    async def rebalance(self) -> list[MoveRow]:
        self.calls.append(("rebalance", ""))
        return [MOVED._replace(cause="rebalance")]

    async def scale(self, replicas: int | None) -> dict[str, Any]:
        if replicas is not None and replicas > 8:
            raise NotNow(f"{replicas} replicas: must be from 1 to 8")
        self.calls.append(("scale", str(replicas)))
        return {**await self.autoscaling(), "by_hand": replicas is not None, "target": 3 if replicas is None else replicas}

    async def autoscaling(self) -> dict[str, Any]:
        return {"autoscaler": "slo", "by_hand": False, "target": 3, "ready": 1, "decisions": [{"target": 3, "why": "policy"}]}

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
