"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
from typing import Any

from fastapi import APIRouter, Request, Response

from ...worker.protocol import BadRequest, TokenLogprob
from ...worker.text.tool_parser import Arguments, Call
from .answer import Asked, answer, present
from .body import read_body
from .context import Api
from .generation import ChoiceDelta, Presentation
from .logprobs import chat_logprobs
from .messages import read_messages, read_values
from .reply import Reply, json_string
from .schemas import ChatBody, ToldUsage
from .tools import Choice, ToolUse, read_tools

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Continues a conversation."""
    api: Api = request.app.state.api
    body = await read_body(request, ChatBody)
    api.check_model(body.model)
    use = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    prompt = await _prompt(api, body, use)
    defaults = (await api.client.info()).default_params(len(prompt))
    asked = Asked(
        request_id=api.new_id("chatcmpl"),
        prompts=(prompt,),
        params=body.sampling(
            defaults,
            max_tokens=body.longest(defaults.max_tokens, api.context),
            logprobs=_logprobs(body),
            grammar=await api.tool_calls.grammar(use, body, api.grammars),
        ),
        options=body,
        shown=_present(api, body, use),
        names={"prompt": "messages", "logprobs": "top_logprobs", **body.names},
    )
    reply = ChatReply(asked.request_id, api, body.told_usage, may_call=use.choice is not Choice.NONE)
    return await answer(request, asked, reply)


async def _prompt(api: Api, body: ChatBody, use: ToolUse) -> tuple[int, ...]:
    messages = read_messages(body.messages)
    text = await api.text.render(messages, body.add_generation_prompt, read_values(body.chat_template_kwargs), use.told)
    return await api.text.encode(text, body.add_special_tokens, field="messages")


def _present(api: Api, body: ChatBody, use: ToolUse) -> Presentation:
    reading = api.tool_calls.reading(use, body.skip_special_tokens)
    plain = present(api, body)
    if reading is None:
        return plain
    called = "stop" if use.choice is Choice.NAMED else "tool_calls"  # so OpenAI
    return plain._replace(calls=reading, markers=frozenset(api.tool_calls.special.values()), called=called)


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs", "needs logprobs=true")
    return (body.top_logprobs or 0) if body.logprobs else None


class ChatReply(Reply):
    """`chat.completion` and `chat.completion.chunk`."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, request_id: str, api: Api, told_usage: ToldUsage, may_call: bool) -> None:
        super().__init__(request_id, api.info.name, api.fingerprint, told_usage)
        self._tokenizer = api.text.tokenizer
        self._nothing = "null" if may_call else '""'  # the content of an answer that may have none
        self._begun: set[int] = set()
        self._deltas: dict[int, list[ChoiceDelta]] = {}

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """The role first, then text and calls, then how it ended."""
        out = []
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            role = f'{{"role": "assistant", "content": {self._nothing}}}'
            out.append(f'{{"index": {delta.choice}, "delta": {role}, "logprobs": null, "finish_reason": null}}')
        logprobs = "null" if delta.logprobs is None else json.dumps(self._logprobs(delta.logprobs))
        for gained in self._gained(delta):
            out.append(f'{{"index": {delta.choice}, "delta": {gained}, "logprobs": {logprobs}, "finish_reason": null}}')
            logprobs = "null"
        if delta.finish is not None:
            ending = {"index": delta.choice, "delta": {}, "logprobs": None, "finish_reason": delta.finish, "stop_reason": delta.stop_reason}
            out.append(json.dumps(ending))
        return out

    def add(self, delta: ChoiceDelta) -> None:
        self._deltas.setdefault(delta.choice, []).append(delta)

    def choices(self) -> list[dict[str, Any]]:
        return [self._choice(index, deltas) for index, deltas in sorted(self._deltas.items())]

    def _gained(self, delta: ChoiceDelta) -> list[str]:
        """JSON of `delta`s: the text, and each piece of a call. The log probabilities of what is held back need one, too."""
        gained = [f'{{"content": {json_string(delta.text)}}}'] if delta.text else []
        gained += [f'{{"tool_calls": [{_call_chunk(piece)}]}}' for piece in delta.calls]
        return gained or [f'{{"content": {self._nothing}}}'] * bool(delta.logprobs)

    def _choice(self, index: int, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        asked = any(delta.logprobs is not None for delta in deltas)
        content = "".join(delta.text for delta in deltas)
        calls = _calls([piece for delta in deltas for piece in delta.calls])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tuple(logprobs)) if asked else None,
            "finish_reason": deltas[-1].finish,
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, entries)


def _call_chunk(piece: Call | Arguments) -> str:
    """JSON of a `tool_calls` entry in a stream: id and name first, then the arguments as they come."""
    if isinstance(piece, Arguments):
        return f'{{"index": {piece.call}, "function": {{"arguments": {json_string(piece.text)}}}}}'
    return json.dumps({"index": piece.call, **_called(piece.name, "")})


def _calls(pieces: list[Call | Arguments]) -> list[dict[str, Any]]:
    """`tool_calls` of a whole answer."""
    arguments: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, Arguments):
            arguments[piece.call] = arguments.get(piece.call, "") + piece.text
    return [_called(piece.name, arguments.get(piece.call, "")) for piece in pieces if isinstance(piece, Call)]


def _called(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": arguments}}
