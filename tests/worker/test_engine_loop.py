"""The engine's thread: frames, refusals, aborts, a lost ingress, a death."""

import queue
import threading

import pytest
from paged_memory import expected_output, hash_engine

from quire.worker.engine_loop import EngineLoop
from quire.worker.protocol import BadRequest, FinishReason, Frame, GenerateRequest, Overloaded, ReplicaLost, SamplingParams, unpack_frame

WAIT_S = 120.0


def request(name: str, prompt=(1, 2, 3), **params) -> GenerateRequest:
    return GenerateRequest(name, (tuple(prompt),), SamplingParams(**({"max_tokens": 5, "ignore_eos": True, "seed": 1} | params)))


class Ingress:
    """Collects the frames of one subscription."""

    def __init__(self) -> None:
        self.frames: queue.Queue[Frame] = queue.Queue()

    def deliver(self, data: bytes) -> None:
        self.frames.put(unpack_frame(data))

    def until_finished(self, *names: str) -> dict[str, list]:
        outputs: dict[str, list] = {name: [] for name in names}
        while not all(some and some[-1].finish for some in outputs.values()):
            for o in self.frames.get(timeout=WAIT_S).outputs:
                outputs[o.request_id].append(o)
        return outputs


@pytest.fixture
def loop():
    loop = EngineLoop(hash_engine(pages=64, max_waiting=2, max_running=2), "r0", 3, heartbeat_s=0.05)
    loop.start()
    yield loop
    loop.stop(WAIT_S)


def test_frames_are_numbered_and_each_ingress_gets_its_own(loop):
    one, two = Ingress(), Ingress()
    loop.subscribe("one", one.deliver)
    loop.subscribe("two", two.deliver)
    loop.submit("one", request("a"))
    loop.submit("two", request("b", [4]))
    outputs = one.until_finished("a") | two.until_finished("b")
    assert [t for o in outputs["a"] for t in o.tokens] == expected_output([1, 2, 3], 1, 5, ignore_eos=True)
    assert [t for o in outputs["b"] for t in o.tokens] == expected_output([4], 1, 5, ignore_eos=True)


def test_the_first_frame_and_heartbeats_carry_stats(loop):
    ingress = Ingress()
    loop.subscribe("i", ingress.deliver)
    frames = [ingress.frames.get(timeout=WAIT_S) for _ in range(3)]
    assert [(f.replica_id, f.epoch, f.number) for f in frames] == [("r0", 3, 0), ("r0", 3, 1), ("r0", 3, 2)]
    assert all(f.stats.pages_total == 64 for f in frames)


def test_refusals_reach_the_caller(loop):
    with pytest.raises(ReplicaLost, match="no stream"):
        loop.submit("nobody", request("a"))
    loop.subscribe("i", Ingress().deliver)
    with pytest.raises(BadRequest):
        loop.submit("i", request("a", n=0))
    gate = threading.Event()
    loop.subscribe("gate", lambda frame: gate.wait(WAIT_S))  # holds the engine thread until all five have been sent
    answers = [loop.submit_nowait("i", request(f"r{i}")) for i in range(5)]
    gate.set()
    for answer in answers[:4]:
        answer.result(WAIT_S)
    with pytest.raises(Overloaded):
        answers[4].result(WAIT_S)


def test_an_abort_ends_a_request_and_frees_its_pages(loop):
    ingress = Ingress()
    loop.subscribe("i", ingress.deliver)
    loop.submit("i", request("a", max_tokens=240))
    loop.abort("a")
    assert ingress.until_finished("a")["a"][-1].finish is FinishReason.ABORT
    while ingress.frames.get(timeout=WAIT_S).stats is None:
        pass
    assert loop.idle()
    assert loop.stats().pages_active == 0


def test_the_requests_of_a_lost_ingress_are_aborted(loop):
    lost, other = Ingress(), Ingress()
    loop.subscribe("lost", lost.deliver)
    loop.subscribe("other", other.deliver)
    loop.submit("lost", request("a", max_tokens=240))
    loop.submit("other", request("b"))
    loop.unsubscribe("lost")
    other.until_finished("b")
    while (stats := other.frames.get(timeout=WAIT_S).stats) is None or stats.running:
        pass
    assert stats.pages_active == 0
    loop.submit("other", request("a"))  # the id is free again
    other.until_finished("a")


def test_when_every_step_raises_everybody_hears_of_the_death():
    engine = hash_engine()
    died = threading.Event()
    loop = EngineLoop(engine, "r0", 1, on_death=lambda error: died.set())

    def fail(plan):
        raise MemoryError("no more")

    engine.runner.run = fail
    loop.start()
    loop.subscribe("i", Ingress().deliver)
    news = loop.events(0, wait=True)
    answers = [loop.submit_nowait("i", request(name)) for name in "abc"]  # the third that raises alone: nobody's fault but its own
    assert died.wait(WAIT_S)
    assert isinstance(loop.dead, MemoryError)
    assert answers[0].exception(WAIT_S) is None
    assert news.result(WAIT_S).started  # told of the first request, before the end
    with pytest.raises(ReplicaLost):
        loop.submit("i", request("d"))
    with pytest.raises(ReplicaLost):
        loop.events(0, wait=True).result(WAIT_S)
    loop.stop(WAIT_S)


def test_who_waits_for_news_is_told_once_and_who_leaves_is_forgotten(loop):
    gone, stays = loop.events(0, wait=True), loop.events(0, wait=True)
    assert loop.events(0, wait=False).result(WAIT_S).next == 0  # asked after the two, and answered before them
    assert gone.cancel()
    for _ in range(2):  # the thread looks for news between the two
        loop.events(0, wait=False).result(WAIT_S)
    assert [answer for _, answer in loop._pollers] == [stays]
    ingress = Ingress()
    loop.subscribe("i", ingress.deliver)
    loop.submit("i", request("a"))
    frame = stays.result(WAIT_S)
    assert [r.request_id for r in frame.started] == ["a"]
    ingress.until_finished("a")
    assert loop.events(None, wait=True).result(WAIT_S).dump  # always news
    assert loop._pollers == []


def test_a_step_that_takes_long_can_be_seen():
    engine = hash_engine()
    loop = EngineLoop(engine, "r0", 3)
    compute, entered, go = engine.runner.run, threading.Event(), threading.Event()

    def slow(plan):
        entered.set()
        assert go.wait(WAIT_S)
        return compute(plan)

    engine.runner.run = slow
    loop.start()
    loop.subscribe("i", Ingress().deliver)
    loop.submit("i", request("a", max_tokens=1))
    assert entered.wait(WAIT_S)
    first = loop.step_s()
    assert loop.step_s() > first > 0.0
    go.set()
    while loop.step_s():
        pass
    loop.stop(WAIT_S)
