"""The scheduler with exact page ids, and over thousands of random steps."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_memory import EOS, VOCAB, expected_output, hash_engine

from quire.worker.engine import Engine
from quire.worker.plan import Row, Sampled, StepResult
from quire.worker.protocol import BadRequest, FinishReason, GenerateRequest, Overloaded, SamplingParams, SequenceOutput
from quire.worker.scheduler import Scheduler
from quire.worker.sequence import Sequence, sequence_seed


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def request(
    name: str, *prompts: list[int], priority: int = 0, tenant: str = "", deadline_ms: int | None = None, **params
) -> GenerateRequest:
    params = {"max_tokens": 4, "ignore_eos": True, "seed": 1} | params
    return GenerateRequest(name, tuple(map(tuple, prompts)), SamplingParams(**params), priority, tenant, deadline_ms)


def run(engine: Engine) -> dict[tuple[str, int], list[SequenceOutput]]:
    """Step until idle, with the books checked after each step; the outputs of each sequence."""
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    for _ in range(10_000):
        if engine.idle():
            return outputs
        for o in engine.step():
            outputs.setdefault((o.request_id, o.choice), []).append(o)
        engine.scheduler.check()
    raise AssertionError("the engine did not become idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    """The output tokens, after checking that indices have no gap and that exactly the last output ends the sequence."""
    got: list[int] = []
    for o in outputs:
        assert o.index == len(got)
        got.extend(o.tokens)
    assert [o.finish is not None for o in outputs] == [False] * (len(outputs) - 1) + [True]
    return got


def test_plans_with_exact_pages():
    engine = hash_engine(pages=8, page_size=4, max_batch_tokens=6)
    scheduler, memory = engine.scheduler, engine.runner
    engine.submit(request("a", [1, 2, 3, 4, 5]))
    engine.submit(request("b", [6, 7, 8]))

    first = scheduler.plan()
    assert first.rows == (Row(0, 0, 5, True), Row(1, 0, 1, False))
    assert [(n.seq, n.pages) for n in first.new] == [(0, (0, 1)), (1, (2,))]
    scheduler.apply(memory.run(first))

    second = scheduler.plan()  # the decode first, then the rest of b's prompt
    assert second.rows == (Row(0, 5, 1, True), Row(1, 1, 2, True))
    assert second.new == ()
    assert second.pages == ()
    assert second.copies == ()
    assert second.forget == ()
    scheduler.apply(memory.run(second))
    for _ in range(2):
        plan = scheduler.plan()
        scheduler.apply(memory.run(plan))
    assert plan.rows == (Row(0, 7, 1, True), Row(1, 4, 1, True))
    assert plan.pages == ((1, (3,)),)  # b's fifth token starts its second page
    last = scheduler.plan()
    assert last.rows == (Row(1, 5, 1, True),)
    assert last.forget == (0,)


def test_prefix_hit_skips_whole_pages_but_never_the_last_token():
    engine = hash_engine(pages=16, page_size=4)
    prompt = list(range(1, 13))  # three full pages
    engine.submit(request("a", prompt))
    run(engine)
    engine.submit(request("b", prompt))
    outputs = run(engine)
    assert outputs["b", 0][0].cached_tokens == 8  # the third page holds the last token: its logits are needed
    assert tokens(outputs["b", 0]) == expected_output(prompt, 1, 4, ignore_eos=True)
    engine.submit(request("c", prompt, tenant="somebody else"))
    assert run(engine)["c", 0][0].cached_tokens == 0


def test_fork_shares_the_prompt_and_copies_on_write():
    engine = hash_engine(pages=16, page_size=4)
    prompt = [1, 2, 3, 4, 5, 6]
    engine.submit(request("a", prompt, n=3, max_tokens=2))
    scheduler, memory = engine.scheduler, engine.runner
    scheduler.apply(memory.run(scheduler.plan()))
    plan = scheduler.plan()
    # The leader holds pages 0 and 1. Each follower shares page 0, copies page 1 and computes the last prompt token again.
    assert [(n.seq, n.pages) for n in plan.new] == [(1, (0, 2)), (2, (0, 3))]
    assert plan.copies == ((1, 2), (1, 3))
    assert plan.rows == (Row(0, 6, 1, True), Row(1, 5, 1, True), Row(2, 5, 1, True))
    assert scheduler.pool.references[:4] == [3, 1, 1, 1]
    scheduler.check()
    scheduler.apply(memory.run(plan))
    run(engine)
    assert memory.computed_tokens == 6 + 1 + 2 * 2  # 6 prompt tokens once, then what each sequence adds


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_every_choice_of_a_fork_is_what_it_would_be_alone(length):
    prompt = list(range(1, length + 1))
    engine = hash_engine(pages=64)
    engine.submit(request("a", prompt, n=4, max_tokens=9))
    outputs = run(engine)
    for k in range(4):
        assert tokens(outputs["a", k]) == expected_output(prompt, sequence_seed(1, k), 9, ignore_eos=True)


def test_followers_survive_their_leader():
    engine = hash_engine(pages=64)
    engine.submit(request("a", list(range(1, 40)), n=3))
    engine.step()  # in the middle of the prompt
    assert [o.finish for o in engine.abort("a", 0)] == [FinishReason.ABORT]
    outputs = run(engine)
    assert tokens(outputs["a", 2]) == expected_output(range(1, 40), sequence_seed(1, 2), 4, ignore_eos=True)


def test_a_long_prompt_never_stalls_a_decode():
    engine = hash_engine(pages=64, page_size=4, max_batch_tokens=8)
    engine.submit(request("short", [1, 2], max_tokens=12))
    engine.step()
    engine.submit(request("long", list(range(1, 41)), priority=-1))  # before the short one in scheduling order
    steps = [[o.request_id for o in engine.step()] for _ in range(7)]
    assert steps == [["short"]] * 5 + [["short", "long"], ["long", "short"]]  # 40 prompt tokens, 7 a step beside the decode


def test_the_last_in_order_gives_way_and_comes_back_at_its_place():
    engine = hash_engine(pages=6, page_size=4, prefix_cache=False)
    engine.submit(request("first", [1] * 8, max_tokens=12))
    engine.submit(request("second", [2] * 7, max_tokens=9))
    outputs = run(engine)
    counters = engine.scheduler.counters
    assert engine.scheduler.decisions.counts["recompute"] == 1
    assert counters.recomputed_tokens > 0
    assert tokens(outputs["first", 0]) == expected_output([1] * 8, 1, 12, ignore_eos=True)
    assert tokens(outputs["second", 0]) == expected_output([2] * 7, 1, 9, ignore_eos=True)


def test_who_gives_way_leaves_the_step_that_was_planned_for_it():
    engine = hash_engine(pages=8, page_size=4, max_batch_tokens=4)
    engine.submit(request("short", [1, 2, 3], max_tokens=20))
    outputs = engine.step()
    engine.submit(request("long", list(range(1, 25)), priority=-1))
    scheduler, memory = engine.scheduler, engine.runner
    while not scheduler.decisions.counts["recompute"]:
        plan = scheduler.plan()  # the decode of "short" comes first, and takes the page that the prompt of "long" needs
        scheduler.check()
        outputs += scheduler.apply(memory.run(plan))
    assert [row.seq for row in plan.rows] == [1]
    assert plan.forget == (0,)
    outputs += [o for some in run(engine).values() for o in some]
    assert tokens([o for o in outputs if o.request_id == "short"]) == expected_output([1, 2, 3], 1, 20, ignore_eos=True)


def test_priority_goes_before_arrival():
    engine = hash_engine(max_running=1)
    for name, priority in (("late", 5), ("soon", 0), ("now", -5)):
        engine.submit(request(name, [1, 2, 3], priority=priority))
    order = [name for name, _ in run(engine)]
    assert order == ["now", "soon", "late"]


def test_a_higher_priority_takes_the_place_of_the_last_of_a_lower_one():
    engine = hash_engine(pages=16, page_size=4, max_running=2)
    scheduler = engine.scheduler
    engine.submit(request("low", [1] * 5, priority=1, max_tokens=9))
    engine.submit(request("lowest", [2] * 5, priority=2, max_tokens=9))
    outputs = engine.step()
    engine.submit(request("equal", [3] * 5, priority=2))
    outputs += engine.step()
    assert [s.request_id for s in scheduler.running] == ["low", "lowest"]  # between equals nobody gives way
    engine.submit(request("high", [4] * 5))
    plan = scheduler.plan()
    assert plan.forget == (1,)
    assert [(n.seq, n.pages) for n in plan.new] == [(3, (3, 4))]  # the half-full page that was given back; the full one stays findable
    assert plan.rows == (Row(0, 6, 1, True), Row(3, 0, 5, True))
    assert [s.request_id for s in scheduler.waiting] == ["lowest", "equal"]  # at its old place
    scheduler.check()
    outputs += scheduler.apply(engine.runner.run(plan))
    assert scheduler.decisions.counts["recompute"] == 1
    outputs += [o for some in run(engine).values() for o in some]
    assert scheduler.decisions.counts["recompute"] == 1
    for name, first in (("low", 1), ("lowest", 2)):
        got = tokens([o for o in outputs if o.request_id == name])
        assert got == expected_output([first] * 5, 1, 9, ignore_eos=True)


def test_as_few_give_way_as_will_do_and_none_when_all_would_not():
    engine = hash_engine(pages=10, page_size=4, max_batch_tokens=40, prefix_cache=False)
    scheduler = engine.scheduler
    engine.submit(request("first", [1] * 9, max_tokens=3))  # three pages, for good
    for name in ("x", "y", "z"):
        engine.submit(request(name, [2] * 5, priority=3, max_tokens=3))  # two pages each
    engine.step()
    engine.submit(request("too large", [3] * 32, max_tokens=1))  # eight pages: one free, six that could be given back, and first's
    engine.step()
    assert [s.request_id for s in scheduler.running] == ["first", "x", "y", "z"]
    engine.abort("too large")
    engine.submit(request("high", [3] * 13, max_tokens=1))  # four pages: two of them must be given back, and one to grow
    plan = scheduler.plan()
    assert plan.forget == (3, 2)
    assert [s.request_id for s in scheduler.running] == ["first", "high", "x"]
    scheduler.check()


def test_shared_pages_are_no_gain_until_their_last_holder_gives_way():
    engine = hash_engine(pages=7, page_size=4, max_batch_tokens=40)
    scheduler = engine.scheduler
    engine.submit(request("pair", [1] * 8, priority=1, n=2, max_tokens=4))
    engine.step()
    engine.step()
    assert [s.pages for s in scheduler.running] == [[0, 1, 2], [0, 3]]
    engine.submit(request("high", [2] * 18, max_tokens=1))  # five pages: two are free, and the follower has two of its own by then
    plan = scheduler.plan()
    assert plan.forget == (1, 0)
    assert [s.request_id for s in scheduler.running] == ["high"]
    scheduler.check()
    scheduler.apply(engine.runner.run(plan))
    run(engine)


def test_a_long_prompt_does_not_hold_up_a_higher_priority():
    engine = hash_engine(pages=64, page_size=4, max_batch_tokens=8)
    engine.submit(request("long", list(range(1, 41)), priority=1))
    engine.step()
    engine.submit(request("high", [1, 2, 3], max_tokens=1))
    assert [o.request_id for o in engine.step()] == ["high"]
    assert engine.scheduler.decisions.counts["recompute"] == 0  # there were places and pages for both
    assert engine.scheduler.running[0].num_computed == 8 + 5


def test_who_waits_past_its_deadline_ends_and_who_has_started_does_not():
    clock = Clock()
    engine = hash_engine(max_running=1, clock=clock)
    engine.submit(request("runs", [1], deadline_ms=1000, max_tokens=6))
    engine.step()
    engine.submit(request("waits", [2], [3], n=2, deadline_ms=1000))
    engine.submit(request("patient", [4], deadline_ms=9000))
    clock.now_s = 0.999
    assert [o.request_id for o in engine.step()] == ["runs"]
    clock.now_s = 1.0
    outputs = engine.step()
    assert [(o.request_id, o.choice, o.tokens, o.finish) for o in outputs[:4]] == [
        ("waits", k, (), FinishReason.DEADLINE) for k in range(4)
    ]
    assert "deadline_ms" in outputs[0].error
    assert [o.request_id for o in outputs[4:]] == ["runs"]
    engine.scheduler.check()
    assert {name for name, _ in run(engine)} == {"runs", "patient"}


def test_a_request_that_has_started_is_not_dropped_although_some_of_it_waits():
    clock = Clock()
    engine = hash_engine(max_running=1, clock=clock)
    engine.submit(request("a", [1], [2], deadline_ms=0))
    engine.submit(request("b", [1], deadline_ms=1))
    clock.now_s = -1.0
    engine.step()
    clock.now_s = 5.0
    outputs = run(engine)
    assert [outputs[key][-1].finish for key in (("a", 0), ("a", 1), ("b", 0))] == [
        FinishReason.LENGTH,
        FinishReason.LENGTH,
        FinishReason.DEADLINE,
    ]


def test_a_failed_sequence_fails_alone_and_leaves_nothing_to_be_found():
    engine = hash_engine(pages=16, page_size=4)
    engine.submit(request("good", [1] * 5))
    engine.submit(request("bad", [2] * 5))
    plan = engine.scheduler.plan()
    outputs = engine.scheduler.apply(StepResult(0, (Sampled(0, 7), Sampled(1, 0, error="not finite"))))
    assert len(plan.rows) == 2
    assert [(o.request_id, o.finish, o.error) for o in outputs] == [("good", None, None), ("bad", FinishReason.ERROR, "not finite")]
    pool = engine.scheduler.pool
    assert pool.find(pool.root(""), [2] * 5, 1) == ([], [])
    engine.scheduler.check()


def test_eos_and_stop_tokens_end_a_sequence_after_min_tokens():
    engine = hash_engine(pages=64)
    free_run = expected_output([3, 1], 1, 30, ignore_eos=True)
    stop = free_run[4]
    engine.submit(request("a", [3, 1], max_tokens=30, stop_token_ids=(stop,)))
    engine.submit(request("b", [3, 1], max_tokens=30, stop_token_ids=(stop,), min_tokens=6))
    outputs = run(engine)
    first = free_run.index(stop) + 1
    assert tokens(outputs["a", 0]) == free_run[:first]
    assert (outputs["a", 0][-1].finish, outputs["a", 0][-1].stop_token) == (FinishReason.STOP, stop)
    assert len(tokens(outputs["b", 0])) >= 6
    # Under a grammar, which says when a token that ends it may be drawn, such a token always ends it.
    engine.submit(request("c", [3, 1], max_tokens=30, stop_token_ids=(stop,), min_tokens=30, ignore_eos=True, grammar="start: /a*/"))
    assert tokens(run(engine)["c", 0]) == expected_output([3, 1], 1, first)
    assert engine.scheduler.eos_token_ids == {EOS}


def test_what_can_never_fit_is_refused_at_once():
    engine = hash_engine(pages=4, page_size=4, max_model_len=100)
    with pytest.raises(BadRequest, match="KV pool of 16 tokens"):
        engine.submit(request("a", [1] * 10, max_tokens=7))
    with pytest.raises(BadRequest, match="prompt"):
        engine.submit(request("a", [1] * 16, max_tokens=1))
    engine.submit(request("fits", [1] * 10, max_tokens=6))
    assert len(tokens(run(engine)["fits", 0])) == 6


def test_the_queue_is_bounded_and_requests_enter_whole():
    engine = hash_engine(max_running=2, max_waiting=2)
    engine.submit(request("a", [1], n=3))
    with pytest.raises(Overloaded) as refused:
        engine.submit(request("b", [1], n=2))
    assert refused.value.retry_after_s >= 1
    engine.submit(request("c", [1]))
    with pytest.raises(BadRequest, match="5 sequences; at most 4"):
        engine.submit(request("d", [1], n=5))
    assert {name for name, _ in run(engine)} == {"a", "c"}


def watch_preemptions(scheduler: Scheduler) -> None:
    """Fail when the head of the order gives way."""
    preempt = scheduler._preempt

    def watched(s: Sequence) -> None:
        assert s.order > min(other.order for some in (scheduler.running, scheduler.waiting) for other in some)
        preempt(s)

    scheduler._preempt = watched


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.tuples(st.integers(1, 3), st.integers(1, 30)).map(lambda t: [t[0]] * (t[1] // 2) + [t[0] + 1] * (t[1] - t[1] // 2)),
        "max_tokens": st.integers(1, 20),
        "n": st.integers(1, 3),
        "priority": st.integers(-1, 1),
        "seed": st.integers(0, 3),
        "tenant": st.sampled_from(["", "t"]),
        "ignore_eos": st.booleans(),
        "deadline_ms": st.sampled_from([None, None, 0, 3000]),
    }
)
EVENTS = st.lists(
    st.one_of(REQUESTS, st.tuples(st.just("abort"), st.integers(0, 40), st.one_of(st.none(), st.integers(0, 2))), st.integers(1, 8)),
    max_size=40,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    events=EVENTS,
    pages=st.integers(13, 30),
    page_size=st.sampled_from([4, 5, 7]),
    max_batch_tokens=st.sampled_from([6, 9, 40]),
    max_running=st.integers(1, 6),
    prefix_cache=st.booleans(),
    host_pages=st.sampled_from([0, 3, 15, 60]),
    preemption=st.sampled_from(["decide", "recompute", "swap", "swap"]),
    delay=st.integers(1, 3),
    failing=st.sampled_from([None, None, 2, 5]),
    ahead=st.booleans(),
)
def test_random_traffic_keeps_the_books_and_the_text(
    events, pages, page_size, max_batch_tokens, max_running, prefix_cache, host_pages, preemption, delay, failing, ahead
):
    """Requests, forks and aborts at random in a tiny pool: pages are conserved after every step, and every sequence gets its text.

    The first of those that run or wait never gives way, and a request ends by its deadline whole or not at all. Copies to host memory
    and back take their time, and every `failing`-th of them fails. With `ahead` the next step is planned and begun before the present one
    is applied, wherever that can be.
    """
    clock = Clock()
    engine = hash_engine(
        pages,
        page_size,
        max_batch_tokens,
        max_running,
        prefix_cache=prefix_cache,
        clock=clock,
        host_pages=host_pages,
        preemption=preemption,
    )
    engine.runner.delay, engine.runner.failing, engine.runner.ahead = delay, failing, ahead
    watch_preemptions(engine.scheduler)
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    submitted: dict[str, dict] = {}
    steps = 0

    def keep(new: list[SequenceOutput]) -> None:
        for o in new:
            outputs.setdefault((o.request_id, o.choice), []).append(o)
        engine.scheduler.check()

    for event in events:
        if isinstance(event, dict):
            name = f"r{len(submitted)}"
            submitted[name] = event
            extra = {k: event[k] for k in event if k != "prompt"}
            engine.submit(request(name, event["prompt"], **extra))
        elif isinstance(event, tuple):
            keep(engine.abort(f"r{event[1]}", event[2]))
        else:
            for _ in range(event):
                clock.now_s += 1.0
                keep(engine.step())
    while not engine.idle():
        before = engine.scheduler.counters.output_tokens, engine.runner.computed_tokens
        clock.now_s += 1.0
        keep(engine.step())
        advanced = (engine.scheduler.counters.output_tokens, engine.runner.computed_tokens) != before
        assert advanced or engine.idle() or engine.runner.moving or ahead, "a step advanced nobody"
        steps += 1
        assert steps < 5_000
    while engine.runner.moving or not engine.resting:  # what the runner must forget, and prefixes that go to host memory
        engine.step()
        engine.scheduler.check()
    assert engine.runner.largest_step <= max_batch_tokens
    counts = engine.scheduler.pool.counts()
    assert counts.active == counts.reserved == 0
    assert counts.free + counts.cached == pages
    assert engine.scheduler.host.pages.counts().active == 0
    for name, event in submitted.items():
        for k in range(event["n"]):
            got = outputs[name, k]
            want = expected_output(event["prompt"], sequence_seed(event["seed"], k), event["max_tokens"], event["ignore_eos"])
            text = tokens(got)
            whole = got[-1].finish not in (FinishReason.ABORT, FinishReason.DEADLINE)
            assert text == (want if whole else want[: len(text)])
        ends = {outputs[name, k][-1].finish for k in range(event["n"])}
        if FinishReason.DEADLINE in ends:
            assert event["deadline_ms"] is not None
            assert ends <= {FinishReason.DEADLINE, FinishReason.ABORT}
            assert not any(tokens(outputs[name, k]) for k in range(event["n"]))
    assert VOCAB > 4
