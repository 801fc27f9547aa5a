"""Draining: who is refused, who may finish, who is cut off."""

import asyncio

import pytest

from quire.deploy.api.errors import ApiError
from quire.deploy.api.lifecycle import Lifecycle


async def test_drain_waits_for_what_runs_and_refuses_what_comes() -> None:
    lifecycle = Lifecycle()
    with lifecycle.track():
        draining = asyncio.ensure_future(lifecycle.drain(30))
        await asyncio.sleep(0)
        assert not draining.done()
        with pytest.raises(ApiError) as refused, lifecycle.track():
            pass
        assert refused.value.status == 503
        assert "Retry-After" in refused.value.headers
    assert await draining is True
    assert lifecycle.running == 0


async def test_drain_cuts_off_what_does_not_finish_in_time() -> None:
    lifecycle = Lifecycle()

    async def endless() -> None:
        with lifecycle.track():
            await lifecycle.cut()

    running = asyncio.ensure_future(endless())
    await asyncio.sleep(0)
    assert await lifecycle.drain(0.01) is False
    await running
    assert lifecycle.running == 0


async def test_an_idle_server_drains_at_once() -> None:
    assert await Lifecycle().drain(0) is True
