"""The gateway on a real Ray: a controller that dies while a stream runs, and a client that dies with its process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from quire.cluster import ray_gateway
from quire.cluster.controller import ReplicaState
from quire.worker.config import CacheOptions, ClusterOptions, EngineOptions, ModelOptions, QuireOptions
from quire.worker.protocol import GenerateRequest, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))
from tiny_server import save_tiny_model

pytestmark = pytest.mark.ray
WAIT_S = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_gateway.Cluster]:
    model = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(model)
    engine = EngineOptions(ModelOptions(str(model)), CacheOptions(kv_pages=512))
    cluster = ray_gateway.Cluster(QuireOptions(engine, cluster=ClusterOptions(namespace="gateway-test")))
    try:
        cluster.check()
        deadline_s = time.monotonic() + WAIT_S
        while not (rows := cluster.status()) or rows[0].state is not ReplicaState.READY:
            assert time.monotonic() < deadline_s, rows
            time.sleep(0.1)
        yield cluster
    finally:
        cluster.close()


def request(name: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(name, ((1, 2, 3),), SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))


def test_streams_go_on_when_the_controller_dies_and_its_successor_knows_the_replica(cluster: ray_gateway.Cluster) -> None:
    async def scenario() -> None:
        client = ray_gateway.connect("gateway-test")
        client.start()
        await client.ready(WAIT_S)
        calm = [t async for o in await client.submit(request("calm", 400)) for t in o.tokens]
        stream = await client.submit(request("disturbed", 400))
        tokens = list((await anext(stream)).tokens)
        controller = ray.get_actor("controller", "gateway-test")
        os.kill(await controller.pid.remote(), signal.SIGKILL)
        tokens += [t async for o in stream for t in o.tokens]
        assert tokens == calm
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                after = await client.submit(request("after", 5))
                break
            except ray_gateway.ReplicaLost:
                assert time.monotonic() < deadline_s
        assert after.owner == stream.owner
        assert [t async for o in after for t in o.tokens] == calm[:5]
        await client.close()

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


class User:
    """A client in a process of its own."""

    async def begin(self) -> int:
        self.client = ray_gateway.connect("gateway-test")
        self.client.start()
        await self.client.ready(WAIT_S)
        self.stream = await self.client.submit(request("endless", 8000))
        await anext(self.stream)
        return os.getpid()


def test_what_a_dead_client_started_is_aborted(cluster: ray_gateway.Cluster) -> None:
    user = ray_gateway.remote_class(User, num_cpus=0).remote()
    pid = ray.get(user.begin.remote(), timeout=WAIT_S)
    replica = ray.get_actor("replica-0", "gateway-test")

    def output_tokens_and_running() -> tuple[int, int]:
        stats = ray_gateway.EngineStats(*ray.get(replica.report.remote(), timeout=WAIT_S)["stats"])
        return stats.output_tokens, stats.running

    os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + WAIT_S
    while output_tokens_and_running()[1]:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert output_tokens_and_running()[0] < 8000
