"""One request on its way back: what the engine's outputs mean as text, choice by choice.

Owns the `RequestStream` and one `ChoiceText` for each choice; knows nothing of HTTP. Streamed and whole answers are made of
the same deltas, so they cannot differ.
"""

from __future__ import annotations

from typing import NamedTuple

from ...cluster.client import RequestStream
from ...worker.protocol import DeadlineExceeded, FinishReason, GenerateRequest, ReplicaLost, SequenceOutput, TokenLogprob
from ...worker.text.choice import ChoiceText
from ...worker.text.detokenizer import TextOptions
from ...worker.text.tokenizer import Tokenizer
from ...worker.text.tool_parser import Arguments, Call, CallReading, Content, ToolParser
from ..metrics import GenerationClock
from .errors import engine_failed


class Presentation(NamedTuple):
    """How the answer is told, beyond what the engine's parameters say."""

    skip_special_tokens: bool = True
    include_stop: bool = False  # the stop string, or the stop token's text, stays in the answer
    continues: bool = False  # the text goes on from the prompt's
    discard_output: bool = False  # only the prompt is wanted: what is generated is neither shown nor counted
    eos_token_ids: tuple[int, ...] = ()
    calls: CallReading | None = None  # calls of tools are read out of the text
    markers: frozenset[int] = frozenset()  # special tokens among what marks calls
    called: str = "tool_calls"  # how a choice ends that has called tools


class ChoiceDelta(NamedTuple):
    """What one choice gained. `finish` is OpenAI's word ("stop", "length", "tool_calls"), set once, with the choice's last delta."""

    choice: int
    text: str  # without that of calls
    logprobs: tuple[TokenLogprob, ...] | None
    offsets: tuple[int, ...]  # for each of `logprobs`, the characters of the choice's text before its token
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    finish: str | None
    stop_reason: str | int | None  # the stop string, or the stop token id, that ended it; None for end-of-sequence
    calls: tuple[Call | Arguments, ...] = ()


class Usage(NamedTuple):
    """Token counts so far. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, object]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """Iterates over `ChoiceDelta`s until every choice has ended. One reader; `close` it whatever happens.

    Raises while iterating:
        ReplicaLost: the replica is gone.
        DeadlineExceeded: it waited longer than it wanted to.
        ApiError: 500, the engine could not compute a sequence.
    """

    def __init__(
        self, stream: RequestStream, request: GenerateRequest, tokenizer: Tokenizer, shown: Presentation, clock: GenerationClock
    ) -> None:
        self._stream = stream
        self._request = request
        self._shown = shown
        self._clock = clock
        self._choices = [_choice_text(tokenizer, request, shown) for _ in range(len(request.prompts) * request.params.n)]
        self._parsers = [ToolParser(shown.calls) for _ in self._choices] if shown.calls is not None else None
        self._live = set(range(len(self._choices)))
        self._cached = [0] * len(request.prompts)
        self._finishes: dict[int, str] = {}

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> ChoiceDelta:
        while self._live:
            try:
                output = await anext(self._stream)
            except StopAsyncIteration:
                raise ReplicaLost("the stream ended before its sequences did") from None
            if output.choice in self._live:
                return await self._take(output)
        raise StopAsyncIteration

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        prompt_tokens = sum(len(prompt) for prompt in self._request.prompts)
        return Usage(prompt_tokens, sum(choice.tokens for choice in self._choices), sum(self._cached))

    @property
    def finishes(self) -> list[str]:
        """How the choices that have ended did, in their order."""
        return [finish for _, finish in sorted(self._finishes.items())]

    @property
    def waited_s(self) -> float | None:
        """Until a replica had a place for the request; None when none has had."""
        return self._stream.waited_s

    @property
    def ttft_s(self) -> float | None:
        """From the request to its first output; None before it."""
        return self._clock.ttft_s

    async def close(self) -> None:
        """Gives back what still runs; a no-op when everything has ended."""
        if self._live:
            self._live.clear()
            await self._stream.abort()

    async def _take(self, output: SequenceOutput) -> ChoiceDelta:
        if output.finish is FinishReason.ERROR:
            raise engine_failed(output.error)
        if output.finish is FinishReason.DEADLINE:
            raise DeadlineExceeded("the deadline passed before the request had its turn")
        if output.finish is FinishReason.ABORT:
            raise ReplicaLost("it gave the request up")
        self._clock.tokens(output.choice, self._stream.waited_s)
        prompt, sibling = divmod(output.choice, self._request.params.n)
        if output.cached_tokens is not None and sibling == 0:
            self._cached[prompt] = output.cached_tokens
        delta = self._as_text(output)
        if delta.finish is not None:
            self._finishes[delta.choice] = delta.finish
            await self._end(output)
        return delta

    def _as_text(self, output: SequenceOutput) -> ChoiceDelta:
        if self._shown.discard_output:
            none = () if output.logprobs is not None else None
            return ChoiceDelta(output.choice, "", none, (), output.prompt_logprobs, FinishReason.LENGTH, None)
        gain = self._choices[output.choice].take(output)
        delta = ChoiceDelta(output.choice, gain.text, gain.logprobs, gain.offsets, output.prompt_logprobs, gain.finish, gain.stop_reason)
        return delta if self._parsers is None else self._with_calls(delta, self._parsers[output.choice])

    def _with_calls(self, delta: ChoiceDelta, parser: ToolParser) -> ChoiceDelta:
        """The delta with calls told from its text. With the only call that is wanted it ends, wherever the engine may be by now."""
        pieces = parser.push(delta.text) + (parser.finish() if delta.finish is not None else [])
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        calls = tuple(piece for piece in pieces if not isinstance(piece, Content))
        logprobs, finish = delta.logprobs, delta.finish
        if parser.done:
            finish = FinishReason.STOP
            unused = self._choices[delta.choice].end_before(parser.unread) if parser.unread else 0
            logprobs = logprobs[: len(logprobs) - unused] if logprobs is not None else None
        if finish == FinishReason.STOP and parser.calls:
            finish = self._shown.called
        return delta._replace(text=text, calls=calls, logprobs=logprobs, finish=finish)

    async def _end(self, output: SequenceOutput) -> None:
        """A choice has ended; by a stop string, or with the only call that is wanted, the engine does not know of it yet."""
        self._clock.ended(output.choice, self._choices[output.choice].tokens)
        if output.finish is None:
            await self._stream.abort(output.choice)
        self._live.discard(output.choice)
        if not self._live:
            self._clock.all_ended()


def _choice_text(tokenizer: Tokenizer, request: GenerateRequest, shown: Presentation) -> ChoiceText:
    options = TextOptions(
        stop=request.params.stop,
        include_stop=shown.include_stop,
        min_tokens=request.params.min_tokens,
        skip_special_tokens=shown.skip_special_tokens,
        but_show=shown.markers,
        continues=shown.continues,
    )
    return ChoiceText(tokenizer, options, shown.eos_token_ids)
