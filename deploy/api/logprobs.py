"""Log probabilities in OpenAI's two shapes: chat's list of objects, and the four parallel lists of completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...worker.protocol import TokenLogprob
from ...worker.text.detokenizer import TextOptions, TextStream
from ...worker.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -inf; this is what OpenAI sends for it


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of chat: {"content": [...], "refusal": null}."""
    content = []
    for entry in entries:
        item = _chat_token(tokenizer, entry.token, entry.logprob)
        item["top_logprobs"] = [_chat_token(tokenizer, token, logprob) for token, logprob in entry.top]
        content.append(item)
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LOWEST), "bytes": list(raw)}


def completion_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob], offsets: Iterable[int], start: int = 0) -> dict[str, Any]:
    """`choices[].logprobs` of completions; `offsets` count from character `start` of the choice's text."""
    out: dict[str, Any] = {"text_offset": [start + offset for offset in offsets], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for entry in entries:
        top = {_word(tokenizer, token): max(logprob, LOWEST) for token, logprob in entry.top}
        top.setdefault(_word(tokenizer, entry.token), max(entry.logprob, LOWEST))
        out["token_logprobs"].append(max(entry.logprob, LOWEST))
        out["tokens"].append(_word(tokenizer, entry.token))
        out["top_logprobs"].append(top)
    return out


def prompt_logprobs(tokenizer: Tokenizer, tokens: tuple[int, ...], entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """The same for an echoed prompt. Its first token has no probability: null."""
    text = TextStream(tokenizer, TextOptions(skip_special_tokens=False))
    text.push(tokens)
    first = {"text_offset": [0], "token_logprobs": [None], "tokens": [_word(tokenizer, tokens[0])], "top_logprobs": [None]}
    return joined([first, completion_logprobs(tokenizer, entries, text.offsets[1:])])


def _word(tokenizer: Tokenizer, token: int) -> str:
    """The token as text; one that is part of a character as `bytes:\\xe2\\x80`, as OpenAI did."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Pieces of one choice as one."""
    names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    return {name: [item for part in parts for item in part[name]] for name in names}
