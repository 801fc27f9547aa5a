"""What requests get that leave a sampling parameter out: the model's own defaults, wherever the request comes in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving import WAIT_S, ScriptRunner, ServerThread, script_engine

from quire.deploy.handle import Model
from quire.worker.config import LimitOptions, QuireOptions, ServerOptions
from quire.worker.protocol import SamplingParams
from quire.worker.text.tokenizer import Tokenizer

CONTEXT = 192
OWN = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05, "max_tokens": 100}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[ServerThread]:
    """One whose model has defaults of its own."""
    assert tokenizer.eos_token_id is not None
    runner = ScriptRunner(script=(1000, tokenizer.eos_token_id))
    engine = script_engine(runner, tokenizer.vocab_size, tokenizer.eos_token_id, max_model_len=CONTEXT)
    engine.info = engine.info._replace(sampling=tuple(OWN.items()))
    with ServerThread(engine, tokenizer, ServerOptions(port=0, log_level="warning"), LimitOptions()) as server:
        yield server


def asked(server: ServerThread, route: str, **fields: Any) -> SamplingParams:
    """The parameters that reach the engine."""
    answer = httpx.post(server.url + route, json={**PROMPTS[route], **fields}, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    assert server.client.latest is not None
    return server.client.latest[0].params


@pytest.mark.parametrize(("route", "longest"), [("/v1/chat/completions", 100), ("/v1/completions", 16)])
def test_what_is_left_out_is_the_model_s(server: ServerThread, route: str, longest: int) -> None:
    own = SamplingParams(**OWN | {"max_tokens": longest})  # type: ignore[arg-type]
    assert asked(server, route) == own
    assert asked(server, route, **dict.fromkeys(OWN)) == own  # null is not given
    assert asked(server, route, top_p=0.5) == replace(own, top_p=0.5)


@pytest.mark.parametrize("route", PROMPTS)
def test_what_is_given_counts_also_where_it_changes_nothing(server: ServerThread, route: str) -> None:
    assert asked(server, route, **NEUTRAL, max_tokens=110) == SamplingParams(max_tokens=110)
    assert asked(server, route, max_completion_tokens=110).max_tokens == 110


def test_the_model_s_longest_answer_ends_with_the_context(server: ServerThread) -> None:
    talk = [{"role": "user", "content": "Hello" * 80}]
    params = asked(server, "/v1/chat/completions", messages=talk)
    assert server.client.latest is not None
    (prompt,) = server.client.latest[0].prompts
    assert params.max_tokens == CONTEXT - len(prompt) < 100
    refused = httpx.post(server.url + "/v1/chat/completions", json={"messages": [{**talk[0], "content": "Hello" * 300}]}, timeout=WAIT_S)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"


def test_replicas_that_come_with_other_defaults_bring_them(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    for sampling in ((), (("temperature", 0.25),)):
        monkeypatch.setattr(server.client, "served", server.client.served._replace(sampling=sampling))
        for route in PROMPTS:
            assert replace(asked(server, route), max_tokens=None) == SamplingParams(**dict(sampling))


def test_a_handle_without_parameters_uses_the_model_s(server: ServerThread) -> None:
    class Here(Model):
        async def _open(self) -> Any:
            return SimpleNamespace(client=server.client, tokenizer=server.api.text.tokenizer), server.api.text, server.api.metrics

    async def ask(*params: SamplingParams) -> SamplingParams:
        async with Here(QuireOptions()) as model:
            answer = await model.generate("Hello", *params)
            assert len(answer.outputs) == (params[0].n if params else 1)
            async for _ in model.stream("Hello", *params):
                pass
        assert server.client.latest is not None
        return server.client.latest[0].params

    assert server.on_loop(ask()) == SamplingParams(**OWN)  # type: ignore[arg-type]
    assert server.on_loop(ask(SamplingParams(n=2))) == SamplingParams(n=2)
