"""One sequence's outputs as text: what the stop token, stop strings and the end make of it, in one place for every front end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from typing import NamedTuple

from ..protocol import FinishReason, SequenceOutput, TokenLogprob
from .detokenizer import TextOptions, TextStream
from .tokenizer import Tokenizer


class Gain(NamedTuple):
    """What one output means.

    Attributes:
        text: further text; never half a character, nor what a stop string may swallow.
        tokens: further tokens that count, through the one that completed a stop string.
        logprobs: one for each of `tokens`, or None when not asked for.
        offsets: when `logprobs` are there, the characters of text before each token.
        finish: why the sequence ended, with its last gain.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    offsets: tuple[int, ...]
    finish: FinishReason | None
    stop_reason: str | int | None


class ChoiceText:
    """One sequence, from tokens to text. When a gain ends it and the output did not, the engine has to be told to stop.

    Args:
        tokenizer: the model's.
        options: what becomes text, and which stop strings end it.
        eos_token_ids: end-of-sequence tokens, which are no reason worth naming.
    """

    def __init__(self, tokenizer: Tokenizer, options: TextOptions, eos_token_ids: Collection[int]) -> None:
        self.tokens = 0
        self._stream = TextStream(tokenizer, options)
        self._include_stop = options.include_stop
        self._eos = eos_token_ids
        self._chars = 0

    def take(self, output: SequenceOutput) -> Gain:
        """Take in what a step gave. Not to be called again after a gain with `finish`."""
        stream, before = self._stream, self.tokens
        hidden = output.stop_token is not None and not self._include_stop
        text = stream.push(output.tokens[:-1] if hidden else output.tokens)
        if output.finish is not None:
            text += stream.finish()
        stopped = stream.stopped
        self.tokens = before + len(output.tokens) if stopped is None else stopped.tokens
        self._chars += len(text)
        finish, reason = (output.finish, output.stop_token) if stopped is None else (FinishReason.STOP, stopped.stop)
        if reason in self._eos:
            reason = None
        count = self.tokens - before
        if output.logprobs is None:
            return Gain(text, output.tokens[:count], None, (), finish, reason)
        offsets = tuple(stream.offsets[before:])
        offsets += (self._chars,) * (count - len(offsets))  # a stop token that is not shown
        return Gain(text, output.tokens[:count], output.logprobs[:count], offsets, finish, reason)

    def end_before(self, chars: int) -> int:
        """The text has ended before the last so many characters. The tokens that begin there do not count; says how many they are."""
        used = bisect_left(self._stream.offsets, self._chars - chars)
        unused, self.tokens = self.tokens - used, used
        return unused
