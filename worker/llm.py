"""Offline generation: the serving engine in the caller's own process, without Ray or HTTP.

from quire import LLM, SamplingParams
for answer in LLM("smollm2").chat([{"role": "user", "content": "What is a quire?"}], SamplingParams(max_tokens=64)):
    print(answer.outputs[0].text)
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .engine import Engine, Progress, build_engine
from .options import engine_options
from .protocol import BadRequest, EngineStats, FinishReason, GenerateRequest, SamplingParams, SequenceOutput, TokenLogprob
from .text.choice import ChoiceText
from .text.detokenizer import TextOptions
from .text.tokenizer import Tokenizer, load_tokenizer

MOVE_WAIT_S = 0.1  # at most, before moves are asked about again

Prompt = str | Sequence[int]
Message = dict[str, Any]


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: which of the prompt's `n` sequences.
        text: without stop strings, and without special tokens.
        token_ids: all that were generated, the one that ended it included.
        finish_reason: why it ended.
        stop_reason: the stop string, or the stop token's id, that ended it; None for end-of-sequence and for length.
        logprobs: one for each token, when asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None


@dataclass(slots=True)
class RequestOutput:
    """What came of one prompt.

    Attributes:
        prompt: the text, or None when it was given as token ids.
        prompt_token_ids: what the model read.
        outputs: `n` sequences.
        cached_tokens: prompt tokens whose pages were already there.
        prompt_logprobs: for each prompt token from the second on, when asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    cached_tokens: int
    prompt_logprobs: list[TokenLogprob] | None


class LLM:
    """A model, its page pool and its scheduler, driven step by step by the calls below. Not thread-safe.

    Args:
        model: as `quire serve --model`: 'smollm2', a directory, a .gguf file or a hub id.
        progress: show bars for loading and for batches, on stderr.
        options: the engine's options by their names in docs/configuration.md (`page_size=16`, `quantize="int8"`, ...).

    Raises:
        ValueError: an option, or the model, is unknown or not supported; names it.
    """

    def __init__(self, model: str = "smollm2", progress: bool = True, **options: Any) -> None:
        look: dict[str, Any] = {"disable": not progress, "file": sys.stderr, "leave": False}
        with tqdm(desc="weights", unit="B", unit_scale=True, **look) as weights, tqdm(desc="warm-up", unit="step", **look) as steps:
            self.engine: Engine = build_engine(
                engine_options(model=model, **options), secrets.token_bytes(32), _drawn(weights), warming=_drawn(steps)
            )
        self.tokenizer: Tokenizer = load_tokenizer(Path(self.engine.info.path))
        self._progress = progress
        self._requests = 0
        self._moved = threading.Event()
        self.engine.runner.watch(self._moved.set)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one for each; default: `default_params`.
            progress: show a bar; default: as given to the constructor.

        Returns:
            One for each prompt, in order.

        Raises:
            BadRequest: a prompt or parameter is refused; nothing is left running then.
        """
        batch = _as_batch(prompts)
        texts = [p if isinstance(p, str) else None for p in batch]
        return self._run(texts, [self._encode(p) for p in batch], params, progress)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
        tools: Sequence[Message] = (),
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several, through the model's chat template.

        Args:
            conversations, params, progress: as for `generate`.
            tools: what the model is told that it may call, in OpenAI's form. A call is part of its text, as the model writes it.

        Raises:
            BadRequest: as `generate`, or the model has no chat template.
        """
        several = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
        render = self.tokenizer.apply_chat_template
        texts: list[str | None] = [render(list(messages), tools=tools) for messages in several]  # type: ignore[arg-type]
        return self._run(texts, [self.tokenizer.encode(text or "", add_special_tokens=False) for text in texts], params, progress)

    def default_params(self) -> SamplingParams:
        """What a call without parameters uses: the model's own, as its generation_config.json has them."""
        return self.engine.info.default_params()

    def stats(self) -> EngineStats:
        """Counters and gauges of the engine."""
        return self.engine.stats()

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(
        self,
        texts: list[str | None],
        prompts: list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool | None,
    ) -> list[RequestOutput]:
        if params is None:
            params = [self.engine.info.default_params(len(prompt)) for prompt in prompts]
        each = _for_each(params, len(prompts))
        pending = []
        for text, prompt, p in zip(texts, prompts, each, strict=True):
            request = self.engine.prepare(GenerateRequest(f"offline-{self._requests}", (tuple(prompt),), p))
            self._requests += 1
            pending.append(_Pending(text, request, self.tokenizer, self.engine.info.eos_token_ids))
        show = self._progress if progress is None else progress
        with tqdm(total=len(pending), desc="generating", unit="prompt", disable=not show, file=sys.stderr) as bar:
            try:
                self._drain(pending, bar)
            finally:  # an interrupt leaves no sequence behind
                for one in pending:
                    self.engine.abort(one.request.request_id)
        return [one.result() for one in pending]

    def _drain(self, pending: list[_Pending], bar: tqdm[Any]) -> None:
        by_id = {p.request.request_id: p for p in pending}
        queue = iter(pending)
        upcoming = next(queue, None)
        tokens = 0
        while upcoming is not None or not self.engine.idle():
            # The queue is kept just long enough to fill every step: a batch of a million prompts needs no longer one.
            scheduler = self.engine.scheduler
            while upcoming is not None and scheduler.num_waiting <= scheduler.max_running and upcoming.choices <= self.engine.room():
                self.engine.submit(upcoming.request)
                upcoming = next(queue, None)
            outputs = self.engine.step()
            if self.engine.resting and not self.engine.idle():  # who could go on waits for pages that are being copied
                self._moved.wait(MOVE_WAIT_S)
                self._moved.clear()
            for output in outputs:
                tokens += len(output.tokens)
                owner = by_id[output.request_id]
                if owner.take(output):
                    self.engine.abort(output.request_id, output.choice)
                if owner.done:  # exactly once: an ended sequence has no further output
                    bar.update()
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)


class _Pending:
    """One prompt while its sequences are generated."""

    def __init__(self, text: str | None, request: GenerateRequest, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
        self.request = request
        self.choices = request.params.n
        self.done = False
        self._text = text
        self._cached_tokens = 0
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._outputs = [_Growing(k, request.params, tokenizer, eos_token_ids) for k in range(request.params.n)]

    def take(self, output: SequenceOutput) -> bool:
        """Take in what a step gave; whether a stop string ended the sequence, which the engine does not know."""
        if output.cached_tokens is not None and output.choice == 0:
            self._cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = list(output.prompt_logprobs)
        stopped = self._outputs[output.choice].take(output)
        self.done = all(o.finish is not None for o in self._outputs)
        return stopped

    def result(self) -> RequestOutput:
        """When every sequence has ended."""
        outputs = [o.result() for o in self._outputs]
        return RequestOutput(self._text, list(self.request.prompts[0]), outputs, self._cached_tokens, self._prompt_logprobs)


class _Growing:
    """One sequence while it is generated."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
        self.finish: FinishReason | None = None
        self._index = index
        self._choice = ChoiceText(tokenizer, TextOptions(stop=params.stop, min_tokens=params.min_tokens, continues=True), eos_token_ids)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._stop_reason: str | int | None = None

    def take(self, output: SequenceOutput) -> bool:
        """Take in what a step gave; whether a stop string ended the sequence, which the engine does not know."""
        gain = self._choice.take(output)
        self._text.append(gain.text)
        self._tokens.extend(gain.tokens)
        if self._logprobs is not None:
            self._logprobs.extend(gain.logprobs or ())
        self.finish, self._stop_reason = gain.finish, gain.stop_reason
        return gain.finish is not None and output.finish is None

    def result(self) -> CompletionOutput:
        """When the sequence has ended."""
        if self.finish is None:
            raise RuntimeError(f"sequence {self._index} has not ended")
        return CompletionOutput(self._index, "".join(self._text), self._tokens, self.finish, self._stop_reason, self._logprobs)


def _drawn(bar: tqdm[Any]) -> Progress:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # the test above is what tells them apart
    return list(prompts)  # type: ignore[arg-type]


def _for_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise BadRequest("params", f"{len(params)} sampling parameters for {count} prompts; give one for all, or one for each")
    return list(params)
