"""The gateway on a real Ray: a controller, leaders, ranks and a client that die while streams run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from quire.cluster import ray_gateway
from quire.cluster.admin import ClusterStatus, UnknownReplica
from quire.cluster.controller import ReplicaState
from quire.cluster.ray_gateway.driver import start_ray, with_threads
from quire.cluster.remote_client import RemoteEngineClient, RemoteStream
from quire.worker.config import CacheOptions, ClusterOptions, EngineOptions, ModelOptions, ParallelOptions, QuireOptions
from quire.worker.protocol import GenerateRequest, ReplicaLost, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))
from tiny_server import save_tiny_model

pytestmark = pytest.mark.ray
WAIT_S = 240.0


NAMESPACE = "gateway-test"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_gateway.Cluster]:
    """Two replicas of two ranks."""
    model = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(model)
    engine = EngineOptions(ModelOptions(str(model)), CacheOptions(kv_pages=512), parallel=ParallelOptions(tp=2))
    cluster = ray_gateway.Cluster(QuireOptions(engine, cluster=ClusterOptions(namespace=NAMESPACE, replicas=2)))
    over = threading.Event()

    def renew() -> None:
        """The lease, as `quire serve` does."""
        while not over.wait(2.0):
            with contextlib.suppress(ReplicaLost):
                cluster.lease.view()

    renewing = threading.Thread(target=renew)
    try:
        cluster.lease.check()
        renewing.start()
        until(lambda: all_ready(cluster))
        yield cluster
    finally:
        over.set()
        renewing.join(WAIT_S)
        cluster.close()


def until(true: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def all_ready(cluster: ray_gateway.Cluster) -> bool:
    try:
        return all(row.state is ReplicaState.READY for row in cluster.lease.view().replicas)
    except ReplicaLost:
        return False


def epochs(cluster: ray_gateway.Cluster) -> dict[str, int]:
    return {row.replica_id: row.epoch for row in cluster.lease.view().replicas}


def request(name: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(name, ((1, 2, 3),), SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))


def client() -> RemoteEngineClient:
    return ray_gateway.connect(QuireOptions(cluster=ClusterOptions(namespace=NAMESPACE)), "i")


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


async def tokens_of(stream: RemoteStream) -> list[int]:
    return [t async for o in stream for t in o.tokens]


async def status(true: Callable[[ClusterStatus], object] = lambda now: True) -> ClusterStatus:
    """The first status of which that is true."""
    while True:
        with contextlib.suppress(ReplicaLost):
            now = await ray_gateway.AdminPort(NAMESPACE).status()
            if true(now):
                return now
        await asyncio.sleep(0.05)


def at_rest(now: ClusterStatus) -> bool:
    return not now.requests and all(r.state == "ready" and r.pages.active == r.running == r.waiting == 0 for r in now.replicas)


def _whole(now: ClusterStatus) -> bool:
    return all(len(r.ranks) == 2 for r in now.replicas)


def test_streams_go_on_when_the_controller_dies_and_its_successor_knows_the_replicas(cluster: ray_gateway.Cluster) -> None:
    before = epochs(cluster)

    async def scenario() -> None:
        ingress = client()
        ingress.start()
        await ingress.ready(WAIT_S)
        calm = await tokens_of(await ingress.submit(request("calm", 300)))
        stream = await ingress.submit(request("disturbed", 300))
        tokens = list((await anext(stream)).tokens)
        first = await status()
        os.kill(first.controller_pid, signal.SIGKILL)
        arriving = await ingress.submit(request("arrives meanwhile", 20))
        assert tokens + await tokens_of(stream) == calm
        assert await tokens_of(arriving) == calm[:20]
        second = await status(lambda now: now.controller_pid != first.controller_pid and at_rest(now) and _whole(now))
        # found, ranks and all, with not one started again
        assert [(r.id, r.epoch, r.ranks) for r in second.replicas] == [(r.id, r.epoch, r.ranks) for r in first.replicas]
        assert ingress.recovery().lost == 0
        await ingress.close()

    run(scenario)
    assert epochs(cluster) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_replica_dies_whole_with_any_rank_and_its_streams_go_on_elsewhere(cluster: ray_gateway.Cluster, rank: int) -> None:
    until(lambda: all_ready(cluster))
    before = epochs(cluster)

    async def scenario() -> None:
        ingress = client()
        ingress.start()
        await ingress.ready(WAIT_S)
        calm = await tokens_of(await ingress.submit(request(f"calm {rank}", 300)))
        stream = await ingress.submit(request(f"disturbed {rank}", 300))
        tokens = list((await anext(stream)).tokens)
        now = await status()
        hit = next(r for r in now.replicas if r.id == next(q.replica for q in now.requests if q.id == f"disturbed {rank}"))
        os.kill(hit.ranks[rank].pid, signal.SIGKILL)
        assert tokens + await tokens_of(stream) == calm
        assert ingress.recovery().resumed == 1
        after = await status(lambda now: at_rest(now) and _whole(now))
        assert [r.id for r in after.replicas if r.epoch > before[r.id]] == [hit.id]
        assert not any(Path(f"/proc/{other.pid}").exists() for other in hit.ranks)  # noqa: ASYNC240
        await ingress.close()

    run(scenario)


def test_an_operator_restarts_a_replica_and_sees_its_pages(cluster: ray_gateway.Cluster) -> None:
    until(lambda: all_ready(cluster))
    before = epochs(cluster)

    async def scenario() -> None:
        port = ray_gateway.AdminPort(NAMESPACE)
        maps = await port.page_maps()
        assert {name: len(pages.device) for name, pages in maps.items()} == {"replica-0": 512, "replica-1": 512}
        assert await port.decisions() == {"replica-0": [], "replica-1": []}
        with pytest.raises(UnknownReplica):
            await port.restart("replica-7")
        await port.set_log_level("warning")
        await port.restart("replica-1")

    run(scenario)
    until(lambda: epochs(cluster)["replica-1"] > before["replica-1"])
    until(lambda: all_ready(cluster))
    assert epochs(cluster)["replica-0"] == before["replica-0"]


class User:
    """A client in a process of its own."""

    async def begin(self) -> int:
        self.client = client()
        self.client.start()
        await self.client.ready(WAIT_S)
        self.stream = await self.client.submit(request("endless", 8000))
        await anext(self.stream)
        return os.getpid()


def test_what_a_dead_client_started_is_aborted_and_its_pages_come_back(cluster: ray_gateway.Cluster) -> None:
    until(lambda: all_ready(cluster))
    user = ray_gateway.remote_class(User, num_cpus=0).remote()
    pid = ray.get(user.begin.remote(), timeout=WAIT_S)

    async def scenario() -> None:
        await status(lambda now: [(q.id, q.state) for q in now.requests] == [("endless", "running")])
        os.kill(pid, signal.SIGKILL)
        left = await status(at_rest)
        assert sum(r.output_tokens for r in left.replicas) < 8000  # all other tests' together are far fewer

    run(scenario)


@pytest.mark.parametrize(
    ("replicas", "tp", "cores", "given", "threads"), [(1, 1, 8, None, None), (2, 1, 8, None, 4), (3, 2, 2, None, 1), (2, 2, 8, 5, 5)]
)
def test_ranks_of_a_local_ray_share_the_cores(replicas: int, tp: int, cores: int, given: int | None, threads: int | None) -> None:
    engine = EngineOptions(ModelOptions(threads=given), parallel=ParallelOptions(tp=tp))
    options = QuireOptions(engine, cluster=ClusterOptions(replicas=replicas))
    assert with_threads(options, cores).engine.model.threads == threads
    joined = replace(options, cluster=replace(options.cluster, ray_address="auto"))
    assert with_threads(joined, cores).engine.model.threads == given


@pytest.mark.parametrize(("late", "tries"), [(1, 2), (9, 3)])
def test_a_ray_that_is_not_up_in_its_own_time_is_started_again(late: int, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def init(address: str, **how: object) -> None:
        seen.append(address)
        if len(seen) <= late:
            raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with contextlib.nullcontext() if late < tries else pytest.raises(RuntimeError, match="timed out"):
        start_ray(QuireOptions())
    assert seen == ["local"] * tries
