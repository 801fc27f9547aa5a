"""Who may use the admin API: whoever has the token; without one, whoever is on this machine and no web page in its browser.

Deny by default, as a pure ASGI middleware before every route. Browsers reach loopback addresses too, so without a token
the Host header must name one (a rebound DNS name does not), and what changes anything must be JSON, which no page may
send to a foreign origin without asking first - and nobody here says yes. Only the console's own files, which are the same for everybody,
need no token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from ...worker.config import AdminOptions
from ..api.auth import bearer
from ..api.errors import ApiError


def check_admin(options: AdminOptions) -> None:
    """Refuses what must not be started; cheap, so that it can be said before anything else is.

    Raises:
        ValueError: an address that others can reach, and no token.
    """
    if options.admin_token is None and not is_loopback(options.admin_host):
        raise ValueError(f"--admin-host {options.admin_host} can be reached by others: set --admin-token, or use a loopback address")
    if options.admin_token is not None and not (options.admin_token.isascii() and options.admin_token.isprintable()):
        raise ValueError("--admin-token must be printable ASCII")


class Guard:
    """Middleware: 401 without the token, 403 for a foreign Host, 415 for a POST that is not JSON.

    Args:
        token: None where none is needed.
        public: paths of the same for everybody that may be read without it.
    """

    def __init__(self, app: ASGIApp, token: str | None, public: Collection[str] = ()) -> None:
        self._app = app
        self._public = frozenset(public)
        self._digest = None if token is None else hashlib.sha256(token.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._digest is not None:
            if scope["path"] in self._public and scope["method"] in ("GET", "HEAD"):
                return None
            if not hmac.compare_digest(hashlib.sha256(bearer(scope)).digest(), self._digest):
                return ApiError(401, "a valid admin token is needed", code="invalid_admin_token", headers={"WWW-Authenticate": "Bearer"})
        elif not is_loopback(_host(headers.get(b"host", b""))):
            return ApiError(403, "without an admin token only a loopback address may be named in the Host header", code="foreign_host")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] not in ("GET", "HEAD") and kind != b"application/json":
            return ApiError(415, "Content-Type must be application/json")
        return None


def is_loopback(host: str) -> bool:
    """Whether this name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: bytes) -> str:
    try:
        return urlsplit(f"//{header.decode('ascii')}").hostname or ""
    except ValueError:
        return ""
