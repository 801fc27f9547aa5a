"""Virtual time, and a network that loses, repeats and delays messages: what the simulated processes live in."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from quire.worker.protocol import QuireError, ReplicaLost

CALL_S = 5.0


class Broken(AssertionError):
    """An invariant does not hold."""


class Gone(ReplicaLost):
    """The process that was called is dead, and the caller hears of it at once."""


class _Jump(selectors.SelectSelector):
    """Instead of waiting, time passes."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Broken("everybody waits for ever")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to whatever comes next."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now_s


class Process:
    """Something that can be killed, or frozen for a while."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.thaws_s = 0.0


@dataclass
class Faults:
    """How often what goes wrong; drawn for each run."""

    lose: float = 0.0
    repeat: float = 0.0
    slow: float = 0.0  # a message takes up to two seconds instead of milliseconds


class Net:
    """Carries calls and frames between processes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, chance: random.Random, faults: Faults) -> None:
        self.loop = loop
        self.chance = chance
        self.faults = faults
        self.tasks: set[asyncio.Task[Any]] = set()
        self.trouble = True
        self.failed: asyncio.Future[None] = loop.create_future()

    def delays(self, to: Process, sender: Process) -> list[float]:
        """When copies of a message arrive: none if it is lost, two if it is repeated."""
        f, chance = self.faults, self.chance
        copies = 1
        if self.trouble:
            copies = 0 if chance.random() < f.lose else 2 if chance.random() < f.repeat else 1
        frozen_s = max(to.thaws_s, sender.thaws_s) - self.loop.time()
        slow = self.trouble and chance.random() < f.slow
        return [max(frozen_s, 0.0) + chance.uniform(0.0005, 2.0 if slow else 0.01) for _ in range(copies)]

    async def call(self, sender: Process, to: Process, do: Callable[[], Any], timeout_s: float = CALL_S) -> Any:
        """What `do` returns (awaited if need be), run at `to`. Raises Gone, ReplicaLost (no answer) and whatever `do` raises."""
        answer: asyncio.Future[Any] = self.loop.create_future()
        if sender.alive:
            for delay_s in self.delays(to, sender):
                self.loop.call_later(delay_s, self._arrive, sender, to, do, answer)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise ReplicaLost(f"{to.name} did not answer") from None

    def send(self, sender: Process, to: Process, do: Callable[[], Any]) -> None:
        """The same without waiting for an answer."""
        nobody: asyncio.Future[Any] = self.loop.create_future()
        nobody.cancel()
        if sender.alive:
            for delay_s in self.delays(to, sender):
                self.loop.call_later(delay_s, self._arrive, sender, to, do, nobody)

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """A task that is ended with the run; a bug in it ends the run."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not self.failed.done():
            self.failed.set_exception(task.exception())  # type: ignore[arg-type]

    def _arrive(self, sender: Process, to: Process, do: Callable[[], Any], answer: asyncio.Future[Any]) -> None:
        if not to.alive:
            self._answer(to, sender, answer, Gone(f"{to.name} is dead"))
            return
        self.spawn(self._run(sender, to, do, answer))

    async def _run(self, sender: Process, to: Process, do: Callable[[], Any], answer: asyncio.Future[Any]) -> None:
        try:
            result = do()
            if isinstance(result, Awaitable):
                result = await result
        except QuireError as error:
            result = error
        self._answer(to, sender, answer, result if to.alive else Gone(f"{to.name} has died"))

    def _answer(self, to: Process, sender: Process, answer: asyncio.Future[Any], result: Any) -> None:
        for delay_s in self.delays(sender, to)[:1]:
            self.loop.call_later(delay_s, _settle, answer, result)


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


class Channel:
    """A frame stream on its way: in order, but items get lost and repeated."""

    def __init__(self, net: Net, sender: Process, to: Process) -> None:
        self._net, self._sender, self._to = net, sender, to
        self._last_s = 0.0
        self.items: asyncio.Queue[list[bytes] | str | None] = asyncio.Queue()
        self.left = False

    def put(self, frames: list[bytes]) -> None:
        for delay_s in self._net.delays(self._to, self._sender):
            self._deliver(delay_s, frames)

    def end(self, reason: str | None) -> None:
        """`reason`: what it dies of; None: the reader was given up."""
        self._deliver(0.01, reason)

    def _deliver(self, delay_s: float, item: list[bytes] | str | None) -> None:
        self._last_s = max(self._last_s + 1e-6, self._net.loop.time() + delay_s)
        self._net.loop.call_at(self._last_s, self.items.put_nowait, item)
