"""On a real Ray cluster with Ray Serve: the shipped configurations, two models, a composed deployment, a change under running streams."""

from __future__ import annotations

import asyncio
import json
import os
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
STREAMS, TOKENS = 16, 1500
BIN = Path(sys.executable).parent
COMPOSED = """
import quire
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Composed:
    def __init__(self):
        self.model = quire.connect("tiny")

    async def __call__(self, request):
        params = quire.SamplingParams(max_tokens=12, temperature=0, n=2)
        prompt = (await request.json())["prompt"]
        answer = await self.model.generate(prompt, params)
        parts = ["", ""]
        async for delta in self.model.stream(prompt, params):
            parts[delta.choice] += delta.text
        return {"texts": [output.text for output in answer.outputs], "streamed": parts, "tokens": answer.usage.completion_tokens}

app = Composed.bind()
"""


class Ray:
    """A Ray node with a dashboard, and what is deployed to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dashboard, self.url = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        self.env = dict(os.environ) | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}

    def deploy(self, config: dict[str, Any]) -> None:
        """`serve deploy`, with the port changed; returns when all of it runs."""
        port = int(self.url.rpartition(":")[2])
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config | {"http_options": {"host": "127.0.0.1", "port": port}}))
        command = [str(BIN / "serve"), "deploy", "-a", self.dashboard, str(file)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=UP_S, check=False)
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
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "composed.py").write_text(COMPOSED)
    save_tiny_model(folder / "tiny")
    with started(folder) as ray:
        yield ray


def shipped(root: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((root / "deploy" / "serve_configs" / name).read_text())
    return config


def tiny(ray: Ray, root: Path, kv_pages: int) -> dict[str, Any]:
    """The shipped configuration with a small model, and the composed deployment beside it."""
    config = shipped(root, "smollm2.yaml")
    (app,) = config["applications"]
    options = {"model": str(ray.folder / "tiny"), "kv-pages": kv_pages, "threads": 1, "seed": 7}
    app["deployments"][0]["user_config"] = {"models": [{"name": "tiny", "options": options}]}
    composed = {"name": "composed", "route_prefix": "/composed", "import_path": "composed:app"}
    return config | {"applications": [app, composed]}


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
    ray.deploy(shipped(root, "smollm2.yaml"))  # the second model goes, without the first one noticing
    until(lambda: [model.id for model in client.models.list()] == ["smollm2"])


def test_a_composed_deployment_asks_without_http(ray: Ray, root: Path) -> None:
    ray.deploy(tiny(ray, root, 512))
    until(lambda: httpx.get(f"{ray.url}/v1/models").json()["data"][0]["id"] == "tiny")
    got = httpx.post(f"{ray.url}/composed", json={"prompt": "A quire is"}, timeout=UP_S).json()
    over_http = httpx.post(f"{ray.url}/v1/completions", json={"prompt": "A quire is", "max_tokens": 12, "temperature": 0}, timeout=UP_S)
    assert got["texts"] == got["streamed"] == [over_http.json()["choices"][0]["text"]] * 2
    assert got["tokens"] == 24


async def test_a_change_of_the_configuration_disturbs_no_stream(ray: Ray, root: Path) -> None:
    await asyncio.to_thread(ray.deploy, tiny(ray, root, 1024))
    bodies = [{"prompt": f"stream {i}", "max_tokens": TOKENS, "ignore_eos": True, "seed": i, "temperature": i % 2} for i in range(STREAMS)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=ray.url, timeout=UP_S, limits=limits) as client:

        async def pages() -> float:
            lines = (await client.get("/metrics")).text.splitlines()
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("quire_pages{") and 'tier="device"' in line)

        async def pages_are(count: int) -> None:
            async with asyncio.timeout(UP_S):
                while await pages() != count:  # noqa: ASYNC110  the server has no event for it
                    await asyncio.sleep(0.2)

        await pages_are(1024)
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        undisturbed = [answer.json()["choices"][0]["text"] for answer in answers]
        begun = [asyncio.Event() for _ in bodies]
        ended: list[int] = []

        async def follow(i: int) -> str:
            text = ""
            async with client.stream("POST", "/v1/completions", json=bodies[i] | {"stream": True}) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        assert "error" not in event, event
                        text += event["choices"][0]["text"]
                        begun[i].set()
            ended.append(i)
            return text

        following = [asyncio.create_task(follow(i)) for i in range(STREAMS)]
        await asyncio.gather(*(event.wait() for event in begun))
        await asyncio.to_thread(ray.deploy, tiny(ray, root, 768))
        await pages_are(768)
        over_before = len(ended)
        assert await asyncio.gather(*following) == undisturbed
        assert over_before < STREAMS, "every stream had ended before the change was made: it shows nothing"
