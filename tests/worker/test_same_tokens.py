"""The promise: greedy tokens are those of transformers' `generate`, whatever happens to the pages.

The same fp32 weights, the first 32 MT-bench questions and 8 contexts of 1,500 tokens and more cut from the sonnets, 64 new
tokens each. Where a token differs, transformers' own logits must have a tie there: a top-2 gap below 1e-4.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from quire import LLM, SamplingParams
from quire.worker.text.source import resolve_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NEW_TOKENS, TIE, LONG_TOKENS = 64, 1e-4, 1500
NO_TOKEN = -1  # as end of sequence: go on past it
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


class Reference:
    """transformers on the same weights."""

    def __init__(self) -> None:
        path = resolve_model("smollm2")
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy continuations of a batch, padded on the left."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0)
        return self.model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()

    @torch.inference_mode()
    def gap(self, context: list[int]) -> float:
        """Between the two highest logits after `context`."""
        best = self.model(torch.tensor([context]), logits_to_keep=1).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def prompts(data_file: Callable[[str], Path]) -> list[list[int]]:
    """Token ids: 32 questions through the chat template, 8 long contexts."""
    from quire.worker.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model("smollm2"))
    with gzip.open(data_file("prompts/mt_bench_question.jsonl.gz"), "rt") as file:
        questions = [json.loads(line)["turns"][0] for line in list(file)[:32]]
    rendered = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    sonnets = tokenizer.encode(data_file("prompts/shakespeare_sonnets.txt").read_text())
    long = [sonnets[i * 2000 : i * 2000 + LONG_TOKENS + 37 * i] for i in range(8)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in rendered] + long


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [tokens for i in range(0, len(prompts), 8) for tokens in reference.generate(prompts[i : i + 8])]


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


def test_alone_and_sixteen_at_a_time(reference, prompts, expected):
    llm = engine(prefix_cache=False)
    ties(reference, prompts, generate(llm, prompts, 1), expected, "alone")
    ties(reference, prompts, generate(llm, prompts, 16), expected, "16 at a time")


def test_with_chunks_of_64_tokens(reference, prompts, expected):
    llm = engine(prefix_cache=False, max_batch_tokens=64)
    ties(reference, prompts, generate(llm, prompts, 16), expected, "chunks of 64")


def test_with_a_warm_prefix_cache(reference, prompts, expected):
    llm = engine()
    generate(llm, prompts, 16)
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
