"""`GET /console`: the operators' page, whose files lie beside this one, and `GET /admin/console`, the figures that it draws.

The page is the same for everybody, so it needs no token; it may load nothing but its own files and ask nobody but this server. The figures
are bounded, whatever the size of the cluster, and are gathered once for all that look at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from ...cluster.admin import AdminPort, ClusterStatus, PageMaps, Percentiles, Recent
from ..page_cells import cells

MAX_CELLS = 1024  # of one page map
MAX_REQUESTS = 200
MAX_TENANTS = 50
MAX_DECISIONS = 20
FRESH_S = 0.5  # for so long an answer serves everybody

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = ("console.css", "console.js", "cluster.js", "page_map.js", "dom.js", "icon.svg")
PATHS = ("/console", *(f"/console/{name}" for name in _FILES))
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Sight:
    """What the console shows, gathered at most every `FRESH_S` seconds, however many ask."""

    def __init__(self, port: AdminPort) -> None:
        self._port = port
        self._lock = asyncio.Lock()
        self._seen: dict[str, Any] = {}
        self._until_s = 0.0

    async def look(self) -> dict[str, Any]:
        """The figures.

        Raises:
            ReplicaLost: the controller does not answer.
        """
        async with self._lock:
            if time.monotonic() >= self._until_s:
                port = self._port
                status, maps, recent, scale = await asyncio.gather(port.status(), port.page_maps(), port.recent(), port.autoscaling())
                self._seen = {
                    **_cluster(status),
                    "page_maps": {replica: _map(pages) for replica, pages in maps.items()},
                    **_recent(recent),
                    "autoscaling": _scale(scale),
                }
                self._until_s = time.monotonic() + FRESH_S
            return self._seen


def install(app: FastAPI, port: AdminPort) -> None:
    """The routes of `PATHS`, and `/admin/console`."""
    sight = Sight(port)

    @app.get("/admin/console")
    async def figures() -> JSONResponse:
        """What the page asks for each second."""
        return JSONResponse(await sight.look(), headers={"Cache-Control": "no-store"})

    for path, name in zip(PATHS, ("console.html", *_FILES), strict=True):
        app.get(path)(_file(name))


def _file(name: str) -> Any:
    content = files(__package__).joinpath("console", name).read_bytes()
    headers = {**_HEADERS, "Content-Type": f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"}

    async def page() -> Response:
        return Response(content, headers=headers)

    return page


def _cluster(status: ClusterStatus) -> dict[str, Any]:
    shown, figures = status.as_json(), status.figures
    busy = sorted(status.tenants, key=lambda tenant: (-tenant.waiting - tenant.running, tenant.name))
    more = {r.id: {"epoch": r.epoch, "reason": r.reason, "prompt": r.prompt_tokens, "output": r.output_tokens} for r in status.replicas}
    return {
        "ingresses": len(status.ingresses),
        "replicas": [{**replica, **more[replica["id"]]} for replica in shown["replicas"]],
        "requests": shown["requests"][:MAX_REQUESTS],
        "requests_total": len(status.requests),
        "queue": {"requests": figures.queue_requests, "tokens": figures.queue_tokens},
        "tenants": [{**t._asdict(), "bounds": dict(t.bounds), "served": figures.served_tokens.get(t.name, 0)} for t in busy[:MAX_TENANTS]],
        "tenants_total": len(busy),
        "refused": sum(figures.refused.values()),
        "expired": figures.expired,
        "deaths": figures.deaths,
    }


def _map(pages: PageMaps) -> dict[str, Any]:
    tiers = {"device": pages.device, "host": pages.host}
    return {tier: {"pages": len(states), "cells": cells(states.decode("ascii"), MAX_CELLS)} for tier, states in tiers.items()}


def _recent(recent: Recent) -> dict[str, Any]:
    return {
        "moving": [row._asdict() for row in recent.moving],
        "moved": [{"ago_s": round(ago_s, 1), **row._asdict()} for ago_s, row in reversed(recent.moved)],
        "latency": {"ttft_ms": _ms(recent.ttft_s), "tpot_ms": _ms(recent.tpot_s)},
    }


def _ms(seconds: Percentiles | None) -> dict[str, float] | None:
    return {name: round(value * 1000, 2) for name, value in seconds._asdict().items()} if seconds else None


def _scale(view: Mapping[str, Any]) -> dict[str, Any]:
    """What `AdminPort.autoscaling` says, less what decisions were made from."""
    decisions = [{k: v for k, v in d.items() if k not in ("inputs", "state")} for d in view["decisions"][-MAX_DECISIONS:]]
    kept = ("autoscaler", "by_hand", "target", "ready", "limits", "stays_because", "leaving")
    return {**{name: view.get(name) for name in kept}, "decisions": decisions[::-1]}
