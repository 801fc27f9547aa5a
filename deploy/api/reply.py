"""What chat and completions have in common when they answer: the envelope, whole or as server-sent events.

The JSON of a streamed delta is put together from a prefix made once and one escaped string, since it is made for every token.
"""

from __future__ import annotations

import json
import time
from json.encoder import encode_basestring as json_string  # C; text goes out as UTF-8, not as \u escapes
from typing import Any, ClassVar

from .generation import ChoiceDelta, Usage
from .schemas import ToldUsage

DONE = b"data: [DONE]\n\n"


class Reply:
    """One answer in the making. Subclasses turn deltas into `choices`."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request_id: str, model: str, fingerprint: str, told_usage: ToldUsage) -> None:
        self._envelope = {"id": request_id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._head = "data: " + json.dumps({"object": self.chunk_object, **self._envelope})[:-1] + ', "choices": ['
        self._tail = "]}\n\n" if told_usage is ToldUsage.NEVER else '], "usage": null}\n\n'
        self.told_usage = told_usage

    def events(self, delta: ChoiceDelta, so_far: Usage | None) -> bytes:
        """One or more server-sent events; `so_far` is for `ToldUsage.ALWAYS`."""
        tail = self._tail if so_far is None else f'], "usage": {json.dumps(so_far.body())}}}\n\n'
        return "".join([self._head + choice + tail for choice in self.chunks(delta)]).encode()

    def usage_event(self, usage: Usage) -> bytes:
        """The last event before `[DONE]`, when the client asked for it."""
        return f'{self._head}], "usage": {json.dumps(usage.body())}}}\n\n'.encode()

    def body(self, usage: Usage) -> dict[str, Any]:
        """The whole answer, of the deltas that were given to `add`."""
        return {"object": self.whole_object, **self._envelope, "choices": self.choices(), "usage": usage.body()}

    def chunks(self, delta: ChoiceDelta) -> list[str]:
        """JSON of `choices` entries, each for an event of its own."""
        raise NotImplementedError

    def add(self, delta: ChoiceDelta) -> None:
        """Keeps a delta for `body`."""
        raise NotImplementedError

    def choices(self) -> list[dict[str, Any]]:
        """`choices` of the whole answer, in index order."""
        raise NotImplementedError


def error_event(body: dict[str, Any]) -> bytes:
    """An error in the middle of a stream: the official clients raise it."""
    return f"data: {json.dumps(body)}\n\n".encode()


__all__ = ["DONE", "Reply", "error_event", "json_string"]
