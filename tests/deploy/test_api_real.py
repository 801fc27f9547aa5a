"""The whole way with a real model: HTTP, text, engine, pages, through the official clients."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field
from serving import ServerThread

from quire.worker.text.tokenizer import Tokenizer

QUESTION: Any = [{"role": "user", "content": "Name three colours of the rainbow."}]


@pytest.fixture
def client(real: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(server: ServerThread, **body: Any) -> dict[str, Any]:
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_streaming_says_the_same(client: openai.OpenAI, real: ServerThread) -> None:
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24


def test_many_async_clients_at_once(real: ServerThread) -> None:
    async def ask_all() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:

            async def ask(i: int) -> list[str]:
                prompt = f"{i} plus {i} is"
                whole = await client.completions.create(model=real.api.info.name, prompt=prompt, temperature=0, max_tokens=6)
                stream = await client.completions.create(model=real.api.info.name, prompt=prompt, temperature=0, max_tokens=6, stream=True)
                return [whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])]

            return await asyncio.gather(*(ask(i) for i in range(8)))

    answers = asyncio.run(ask_all())
    assert all(whole == streamed for whole, streamed in answers)
    assert len({whole for whole, _ in answers}) > 1


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(real: ServerThread) -> None:
    body = {"prompt": "The sea", "max_tokens": 10, "temperature": 1.0, "seed": 7, "n": 2}
    first = [choice["text"] for choice in complete(real, **body)["choices"]]
    with real.meanwhile(lambda: complete(real, prompt=["A", "B", "C"], max_tokens=20, ignore_eos=True)):
        again = [choice["text"] for choice in complete(real, **body)["choices"]]
    assert first == again
    assert first[0] != first[1], "two choices are two draws"
    assert [choice["text"] for choice in complete(real, **{**body, "seed": 8})["choices"]] != first


def test_an_answer_that_a_schema_shapes(client: openai.OpenAI, real: ServerThread) -> None:
    class Colours(BaseModel):
        colours: list[Literal["red", "green", "blue"]] = Field(min_length=1, max_length=3)

    answer = client.chat.completions.parse(model=real.api.info.name, messages=QUESTION, temperature=0, response_format=Colours)
    assert isinstance(answer.choices[0].message.parsed, Colours)


def test_echoed_log_probabilities_are_those_of_generation(real: ServerThread, tokenizer: Tokenizer) -> None:
    said = complete(real, prompt="The capital of France is", temperature=0, max_tokens=6, logprobs=2)["choices"][0]
    text = "The capital of France is" + said["text"]
    scored = complete(real, prompt=text, max_tokens=0, echo=True, logprobs=2)["choices"][0]
    lists = scored["logprobs"]
    assert scored["text"] == text
    assert lists["token_logprobs"][0] is None
    assert "".join(lists["tokens"]) == text
    assert all(text.startswith(token, offset) for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True))
    assert lists["tokens"][-6:] == said["logprobs"]["tokens"], "this text is tokenized the way it was generated"
    for ours, theirs in zip(lists["token_logprobs"][-6:], said["logprobs"]["token_logprobs"], strict=True):
        assert math.isclose(ours, theirs, abs_tol=1e-3)
    assert all(len(top) == 2 for top in lists["top_logprobs"][-6:])
    continued = complete(real, prompt=text, temperature=0, max_tokens=2, echo=True, logprobs=0, n=2)["choices"]
    for choice in continued:
        assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode(text)) + 2
        assert choice["text"].startswith(text)


def test_logprobs_are_distributions(client: openai.OpenAI, real: ServerThread) -> None:
    answer = client.chat.completions.create(
        model=real.api.info.name, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=20
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    for entry in logprobs.content or ():
        assert len(entry.top_logprobs) == 20
        assert 0 < sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-5
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs), "greedy takes the likeliest"


def test_the_prefix_of_a_conversation_is_not_computed_again(real: ServerThread) -> None:
    prompt = list(range(1000, 1300))
    first = complete(real, prompt=prompt, max_tokens=1)["usage"]
    second = complete(real, prompt=[*prompt, 5, 6], max_tokens=1)["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 288


def test_a_client_that_leaves_frees_its_pages(real: ServerThread) -> None:
    real.client.aborted.restart()
    before = real.client.wait_for(lambda stats: stats.running == 0)
    body = {"prompt": "Tell me everything.", "max_tokens": 1500, "ignore_eos": True, "stream": True, "n": 2}
    with httpx.stream("POST", real.url + "/v1/completions", json=body, timeout=60) as response:
        assert next(response.iter_lines()).startswith("data: ")
    real.client.aborted.wait()
    after = real.client.wait_for(lambda stats: stats.running == 0 and stats.pages_active == 0)
    assert after.steps - before.steps < 500, "it did not run to its end"
    assert after.pages_free + after.pages_cached == after.pages_total
