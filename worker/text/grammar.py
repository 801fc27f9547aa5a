"""Constraints on a text: what a client asks for, as one grammar, and grammars as matchers that say which token may come next.

A JSON schema, a regular expression, a list of choices or a grammar in Lark's notation becomes one text (`grammar_of`), which is what
travels in `SamplingParams.grammar`. llguidance, which need not be installed for anything else, reads it and walks it token by token; a
token counts for its bytes (`Tokenizer.pieces`), as it does in the answer. Special tokens are no text, so they are allowed only where a
grammar names them, and those that end a sequence only where the grammar is satisfied.

Clients write these texts, so all work on them is bounded: by `_limits` at the start and for each token, by `LimitOptions.max_grammar` in
their length.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..protocol import BadRequest
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

BLANKS = r"[\x20\x0A\x0D\x09]{1,40}"  # between two tokens of JSON; without a bound a weak model may write blanks for ever
COMPILED = 16  # grammars that are kept
TRIED_TOKENS = 3
LEADS = ("", "\x02")
MOST_GBNF = 4096  # characters
MOST_THREADS = 16  # that compute masks
MOST_TOLD = 200  # characters of llguidance's own words


def grammar_of(
    *,
    json_schema: dict[str, Any] | str | None = None,
    json_object: bool = False,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    lark: str | None = None,
) -> str:
    """The grammar (`SamplingParams.grammar`) of exactly one constraint.

    Args:
        json_schema: the text is JSON that satisfies this schema, given as a dict or as JSON.
        json_object: it is any JSON object.
        regex: it matches this regular expression, whole (Rust's syntax, without look-around).
        choice: it is one of these.
        lark: it follows this grammar, in llguidance's variant of Lark's notation, or in llama.cpp's (GBNF, `root ::= ...`).

    Raises:
        BadRequest: none or several are given, it has not even the form of one, or llguidance is not installed; the field is the
            argument's name. What llguidance has to say of it, `Grammars.check` tells, which every request comes to.
    """
    given = {"json_schema": json_schema, "json_object": json_object or None, "regex": regex, "choice": choice, "lark": lark}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise BadRequest("grammar", f"give exactly one of {', '.join(given)}, not {' and '.join(names) or 'none'}")
    return _made(names[0], given[names[0]])


def _made(kind: str, value: Any) -> str:
    if kind == "json_object":
        return _json("json_object", {"type": "object"})
    if kind == "json_schema":
        return _json(kind, value)
    if kind == "choice":
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise BadRequest(kind, "must be a list of strings")
        if not any(value):
            raise BadRequest(kind, "must hold at least one text that is not empty")
        # Lark's strings are written as JSON's; with the rest as \u escapes, since its lexer knows few characters beyond ASCII.
        return from_lark("start: " + " | ".join(map(json.dumps, dict.fromkeys(value))))
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(kind, "must be a text, and not empty")
    if kind == "regex":
        return _matcher_class().grammar_from_regex(value)
    return _from_gbnf(value) if "::=" in value else from_lark(value)


def from_lark(text: str) -> str:
    """The grammar that is written so in llguidance's variant of Lark's notation."""
    return json.dumps({"grammars": [{"lark_grammar": text}]}, ensure_ascii=False)


def _from_gbnf(gbnf: str) -> str:
    """llama.cpp's notation. llguidance translates it in a time that grows with the square of its lines."""
    _matcher_class()
    from llguidance import grammar_from

    if len(gbnf) > MOST_GBNF:
        raise BadRequest("lark", f"has {len(gbnf)} characters; at most {MOST_GBNF} are allowed with ::=, so write it in Lark's notation")
    try:
        return grammar_from("gbnf", gbnf)
    except ValueError as error:
        raise BadRequest("lark", _told(str(error))) from None


def _json(kind: str, schema: Any) -> str:
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(read, dict):
            raise BadRequest(kind, "must be a JSON schema: an object, or the JSON of one")
        text = json.dumps(read, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return _matcher_class().grammar_from_json_schema(text, defaults={"whitespace_pattern": BLANKS})
    except RecursionError:
        raise BadRequest(kind, "is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise BadRequest(kind, f"is no JSON schema: {_told(str(error))}") from None


class Grammars:
    """Matchers over one model's tokens. May be called from several threads.

    Args:
        tokenizer: the model's.
        eos_token_ids: tokens that end a sequence.

    Raises:
        BadRequest: llguidance is not installed, or no token ends a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> None:
        self._vocabulary = _vocabulary(tokenizer, eos_token_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # at their starts; the latest used at the end
        self._lock = threading.Lock()

    def check(self, grammar: str) -> None:
        """Compile `grammar`, unless it was lately.

        Raises:
            BadRequest: it cannot be, no text satisfies it, or it is too complex.
        """
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return
        compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the start of `grammar`. Matchers of one grammar share what they have found out about it, up to `_limits` together.

        Raises:
            BadRequest: as `check`.
        """
        while True:
            self.check(grammar)
            with self._lock:
                if grammar in self._compiled:
                    return self._compiled[grammar].deep_copy()

    def renew(self, grammars: Iterable[str]) -> None:
        """Matchers of these share nothing from now on with the earlier ones, which have come to a limit together."""
        with self._lock:
            for grammar in grammars:
                self._compiled.pop(grammar, None)

    def masks(self, matchers: list[LLMatcher]) -> npt.NDArray[np.uint32]:
        """What each allows next: bit `t % 32` of word `t // 32` is token t's, uint32 [matchers, words]. On several cores.

        The row of one that is in an error means nothing. Called by one thread.
        """
        words = np.zeros((len(matchers), -(-self._vocabulary.vocab_size // 32)), np.uint32)
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, words.shape[1] * words.itemsize, len(matchers))
        return words

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS))

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = _matcher_class()(self._vocabulary, grammar, log_level=0, limits=_limits())
        tried = matcher.deep_copy()
        for _ in range(TRIED_TOKENS):  # what is too complex, or a dead end, shows only now
            if tried.is_error() or tried.is_stopped():
                break
            tried.consume_token(_first(tried.compute_bitmask()))
        for one in (matcher, tried):
            if one.is_error():
                raise BadRequest("grammar", why_not(one))
        return matcher


def _first(mask: bytes) -> int:
    """The lowest token in a mask of bits; 0 when there is none."""
    bits = int.from_bytes(mask, "little")
    return max((bits & -bits).bit_length() - 1, 0)


def why_not(matcher: LLMatcher) -> str:
    """What is wrong with a matcher that is in an error, in words for the client."""
    told = _told(matcher.get_error())
    return "no text satisfies it" if told.startswith("NoExtension") else told


def _told(error: str) -> str:
    text = " ".join(error.partition("<backtrace>")[0].replace("<non-verbose/>", "").split())
    return text if len(text) <= MOST_TOLD else text[:MOST_TOLD] + "..."


class _Vocabulary:
    """The model's tokens as `llguidance.TokenizerWrapper` wants them, and how it writes texts.

    Where a grammar forces a text, the model's own tokens for it are forced, too: those that it has seen in training. They must spell the
    text byte by byte. SentencePiece puts a space before whatever it is given; behind a character that is cut off again there is none.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: list[int]) -> None:
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = list(tokenizer.pieces)
        self.special_token_ids = sorted(tokenizer.special_ids.union(eos_token_ids))
        self._tokenizer = tokenizer
        self._greedy: Callable[[str], list[int]]

    def falls_back_on(self, greedy: Callable[[str], list[int]]) -> None:
        """How to write texts that do not come back from the model's tokenizer as they went in."""
        self._greedy = greedy

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts only")  # how llguidance finds out that bytes are not taken
        for lead in LEADS:
            tokens = self._tokenizer.encode(lead + text, add_special_tokens=False)
            for start in range(min(len(tokens), 3)):
                if b"".join(self.tokens[token] for token in tokens[start:]) == text.encode():
                    return tokens[start:]
        return self._greedy(text)


def _vocabulary(tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> LLTokenizer:
    _matcher_class()
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(token for token in eos_token_ids if 0 <= token < tokenizer.vocab_size)
    if not ends:
        raise BadRequest("grammar", "this model has no end-of-sequence token, so its text could not end where a grammar does")
    tokens = _Vocabulary(tokenizer, ends)
    vocabulary = LLTokenizer(TokenizerWrapper(tokens), eos_token=ends)
    tokens.falls_back_on(vocabulary.greedy_tokenize)
    return vocabulary


def _matcher_class() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise BadRequest("grammar", "needs llguidance, which is not installed here: pip install llguidance") from None
    return LLMatcher


def _limits() -> LLParserLimits:
    """Of llguidance's work on one grammar. Of its own limits the first allows a start of 2 s, and the states half a gigabyte."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=100_000,
        step_lexer_fuel=50_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=30_000,  # of 1 to 2 kB
        max_grammar_size=200_000,
        verbose_errors=False,  # they would quote the grammar
    )
