"""Text to tokens and back for HTTP routes: in threads, and never for a text that cannot fit the model anyway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ...worker.protocol import BadRequest
from ...worker.text.chat_template import NOTHING
from ...worker.text.tokenizer import Tokenizer
from .errors import ApiError

THREADS = 2

Result = TypeVar("Result")


class EdgeText:
    """The tokenizer behind a small thread pool; the tokenizer's own code releases the interpreter lock."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_bytes = max_model_len * tokenizer.max_token_bytes
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Lets the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, add_special_tokens: bool, field: str) -> tuple[int, ...]:
        """Token ids of one text.

        Raises:
            ApiError: 400, the text is longer than any text that fits the model; `field` holds it.
        """
        self._must_fit(text, field)
        return await self._in_thread(lambda: tuple(self.tokenizer.encode(text, add_special_tokens)))

    async def encode_all(self, prompts: Sequence[str | tuple[int, ...]], add_special_tokens: bool, field: str) -> list[tuple[int, ...]]:
        """Token ids of each prompt; those that are ids stay as they are. Raises as `encode`."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        for text in texts:
            self._must_fit(text, field)
        encoded = iter(await self._in_thread(lambda: self.tokenizer.encode_batch(texts, add_special_tokens)))
        return [tuple(next(encoded)) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def texts(self, prompts: Sequence[str | tuple[int, ...]]) -> list[str]:
        """What `echo` shows of each prompt."""
        return [prompt if isinstance(prompt, str) else await self.decode(prompt) for prompt in prompts]

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones written out. The caller has checked that they are in the vocabulary."""
        return await self._in_thread(lambda: self.tokenizer.decode(tokens, False))

    async def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        values: Mapping[str, Any] = NOTHING,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """The conversation through the model's own chat template, which sees `values` too, and the tools that may be called.

        Raises:
            ApiError: 400, it is longer than any that fits the model.
            BadRequest: the template does not take these messages, or the model has none.
        """
        for i, message in enumerate(messages):
            self._must_fit(message["content"], f"messages.{i}.content")
        if tools:
            try:
                self._must_fit(json.dumps(tools, ensure_ascii=False), "tools")
            except RecursionError:
                raise BadRequest("tools", "are nested too deeply") from None
        return await self._in_thread(lambda: self.tokenizer.apply_chat_template(messages, add_generation_prompt, values, tools))

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _must_fit(self, text: str, field: str) -> None:
        if len(text) > self._max_bytes:
            message = f"{len(text)} characters are more than the model's {self._max_model_len} tokens can hold"
            raise ApiError(400, f"{field}: {message}", param=field, code="context_length_exceeded")
