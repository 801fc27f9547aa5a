"""The thread that steps an engine, and the frames that it sends to each ingress.

Everything that changes the engine happens on this thread, between steps. `submit` checks and queues a request on it and
waits for the answer, so that a refusal reaches the caller at once; that wait is at most one step long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from .engine import Engine
from .migration_wire import Peer
from .migrator import Mail
from .protocol import (
    BadRequest,
    EngineStats,
    EventFrame,
    GenerateRequest,
    LiveRequest,
    MigrationResult,
    Outcome,
    ReplicaLost,
)
from .subscriptions import Deliver, Subscriptions

log = logging.getLogger(__name__)

T = TypeVar("T")
MIGRATION_TICK_S = 0.01  # between two looks at migrations while nothing else is done


class EngineLoop:
    """Runs an engine on a thread of its own.

    Args:
        engine: not to be touched by anybody else from now on.
        replica_id, epoch: who the frames say they come from.
        heartbeat_s: at least this often every ingress gets a frame with stats, also when idle.
        on_death: called on the engine thread, with the exception, when a step raised; nothing runs after it.
        clock: seconds, monotonic.
        mail: to other replicas; without it nothing migrates.
    """

    def __init__(
        self,
        engine: Engine,
        replica_id: str,
        epoch: int,
        heartbeat_s: float = 0.5,
        on_death: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        mail: Mail | None = None,
    ) -> None:
        self._engine = engine
        self._replica_id = replica_id
        self._epoch = epoch
        self._heartbeat_s = heartbeat_s
        self._on_death = on_death
        self._clock = clock
        self._beat_s = clock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._subscriptions = Subscriptions(replica_id, epoch)
        self._migrator = None if mail is None else mail.migrator(engine, self._subscriptions, clock)
        self._pollers: list[tuple[int | None, Future[EventFrame]]] = []  # who waits for news since which number
        self._step_began_s: float | None = None
        self._stopping = False
        self._stats = engine.stats()
        engine.runner.watch(self._wake.set)
        self._thread = threading.Thread(target=self._run, name=f"engine-{replica_id}", daemon=True)
        self.dead: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop after the step that runs now; requests that are alive get no further output.

        Raises:
            TimeoutError: the step took longer than `timeout_s`.
        """
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine did not stop within {timeout_s} s")

    def stats(self) -> EngineStats:
        """As they stood after the latest step."""
        return self._stats

    def idle(self) -> bool:
        """Nothing ran or waited after the latest step."""
        return self._stats.running == 0 and self._stats.waiting == 0

    def subscribe(self, ingress: str, deliver: Deliver) -> None:
        """Send frames for `ingress` to `deliver` (called on the engine thread; must not block), a heartbeat first."""
        self._post(partial(self._subscribe, ingress, deliver))

    def unsubscribe(self, ingress: str) -> None:
        """The ingress is gone: abort its requests and send nothing more."""
        self._post(partial(self._unsubscribe, ingress))

    def submit(self, ingress: str, request: GenerateRequest, timeout_s: float = 60.0) -> None:
        """Queue a request whose outputs go to `ingress`.

        Raises:
            BadRequest, Overloaded: refused.
            ReplicaLost: the engine is dead or stopping, or knows no such ingress.
            TimeoutError: the engine did not answer in `timeout_s`.
        """
        self.submit_nowait(ingress, request).result(timeout_s)

    def submit_nowait(self, ingress: str, request: GenerateRequest) -> Future[None]:
        """`submit`, answered through a future."""
        return self._ask(partial(self._submit, ingress, request))

    def abort(self, request_id: str, choice: int | None = None, attempt: int = 0) -> None:
        """End a request, or one sequence of it, before the next step. Unknown ones, and other attempts, are ignored."""
        self._post(partial(self._abort, request_id, choice, attempt))

    def events(self, after: int | None, wait: bool) -> Future[EventFrame]:
        """What has changed since event `after`, with `wait` as soon as that is anything but the load (cancel it to wait no longer)."""
        if not wait:
            return self._ask(lambda: self._engine.events(self._replica_id, self._epoch, after))
        answer: Future[EventFrame] = Future()
        self._ask(lambda: self._pollers.append((after, answer))).add_done_callback(partial(_pass_on_error, answer))
        return answer

    def requests(self) -> Future[list[LiveRequest]]:
        """The requests that live."""
        return self._ask(self._engine.requests)

    def page_maps(self) -> Future[tuple[bytes, bytes]]:
        """The state of every page (`Scheduler.page_maps`)."""
        return self._ask(self._engine.scheduler.page_maps)

    def decisions(self) -> Future[list[dict[str, Any]]]:
        """What was done lately when pages had run out (`Decisions.rows`)."""
        return self._ask(self._engine.scheduler.decisions.rows)

    def migrate(self, request_id: str, to: Peer, fill: bool = False) -> Future[MigrationResult]:
        """Move a request to another replica, with its pages, while it goes on; with `fill` copy the pages of its prompt there instead.

        Answered when it is over, with whatever came of it; with ReplicaLost when this replica is gone.
        """
        answer: Future[MigrationResult] = Future()
        self._ask(partial(self._migrate, request_id, to, fill, answer)).add_done_callback(partial(_pass_on_error, answer))
        return answer

    def relief(self, to: Peer | None, pages: int) -> None:
        """Where a victim may go when pages run out here, until told otherwise: to `to`, which has so many pages to spare; None: nowhere."""
        if self._migrator is not None:
            self._post(partial(self._migrator.set_relief, to, pages))

    def drain(self, on: bool) -> None:
        """Requests only leave for other replicas, and none arrives; or that is over."""
        if self._migrator is not None:
            self._post(partial(self._migrator.drain, on))

    def heard(self, data: bytes) -> None:
        """A message from another replica's `Mail.send`."""
        if self._migrator is not None:
            self._post(partial(self._migrator.hear, data))

    def peer_lost(self, actor: str) -> None:
        """The replica whose actor has that name is dead for good."""
        if self._migrator is not None:
            self._post(partial(self._migrator.peer_died, actor))

    def step_s(self) -> float:
        """Seconds that the step has taken so far that is being computed now; 0.0 when none is."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else self._clock() - began_s

    # --- the inbox ---

    def _post(self, do: Callable[[], None]) -> None:
        self._inbox.append(do)
        self._wake.set()

    def _ask(self, do: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(do())
            except Exception as error:  # noqa: BLE001  whatever it is belongs to the caller, who gets it from the future
                answer.set_exception(error)

        if self.dead is not None or self._stopping:
            answer.set_exception(ReplicaLost(f"replica {self._replica_id} is gone"))
        else:
            self._post(run)
        return answer

    # --- on the engine thread ---

    def turn(self) -> None:
        """What has come in, one step, and what goes out after it. The thread calls it again and again; a simulation in its stead."""
        while self._inbox:
            self._inbox.popleft()()
        if self._migrator is not None:
            self._migrator.advance()
        self._step_began_s = self._clock()
        outputs = self._engine.step()
        self._step_began_s = None
        now_s = self._clock()
        due = now_s - self._beat_s >= self._heartbeat_s
        self._stats = self._engine.stats()
        if outputs or due:
            self._subscriptions.send(outputs, self._stats if due else None)
        if due:
            self._beat_s = now_s
        if self._pollers:
            self._tell_news()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                self.turn()
                if self._engine.resting:
                    self._wake.wait(self._pause_s())
        except BaseException as error:
            log.exception("replica %s: the engine died", self._replica_id)
            self.dead = error
            if self._on_death is not None:
                self._on_death(error)
        finally:
            self._stopping = True
            while self._inbox:  # nobody is left waiting for an answer
                self._inbox.popleft()()
            for _, answer in self._pollers:
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(ReplicaLost(f"replica {self._replica_id} is gone"))
            if self._migrator is not None:
                self._migrator.abandon()

    def _pause_s(self) -> float:
        """How long nothing need be done, if nothing comes in."""
        until_beat_s = max(self._heartbeat_s - (self._clock() - self._beat_s), 0.0)
        return min(until_beat_s, MIGRATION_TICK_S) if self._migrator is not None and self._migrator.busy else until_beat_s

    def _tell_news(self) -> None:
        pollers, self._pollers = self._pollers, []
        for after, answer in pollers:
            if not self._engine.has_news(after) and not answer.cancelled():
                self._pollers.append((after, answer))
            elif answer.set_running_or_notify_cancel():
                answer.set_result(self._engine.events(self._replica_id, self._epoch, after))

    def _subscribe(self, ingress: str, deliver: Deliver) -> None:
        self._unsubscribe(ingress)
        self._subscriptions.open(ingress, deliver, self._engine.stats())

    def _unsubscribe(self, ingress: str) -> None:
        for request_id in self._subscriptions.close(ingress):
            self._engine.abort(request_id)

    def _submit(self, ingress: str, request: GenerateRequest) -> None:
        if self._stopping or ingress not in self._subscriptions:
            raise ReplicaLost(f"replica {self._replica_id} has no stream to ingress {ingress!r}")
        attempt = self._subscriptions.attempt(request.request_id)
        if attempt is not None:
            if request.attempt == attempt and self._subscriptions.reads(ingress, request.request_id):
                return  # the same message once more
            if request.attempt <= attempt:
                raise BadRequest("request_id", f"{request.request_id!r} is in use")
            self._engine.abort(request.request_id)  # its ingress has lost sight of that attempt
            self._subscriptions.forget(request.request_id)
        request = self._engine.submit(request)
        self._subscriptions.claim(request.request_id, ingress, request.attempt, len(request.choices))

    def _abort(self, request_id: str, choice: int | None, attempt: int) -> None:
        if self._subscriptions.attempt(request_id) != attempt:
            return
        outputs = self._engine.abort(request_id, choice)
        if outputs:
            self._subscriptions.send(outputs, None)

    def _migrate(self, request_id: str, to: Peer, fill: bool, answer: Future[MigrationResult]) -> None:
        if self._migrator is None:
            _give(answer, MigrationResult(Outcome.REFUSED, reason="this replica reaches no others"))
        else:
            self._migrator.migrate(request_id, to, fill, partial(_give, answer))


def _give(answer: Future[T], result: T) -> None:
    if answer.set_running_or_notify_cancel():
        answer.set_result(result)


def _pass_on_error(answer: Future[Any], asked: Future[None]) -> None:
    error = asked.exception()
    if error is not None and answer.set_running_or_notify_cancel():
        answer.set_exception(error)
