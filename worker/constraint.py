"""Which tokens the grammars of sequences allow next: a matcher for each sequence that has a grammar, on the rank that samples.

A matcher follows from the grammar and the output tokens alone. It is made when the runner learns a sequence, whether that has just come,
was preempted, or has begun at another replica, on a thread beside the step's computing; and it takes in what the sequence has gained
when its next token is to be drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from .plan import NewSequence
from .protocol import GRAMMAR_FAILED, BadRequest, SamplingParams
from .text.grammar import Grammars, why_not

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from .text.tokenizer import Tokenizer

RENEW_TOKENS = 256
COMPILE_TIMEOUT_S = 60.0  # a grammar takes less than a second, and the tokenizer, before the first one, some seconds

Words = npt.NDArray[np.uint32]


class Wanted(NamedTuple):
    """A sequence under a grammar whose next token is to be drawn, and its output tokens so far."""

    seq: int
    params: SamplingParams
    output: npt.NDArray[np.int32]


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

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that sequences to come will have, on any thread. Takes seconds at the first one, when the tokenizer is read.

        Raises:
            BadRequest: it cannot be.
        """
        self._over_tokens().check(grammar)

    def learn(self, new: NewSequence) -> None:
        """A sequence that the runner has learnt."""
        if new.params.grammar:
            grammar = new.params.grammar
            self._sequences[new.seq] = _Constrained(self._thread.submit(lambda: self._over_tokens().matcher(grammar)))

    def forget(self, seq: int) -> None:
        """A sequence that the runner has forgotten."""
        self._sequences.pop(seq, None)

    def reset(self) -> None:
        """Forget every sequence."""
        self._sequences.clear()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def allowed(self, wanted: Mapping[int, Wanted]) -> dict[int, Allowed]:
        """What may follow, by the same keys.

        Below `min_tokens` nothing that ends a sequence may, if anything else may. Matchers that have come to a limit, which those of one
        grammar share, are made anew.
        """
        found = self._masks({key: partial(self._sequences[one.seq].matcher, one.output) for key, one in wanted.items()})
        stuck = [key for key, allowed in found.items() if allowed.error and self._sequences[wanted[key].seq].renews()]
        if stuck:
            self._over_tokens().renew({wanted[key].params.grammar for key in stuck})
            found |= self._masks({key: partial(self._anew, wanted[key]) for key in stuck})
        return {key: self._lasting(allowed, wanted[key]) for key, allowed in found.items()}

    def _masks(self, matchers: Mapping[int, Callable[[], LLMatcher]]) -> dict[int, Allowed]:
        found: dict[int, Allowed] = {}
        ready: dict[int, LLMatcher] = {}
        for key, matcher in matchers.items():
            try:
                ready[key] = matcher()
            except BadRequest as error:
                found[key] = self._failed(error.message)
        if ready:
            masks = self._over_tokens().masks(list(ready.values()))
            for (key, one), mask in zip(ready.items(), masks, strict=True):
                found[key] = self._failed(why_not(one)) if one.is_error() else Allowed(self._padded(mask))
        return found

    def _anew(self, wanted: Wanted) -> LLMatcher:
        sequence = self._sequences[wanted.seq]
        sequence.restart(self._over_tokens().matcher(wanted.params.grammar))
        return sequence.matcher(wanted.output)

    def _lasting(self, allowed: Allowed, wanted: Wanted) -> Allowed:
        """Without what ends the sequence, where it is to go on and can."""
        if not allowed.error and len(wanted.output) < wanted.params.min_tokens:
            going_on = allowed.words & ~self._bits([*self._eos, *wanted.params.stop_token_ids])
            allowed = Allowed(going_on) if going_on.any() else allowed
        return allowed if allowed.error or allowed.words.any() else self._failed("it allows no further token of this model")

    def _failed(self, why: str) -> Allowed:
        return Allowed(self._bits([]), GRAMMAR_FAILED + why)

    def _over_tokens(self) -> Grammars:
        with self._making:
            if self._grammars is None:
                self._grammars = Grammars(self._load(), self._eos)
            return self._grammars

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

    def __init__(self, making: Future[LLMatcher]) -> None:
        self._making = making
        self._taken = 0
        self._renewed: int | None = None  # how many it had taken in when it was made anew last

    def matcher(self, output: npt.NDArray[np.int32]) -> LLMatcher:
        """The matcher, which has taken in `output`, or is in an error. Waits until it is compiled.

        Raises:
            BadRequest: it cannot be.
        """
        matcher = self._making.result(COMPILE_TIMEOUT_S)
        gained, self._taken = output[self._taken :].tolist(), len(output)
        if gained:
            matcher.consume_tokens(gained)
        return matcher

    def renews(self) -> bool:
        """Whether it may be made anew: at most once in so many tokens, since that may take long."""
        return self._renewed is None or self._taken - self._renewed >= RENEW_TOKENS

    def restart(self, matcher: LLMatcher) -> None:
        """Go on with another one, which is at its start."""
        self._making = Future()
        self._making.set_result(matcher)
        self._taken, self._renewed = 0, self._taken
