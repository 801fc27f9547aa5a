"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ...worker.protocol import BadRequest
from .body import read_body
from .context import Api
from .messages import read_messages, read_values
from .schemas import DetokenizeBody, TokenizeBody
from .tools import read_tools

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> JSONResponse:
    """Token ids of a prompt, or of messages as the chat template writes them."""
    api: Api = request.app.state.api
    body = await read_body(request, TokenizeBody)
    api.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("prompt", "give either prompt or messages")
    values = read_values(body.chat_template_kwargs)
    if body.prompt is not None:
        tokens = await api.text.encode(body.prompt, body.add_special_tokens is not False, field="prompt")
    else:
        messages = read_messages(body.messages or [])
        text = await api.text.render(messages, body.add_generation_prompt, values, read_tools(body.tools).told)
        tokens = await api.text.encode(text, body.add_special_tokens is True, field="messages")
    out: dict[str, Any] = {"count": len(tokens), "max_model_len": api.info.max_model_len, "tokens": tokens}
    if body.return_token_strs:
        out["token_strs"] = [api.text.tokenizer.token_text(token) for token in tokens]
    return JSONResponse(out)


@router.post("/detokenize")
async def detokenize(request: Request) -> JSONResponse:
    """The text of token ids."""
    api: Api = request.app.state.api
    body = await read_body(request, DetokenizeBody)
    api.check_model(body.model)
    if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < api.info.vocab_size):
        raise BadRequest("tokens", f"token ids are from 0 to {api.info.vocab_size - 1}")
    return JSONResponse({"prompt": await api.text.decode(body.tokens)})
