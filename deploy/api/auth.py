"""API keys: deny by default. Every route but exactly /live and /health needs one, whether it exists or not.

A pure ASGI middleware, so that no router, mount or redirect stands before it; it looks at `scope["path"]` only, which is
also what the router matches.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

OPEN_PATHS = frozenset({"/live", "/health"})


class ApiKeys:
    """The accepted keys, as digests of equal length, and whose each is."""

    def __init__(self, keys: Iterable[str], tenants: Mapping[str, str] | None = None) -> None:
        """`keys` are each a tenant of their own; `tenants` are key -> name of its tenant."""
        named = {key: tenant_of(key) for key in keys} | dict(tenants or {})
        if not all(named):
            raise ValueError("an API key must not be empty")
        self._tenants = tuple((_digest(key.encode()), tenant) for key, tenant in named.items())

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, presented: bytes) -> str | None:
        """The name of the caller with this key; None when no key is like it. Takes the same time for any input."""
        digest = _digest(presented)
        found = None
        for known, tenant in self._tenants:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


def tenant_of(key: str) -> str:
    """A stable name for whoever has this key, when nobody has named them. The key cannot be found from it."""
    return hashlib.sha256(b"quire tenant" + _digest(key.encode())).hexdigest()[:32]


class RequireKey:
    """Middleware: 401 without a known key; the tenant's name goes to `scope["state"]["tenant"]`. Without keys all is open."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        tenant: str | None = ""
        if len(self._keys) and scope["path"] not in OPEN_PATHS:
            tenant = self._keys.tenant(bearer(scope))
        if tenant is None:
            error = ApiError(401, "a valid API key is needed", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)


def bearer(scope: Scope) -> bytes:
    """The key in the one Authorization header of an HTTP scope; b"" when there is none, or more than one."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
