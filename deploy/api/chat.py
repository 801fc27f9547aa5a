"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from ...worker.protocol import BadRequest, TokenLogprob
from .answer import Asked, answer, present
from .body import read_body
from .context import Api
from .generation import ChoiceDelta
from .logprobs import chat_logprobs
from .messages import read_messages, read_values
from .reply import Reply, json_string
from .schemas import ChatBody, ToldUsage

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Continues a conversation."""
    api: Api = request.app.state.api
    body = await read_body(request, ChatBody)
    api.check_model(body.model)
    asked = Asked(
        request_id=api.new_id("chatcmpl"),
        prompts=(await _prompt(api, body),),
        params=body.sampling(
            max_tokens=body.longest(None, api.context), logprobs=_logprobs(body), grammar=await api.grammars.grammar(body)
        ),
        options=body,
        shown=present(api, body),
        names={"prompt": "messages", "logprobs": "top_logprobs", **body.names},
    )
    reply = ChatReply(asked.request_id, api, body.told_usage)
    return await answer(request, asked, reply)


async def _prompt(api: Api, body: ChatBody) -> tuple[int, ...]:
    messages = read_messages(body.messages)
    text = await api.text.render(messages, body.add_generation_prompt, read_values(body.chat_template_kwargs))
    return await api.text.encode(text, body.add_special_tokens, field="messages")


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs", "needs logprobs=true")
    return (body.top_logprobs or 0) if body.logprobs else None


class ChatReply(Reply):
    """`chat.completion` and `chat.completion.chunk`."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, request_id: str, api: Api, told_usage: ToldUsage) -> None:
        super().__init__(request_id, api.info.name, api.fingerprint, told_usage)
        self._tokenizer = api.text.tokenizer
        self._begun: set[int] = set()
        self._deltas: dict[int, list[ChoiceDelta]] = {}

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """The role first, then text, then how it ended."""
        out = []
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            out.append(
                f'{{"index": {delta.choice}, "delta": {{"role": "assistant", "content": ""}}, "logprobs": null, "finish_reason": null}}'
            )
        if delta.text or delta.logprobs:
            logprobs = "null" if delta.logprobs is None else json.dumps(self._logprobs(delta.logprobs))
            content = f'{{"content": {json_string(delta.text)}}}'
            out.append(f'{{"index": {delta.choice}, "delta": {content}, "logprobs": {logprobs}, "finish_reason": null}}')
        if delta.finish is not None:
            ending = {"index": delta.choice, "delta": {}, "logprobs": None, "finish_reason": delta.finish, "stop_reason": delta.stop_reason}
            out.append(json.dumps(ending))
        return out

    def add(self, delta: ChoiceDelta) -> None:
        self._deltas.setdefault(delta.choice, []).append(delta)

    def choices(self) -> list[dict[str, Any]]:
        return [self._choice(index, deltas) for index, deltas in sorted(self._deltas.items())]

    def _choice(self, index: int, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        asked = any(delta.logprobs is not None for delta in deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None},
            "logprobs": self._logprobs(tuple(logprobs)) if asked else None,
            "finish_reason": deltas[-1].finish,
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, entries)
