"""The console's files and figures: who gets what, what the page may load, and how much there is of it at most."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import httpx
import pytest
from admin_peer import STATUS, FakePort, running_admin

from quire.cluster.admin import PageMaps, RequestRow, TenantRow
from quire.deploy.admin import console
from quire.deploy.admin.server import RunningAdmin
from quire.deploy.page_cells import cells

TOKEN = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def admin() -> Iterator[tuple[FakePort, RunningAdmin]]:
    with running_admin("sesame") as running:
        yield running


class Crowd(FakePort):
    """A cluster that is large in every way."""

    def __init__(self) -> None:
        requests = tuple(RequestRow(f"cmpl-{i}", "replica-0", "a", 1, 1, "running") for i in range(5000))
        tenants = tuple(TenantRow(f"tenant-{i}", 1.0, i, 0, 0) for i in range(2000))
        super().__init__(replace(STATUS, requests=requests, tenants=tenants))
        self.looks = 0

    async def page_maps(self) -> Mapping[str, PageMaps]:
        self.looks += 1
        return {"replica-0": PageMaps(b"a" * 150_000 + b"f" * 150_000, b"")}

    async def autoscaling(self) -> dict[str, object]:
        decision = {"target": 3, "why": "policy", "inputs": {"a": 1}, "state": {}}
        return {**await super().autoscaling(), "decisions": [{**decision, "unix_s": i} for i in range(256)]}


@pytest.mark.parametrize("path", console.PATHS)
def test_the_page_is_for_everybody_and_loads_nothing_from_elsewhere(admin: tuple[FakePort, RunningAdmin], path: str) -> None:
    answer = httpx.get(admin[1].url + path)
    assert answer.status_code == 200
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert {"script-src", "style-src", "connect-src", "img-src"}.isdisjoint(policy)  # so that the default holds
    assert answer.headers["x-content-type-options"] == "nosniff"
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "/console": "text/html"}
    assert answer.headers["content-type"] == kinds[path.rpartition(".")[2]] + "; charset=utf-8"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/admin/console"), ("POST", "/console"), ("GET", "/console/"), ("GET", "/console/../admin/status"), ("GET", "/console/x")],
)
def test_everything_else_needs_the_token(admin: tuple[FakePort, RunningAdmin], method: str, path: str) -> None:
    host, port = admin[1].url.removeprefix("http://").split(":")

    async def status() -> bytes:  # as it is written: a client would tidy the path
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        writer.close()
        return line

    assert b" 401 " in asyncio.run(status())


def test_every_file_is_served_and_every_reference_is_a_file() -> None:
    folder = console.files("quire.deploy.admin").joinpath("console")
    served = {path.rpartition("/")[2] for path in console.PATHS[1:]} | {"console.html"}
    assert {file.name for file in folder.iterdir()} == served
    texts = {name: folder.joinpath(name).read_text() for name in served}
    for name in re.findall(r'(?:src|href)="([^"]*)"', texts["console.html"]):
        assert name in console.PATHS
    for name, text in texts.items():
        assert set(re.findall(r'from "\./([^"]*)"', text)) <= served
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|//cdn|@import|url\(", text), name


def test_nothing_from_a_request_becomes_markup_or_code() -> None:
    folder = console.files("quire.deploy.admin").joinpath("console")
    for file in folder.iterdir():
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), file.name
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son[a-z]+=|\sstyle=", text), file.name


def test_the_figures(admin: tuple[FakePort, RunningAdmin]) -> None:
    answer = httpx.get(admin[1].url + "/admin/console", headers=TOKEN)
    seen = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert seen["page_maps"]["replica-0"] == {
        "device": {"pages": 64, "cells": "a" * 12 + "s" * 4 + "c" * 16 + "f" * 32},
        "host": {"pages": 4, "cells": "aacf"},
    }
    assert [(r["id"], r["state"], r["epoch"], r["output"], r["reason"]) for r in seen["replicas"]] == [
        ("replica-0", "ready", 7, 1000, ""),
        ("replica-1", "starting", 8, 0, "waiting for 1 GPU"),
    ]
    assert [(row["request"], row["outcome"], row["pages"]) for row in seen["moving"]] == [("cmpl-3", "", 5)]
    assert [(row["ago_s"], row["cause"]) for row in seen["moved"]] == [(2.0, "drain"), (9.0, "operator")]  # the latest first
    assert seen["latency"] == {"ttft_ms": {"p50": 50.0, "p90": 100.0, "p99": 250.0}, "tpot_ms": None}
    assert [(t["name"], t["waiting"], t["running"], t["served"]) for t in seen["tenants"]] == [("batch", 1, 0, 100), ("search", 0, 1, 900)]
    assert (seen["queue"], seen["refused"], seen["expired"]) == ({"requests": 3, "tokens": 170}, 9, 6)
    assert (seen["autoscaling"]["target"], seen["autoscaling"]["decisions"]) == (3, [{"target": 3, "why": "policy"}])


async def test_it_stays_small_and_is_gathered_once_for_all_who_look() -> None:
    port = Crowd()
    sight = console.Sight(port)
    first, *others = await asyncio.gather(*(sight.look() for _ in range(20)))
    assert port.looks == 1
    assert all(seen is first for seen in others)
    assert (len(first["requests"]), first["requests_total"]) == (console.MAX_REQUESTS, 5000)
    assert (len(first["tenants"]), first["tenants_total"]) == (console.MAX_TENANTS, 2000)
    assert first["tenants"][0]["name"] == "tenant-1999"  # the busiest first
    assert [d["unix_s"] for d in first["autoscaling"]["decisions"]] == list(range(255, 255 - console.MAX_DECISIONS, -1))
    assert "inputs" not in first["autoscaling"]["decisions"][0]
    shown = first["page_maps"]["replica-0"]["device"]
    assert shown["pages"] == 300_000
    assert console.MAX_CELLS / 2 < len(shown["cells"]) <= console.MAX_CELLS
    assert (shown["cells"].count("a"), shown["cells"].count("f")) == (512, 512)


@pytest.mark.parametrize(
    ("states", "most", "shown"),
    [("", 4, ""), ("ascrmf", 8, "ascrmf"), ("aaaaffff", 2, "af"), ("affafa", 2, "fa"), ("cf" * 3, 3, "ccc"), ("fffff", 2, "ff")],
)
def test_cells(states: str, most: int, shown: str) -> None:
    assert cells(states, most) == shown


async def test_a_controller_that_is_away_is_not_remembered() -> None:
    port = FakePort(lost=True)
    sight = console.Sight(port)
    with pytest.raises(Exception, match="does not answer"):
        await sight.look()
    port.lost = False
    assert (await sight.look())["ingresses"] == 1
