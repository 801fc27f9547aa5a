"""A model that Quire serves on this Ray cluster, asked from Python: from another Ray Serve deployment, an actor or a driver.

    model = quire.connect("smollm2")
    answer = await model.generate("A quire is", SamplingParams(max_tokens=16))
    async for delta in model.stream([{"role": "user", "content": "What is a quire?"}]):
        print(delta.text, end="")

Requests go the way of an ingress's: the controller admits and places them, tokens come straight from the replica, and a replica that
dies is not noticed. There is no HTTP between.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

from ..cluster.ray_gateway import namespaces, serves
from ..worker.config import QuireOptions
from ..worker.protocol import GenerateRequest, SamplingParams, TokenLogprob
from .api.edge_text import EdgeText
from .api.generation import ChoiceDelta, Generation, Presentation, Usage
from .application import namespace_of, namespaces_of
from .edge import Edge
from .metrics import Metrics

Message = dict[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


class Completion(NamedTuple):
    """One of the `n` texts. `finish_reason` is OpenAI's word; `stop_reason` the stop string or token id that ended it."""

    text: str
    finish_reason: str
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] | None


class Answer(NamedTuple):
    """What came of one prompt: `params.n` texts, and the tokens that were counted."""

    outputs: tuple[Completion, ...]
    usage: Usage


class Model:
    """Args: `options` of the model's cluster. Use it on one event loop; it opens with the first request, and `aclose` closes it."""

    def __init__(self, options: QuireOptions) -> None:
        self._options = options
        self._stack = AsyncExitStack()
        self._opening: asyncio.Task[tuple[Edge, EdgeText, Metrics]] | None = None

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **urgency: Any) -> Answer:
        """The whole answer. Cancelling the call ends the request.

        Args:
            prompt: a text, token ids, or the messages of a conversation.
            params: as of `quire.LLM`; default: the model's own.
            urgency: `priority`, `deadline_ms` and `tenant`, as of a request over HTTP.

        Raises:
            BadRequest, Overloaded, DeadlineExceeded, ReplicaLost, RequestFailed: as `cluster.client.RequestStream`.
        """
        parts: defaultdict[int, list[ChoiceDelta]] = defaultdict(list)
        generation = await self._submit(prompt, params, urgency)
        try:
            async for delta in generation:
                parts[delta.choice].append(delta)
        finally:
            await generation.close()
        return Answer(tuple(_whole(deltas) for _, deltas in sorted(parts.items())), generation.usage)

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None, **urgency: Any) -> AsyncIterator[ChoiceDelta]:
        """What each text gains, as it does. Leaving the iteration ends the request. Arguments and errors are those of `generate`."""
        generation = await self._submit(prompt, params, urgency)
        try:
            async for delta in generation:
                yield delta
        finally:
            await generation.close()

    async def aclose(self) -> None:
        """Ends what runs."""
        await self._stack.aclose()
        self._opening = None

    async def __aenter__(self) -> Self:
        await self._opened()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def _opened(self) -> tuple[Edge, EdgeText, Metrics]:
        if self._opening is None or (self._opening.done() and self._opening.exception() is not None):
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> tuple[Edge, EdgeText, Metrics]:
        edge = await self._stack.enter_async_context(Edge(f"handle-{secrets.token_hex(8)}", self._options))
        await edge.opened()
        info = await edge.client.info()
        text = EdgeText(edge.tokenizer, info.max_model_len)
        self._stack.callback(text.close)
        return edge, text, Metrics(edge.client.stats, edge.client.recovery)

    async def _submit(self, prompt: Prompt, params: SamplingParams | None, urgency: dict[str, Any]) -> Generation:
        started_s = time.perf_counter()
        edge, text, metrics = await self._opened()
        tokens, info = await _tokens(text, prompt), await edge.client.info()
        wanted = info.default_params(len(tokens)) if params is None else params
        request = GenerateRequest(f"py-{secrets.token_hex(16)}", (tokens,), wanted, **urgency)
        stream = await edge.client.submit(request)
        shown = Presentation(continues=isinstance(prompt, str), eos_token_ids=info.eos_token_ids)
        return Generation(stream, request, edge.tokenizer, shown, metrics.generation(started_s))


def connect(model: str | None = None, namespace: str | None = None) -> Model:
    """A handle to a model that runs on this Ray cluster; the process must have joined it (`ray.init`).

    Args:
        model: its name, where a Ray Serve application serves it.
        namespace: its Ray namespace, if it is not that of the name (`quire serve`: "quire").

    Raises:
        ValueError: no such model is served here.
    """
    asked = namespace or (namespace_of(model) if model is not None else "quire")
    for found in [asked] if namespace or model is None else namespaces_of(model, namespaces()):
        options = serves(found)
        if options is not None:
            return Model(options)
    raise ValueError(f"no model is served in namespace {asked!r} of this Ray cluster")


async def _tokens(text: EdgeText, prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await text.encode(prompt, True, "prompt")
    if prompt and isinstance(prompt[0], dict):
        rendered = await text.render([dict(message) for message in prompt], True)  # type: ignore[arg-type]  # looked at above
        return await text.encode(rendered, False, "messages")
    return tuple(prompt)  # type: ignore[arg-type]  # the door checks each


def _whole(deltas: list[ChoiceDelta]) -> Completion:
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    asked = any(delta.logprobs is not None for delta in deltas)
    last = deltas[-1]
    return Completion("".join(delta.text for delta in deltas), last.finish or "", last.stop_reason, tuple(logprobs) if asked else None)
