"""One model as a Ray Serve ingress holds it: a lease on its controller and replicas, and the app that answers for it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import replace
from hashlib import blake2b

from fastapi import FastAPI

from ..cluster.ray_gateway import Lease, namespaces, serves
from ..cluster.upgrading import hindrance, shared
from ..worker.config import QuireOptions
from ..worker.protocol import ReplicaLost
from .api.app import create_app
from .application import DIGEST_CHARS, namespaces_of
from .edge import Edge
from .tenants_file import load_tenants

log = logging.getLogger(__name__)

RENEW_S = 2.0


class CannotServe(Exception):
    """None of the model's replicas can be started; says why."""


class ModelService:
    """One configuration of one model.

    Args:
        asked: the model's configuration.
        ingress_id: whose lease it is.
    """

    def __init__(self, asked: QuireOptions, ingress_id: str) -> None:
        self.asked = asked
        self.hopeless = ""  # why its replicas cannot be started
        self._ingress_id = ingress_id
        self._stack = AsyncExitStack()
        self._app: FastAPI | None = None

    @property
    def app(self) -> FastAPI:
        """Answers for the model.

        Raises:
            RuntimeError: not opened yet.
        """
        if self._app is None:
            raise RuntimeError("the model is not open")
        return self._app

    async def opened(self) -> None:
        """Finds or starts the controller, which takes the configuration over, and waits for a replica. After an exception nothing is
        left behind.

        Raises:
            CannotServe: no replica can be started.
            OSError, ValueError, TimeoutError, ReplicaLost: as `Edge.opened` and `Lease.become`, or the keys cannot be read.
        """
        try:
            async with asyncio.timeout(self.asked.cluster.start_timeout_s * 2):
                await self._open()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _open(self) -> None:
        options = await asyncio.to_thread(_placed, self.asked)
        _, tenants = load_tenants(options.server)
        lease = await asyncio.to_thread(Lease, options, tenants, self._ingress_id)
        self._stack.push_async_callback(asyncio.to_thread, lease.release)
        await asyncio.to_thread(lease.become)
        renewing = asyncio.create_task(self._renew(lease))
        self._stack.callback(renewing.cancel)
        edge = await self._stack.enter_async_context(Edge(self._ingress_id, options))
        opening = asyncio.create_task(edge.opened())
        await asyncio.wait([opening, renewing], return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            raise CannotServe(self.hopeless)
        opening.result()
        info = await edge.client.info()
        app = create_app(edge.client, edge.tokenizer, info, options.server, options.engine.limits, self._ingress_id)
        edge.latencies = app.state.api.latencies
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        self._app = app

    async def close(self, grace_s: float) -> None:
        """Takes no more requests, gives those that run `grace_s`, and releases the replicas."""
        if self._app is not None:
            await self._app.state.lifecycle.drain(grace_s)
        await self._stack.aclose()

    async def _renew(self, lease: Lease) -> None:
        """Returns when there is no hope."""
        while not self.hopeless:
            try:
                self.hopeless = (await asyncio.to_thread(lease.view)).hopeless
            except ReplicaLost as error:
                log.warning("%s", error)
            await asyncio.sleep(RENEW_S)


def _placed(options: QuireOptions) -> QuireOptions:
    """The options with the namespace in which this configuration lives: that of a controller of the model which is this configuration's or
    can take it over; else the model's own, if it is free; else one of the configuration's."""
    own = options.cluster.namespace
    digest = blake2b(repr(options).encode(), digest_size=DIGEST_CHARS // 2).hexdigest()
    found = namespaces_of(options.engine.model.served_model_name or "", namespaces())
    there = {name: theirs for name in found if (theirs := serves(name)) is not None}
    able = [name for name, theirs in there.items() if not hindrance(theirs, options)]
    same = [name for name in able if shared(there[name]) == shared(options)]
    namespace = next(iter([*same, *able]), own if own not in there else f"{own}-{digest}")
    return replace(options, cluster=replace(options.cluster, namespace=namespace))
