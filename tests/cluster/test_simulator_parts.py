"""The pieces of the simulator, each against the plain way of doing the same."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from quire.cluster.simulator.decode_batch import DecodeBatch
from quire.cluster.simulator.jobs import Job, PageNames, sorted_jobs
from quire.cluster.simulator.loop import EventLoop
from quire.cluster.simulator.pages import Pages
from quire.cluster.simulator.sequence import Sequence
from quire.cluster.simulator.stretch import Stretch
from quire.worker.events import EventLog


def test_things_happen_in_the_order_of_their_times_and_then_of_asking() -> None:
    loop, seen = EventLoop(), []
    loop.at(2.0, lambda: seen.append(("b", loop.now_s)))
    loop.at(1.0, lambda: loop.after(1.0, lambda: seen.append(("c", loop.now_s))))
    loop.at(1.0, lambda: loop.at(0.5, lambda: seen.append(("late", loop.now_s))))
    loop.at(9.0, lambda: seen.append(("never", 9.0)))
    loop.run(until_s=5.0)
    assert seen == [("late", 1.0), ("b", 2.0), ("c", 2.0)]


@pytest.mark.parametrize("growth_s", [0.0, 0.0003])
def test_a_stretch_is_the_sum_of_its_steps(growth_s: float) -> None:
    steps = [0.01 + k * growth_s for k in range(200)]
    ends = [5.0 + sum(steps[:k]) for k in range(201)]
    stretch = Stretch(5.0, 200, 0.01, growth_s)
    assert stretch.end_s() == pytest.approx(ends[200])
    for k in range(200):
        middle_s = ends[k] + steps[k] / 2
        assert stretch.done(middle_s) == k
    stretch.drop(70)
    assert (stretch.start_s, stretch.first_s, stretch.steps) == (pytest.approx(ends[70]), pytest.approx(steps[70]), 130)
    assert stretch.end_s() == pytest.approx(ends[200])
    assert stretch.done(ends[200] + 1.0) == 129, "the end of the last one is for whoever waits for it"


def test_a_batch_counts_pages_and_tokens_as_if_every_sequence_were_stepped() -> None:
    draw, size = random.Random(0), 16
    batch, plain = DecodeBatch(size), {}
    for round_ in range(40):
        for i in range(draw.randrange(3)):
            s = Sequence(f"{round_}.{i}", draw.choice("ab"), draw.randrange(1, 100), draw.randrange(2, 60))
            s.known, s.computed = s.prompt_tokens + 1, s.prompt_tokens
            batch.add(s)
            plain[s] = s.computed
        if plain and draw.random() < 0.3:
            gone = draw.choice(list(plain))
            batch.remove(gone)
            assert (gone.computed, gone.pages) == (plain[gone], -(-plain.pop(gone) // size))
        assert batch.context == sum(plain.values())
        assert batch.tenants == {t: n for t in "ab" if (n := sum(s.tenant == t for s in plain))}
        if not plain:
            continue
        left = {s: s.prompt_tokens + s.output_tokens - 1 - computed for s, computed in plain.items()}
        assert batch.steps_left() == min(left.values())
        for steps in (1, 5, 40):
            needed = sum(-(-(c + steps) // size) - -(-c // size) for c in plain.values())
            assert batch.pages_needed(steps) == needed
            assert batch.steps_with(needed, steps) == steps
            if needed:
                most = batch.steps_with(needed - 1, steps)
                assert batch.pages_needed(most) < needed <= batch.pages_needed(most + 1)
        steps = draw.randrange(1, batch.steps_left() + 1)
        batch.advance(steps)
        plain = {s: computed + steps for s, computed in plain.items()}
        ended = batch.ended()
        assert set(ended) == {s for s in plain if left[s] == steps}
        assert all(s.generated == s.output_tokens for s in ended)
        plain = {s: computed for s, computed in plain.items() if s not in ended}


def test_cached_pages_are_found_until_their_memory_is_needed_oldest_first() -> None:
    log = EventLog()
    pages = Pages(6, log)
    a, b = (b"a0", b"a1"), (b"b0", b"b1")
    for chain in (a, b):
        pages.take(2)
        assert [pages.register(h) for h in chain] == [True, True]
        pages.release(chain)
    assert (pages.active, pages.cached, pages.available) == (0, 4, 6)
    pages.hold(a)
    pages.hold(a[:1])
    assert (pages.active, pages.cached, pages.available, pages.cached_among(a + b)) == (2, 2, 4, 2)
    pages.take(3)
    assert (pages.find(a, 9), pages.find(b, 9), pages.find(a, 1)) == (2, 1, 1), "the tail of the longest unused chain goes first"
    assert not pages.register(b"a0"), "it is found elsewhere already"
    pages.give_back(3)
    pages.release(a)
    assert pages.active == 1
    pages.release(a[:1])
    assert log.since(0).stored == (*a, b"b0")


def test_pages_are_named_after_the_block_in_which_they_end() -> None:
    names = PageNames(32)
    one = names.hashes(Job("1", 0.0, 100, 1, (7, 8), 64))
    assert one == (b"7.0", b"7.1", b"8.2")
    two = names.hashes(Job("2", 0.0, 200, 1, (7, 9, 9), 64))
    assert two[:2] == one[:2]
    assert len({*one, *two}) == 3 + 4
    assert names.hashes(Job("3", 0.0, 100, 1)) == ()
    odd = PageNames(48).hashes(Job("4", 0.0, 200, 1, (1, 2, 3, 4), 64))
    assert odd == (b"1.0", b"2.1", b"3.2", b"3.3")


@pytest.mark.parametrize("wrong", [{"prompt_tokens": 0}, {"output_tokens": 0}, {"arrival_s": -1.0}])
def test_jobs_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    job = Job("a", 0.0, 1, 1)
    with pytest.raises(ValueError, match="job a"):
        sorted_jobs([replace(job, **wrong)])
    with pytest.raises(ValueError, match="same request_id"):
        sorted_jobs([job, Job("a", 1.0, 1, 1)])
