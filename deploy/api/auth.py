"""API keys: deny by default. Every route but exactly /live and /health needs one, whether it exists or not.

A pure ASGI middleware, so that no router, mount or redirect stands before it; it looks at `scope["path"]` only, which is
also what the router matches.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from ...worker.config import ServerOptions
from .errors import ApiError

OPEN_PATHS = frozenset({"/live", "/health"})


class ApiKeys:
    """The accepted keys, as digests of equal length."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        if not all(keys):
            raise ValueError("an API key must not be empty")
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def __len__(self) -> int:
        return len(self._digests)

    def tenant(self, presented: bytes) -> str | None:
        """A stable name for the caller with this key; None when no key is like it. Takes the same time for any input."""
        digest = _digest(presented)
        found = 0
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return hashlib.sha256(b"quire tenant" + digest).hexdigest()[:32] if found else None


def load_keys(options: ServerOptions) -> ApiKeys:
    """Keys from the options and from the file (one a line; blank lines do not count).

    Raises:
        ValueError: a key is empty, or the file names none: a server that was meant to be closed must not open.
        OSError: the file cannot be read.
    """
    keys = list(options.api_key)
    if options.api_key_file is not None:
        lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise ValueError(f"{options.api_key_file} holds no API key")
        keys += from_file
    return ApiKeys(tuple(keys))


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
