"""A request that another replica has lost goes on as if nothing had happened: tokens, indices, counts, logprobs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_memory import EOS, expected_output, hash_engine
from tiny_models import SIZES, random_model
from transformers import LlamaConfig

from quire.worker.engine import Engine, build_engine
from quire.worker.options import engine_options
from quire.worker.protocol import BadRequest, FinishReason, GenerateRequest, Overloaded, SamplingParams, SequenceOutput
from quire.worker.sequence import sequence_seed


def outputs_of(engine: Engine, request: GenerateRequest) -> dict[int, list[SequenceOutput]]:
    """Of each choice, after a check of the indices and of the books."""
    engine.submit(request)
    outputs: dict[int, list[SequenceOutput]] = {choice: [] for choice in request.choices}
    while not engine.idle():
        for o in engine.step():
            outputs[o.choice].append(o)
        engine.scheduler.check()
    for choice, got in outputs.items():
        came_with = len(request.resume[choice]) if request.resume else 0
        assert [o.index for o in got] == list(range(came_with, came_with + len(got)))
        assert [o.finish is not None for o in got] == [False] * (len(got) - 1) + [True]
    return outputs


def resumed(request: GenerateRequest, whole: dict[int, list[SequenceOutput]], cuts: list[int]) -> GenerateRequest:
    """`request` as it is sent again by an ingress that has `cuts[choice]` outputs of each choice; None when it has all."""
    resume = {k: tuple(t for o in got[:cut] for t in o.tokens) for (k, got), cut in zip(whole.items(), cuts, strict=True) if cut < len(got)}
    return GenerateRequest(request.request_id, request.prompts, request.params, resume=resume, attempt=1, seed=request.seed)


REQUESTS = st.builds(
    lambda prompts, params, seed: GenerateRequest("r", tuple(prompts), SamplingParams(**params), seed=seed),
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=14).map(tuple), min_size=1, max_size=2),
    st.fixed_dictionaries(
        {
            "n": st.integers(1, 3),
            "max_tokens": st.integers(1, 12),
            "ignore_eos": st.booleans(),
            "seed": st.one_of(st.none(), st.integers(0, 3)),
            "min_tokens": st.integers(0, 1),
        }
    ),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=150, deadline=None)
@given(request=REQUESTS, data=st.data(), prefix_cache=st.booleans(), warm=st.booleans(), max_batch_tokens=st.sampled_from([6, 40]))
def test_whatever_is_cut_off_anywhere_goes_on_the_same(request, data, prefix_cache, warm, max_batch_tokens):
    first = hash_engine(pages=40, prefix_cache=prefix_cache)
    whole = outputs_of(first, request)
    cuts = [data.draw(st.integers(0, len(got)), label=f"outputs of choice {k}") for k, got in whole.items()]
    again = resumed(request, whole, cuts)
    if not again.resume:
        return
    # On a replica with fewer pages, and on the one that has pages of it already.
    engine = first if warm else hash_engine(pages=14, max_batch_tokens=max_batch_tokens, prefix_cache=prefix_cache)
    counted = engine.stats().output_tokens
    rest = outputs_of(engine, again)
    assert rest.keys() == again.resume.keys()
    for (choice, got), cut in zip(whole.items(), cuts, strict=True):
        if choice in rest:
            keys = [(o.index, o.tokens, o.finish, o.stop_token) for o in rest[choice]]
            assert keys == [(o.index, o.tokens, o.finish, o.stop_token) for o in got[cut:]]
            assert all(o.cached_tokens is None for o in rest[choice]) or cut == 0
    assert engine.stats().output_tokens - counted == sum(len(got) for got in rest.values())
    counts = engine.scheduler.pool.counts()
    assert counts.active == counts.reserved == 0


def test_what_is_computed_again_counts_as_recomputed():
    prompt = tuple(range(1, 10))
    output = tuple(expected_output(prompt, 1, 6, ignore_eos=True))
    engine = hash_engine(pages=16, page_size=4)
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)
    got = outputs_of(engine, GenerateRequest("a", (prompt,), params, resume={0: output[:3]}))[0]
    assert tuple(t for o in got for t in o.tokens) == output[3:]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.recomputed_tokens, stats.output_tokens) == (0, 9 + 2, 3)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (0, 0)
    outputs_of(engine, GenerateRequest("b", (prompt,), params, resume={0: output[:3]}))
    assert engine.stats().recomputed_tokens == 11 + (11 - 8)  # two full pages were found


def test_what_has_ended_is_not_resumed():
    engine = hash_engine()
    params = SamplingParams(max_tokens=6, stop_token_ids=(7,))
    for output in ((3, EOS), (3, 7)):
        with pytest.raises(BadRequest, match="choice 0 has ended"):
            engine.submit(GenerateRequest("a", ((1, 2),), params, resume={0: output}))
    engine.submit(GenerateRequest("a", ((1, 2),), SamplingParams(max_tokens=6, min_tokens=3, stop_token_ids=(7,)), resume={0: (3, 7)}))


def test_a_resumed_request_takes_only_the_places_that_it_needs():
    engine = hash_engine(max_running=2, max_waiting=0)
    params = SamplingParams(max_tokens=6, seed=1, ignore_eos=True, n=2)
    engine.submit(GenerateRequest("a", ((1, 2),), params, resume={1: (3,)}))
    assert [s.choice for s in engine.scheduler.waiting] == [1]
    with pytest.raises(Overloaded):
        engine.submit(GenerateRequest("b", ((1, 2),), params))
    engine.submit(GenerateRequest("b", ((1, 2),), params, resume={0: (3,)}))
    assert engine.room() == 0


def test_a_deadline_holds_for_what_has_not_begun():
    clock = SimpleNamespace(now_s=0.0)
    for resume, ends in (({0: ()}, FinishReason.DEADLINE), ({0: (3,)}, FinishReason.LENGTH)):
        engine = hash_engine(clock=lambda: clock.now_s)
        clock.now_s = 0.0
        params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
        engine.submit(GenerateRequest("a", ((1, 2),), params, resume=resume, deadline_ms=500))
        clock.now_s = 1.0
        outputs = engine.step()
        while not engine.idle():
            outputs += engine.step()
        assert outputs[-1].finish is ends


def test_choices_of_which_others_have_ended_keep_their_seeds():
    prompts = ((1, 2, 3), (4, 5))
    params = SamplingParams(n=2, max_tokens=5, ignore_eos=True, seed=9)
    engine = hash_engine(pages=32)
    rest = outputs_of(engine, GenerateRequest("a", prompts, params, resume={1: (), 3: ()}))
    for choice in (1, 3):
        want = expected_output(prompts[choice // 2], sequence_seed(9, choice % 2), 5, ignore_eos=True)
        assert [t for o in rest[choice] for t in o.tokens] == want


# --- a real model and the real sampler ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    random_model(LlamaConfig(**SIZES | {"max_position_embeddings": 512, "eos_token_id": 1})).save_pretrained(path)
    return path


def real_engine(model: Path) -> Engine:
    return build_engine(engine_options(model=str(model), kv_pages=64, page_size=8, max_running=8, threads=1), b"key")


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.2, "top_p": 0.9, "seed": 5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 0.8, "min_p": 0.02, "min_tokens": 20, "logit_bias": {1: 4.0}, "ignore_eos": False},
        {"temperature": 1.0, "prompt_logprobs": 1},
    ],
    ids=["greedy", "penalties", "min_tokens", "prompt_logprobs"],
)
def test_a_real_model_goes_on_with_the_same_tokens_and_logprobs(model, params):
    given = SamplingParams(**({"n": 3, "max_tokens": 24, "ignore_eos": True, "logprobs": 2} | params))
    request = GenerateRequest("r", (tuple(range(5, 42)),), given, seed=77)
    whole = outputs_of(real_engine(model), request)
    for cuts in ([1, 9, 17], [23, 0, 4]):
        rest = outputs_of(real_engine(model), resumed(request, whole, cuts))
        for choice, got in rest.items():
            want = whole[choice][cuts[choice] :]
            assert [(o.index, o.tokens, o.finish) for o in got] == [(o.index, o.tokens, o.finish) for o in want]
            assert [o.logprobs[0].logprob for o in got] == pytest.approx([o.logprobs[0].logprob for o in want], abs=1e-4)
            assert all(o.prompt_logprobs is None for o in got) or cuts[choice] == 0
