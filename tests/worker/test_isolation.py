"""A runner that raises for some sequences: they end alone, the others get their text, and the pages are as before."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_memory import PagedMemory, expected_output, hash_engine

from quire.worker.engine import Engine
from quire.worker.isolation import BROKEN_AFTER
from quire.worker.plan import StepPlan, StepResult
from quire.worker.protocol import FinishReason, GenerateRequest, SamplingParams, SequenceOutput
from quire.worker.sequence import sequence_seed

POISON = 49


class Fussy(PagedMemory):
    """Raises, half-way through a step, when a row has the token `POISON` among those that it computes."""

    def __init__(self, pages: int, page_size: int) -> None:
        super().__init__(pages, page_size)
        self.alone: list[int] = []  # sequences of the steps since the first failure that had one row
        self.together = 0  # steps since then that had more
        self.failed = 0

    def run(self, plan: StepPlan) -> StepResult:
        result = super().run(plan)
        if self.failed:
            if len(plan.rows) == 1:
                self.alone.append(plan.rows[0].seq)
            else:
                self.together += 1
        for row in plan.rows:
            if POISON in self.known[row.seq].tokens[row.start : row.start + row.num_tokens]:
                self.failed += 1
                raise FloatingPointError(f"token {POISON}")
        return result


def fussy_engine(**options: int) -> Engine:
    engine = hash_engine(**options)
    engine.runner = Fussy(engine.scheduler.pool.total, engine.scheduler.pool.page_size)
    return engine


def request(name: str, prompt: list[int], **params) -> GenerateRequest:
    return GenerateRequest(name, (tuple(prompt),), SamplingParams(**({"max_tokens": 6, "ignore_eos": True, "seed": 1} | params)))


def clean_seed(prompt: list[int], max_tokens: int = 6, n: int = 1) -> int:
    """A seed with which none of the choices comes to the poison by itself."""

    def is_clean(seed: int) -> bool:
        return all(POISON not in expected_output(prompt, sequence_seed(seed, k), max_tokens, ignore_eos=True) for k in range(n))

    return next(filter(is_clean, range(1000)))


def run(engine: Engine) -> dict[tuple[str, int], list[SequenceOutput]]:
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    for _ in range(2_000):
        if engine.idle():
            break
        for o in engine.step():
            outputs.setdefault((o.request_id, o.choice), []).append(o)
        engine.scheduler.check()
    assert engine.idle()
    counts = engine.scheduler.pool.counts()
    assert counts.active == counts.reserved == 0
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for o in outputs for token in o.tokens]


def test_only_the_request_that_makes_a_step_raise_ends():
    engine = fussy_engine(pages=64)
    for name, first in (("a", 1), ("b", 2), ("c", 3)):
        engine.submit(request(name, [first] * 5, max_tokens=12, seed=clean_seed([first] * 5, 12)))
    outputs = {(o.request_id, o.choice): [o] for o in engine.step()}

    def step() -> list[str]:
        new = engine.step()
        for o in new:
            outputs[o.request_id, o.choice].append(o)
        return [o.request_id for o in new]

    engine.submit(request("bad", [4, POISON, 5]))
    assert engine.step() == []  # the joint step raised
    assert engine.scheduler.running == []
    ended = engine.step()
    assert [(o.request_id, o.tokens, o.finish) for o in ended] == [("bad", (), FinishReason.ERROR)]
    assert "FloatingPointError" in ended[0].error
    assert engine.runner.alone == [3]  # the one without output is tried first
    for name in "abc":
        assert step() == [name]
    assert step() == ["a", "b", "c"]
    assert (engine.runner.alone, engine.runner.together) == ([3, 0, 1, 2], 1)
    for key, got in run(engine).items():
        outputs[key] += got
    for name, first in (("a", 1), ("b", 2), ("c", 3)):
        prompt = [first] * 5
        assert tokens(outputs[name, 0]) == expected_output(prompt, clean_seed(prompt, 12), 12, ignore_eos=True)
        assert [o.index for o in outputs[name, 0]] == list(range(12))


def test_a_token_that_only_comes_up_in_decoding_is_found_too():
    engine = fussy_engine(pages=64, page_size=4)
    seed = next(s for s in range(1000) if POISON in expected_output([9, 9], s, 10, ignore_eos=True)[3:9])
    want = expected_output([9, 9], seed, 10, ignore_eos=True)
    others = [s for s in range(1000) if POISON not in expected_output([9, 9], s, 10, ignore_eos=True)][:3]
    engine.submit(request("bad", [9, 9], seed=seed, max_tokens=10))
    for s in others:
        engine.submit(request(f"{s}", [9, 9], seed=s, max_tokens=10))
    outputs = run(engine)
    bad = outputs["bad", 0]
    assert bad[-1].finish is FinishReason.ERROR
    assert tokens(bad) == want[: want.index(POISON) + 1]
    for s in others:
        assert tokens(outputs[f"{s}", 0]) == expected_output([9, 9], s, 10, ignore_eos=True)


def test_all_choices_of_a_bad_prompt_end_and_the_neighbours_do_not():
    engine = fussy_engine(pages=64)
    seed = clean_seed([1, 2, 3], n=2)
    engine.submit(request("good", [1, 2, 3], n=2, seed=seed))
    engine.submit(request("bad", [1, POISON], n=4))
    outputs = run(engine)
    assert [outputs["bad", k][-1].finish for k in range(4)] == [FinishReason.ERROR] * 4
    for k in range(2):
        assert tokens(outputs["good", k]) == expected_output([1, 2, 3], sequence_seed(seed, k), 6, ignore_eos=True)


def test_nothing_of_a_failed_step_can_be_found():
    engine = fussy_engine(pages=16, page_size=4)
    engine.submit(request("bad", [1, 2, 3, 4, 5, 6, 7, POISON, 9]))
    run(engine)
    pool = engine.scheduler.pool
    assert pool.counts().free == 16
    assert pool.events.since(0).stored == ()


def test_an_abort_of_a_suspect_is_no_obstacle():
    engine = fussy_engine(pages=64)
    engine.submit(request("a", [1] * 5))
    engine.submit(request("b", [2] * 5))
    engine.submit(request("bad", [POISON]))
    engine.step()
    engine.abort("a")
    assert tokens(run(engine)["b", 0]) == expected_output([2] * 5, 1, 6, ignore_eos=True)


def test_a_runner_that_raises_for_everybody_ends_the_engine():
    engine = fussy_engine(pages=64)
    for i in range(BROKEN_AFTER + 1):
        engine.submit(request(f"r{i}", [i, POISON]))
    with pytest.raises(FloatingPointError):
        run(engine)
    assert engine.runner.failed == 1 + BROKEN_AFTER


def test_a_runner_that_raises_only_for_several_ends_the_engine_in_the_end():
    engine = hash_engine(pages=64)
    compute = engine.runner.run

    def alone_only(plan: StepPlan) -> StepResult:
        if len(plan.rows) > 1:
            raise FloatingPointError("together")
        return compute(plan)

    engine.runner.run = alone_only
    engine.submit(request("a", [1], max_tokens=100))
    engine.submit(request("b", [2], max_tokens=100))
    with pytest.raises(FloatingPointError, match="together"):
        run(engine)


def test_a_good_step_between_two_failures_clears_the_engine():
    engine = fussy_engine(pages=64)
    for i in range(3 * BROKEN_AFTER):
        engine.submit(request(f"bad {i}", [i, POISON]))
        assert run(engine)[f"bad {i}", 0][-1].finish is FinishReason.ERROR
        engine.submit(request(f"good {i}", [i], seed=clean_seed([i])))
        assert len(tokens(run(engine)[f"good {i}", 0])) == 6


def test_a_runner_that_cannot_start_over_ends_the_engine():
    engine = fussy_engine(pages=64)

    def no_way_back() -> None:
        raise ConnectionError("the other ranks are in the middle of a step")

    engine.runner.reset = no_way_back
    engine.submit(request("bad", [POISON]))
    with pytest.raises(ConnectionError):
        engine.step()


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(1, 3), st.booleans()), max_size=8),
    pages=st.integers(13, 24),
    max_batch_tokens=st.sampled_from([6, 9, 40]),
    prefix_cache=st.booleans(),
)
def test_random_requests_with_poison_among_them(prompts, pages, max_batch_tokens, prefix_cache):
    """Every request without poison gets its text, every other one ends with an error at the token that is poison."""
    engine = fussy_engine(pages=pages, page_size=4, max_batch_tokens=max_batch_tokens, max_running=6, prefix_cache=prefix_cache)
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    for number, (prompt, n, bad) in enumerate(prompts):
        good = request(f"good {number}", [*prompt, 5], n=n, max_tokens=3)
        engine.submit(good)
        if bad:
            engine.submit(request(f"bad {number}", [*prompt, POISON], n=n, max_tokens=3))
        for _ in range(200):  # a good step between one bad request and the next
            for o in engine.step():
                outputs.setdefault((o.request_id, o.choice), []).append(o)
            engine.scheduler.check()
            if engine.idle():
                break
    for number, (prompt, n, bad) in enumerate(prompts):
        for k in range(n):
            want = expected_output([*prompt, 5], sequence_seed(1, k), 3, ignore_eos=True)
            got = outputs[f"good {number}", k]
            if POISON in want[:-1]:
                assert got[-1].finish is FinishReason.ERROR
                want = want[: want.index(POISON) + 1]
            assert tokens(got) == want
            if bad:
                assert (tokens(outputs[f"bad {number}", k]), outputs[f"bad {number}", k][-1].finish) == ([], FinishReason.ERROR)
    assert engine.scheduler.pool.counts().active == 0
