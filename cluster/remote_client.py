"""The engine as an ingress sees it: asks the controller for a route, submits to that replica, reads its frames.

Talks through two ports that `cluster.ray_gateway` implements, so all of it runs without Ray. One frame stream for each
replica, opened as soon as the controller says that the replica is ready and kept for as long as it is.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..worker.protocol import EngineStats, GenerateRequest, ModelInfo, ReplicaLost
from .messages import Route
from .stream import Owner, StreamTable, TableStream

log = logging.getLogger(__name__)

FOLLOW_S = 0.5
RENEW_S = 2.0
CONNECT_TIMEOUT_S = 5.0
ATTEMPTS = 2  # routes may be stale: a refusal is routed once more


class Serving(NamedTuple):
    """A replica that is ready."""

    replica_id: str
    epoch: int
    info: ModelInfo


class ControllerPort(Protocol):
    """The controller. Every call raises ReplicaLost when it does not answer in time."""

    async def serving(self) -> list[Serving]: ...

    async def admit(self, sequences: int) -> Route:
        """As `Controller.admit`."""
        ...


class ReplicaPort(Protocol):
    """One life of one replica. Calls raise ReplicaLost when it does not answer in time, or no longer is that life."""

    def frames(self, connection: str) -> AsyncIterator[list[bytes]]: ...

    async def submit(self, connection: str, data: bytes) -> None:
        """Raises BadRequest and Overloaded, too. After a ReplicaLost the request may run all the same: `abort` it."""
        ...

    def abort(self, request_id: str, choice: int | None) -> None:
        """Does not wait."""
        ...

    def renew(self, connection: str) -> None:
        """Does not wait."""
        ...


@dataclass(slots=True)
class _Link:
    port: ReplicaPort
    connection: str
    pull: asyncio.Task[None] | None = None


class RemoteEngineClient:
    """`cluster.client.EngineClient` over ports.

    Args:
        controller: the controller.
        connect: the port of a replica.
        clock: seconds, monotonic.
    """

    def __init__(self, controller: ControllerPort, connect: Callable[[Owner], ReplicaPort], clock: Callable[[], float]) -> None:
        self._controller = controller
        self._connect = connect
        self._clock = clock
        self._table = StreamTable(self._abort, clock)
        self._links: dict[Owner, _Link] = {}
        self._changed = asyncio.Condition()
        self._info: ModelInfo | None = None
        self._follower: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts to follow the controller, on the running loop."""
        self._follower = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Closes every frame stream; what runs is aborted on the replicas."""
        tasks = [link.pull for link in self._links.values() if link.pull] + ([self._follower] if self._follower else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, request: GenerateRequest) -> TableStream:
        """As `EngineClient.submit`."""
        data, sequences = request.to_wire(), len(request.prompts) * request.params.n
        for _ in range(ATTEMPTS):
            owner = Owner(*await self._controller.admit(sequences))
            try:
                link = await self._linked(owner)
                return await self._submit_to(link, owner, request, data)
            except ReplicaLost as error:
                lost = error
        raise lost

    async def info(self) -> ModelInfo:
        """As `EngineClient.info`."""
        if self._info is None:
            raise ReplicaLost("no replica is ready")
        return self._info

    def stats(self) -> dict[str, EngineStats]:
        """As `EngineClient.stats`."""
        return self._table.stats()

    def silent_s(self) -> float:
        """As `EngineClient.silent_s`."""
        return self._table.silent_s()

    async def ready(self, timeout_s: float) -> ModelInfo:
        """Waits until a replica's first frame is here.

        Raises:
            TimeoutError: it did not come.
        """
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self._info is not None and self.silent_s() < float("inf"))
        return await self.info()

    async def _submit_to(self, link: _Link, owner: Owner, request: GenerateRequest, data: bytes) -> TableStream:
        stream = self._table.register(request, owner)
        try:
            await link.port.submit(link.connection, data)
        except (ReplicaLost, asyncio.CancelledError):  # it may have been taken
            self._table.withdraw(request.request_id)
            link.port.abort(request.request_id, None)
            raise
        except BaseException:
            self._table.withdraw(request.request_id)
            raise
        return stream

    async def _linked(self, owner: Owner) -> _Link:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S), self._changed:
                await self._changed.wait_for(lambda: owner in self._links)
        except TimeoutError:
            raise ReplicaLost(f"{owner.replica_id} cannot be reached") from None
        return self._links[owner]

    async def _abort(self, owner: Owner, request_id: str, choice: int | None) -> None:
        link = self._links.get(owner)
        if link is not None:
            link.port.abort(request_id, choice)

    async def _follow(self) -> None:
        renewed_s = self._clock()
        while True:
            try:
                await self._update(await self._controller.serving())
            except ReplicaLost as error:  # streams go on without a controller
                log.warning("the controller does not answer: %s", error)
            if self._clock() - renewed_s >= RENEW_S:
                renewed_s = self._clock()
                for link in self._links.values():
                    link.port.renew(link.connection)
            await asyncio.sleep(FOLLOW_S)

    async def _update(self, serving: list[Serving]) -> None:
        lives = {Owner(s.replica_id, s.epoch): s.info for s in serving}
        self._info = next(iter(lives.values()), self._info)
        for owner, link in self._links.items():
            # Only a later life ends a link. One that is merely not named (the controller may have forgotten it) goes on.
            if link.pull is not None and any(o.replica_id == owner.replica_id and o.epoch > owner.epoch for o in lives):
                link.pull.cancel()
        for owner in lives.keys() - self._links.keys():
            link = self._links[owner] = _Link(self._connect(owner), uuid.uuid4().hex)
            self._table.connect(owner)
            link.pull = asyncio.create_task(self._pull(owner, link))
        async with self._changed:
            self._changed.notify_all()

    async def _pull(self, owner: Owner, link: _Link) -> None:
        reason = f"{owner.replica_id} is gone"
        first = True
        try:
            async for frames in link.port.frames(link.connection):
                for data in frames:
                    self._table.feed(data)
                if first:
                    first = False
                    async with self._changed:
                        self._changed.notify_all()
        except ReplicaLost as error:
            reason = str(error)
        finally:
            log.info("the frames of %s have ended: %s", owner.replica_id, reason)
            del self._links[owner]
            self._table.drop(owner, reason)
