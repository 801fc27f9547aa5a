"""The real app under the real server, over the real engine loop; only Ray is left out between them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn

from quire.cluster.client import RecoveryStats
from quire.cluster.commands import Abort, Ask, Command, Submit
from quire.cluster.journal import Journal, Patience
from quire.cluster.messages import Route
from quire.cluster.remote_client import RemoteStream
from quire.cluster.stream import StreamTable
from quire.cluster.succession import Owner
from quire.deploy.api.app import create_app
from quire.deploy.api.context import Api
from quire.deploy.api.http_server import server_config
from quire.worker.config import LimitOptions, ServerOptions
from quire.worker.door import Door
from quire.worker.engine import Engine, Runner
from quire.worker.engine_loop import EngineLoop
from quire.worker.page_pool import PagePool
from quire.worker.plan import Sampled, StepPlan, StepResult
from quire.worker.protocol import EngineStats, GenerateRequest, ModelInfo, ReplicaLost, TokenLogprob, unpack_frame
from quire.worker.scheduler import Scheduler
from quire.worker.text.tokenizer import Tokenizer

WAIT_S = 120.0
T = TypeVar("T")


class Count:
    """Things that happen on one thread and are awaited on another."""

    def __init__(self) -> None:
        self._happened = threading.Semaphore(0)

    def add(self) -> None:
        self._happened.release()

    def restart(self) -> None:
        while self._happened.acquire(blocking=False):
            pass

    def wait(self) -> None:
        """Returns when one more has happened."""
        if not self._happened.acquire(timeout=WAIT_S):
            raise TimeoutError("it did not happen")


class LoopClient:
    """An `EngineClient` over an `EngineLoop` in this process: same frames, same journals as over Ray, and no other replica to go on at."""

    def __init__(self, engine_loop: EngineLoop, info: ModelInfo) -> None:
        self._engine_loop = engine_loop
        self.served = info
        self._owner = Owner("r0", 1)
        self._loop = asyncio.get_running_loop()
        self._news = threading.Condition()
        self._beats = 0
        self.table = StreamTable()
        self.clock_ahead_s = 0.0
        self.on_submit: Callable[[], object] = lambda: None
        self.refuse_with: Exception | None = None
        self.latest: tuple[GenerateRequest, RemoteStream] | None = None
        self.submitted = Count()
        self.aborted = Count()

    def connect(self) -> None:
        self.table.connect("test", self._owner)
        self._engine_loop.subscribe("test", lambda frame: self._loop.call_soon_threadsafe(self._feed, frame))

    async def submit(self, request: GenerateRequest) -> RemoteStream:
        if self.refuse_with is not None:
            raise self.refuse_with
        door = Door.of(self.served, LimitOptions())
        journal = Journal(door.check(request), door.longest, (), time.monotonic(), Patience())
        journal.start(time.monotonic())
        (submit,) = journal.routed(0, Route(*self._owner), time.monotonic())
        assert isinstance(submit, Submit)
        self.table.open(journal)
        stream = RemoteStream(journal, self._do)
        self.latest = (request, stream)
        try:
            answer = self._engine_loop.submit_nowait("test", GenerateRequest.from_wire(submit.request.to_wire()))
            self.on_submit()
            await asyncio.wrap_future(answer)
        except BaseException:
            journal.abort(None)
            self.table.forget_ended(request.request_id)
            raise
        journal.taken(self._owner, 0)
        self.submitted.add()
        return stream

    async def info(self) -> ModelInfo:
        return self.served

    def stats(self) -> dict[str, EngineStats]:
        return self.table.stats()

    def silent_s(self) -> float:
        return self.table.silent_s(time.monotonic()) + self.clock_ahead_s

    def recovery(self) -> RecoveryStats:
        return RecoveryStats()

    def lose_replica(self) -> None:
        """As if the replica had died; call `connect` to have it back."""
        self._do(self.table.drop("test", "it died", time.monotonic()))

    def wait_for(self, wanted: Callable[[EngineStats], bool]) -> EngineStats:
        """Blocks another thread until a heartbeat that was sent from now on satisfies `wanted`."""
        first = self._beats + 2  # the one before may be under way already

        def satisfied() -> bool:
            stats = self.table.stats().get("r0")
            return self._beats >= first and stats is not None and wanted(stats)

        with self._news:
            if not self._news.wait_for(satisfied, WAIT_S):
                raise TimeoutError(f"never seen; the latest was {self.table.stats()}")
        return self.table.stats()["r0"]

    def _feed(self, frame: bytes) -> None:
        with self._news:
            self._do(self.table.feed("test", frame, time.monotonic()))
            self._beats += unpack_frame(frame).stats is not None
            self._news.notify_all()

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Abort):
                self._engine_loop.abort(command.request_id, command.choice, command.attempt)
                self.aborted.add()
                self.table.forget_ended(command.request_id)
            elif isinstance(command, Ask):
                journal = self.table.journal(command.request.request_id)
                assert journal is not None
                journal.refused(journal.attempt, ReplicaLost("it died"), time.monotonic())
                self.table.forget_ended(journal.request_id)


class ServerThread:
    """One server on a port of its own, in a thread with an event loop of its own."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: ServerOptions, limits: LimitOptions) -> None:
        self.engine_loop = EngineLoop(engine, "r0", 1, heartbeat_s=0.02, on_death=self._engine_died)
        self._args = (engine.info, tokenizer, options, limits)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="server")

    def __enter__(self) -> ServerThread:
        self.engine_loop.start()
        self._thread.start()
        if not self._started.wait(WAIT_S):
            raise TimeoutError("the server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(WAIT_S)

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def call(self, function: Callable[[], object]) -> None:
        """Calls a function on the server's loop."""

        async def once() -> None:
            function()

        self.on_loop(once())

    @contextmanager
    def meanwhile(self, ask: Callable[[], object]) -> Iterator[None]:
        """`ask` runs in a thread of its own, and has ended when the block has."""
        with ThreadPoolExecutor(1) as thread:
            asking = thread.submit(ask)
            yield
            asking.result(WAIT_S)

    @property
    def api(self) -> Api:
        return self.app.state.api

    def _engine_died(self, _: BaseException) -> None:
        self._loop.call_soon_threadsafe(self.client.lose_replica)

    async def _main(self) -> None:
        info, tokenizer, options, limits = self._args
        self._loop = asyncio.get_running_loop()
        self.client = LoopClient(self.engine_loop, info)
        self.client.connect()
        self.app = create_app(self.client, tokenizer, info, options, limits, "ingress-0")
        outer = self

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[Any] | None = None) -> None:
                await super().startup(sockets)
                outer.listening = self.servers[0].sockets[0]
                outer.port = outer.listening.getsockname()[1]
                outer.url = f"http://127.0.0.1:{outer.port}"
                outer._started.set()

        self._server = Server(server_config(self.app, options))
        await self._server.serve()
        await asyncio.to_thread(self.engine_loop.stop)  # before the loop that its frames go to is closed


@dataclass
class ScriptRunner(Runner):
    """A model that always says the same: output token i of every sequence is `script[i % len]`; -1 is a failure."""

    script: Sequence[int] = (0,)
    known: dict[int, tuple[int, Any]] = field(default_factory=dict)
    held: threading.Event = field(default_factory=threading.Event)
    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def hold(self, steps: int = 0) -> None:
        """From now on only so many steps end, and as many more as `permits` are released."""
        while self.permits.acquire(blocking=False):
            pass
        self.held.set()
        if steps:
            self.permits.release(steps)

    def free(self) -> None:
        """Steps end by themselves again."""
        self.held.clear()
        self.permits.release()

    def run(self, plan: StepPlan) -> StepResult:
        if self.held.is_set() and not self.permits.acquire(timeout=WAIT_S):
            raise TimeoutError("the test holds the engine")
        for seq in plan.forget:
            del self.known[seq]
        for new in plan.new:
            self.known[new.seq] = (new.prompt_len, new.params)
        return StepResult(plan.step, tuple(self._sampled(row.seq, row.start + row.num_tokens) for row in plan.rows if row.samples))

    def _sampled(self, seq: int, end: int) -> Sampled:
        prompt_len, params = self.known[seq]
        token = self.script[(end - prompt_len) % len(self.script)]
        if token < 0:
            return Sampled(seq, 0, None, "the logits are not finite")
        if params.logprobs is None:
            return Sampled(seq, token)
        top = ((token, -0.25), (token + 1, float("-inf")))[: params.logprobs]
        return Sampled(seq, token, TokenLogprob(token, -0.25, top))


def script_engine(
    runner: ScriptRunner, vocab: int, eos: int, *, max_model_len: int = 4096, max_running: int = 16, max_waiting: int = 64
) -> Engine:
    """The real engine around a script."""
    pages, page_size = 1024, 16
    pool = PagePool(pages, page_size, b"key", True)
    door = Door(LimitOptions(), vocab, max_model_len, pages * page_size, max_running + max_waiting)
    info = ModelInfo("script", "", max_model_len, vocab, (eos,), 1_700_000_000)
    return Engine(Scheduler(pool, 512, max_running, (eos,)), runner, door, info, max_waiting)
