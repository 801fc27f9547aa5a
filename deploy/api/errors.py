"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

`ApiError` is what HTTP code raises; `as_api_error` maps the engine's errors onto it, in one table. Nothing here, and
nothing that a client sees, holds a stack trace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...worker.protocol import GRAMMAR_FAILED, BadRequest, DeadlineExceeded, Overloaded, QuireError, ReplicaLost

RETRY_AFTER_LOST_S = 1  # another replica, or the same one after a restart, may be there by then
CLIENT_GONE = 499  # nginx's word for it; only metrics and logs ever see it

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An HTTP status with what OpenAI's error object says."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def as_api_error(error: QuireError) -> ApiError:
    """What the client is told about an engine error."""
    match error:
        case BadRequest():
            return ApiError(400, str(error), param=error.field)
        case Overloaded():
            return ApiError(429, error.message, code="overloaded", headers={"Retry-After": str(max(1, math.ceil(error.retry_after_s)))})
        case DeadlineExceeded():
            return ApiError(504, str(error) or "the deadline passed before the request had its turn", code="deadline_exceeded")
        case ReplicaLost():
            message = "no replica can run this request now" if not str(error) else f"the replica is gone: {error}"
            return ApiError(503, message, code="replica_lost", headers={"Retry-After": str(RETRY_AFTER_LOST_S)})
        case _:
            return ApiError(500, str(error), code="engine_error")


def engine_failed(message: str | None) -> ApiError:
    """A sequence that ended with `FinishReason.ERROR`."""
    if message is not None and message.startswith(GRAMMAR_FAILED):
        return ApiError(400, message, code="grammar_too_complex")
    return ApiError(500, message or "the engine could not compute this sequence", code="engine_error")


def install(app: FastAPI) -> None:
    """Makes `app` answer every exception in OpenAI's shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(QuireError, _quire_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _internal_error)


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ApiError):
        raise TypeError("not an ApiError")
    return error.response()


async def _quire_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, QuireError):
        raise TypeError("not a QuireError")
    return as_api_error(error).response()


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the router raises: no such route, or not with this method."""
    if not isinstance(error, HTTPException):
        raise TypeError("not an HTTPException")
    what = {404: "there is no route {path}", 405: "{path} does not take {method}"}.get(error.status_code, error.detail)
    message = what.format(path=request.scope["path"], method=request.method)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _internal_error(_: Request, __: Exception) -> JSONResponse:
    """A bug. The log has the trace; the client gets none of it."""
    return ApiError(500, "internal error", code="internal_error").response()
