"""A step that takes too long is noticed, others are not."""

import asyncio
import queue
import threading
from collections.abc import Iterator

import pytest
from paged_memory import hash_engine

from quire.worker.actor import ReplicaActor
from quire.worker.config import EngineOptions, ParallelOptions
from quire.worker.plan import StepPlan
from quire.worker.plan_wire import pack_end, pack_step
from quire.worker.protocol import GenerateRequest, SamplingParams
from quire.worker.rank import Follower
from quire.worker.watchdog import LOOKS, Watchdog

WAIT_S = 120.0
NOTHING = StepPlan(0, (), (), (), (), ())


def test_a_step_that_takes_too_long_is_reported_once() -> None:
    said: queue.Queue[str] = queue.Queue()
    steps: Iterator[float] = iter([0.0, 0.15, 0.0, 0.2, 0.21, 9.0])
    dog = Watchdog(0.2, lambda: next(steps), said.put)
    assert said.get(timeout=WAIT_S) == "a step has taken longer than 0.2 s: something hangs"
    assert next(steps) == 9.0  # it looks no more
    dog.close()


@pytest.mark.parametrize("step_s", [0.0, 0.1])
def test_quick_steps_and_none_are_left_alone(step_s: float) -> None:
    said: list[str] = []
    looked = threading.Semaphore(0)

    def look() -> float:
        looked.release()
        return step_s

    dog = Watchdog(0.1, look, said.append)
    for _ in range(2 * LOOKS):
        assert looked.acquire(timeout=WAIT_S)
    dog.close()
    assert not said


def test_a_replica_whose_step_hangs_dies() -> None:
    codes: queue.Queue[int] = queue.Queue()
    go_on = threading.Event()

    async def scenario() -> None:
        engine = hash_engine()
        run = engine.runner.run
        engine.runner.run = lambda plan: go_on.wait(WAIT_S) and run(plan)  # type: ignore[method-assign]
        options = EngineOptions(parallel=ParallelOptions(step_timeout_s=0.2))
        actor = ReplicaActor("r0", 1, options, b"key", build=lambda *_, **__: engine, die=codes.put)
        while not (await actor.report())["info"]:  # noqa: ASYNC110 (another thread builds it)
            await asyncio.sleep(0.005)
        frames = actor.frames("i")
        await anext(frames)
        request = GenerateRequest("a", ((1, 2, 3),), SamplingParams(max_tokens=2, ignore_eos=True))
        await actor.submit("i", 1, request.to_wire())
        assert await asyncio.to_thread(codes.get, timeout=WAIT_S) == 1
        assert "longer than 0.2 s: something hangs" in (await actor.report())["failure"]
        go_on.set()

    asyncio.run(scenario())


def test_a_follower_whose_step_hangs_is_noticed_and_one_that_waits_for_a_plan_is_not() -> None:
    said: queue.Queue[str] = queue.Queue()
    plans: queue.Queue[bytes] = queue.Queue()
    runs: queue.Queue[threading.Event] = queue.Queue()

    class Group:
        closed = False

        def receive(self) -> bytes:
            return plans.get(timeout=WAIT_S)

        def close(self) -> None:
            self.closed = True

    class Runner:
        def run(self, plan: StepPlan, sampled: tuple[int, ...]) -> None:
            runs.get(timeout=WAIT_S).wait(WAIT_S)

        def close(self) -> None:
            self.closed = True

    group = Group()
    runner = Runner()
    follower = Follower(group, runner)  # type: ignore[arg-type]
    thread = threading.Thread(target=follower.follow)
    thread.start()
    Watchdog(0.5, follower.step_s, said.put)
    done, hangs = threading.Event(), threading.Event()
    done.set()
    runs.put(done)
    plans.put(pack_step(NOTHING, ()))
    with pytest.raises(queue.Empty):
        said.get(timeout=1.2)  # for more than two limits there is no plan
    plans.put(pack_step(NOTHING, ()))
    runs.put(hangs)
    assert "something hangs" in said.get(timeout=WAIT_S)
    hangs.set()
    plans.put(pack_end())
    thread.join(WAIT_S)
    assert group.closed
    assert runner.closed
