"""The migrations of one replica, out and in: what it offers, what it takes, and which message belongs to which. Pure but for its clock.

It is called on the engine's thread: `advance` before each step, `hear` for each message, and by page moves that have ended. At most
`max_migrations` leave at a time, in the order in which they were asked for, and as many may arrive.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .arrival import Arrivals, Owner, Streams
from .berth import Berth, Unfit
from .cargo import Cargo, PrefixCargo, RequestCargo
from .config import MigrationOptions
from .engine import Engine
from .migration import Budget, Shipping, SourceMigration
from .migration_destination import DestinationMigration
from .migration_wire import (
    Abort,
    Accept,
    Commit,
    Envelope,
    Message,
    Offer,
    Pages,
    Peer,
    pack_message,
    unpack_message,
)
from .pressure import Relief
from .protocol import MigrationResult, Outcome, SamplingParams, SequenceOutput
from .sequence import Request
from .strict_wire import BadMessage

log = logging.getLogger(__name__)

MAX_QUEUED = 1024  # migrations that wait for others to end
RECORD_S = 60.0  # for which it is known how a migration ended

Done = Callable[[MigrationResult], None]


class Mail(NamedTuple):
    """How this replica is reached by others, and reaches them.

    Attributes:
        me: what others call it by.
        send: gives a message to the replica whose actor has that name, on the engine's thread, without waiting; it may be lost.
        nonce: a name that nobody has used before, in the whole cluster.
        options: how much of it at once.
    """

    me: Peer
    send: Callable[[str, bytes], None]
    nonce: Callable[[], str]
    options: MigrationOptions

    def migrator(self, engine: Engine, streams: Streams, clock: Callable[[], float]) -> Migrator:
        """Of a replica that is reached like this."""
        return Migrator(engine, self, streams, clock)


class _Asked(NamedTuple):
    request_id: str
    to: Peer
    fill: bool
    done: Done


class Migrator:
    """Moves requests between this engine and others.

    Args:
        engine: whose.
        mail: to the others.
        streams: who reads what.
        clock: seconds, monotonic; the engine's.
    """

    def __init__(self, engine: Engine, mail: Mail, streams: Streams, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._me, self._send, self._nonce, options = mail
        self._streams = streams
        self._at_once = options.max_migrations
        self._shipping = Shipping(engine.scheduler.moves, engine.page_bytes, Budget(options.migration_bandwidth), streams.tell)
        self._clock = clock
        self._asked: deque[_Asked] = deque()
        self._leaving: dict[str, tuple[SourceMigration, list[Done]]] = {}
        self._arriving: dict[str, tuple[DestinationMigration, Peer]] = {}
        self._over: dict[str, tuple[SourceMigration | DestinationMigration, float]] = {}  # oldest first, with the time of its end
        self._relief: Peer | None = None
        self._draining = False

    @property
    def busy(self) -> bool:
        """Whether something may have to be done although nothing comes in."""
        return bool(self._asked or self._leaving or self._arriving)

    def migrate(self, request_id: str, to: Peer, fill: bool, done: Done) -> None:
        """Move a request, or copy its pages. `done` is called when that is over, perhaps at once."""
        if to.replica_id == self._me.replica_id:
            done(MigrationResult(Outcome.REFUSED, reason="it is there already"))
        elif len(self._asked) >= MAX_QUEUED:
            done(MigrationResult(Outcome.REFUSED, reason=f"{MAX_QUEUED} migrations wait already"))
        else:
            self._asked.append(_Asked(request_id, to, fill, done))
            self.advance()

    def advance(self) -> None:
        """Between two steps."""
        now_s = self._clock()
        for migration, _ in list(self._leaving.values()):
            migration.advance(now_s)
        for arrival, _ in list(self._arriving.values()):
            arrival.advance(now_s)
        self._relieve()
        self._tidy(now_s)
        while self._asked and len(self._leaving) < self._at_once:
            self._begin(self._asked.popleft(), now_s)

    def hear(self, data: bytes) -> None:
        """A message from another replica. What is none is noted and forgotten."""
        try:
            envelope = unpack_message(data)
        except BadMessage as error:
            log.warning("a message of another replica cannot be read: %s", error)
            return
        now_s, name, message = self._clock(), envelope.migration, envelope.message
        if name in self._leaving:
            self._leaving[name][0].hear(message, now_s)
        elif name in self._arriving:
            self._arriving[name][0].hear(message, now_s)
        elif name in self._over:
            self._over[name][0].hear(message, now_s)
        elif isinstance(message, Offer):
            self._consider(envelope.sender, name, message, now_s)
        elif isinstance(message, Commit | Pages):
            self._say(envelope.sender, name, Abort("nothing is known of it here"))
        self.advance()

    def peer_died(self, actor: str) -> None:
        """The replica whose actor had that name is dead for good."""
        for migration, _ in list(self._leaving.values()):
            if migration.to.actor == actor:
                migration.peer_died()
        for arrival, source in list(self._arriving.values()):
            if source.actor == actor:
                arrival.source_died()
        self.advance()

    def drain(self, on: bool) -> None:
        """Nothing arrives any more from now on, but what is on its way; or that is over."""
        self._draining = on

    def set_relief(self, to: Peer | None, pages: int) -> None:
        """From now on a victim of a lack of pages may go to `to`, which has so many to spare; with None it may not."""
        self._relief = to
        self._engine.scheduler.relief = None if to is None else Relief(to.replica_id, pages)

    def abandon(self) -> None:
        """The engine is gone: nobody is left waiting for an answer. Whoever hears nothing any more finds out by its lease."""
        lost = MigrationResult(Outcome.LOST, reason="the source has died")
        for asked in self._asked:
            asked.done(lost)
        for _, waiting in self._leaving.values():
            for done in waiting:
                done(lost)
        self._asked.clear()
        self._leaving.clear()

    # --- leaving ---

    def _relieve(self) -> None:
        """See to those whom a lack of pages sends away."""
        for request_id in self._engine.scheduler.take_emigrants():
            done = partial(self._relieved, request_id)
            under_way = [waiting for migration, waiting in self._leaving.values() if migration.request_id == request_id]
            if under_way:
                under_way[0].append(done)
            elif self._relief is None:
                self._engine.scheduler.stays(request_id)
            else:
                self._asked.appendleft(_Asked(request_id, self._relief, False, done))

    def _relieved(self, request_id: str, result: MigrationResult) -> None:
        if result.outcome is not Outcome.MOVED:
            self._engine.scheduler.stays(request_id)

    def _begin(self, asked: _Asked, now_s: float) -> None:
        request_id = asked.request_id
        request, owner = self._engine.scheduler.request(request_id), self._streams.owner(request_id)
        if request is None or owner is None:
            asked.done(MigrationResult(Outcome.REFUSED, reason=f"no request {request_id!r} is alive here"))
            return
        if any(migration.request_id == request_id for migration, _ in self._leaving.values()):
            asked.done(MigrationResult(Outcome.REFUSED, reason="it is on its way already"))
            return
        name = f"{self._me.actor}/{self._nonce()}"
        made = self._fill_of(name, request, owner) if asked.fill else self._move_of(request, owner, now_s)
        if made is None:
            asked.done(MigrationResult(Outcome.REFUSED, reason="it has no full page yet"))
            return
        cargo, offer = made
        say = partial(self._say, asked.to, name)
        migration = SourceMigration(name, request_id, asked.to, cargo, self._shipping, say)
        self._leaving[name] = migration, [asked.done]
        migration.start(offer, now_s)

    def _move_of(self, request: Request, owner: Owner, now_s: float) -> tuple[Cargo, Offer]:
        until_s = self._engine.scheduler.waits_until_s(request)
        left_ms = None if until_s is None else max(int((until_s - now_s) * 1000), 0)
        sequences = tuple(self._engine.snapshot(s, owner.attempt) for s in request.sequences.values())
        running = [s for s in request.sequences.values() if s.pages]
        return RequestCargo(self._engine.scheduler, request), Offer(
            self._engine.page_format,
            self._engine.info.tp,
            request.tenant,
            owner.ingress,
            request.trace,
            left_ms,
            request.prompt_tokens,
            request.ended_tokens,
            sequences,
            len({page for s in running for page in s.pages}),
            len(running),
        )

    def _fill_of(self, name: str, request: Request, owner: Owner) -> tuple[Cargo, Offer] | None:
        """Of the sequence that has the most."""
        s = max(request.sequences.values(), key=lambda s: s.num_computed)
        full = s.num_computed // self._engine.info.page_size if s.pages else 0
        if not full:
            return None
        snapshot = self._engine.snapshot(s, owner.attempt)
        tokens = tuple(s.tokens[: full * self._engine.info.page_size])
        snapshot = snapshot._replace(choice=0, tokens=tokens, prompt_len=len(tokens), params=SamplingParams(), num_computed=len(tokens))
        cargo = PrefixCargo(self._engine.scheduler, name, s.pages[:full])
        return cargo, Offer(self._engine.page_format, self._engine.info.tp, request.tenant, "", "", None, 0, 0, (snapshot,), full, 0)

    # --- arriving ---

    def _consider(self, source: Peer, name: str, offer: Offer, now_s: float) -> None:
        scheduler = self._engine.scheduler
        try:
            if offer.format != self._engine.page_format:
                raise Unfit(f"its pages are {offer.format}, not {self._engine.page_format}")
            if self._draining:
                raise Unfit("it is to be empty")
            if offer.pages and not self._engine.runner.addresses():
                raise Unfit("it takes no pages from others")
            if len(self._arriving) >= self._at_once:
                raise Unfit(f"{len(self._arriving)} requests arrive already")
            berth = Berth(scheduler, name, offer, Arrivals(self._engine, self._streams, source))
        except Unfit as error:
            self._say(source, name, Abort(str(error)))
            return
        accept = Accept(berth.found, self._engine.info.tp, self._engine.runner.addresses())
        say = partial(self._say, source, name)
        self._arriving[name] = DestinationMigration(name, offer, berth, scheduler.moves, accept, say, now_s), source

    # --- both ---

    def _tell_reader(self, outputs: list[SequenceOutput]) -> None:
        self._streams.tell(self._engine.traced(outputs))

    def _say(self, to: Peer, name: str, message: Message) -> None:
        self._send(to.actor, pack_message(Envelope(self._me, name, message)))

    def _tidy(self, now_s: float) -> None:
        """Take out what is over, and tell who asked."""
        for name, (migration, waiting) in list(self._leaving.items()):
            if migration.result is not None:
                del self._leaving[name]
                self._over[name] = migration, now_s
                if migration.result.outcome is Outcome.MOVED:
                    self._engine.scheduler.migrated(migration.result.pages, migration.took_s)
                for done in waiting:
                    done(migration.result)
        for name, (arrival, _) in list(self._arriving.items()):
            if arrival.over:
                del self._arriving[name]
                self._over[name] = arrival, now_s
        while self._over and now_s - next(iter(self._over.values()))[1] > RECORD_S:
            del self._over[next(iter(self._over))]
