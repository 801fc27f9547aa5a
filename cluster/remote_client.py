"""The engine as an ingress sees it: asks the controller for a route, submits to that replica, reads its frames, and resumes what is lost.

What is decided is decided by the journals (`cluster.journal`) and the stream table; here their commands are carried out, through two
ports that `cluster.ray_gateway` implements, so all of it runs without Ray. One frame stream for each replica, opened as soon as the
controller says that the replica is ready and kept for as long as it is.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from ..worker.config import LimitOptions
from ..worker.door import Door
from ..worker.page_hash import prefix_hashes
from ..worker.protocol import EngineStats, GenerateRequest, ModelInfo, QuireError, ReplicaLost, RequestFailed, SequenceOutput
from .client import RecoveryStats
from .commands import Abort, Ask, Command, Lost, Resumed, Submit, Withdraw
from .journal import Journal, Patience
from .messages import AdmitRequest, Route
from .stream import StreamTable
from .succession import Owner

log = logging.getLogger(__name__)

FOLLOW_S = 0.5
RENEW_S = 2.0
CONNECT_TIMEOUT_S = 5.0
ENDED_LINKS = 64  # that are remembered, so that nobody waits for them to open


class Serving(NamedTuple):
    """A replica that is ready."""

    replica_id: str
    epoch: int
    info: ModelInfo


class ServingNow(NamedTuple):
    """What an ingress follows: the key of page hashes, the replicas that are ready, and the model while no replica is to be."""

    hash_key: bytes
    serving: list[Serving]
    asleep: ModelInfo | None = None


class ControllerPort(Protocol):
    """The controller. Every call that waits raises ReplicaLost when there is no answer in time."""

    async def serving(self) -> ServingNow:
        """What there is."""
        ...

    async def admit(self, request: AdmitRequest) -> Route | None:
        """Where the request goes; None when it still waits after a while: ask again.

        Raises BadRequest, Overloaded and DeadlineExceeded, too.
        """
        ...

    def withdraw(self, request_id: str) -> None:
        """Does not wait."""
        ...


class ReplicaPort(Protocol):
    """One life of one replica. Calls raise ReplicaLost when it does not answer in time, or no longer is that life."""

    def frames(self, connection: str) -> AsyncGenerator[list[bytes], None]:
        """They end, without an error, when the replica has given the reader up."""
        ...

    async def submit(self, connection: str, data: bytes) -> None:
        """Raises BadRequest and Overloaded, too. After a ReplicaLost the request may run all the same."""
        ...

    def abort(self, request_id: str, attempt: int, choice: int | None) -> None:
        """Does not wait."""
        ...

    def renew(self, connection: str) -> None:
        """Does not wait."""
        ...


@dataclass(frozen=True, slots=True)
class IngressOptions:
    """What a client is told of the ingress that it works for.

    Attributes:
        ingress_id: begins the name of each of its frame streams, so that a request that migrates finds the one that its outputs go to.
        ingress_id, seed: where the random numbers of requests without a seed come from; equal ones give equal numbers.
        limits: bounds on one request.
        prefix_cache: whether replicas keep pages findable, so that it helps to know a prompt's page hashes.
        patience: when a request is given up.
    """

    ingress_id: str
    seed: int = 0
    limits: LimitOptions = field(default_factory=LimitOptions)
    prefix_cache: bool = True
    patience: Patience = field(default_factory=Patience)


@dataclass(slots=True)
class _Link:
    port: ReplicaPort
    connection: str
    pull: asyncio.Task[None] | None = None
    ready: bool = False  # its first frame is here


class RemoteEngineClient:
    """`cluster.client.EngineClient` over ports.

    Args:
        controller: the controller.
        connect: the port of a replica; raises ReplicaLost when it is gone.
        clock: seconds, monotonic.
        options: of the ingress.
    """

    def __init__(
        self, controller: ControllerPort, connect: Callable[[Owner], ReplicaPort], clock: Callable[[], float], options: IngressOptions
    ) -> None:
        self._controller = controller
        self._connect = connect
        self._clock = clock
        self._options = options
        self._table = StreamTable()
        self._links: dict[Owner, _Link] = {}
        self._ended: deque[Owner] = deque(maxlen=ENDED_LINKS)
        self._changed = asyncio.Condition()
        self._info: ModelInfo | None = None
        self._asleep = False  # no replica is to be, so that none is heard
        self._hash_key = b""
        self._requests = 0
        self._recovery = RecoveryStats()
        self._follower: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # at most one for each request

    def start(self) -> None:
        """Starts to follow the controller, on the running loop."""
        self._follower = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Ends every request, and closes every frame stream."""
        for journal in self._table.live():
            self._go_on(journal, journal.abort(None))
        tasks = [*self._tasks, *(link.pull for link in self._links.values() if link.pull), *([self._follower] if self._follower else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, request: GenerateRequest) -> RemoteStream:
        """As `EngineClient.submit`."""
        info = await self.info()
        door = Door.of(info, self._options.limits)
        self._requests += 1
        checked = door.check(replace(request, attempt=0, resume=None, seed=self._seed() if request.seed is None else request.seed))
        now_s = self._clock()
        journal = Journal(checked, door.longest, self._hashes(checked, info.page_size), now_s, self._options.patience)
        stream = RemoteStream(journal, partial(self._go_on, journal))
        self._table.open(journal)
        self._go_on(journal, journal.start(now_s))
        return stream

    async def info(self) -> ModelInfo:
        """As `EngineClient.info`."""
        if self._info is None:
            raise ReplicaLost("no replica is ready")
        return self._info

    def stats(self) -> dict[str, EngineStats]:
        """As `EngineClient.stats`."""
        return self._table.stats()

    def recovery(self) -> RecoveryStats:
        """As `EngineClient.recovery`."""
        return self._recovery

    def silent_s(self) -> float:
        """As `EngineClient.silent_s`."""
        return 0.0 if self._asleep else self._table.silent_s(self._clock())

    async def ready(self, timeout_s: float) -> ModelInfo:
        """Waits until a replica's first frame is here.

        Raises:
            TimeoutError: it did not come.
        """
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self._info is not None and self.silent_s() < float("inf"))
        return await self.info()

    # --- requests ---

    def _seed(self) -> int:
        source = f"{self._options.seed}/{self._options.ingress_id}/{self._requests}"
        return int.from_bytes(blake2b(source.encode(), digest_size=8).digest(), "little")

    def _hashes(self, request: GenerateRequest, page_size: int) -> tuple[bytes, ...]:
        if not self._options.prefix_cache or request.params.prompt_logprobs is not None:
            return ()
        return prefix_hashes(self._hash_key, request.tenant, request.prompts[0], page_size)

    def _go_on(self, journal: Journal, commands: list[Command]) -> None:
        self._do(commands)
        if journal.over:
            self._table.forget_ended(journal.request_id)
            self._do([])  # it may have been one that others waited for

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Ask() | Submit():
                    journal = self._table.journal(command.request.request_id)
                    if journal is not None and (isinstance(command, Submit) or self._table.may_ask(command)):
                        self._work(journal, self._ask(journal, command) if isinstance(command, Ask) else self._submit(journal, command))
                case Abort(owner, request_id, attempt, choice):
                    if owner in self._links:  # without a link, what ran there has been ended with it
                        self._links[owner].port.abort(request_id, attempt, choice)
                case Withdraw(request_id):
                    self._controller.withdraw(request_id)
                case Lost(request_id, owner, reason):
                    log.info("%s is lost: %s", owner.replica_id, reason, extra={"request_id": request_id})
                    self._recovery = self._recovery._replace(lost=self._recovery.lost + 1)
                case Resumed():
                    self._note_resumed(command)
        if released := self._table.released():
            self._do(released)

    def _note_resumed(self, of: Resumed) -> None:
        log.info("goes on at %s after a pause of %.3f s", of.owner.replica_id, of.pause_s, extra={"request_id": of.request_id})
        lost, resumed, tokens, pause_s = self._recovery
        self._recovery = RecoveryStats(lost, resumed + 1, tokens + of.replayed_tokens, pause_s + of.pause_s)

    def _work(self, journal: Journal, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._worked, journal))

    def _worked(self, journal: Journal, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("internal error", exc_info=task.exception(), extra={"request_id": journal.request_id})
            self._go_on(journal, journal.give_up(RequestFailed("internal error")))

    async def _ask(self, journal: Journal, ask: Ask) -> None:
        attempt = ask.request.attempt
        await asyncio.sleep(ask.delay_s)
        if journal.over:
            return
        try:
            route = await self._controller.admit(ask.request)
        except ReplicaLost as error:
            then = journal.unanswered(attempt, str(error), self._clock())
        except QuireError as error:
            then = journal.refused(attempt, error, self._clock())
        else:
            now_s = self._clock()
            then = journal.queued(attempt, now_s) if route is None else journal.routed(attempt, route, now_s)
        self._go_on(journal, then)

    async def _submit(self, journal: Journal, submit: Submit) -> None:
        owner, request = submit
        try:
            link = await self._linked(owner)
            await link.port.submit(link.connection, request.to_wire())
        except QuireError as error:
            self._go_on(journal, journal.turned_away(owner, request.attempt, error, self._clock()))
        else:
            self._go_on(journal, journal.taken(owner, request.attempt))

    # --- replicas ---

    async def _linked(self, owner: Owner) -> _Link:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S), self._changed:
                await self._changed.wait_for(lambda: self._links[owner].ready if owner in self._links else owner in self._ended)
                return self._links[owner]
        except (TimeoutError, KeyError):
            raise ReplicaLost(f"{owner.replica_id} cannot be reached") from None

    async def _follow(self) -> None:
        renewed_s = self._clock()
        away = False
        while True:
            try:
                await self._update(await self._controller.serving())
                away = False
            except ReplicaLost as error:  # streams go on without a controller
                if not away:
                    log.warning("the controller does not answer: %s", error)
                away = True
            self._do(self._table.overdue(self._clock()))
            if self._clock() - renewed_s >= RENEW_S:
                renewed_s = self._clock()
                for link in self._links.values():
                    link.port.renew(link.connection)
            await asyncio.sleep(FOLLOW_S)

    async def _update(self, now: ServingNow) -> None:
        self._hash_key = now.hash_key
        lives = {Owner(s.replica_id, s.epoch): s.info for s in now.serving}
        self._asleep = now.asleep is not None
        self._info = next(iter(lives.values()), now.asleep or self._info)
        for owner, link in self._links.items():
            # Only a later life ends a link. One that is merely not named (the controller may have forgotten it) goes on.
            if link.pull is not None and any(o.replica_id == owner.replica_id and o.epoch > owner.epoch for o in lives):
                link.pull.cancel()
        for owner in sorted(lives.keys() - self._links.keys()):
            self._open(owner)
        async with self._changed:
            self._changed.notify_all()

    def _open(self, owner: Owner) -> None:
        try:
            port = self._connect(owner)
        except ReplicaLost:  # since the controller named it
            return
        link = self._links[owner] = _Link(port, f"{self._options.ingress_id}/{uuid.uuid4().hex}")
        self._table.connect(link.connection, owner)
        link.pull = asyncio.create_task(self._pull(owner, link))

    async def _pull(self, owner: Owner, link: _Link) -> None:
        reason, died = f"{owner.replica_id} is gone", True
        try:
            async with aclosing(link.port.frames(link.connection)) as frames:
                async for some in frames:
                    for data in some:
                        self._do(self._table.feed(link.connection, data, self._clock()))
                    if not link.ready:
                        link.ready = True
                        async with self._changed:
                            self._changed.notify_all()
            reason, died = f"{owner.replica_id} has given this reader up", False
        except ReplicaLost as error:
            reason = str(error)
        finally:
            log.info("the frames of %s have ended: %s", owner.replica_id, reason)
            del self._links[owner]
            self._ended.append(owner)
            self._do(self._table.drop(link.connection, reason, self._clock(), died))
            async with self._changed:
                self._changed.notify_all()


class RemoteStream:
    """A `cluster.client.RequestStream` over a journal. One reader.

    Args:
        journal: of the request.
        go_on: carries out what an abort commands.
    """

    def __init__(self, journal: Journal, go_on: Callable[[list[Command]], None]) -> None:
        self.journal = journal
        self._go_on = go_on
        self._changed = asyncio.Event()
        journal.on_change = self._changed.set

    @property
    def waited_s(self) -> float | None:
        """As `RequestStream.waited_s`."""
        return self.journal.waited_s

    def __aiter__(self) -> RemoteStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        journal = self.journal
        while not journal.unread:
            if journal.failure is not None:
                raise journal.failure
            if journal.over:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()  # bounded: by the journal's patience
        return journal.unread.pop(next(iter(journal.unread)))

    async def abort(self, choice: int | None = None) -> None:
        """Ends one choice, or all of them (`RequestStream.abort`)."""
        self._go_on(self.journal.abort(choice))
