"""Replicas of the hash model that migrate requests to each other, on a clock and a network that the test owns, and their ingress.

The ingress follows a stream as the real one does, in short: whoever says that it took over is the owner, tokens are put in order by their
index, and when the owner is lost the request is submitted elsewhere as a later attempt, with the tokens that are there.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from paged_memory import expected_output, hash_engine

from quire.worker.config import MigrationOptions
from quire.worker.engine_loop import EngineLoop
from quire.worker.migration import SourceMigration
from quire.worker.migration_destination import DestinationMigration
from quire.worker.migration_wire import Envelope, Peer, unpack_message
from quire.worker.migrator import Mail
from quire.worker.protocol import FinishReason, GenerateRequest, MigrationResult, QuireError, SamplingParams, SequenceOutput, unpack_frame
from quire.worker.sequence import sequence_seed

PAGE = 4


@dataclass
class Trouble:
    """What the network does with a message."""

    lost: float = 0.0
    doubled: float = 0.0
    longest_s: float = 0.0


@dataclass
class Stream:
    """One request, as its ingress sees it."""

    request: GenerateRequest
    owner: str
    attempt: int = 0
    tokens: dict[int, dict[int, int]] = field(default_factory=dict)  # choice -> index -> token
    ended: dict[int, FinishReason] = field(default_factory=dict)
    resumed: int = 0

    def have(self, choice: int) -> list[int]:
        """The tokens from the first on, as far as they are there without a gap."""
        found, tokens = self.tokens.get(choice, {}), []
        while len(tokens) in found:
            tokens.append(found[len(tokens)])
        return tokens

    @property
    def over(self) -> bool:
        return len(self.ended) == len(self.request.choices)


class Replica:
    """An engine loop that is turned by hand."""

    def __init__(self, world: World, name: str, **engine: object) -> None:
        self.name = name
        self.peer = Peer(f"{name}@1", name, 1)
        self.engine = hash_engine(wires=world.wires, clock=lambda: world.now_s, **engine)  # type: ignore[arg-type]
        mail = Mail(self.peer, lambda actor, data: world.post(self, actor, data), world.nonce, world.options)
        self.loop = EngineLoop(self.engine, name, 1, clock=lambda: world.now_s, mail=mail)
        self.alive = True
        self.loop.subscribe("ingress/1", lambda data: world.read(self, data))

    def turn(self) -> None:
        self.loop.turn()
        self.engine.scheduler.check()

    @property
    def migrator(self):
        return self.loop._migrator

    def leaving(self) -> list[SourceMigration]:
        return [m for m, _ in self.migrator._leaving.values()]

    def arriving(self) -> list[DestinationMigration]:
        return [m for m, _ in self.migrator._arriving.values()]


class World:
    """Some replicas.

    Args:
        seed: of all that happens by chance.
        names: of the replicas.
        trouble: of the network.
        engine: as `hash_engine`.
    """

    def __init__(self, seed: int = 0, names: str = "AB", trouble: Trouble | None = None, options: MigrationOptions | None = None, **engine):
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.trouble = trouble or Trouble()
        self.options = options or MigrationOptions(migration_bandwidth=10**9)
        self.wires: dict[str, deque] = {}
        self.posted: list[tuple[float, str, bytes]] = []
        self.said: list[Envelope] = []
        self.streams: dict[str, Stream] = {}
        self.results: list[tuple[str, MigrationResult]] = []
        self._nonces = 0
        self.replicas = {name: Replica(self, name, **({"pages": 64, "page_size": PAGE} | engine)) for name in names}
        self.on_turn: Callable[[], None] = lambda: None

    def __getitem__(self, name: str) -> Replica:
        return self.replicas[name]

    def nonce(self) -> str:
        self._nonces += 1
        return str(self._nonces)

    # --- the network ---

    def post(self, sender: Replica, actor: str, data: bytes) -> None:
        self.said.append(unpack_message(data))
        if self.random.random() < self.trouble.lost:
            return
        for _ in range(2 if self.random.random() < self.trouble.doubled else 1):
            self.posted.append((self.now_s + self.random.random() * self.trouble.longest_s, actor, data))

    def _deliver(self) -> None:
        due = [p for p in self.posted if p[0] <= self.now_s]
        self.posted = [p for p in self.posted if p[0] > self.now_s]
        for _, actor, data in due:
            replica = self.replicas[actor.partition("@")[0]]
            if replica.alive:
                replica.loop.heard(data)

    # --- what happens ---

    def turn(self, names: str | None = None, seconds: float = 0.01) -> None:
        """One step of each replica, or of those named."""
        self.now_s += seconds
        self._deliver()
        for name, replica in self.replicas.items():
            if replica.alive and (names is None or name in names):
                replica.turn()
        self.on_turn()

    def until(self, done: Callable[[], bool], turns: int = 3000) -> None:
        for _ in range(turns):
            if done():
                return
            self.turn()
        raise AssertionError(
            f"not done after {turns} turns: {self.results} {[m.state for r in self.replicas.values() for m in r.leaving()]}"
        )

    def migrate(self, request_id: str, source: str, to: str, fill: bool = False) -> None:
        answer = self[source].loop.migrate(request_id, self[to].peer, fill)
        answer.add_done_callback(lambda f: self.results.append((request_id, f.result())))

    def kill(self, name: str, told: bool = True) -> None:
        """A replica dies; the ingress hears of it, and with `told` the other replicas do, when next they call it."""
        self[name].alive = False
        for other in self.replicas.values() if told else ():
            other.loop.peer_lost(self[name].peer.actor)
        for stream in self.streams.values():
            gap = any(max(t, default=-1) >= len(stream.have(c)) for c, t in stream.tokens.items())
            if not stream.over and (stream.owner == name or gap):
                self.resume(stream)

    # --- the ingress ---

    def submit(self, to: str, name: str, prompt, **params) -> Stream:
        full = SamplingParams(**({"max_tokens": 24, "ignore_eos": True, "seed": 7} | params))
        prompts = tuple(map(tuple, prompt)) if isinstance(prompt[0], list | tuple) else (tuple(prompt),)
        request = GenerateRequest(name, prompts, full)
        stream = self.streams[name] = Stream(request, to)
        self[to].loop.submit_nowait("ingress/1", request)
        return stream

    def resume(self, stream: Stream) -> None:
        """As a later attempt, at some replica that is alive."""
        stream.attempt += 1
        stream.resumed += 1
        stream.tokens = {choice: dict(enumerate(stream.have(choice))) for choice in stream.request.choices}
        have = {c: tuple(stream.have(c)) for c in stream.request.choices if c not in stream.ended}
        stream.owner = self.random.choice([n for n, r in self.replicas.items() if r.alive])
        request = replace(stream.request, attempt=stream.attempt, resume=have)
        answer = self[stream.owner].loop.submit_nowait("ingress/1", request)
        answer.add_done_callback(lambda f: self._refused(stream, f.exception()))

    def _refused(self, stream: Stream, error: BaseException | None) -> None:
        if error is not None:
            assert isinstance(error, QuireError), error
            self.resume(stream)

    def read(self, replica: Replica, data: bytes) -> None:
        for output in unpack_frame(data).outputs:
            self._take(replica, self.streams[output.request_id], output)

    def _take(self, replica: Replica, stream: Stream, output: SequenceOutput) -> None:
        stale = output.attempt != stream.attempt or output.choice in stream.ended
        if stale:
            if output.finish is None:
                replica.loop.abort(output.request_id, None if output.attempt != stream.attempt else output.choice, output.attempt)
            return
        if output.peer is not None and output.finish is None:
            stream.owner = replica.name
        if output.finish is FinishReason.MOVED:
            if replica.name == stream.owner:
                stream.owner = output.peer[0]
                if not self[stream.owner].alive:
                    self.resume(stream)
            return
        if output.finish is FinishReason.ABORT:
            if replica.name == stream.owner:
                self.resume(stream)
            return
        known = stream.tokens.setdefault(output.choice, {})
        for i, token in enumerate(output.tokens, output.index):
            assert known.setdefault(i, token) == token
        if output.finish is not None:
            stream.ended[output.choice] = output.finish

    # --- what must hold in the end ---

    def settle(self) -> None:
        """Everything comes to its end, and nobody keeps anything."""
        self.until(lambda: all(s.over for s in self.streams.values()))
        for stream in self.streams.values():
            self.expect(stream)
        for _ in range(100):
            self.turn(seconds=1.0)
        for replica in self.replicas.values():
            if replica.alive:
                assert_idle(replica)

    def expect(self, stream: Stream) -> None:
        """Its tokens are those of an undisturbed run."""
        params = stream.request.params
        for choice in stream.request.choices:
            i, k = divmod(choice, params.n)
            seed = sequence_seed(params.seed, k)
            undisturbed = expected_output(stream.request.prompts[i], seed, params.max_tokens, params.ignore_eos)
            assert stream.have(choice) == undisturbed, (stream.request.request_id, choice)


def assert_idle(replica: Replica) -> None:
    scheduler = replica.engine.scheduler
    pages = scheduler.pool.counts()
    assert (pages.active, pages.reserved) == (0, 0), f"{replica.name}: {pages}"
    assert scheduler.idle()
    assert (scheduler.frozen, scheduler.pins, scheduler.awaited, scheduler.moves.under_way()) == ([], {}, 0, False)
    assert not replica.engine.runner.open_links
    assert not replica.migrator.busy
    assert not replica.loop._subscriptions._readings
