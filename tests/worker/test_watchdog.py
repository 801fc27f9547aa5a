"""A step that takes too long is noticed, others are not."""

import queue
import threading
from collections.abc import Iterator

import pytest

from quire.worker.watchdog import LOOKS, Watchdog

WAIT_S = 30.0


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
