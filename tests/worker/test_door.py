"""The engine's door: every bound, by the field that it names."""

import math
from dataclasses import replace

import pytest

from quire.worker.config import LimitOptions
from quire.worker.door import Door
from quire.worker.protocol import BadRequest, GenerateRequest, ModelInfo, SamplingParams

DOOR = Door(
    LimitOptions(max_prompts=3, max_n=4, max_choices=6, max_logprobs=5, max_stop=2, max_stop_chars=8, max_logit_bias=2, max_grammar=9),
    vocab_size=100,
    max_model_len=50,
    pool_tokens=64,
    max_sequences=5,
)


def request(prompts=((1, 2, 3),), **params) -> GenerateRequest:
    return GenerateRequest("r", prompts, SamplingParams(**params))


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": True}, "n"),
        ({"n": 10**12}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 48}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 51}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.0}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {1: 1, 2: 1, 3: 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"grammar": "0123456789"}, "grammar"),
        ({"grammar": b"start"}, "grammar"),
        ({"grammar": None}, "grammar"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"stop": ("a", "b", "c")}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("123456789",)}, "stop"),
        ({"stop": (1,)}, "stop"),
        ({"stop": "ab"}, "stop"),
        ({"stop_token_ids": (100,)}, "stop_token_ids"),
        ({"stop_token_ids": (1, 2, 3)}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"prompts": ()}, "prompt"),
        ({"prompts": ((),)}, "prompt"),
        ({"prompts": ((1,),) * 4}, "prompt"),
        ({"prompts": ((100,),)}, "prompt"),
        ({"prompts": ((-1,),)}, "prompt"),
        ({"prompts": ((True,),)}, "prompt"),
        ({"prompts": (("1",),)}, "prompt"),
        ({"prompts": ((1,) * 50,)}, "prompt"),
        ({"prompts": ((1,) * 60,), "max_tokens": 1}, "prompt"),
        ({"prompts": ((1,),) * 3, "n": 2}, "n"),
    ],
)
def test_a_bad_value_is_refused_by_name(params, field):
    with pytest.raises(BadRequest) as refused:
        DOOR.check(request(**params))
    assert refused.value.field == field
    assert len(str(refused.value)) < 300


def test_nothing_goes_on_past_the_end_of_a_grammar():
    assert DOOR.check(request(ignore_eos=True)).params.ignore_eos
    assert not DOOR.check(request(ignore_eos=True, grammar="start: a")).params.ignore_eos


def test_a_good_request_comes_out_in_canonical_form():
    checked = DOOR.check(request(prompts=[[1, 2, 3]], top_k=-1, stop=["a"], logit_bias={3: 2}, temperature=2, seed=-1, max_tokens=47))
    assert checked.prompts == ((1, 2, 3),)
    assert checked.params == SamplingParams(top_k=0, stop=("a",), logit_bias={3: 2.0}, temperature=2, seed=-1, max_tokens=47)
    assert DOOR.longest(3) == 47


def test_the_wire_keeps_a_request_and_refuses_what_it_does_not_know():
    sent = request(logit_bias={3: 2.0}, stop=("a",), seed=5)
    assert GenerateRequest.from_wire(sent.to_wire()) == sent
    for bad, field in ((b"\xc1", "request"), (b"\x90", "request"), (b"\x81\xa1x\x01", "request.x"), (b"\x80", "request_id")):
        with pytest.raises(BadRequest) as refused:
            GenerateRequest.from_wire(bad)
        assert refused.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"deadline_ms": -1}, "deadline_ms"),
        ({"deadline_ms": 2**31}, "deadline_ms"),
        ({"deadline_ms": 1.5}, "deadline_ms"),
        ({"seed": -1}, "seed"),
        ({"resume": {}}, "resume"),
        ({"resume": [(1,)]}, "resume"),
        ({"resume": {2: (1,)}}, "resume"),
        ({"resume": {-1: (1,)}}, "resume"),
        ({"resume": {"0": (1,)}}, "resume"),
        ({"resume": {0: "text"}}, "resume"),
        ({"resume": {0: (1, 100)}}, "resume"),
        ({"resume": {0: (1, -1)}}, "resume"),
        ({"resume": {0: (1, True)}}, "resume"),
        ({"resume": {0: (1, 2, 3, 4)}}, "resume"),  # as long as it may become: it has ended
    ],
)
def test_what_an_ingress_adds_is_checked_too(changes, field):
    sent = replace(request(n=2, max_tokens=4), **changes)
    with pytest.raises(BadRequest) as refused:
        DOOR.check(sent)
    assert refused.value.field == field


def test_a_request_is_resumed_where_it_stands():
    sent = GenerateRequest.from_wire(replace(request(n=2, max_tokens=4), resume={1: (1, 2, 3)}, deadline_ms=0).to_wire())
    checked = DOOR.check(sent)
    assert checked.resume == {1: (1, 2, 3)}
    assert checked.choices == (1,)
    with pytest.raises(BadRequest, match="at most 46 are allowed"):
        DOOR.check(replace(request(max_tokens=None), resume={0: (1,) * 47}))  # a prompt of 3 in a context of 50: 47 and it is full


def test_a_front_end_makes_the_door_that_the_replica_has():
    info = ModelInfo("m", "", 50, 100, (), 0, page_size=4, pool_tokens=64, max_sequences=5)
    assert Door.of(info, DOOR.limits) == DOOR
