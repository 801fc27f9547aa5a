"""The processes of a simulated cluster: real classes inside, `simulated_network` in place of Ray around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from paged_memory import PagedMemory, hash_engine
from simulated_network import CALL_S, Broken, Channel, Gone, Process

from quire.cluster.admissions import ADMIT_POLL_S, Admissions
from quire.cluster.controller import Controller, Report
from quire.cluster.global_scheduler import GlobalScheduler, QueueLimits
from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.remote_client import IngressOptions, RemoteEngineClient, Serving, ServingNow
from quire.cluster.routing import Router
from quire.cluster.succession import Owner
from quire.cluster.tenants import TenantTable
from quire.worker.config import MigrationOptions
from quire.worker.engine_loop import EngineLoop
from quire.worker.migration_wire import Peer
from quire.worker.migrator import Mail
from quire.worker.outbox import Outbox, ReaderGivenUp
from quire.worker.plan import StepPlan, StepResult
from quire.worker.protocol import EventFrame, GenerateRequest, QuireError, ReplicaLost, pack_events, unpack_events

if TYPE_CHECKING:
    from fault_simulation import World

REPLICAS = 3
KEY = b"key"
POISON = (49, 48, 49)  # a prompt that begins so kills whoever computes it
STEP_S, TICK_S, POLL_S = 0.02, 0.1, 0.15
START_S = 0.5  # from a process's start to its readiness
EVENT_WAIT_S = 0.5


class Killed(BaseException):
    """What a process dies of."""


class PoisonedMemory(PagedMemory):
    """The hash model, and a prompt that kills it."""

    def run(self, plan: StepPlan) -> StepResult:
        doomed = {new.seq for new in plan.new if new.tokens[: len(POISON)] == POISON}
        doomed |= {row.seq for row in plan.rows if row.seq in self.known and tuple(self.known[row.seq].tokens[: len(POISON)]) == POISON}
        if doomed & {row.seq for row in plan.rows}:
            raise Killed("poison")
        return super().run(plan)


class Replica(Process):
    """One life of one replica."""

    def __init__(self, world: World, replica_id: str, epoch: int) -> None:
        super().__init__(f"{replica_id}.{epoch}")
        self.owner = Owner(replica_id, epoch)
        self.world = world
        self.engine = hash_engine(pages=24, page_size=4, max_batch_tokens=12, max_running=4, max_waiting=8, clock=world.loop.time)
        self.engine.runner = PoisonedMemory(24, 4, wires=world.wires)
        self.peer = Peer(self.name, replica_id, epoch)
        mail = Mail(self.peer, self._post, lambda: f"m{next(world.nonces)}", MigrationOptions(max_migrations=2))
        self.loop = EngineLoop(self.engine, replica_id, epoch, clock=world.loop.time, mail=mail)
        self.ready_s = world.loop.time() + START_S
        self.outboxes: dict[str, Outbox] = {}
        self.nudged = asyncio.Event()
        self.task = world.net.spawn(self._run())

    def die(self) -> None:
        self.alive = False
        self.task.cancel()
        for outbox in self.outboxes.values():
            outbox.close(f"{self.name} has died")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(max(self.thaws_s - self.world.loop.time(), 0.0))
            self.nudged.clear()
            try:
                self.loop.turn()
            except Killed:
                self.world.note(f"{self.name} dies of poison")
                self.world.deaths += 1
                self.die()
                return
            self.engine.scheduler.check()
            if not self.engine.idle() or self.loop._migrator.busy:
                await asyncio.sleep(STEP_S)
            else:
                try:
                    async with asyncio.timeout(0.5):
                        await self.nudged.wait()
                except TimeoutError:
                    pass

    # what others call, as `worker.actor.ReplicaActor` answers it

    def report(self) -> Report:
        ready = self.world.loop.time() >= self.ready_s
        info = self.engine.info if ready else None
        return Report(*self.owner, 0, "", 0, 0, {}, None, info, self.loop.stats() if ready else None)

    async def events(self, after: int | None) -> bytes:
        news = self._asked(self.loop.events(after, wait=True))
        try:
            async with asyncio.timeout(EVENT_WAIT_S):
                return pack_events(await asyncio.wrap_future(news))
        except TimeoutError:
            return pack_events(await asyncio.wrap_future(self._asked(self.loop.events(after, wait=False))))

    def _asked(self, future: Any) -> Any:
        self.nudged.set()
        return future

    async def submit(self, connection: str, data: bytes) -> None:
        request = GenerateRequest.from_wire(data)
        await asyncio.wrap_future(self._asked(self.loop.submit_nowait(connection, request)))
        owner = self.world.takers.setdefault((request.request_id, request.attempt), self.owner)
        if owner != self.owner:
            raise Broken(f"attempt {request.attempt} of {request.request_id} has two owners: {owner} and {self.owner}")

    async def migrate(self, request_id: str, to: Peer) -> str:
        result = await asyncio.wrap_future(self._asked(self.loop.migrate(request_id, to)))
        self.world.note(f"{request_id}: {self.name} -> {to.actor}: {result.outcome} {result.reason}")
        return str(result.outcome)

    def hear(self, data: bytes) -> None:
        self.loop.heard(data)
        self.nudged.set()

    def _post(self, actor: str, data: bytes) -> None:
        """A message to another replica; when that is dead, the caller hears of it, as Ray says so."""
        there = next(r for r in self.world.replicas if r.name == actor)

        async def send() -> None:
            try:
                await self.world.net.call(self, there, lambda: there.hear(data))
            except Gone:
                self.loop.peer_lost(actor)
                self.nudged.set()
            except ReplicaLost:
                pass

        self.world.net.spawn(send())

    def abort(self, request_id: str, attempt: int, choice: int | None) -> None:
        self.loop.abort(request_id, choice, attempt)
        self.nudged.set()

    def renew(self, connection: str) -> None:
        if connection in self.outboxes:
            self.outboxes[connection].renew()

    def subscribe(self, connection: str, channel: Channel) -> None:
        if connection in self.outboxes or channel.left:
            return  # a repeated message
        outbox = self.outboxes[connection] = Outbox(
            self.world.loop, self.world.loop.time, lambda: self._leave(connection), lease_s=self.world.lease_s
        )
        self.loop.subscribe(connection, outbox.put)
        self.nudged.set()
        self.world.net.spawn(self._pump(outbox, channel))

    def unsubscribe(self, connection: str) -> None:
        if connection in self.outboxes:
            self.outboxes[connection].close("the reader has left")
            self._leave(connection)

    def _leave(self, connection: str) -> None:
        self.loop.unsubscribe(connection)
        self.outboxes.pop(connection, None)
        self.nudged.set()

    async def _pump(self, outbox: Outbox, channel: Channel) -> None:
        try:
            while True:
                channel.put(await outbox.take(600.0))
        except ReaderGivenUp:
            channel.end(None)
        except ReplicaLost as error:
            channel.end(str(error))


class ControllerProcess(Process):
    """`cluster.ray_gateway.controller_actor.ControllerActor`, over the simulated network."""

    def __init__(self, world: World) -> None:
        super().__init__("controller")
        self.world = world
        self.table = Controller(REPLICAS, 30.0)
        self.router = Router("cost")
        self.scheduler = GlobalScheduler(self.router, TenantTable(()), QueueLimits(1000, 100_000), "fair")
        self.admissions = Admissions()
        self.decided: dict[tuple[str, int], asyncio.Event] = {}
        self.lives: dict[Owner, Replica] = {}
        self.tasks: dict[Owner, asyncio.Task[None]] = {}
        self.timer: asyncio.TimerHandle | None = None
        for life in [r for r in world.replicas if r.alive]:
            if self.table.adopt(*life.owner, self.now_s):
                self._follow(life)
            else:
                life.die()
        self.task = world.net.spawn(self._run())

    @property
    def now_s(self) -> float:
        return self.world.loop.time()

    def die(self) -> None:
        self.alive = False
        for task in (self.task, *self.tasks.values()):
            task.cancel()
        if self.timer is not None:
            self.timer.cancel()

    async def admit(self, request: AdmitRequest) -> Route | None:
        key = request.request_id, request.attempt
        try:
            if self.admissions.ask(request, self.now_s):
                self.scheduler.offer(request, self.now_s)
                self.dispatch()
        except QuireError:
            self.admissions.withdraw(request.request_id)
            raise
        found = self.admissions.fetch(*key)
        if found is None and not self.admissions.superseded(*key):
            try:
                async with asyncio.timeout(ADMIT_POLL_S):
                    await self.decided.setdefault(key, asyncio.Event()).wait()
            except TimeoutError:
                return None
            found = self.admissions.fetch(*key)
        if found is None:
            raise ReplicaLost("this attempt is not asked any more")
        if isinstance(found[0], QuireError):
            raise found[0]
        return Route(*found)

    def withdraw(self, request_id: str) -> None:
        self.admissions.withdraw(request_id)
        self.scheduler.withdraw(request_id)
        for key in [key for key in self.decided if key[0] == request_id]:
            self.decided.pop(key).set()
        self.dispatch()

    def serving(self) -> list[Serving]:
        return [Serving(r.replica_id, r.epoch, r.report.info) for r in self.table.serving() if r.report and r.report.info]

    def dispatch(self) -> None:
        for d in self.scheduler.dispatch(self.now_s):
            self.admissions.decide(d.request_id, d.attempt, tuple(d.outcome) if isinstance(d.outcome, Route) else (d.outcome,))
            event = self.decided.pop((d.request_id, d.attempt), None)
            if event is not None:
                event.set()
        if self.timer is not None:
            self.timer.cancel()
        next_s = self.scheduler.next_s(self.now_s)
        self.timer = None if next_s is None else self.world.loop.call_later(max(next_s, 0.001), self._alarm)

    def _alarm(self) -> None:
        if self.alive:
            self.dispatch()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(max(self.thaws_s - self.now_s, TICK_S))
            self.table.silent(self.now_s)
            for owner in [owner for owner in self.tasks if not self.table.lives(*owner)]:
                self.tasks.pop(owner).cancel()
                self._lose(owner)
            for replica_id in self.table.due(self.now_s):
                epoch = self.table.begin(replica_id, int(self.now_s * 1000) + 1, self.now_s)
                self._follow(self.world.start_replica(replica_id, epoch))
            for request_id in self.admissions.expire(self.now_s):
                self.withdraw(request_id)

    def _follow(self, life: Replica) -> None:
        self.lives[life.owner] = life
        self.tasks[life.owner] = self.world.net.spawn(self._watch(life))

    def _lose(self, owner: Owner) -> None:
        """Nothing goes there any more; what is left of it is killed, which may take a while."""
        life = self.lives.pop(owner)
        self.world.loop.call_later(self.world.chance.uniform(0.0, 3.0), life.die)
        self.scheduler.replica_lost(*owner, self.now_s)
        self.dispatch()

    async def _watch(self, life: Replica) -> None:
        try:
            while not await self._report(life):  # noqa: ASYNC110 (virtual time)
                await asyncio.sleep(0.25)
            while True:
                replica = self.table.replica(life.owner.replica_id)
                if replica is not None and replica.epoch == life.owner.epoch and replica.report and replica.report.info:
                    self.router.add(*life.owner, replica.report.info)
                after = self.router.resync_point(*life.owner)
                try:
                    frame = unpack_events(
                        await self.world.net.call(self, life, lambda after=after: life.events(after), EVENT_WAIT_S + CALL_S)
                    )
                except Gone:
                    raise
                except ReplicaLost:
                    await self._report(life)
                    await asyncio.sleep(0.25)
                    continue
                self._take(life, frame)
                await asyncio.sleep(POLL_S)
        except Gone as gone:
            self.table.died(*life.owner, str(gone), self.now_s)

    def _take(self, life: Replica, frame: EventFrame) -> None:
        self.table.heard(*life.owner, self.now_s, frame.load)
        self.scheduler.events(frame, self.now_s)
        self.dispatch()

    async def _report(self, life: Replica) -> bool:
        try:
            report = await self.world.net.call(self, life, life.report)
        except Gone:
            raise
        except ReplicaLost:
            self.router.remove(*life.owner)
            return False
        return self.table.reported(report, self.now_s)


class Ingress(Process):
    """A real client over the simulated network."""

    def __init__(self, world: World, number: int, life: int) -> None:
        super().__init__(f"ingress-{number}")
        self.world = world
        options = IngressOptions(f"ingress-{number}.{life}")
        self.client = RemoteEngineClient(self, lambda owner: ReplicaLink(world, self, owner), world.loop.time, options)
        self.client.start()

    async def die(self) -> None:
        self.alive = False
        await self.client.close()

    # the controller's port

    async def serving(self) -> ServingNow:
        controller = self._controller()
        return ServingNow(KEY, await self.world.net.call(self, controller, controller.serving))

    async def admit(self, request: AdmitRequest) -> Route | None:
        controller = self._controller()
        route: Route | None = await self.world.net.call(self, controller, lambda: controller.admit(request), ADMIT_POLL_S + CALL_S)
        return route

    def withdraw(self, request_id: str) -> None:
        controller = self.world.controller
        self.world.net.send(self, controller, lambda: controller.withdraw(request_id))

    def _controller(self) -> ControllerProcess:
        return self.world.controller


class ReplicaLink:
    """A replica's port."""

    def __init__(self, world: World, ingress: Ingress, owner: Owner) -> None:
        found = [r for r in world.replicas if r.owner == owner]
        if not found:
            raise ReplicaLost(f"{owner} is gone")
        self.net, self.ingress, self.replica = world.net, ingress, found[0]

    async def frames(self, connection: str) -> AsyncGenerator[list[bytes], None]:
        replica, net = self.replica, self.net
        channel = Channel(net, replica, self.ingress)
        await net.call(self.ingress, replica, lambda: replica.subscribe(connection, channel))
        try:
            while True:
                item = await channel.items.get()
                if item is None:
                    return
                if isinstance(item, str):
                    raise ReplicaLost(item)
                yield item
        finally:
            channel.left = True
            net.send(self.ingress, replica, lambda: replica.unsubscribe(connection))

    async def submit(self, connection: str, data: bytes) -> None:
        await self.net.call(self.ingress, self.replica, lambda: self.replica.submit(connection, data), 10.0)

    def abort(self, request_id: str, attempt: int, choice: int | None) -> None:
        self.net.send(self.ingress, self.replica, lambda: self.replica.abort(request_id, attempt, choice))

    def renew(self, connection: str) -> None:
        self.net.send(self.ingress, self.replica, lambda: self.replica.renew(connection))
