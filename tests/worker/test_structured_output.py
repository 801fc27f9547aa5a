"""Engines of random weights under grammars: whatever happens to a sequence, its text follows its grammar, and is the undisturbed one."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from random_schemas import random_schema
from test_device_runner import engine as device_llm
from test_migration_links import cluster
from test_resume import outputs_of, resumed
from tiny_models import BYTES_EOS, BYTES_VOCAB, bytes_checkpoint

from quire import LLM, BadRequest, SamplingParams, grammar_of
from quire.worker.engine import Engine, build_engine
from quire.worker.llm import CompletionOutput
from quire.worker.options import engine_options
from quire.worker.protocol import GRAMMAR_FAILED, FinishReason, GenerateRequest, Outcome, SequenceOutput
from quire.worker.text.tokenizer import Tokenizer, load_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "true"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = PERSON | {"x-guidance": {"whitespace_flexible": False}}
SMALL = {"kv_pages": 100, "page_size": 8, "max_running": 16, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bytes_checkpoint(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), progress=False, **SMALL)


def engine(model: Path, **options: Any) -> Engine:
    return build_engine(engine_options(model=str(model), **SMALL | options), b"key")


def follows(schema: dict[str, Any], answer: CompletionOutput) -> bool:
    """Whether a text that was not cut short is JSON that the schema allows."""
    if answer.finish_reason is FinishReason.LENGTH:
        return False
    assert answer.finish_reason is FinishReason.STOP
    assert answer.stop_reason is None
    Draft202012Validator(schema).validate(json.loads(answer.text))
    return True


def check_schemas(llm: LLM, count: int) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in range(count)]
    params = [
        SamplingParams(max_tokens=200, seed=seed, temperature=0.5 * (seed % 4), grammar=grammar_of(json_schema=schema))
        for seed, schema in enumerate(schemas)
    ]
    answers = [answer.outputs[0] for answer in llm.generate([[5, 9, seed % 90] for seed in range(count)], params)]
    whole = [follows(schema, answer) for schema, answer in zip(schemas, answers, strict=True)]
    assert whole.count(True) > 0.9 * count
    assert llm.stats().pages_active == 0


def test_random_schemas(llm: LLM) -> None:
    check_schemas(llm, 40)


@pytest.mark.slow
def test_hundreds_of_random_schemas(llm: LLM) -> None:
    check_schemas(llm, 600)


def test_a_mixed_batch_whose_other_rows_do_not_notice(llm: LLM) -> None:
    plain = SamplingParams(max_tokens=20, seed=3, ignore_eos=True, logprobs=1)
    person = SamplingParams(max_tokens=200, seed=4, n=3, grammar=grammar_of(json_schema=PERSON))
    alone = llm.generate([[7, 8]], plain)
    both = llm.generate([[7, 8], [7, 8, 9], [1]], [plain, person, SamplingParams(seed=1, grammar=grammar_of(choice=["abc", "12"]))])
    assert both[0].outputs == alone[0].outputs
    assert all(follows(PERSON, answer) for answer in both[1].outputs)
    assert len({answer.text for answer in both[1].outputs}) == 3, "every choice has a matcher of its own"
    assert both[2].outputs[0].text in ("abc", "12")


def test_log_probabilities_are_those_of_the_model(llm: LLM) -> None:
    """The same tokens as a prompt, scored without a grammar."""
    answer = llm.generate([[7, 8]], SamplingParams(max_tokens=40, seed=5, logprobs=2, grammar=grammar_of(json_schema=PERSON)))[0].outputs[0]
    scored = llm.generate([[7, 8, *answer.token_ids]], SamplingParams(max_tokens=1, prompt_logprobs=2))[0].prompt_logprobs
    assert answer.logprobs is not None
    assert scored is not None
    assert [lp.logprob for lp in answer.logprobs] == pytest.approx([lp.logprob for lp in scored[1:]], abs=1e-3)
    assert [lp.top[0][0] for lp in answer.logprobs] == [lp.top[0][0] for lp in scored[1:]]


@pytest.mark.parametrize(
    "others",
    [
        {"min_tokens": 60, "max_tokens": 64},
        {"ignore_eos": True},
        {"logit_bias": {BYTES_EOS: -100.0, BYTES_VOCAB - 1: 100.0}},
        {"stop_token_ids": (BYTES_EOS, BYTES_VOCAB - 1)},
        {"top_k": 3, "top_p": 0.2, "min_p": 0.5},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 5.0},
        {"temperature": 0.0},
    ],
    ids=lambda others: next(iter(others)),
)
def test_the_grammar_has_the_last_word(llm: LLM, others: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_tokens": 64, "seed": 1, "grammar": grammar_of(regex=r"[a-c]{3}-\d\d")} | others)
    answer = llm.generate([[7, 8]], params)[0].outputs[0]
    assert re.fullmatch(r"[a-c]{3}-\d\d", answer.text)
    assert answer.finish_reason is FinishReason.STOP
    assert answer.token_ids[-1] == BYTES_EOS


def test_min_tokens_holds_as_long_as_the_grammar_goes_on(llm: LLM) -> None:
    params = SamplingParams(max_tokens=64, seed=1, min_tokens=30, logit_bias={BYTES_EOS: 100.0}, grammar=grammar_of(regex="[a-z]*"))
    answer = llm.generate([[7, 8]], params)[0].outputs[0]
    assert len(answer.token_ids) == 31
    assert answer.token_ids[-1] == BYTES_EOS


def test_a_stop_string_ends_the_text_before_the_grammar_does(llm: LLM) -> None:
    params = SamplingParams(max_tokens=64, seed=1, stop=("b-",), grammar=grammar_of(regex="aab-1"))
    answer = llm.generate([[7, 8]], params)[0].outputs[0]
    assert (answer.text, answer.stop_reason) == ("aa", "b-")


def test_max_tokens_cuts(llm: LLM) -> None:
    answer = llm.generate([[7, 8]], SamplingParams(max_tokens=3, seed=1, grammar=grammar_of(regex="(ab){40}")))[0].outputs[0]
    assert answer.finish_reason is FinishReason.LENGTH
    assert "ababababab".startswith(answer.text)


@pytest.mark.parametrize(
    "grammar", ["start: (", "{", "\x00", grammar_of(json_schema={"type": "colour"}), grammar_of(json_schema={"$ref": "#"})]
)
def test_what_cannot_be_compiled_is_refused(llm: LLM, grammar: str) -> None:
    with pytest.raises(BadRequest, match="grammar"):
        llm.generate([[1], [2]], [SamplingParams(max_tokens=3), SamplingParams(grammar=grammar)])
    assert llm.engine.idle()


def test_a_grammar_that_turns_out_too_complex_fails_alone(model: Path) -> None:
    served = engine(model)
    rules = [f'r{i}: "a" r{i} | "b"' for i in range(1500)]  # that all begin at the same place
    grammar = grammar_of(lark="\n".join(["start: /[xy]{20}/ (" + " | ".join(f"r{i}" for i in range(1500)) + ")", *rules]))
    served.submit(GenerateRequest("bad", ((1, 2),), SamplingParams(max_tokens=60, seed=1, grammar=grammar)))
    served.submit(GenerateRequest("good", ((1, 2),), SamplingParams(max_tokens=60, seed=1, ignore_eos=True)))
    ends: dict[str, SequenceOutput] = {}
    while not served.idle():
        ends |= {o.request_id: o for o in served.step() if o.finish is not None}
    assert ends["good"].finish is FinishReason.LENGTH
    assert ends["bad"].finish is FinishReason.ERROR
    assert (ends["bad"].error or "").startswith(GRAMMAR_FAILED)
    assert served.stats().pages_active == 0


# --- whatever happens to it ---


def requests(count: int) -> list[GenerateRequest]:
    """Greedy and seeded by turns, some with two choices, some without a grammar."""
    made = []
    for i in range(count):
        grammar = "" if i % 5 == 4 else grammar_of(json_schema=random_schema(random.Random(i)) if i % 2 else PERSON)
        params = SamplingParams(max_tokens=80, seed=i, temperature=float(i % 3 > 0), n=1 + (i % 4 == 1), grammar=grammar)
        made.append(GenerateRequest(f"r{i}", (tuple(range(1 + i % 9, 20 + i)),), params))
    return made


def served(one: Engine, count: int) -> dict[tuple[str, int], list[int]]:
    for request in requests(count):
        one.submit(request)
    found: dict[tuple[str, int], list[int]] = {}
    while not one.idle():
        for o in one.step():
            found.setdefault((o.request_id, o.choice), []).extend(o.tokens)
    one.scheduler.check()
    return found


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_after_a_preemption_it_goes_on_under_the_same_grammar(model: Path, tokenizer: Tokenizer, preemption: str) -> None:
    calm = served(engine(model, kv_pages=400), 14)
    crowded = engine(model, kv_pages=24, preemption=preemption, host_memory="16MiB")
    assert served(crowded, 14) == calm
    assert crowded.stats().preemptions[preemption] > 3
    for (name, _), output in calm.items():
        request = requests(14)[int(name[1:])]
        if request.params.grammar and output[-1] == BYTES_EOS:
            json.loads(tokenizer.decode(output))


def test_a_lost_request_goes_on_under_the_same_grammar_elsewhere(model: Path) -> None:
    request = GenerateRequest("r", ((5, 6, 7),), SamplingParams(n=2, max_tokens=90, seed=6, grammar=grammar_of(json_schema=PERSON)))
    whole = outputs_of(engine(model), request)
    lengths = [len(got) for got in whole.values()]
    for cuts in ([1, lengths[1] - 1], [lengths[0] // 2, 3], [0, lengths[1]]):
        rest = outputs_of(engine(model), resumed(request, whole, cuts))
        for choice, got in rest.items():
            want = whole[choice][cuts[choice] :]
            assert [(o.index, o.tokens, o.finish) for o in got] == [(o.index, o.tokens, o.finish) for o in want]


def test_what_moves_between_replicas_goes_on_under_the_same_grammar(model: Path, tokenizer: Tokenizer) -> None:
    request = GenerateRequest("r", ((5, 6, 7),), SamplingParams(n=2, max_tokens=120, seed=6, grammar=grammar_of(json_schema=COMPACT)))
    whole = outputs_of(engine(model), request)
    with cluster(model, {"A": 1, "B": 2}) as replicas:
        found, outcomes = replicas.run(request, "AB")
    assert outcomes.count(Outcome.MOVED) >= 2
    for choice, outputs in enumerate(found):
        output = [t for o in outputs for t in o.tokens]
        assert output == [t for o in whole[choice] for t in o.tokens]
        assert outputs[-1].finish is FinishReason.STOP
        Draft202012Validator(PERSON).validate(json.loads(tokenizer.decode(output)))


@pytest.mark.slow
def test_the_runner_of_a_gpu_gives_the_same_tokens(model: Path, llm: LLM) -> None:
    """Its kernels in the interpreter; the next step is begun ahead only where nobody's grammar waits for a token."""
    plain = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    params = [plain, SamplingParams(max_tokens=6, temperature=0.0, grammar=grammar_of(json_schema=PERSON)), plain]
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = [answer.outputs for answer in llm.generate(prompts, params)]
    got = [answer.outputs for answer in device_llm(model, "cpu", None, max_batch_tokens=24).generate(prompts, params)]
    assert got == expected
