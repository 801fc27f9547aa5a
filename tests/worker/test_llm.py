"""Offline generation with the real model: text, stop strings, choices, refusals, interrupts."""

import pytest

from quire import LLM, BadRequest, SamplingParams
from quire.worker.options import engine_options
from quire.worker.protocol import FinishReason

GREEDY = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(progress=False, kv_pages=64, max_running=8)


def test_text_tokens_and_ids_agree(llm):
    (by_text,) = llm.generate("The capital of France is", SamplingParams(**GREEDY))
    (by_ids,) = llm.generate(by_text.prompt_token_ids, SamplingParams(**GREEDY))
    assert by_text.outputs[0].text.startswith(" Paris")
    assert by_ids.outputs == by_text.outputs
    assert by_ids.prompt is None
    assert by_text.outputs[0].text == llm.tokenizer.decode(by_text.outputs[0].token_ids)


def test_a_batch_comes_back_in_order_with_its_own_parameters(llm):
    prompts = ["One, two,", [504, 3575, 282, 4649, 314], "A, b,"]
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (3, 5, 7)]
    together = llm.generate(prompts, params)
    assert [len(o.outputs[0].token_ids) for o in together] == [3, 5, 7]
    assert [o.outputs for o in together] == [llm.generate(p, one)[0].outputs for p, one in zip(prompts, params, strict=True)]


def test_more_prompts_than_the_queue_holds(llm):
    small = LLM(progress=False, kv_pages=32, max_running=2, max_waiting=2)
    got = small.generate([f"Number {i} is" for i in range(12)], SamplingParams(max_tokens=4, temperature=0.0))
    assert [o.prompt for o in got] == [f"Number {i} is" for i in range(12)]
    assert small.stats().pages_active == 0


def test_a_stop_string_ends_the_text_and_the_sequence(llm):
    free = llm.generate("Count: one, two, three,", SamplingParams(**GREEDY))[0].outputs[0]
    stop = free.text[4:7]
    cut = llm.generate("Count: one, two, three,", SamplingParams(**GREEDY, stop=(stop,)))[0].outputs[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == (FinishReason.STOP, stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop in llm.tokenizer.decode(cut.token_ids)
    assert llm.stats().running == 0


def test_a_stop_token_is_named_and_not_shown(llm):
    free = llm.generate("Count: one, two, three,", SamplingParams(**GREEDY))[0].outputs[0]
    token = free.token_ids[5]
    first = free.token_ids.index(token)
    cut = llm.generate("Count: one, two, three,", SamplingParams(**GREEDY, stop_token_ids=(token,)))[0].outputs[0]
    assert cut.stop_reason == token
    assert cut.token_ids == free.token_ids[: first + 1]
    assert cut.text == llm.tokenizer.decode(free.token_ids[:first])


def test_choices_and_logprobs(llm):
    got = llm.generate("Once upon a time", SamplingParams(n=3, max_tokens=6, seed=1, logprobs=2, prompt_logprobs=1))[0]
    assert [o.index for o in got.outputs] == [0, 1, 2]
    assert len({o.text for o in got.outputs}) == 3
    for o in got.outputs:
        assert [lp.token for lp in o.logprobs] == o.token_ids
        assert all(len(lp.top) == 2 and lp.logprob <= 0 for lp in o.logprobs)
    assert len(got.prompt_logprobs) == len(got.prompt_token_ids) - 1


def test_chat_goes_through_the_template(llm):
    talk = [{"role": "user", "content": "Say hello."}]
    one = llm.chat(talk, SamplingParams(**GREEDY))
    two = llm.chat([talk, talk], SamplingParams(**GREEDY))
    assert one[0].prompt.endswith("<|im_start|>assistant\n")
    assert [o.outputs[0].text for o in two] == [one[0].outputs[0].text] * 2
    tools = [{"type": "function", "function": {"name": "greet", "parameters": {"type": "object", "properties": {}}}}]
    told = llm.chat(talk, SamplingParams(max_tokens=1), tools=tools)[0].prompt
    assert "greet" in told
    assert told.endswith("Say hello.<|im_end|>\n<|im_start|>assistant\n")


def test_refusals_leave_nothing_behind(llm):
    with pytest.raises(BadRequest, match="top_p"):
        llm.generate(["fine", "not fine"], [SamplingParams(max_tokens=4), SamplingParams(top_p=2.0)])
    with pytest.raises(BadRequest, match="2 sampling parameters for 1 prompts"):
        llm.generate("one", [SamplingParams(), SamplingParams()])
    with pytest.raises(BadRequest, match="at least one token"):
        llm.generate("")
    assert llm.engine.idle()
    with pytest.raises(ValueError, match="page_sizes: there is no such option"):
        engine_options(page_sizes=3)


def test_an_interrupt_leaves_nothing_behind(llm):
    step = llm.engine.step
    llm.engine.step = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Hello", SamplingParams(max_tokens=5))
    finally:
        llm.engine.step = step
    assert llm.engine.idle()
    assert llm.stats().pages_active == 0
