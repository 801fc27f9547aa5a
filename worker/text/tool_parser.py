"""Calls of tools in the text of an answer, as it comes: what may be sent at once, and nothing that has to be taken back.

    text -> characters -> content, or what may become a call (it waits) -> a call's name, then its arguments as they are written

The parser is a coroutine that is given one character at a time, so how the text was cut cannot change what comes of it. What begins like a
call waits until it has the name of a tool that there is, and the beginning of its arguments. From then on it is a call, whatever follows;
what turns out before that to be none is content, whole.

Blanks before a marker belong to the format, and so do those behind an answer's last call.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import NamedTuple

from .stops import StopStrings, stop_strings
from .tool_format import ToolFormat

BLANKS = frozenset(" \t\r\n")
NAMES = ("name", "function")  # the second where a small Llama confuses its format with OpenAI's
ARGUMENTS = ("arguments", "parameters")
OTHERS = ("type", "id")  # keys that some models write, too; their values are texts

Reader = Generator[None, str, bool]
TextReader = Generator[None, str, str | None]


class Content(NamedTuple):
    """Further text."""

    text: str


class Call(NamedTuple):
    """A call begins: how many came before it, and the tool's name."""

    call: int
    name: str


class Arguments(NamedTuple):
    """Further text of a call's arguments, which all together are JSON."""

    call: int
    text: str


Piece = Content | Call | Arguments


@dataclass(frozen=True, slots=True)
class CallReading:
    """How calls are to be read.

    Attributes:
        format: how the model writes them.
        names: the tools that there are.
        hidden: markers that are special tokens rather than text, which content never shows.
        forced: the answer is calls and nothing else, so what is not whole at its end is no content.
        single: the answer ends with its first call.
    """

    format: ToolFormat
    names: frozenset[str]
    hidden: frozenset[str] = frozenset()
    forced: bool = False
    single: bool = False


@dataclass(slots=True)
class _Draft:
    """What is known of the object that is being read."""

    name: str | None = None
    arguments: str | None = None  # if they came before the name
    begun: bool = False


class ToolParser:
    """Turns one answer's text into pieces. Constant time a character, whatever came before.

    Attributes:
        calls: how many have begun.
        done: a single call is complete, so the answer has ended; what follows is dropped.
        unread: how many characters that was, of the text that came last.
    """

    def __init__(self, reading: CallReading) -> None:
        self.calls = 0
        self.done = False
        self.unread = 0
        self._reading = reading
        self._pieces: list[Piece] = []
        self._arguments: list[str] = []  # of the call that has begun; not yet in `_pieces`
        self._held: list[str] = []  # read, but not known to be content or a call
        self._char = ""  # is looked at, but not read; empty at the end
        self._idle = False  # content follows, and nothing is held
        self._closed = True  # there is no call whose end is still to be marked
        self._reader = self._answer()
        next(self._reader)

    def push(self, text: str) -> list[Piece]:
        """What this further text makes certain."""
        if self._idle and text and text[-1] not in BLANKS and self._markers.starts.isdisjoint(text):
            return [Content(text)]  # as nearly all content is
        for place, char in enumerate(text):
            if self.done:
                self.unread = len(text) - place
                break
            self._reader.send(char)
        return self._certain()

    def finish(self) -> list[Piece]:
        """The rest. Call it once, at the end."""
        if not self.done:
            self._reader.send("")
        return self._certain()

    def _certain(self) -> list[Piece]:
        self._flush()
        pieces, self._pieces = self._pieces, []
        joined: list[Piece] = []
        for is_content, run in groupby(pieces, lambda piece: isinstance(piece, Content)):
            alike = list(run)
            joined += [Content("".join(piece.text for piece in alike if isinstance(piece, Content)))] if is_content else alike
        return joined

    # --- the coroutine; each of its parts begins and ends with `_char` looked at, but not read ---

    def _answer(self) -> Generator[None, str, None]:
        """Content and calls in turn."""
        self._char = yield
        if self._reading.format.bare:
            yield from self._blanks()
            if self._char == "{":
                yield from self._calls()
        while self._char and not self.done:
            if (yield from self._content()):
                yield from self._calls()
        self._release_last()
        yield

    def _content(self) -> Reader:
        """Passes content on, up to the next marker that opens calls; whether there was one."""
        markers = self._markers
        node = reduce(markers.step, self._held, 0)
        waiting = markers.held[node]
        while self._char:
            char, before = self._char, waiting
            self._held.append(char)
            node = markers.step(node, char)
            waiting = markers.held[node]
            found = markers.found[node]
            if found is not None:
                self._closed, opens = True, found == self._reading.format.marker
                if not opens:
                    self._held.clear()
                self._char = yield
                if opens:
                    return True
                markers, node, waiting = self._markers, 0, 0
            else:
                if waiting != before + 1 and (before or char not in BLANKS):
                    self._release(len(self._held) - (waiting or char in BLANKS))
                self._idle = not self._held
                self._char = yield
                self._idle = False
        return False

    def _calls(self) -> Generator[None, str, None]:
        """Reads what a marker has opened: a call, several in a row, or a list of them. What is none becomes content."""
        yield from self._blanks()
        listed = self._char == "["
        if listed:
            yield from self._take()
            yield from self._blanks()
        while (yield from self._call()):
            if self.done:
                return
            self._closed = not self._reading.format.end
            yield from self._blanks()
            if listed and self._char == "]":
                self._held.clear()
                self._char = yield
                return
            if self._char in (",", ";"):
                yield from self._take()
                yield from self._blanks()
            elif self._char != "{":
                return
        if self._char or not self._reading.forced:
            self._give_up()
        else:
            self._held.clear()

    def _call(self) -> Reader:
        """Reads an object; whether it is a call. If it is none, all of it is held."""
        if self._char != "{":
            return False
        yield from self._take()
        yield from self._blanks()
        draft, fits = _Draft(), True
        while fits and self._char != "}":
            fits = yield from self._member(draft)
        cut_off = self._reading.forced and not self._char
        if draft.name is not None and not draft.begun and (fits or cut_off):
            draft.arguments = "{}" if fits else ""
            self._begin(draft)
        if not draft.begun:
            return False
        if fits or not self._char:
            self._held.clear()
        else:
            self._give_up()
        self.done = self._reading.single
        if fits:
            self._char = yield
        return True

    def _member(self, draft: _Draft) -> Reader:
        """Reads a key and its value; whether a call can have them."""
        key = yield from self._key()
        if key in NAMES and draft.name is None:
            name = yield from self._string()
            if name not in self._reading.names:
                return False
            draft.name = name
        elif key in ARGUMENTS and draft.arguments is None and not draft.begun:
            if draft.name is not None and self._char == "{":
                self._begin(draft)
                yield from self._object(self._arguments)
            else:
                draft.arguments = yield from self._whole_arguments()
                if draft.arguments is None:
                    return False
        elif key not in OTHERS or (yield from self._string()) is None:
            return False
        if draft.name is not None and draft.arguments is not None and not draft.begun:
            self._begin(draft)
        yield from self._blanks()
        if self._char == ",":
            yield from self._take()
            yield from self._blanks()
            return True
        return self._char == "}"

    def _key(self) -> TextReader:
        """Reads a key and the colon behind it."""
        key = yield from self._string()
        yield from self._blanks()
        if self._char != ":":
            return None
        yield from self._take()
        yield from self._blanks()
        return key

    def _whole_arguments(self) -> TextReader:
        """Reads arguments before anything can be made of them: an object, or, as some models have it, a text that holds one."""
        if self._char == "{":
            start = len(self._held)
            return "".join(self._held[start:]) if (yield from self._object(self._held)) else None
        text = yield from self._string()
        return text if text is not None and text.lstrip().startswith("{") else None

    def _object(self, into: list[str]) -> Reader:
        """Reads up to the bracket that closes the one looked at; whether it came."""
        depth, quoted, escaped = 0, False, False
        while self._char:
            char = self._char
            if quoted:
                quoted = char != '"' or escaped
                escaped = char == "\\" and not escaped
            elif char == '"':
                quoted = True
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
            into.append(char)
            self._char = yield
            if depth == 0:
                return True
        return False

    def _string(self) -> TextReader:
        """Reads a string of JSON; what it says, or None where there is none."""
        start, escaped = len(self._held), False
        if self._char != '"':
            return None
        yield from self._take()
        while self._char and (self._char != '"' or escaped):
            escaped = self._char == "\\" and not escaped
            self._held.append(self._char)
            self._char = yield
        if not self._char:
            return None
        yield from self._take()
        try:
            text: str = json.loads("".join(self._held[start:]), strict=False)
            text.encode()  # not half a surrogate pair
        except ValueError:
            return None
        return text

    def _blanks(self) -> Generator[None, str, None]:
        while self._char in BLANKS:
            self._held.append(self._char)
            self._char = yield

    def _take(self) -> Generator[None, str, None]:
        """Reads the character that is looked at."""
        self._held.append(self._char)
        self._char = yield

    # --- what is certain ---

    @property
    def _markers(self) -> StopStrings:
        """What content ends at. The marker behind calls is text like any other where nothing was opened, unless it is never text."""
        format = self._reading.format
        return stop_strings((format.marker,) if self._closed and format.end not in self._reading.hidden else format.markers)

    def _begin(self, draft: _Draft) -> None:
        self._flush()
        self._pieces.append(Call(self.calls, draft.name or ""))
        self._arguments += [draft.arguments] if draft.arguments else []
        self._held.clear()
        self.calls += 1
        draft.begun = True

    def _flush(self) -> None:
        if self._arguments:
            self._pieces.append(Arguments(self.calls - 1, "".join(self._arguments)))
            self._arguments.clear()

    def _release(self, count: int) -> None:
        """The first `count` that are held are content."""
        self._flush()
        text = "".join(self._held[:count])
        del self._held[:count]
        for marker in self._reading.hidden:
            text = text.replace(marker, "")
        if text:
            self._pieces.append(Content(text))

    def _give_up(self) -> None:
        """What is held is no call, but content; its end may begin a marker, though."""
        waiting = self._markers.held[reduce(self._markers.step, self._held, 0)]
        self._release(len(self._held) - waiting)

    def _release_last(self) -> None:
        """At the end of the answer: what is held is content, unless it goes with the calls before it."""
        rest = "".join(self._held).strip()
        if not self.calls or (rest and (self._closed or not self._reading.format.end.startswith(rest))):
            self._release(len(self._held))
