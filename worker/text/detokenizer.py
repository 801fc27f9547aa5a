"""One sequence's output tokens as text that can be sent at once: whole characters only, and nothing that a stop string may swallow.

    tokens -> bytes -> characters (an incomplete one waits) -> stop strings (a possible beginning of one waits) -> delta

The deltas and what `finish` returns, joined, equal `Tokenizer.decode` of all tokens, up to the stop string that was found.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .stops import stop_strings
from .tokenizer import Tokenizer

_utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What of the tokens becomes text, and what ends it.

    Attributes:
        stop: strings that end the text. The one that is completed first counts, and among those the longest.
        include_stop: keep the stop string in the text.
        min_tokens: a stop string that is completed before this many tokens is ordinary text.
        skip_special_tokens: control tokens give no text,
        but_show: except these.
        continues: the text continues another (a completion), so a first space stays, which SentencePiece would drop.
    """

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    but_show: frozenset[int] = frozenset()
    continues: bool = False


class StopMatch(NamedTuple):
    """The stop string that ended a text, and how many tokens were used through the one that completed it."""

    stop: str
    tokens: int


class TextStream:
    """Turns one sequence's tokens into text as they come. Constant time a token, whatever came before.

    Attributes:
        stopped: the stop string that was found; from then on nothing more comes out.
        offsets: for each token used, the characters of text before it (counting those still held back).
    """

    def __init__(self, tokenizer: Tokenizer, options: TextOptions = TextOptions()) -> None:
        self.stopped: StopMatch | None = None
        self.offsets: list[int] = []
        self._pieces = tokenizer.pieces
        self._texts = tokenizer.texts_showing(options.but_show) if options.skip_special_tokens else tokenizer.texts
        self._hidden = tokenizer.special_ids - options.but_show if options.skip_special_tokens else frozenset()
        self._options = options
        self._decoder = _utf8("replace")
        self._partial = False  # the decoder holds the beginning of a character
        self._drop_space = tokenizer.drops_first_space and not options.continues
        self._length = 0  # characters so far, held ones included
        self._stops = stop_strings(options.stop) if options.stop else None
        self._node = 0
        self._held = ""  # the beginning of a stop string, perhaps

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these further tokens make certain; empty once a stop string was found."""
        if self.stopped:
            return ""
        texts, offsets = self._texts, self.offsets
        released: list[str] = []
        for token in tokens:
            offsets.append(self._length)
            text = texts[token] if 0 <= token < len(texts) else ""
            if text is None or self._partial:
                text = self._decode(token)
            if not text:
                continue
            if self._drop_space:
                self._drop_space = False
                text = text[1:] if text[0] == " " else text
            self._length += len(text)
            released.append(text if self._stops is None else self._until_stop(text))
            if self.stopped:
                break
        return released[0] if len(released) == 1 else "".join(released)

    def finish(self) -> str:
        """The rest: what was held back, and U+FFFD for a character that was never completed. Call it once, at the end."""
        if self.stopped:
            return ""
        text = self._decoder.decode(b"", final=True)
        self._length += len(text)
        released = text if self._stops is None else self._until_stop(text)
        if self.stopped:
            return released
        rest, self._held, self._node = self._held, "", 0
        return released + rest

    def _decode(self, token: int) -> str:
        """The slow way, for parts of characters."""
        if token in self._hidden or not 0 <= token < len(self._pieces):
            return ""
        text = self._decoder.decode(self._pieces[token])
        self._partial = bool(self._decoder.getstate()[0])
        return text

    def _until_stop(self, text: str) -> str:
        """What may be shown of the held text and `text`; sets `stopped` when a stop string is complete."""
        stops = self._stops
        if stops is None or (not self._node and stops.starts.isdisjoint(text)):
            return text
        node, step, found = self._node, stops.step, stops.found
        enough = len(self.offsets) >= self._options.min_tokens
        for end, char in enumerate(text, 1):
            node = step(node, char)
            stop = found[node] if enough else None
            if stop is not None:
                self.stopped = StopMatch(stop, len(self.offsets))
                shown = self._held + text[:end]
                return shown if self._options.include_stop else shown[: len(shown) - len(stop)]
        self._node = node
        shown = self._held + text
        keep = len(shown) - stops.held[node]
        self._held = shown[keep:]
        return shown[:keep]
