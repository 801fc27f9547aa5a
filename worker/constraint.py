"""Which tokens the grammars of sequences allow next: a matcher for each sequence that has a grammar, on the rank that samples.

A matcher follows from the grammar and the output tokens alone. It is made when the runner learns a sequence, whether that has just come,
was preempted, or has begun at another replica, on a thread beside the step's computing; and it takes in what the sequence has gained
when its next token is to be drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from .plan import NewSequence
from .protocol import GRAMMAR_FAILED, BadRequest, SamplingParams
from .text.grammar import Grammars, why_not

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from .text.tokenizer import Tokenizer

Words = npt.NDArray[np.uint32]


class Allowed(NamedTuple):
    """The tokens that may come next.

    Attributes:
        words: bit `t % 32` of word `t // 32` is token t's; as many as the logits have tokens. One is set at least, or there is an error.
        error: why there are none.
    """

    words: Words
    error: str | None = None


class Constraints:
    """The grammars of the sequences that a runner knows.

    Args:
        load: reads the model's tokenizer, at the first request that has a grammar.
        eos_token_ids: tokens that end a sequence.
        vocab_size: tokens that the logits have, which may be more than the tokenizer's.
    """

    def __init__(self, load: Callable[[], Tokenizer], eos_token_ids: Collection[int], vocab_size: int) -> None:
        self._load = load
        self._eos = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._vocab_size = vocab_size
        self._grammars: Grammars | None = None
        self._making = threading.Lock()
        self._sequences: dict[int, _Constrained] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def prepare(self, params: SamplingParams) -> None:
        """Compile the grammar that sequences to come will have, on any thread. Takes seconds at the first one, when the tokenizer is read.

        Raises:
            BadRequest: it cannot be.
        """
        self._over_tokens().check(params.grammar)

    def learn(self, new: NewSequence) -> None:
        """A sequence that the runner has learnt."""
        if new.params.grammar:
            grammar = new.params.grammar
            self._sequences[new.seq] = _Constrained(grammar, self._thread.submit(lambda: self._over_tokens().matcher(grammar)))

    def forget(self, seq: int) -> None:
        """A sequence that the runner has forgotten."""
        self._sequences.pop(seq, None)

    def reset(self) -> None:
        """Forget every sequence."""
        self._sequences.clear()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def allowed(self, seq: int, params: SamplingParams, output: npt.NDArray[np.int32]) -> Allowed | None:
        """What may follow `output`, the sequence's output tokens; None when it has no grammar.

        Below `min_tokens` nothing that ends the sequence may, if anything else may.
        """
        if not params.grammar:
            return None
        try:
            words = self._words(self._sequences[seq], output)
        except BadRequest as error:
            return Allowed(self._bits([]), f"{GRAMMAR_FAILED}{error.message}")
        if len(output) < params.min_tokens:
            going_on = words & ~self._bits([*self._eos, *params.stop_token_ids])
            words = going_on if going_on.any() else words
        return Allowed(words, None if words.any() else f"{GRAMMAR_FAILED}it allows no further token of this model")

    def _over_tokens(self) -> Grammars:
        with self._making:
            if self._grammars is None:
                self._grammars = Grammars(self._load(), self._eos)
            return self._grammars

    def _words(self, sequence: _Constrained, output: npt.NDArray[np.int32]) -> Words:
        """The mask after `output`. Matchers that have come to a limit together are made anew once, each for itself.

        Raises:
            BadRequest: the grammar cannot be compiled, is too complex, or does not allow what `output` has.
        """
        matcher = sequence.matcher()
        mask = sequence.advance(matcher, output)
        if matcher.is_error():
            matcher = sequence.restart(self._over_tokens().renewed(sequence.grammar))
            mask = sequence.advance(matcher, output)
        if matcher.is_error():
            raise BadRequest("grammar", why_not(matcher))
        return self._padded(np.frombuffer(mask, np.uint32))

    def _padded(self, words: Words) -> Words:
        """Bits for as many tokens as the logits have."""
        size = -(-self._vocab_size // 32)
        padded = np.zeros(size, np.uint32)
        padded[: len(words)] = words[:size]
        if self._vocab_size % 32:
            padded[-1] &= np.uint32((1 << self._vocab_size % 32) - 1)
        return padded

    def _bits(self, tokens: list[int]) -> Words:
        words = np.zeros(-(-self._vocab_size // 32), np.uint32)
        for token in tokens:
            words[token // 32] |= np.uint32(1 << token % 32)
        return words


class _Constrained:
    """One sequence's matcher, which has taken in the first `_taken` output tokens."""

    def __init__(self, grammar: str, making: Future[LLMatcher]) -> None:
        self.grammar = grammar
        self._making = making
        self._taken = 0

    def matcher(self) -> LLMatcher:
        """Waits until it is there. Raises: BadRequest."""
        return self._making.result()

    def restart(self, matcher: LLMatcher) -> LLMatcher:
        """Go on with another one, which is at its start."""
        self._making = Future()
        self._making.set_result(matcher)
        self._taken = 0
        return matcher

    def advance(self, matcher: LLMatcher, output: npt.NDArray[np.int32]) -> bytes:
        """Take in what `output` has gained; the mask after it. Means nothing when the matcher is in an error then."""
        gained, self._taken = output[self._taken :].tolist(), len(output)
        if gained and not matcher.consume_tokens(gained):
            return b""
        return matcher.compute_bitmask()
