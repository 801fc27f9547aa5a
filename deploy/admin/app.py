"""The admin API's routes, over an `AdminPort`. The port's calls block, so they run on the server's thread pool."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from ...cluster.admin import AdminPort, UnknownReplica
from ...worker.logs import LEVELS
from ...worker.protocol import BadRequest
from ..api import errors
from ..api.body import read_body
from ..api.errors import ApiError
from ..api.middleware import BodyLimit, StrictRequest
from ..api.schemas import Strict
from .figures import exposition
from .guard import Guard

MAX_BODY_BYTES = 16 * 1024


class RestartBody(Strict):
    """POST /admin/replicas/{id}/restart: nothing to say."""


class LogLevelBody(Strict):
    """POST /admin/log-level."""

    level: str


def create_admin_app(port: AdminPort, token: str | None) -> FastAPI:
    """The admin API. Errors have the shape of the clients' API."""
    app = FastAPI(title="Quire admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.get("/admin/status")
    def status() -> JSONResponse:
        """What `quire status --json` prints."""
        return JSONResponse(port.status().as_json())

    @app.get("/admin/top")
    def top() -> JSONResponse:
        """The status and, for `quire top`, page maps, token counters and the queue."""
        found = port.status()
        maps = port.page_maps()
        return JSONResponse(
            {
                **found.as_json(),
                "page_maps": {replica: pages.decode("ascii") for replica, pages in maps.items()},
                "tokens": {r.id: {"epoch": r.epoch, "prompt": r.prompt_tokens, "output": r.output_tokens} for r in found.replicas},
                "queue": {"requests": found.figures.queue_requests, "tokens": found.figures.queue_tokens},
            }
        )

    @app.get("/metrics")
    def metrics() -> Response:
        """The controller's figures for Prometheus."""
        return Response(exposition(port.status()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.post("/admin/replicas/{replica_id}/restart")
    async def restart(request: Request, replica_id: str) -> JSONResponse:
        """A new life for a replica."""
        if await request.body():
            await read_body(request, RestartBody)
        return JSONResponse(await run_in_threadpool(_restart, port, replica_id))

    @app.post("/admin/log-level")
    async def log_level(request: Request) -> JSONResponse:
        """How much every process logs from now on."""
        body = await read_body(request, LogLevelBody)
        if body.level not in LEVELS:
            raise BadRequest("level", f"must be one of {', '.join(LEVELS)}")
        return JSONResponse(await run_in_threadpool(_set_log_level, port, body.level))

    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)  # the last one added stands outermost
    app.add_middleware(Guard, token=token)
    app.add_middleware(StrictRequest)
    return app


def _restart(port: AdminPort, replica_id: str) -> dict[str, Any]:
    try:
        port.restart(replica_id)
    except UnknownReplica:
        raise ApiError(404, f"there is no replica {replica_id[:200]!r}", param="replica_id", code="unknown_replica") from None
    return {"replica": replica_id, "state": "restarting"}


def _set_log_level(port: AdminPort, level: str) -> dict[str, Any]:
    port.set_log_level(level)
    return {"level": level}
