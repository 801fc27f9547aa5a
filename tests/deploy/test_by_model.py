"""`ByModel`: which application gets which request, and that its body arrives whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from quire.deploy.api import middleware
from quire.deploy.api.by_model import ByModel

MAX_BODY = 1000


async def nothing() -> None:
    return None


class App:
    """An application that says who it is, and what it got."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.healthy = True
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/health", self.health)
        self.app.add_api_route("/{path:path}", self.echo, methods=["GET", "POST"])

    async def models(self, request: Request) -> JSONResponse:
        if request.headers.get("authorization") != "Bearer key":
            return JSONResponse({"error": self.name}, 401)
        return JSONResponse({"object": "list", "data": [{"id": self.name}]})

    async def health(self) -> JSONResponse:
        return JSONResponse({"status": "ok"} if self.healthy else {"error": self.name}, 200 if self.healthy else 503)

    async def echo(self, request: Request) -> JSONResponse:
        return JSONResponse({"app": self.name, "bytes": len(await request.body()), "path": request.url.path})


@pytest.fixture
def apps() -> list[App]:
    return [App("one"), App("two")]


@pytest.fixture
async def client(apps: list[App]) -> AsyncIterator[httpx.AsyncClient]:
    whole = ByModel({app.name: app.app for app in apps}, MAX_BODY, nothing)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(whole), base_url="http://x") as client:
        yield client


@pytest.mark.parametrize(
    ("body", "goes_to"),
    [
        (b'{"model": "one"}', "one"),
        (b'{"model": "two"}', "two"),
        (b'{"model": "three"}', "one"),
        (b'{"model": ["two"]}', "one"),
        (b"{}", "one"),
        (b"[]", "one"),
        (b"", "one"),
        (b"not json", "one"),
        (b'{"model": "two", "prompt": "' + b"x" * 900 + b'"}', "two"),
        (b'{"model": "two", "prompt": "' + b"x" * 5000 + b'"}', "two"),  # in one piece; the application refuses it
        (b"[" * 500, "one"),
    ],
)
async def test_a_request_goes_to_the_model_that_it_names(client: httpx.AsyncClient, body: bytes, goes_to: str):
    answer = (await client.post("/v1/completions", content=body)).json()
    assert answer == {"app": goes_to, "bytes": len(body), "path": "/v1/completions"}


async def test_a_body_in_pieces_arrives_whole_and_is_not_kept_beyond_the_limit(client: httpx.AsyncClient):
    async def pieces(count: int) -> AsyncIterator[bytes]:
        yield b'{"model": "two", "prompt": "'
        for _ in range(count):
            yield b"x" * 100
        yield b'"}'

    small = (await client.post("/v1/completions", content=pieces(5))).json()
    assert (small["app"], small["bytes"]) == ("two", 28 + 500 + 2)
    large = (await client.post("/v1/completions", content=pieces(50))).json()
    assert (large["app"], large["bytes"]) == ("one", 28 + 5000 + 2)  # nobody has read that far to see the model


async def test_a_body_that_does_not_end_is_given_up(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    async def endless() -> AsyncIterator[bytes]:
        yield b'{"model": "two", '
        await asyncio.Event().wait()

    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.05)
    answer = await client.post("/v1/completions", content=endless())
    assert answer.status_code == 408
    assert "did not arrive" in answer.json()["error"]["message"]


async def test_what_concerns_all_is_asked_of_all(client: httpx.AsyncClient, apps: list[App]):
    key = {"Authorization": "Bearer key"}
    answer = await client.get("/v1/models", headers=key)
    assert answer.json() == {"object": "list", "data": [{"id": "one"}, {"id": "two"}]}
    assert int(answer.headers["content-length"]) == len(answer.content)
    refused = await client.get("/v1/models")
    assert (refused.status_code, refused.json()) == (401, {"error": "one"})
    assert (await client.get("/health")).json() == {"status": "ok"}
    apps[1].healthy = False
    ill = await client.get("/health")
    assert (ill.status_code, ill.json()) == (503, {"error": "two"})


async def test_one_model_by_its_name(client: httpx.AsyncClient):
    for path, goes_to in (("/v1/models/two", "two"), ("/v1/models/x", "one"), ("/metrics", "one"), ("/metrics?model=two", "two")):
        assert (await client.get(path)).json()["app"] == goes_to


async def test_its_end_is_told_once():
    told: list[str] = []

    async def closed() -> None:
        told.append("closed")

    asked = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> dict[str, str]:
        return next(asked)

    async def send(message: dict[str, str]) -> None:
        told.append(message["type"])

    await ByModel({}, MAX_BODY, closed)({"type": "lifespan"}, receive, send)
    assert told == ["lifespan.startup.complete", "closed", "lifespan.shutdown.complete"]


async def test_models_come_and_go(apps: list[App]):
    serving: dict[str, FastAPI] = {}
    transport = httpx.ASGITransport(ByModel(serving, MAX_BODY, nothing))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        assert (await client.get("/health")).status_code == 503
        serving["one"] = apps[0].app
        serving["two"] = apps[1].app
        assert (await client.post("/x", json={"model": "two"})).json()["app"] == "two"
        serving["two"] = App("new two").app
        assert (await client.post("/x", json={"model": "two"})).json()["app"] == "new two"
        del serving["one"]
        assert (await client.post("/x", json={"model": "one"})).json()["app"] == "new two"


async def test_a_single_model_is_not_read_for():
    app = App("one")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(ByModel({"one": app.app}, 1, nothing)), base_url="http://x") as client:
        assert (await client.post("/v1/completions", json={"model": "two"})).json()["app"] == "one"
        assert json.loads((await client.get("/health")).content) == {"status": "ok"}
