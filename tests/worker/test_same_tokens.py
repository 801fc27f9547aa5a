"""The promise: greedy tokens are those of transformers' `generate`, whatever happens to the pages.

The same fp32 weights, the first 32 MT-bench questions and 8 contexts of 1,500 tokens and more cut from the sonnets, 64 new
tokens each. Where a token differs, transformers' own logits must have a tie there: a top-2 gap below 1e-4.

`generate` takes longer than all the tests, so its answers are on record, and only a few of them are asked for again here. What is not
marked `slow` asks a few of the questions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from disturbing import swap_at_random
from same_tokens_reference import LONG_CONTEXTS, NEW_TOKENS, QUESTIONS, Reference, prompts_of, recorded

from quire import LLM, SamplingParams

pytestmark = pytest.mark.first

TIE = 1e-4
AGAIN = [17, QUESTIONS]  # a question, and the first of the long contexts
FEW = range(5)
SEVERAL = [*range(12), QUESTIONS]
ALL = range(QUESTIONS + LONG_CONTEXTS)
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass
class Record:
    """Prompts, what is on record of them, and who can say whether there was a tie."""

    prompts: list[list[int]]
    expected: list[list[int]]
    reference: Reference

    def check(self, llm: LLM, some: Sequence[int], at_once: int, how: str) -> None:
        """Generate `at_once` by `at_once`, and `compare`."""
        out: list[list[int]] = []
        for i in range(0, len(some), at_once):
            prompts = [self.prompts[p] for p in some[i : i + at_once]]
            out += [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, progress=False)]
        self.compare(out, some, how)

    def compare(self, got: list[list[int]], some: Sequence[int], how: str) -> None:
        """Fail unless every first difference is a tie; say how many ties there were."""
        found = 0
        for prompt, a, b in zip([self.prompts[p] for p in some], got, [self.expected[p] for p in some], strict=True):
            assert len(a) == len(b) == NEW_TOKENS
            if a == b:
                continue
            first = next(i for i in range(NEW_TOKENS) if a[i] != b[i])
            gap = self.reference.gap(prompt + b[:first])
            assert gap < TIE, f"{how}: token {first} of the prompt {prompt[:8]}... differs where the top-2 gap is {gap:.2e}"
            found += 1
        print(f"{how}: {len(got) - found} of {len(got)} sequences identical, {found} differ at a tie below {TIE:g}")


@pytest.fixture(scope="module")
def record(data_file: Callable[[str], Path]) -> Record:
    prompts = prompts_of(data_file("prompts/mt_bench_question.jsonl.gz"), data_file("prompts/shakespeare_sonnets.txt"))
    expected = recorded(prompts)
    assert expected is not None, "smollm2_reference.json is of other prompts or weights: run tests/worker/same_tokens_reference.py"
    return Record(prompts, expected, Reference())


def engine(**options: object) -> LLM:
    return LLM(progress=False, **{"max_running": 16, "kv_pages": 1200} | options)


@pytest.mark.slow
def test_what_is_on_record_is_what_transformers_generates(record):
    got = [record.reference.generate([record.prompts[i]])[0] for i in AGAIN]
    record.compare(got, AGAIN, "transformers again, one at a time")


@pytest.mark.slow
def test_alone(record):
    record.check(engine(prefix_cache=False), ALL, 1, "alone")


@pytest.mark.slow
def test_with_chunks_of_64_tokens(record):
    record.check(engine(prefix_cache=False, max_batch_tokens=64), ALL, 16, "chunks of 64")


@pytest.mark.parametrize("some", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_sixteen_at_a_time_and_then_with_a_warm_prefix_cache(record, some):
    llm = engine()
    record.check(llm, some, 16, "16 at a time")
    before = llm.stats().prefix_hit_tokens
    record.check(llm, some, 16, "warm prefix cache")
    reusable = sum((len(record.prompts[p]) - 1) // 32 * 32 for p in some)
    assert llm.stats().prefix_hit_tokens - before == reusable


@pytest.mark.parametrize(("some", "kv_pages"), [(FEW, 16), pytest.param(ALL, 60, marks=pytest.mark.slow)], ids=["few", "all"])
def test_with_preemption(record, some, kv_pages):
    """A pool that one of the longest sequences nearly fills, and that several short ones outgrow."""
    llm = engine(prefix_cache=False, kv_pages=kv_pages, preemption="recompute")
    record.check(llm, some, 40, "preempted")
    stats = llm.stats()
    assert stats.preemptions["recompute"] > 0
    assert stats.recomputed_tokens > 0
    assert stats.pages_active == 0


@pytest.mark.slow
def test_with_sequences_swapped_out_at_random(record):
    """Each running sequence leaves for host memory every thirty steps or so, and comes back."""
    llm = engine(prefix_cache=False, kv_pages=200, preemption="swap", host_memory="2GiB", verify_moves=True)
    draw, step = random.Random(0), llm.engine.step

    def disturbed():
        swap_at_random(llm.engine, draw, 0.03)
        return step()

    llm.engine.step = disturbed
    record.check(llm, SEVERAL, len(SEVERAL), "swapped")
    stats = llm.stats()
    assert stats.moved_bytes["in"] > 0
    assert stats.recomputed_tokens == 0
    assert stats.pages_active == stats.host_pages_active == 0
