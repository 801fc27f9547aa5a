"""POST /v1/completions: text, texts, token ids or lists of token ids; `echo`; log probabilities of prompt and output."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from ...worker.protocol import BadRequest, TokenLogprob
from .answer import Asked, answer, present
from .body import read_body
from .context import Api
from .generation import ChoiceDelta
from .logprobs import completion_logprobs, joined, prompt_logprobs
from .reply import Reply, json_string
from .schemas import COMPLETION_MAX_TOKENS, CompletionBody, ToldUsage
from .structured import read_constraint

router = APIRouter()

Prompt = str | tuple[int, ...]


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continues prompts."""
    api: Api = request.app.state.api
    body = await read_body(request, CompletionBody)
    api.check_model(body.model)
    prompts = read_prompts(body.prompt, api.limits.max_prompts)
    ids = await api.text.encode_all(prompts, body.add_special_tokens, field="prompt")
    longest = body.longest(COMPLETION_MAX_TOKENS, api.context)
    params = body.sampling(
        (await api.client.info()).default_params(),
        max_tokens=longest,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=await api.grammars.grammar(read_constraint(body)),
    )
    only_prompt = body.echo and longest == 0  # scoring: one token is drawn, because a step does, and thrown away
    asked = Asked(
        request_id=api.new_id("cmpl"),
        prompts=tuple(ids),
        params=replace(params, max_tokens=1, min_tokens=0) if only_prompt else params,
        options=body,
        names={"prompt_logprobs": "logprobs", **body.names},
        shown=present(api, body, continues=True, discard_output=only_prompt),
    )
    echoes = await api.text.texts(prompts) if body.echo else None
    reply = CompletionReply(asked, api, body.told_usage, echoes)
    return await answer(request, asked, reply)


def read_prompts(raw: Any, max_prompts: int) -> list[Prompt]:
    """The prompts, each a text or token ids.

    Raises:
        BadRequest: none of the four forms, or too many to even tokenize.
    """
    items = [raw] if isinstance(raw, str) or _is_ids(raw) else raw
    if not isinstance(items, list) or not items:
        raise BadRequest("prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")
    if len(items) > max_prompts:
        raise BadRequest("prompt", f"{len(items)} prompts; at most {max_prompts} in one request")
    if all(isinstance(item, str) for item in items):
        return items
    for i, item in enumerate(items):
        if not _is_ids(item):
            raise BadRequest(f"prompt.{i}", "must be token ids, or a text among texts, and not empty")
        if max(item) >= 2**63 or min(item) < 0:
            raise BadRequest(f"prompt.{i}", "a token id is outside the vocabulary")
    return [tuple(item) for item in items]


def _is_ids(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(type(token) is int for token in item)


class CompletionReply(Reply):
    """`text_completion`, whole and in chunks."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, asked: Asked, api: Api, told_usage: ToldUsage, echoes: list[str] | None) -> None:
        super().__init__(asked.request_id, api.info.name, api.fingerprint, told_usage)
        self._asked = asked
        self._tokenizer = api.text.tokenizer
        self._echoes = echoes
        self._scored: dict[int, tuple[TokenLogprob, ...]] = {}  # prompt -> its log probabilities
        self._begun: set[int] = set()
        self._parts: dict[int, list[dict[str, Any]]] = {}

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """The first one also where it has no text yet: clients take its time for that of the first token."""
        first = delta.choice not in self._begun
        if (first and self._echoes is not None) or delta.logprobs is not None or delta.finish is not None:
            return [json.dumps(self._part(delta))]
        self._begun.add(delta.choice)
        text = json_string(delta.text)
        return [f'{{"index": {delta.choice}, "text": {text}, "logprobs": null, "finish_reason": null}}'] if delta.text or first else []

    def add(self, delta: ChoiceDelta) -> None:
        self._parts.setdefault(delta.choice, []).append(self._part(delta))

    def choices(self) -> list[dict[str, Any]]:
        return [_merged(parts) for _, parts in sorted(self._parts.items())]

    def _part(self, delta: ChoiceDelta) -> dict[str, Any]:
        """A `choices` entry for this delta; the choice's first one begins with the echoed prompt."""
        text, start, scores = delta.text, 0, []
        if self._echoes is not None:
            prompt = delta.choice // self._asked.params.n
            echo = self._echoes[prompt]
            start = len(echo)
            if delta.choice not in self._begun:
                text = echo + text
                if delta.prompt_logprobs:  # siblings share the prompt's pages, so only the first one scores it
                    self._scored[prompt] = delta.prompt_logprobs
                if self._asked.params.prompt_logprobs is not None:
                    scores.append(prompt_logprobs(self._tokenizer, self._asked.prompts[prompt], self._scored.get(prompt, ())))
        self._begun.add(delta.choice)
        if delta.logprobs is not None:
            scores.append(completion_logprobs(self._tokenizer, delta.logprobs, delta.offsets, start))
        return {
            "index": delta.choice,
            "text": text,
            "logprobs": joined(scores) if scores else None,
            "finish_reason": delta.finish,
            "stop_reason": delta.stop_reason,
        }


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {**parts[-1], "text": "".join(part["text"] for part in parts), "logprobs": joined(scores) if scores else None}
