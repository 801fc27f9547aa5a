"""The drain rate: what counts as evidence, and what follows from it."""

from __future__ import annotations

import pytest

from quire.cluster.drain_rate import WINDOW_S, DrainRate


def drained(seconds: int, per_s: int, tokens: int) -> DrainRate:
    """A queue that never ran empty, and lost so many requests a second."""
    rate = DrainRate()
    rate.advance(0.0)
    rate.set_draining(True)
    for second in range(1, seconds + 1):
        rate.advance(float(second))
        for _ in range(per_s):
            rate.left(tokens)
    return rate


def test_nothing_is_predicted_without_evidence() -> None:
    rate = DrainRate()
    assert rate.wait_s(1000, 10**6) == 0.0
    for second in range(100):  # an idle cluster serves what comes, slowly
        rate.advance(float(second))
        rate.left(100)
    assert rate.wait_s(1000, 10**6) == 0.0
    assert rate.retry_after_s(1000, 10**6) == 1.0


def test_the_wait_is_the_backlog_over_the_rate() -> None:
    rate = drained(120, per_s=50, tokens=100)
    assert rate.wait_s(500, 50_000) == pytest.approx(10.0, rel=0.05)
    assert rate.wait_s(500, 100_000) == pytest.approx(15.0, rel=0.05), "twice as long prompts: half of the share doubles"
    assert rate.retry_after_s(500, 50_000) == pytest.approx(10.0, rel=0.05)
    assert rate.retry_after_s(1, 1) == 1.0
    assert rate.retry_after_s(10**6, 10**8) == 60.0


def test_what_leaves_an_empty_queue_says_nothing() -> None:
    rate = DrainRate()
    rate.advance(0.0)
    for _ in range(1000):  # the batch fills
        rate.left(100)
    rate.set_draining(True)
    for second in range(1, 61):
        rate.advance(float(second))
        rate.left(100)
    assert rate.wait_s(10, 1000) == pytest.approx(10.0, rel=0.1)


def test_it_follows_the_capacity() -> None:
    rate = drained(120, per_s=50, tokens=100)
    for second in range(121, 121 + int(3 * WINDOW_S)):
        rate.advance(float(second))
        for _ in range(10):
            rate.left(100)
    assert rate.wait_s(100, 10_000) == pytest.approx(10.0, rel=0.3)


def test_little_evidence_predicts_too_little_rather_than_too_much() -> None:
    rate = DrainRate()
    rate.advance(0.0)
    rate.set_draining(True)
    rate.advance(2.0)
    assert rate.wait_s(1, 100) < 2.0, "nothing has left yet: one is taken to be about to"
    rate.left(100)
    rate.left(100)
    assert rate.wait_s(3, 300) < 2.5


def test_old_evidence_fades_while_the_queue_is_empty() -> None:
    rate = drained(120, per_s=1, tokens=100)
    before = rate.wait_s(10, 1000)
    rate.set_draining(False)
    rate.advance(120.0 + 5 * WINDOW_S)
    assert rate.wait_s(10, 1000) < before / 4
    rate.advance(120.0 + 20 * WINDOW_S)
    assert rate.wait_s(10, 1000) < 0.01


def test_a_clock_that_steps_back_changes_nothing() -> None:
    rate = drained(10, per_s=5, tokens=10)
    before = rate.wait_s(100, 1000)
    rate.advance(3.0)
    assert rate.wait_s(100, 1000) == before
