"""The whole engine on a real (small, random) model: prefix reuse, forks, seeds, and a thousand disturbed requests."""

import random
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, random_model
from transformers import LlamaConfig

from quire.worker.engine import Engine, build_engine
from quire.worker.options import engine_options
from quire.worker.protocol import FinishReason, GenerateRequest, SamplingParams, SequenceOutput

LENGTH = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    random_model(LlamaConfig(**SIZES | {"max_position_embeddings": LENGTH, "eos_token_id": 1})).save_pretrained(path)
    return path


def engine(model: Path, **options) -> Engine:
    return build_engine(engine_options(model=str(model), **{"kv_pages": 200, "max_running": 16, "threads": 1} | options), b"key")


def submit(engine: Engine, name: str, *prompts: list[int], **params) -> None:
    params = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True} | params
    engine.submit(GenerateRequest(name, tuple(map(tuple, prompts)), SamplingParams(**params)))


def drain(engine: Engine) -> dict[tuple[str, int], list[SequenceOutput]]:
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    while not engine.idle():
        for o in engine.step():
            outputs.setdefault((o.request_id, o.choice), []).append(o)
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for o in outputs for token in o.tokens]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, SIZES["vocab_size"]), k=length)


def test_a_second_request_computes_at_most_one_page_of_what_it_shares(model):
    e = engine(model)
    shared = prompt(0, 1500)
    submit(e, "first", [*shared, 5])
    cold = drain(e)["first", 0]
    computed: list[int] = []
    run = e.runner.run
    e.runner.run = lambda plan: (computed.extend(row.num_tokens for row in plan.rows if row.num_tokens > 1), run(plan))[1]
    submit(e, "second", [*shared, 7])
    warm = drain(e)["second", 0]
    assert cold[0].cached_tokens == 0
    assert warm[0].cached_tokens == 1500 // 32 * 32
    assert sum(computed) == 1501 - 1500 // 32 * 32  # less than a page, and the token that differs
    fresh = engine(model, prefix_cache=False)
    submit(fresh, "second", [*shared, 7])
    assert tokens(warm) == tokens(drain(fresh)["second", 0])


def test_seeded_text_does_not_depend_on_the_neighbours(model):
    sampled = {"temperature": 1.3, "top_p": 0.95, "seed": 11, "max_tokens": 24, "repetition_penalty": 1.1}
    alone = engine(model)
    submit(alone, "x", prompt(1, 40), **sampled)
    want = tokens(drain(alone)["x", 0])
    crowded = engine(model, max_batch_tokens=48, kv_pages=40, preemption="recompute")
    for i in range(12):
        submit(crowded, f"n{i}", prompt(100 + i, 30 + 5 * i), temperature=1.0, seed=i, max_tokens=40)
    submit(crowded, "x", prompt(1, 40), **sampled)
    got = drain(crowded)
    assert crowded.scheduler.decisions.counts["recompute"] > 0
    assert tokens(got["x", 0]) == want
    assert len({tuple(tokens(o)) for o in got.values()}) == 13


def test_choices_differ_and_the_first_is_the_request_alone(model):
    e = engine(model)
    submit(e, "three", prompt(2, 33), n=3, temperature=1.0, seed=5)
    submit(e, "one", prompt(2, 33), temperature=1.0, seed=5)
    got = drain(e)
    assert tokens(got["three", 0]) == tokens(got["one", 0])
    assert len({tuple(tokens(got["three", k])) for k in range(3)}) == 3


@pytest.mark.parametrize("max_batch_tokens", [512, 7])
def test_prompt_logprobs_are_those_of_the_whole_prompt(model, max_batch_tokens):
    e = engine(model, max_batch_tokens=max_batch_tokens)
    ids = prompt(3, 40)
    submit(e, "warm", ids)
    drain(e)
    submit(e, "scored", ids, prompt_logprobs=2, logprobs=0)
    first = drain(e)["scored", 0][0]
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [lp.token for lp in first.prompt_logprobs] == ids[1:]
    assert [lp.logprob for lp in first.prompt_logprobs] == pytest.approx([float(want[i, t]) for i, t in enumerate(ids[1:])], abs=1e-3)
    assert [lp.top[0][0] for lp in first.prompt_logprobs] == want.argmax(-1)[:-1].tolist()
    assert first.logprobs[0].logprob == pytest.approx(float(want[-1].max()), abs=1e-3)


def test_a_sequence_with_bad_logits_fails_alone(model):
    e = engine(model)
    logits = e.runner._model.logits
    e.runner._model.logits = lambda hidden: logits(hidden).index_fill(0, torch.tensor([0]), float("nan"))
    submit(e, "bad", prompt(4, 5))
    submit(e, "good", prompt(5, 6))
    outputs = e.step()
    assert [(o.request_id, o.finish) for o in outputs] == [("bad", FinishReason.ERROR), ("good", None)]
    assert "not finite" in outputs[0].error
    e.runner._model.logits = logits
    assert drain(e)["good", 0][-1].finish is FinishReason.LENGTH


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_thousand_disturbed_requests_end_once_and_leave_nothing(model):
    """Random parameters, random cancellation, a pool for a few sequences."""
    rng = random.Random(7)
    e = engine(model, kv_pages=14, max_running=12, max_batch_tokens=128, max_waiting=64)
    ends: dict[tuple[str, int], int] = {}
    lengths: dict[tuple[str, int], int] = {}
    live: list[str] = []
    resident = 0

    def keep(outputs: list[SequenceOutput]) -> None:
        for o in outputs:
            key = (o.request_id, o.choice)
            assert o.index == lengths.get(key, 0)
            lengths[key] = o.index + len(o.tokens)
            ends[key] += o.finish is not None

    for number in range(1000):
        name, n = f"r{number}", rng.choice([1, 1, 1, 2, 3])
        params = {
            "n": n,
            "max_tokens": rng.randint(1, 40),
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "top_p": rng.choice([1.0, 0.8]),
            "top_k": rng.choice([0, 5]),
            "min_p": rng.choice([0.0, 0.1]),
            "presence_penalty": rng.choice([0.0, 1.0]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "logprobs": rng.choice([None, 0, 3]),
            "prompt_logprobs": rng.choice([None, None, None, 1]),
            "ignore_eos": rng.random() < 0.5,
            "stop_token_ids": tuple(rng.choices(range(97), k=rng.choice([0, 2]))),
        }
        ends |= {(name, k): 0 for k in range(n)}
        submit(e, name, prompt(rng.randrange(6), rng.randint(1, 120)), **params)
        live.append(name)
        while e.scheduler.num_waiting > 20:
            keep(e.step())
        if rng.random() < 0.3:
            keep(e.abort(rng.choice(live[-20:]), rng.choice([None, 0, 1])))
        if number == 300:
            resident = resident_bytes()
        if number % 50 == 0:
            e.scheduler.check()
    while not e.idle():
        keep(e.step())
    e.scheduler.check()
    assert set(ends.values()) == {1}
    stats = e.stats()
    assert stats.pages_active == stats.pages_reserved == stats.running == stats.waiting == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total == 14
    assert stats.preemptions["recompute"] > 0
    assert e.runner._scores == {}
    assert resident_bytes() - resident < 30 * 2**20


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_a_token_that_the_model_cannot_compute_ends_its_request_alone(model, where):
    """Raised by the model before it wrote a page, or after it wrote all of them."""
    poison = 90
    e = engine(model, page_size=8)
    neighbours = {f"n{i}": prompt(20 + i, 12 + i) for i in range(3)}
    sampled = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 20, "logprobs": 1, "logit_bias": {poison: -100.0}}
    for name, ids in neighbours.items():
        submit(e, name, [t for t in ids if t != poison], **sampled)
    want = {key: [(o.index, o.tokens) for o in got] for key, got in drain(e).items()}

    e = engine(model, page_size=8)
    real, given = e.runner._model, []
    forward, logits = real.forward, real.logits

    def spoiled_forward(tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        given[:] = tokens.tolist()
        if where == "forward" and poison in given:
            raise FloatingPointError("poison")
        return forward(tokens, *rest)

    def spoiled_logits(hidden: torch.Tensor) -> torch.Tensor:
        if where == "logits" and poison in given:
            raise FloatingPointError("poison")
        return logits(hidden)

    real.forward, real.logits = spoiled_forward, spoiled_logits
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    for step in range(200):
        if step == 0:
            for name, ids in neighbours.items():
                submit(e, name, [t for t in ids if t != poison], **sampled)
        if step == 5:
            submit(e, "bad", [5, 6, poison, 7], n=3, prompt_logprobs=1)
        for o in e.step():
            outputs.setdefault((o.request_id, o.choice), []).append(o)
        e.scheduler.check()
    bad = [outputs.pop(("bad", k)) for k in range(3)]
    assert [(len(got), got[0].finish, got[0].tokens) for got in bad] == [(1, FinishReason.ERROR, ())] * 3
    assert {key: [(o.index, o.tokens) for o in got] for key, got in outputs.items()} == want
    stats = e.stats()
    assert (stats.pages_active, stats.pages_free + stats.pages_cached) == (0, stats.pages_total)
