"""The key guards everything but /live and /health, whatever form the path or the header takes."""

import pytest
from starlette.types import Message, Receive, Scope, Send

from quire.deploy.api.auth import ApiKeys, RequireKey


async def ask(keys: tuple[str, ...], path: str, *authorization: bytes, kind: str = "http") -> tuple[Message, str | None]:
    """The first message of the response, and the tenant that the app behind saw (None: it was not reached)."""
    sent: list[Message] = []
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["tenant"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", value) for value in authorization]
    await RequireKey(app, ApiKeys(keys))({"type": kind, "path": path, "headers": headers, "method": "GET"}, receive, send)
    return sent[0], seen[0] if seen else None


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/models",
        "/metrics",
        "/v1/chat/completions",
        "/live/",
        "//live",
        "/health/x",
        "/LIVE",
        "/nothing",
        "/docs",
        "/openapi.json",
        "",
    ],
)
async def test_every_other_path_needs_a_key(path: str) -> None:
    start, tenant = await ask(("secret",), path)
    assert (start["status"], tenant) == (401, None)
    assert (b"www-authenticate", b"Bearer") in start["headers"]


@pytest.mark.parametrize("path", ["/live", "/health"])
async def test_health_needs_none(path: str) -> None:
    start, tenant = await ask(("secret",), path)
    assert (start["status"], tenant) == (200, "")


@pytest.mark.parametrize(
    "header",
    [
        b"Bearer wrong",
        b"Bearer ",
        b"Bearer",
        b"secret",
        b"Basic secret",
        b"Bearer secre",
        b"Bearer secrets",
        b"Bearer secret secret",
        b"\xff\xfe",
    ],
)
async def test_a_wrong_key_is_refused(header: bytes) -> None:
    assert (await ask(("secret",), "/v1/models", header))[0]["status"] == 401


async def test_two_authorization_headers_are_refused() -> None:
    assert (await ask(("secret",), "/v1/models", b"Bearer secret", b"Bearer secret"))[0]["status"] == 401


async def test_each_key_is_a_tenant_with_a_stable_name_that_is_not_the_key() -> None:
    keys = ("first", "sécond")
    _, first = await ask(keys, "/v1/models", b"Bearer first")
    _, again = await ask(keys, "/v1/models", b"bearer first")
    _, second = await ask(keys, "/v1/models", "Bearer sécond".encode())
    assert first == again
    assert first != second
    assert first
    assert second
    assert "first" not in first


async def test_without_keys_all_is_open_and_nobody_is_a_tenant() -> None:
    start, tenant = await ask((), "/v1/models")
    assert (start["status"], tenant) == (200, "")


async def test_websockets_are_closed() -> None:
    start, tenant = await ask((), "/live", kind="websocket")
    assert (start["type"], tenant) == ("websocket.close", None)
