"""The promise: greedy tokens are those of transformers' `generate`, whatever happens to the pages.

The same fp32 weights, the first 32 MT-bench questions and 8 contexts of 1,500 tokens and more cut from the sonnets, 64 new
tokens each. Where a token differs, transformers' own logits must have a tie there: a top-2 gap below 1e-4.

`generate` takes longer than all the tests, so its answers are on record, and only a few of them are asked for again here.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from same_tokens_reference import NEW_TOKENS, QUESTIONS, Reference, prompts_of, recorded
from test_swapping import swap_at_random

from quire import LLM, SamplingParams

pytestmark = [pytest.mark.first, pytest.mark.slow]

TIE = 1e-4
AGAIN = [17, QUESTIONS]  # a question, and the first of the long contexts
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def prompts(data_file: Callable[[str], Path]) -> list[list[int]]:
    return prompts_of(data_file("prompts/mt_bench_question.jsonl.gz"), data_file("prompts/shakespeare_sonnets.txt"))


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    found = recorded(prompts)
    assert found is not None, "smollm2_reference.json is of other prompts or weights: run tests/worker/same_tokens_reference.py"
    return found


def generate(llm: LLM, prompts: list[list[int]], at_once: int) -> list[list[int]]:
    out: list[list[int]] = []
    for i in range(0, len(prompts), at_once):
        out += [o.outputs[0].token_ids for o in llm.generate(prompts[i : i + at_once], GREEDY, progress=False)]
    return out


def ties(reference: Reference, prompts: list[list[int]], got: list[list[int]], expected: list[list[int]], how: str) -> None:
    """Fail unless every first difference is a tie; say how many ties there were."""
    found = 0
    for prompt, a, b in zip(prompts, got, expected, strict=True):
        assert len(a) == len(b) == NEW_TOKENS
        if a == b:
            continue
        first = next(i for i in range(NEW_TOKENS) if a[i] != b[i])
        gap = reference.gap(prompt + b[:first])
        assert gap < TIE, f"{how}: token {first} of the prompt {prompt[:8]}... differs where the top-2 gap is {gap:.2e}"
        found += 1
    print(f"{how}: {len(got) - found} of {len(got)} sequences identical, {found} differ at a tie below {TIE:g}")


def engine(**options: object) -> LLM:
    return LLM(progress=False, **{"max_running": 16, "kv_pages": 1200} | options)


def test_what_is_on_record_is_what_transformers_generates(reference, prompts, expected):
    got = [reference.generate([prompts[i]])[0] for i in AGAIN]
    ties(reference, [prompts[i] for i in AGAIN], got, [expected[i] for i in AGAIN], "transformers again, one at a time")


def test_alone(reference, prompts, expected):
    ties(reference, prompts, generate(engine(prefix_cache=False), prompts, 1), expected, "alone")


def test_with_chunks_of_64_tokens(reference, prompts, expected):
    llm = engine(prefix_cache=False, max_batch_tokens=64)
    ties(reference, prompts, generate(llm, prompts, 16), expected, "chunks of 64")


def test_sixteen_at_a_time_and_then_with_a_warm_prefix_cache(reference, prompts, expected):
    llm = engine()
    ties(reference, prompts, generate(llm, prompts, 16), expected, "16 at a time")
    before = llm.stats().prefix_hit_tokens
    ties(reference, prompts, generate(llm, prompts, 16), expected, "warm prefix cache")
    reusable = sum((len(prompt) - 1) // 32 * 32 for prompt in prompts)
    assert llm.stats().prefix_hit_tokens - before == reusable


def test_with_preemption(reference, prompts, expected):
    """A pool that one of the long sequences nearly fills, and that sixteen short ones outgrow."""
    llm = engine(prefix_cache=False, kv_pages=60, preemption="recompute")
    ties(reference, prompts, generate(llm, prompts, 40), expected, "preempted")
    stats = llm.stats()
    assert stats.preemptions["recompute"] > 0
    assert stats.recomputed_tokens > 0
    assert stats.pages_active == 0


def test_with_sequences_swapped_out_at_random(reference, prompts, expected):
    """Each running sequence leaves for host memory every thirty steps or so, and comes back."""
    llm = engine(prefix_cache=False, kv_pages=200, preemption="swap", host_memory="2GiB", verify_moves=True)
    draw, step = random.Random(0), llm.engine.step

    def disturbed():
        swap_at_random(llm.engine, draw, 0.03)
        return step()

    llm.engine.step = disturbed
    some = [*range(12), QUESTIONS]  # one of them a long context
    prompts, expected = [prompts[i] for i in some], [expected[i] for i in some]
    ties(reference, prompts, generate(llm, prompts, len(prompts)), expected, "swapped")
    stats = llm.stats()
    assert stats.moved_bytes["in"] > 0
    assert stats.recomputed_tokens == 0
    assert stats.pages_active == stats.host_pages_active == 0
