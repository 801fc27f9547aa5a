"""A cluster in virtual time, in which everything goes wrong that can: one run for each seed, the same run for the same seed.

Real are the ingress (`RemoteEngineClient` with its journals), the controller's decisions (table, queue, router, admissions) and each
replica from the engine's loop down to the page pool; its model is a hash that reads its context back through the pages. In place of
Ray there is a network that loses, repeats and delays messages, and a fate that kills, restarts and freezes processes. Meanwhile requests
are moved from replica to replica at random.

After each run: every request has ended once, its tokens are those of an undisturbed run, without gap or repeat, no page is held,
nothing is counted anywhere that is not there, and no two processes have ever been the same life of a replica.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from paged_memory import Page, expected_output
from simulated_network import Broken, Faults, Net, Process, VirtualLoop
from simulated_processes import POISON, REPLICAS, ControllerProcess, Ingress, Replica

from quire.cluster.remote_client import RemoteStream
from quire.cluster.succession import Owner
from quire.worker.protocol import FinishReason, GenerateRequest, QuireError, ReplicaLost, SamplingParams
from quire.worker.sequence import sequence_seed

TROUBLE_S = 4.0  # faults come in this time; afterwards the network is sound and processes are let live
SETTLE_S = 120.0  # leases, silences and time-outs have all passed by then
RUN_S = 400.0


@dataclass
class Client:
    """One request, what its client does, and what it got."""

    request: GenerateRequest
    ingress: int
    at_s: float
    leaves_after: int | None  # tokens of choice 0
    got: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, FinishReason] = field(default_factory=dict)
    outcome: str = ""  # "done", "left", "ingress died", or the name of an error
    error: QuireError | None = None

    @property
    def poisoned(self) -> bool:
        return self.request.prompts[0][: len(POISON)] == POISON

    def wanted(self, choice: int) -> list[int]:
        """The tokens of an undisturbed run."""
        p = self.request.params
        seed = sequence_seed(p.seed or 0, choice % p.n)
        return expected_output(self.request.prompts[choice // p.n], seed, p.max_tokens or 0, p.ignore_eos)

    def check(self) -> None:
        """Raises Broken unless it has ended as it must."""
        name = self.request.request_id
        for choice, tokens in self.got.items():
            if tokens != self.wanted(choice)[: len(tokens)]:
                raise Broken(f"{name}/{choice} got {tokens}, wanted {self.wanted(choice)}")
        if self.outcome == "done":
            for choice in self.request.choices:
                if choice not in self.finishes or self.got[choice] != self.wanted(choice):
                    raise Broken(f"{name}/{choice} ended with {self.got.get(choice)} of {self.wanted(choice)}")
        elif self.outcome in ("DeadlineExceeded", "Overloaded"):  # or it would be exceeded, by the measured drain rate
            if self.request.deadline_ms is None or any(self.got.values()):
                raise Broken(f"{name} passed a deadline that it does not have")
        elif self.outcome not in ("left", "ingress died", "RequestFailed"):
            raise Broken(f"{name} ended with {self.outcome!r}: {self.error}")
        if self.poisoned and self.outcome == "done":
            raise Broken(f"{name} is poison and was computed")


class Result(NamedTuple):
    """What a run came to: how requests ended, replicas that died, times that requests lost theirs and went on elsewhere, migrations."""

    outcomes: dict[str, int]
    deaths: int
    lost: int
    resumed: int
    end_s: float  # virtual
    migrations: dict[str, int]  # by outcome


class World:
    """One run."""

    def __init__(self, seed: int, loop: VirtualLoop, verbose: bool = False, lease_s: float = 5.0) -> None:
        self.loop = loop
        self.chance = chance = random.Random(seed)
        self.verbose = verbose
        self.lease_s = lease_s
        self.net = Net(loop, chance, Faults(chance.choice((0, 0.01, 0.05)), chance.choice((0, 0.02, 0.1)), chance.choice((0, 0.02))))
        self.replicas: list[Replica] = []
        self.wires: dict[str, deque[list[Page]]] = {}  # that pages travel on
        self.nonces = count()
        self.migrations: Counter[str] = Counter()
        self.deaths = 0
        self.lives: set[Owner] = set()
        self.takers: dict[tuple[str, int], Owner] = {}  # (request, attempt) -> who took it
        self.controller = ControllerProcess(self)
        self.ingresses = [Ingress(self, number, 0) for number in range(2)]
        self.former: list[Ingress] = []
        self.clients = [self._client(number) for number in range(chance.randint(6, 10))]
        if chance.random() < 0.25:
            poisoned = self.clients[0]
            poisoned.request = GenerateRequest("poison", (POISON,), SamplingParams(max_tokens=5, seed=1, ignore_eos=True))
            poisoned.leaves_after = None

    def note(self, what: str) -> None:
        if self.verbose:
            print(f"{self.loop.time():8.3f} {what}")

    def start_replica(self, replica_id: str, epoch: int) -> Replica:
        owner = Owner(replica_id, epoch)
        if owner in self.lives or any(known.replica_id == replica_id and known.epoch > epoch for known in self.lives):
            raise Broken(f"{owner} is started although it, or a later life, has been")
        self.lives.add(owner)
        self.note(f"start {owner}")
        self.replicas.append(Replica(self, replica_id, epoch))
        return self.replicas[-1]

    async def run(self) -> Result:
        readers = [self.net.spawn(self._read(client)) for client in self.clients]
        fate = self.net.spawn(self._fate())
        moves = [self.net.spawn(self._migrate()) for _ in range(self.chance.choice((0, 10, 30, 60)))]
        ended = asyncio.gather(fate, *readers, *moves)
        await asyncio.wait([ended, self.net.failed], timeout=RUN_S, return_when=asyncio.FIRST_COMPLETED)
        if self.net.failed.done():
            self.net.failed.result()
        if not ended.done():
            raise Broken(f"after {RUN_S:g} s there is no end of {[c.request.request_id for c in self.clients if not c.outcome]}")
        for client in self.clients:
            client.check()
            if client.outcome == "RequestFailed" and not client.poisoned and self.deaths < 3:
                raise Broken(f"{client.request.request_id} was given up after {self.deaths} deaths: {client.error}")
        await self._settle()
        if self.net.failed.done():
            self.net.failed.result()
        recovery = [ingress.client.recovery() for ingress in (*self.ingresses, *self.former)]
        outcomes: dict[str, int] = {}
        for client in self.clients:
            kind = f"{client.outcome}, poison" if client.poisoned else client.outcome
            outcomes[kind] = outcomes.get(kind, 0) + 1
        return Result(
            outcomes, self.deaths, sum(r.lost for r in recovery), sum(r.resumed for r in recovery), self.loop.time(), dict(self.migrations)
        )

    # --- what clients do ---

    def _client(self, number: int) -> Client:
        chance = self.chance
        shared = (7, 8, 9, 10, 11, 12, 13, 14)  # a prefix of two pages
        prompts = tuple(
            (shared if chance.random() < 0.5 else ()) + tuple(chance.randrange(1, 40) for _ in range(chance.randint(1, 8)))
            for _ in range(chance.choice((1, 1, 1, 2)))
        )
        params = SamplingParams(
            n=chance.choice((1, 1, 2)), max_tokens=chance.randint(1, 40), seed=chance.randrange(1, 1000), ignore_eos=chance.random() < 0.5
        )
        request = GenerateRequest(
            f"r{number}",
            prompts,
            params,
            priority=chance.choice((0, 0, 1)),
            tenant=chance.choice(("", "t")),
            deadline_ms=chance.choice((None, None, None, 3000)),
        )
        leaves = chance.choice((None, None, None, 0, 3))
        return Client(request, chance.randrange(2), chance.uniform(0.0, 3.0), leaves)

    async def _read(self, client: Client) -> None:
        await asyncio.sleep(client.at_s)
        ingress = self.ingresses[client.ingress]
        try:
            while ingress.alive and ingress.client.silent_s() == float("inf"):  # noqa: ASYNC110 (virtual time)
                await asyncio.sleep(0.05)
            stream = await ingress.client.submit(client.request)
            await self._outputs(client, stream)
            client.outcome = client.outcome or "done"
        except QuireError as error:
            client.outcome, client.error = type(error).__name__, error
        if not ingress.alive and len(client.finishes) < len(client.request.choices):
            client.outcome = "ingress died"
        self.note(f"{client.request.request_id}: {client.outcome}")

    async def _outputs(self, client: Client, stream: RemoteStream) -> None:
        name = client.request.request_id
        if client.leaves_after == 0:
            await asyncio.sleep(self.chance.uniform(0.0, 0.3))
            await stream.abort()
            client.outcome = "left"
        async for output in stream:
            tokens = client.got.setdefault(output.choice, [])
            if output.choice in client.finishes:
                raise Broken(f"{name}/{output.choice} goes on after its end")
            if output.index != len(tokens):
                raise Broken(f"{name}/{output.choice}: token {output.index} came where {len(tokens)} was due")
            tokens += output.tokens
            if output.finish is not None:
                client.finishes[output.choice] = output.finish
            if client.leaves_after and output.choice == 0 and len(tokens) >= client.leaves_after:
                await stream.abort()
                client.outcome = "left"

    # --- what happens to processes ---

    async def _fate(self) -> None:
        chance = self.chance
        rare = (self._kill_ingress, self._freeze_replica, self._freeze_ingress, self._freeze_controller)
        blows: list[Callable[[], Any]] = [self._kill_replica] * chance.randint(0, 3)
        blows += [self._kill_controller] * chance.choice((0, 0, 1, 2))
        blows += [blow for blow in rare if chance.random() < 0.15]
        for at_s, blow in sorted(((chance.uniform(0.2, TROUBLE_S), blow) for blow in blows), key=lambda b: b[0]):
            await asyncio.sleep(at_s - self.loop.time())
            result = blow()
            if isinstance(result, Awaitable):
                await result
        await asyncio.sleep(TROUBLE_S - self.loop.time())
        self.net.trouble = False

    async def _migrate(self) -> None:
        """Somebody asks a replica to move one of its requests."""
        await asyncio.sleep(self.chance.uniform(0.7, TROUBLE_S + 2.0))
        sources = [r for r in self.replicas if r.alive and r.engine.requests()]
        if not sources:
            return
        source = self.chance.choice(sources)
        others = [r for r in self.replicas if r is not source]  # dead ones, too: who asks may not know
        to = self.chance.choice([r for r in others if r.alive or self.chance.random() < 0.2] or others)
        request_id = self.chance.choice(source.engine.requests()).request_id
        try:
            outcome = await self.net.call(self.controller, source, lambda: source.migrate(request_id, to.peer), 60.0)
        except ReplicaLost:
            outcome = "unanswered"
        self.migrations[outcome] += 1

    def _kill_replica(self) -> None:
        alive = [r for r in self.replicas if r.alive]
        if alive:
            victim = self.chance.choice(alive)
            self.note(f"kill {victim.name}")
            self.deaths += 1
            victim.die()

    async def _kill_controller(self) -> None:
        self.note("kill controller")
        self.controller.die()
        await asyncio.sleep(self.chance.uniform(0.1, 1.0))
        self.controller = ControllerProcess(self)
        self.note("controller is back")

    async def _kill_ingress(self) -> None:
        number = self.chance.randrange(2)
        self.note(f"kill ingress-{number}")
        victim = self.ingresses[number]
        self.former.append(victim)
        self.ingresses[number] = Ingress(self, number, 1)
        await victim.die()

    def _freeze_replica(self) -> None:
        alive = [r for r in self.replicas if r.alive]
        if alive:
            self._freeze(self.chance.choice(alive), self.chance.choice((1.0, 8.0, 45.0)))

    def _freeze_ingress(self) -> None:
        self._freeze(self.chance.choice(self.ingresses), self.chance.choice((1.0, 8.0)))

    def _freeze_controller(self) -> None:
        self._freeze(self.controller, self.chance.choice((1.0, 8.0)))

    def _freeze(self, process: Process, for_s: float) -> None:
        self.note(f"freeze {process.name} for {for_s:g} s")
        process.thaws_s = self.loop.time() + for_s

    # --- the end ---

    async def _settle(self) -> None:
        """Waits until nothing is left of any request. Raises Broken when something stays."""
        until_s = self.loop.time() + SETTLE_S
        while left := self._left():
            if self.loop.time() > until_s:
                raise Broken("; ".join(left))
            await asyncio.sleep(1.0)
        for replica in self.replicas:
            replica.engine.scheduler.check()

    def _left(self) -> list[str]:
        left = []
        alive = [r for r in self.replicas if r.alive]
        if sorted(r.owner.replica_id for r in alive) != [f"replica-{i}" for i in range(REPLICAS)]:
            left.append(f"the replicas are {[r.name for r in alive]}")
        for r in alive:
            counts = r.engine.scheduler.pool.counts()
            if counts.active or counts.reserved or counts.free + counts.cached != counts.total or not r.engine.idle():
                left.append(f"{r.name} holds {counts}")
            if r.loop._migrator.busy:
                left.append(f"{r.name} has migrations")
            books = r.loop._subscriptions
            if books._readings or any(c.requests for c in books._connections.values()):
                left.append(f"{r.name} remembers {books._readings}")
            if len(r.outboxes) != len(self.ingresses) or len(books._connections) != len(self.ingresses):
                left.append(f"{r.name} keeps {len(books._connections)} ingresses")
        controller = self.controller
        if len(controller.serving()) != REPLICAS:
            left.append("the controller misses replicas")
        if waiting := controller.scheduler.waiting():
            left.append(f"{waiting} wait")
        left += [f"tenant {t} uses something" for t in controller.scheduler.tenants() if t.running or t.pages or t.waiting]
        if len(controller.router._ledger):
            left.append("something is on its way, by the ledger")
        for ingress in self.ingresses:
            if ingress.client._table.live() or ingress.client._tasks:
                left.append(f"{ingress.name} has requests")
            if len(ingress.client._links) != REPLICAS:
                left.append(f"{ingress.name} has {len(ingress.client._links)} links")
        return left

    async def close(self) -> None:
        for ingress in (*self.ingresses, *self.former):
            await ingress.die()
        for task in list(self.net.tasks):
            task.cancel()
        await asyncio.gather(*self.net.tasks, return_exceptions=True)


def simulate(seed: int, verbose: bool = False, **world: Any) -> Result:
    """One run.

    Raises:
        Broken: an invariant does not hold (or whatever error a bug raises).
    """
    loop = VirtualLoop()

    async def main() -> Result:
        made = World(seed, loop, verbose, **world)
        try:
            return await made.run()
        finally:
            await made.close()

    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()
