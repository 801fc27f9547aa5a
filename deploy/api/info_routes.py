"""GET /v1/models, /live, /health, /metrics, /version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ... import __version__
from .context import Api
from .errors import ApiError

router = APIRouter()

READS = ["GET", "HEAD"]


@router.api_route("/v1/models", methods=READS)
async def models(request: Request) -> JSONResponse:
    """The one model that this server has."""
    return JSONResponse({"object": "list", "data": [_model(request.app.state.api)]})


@router.api_route("/v1/models/{name:path}", methods=READS)
async def model(request: Request, name: str) -> JSONResponse:
    """One model; 404 when it is not the served one."""
    api: Api = request.app.state.api
    api.check_model(name)
    return JSONResponse(_model(api))


@router.api_route("/live", methods=READS)
async def live() -> JSONResponse:
    """The process answers."""
    return JSONResponse({"status": "live"})


@router.api_route("/health", methods=READS)
async def health(request: Request) -> JSONResponse:
    """Requests would be served: the engine was heard from lately, and the server is not about to stop."""
    api: Api = request.app.state.api
    silent_s = api.client.silent_s()
    if api.lifecycle.draining:
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    if not silent_s < api.options.health_timeout_s:
        raise ApiError(503, "no replica has been heard from lately", code="engine_silent")
    return JSONResponse({"status": "ok"})


@router.api_route("/version", methods=READS)
async def version() -> JSONResponse:
    """Quire's version."""
    return JSONResponse({"version": __version__})


@router.api_route("/metrics", methods=READS)
async def metrics(request: Request) -> Response:
    """Prometheus text. The connection ends, so that the next scrape may reach another ingress of the same port."""
    api: Api = request.app.state.api
    return Response(api.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST, "Connection": "close"})


def _model(api: Api) -> dict[str, Any]:
    info = api.info
    return {
        "id": info.name,
        "object": "model",
        "created": info.created_s,
        "owned_by": "quire",
        "max_model_len": info.max_model_len,
    }
