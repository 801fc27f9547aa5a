"""The admin API's routes, over an `AdminPort`."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ...cluster.admin import AdminPort, NotNow, UnknownReplica, UnknownRequest
from ...worker.logs import LEVELS, set_level
from ...worker.protocol import BadRequest
from ..api import errors
from ..api.body import read_body
from ..api.errors import ApiError
from ..api.middleware import BodyLimit, StrictRequest
from ..api.schemas import Float, Int, Strict
from . import console
from .figures import exposition
from .guard import Guard

MAX_BODY_BYTES = 16 * 1024
DRAIN_WAIT_S = 10.0  # at most, in one answer


class RestartBody(Strict):
    """POST /admin/replicas/{id}/restart: nothing to say."""


class MigrateBody(Strict):
    """POST /admin/requests/{id}/migrate: where to."""

    to: str


class DrainBody(Strict):
    """POST /admin/replicas/{id}/drain. `wait_s`: for so long the answer may wait for the replica to be empty."""

    undo: bool = False
    wait_s: Float = 0.0


class RebalanceBody(Strict):
    """POST /admin/rebalance: nothing to say."""


class ScaleBody(Strict):
    """POST /admin/scale: so many replicas from now on, or as the autoscaler says."""

    replicas: Int | None = None
    auto: bool = False


class LogLevelBody(Strict):
    """POST /admin/log-level."""

    level: str


def create_admin_app(port: AdminPort, token: str | None) -> FastAPI:
    """The admin API. Errors have the shape of the clients' API."""
    app = FastAPI(title="Quire admin", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.get("/admin/status")
    async def status() -> JSONResponse:
        """What `quire status --json` prints."""
        return JSONResponse((await port.status()).as_json())

    @app.get("/admin/top")
    async def top() -> JSONResponse:
        """The status and, for `quire top`, page maps, token counters and the queue."""
        found = await port.status()
        maps = await port.page_maps()
        return JSONResponse(
            {
                **found.as_json(),
                "page_maps": {replica: pages.device.decode("ascii") for replica, pages in maps.items()},
                "tokens": {r.id: {"epoch": r.epoch, "prompt": r.prompt_tokens, "output": r.output_tokens} for r in found.replicas},
                "queue": {"requests": found.figures.queue_requests, "tokens": found.figures.queue_tokens},
            }
        )

    @app.get("/admin/decisions")
    async def decisions() -> JSONResponse:
        """Why sequences gave way lately when pages had run out, by replica, and what that was to cost and came to."""
        return JSONResponse(await port.decisions())

    @app.get("/metrics")
    async def metrics() -> Response:
        """The controller's figures for Prometheus."""
        return Response(exposition(await port.status()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.post("/admin/replicas/{replica_id}/restart")
    async def restart(request: Request, replica_id: str) -> JSONResponse:
        """A new life for a replica."""
        if await request.body():
            await read_body(request, RestartBody)
        try:
            await port.restart(replica_id)
        except UnknownReplica:
            raise _unknown_replica(replica_id, "replica_id") from None
        return JSONResponse({"replica": replica_id, "state": "restarting"})

    @app.post("/admin/requests/{request_id}/migrate")
    async def migrate(request: Request, request_id: str) -> JSONResponse:
        """Another replica for a running request. 200 whatever came of it: `outcome` says."""
        body = await read_body(request, MigrateBody)
        try:
            return JSONResponse((await port.migrate(request_id, body.to))._asdict())
        except UnknownRequest:
            raise ApiError(404, f"no replica has a request {request_id[:200]!r}", param="request_id", code="unknown_request") from None
        except UnknownReplica:
            raise _unknown_replica(body.to, "to") from None
        except NotNow as error:
            raise ApiError(409, str(error), code="not_now") from None

    @app.post("/admin/replicas/{replica_id}/drain")
    async def drain(request: Request, replica_id: str) -> JSONResponse:
        """An empty replica, or an end of that. To be asked again until the state is `drained`."""
        body = await read_body(request, DrainBody)
        try:
            return JSONResponse((await port.drain(replica_id, body.undo, min(max(body.wait_s, 0.0), DRAIN_WAIT_S)))._asdict())
        except UnknownReplica:
            raise _unknown_replica(replica_id, "replica_id") from None
        except NotNow as error:
            raise ApiError(409, str(error), code="not_now") from None

    @app.post("/admin/rebalance")
    async def rebalance(request: Request) -> JSONResponse:
        """One round of all policies."""
        if await request.body():
            await read_body(request, RebalanceBody)
        return JSONResponse({"moves": [row._asdict() for row in await port.rebalance()]})

    @app.get("/admin/autoscaling")
    async def autoscaling() -> JSONResponse:
        """How many replicas there are to be, and the last decisions with what they were made from."""
        return JSONResponse(await port.autoscaling())

    @app.post("/admin/scale")
    async def scale(request: Request) -> JSONResponse:
        """Another number of replicas. Returns when it is decided: they come and go after that."""
        body = await read_body(request, ScaleBody)
        if (body.replicas is None) != body.auto:
            raise BadRequest("replicas", "either a number, or auto: true")
        try:
            return JSONResponse(await port.scale(body.replicas))
        except NotNow as error:
            raise ApiError(409, str(error), param="replicas", code="not_now") from None

    @app.post("/admin/log-level")
    async def log_level(request: Request) -> JSONResponse:
        """How much every process logs from now on."""
        body = await read_body(request, LogLevelBody)
        if body.level not in LEVELS:
            raise BadRequest("level", f"must be one of {', '.join(LEVELS)}")
        set_level(body.level)  # of this process
        await port.set_log_level(body.level)
        return JSONResponse({"level": body.level})

    console.install(app, port)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)  # the last one added stands outermost
    app.add_middleware(Guard, token=token, public=console.PATHS)
    app.add_middleware(StrictRequest)
    return app


def _unknown_replica(replica_id: str, param: str) -> ApiError:
    return ApiError(404, f"there is no replica {replica_id[:200]!r}", param=param, code="unknown_replica")
