"""The ingress: an actor that serves the HTTP API under uvicorn, on the node of the command that started it."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..cluster.ray_gateway import remote_class, start_actor_logging
from ..worker.config import QuireOptions, ServerOptions

if TYPE_CHECKING:
    import uvicorn

START_TIMEOUT_S = 60.0  # from a replica's readiness to the server's
STOP_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 10.0


class IngressDied(Exception):
    """The ingress could not start, or ended without having been told to."""


def probe(options: ServerOptions) -> None:
    """Whether the server can listen where it is to.

    Raises:
        OSError: it cannot; says which address, and why.
    """
    _bound(options, shared=False).close()


def reserve(options: ServerOptions) -> socket.socket:
    """A socket that never listens: it holds the port, also one that was free to choose, while no ingress lives.

    Raises:
        OSError: the address cannot be used; says which and why.
    """
    return _bound(options, shared=True)


def _bound(options: ServerOptions, shared: bool) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:  # the kernel spreads connections over all sockets that listen; all of them must be this user's
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {options.host}:{options.port}: {error.strerror}") from None
    return bound


class IngressActor:
    """One HTTP server.

    Args:
        ingress_id: who it is, also after a restart.
        options: with the port that it shares with its siblings.
    """

    def __init__(self, ingress_id: str, options: QuireOptions) -> None:
        start_actor_logging(options.server.log_level, options.server.log_format, ingress=ingress_id)
        self._options = options
        self._ingress_id = ingress_id
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._app: Any = None

    async def start(self) -> dict[str, Any]:
        """Serves as soon as a replica does.

        Returns:
            {"phases" (name -> seconds)}, or {"failure": why it cannot serve}.
        """
        import uvicorn  # here and below: the driver, which imports this file, needs neither the server nor the tokenizer

        from .api.app import create_app
        from .api.http_server import server_config
        from .edge import Edge

        try:
            bound = _bound(self._options.server, shared=True)
            edge = await Edge(self._ingress_id, self._options).__aenter__()  # until the process ends
            phases = await edge.opened()
            begun_s = time.monotonic()
            info = await edge.client.info()
            server, limits = self._options.server, self._options.engine.limits
            self._app = create_app(edge.client, edge.tokenizer, info, server, limits, self._ingress_id)
            edge.latencies = self._app.state.api.latencies
            config = server_config(self._app, self._options.server)
            config.timeout_graceful_shutdown = int(STOP_TIMEOUT_S)
            self._server = uvicorn.Server(config)
            self._serving = asyncio.create_task(self._server.serve(sockets=[bound]))
            async with asyncio.timeout(START_TIMEOUT_S):
                # uvicorn has no event for it
                while not self._server.started and not self._serving.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            if self._serving.done():
                return {"failure": "the HTTP server ended while it started"}
            phases["HTTP server"] = time.monotonic() - begun_s
        except (OSError, ValueError, TimeoutError) as error:
            return {"failure": str(error) or repr(error)}
        return {"phases": phases}

    async def ended(self) -> None:
        """Returns when the server has stopped."""
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def running(self) -> int:
        """Generation requests that run."""
        return int(self._app.state.lifecycle.running)

    async def drain(self, grace_s: float) -> bool:
        """Refuses new requests, gives the running ones `grace_s`, then cuts them off. True when they all finished."""
        return bool(await self._app.state.lifecycle.drain(grace_s))

    async def stop(self) -> None:
        """Closes the server and every connection."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            async with asyncio.timeout(2 * STOP_TIMEOUT_S):
                await self._serving


class Ingress:
    """An `IngressActor` from the driver's side. It dies with the driver. Blocking calls, each with a time-out."""

    def __init__(self, ingress_id: str, options: QuireOptions) -> None:
        """Starts the actor on this node; `started` says how it went."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor = remote_class(IngressActor, num_cpus=0, max_restarts=0, scheduling_strategy=here).remote(ingress_id, options)
        self._start = self._actor.start.remote()
        self._ended: Any = None

    def started(self, wait_s: float) -> dict[str, float] | None:
        """The phases that `IngressActor.start` returned; None when it has not, after `wait_s`.

        Raises:
            IngressDied: it cannot serve.
        """
        result = _settled(self._start, wait_s)
        if result is not None and "failure" in result:
            raise IngressDied(result["failure"])
        return None if result is None else result["phases"]

    def check(self, wait_s: float) -> None:
        """Watches it for `wait_s`.

        Raises:
            IngressDied: it has ended.
        """
        self._ended = self._ended or self._actor.ended.remote()
        if ray.wait([self._ended], timeout=wait_s)[0]:
            _settled(self._ended, CALL_TIMEOUT_S)
            raise IngressDied("the HTTP server has ended")

    def running(self) -> int:
        """Generation requests that run."""
        return int(_settled(self._actor.running.remote(), CALL_TIMEOUT_S) or 0)

    def drain(self, grace_s: float) -> Any:
        """Starts to drain; a token for `drained`. A second drain with less grace overrides the first."""
        return self._actor.drain.remote(grace_s)

    def drained(self, token: Any, wait_s: float) -> bool | None:
        """Whether every request finished by itself; None while the drain goes on, after `wait_s`."""
        finished: bool | None = _settled(token, wait_s)
        return finished

    def stop(self) -> None:
        """Closes the server; what does not close in time is killed."""
        try:
            _settled(self._actor.stop.remote(), CALL_TIMEOUT_S)
        finally:
            ray.kill(self._actor)


def _settled(ref: Any, wait_s: float) -> Any:
    try:
        return ray.get(ref, timeout=wait_s)
    except GetTimeoutError:
        return None
    except RayError as error:
        raise IngressDied("the process of the HTTP server has died") from error
