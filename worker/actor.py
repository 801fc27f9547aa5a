"""The Ray actor around one replica: builds the engine, takes requests, sends frames.

The class itself is undecorated and is tested as a plain object; `cluster.ray_gateway` makes an actor of it. Each
concurrency group has an event loop of its own, so that control calls never wait behind requests or frames. Nothing but
primitives crosses: a refusal is a tuple, not a pickled exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import ActorDiedError

from .config import EngineOptions
from .engine import Engine, build_engine
from .engine_loop import EngineLoop
from .logs import start_actor_logging as start_actor_logging  # noqa: PLC0414 (the other actors take it from here)
from .migration_wire import Peer, grammars_of
from .migrator import Mail
from .outbox import Outbox, ReaderGivenUp
from .plan import MemoryBytes
from .post import Post
from .protocol import BadRequest, DeadlineExceeded, GenerateRequest, Overloaded, QuireError, ReplicaLost, pack_events
from .rendezvous import LOOPBACK, address_of, listen
from .tracing import SequenceSpans, Tracing
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .parallel import RankGroup

log = logging.getLogger(__name__)

CONCURRENCY_GROUPS = {"control": 32, "requests": 4096, "frames": 256, "moves": 2048}
FRAME_TIMEOUT_S = 600.0  # heartbeats come twice a second between steps; no single step may last longer
SUBMIT_TIMEOUT_S = 60.0
LOOK_TIMEOUT_S = 60.0  # for what the engine's thread must answer itself, which it does between two steps
MIGRATION_TIMEOUT_S = 600.0  # above all that the migration itself waits for
SWITCH_S = 5e-4  # the engine's thread asks for the interpreter between kernels; Python's 5 ms would be a fifth of a step
NONCE_BYTES = 16
LAST_WORDS_S = 1.5  # between the engine's death and the process's: who asks in this time hears why

T = TypeVar("T")
Reply = tuple[Any, ...]
"""("ok",), ("bad_request", field, message), ("overloaded", message, retry_after_s), ("deadline", message) or ("lost", message)."""


def reply_to(error: QuireError | None) -> Reply:
    """What a call answers, as primitives."""
    match error:
        case None:
            return ("ok",)
        case BadRequest():
            return ("bad_request", error.field, error.message)
        case Overloaded():
            return ("overloaded", error.message, error.retry_after_s)
        case DeadlineExceeded():
            return ("deadline", str(error))
        case _:
            return ("lost", str(error))


def raise_reply(reply: Reply) -> None:
    """The inverse of `reply_to`.

    Raises:
        BadRequest, Overloaded, DeadlineExceeded, ReplicaLost: what the reply says.
    """
    match reply:
        case ("ok",):
            return
        case ("bad_request", str(field), str(message)):
            raise BadRequest(field, message)
        case ("overloaded", str(message), float(retry_after_s)):
            raise Overloaded(message, retry_after_s)
        case ("deadline", str(message)):
            raise DeadlineExceeded(message)
        case ("lost", str(message)):
            raise ReplicaLost(message)
        case _:
            raise ReplicaLost(f"unknown reply {reply!r}")


class ReplicaActor:
    """One life of one replica.

    Args:
        replica_id, epoch: who it is; requests for another epoch are refused.
        options: what to serve.
        hash_key: secret of the page hashes, the same in the whole cluster.
        log_level, log_format: set up the logging of this process; None leaves it alone.
        otlp_endpoint: collector of traces, if there is one.
        across_nodes: its ranks, or other replicas, may be on other machines; else all talk over the loopback interface alone.
        build: makes the engine (in a thread; the actor answers meanwhile); the group of ranks is a keyword when there are several.
        die: ends the process with an exit code.
        place: what this actor is called, and the namespace in which others are; without it no request migrates.
    """

    def __init__(
        self,
        replica_id: str,
        epoch: int,
        options: EngineOptions,
        hash_key: bytes,
        log_level: str | None = None,
        log_format: str = "text",
        across_nodes: bool = False,
        otlp_endpoint: str | None = None,
        build: Callable[..., Engine] = build_engine,
        die: Callable[[int], None] = os._exit,
        place: tuple[str, str] | None = None,
    ) -> None:
        if log_level is not None:
            start_actor_logging(log_level, log_format, replica=replica_id, epoch=epoch)
        self._replica_id = replica_id
        self._epoch = epoch
        self._options = options
        self._otlp_endpoint = otlp_endpoint
        self._hash_key = hash_key
        self._make_engine = build
        self._die = die
        self._loaded = (0, 0)
        self._phases: dict[str, float] = {}
        self._failure: str | None = None
        self._engine: Engine | None = None
        self._memory = MemoryBytes(0, 0)
        self._loop: EngineLoop | None = None
        self._outboxes: dict[str, Outbox] = {}
        self._draining = False
        self._place = place
        self._host: str = ray.util.get_node_ip_address() if across_nodes else LOOPBACK  # type: ignore[no-untyped-call]
        self._listener = listen(self._host) if options.parallel.tp > 1 else None
        self._address = address_of(self._listener) if self._listener else ""
        threading.Thread(target=self._build, name="build", daemon=True).start()

    @ray.method(concurrency_group="control")
    async def report(self) -> dict[str, Any]:
        """All there is to know, as primitives: what the controller polls, and rebuilds its state from.

        Keys: replica_id, epoch, pid, node; loaded, to_load (weights so far, in all); phases (name -> seconds); failure (None or
        why this replica never became ready, or died); step_s (how long the step has taken so far that is being computed now);
        info and stats (fields in order; None until ready); draining (`drain`); weight_bytes and pool_bytes (of rank 0; 0 until ready).
        """
        loop = self._loop
        return {
            "replica_id": self._replica_id,
            "epoch": self._epoch,
            "pid": os.getpid(),
            "node": os.uname().nodename,
            "loaded": self._loaded[0],
            "to_load": self._loaded[1],
            "phases": dict(self._phases),
            "failure": self._failure,
            "step_s": loop.step_s() if loop else 0.0,
            "info": tuple(self._engine.info) if self._engine and loop else None,
            "stats": tuple(loop.stats()) if loop else None,
            "draining": self._draining,
            "weight_bytes": self._memory.weights,
            "pool_bytes": self._memory.pool,
        }

    @ray.method(concurrency_group="control")
    async def rendezvous(self) -> str:
        """The "host:port" at which the other ranks of this replica join; "" when it has none."""
        return self._address

    @ray.method(concurrency_group="control")
    async def set_log_level(self, level: str) -> None:
        """How much this process logs from now on."""
        logging.getLogger().setLevel(level.upper())

    @ray.method(concurrency_group="control")
    async def events(self, after: int | None, wait_s: float) -> bytes:
        """What has changed since event `after` (`pack_events`): as soon as that is anything but the load, after `wait_s` at the latest.

        With None, or a number that the log no longer reaches back to, everything that there is, at once. The answer comes between two
        steps, so a long step delays it.

        Raises:
            ReplicaLost: the engine is not ready, or died.
        """
        loop = self._ready_loop()
        try:
            return pack_events(await asyncio.wait_for(asyncio.wrap_future(loop.events(after, wait=True)), wait_s))
        except TimeoutError:
            return pack_events(await self._look(loop.events(after, wait=False)))

    @ray.method(concurrency_group="control")
    async def requests(self) -> list[tuple[Any, ...]]:
        """The fields of `LiveRequest` of every request that lives, in the order of arrival.

        Raises:
            ReplicaLost: as `events`.
        """
        return [tuple(r) for r in await self._look(self._ready_loop().requests())]

    @ray.method(concurrency_group="control")
    async def page_maps(self) -> tuple[bytes, bytes]:
        """One byte for each page of the device, and of host memory: f free, a active, s shared, c cached, r reserved, m read by a move.

        Raises:
            ReplicaLost: as `events`.
        """
        return await self._look(self._ready_loop().page_maps())

    @ray.method(concurrency_group="control")
    async def decisions(self) -> list[dict[str, Any]]:
        """What was done lately when pages had run out: fields of `worker.decisions.Record`, oldest first.

        Raises:
            ReplicaLost: as `events`.
        """
        return await self._look(self._ready_loop().decisions())

    @ray.method(concurrency_group="moves")
    async def migrate(self, request_id: str, actor: str, replica_id: str, epoch: int, fill: bool = False) -> tuple[Any, ...]:
        """Moves a request to the replica `replica_id` in `epoch`, whose actor is called `actor`; with `fill` copies its pages there.

        Answers when it is over, within MIGRATION_TIMEOUT_S, with the fields of `MigrationResult`.

        Raises:
            ReplicaLost: this replica is not ready, or died meanwhile.
        """
        answer = self._ready_loop().migrate(request_id, Peer(actor, replica_id, epoch), fill)
        result = await asyncio.wait_for(asyncio.wrap_future(answer), MIGRATION_TIMEOUT_S)
        return tuple(result)

    @ray.method(concurrency_group="control")
    async def relieve(self, actor: str, replica_id: str, epoch: int, pages: int) -> None:
        """A victim of a lack of pages may go to that replica, which has so many to spare; nowhere, when `actor` is empty."""
        if self._loop is not None:
            self._loop.relief(Peer(actor, replica_id, epoch) if actor else None, pages)

    @ray.method(concurrency_group="control")
    async def drain(self, on: bool) -> None:
        """This replica is to be empty, or no longer. It remembers that for a controller that begins anew."""
        self._draining = on
        if self._loop is not None:
            self._loop.drain(on)

    @ray.method(concurrency_group="control")
    async def migration(self, data: bytes) -> None:
        """A message of another replica (`migration_wire`). Answers come as messages of their own."""
        engine, loop = self._engine, self._loop
        if engine is None or loop is None:
            return
        for grammar in grammars_of(data):  # those who run here do not wait until it is compiled
            with contextlib.suppress(BadRequest):  # its first token will tell
                await asyncio.to_thread(engine.runner.prepare, grammar)
        loop.heard(data)

    @ray.method(concurrency_group="control")
    async def renew(self, connection: str) -> bool:
        """The ingress behind this connection is alive; False when it has been given up, or never was."""
        outbox = self._outboxes.get(connection)
        if outbox is not None:
            outbox.renew()
        return outbox is not None

    @ray.method(concurrency_group="requests")
    async def submit(self, connection: str, epoch: int, data: bytes) -> Reply:
        """Starts the request in `data` (`GenerateRequest.to_wire`); its outputs go to `connection`."""
        if self._loop is None or epoch != self._epoch:
            return reply_to(ReplicaLost(f"{self._replica_id} is not ready in epoch {epoch}"))
        try:
            request = GenerateRequest.from_wire(data)
            if self._engine is not None and request.params.grammar:  # those who run do not wait until it is compiled
                await asyncio.to_thread(self._engine.prepare, request)
            answer = self._loop.submit_nowait(connection, request)
            await asyncio.wait_for(asyncio.wrap_future(answer), SUBMIT_TIMEOUT_S)
        except QuireError as error:
            return reply_to(error)
        except TimeoutError:
            return reply_to(ReplicaLost(f"{self._replica_id} did not take the request within {SUBMIT_TIMEOUT_S:g} s"))
        return reply_to(None)

    @ray.method(concurrency_group="requests")
    async def abort(self, epoch: int, request_id: str, choice: int | None, attempt: int = 0) -> None:
        """Ends a request, or one choice of it, before the next step. Unknown ones, and other attempts, are ignored."""
        if self._loop is not None and epoch == self._epoch:
            self._loop.abort(request_id, choice, attempt)

    @ray.method(concurrency_group="frames")
    async def frames(self, connection: str) -> AsyncGenerator[list[bytes], None]:
        """The frames for one connection, from number 0 on, for as long as it is read; several at once when the reader is slow.

        When the reading ends, the connection's requests are aborted. They end by themselves when the reader was given up (`Outbox`).

        Raises:
            ReplicaLost: the engine is not ready or died, or the name is in use.
        """
        if self._loop is None or connection in self._outboxes:
            raise ReplicaLost(f"{self._replica_id} cannot serve connection {connection}")
        engine_loop = self._loop
        leave = partial(engine_loop.unsubscribe, connection)
        outbox = self._outboxes[connection] = Outbox(asyncio.get_running_loop(), time.monotonic, leave)
        engine_loop.subscribe(connection, outbox.put)
        try:
            while True:
                if self._failure is not None:
                    raise ReplicaLost(self._failure)
                yield await outbox.take(FRAME_TIMEOUT_S)
        except ReaderGivenUp as reason:
            log.warning("connection %s is given up: %s", connection, reason)
        finally:
            leave()
            del self._outboxes[connection]

    def _ready_loop(self) -> EngineLoop:
        if self._loop is None:
            raise ReplicaLost(f"{self._replica_id} is not ready")
        return self._loop

    async def _look(self, answer: Future[T]) -> T:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), LOOK_TIMEOUT_S)
        except TimeoutError:
            raise ReplicaLost(f"{self._replica_id} did not answer within {LOOK_TIMEOUT_S:g} s") from None

    def _build(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        started_s = time.monotonic()
        try:
            import torch  # noqa: F401  (timed on its own: it is most of a small model's start)

            self._phases["import torch"] = time.monotonic() - started_s
            loading_s = time.monotonic()
            ranks = {"group": self._lead(self._listener)} if self._listener else {}
            self._engine = self._make_engine(self._options, self._hash_key, self._progress, host=self._host, **ranks)
            self._memory = self._engine.runner.memory_bytes()
            self._phases["load model"] = time.monotonic() - loading_s - sum(self._engine.startup_s.values())
            self._phases |= self._engine.startup_s
            if self._otlp_endpoint is not None:
                self._engine.spans = SequenceSpans(Tracing(self._otlp_endpoint, {"service.instance.id": self._replica_id}))
            loop = EngineLoop(self._engine, self._replica_id, self._epoch, on_death=self._died, mail=self._mail())
            loop.drain(self._draining)
            loop.start()
            self._loop = loop
            Watchdog(self._options.parallel.step_timeout_s, loop.step_s, self._hung)
        except Exception as error:  # the process outlives it, to say why
            log.debug("building the engine failed", exc_info=True)
            self._failure = str(error) or repr(error)

    def _mail(self) -> Mail | None:
        if self._place is None:
            return None
        actor, namespace = self._place
        post = Post(partial(_call_of, namespace), self._peer_lost)
        me = Peer(actor, self._replica_id, self._epoch)
        return Mail(me, post.send, partial(secrets.token_hex, NONCE_BYTES), self._options.migration)

    def _peer_lost(self, actor: str) -> None:
        if self._loop is not None:
            self._loop.peer_lost(actor)

    def _lead(self, listener: socket.socket) -> RankGroup:
        from .backend import device_of
        from .parallel import lead

        parallel, device = self._options.parallel, device_of(self._options.model)
        return lead(listener, parallel.tp, parallel.step_timeout_s, self._hung, device)

    def _hung(self, why: str) -> None:
        self._died(TimeoutError(why))

    def _progress(self, done: int, total: int) -> None:
        self._loaded = (done, total)

    def _died(self, error: BaseException) -> None:
        self._failure = f"the engine died: {error!r}"
        log.critical("%s: %s", self._replica_id, self._failure)
        for outbox in list(self._outboxes.values()):
            outbox.close(self._failure)
        time.sleep(LAST_WORDS_S)  # this is the engine's thread, or a watcher's: nothing runs on it any more
        logging.shutdown()
        self._die(1)


def _call_of(namespace: str, actor: str) -> Callable[[bytes], Future[None]]:
    """`ReplicaActor.migration` of another replica (`post.Post`)."""
    try:
        handle: Any = ray.get_actor(actor, namespace)
    except ValueError:
        raise ReplicaLost(f"{actor} is gone") from None

    def call(data: bytes) -> Future[None]:
        told: Future[None] = Future()
        handle.migration.remote(data).future().add_done_callback(partial(_pass_on, told))
        return told

    return call


def _pass_on(told: Future[None], called: Future[None]) -> None:
    error = called.exception()
    if isinstance(error, ActorDiedError):
        told.set_exception(ReplicaLost(str(error)))
    elif error is not None:
        told.set_exception(error)
    else:
        told.set_result(None)
