"""Planning the next step before the present one is applied: when that can be, and what of it is dropped."""

import pytest
from paged_memory import EOS, expected_output, hash_engine

from quire.worker.engine import Engine
from quire.worker.plan import Row
from quire.worker.protocol import FinishReason, GenerateRequest, SamplingParams


def request(name: str, prompt: list[int], **params) -> GenerateRequest:
    return GenerateRequest(name, (tuple(prompt),), SamplingParams(**({"max_tokens": 6, "ignore_eos": True, "seed": 1} | params)))


def started(*requests: GenerateRequest, **options) -> Engine:
    """An engine whose first step is planned, and not applied."""
    engine = hash_engine(**options)
    for one in requests:
        engine.submit(one)
    return engine


def test_exact_rows_and_pages():
    engine = started(request("a", [1, 2, 3]), request("b", [4, 5, 6, 7], max_tokens=1), page_size=4)
    scheduler, memory = engine.scheduler, engine.runner
    first = scheduler.plan()
    second = scheduler.plan_ahead()
    assert second.step == first.step + 1
    assert second.rows == (Row(0, 3, 1, True),)  # b is known to end
    assert second.pages == second.new == second.forget == ()
    scheduler.apply(memory.run(first))
    assert scheduler.plan() is second
    third = scheduler.plan_ahead()
    assert third.rows == (Row(0, 4, 1, True),)
    assert third.pages == ((0, (2,)),)  # its fifth token starts a page
    assert third.forget == (1,)


def test_a_long_prompt_goes_on_in_chunks_beside_a_decode():
    engine = started(request("a", [1, 2, 3]), page_size=4, max_batch_tokens=5, max_running=4)
    scheduler, memory = engine.scheduler, engine.runner
    scheduler.apply(memory.run(scheduler.plan()))
    engine.submit(request("b", list(range(1, 12))))
    assert scheduler.plan().rows == (Row(0, 3, 1, True), Row(1, 0, 4, False))
    assert scheduler.plan_ahead().rows == (Row(0, 4, 1, True), Row(1, 4, 4, False))


def test_what_comes_of_a_sequence_that_has_ended_is_dropped():
    prompt = next([p, 7] for p in range(1, 50) if EOS in expected_output([p, 7], 1, 6)[1:5])
    want = expected_output(prompt, 1, 6)
    engine = started(request("a", prompt, ignore_eos=False))
    engine.runner.ahead = True
    outputs = []
    while not engine.idle():
        outputs += engine.step()
        engine.scheduler.check()
    assert [t for o in outputs for t in o.tokens] == want
    assert outputs[-1].finish is FinishReason.STOP
    assert engine.runner.issued, "the row behind the last token was issued"
    assert engine.step() == []  # and is taken back with nothing to tell
    assert engine.step() == []
    assert engine.resting
    assert not engine.runner.issued
    assert engine.scheduler.pool.counts().active == 0


def test_an_abort_while_the_next_step_is_under_way():
    engine = started(request("a", [1, 2]), request("b", [3]))
    engine.runner.ahead = True
    engine.step()
    assert [o.finish for o in engine.abort("a")] == [FinishReason.ABORT]
    rest = []
    while not engine.idle():
        rest += engine.step()
        engine.scheduler.check()
    assert {o.request_id for o in rest} == {"b"}
    assert sum(len(o.tokens) for o in rest) == 5


def test_who_is_frozen_while_the_next_step_is_under_way_goes_on_as_if_it_had_not_been():
    engine = started(request("a", [1, 2]), request("b", [3]))
    engine.runner.ahead = True
    outputs = engine.step()
    held = engine.scheduler.request("a")
    engine.scheduler.freeze(held)
    outputs += engine.step()  # the step ahead has a row for it, which is dropped
    assert [o.request_id for o in outputs] == ["a", "b", "b"]
    engine.scheduler.thaw(held)
    while not engine.idle():
        outputs += engine.step()
        engine.scheduler.check()
    for name, prompt in (("a", [1, 2]), ("b", [3])):
        assert [t for o in outputs if o.request_id == name for t in o.tokens] == expected_output(prompt, 1, 6, ignore_eos=True)


@pytest.mark.parametrize(("name", "value"), [("prompt_logprobs", 0), ("grammar", "start: /a+/")])
def test_who_needs_values_is_waited_for(name, value):
    engine = started(request("a", [1, 2]), request("b", [3], **{name: value}))
    engine.scheduler.plan()
    assert engine.scheduler.plan_ahead() is None


def test_who_could_be_admitted_is_not_passed_over():
    engine = started(request("a", [1, 2]), max_running=2)
    scheduler = engine.scheduler
    scheduler.plan()
    engine.submit(request("b", [3]))
    assert scheduler.plan_ahead() is None  # b has a place


def test_who_has_no_place_does_not_hold_up_the_rest():
    engine = started(request("a", [1, 2]), request("b", [3], max_tokens=2), max_running=1)
    scheduler, memory = engine.scheduler, engine.runner
    first = scheduler.plan()
    assert scheduler.plan_ahead().rows == (Row(0, 2, 1, True),)
    scheduler.apply(memory.run(first))
    second = scheduler.plan()
    engine.abort("a")
    assert scheduler.plan_ahead() is None  # there is a place now
    scheduler.apply(memory.run(second))
    assert [row.seq for row in scheduler.plan().rows] == [1]


def test_without_pages_there_is_no_plan_and_nothing_is_held():
    engine = started(request("a", [1, 2, 3, 4, 5, 6, 7]), request("b", [7, 6, 5, 4, 3, 2, 1]), pages=4, page_size=4, prefix_cache=False)
    scheduler, memory = engine.scheduler, engine.runner
    scheduler.apply(memory.run(scheduler.plan()))
    assert len(scheduler.plan().rows) == 2
    assert scheduler.plan_ahead() is None
    assert [len(s.pages) for s in scheduler.running] == [2, 2]
    scheduler.check()


def test_a_copy_on_write_waits():
    engine = started(GenerateRequest("a", ((1, 2),), SamplingParams(max_tokens=6, n=2, seed=1, ignore_eos=True)))
    engine.scheduler.plan()
    assert engine.scheduler.plan_ahead() is None  # the second choice starts from the first one's page


def test_a_step_that_raises_takes_the_next_one_with_it():
    engine = started(request("a", [1, 2]), request("b", [3]))
    scheduler, memory = engine.scheduler, engine.runner
    scheduler.plan()
    assert scheduler.plan_ahead() is not None
    memory.reset()
    scheduler.fail("it broke")
    plan = scheduler.plan()
    assert [row.seq for row in plan.rows] == [0]  # the suspects, alone
    assert plan.new
