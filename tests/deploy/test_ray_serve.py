"""On a real Ray cluster with Ray Serve: the shipped configurations, two models, a composed deployment, upgrades under running streams."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

import httpx
import openai
import pytest
import yaml
from tiny_server import save_tiny_model

from quire.deploy.process_tree import descendants, end

pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow]

UP_S = 400.0
STREAMS, MODEL_LEN = 16, 32_768
AFTER = 50  # characters that each stream goes on for when what is awaited has come about
BIN = Path(sys.executable).parent
LOOK = """
from ray import serve
from quire.cluster.ray_gateway import AdminPort, namespaces
from quire.worker.protocol import ReplicaLost

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Look:
    async def __call__(self, request):
        found = {}
        for name in namespaces():
            try:
                status = await AdminPort(name).status()
            except (ReplicaLost, ValueError):  # it has just gone
                continue
            moves = sum(n for (_, outcome), n in status.figures.migrations.items() if outcome == "moved")
            found[name] = {"moves": moves, "running": {r.id: r.running for r in status.replicas if r.state == "ready"}}
        return found

app = Look.bind()
"""


class Ray:
    """A Ray node with a dashboard, and what is deployed to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dashboard, self.url = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        self.env = dict(os.environ) | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}

    def address(self) -> str:
        """Where its drivers connect."""
        found = re.search(r"--address='([^']+)'", (self.folder / "ray.log").read_text())
        assert found
        return found[1]

    def deploy(self, config: dict[str, Any], run: bool = False) -> None:
        """`serve deploy`, or `serve run`, with the port changed; returns when all of it runs."""
        port = int(self.url.rpartition(":")[2])
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config | {"http_options": {"host": "127.0.0.1", "port": port}}))
        command = ["run", "--non-blocking", "-a", self.address()] if run else ["deploy", "-a", self.dashboard]
        done = subprocess.run(
            [str(BIN / "serve"), *command, str(file)], env=self.env, capture_output=True, text=True, timeout=UP_S, check=False
        )
        assert done.returncode == 0, done.stderr
        wanted = {app["name"] for app in config["applications"]}

        def runs() -> bool:
            apps = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=60).json()["applications"]
            assert not [app for app in apps.values() if app["status"] == "DEPLOY_FAILED"], apps
            return {name for name, app in apps.items() if app["status"] == "RUNNING"} >= wanted

        until(runs)


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: Any) -> None:
    end_s = time.monotonic() + UP_S
    while not true():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.2)


@contextmanager
def started(folder: Path) -> Iterator[Ray]:
    ray = Ray(folder)
    dashboard = ray.dashboard.rpartition(":")[2]
    ports = ["--port=0", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0", "--metrics-export-port=0"]
    small = ["--num-cpus=8", "--object-store-memory=150000000", "--disable-usage-stats"]
    command = [str(BIN / "ray"), "start", "--head", "--block", *small, *ports]
    with (folder / "ray.log").open("w") as log:
        node = subprocess.Popen(command, env=ray.env, stdout=log, stderr=log, start_new_session=True)
    try:

        def answers() -> bool:
            assert node.poll() is None, (folder / "ray.log").read_text()
            try:
                return httpx.get(f"{ray.dashboard}/api/serve/applications/", timeout=10).status_code == 200
            except httpx.HTTPError:
                return False

        until(answers)
        yield ray
    finally:
        below = descendants(node.pid)
        node.kill()
        node.wait(UP_S)
        end(below, 5.0)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Ray]:
    folder = tmp_path_factory.mktemp("serve")
    example = re.search(r"```python\n(# composed\.py\n.*?)```", (root / "docs" / "ray-serve.md").read_text(), re.DOTALL)
    assert example
    (folder / "composed.py").write_text(example[1])
    (folder / "look.py").write_text(LOOK)
    save_tiny_model(folder / "tiny", MODEL_LEN)
    save_tiny_model(folder / "other", MODEL_LEN, seed=1)
    with started(folder) as ray:
        yield ray


def shipped(root: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((root / "deploy" / "serve_configs" / name).read_text())
    return config


def tiny(ray: Ray, root: Path, kv_pages: int, model: str = "tiny", **more: object) -> dict[str, Any]:
    """The shipped configuration with a small model, and beside it the composed deployment and one that looks at the controllers."""
    config = shipped(root, "smollm2.yaml")
    (app,) = config["applications"]
    options = {"model": str(ray.folder / model), "kv-pages": kv_pages, "threads": 1, "seed": 7, **more}
    app["deployments"][0]["user_config"] = {"models": [{"name": "tiny", "options": options}]}
    composed = {"name": "composed", "route_prefix": "/composed", "import_path": "composed:app"}
    look = {"name": "look", "route_prefix": "/look", "import_path": "look:app"}
    return config | {"applications": [app, composed, look]}


def test_the_shipped_configurations_serve(ray: Ray, root: Path) -> None:
    ray.deploy(shipped(root, "two_models.yaml"))
    client = openai.OpenAI(base_url=f"{ray.url}/v1", api_key="none", timeout=UP_S)
    assert [model.id for model in client.models.list()] == ["smollm2", "smollm2-int8"]
    for model in ("smollm2", "smollm2-int8"):
        asked: list[Any] = [{"role": "user", "content": "Name a colour."}]
        whole = client.chat.completions.create(model=model, messages=asked, max_tokens=8, temperature=0)
        parts = client.chat.completions.create(model=model, messages=asked, max_tokens=8, temperature=0, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
        assert whole.model == model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    ray.deploy(shipped(root, "smollm2.yaml"), run=True)  # the second model goes, without the first one noticing
    until(lambda: [model.id for model in client.models.list()] == ["smollm2"])


def test_a_composed_deployment_asks_without_http(ray: Ray, root: Path) -> None:
    ray.deploy(tiny(ray, root, 20_000))
    until(lambda: httpx.get(f"{ray.url}/v1/models").json()["data"][0]["id"] == "tiny")
    got = httpx.post(f"{ray.url}/composed", json={"prompt": "A quire is"}, timeout=UP_S).json()
    over_http = httpx.post(f"{ray.url}/v1/completions", json={"prompt": "A quire is", "max_tokens": 12, "temperature": 0}, timeout=UP_S)
    assert got["texts"] == got["streamed"] == [over_http.json()["choices"][0]["text"]] * 2
    assert got["tokens"] == 24


class Streams:
    """Greedy and seeded streams that go on until `stop`."""

    def __init__(self, client: httpx.AsyncClient, count: int) -> None:
        self._client = client
        self.bodies = [
            {"prompt": f"stream {i}", "max_tokens": MODEL_LEN - 64, "ignore_eos": True, "seed": i, "temperature": i % 2}
            for i in range(count)
        ]
        self.texts = [""] * count
        self._until: list[float] = [float("inf")] * count  # characters
        self._begun = [asyncio.Event() for _ in self.bodies]
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Returns when each has said something."""
        self._tasks = [asyncio.create_task(self._follow(i)) for i in range(len(self.bodies))]
        begun = asyncio.gather(*(event.wait() for event in self._begun))
        await asyncio.wait([begun, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in self._tasks:
            if task.done():
                task.result()
        assert begun.done()

    async def stop(self, more: int) -> list[str]:
        """Their texts, when each has gone on for so many characters."""
        assert not any(task.done() for task in self._tasks), "a stream has ended: it shows nothing"
        self._until = [len(text) + more for text in self.texts]
        await asyncio.gather(*self._tasks)
        return self.texts

    async def again(self, texts: list[str]) -> list[str]:
        """What they say when nothing happens, up to the length of each of these texts."""
        self._until = [float(len(text)) for text in texts]
        await self.begin()
        await asyncio.gather(*self._tasks)
        return [text[: len(until)] for text, until in zip(self.texts, texts, strict=True)]

    async def _follow(self, i: int) -> None:
        async with self._client.stream("POST", "/v1/completions", json=self.bodies[i] | {"stream": True}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    self.texts[i] += event["choices"][0]["text"]
                    self._begun[i].set()
                    if len(self.texts[i]) >= self._until[i]:
                        return
        raise AssertionError("the stream has ended")


async def test_upgrades_lose_no_stream(ray: Ray, root: Path) -> None:
    await asyncio.to_thread(ray.deploy, tiny(ray, root, 20_000))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=ray.url, timeout=UP_S, limits=limits) as client:

        async def look() -> Any:
            return (await client.get("/look")).json()

        async def pages_are(count: int) -> None:
            async with asyncio.timeout(UP_S):
                while await _pages(client) != count:  # noqa: ASYNC110  the server has no event for it
                    await asyncio.sleep(0.2)

        # The same model: streams move to the new replica while they go on, and the old one goes before any of them ends.
        await pages_are(20_000)
        before = await look()
        streams = Streams(client, STREAMS)
        await streams.begin()
        await asyncio.to_thread(ray.deploy, tiny(ray, root, 18_000, **{"override-generation-config": '{"temperature": 0}'}))
        await pages_are(18_000)
        after = await look()
        texts = await streams.stop(AFTER)
        asked = {"prompt": "A quire is", "max_tokens": 12}  # new requests meet the new replica's defaults
        found = [(await client.post("/v1/completions", json=asked | more)).json() for more in ({}, {"temperature": 0})]
        assert found[0]["choices"] == found[1]["choices"]
        assert after.keys() == before.keys() == {"quire-tiny"}
        assert before["quire-tiny"]["running"].keys().isdisjoint(after["quire-tiny"]["running"])
        assert list(after["quire-tiny"]["running"].values()) == [STREAMS]
        assert after["quire-tiny"]["moves"] == STREAMS
        assert await Streams(client, STREAMS).again(texts) == texts

        # Another model: it answers beside the old one, where streams go on.
        streams = Streams(client, STREAMS)
        await streams.begin()
        await asyncio.to_thread(ray.deploy, tiny(ray, root, 16_000, "other"))
        await pages_are(16_000)
        both = await look()
        kept = await streams.stop(AFTER)
        assert both["quire-tiny"] == after["quire-tiny"]
        assert len(both) == 2
        assert all(a.startswith(b) or b.startswith(a) for a, b in zip(kept, texts, strict=True))
        assert (await client.post("/v1/completions", json=streams.bodies[0] | {"max_tokens": 40})).json()["choices"][0]["text"][
            :10
        ] not in (
            texts[0][:10],
            "",
        )
        async with asyncio.timeout(UP_S):
            while "quire-tiny" in await look():  # noqa: ASYNC110  nobody is told when a controller goes
                await asyncio.sleep(0.2)


async def _pages(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("quire_pages{") and 'tier="device"' in line)
